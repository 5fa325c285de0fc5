"""Hints for ControlNets that networks find in a picture, as controlnet_aux and A1111 find them."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsd import images
from jaxsd.config import DepthAnythingConfig, DetectorConfig, DPTConfig
from jaxsd.images import openpose
from jaxsd.images.opencv import opencv
from jaxsd.images.pose import Person
from jaxsd.images.preprocess import check_option
from jaxsd.images.reading import Picture
from jaxsd.models import detector
from jaxsd.run import depth
from jaxsd.sampling.choice import one_of
from jaxsd.typing import ImageLike
from jaxsd.weights.model import Network

Networks = Mapping[str, Network] | Iterable[Network]

STEP = 64  # pictures of other sides are extended to multiples of it: fewer programs
FILES = {  # what networks are called where they were published, by what they find
    'openpose': 'body_pose_model.pth', 'openpose_hand': 'hand_pose_model.pth',
    'openpose_face': 'facenet.pth', 'hed': 'ControlNetHED.pth', 'lineart': 'sk_model.pth',
    'lineart_coarse': 'sk_model2.pth', 'lineart_anime': 'netG.pth',
    'mlsd': 'mlsd_large_512_fp32.pth', 'normal_bae': 'scannet.pt',
    'midas': 'dpt_hybrid-midas-501f0c75.pt', 'depth_anything': 'depth_anything_vits14.pth',
    'depth_anything_v2': 'depth_anything_v2_vits.pth'}
_COARSE = ('sk_model2', 'lineart_coarse')  # differs from sk_model in its name alone


class Detector(NamedTuple):
    """networks: what has to be there, of FILES; find(networks, image, **options) -> the hint."""

    networks: tuple[str, ...]
    find: Callable[..., Picture]


def detect(kind: str, image: ImageLike, networks: Networks, **options: Any) -> Picture:
    """The hint of a kind in DETECTORS for a picture, uint8 [H,W,3] of its size.

    image: a path, a PIL image or an array. networks: of `jaxsd.load_detector`, by any names or
    without; others than the kind needs may be among them. options: of mlsd, score and distance,
    the least of a line. Raises ValueError for unknown kinds and where a network is missing,
    TypeError for options that the kind has not.
    """
    one_of('detector', kind, DETECTORS)
    return DETECTORS[kind].find(chosen(kind, networks), images.read(image), **options)


def hint(kind: str, source: Any, width: int | None = None, height: int | None = None,
         networks: Networks = (), **options: Any) -> Picture:
    """`images.hint`, of the kinds in DETECTORS too, for which networks has to hold what they need.
    """
    if kind not in DETECTORS:
        if kind not in (*images.PREPROCESSORS, 'pose'):
            one_of('preprocessor', kind, [*images.PREPROCESSORS, 'pose', *DETECTORS])
        return images.hint(kind, source, width, height, **options)
    chosen(kind, networks)  # before anything is read
    image = images.read(source)
    if width and height:
        image = images.fit(image, width, height)
    return detect(kind, image, networks, **options)


def possible(networks: Networks) -> list[str]:
    """The kinds in DETECTORS for which all networks are there."""
    there = _by_what_they_find(networks)
    return [kind for kind, one in DETECTORS.items() if all(name in there for name in one.networks)]


def chosen(kind: str, networks: Networks) -> dict[str, Network]:
    """{what it finds: Network} of those that a kind in DETECTORS needs. Raises ValueError where one
    is missing."""
    there = _by_what_they_find(networks)
    missing = [name for name in DETECTORS[kind].networks if name not in there]
    if missing:
        files = ', '.join(FILES[name] for name in missing)
        raise ValueError(f'{kind} needs a network that is not there: give {files} (lllyasviel/'
                         'Annotators has those of .pth) as --detectors=PATH, or as '
                         'jaxsd.load_detector(path)')
    return {name: there[name] for name in DETECTORS[kind].networks}


def _by_what_they_find(networks):
    named = networks.items() if isinstance(networks, Mapping) else (('', net) for net in networks)
    found: dict[str, Network] = {}
    for name, net in named:
        found.setdefault(_finds(name, net), net)  # the first of several
    return found


def _finds(name, net):
    config = getattr(net, 'config', None)
    if isinstance(config, DPTConfig):
        return 'midas'
    if isinstance(config, DepthAnythingConfig):
        last = config.num_hidden_layers
        return f'depth_anything{"_v2" if config.out_indices[0] < last - 3 else ""}'
    if not isinstance(config, DetectorConfig):
        raise ValueError(f'expected networks of load_detector, found {net!r}')
    return 'lineart_coarse' if config.kind == 'lineart' and name in _COARSE else config.kind


_program = jax.jit(detector.apply, static_argnums=1)


def _seen(net, image):
    """A network's maps of a picture of any size, [h,w,...]: it is extended by its edge."""
    step = max(detector.step(net.config), STEP)
    rows, columns = image.shape[:2]
    padded = np.pad(image, ((0, -rows % step), (0, -columns % step), (0, 0)), 'edge')
    found = np.asarray(_program(net.params, net.config, padded[None]))[0]
    return found[:rows * found.shape[0] // len(padded),
                 :columns * found.shape[1] // padded.shape[1]]


def people(kind: str, image: Picture, networks: Networks) -> list[Person]:
    """The people of a picture, as a kind 'openpose...' in DETECTORS finds them. Raises as `detect`.
    """
    return _people(chosen(kind, networks), image)


def _people(networks, image):
    def see(name):
        net = networks.get(name)
        return net and (lambda picture: np.asarray(
            _program(net.params, net.config, picture[None]))[0])

    return openpose.people(image, see('openpose'), see('openpose_hand'), see('openpose_face'))


def _pose(networks, image, body=True):
    """Skeletons on black, of bodies or of faces alone."""
    people = _people(networks, image)
    if not body:
        people = [person._replace(body=np.full((18, 2), np.nan)) for person in people]
    return images.draw_pose(people, image.shape[1], image.shape[0])


def _softedge(networks, image, safe=False):
    """White edges on black. safe: in three grays, in which little of the picture can hide."""
    edges = _seen(networks['hed'], image).astype(np.float64)
    if safe:
        edges = np.floor(3 * edges.astype(np.float32)) / 2
    return _gray(255 * edges)


def _scribble(networks, image):
    """Soft edges as thick strokes: their ridges, blurred and cut off."""
    cv2, edges = opencv('scribble_hed'), _softedge(networks, image)[..., 0]
    x, ridges = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), 3.0), np.zeros(edges.shape)
    for line in (np.eye(3), np.eye(3)[::-1], np.eye(3)[[1, 1, 1]], np.eye(3)[[1, 1, 1]].T):
        ridges = np.where(cv2.dilate(x, line.astype(np.uint8)) == x, x, ridges)
    strokes = cv2.GaussianBlur(np.where(ridges > 127, np.uint8(255), np.uint8(0)), (0, 0), 3.0)
    return _gray(np.where(strokes > 4, 255, 0))


def _lineart(networks, image):
    """White lines on black."""
    net, = networks.values()
    return 255 - _gray(255 * _seen(net, image))


def _lineart_anime(networks, image):
    """White lines on black; the network sees the picture stretched to multiples of 256."""
    cv2, net = opencv('lineart_anime'), networks['lineart_anime']
    rows, columns = image.shape[:2]
    step = detector.step(net.config)
    wide = cv2.resize(image, (-(-columns // step) * step, -(-rows // step) * step),
                      interpolation=cv2.INTER_CUBIC)
    lines = 255 * np.asarray(_program(net.params, net.config, wide[None]))[0]
    return 255 - _gray(cv2.resize(lines, (columns, rows), interpolation=cv2.INTER_CUBIC))


def _mlsd(networks, image, score=0.1, distance=0.1):
    """Straight lines, a pixel thin, white on black. score: the least that counts, 0 to 1; distance:
    the least length, in pixels of half the picture's size."""
    check_option('score', score, 0, 1)
    check_option('distance', distance, 0)
    cv2, maps = opencv('mlsd'), _seen(networks['mlsd'], image)
    heat = 1 / (1 + np.exp(-maps[..., 0]))
    heat = np.where(cv2.dilate(heat, np.ones((3, 3), np.uint8)) == heat, heat, 0)
    canvas = np.zeros(image.shape[:2], np.uint8)
    for at in np.argsort(-heat, None, 'stable')[:200]:
        y, x = np.unravel_index(at, heat.shape)
        start, end = maps[y, x, 1:3], maps[y, x, 3:5]
        if heat[y, x] > score and np.linalg.norm(end - start) > distance:
            ends = (2 * ((x, y) + way) for way in (start, end))
            cv2.line(canvas, *(end.astype(int).tolist() for end in ends), 255, 1)
    return _gray(canvas)


def _normals(networks, image):
    """Normals as colours: what faces the viewer is blue."""
    normals = _seen(networks['normal_bae'], image)
    return np.clip(255 * np.clip((normals + 1) * 0.5, 0, 1), 0, 255).astype(np.uint8)


def _depth(networks, image):
    """Depth, near is white."""
    net, = networks.values()
    rows, columns = image.shape[:2]
    return images.depth(images.cubic(depth.estimate(net, image[None])[0], rows, columns))


def _gray(values):
    """[H,W] of 0 to 255 -> uint8 [H,W,3], cut off as the annotators do."""
    return np.repeat(np.clip(values, 0, 255).astype(np.uint8)[..., None], 3, -1)


DETECTORS = {  # under the names of controlnet_aux and sd-webui-controlnet
    'openpose': Detector(('openpose',), _pose),
    'openpose_hand': Detector(('openpose', 'openpose_hand'), _pose),
    'openpose_face': Detector(('openpose', 'openpose_face'), _pose),
    'openpose_faceonly': Detector(('openpose', 'openpose_face'),
                                  functools.partial(_pose, body=False)),
    'openpose_full': Detector(('openpose', 'openpose_hand', 'openpose_face'), _pose),
    'softedge_hed': Detector(('hed',), _softedge),
    'softedge_hedsafe': Detector(('hed',), functools.partial(_softedge, safe=True)),
    'scribble_hed': Detector(('hed',), _scribble),
    'lineart_realistic': Detector(('lineart',), _lineart),
    'lineart_coarse': Detector(('lineart_coarse',), _lineart),
    'lineart_anime': Detector(('lineart_anime',), _lineart_anime),
    'mlsd': Detector(('mlsd',), _mlsd),
    'normal_bae': Detector(('normal_bae',), _normals),
    'depth_midas': Detector(('midas',), _depth),
    'depth_anything': Detector(('depth_anything',), _depth),
    'depth_anything_v2': Detector(('depth_anything_v2',), _depth)}
