"""What ControlNets follow, as controlnet_aux and transformers find it."""

import contextlib
import functools
import importlib
import importlib.util
import sys
import types

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util
from safetensors.numpy import load_file
from scipy import ndimage

from jaxsd import images
from jaxsd.config import DepthAnythingConfig, DetectorConfig
from jaxsd.images import openpose
from jaxsd.models import detector, dpt, spec
from jaxsd.run import depth
from jaxsd.run.detectors import detect
from jaxsd.weights import Network

pytestmark = pytest.mark.parity
SPEC = importlib.util.find_spec('controlnet_aux')
NETWORK = 1e-5  # of the largest value; float32 and dozens of layers give 1e-7 to 4e-6


@contextlib.contextmanager
def annotators():
    """aux(name): a module of controlnet_aux, without the package around it, which loads every
    annotator and asks for what these do not need."""
    root = SPEC.submodule_search_locations[0]
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        package = types.ModuleType('controlnet_aux')
        package.__path__ = [root]
        patch.setitem(sys.modules, 'controlnet_aux', package)
        transforms = types.ModuleType('torchvision.transforms')
        transforms.ToTensor = transforms.ToPILImage = lambda: None
        measure = types.ModuleType('skimage.measure')
        measure.label = lambda image, return_num, connectivity: ndimage.label(
            image, np.ones([3] * connectivity))
        filters = types.ModuleType('scipy.ndimage.filters')  # where scipy had it
        filters.gaussian_filter = ndimage.gaussian_filter
        for module in (transforms, measure, filters, types.ModuleType('torchvision'),
                       types.ModuleType('skimage')):
            patch.setitem(sys.modules, module.__name__, module)
        sys.modules['torchvision'].transforms = transforms
        yield lambda name: importlib.import_module(f'controlnet_aux.{name}')
    for name in set(sys.modules) - before:
        if name.startswith(('controlnet_aux', 'geffnet')):
            sys.modules.pop(name)


@pytest.fixture(scope='module')
def aux():
    """See `annotators`."""
    if SPEC is None:
        pytest.skip('controlnet_aux is not installed: make parity installs it')
    with annotators() as found:
        yield found


def enliven(module, seed=0):
    """Every tensor random: weights that keep variance through ReLUs, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.state_dict().items():
            if not p.is_floating_point():
                continue
            noise = torch.randn(p.shape, generator=generator)
            if 'running_var' in name:
                p.copy_(1 + 0.2 * noise.abs())
            elif p.ndim > 1 and p[0].numel() > 1:
                p.copy_(noise * (2 / p[0].numel()) ** 0.5)
            else:
                one = p.ndim == 1 and name.endswith('weight') or 'lambda' in name
                p.copy_(0.1 * noise + float(one))
    return module.eval()


def renamed(module, prefix=''):
    """A module's tensors as its file has them, found by the names and shapes."""
    stored = {name.partition('.')[2] if prefix and name.startswith(prefix) else name: tensor
              for name, tensor in module.state_dict().items()}
    names = detector.renamed({name: tuple(t.shape) for name, t in stored.items()})
    return {new: stored[old].numpy() for new, old in names.items()}


def arrays(tensors):
    return traverse_util.unflatten_dict(
        {k: jnp.asarray(spec.to_jax(k, v)) for k, v in tensors.items()}, sep='.')


def known(module, prefix=''):
    """-> params and config, by the tensors alone, which are all there."""
    tensors = renamed(module, prefix)
    config = detector.config_of({name: a.shape for name, a in tensors.items()})
    assert spec.names(config) == {name: a.shape for name, a in tensors.items()}
    return arrays(tensors), config


def picture(height, width, seed=0):
    """Smooth colours and noise, uint8 [1,H,W,3]."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.zoom(rng.uniform(0, 255, (6, 6, 3)), (height / 6, width / 6, 1), order=1)
    noisy = smooth + rng.normal(0, 20, smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)[None]


def close(params, config, image, theirs, limit=NETWORK):
    ours = np.asarray(jax.jit(detector.apply, static_argnums=1)(params, config, image))
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert theirs.std() > 1e-3 * np.abs(theirs).max()  # it depends on the picture
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= limit, error


def channels_last(tensor):
    return tensor.numpy().transpose(0, 2, 3, 1)


def torched(image):
    return torch.tensor(image.astype(np.float32)).permute(0, 3, 1, 2)


def bgr(image):
    return torched(image[..., ::-1]) / 256 - 0.5


@pytest.mark.slow
@torch.no_grad()
def test_body(aux):
    module, image = enliven(aux('open_pose.model').bodypose_model()), picture(32, 48)
    params, config = known(module, 'model')
    assert config == DetectorConfig('openpose', 64, (6,))
    theirs = torch.cat(module(bgr(image)), 1)
    close(params, config, image, channels_last(theirs))


@torch.no_grad()
def test_hand(aux):
    module, image = enliven(aux('open_pose.model').handpose_model()), picture(32, 32)
    params, config = known(module, 'model')
    assert config == DetectorConfig('openpose_hand', 64, (6,))
    close(params, config, image, channels_last(module(bgr(image))))


@torch.no_grad()
def test_face(aux):
    module, image = enliven(aux('open_pose.face').FaceNet()), picture(32, 32)
    params, config = known(module)
    assert config == DetectorConfig('openpose_face', 64, (6,))
    close(params, config, image, channels_last(module(bgr(image))[-1]))


@torch.no_grad()
def test_hed(aux):
    module, image = enliven(aux('hed').ControlNetHED_Apache2()), picture(64, 48)
    params, config = known(module)
    assert config == DetectorConfig('hed', 64, (2, 2, 3, 3, 3))
    edges = [cv2.resize(e[0, 0].numpy(), (48, 64), interpolation=cv2.INTER_LINEAR)
             for e in module(torched(image))]
    scale = 3 / np.abs(np.mean(edges, 0)).max()  # where a sigmoid is not 0 or 1
    for i in range(1, 6):
        params[f'block{i}']['projection'] = jax.tree.map(
            lambda a: scale * a, params[f'block{i}']['projection'])
    theirs = 1 / (1 + np.exp(-scale * np.mean(edges, 0).astype(np.float64)))
    close(params, config, image, theirs[None])


@torch.no_grad()
def test_lineart(aux):
    module, image = enliven(aux('lineart').Generator(3, 1, 3)), picture(64, 48)
    params, config = known(module)
    assert config == DetectorConfig('lineart', 64, (3,))
    close(params, config, image, module(torched(image) / 255)[:, 0].numpy())


@pytest.mark.slow
@torch.no_grad()
def test_lineart_anime(aux):
    module = enliven(aux('lineart_anime').UnetGenerator(3, 1, 8, 64, functools.partial(
        torch.nn.InstanceNorm2d, affine=False, track_running_stats=False)))
    module.model.model[3].weight.mul_(0.3)  # where a tanh is neither -1 nor 1
    params, config = known(module)
    assert config == DetectorConfig('lineart_anime', 64, (8,))
    image = picture(256, 256)
    theirs = (module(torched(image) / 127.5 - 1)[:, 0].numpy() + 1) / 2
    close(params, config, image, theirs)


@torch.no_grad()
def test_mlsd(aux):
    module = enliven(aux('mlsd.models.mbv2_mlsd_large').MobileV2_MLSD_Large())
    params, config = known(module)
    assert config.kind == 'mlsd'
    image = picture(64, 96)
    x = torch.cat([torched(image), torch.ones(1, 1, 64, 96)], 1) / 127.5 - 1
    close(params, config, image, channels_last(module(x)[:, :5]))


@pytest.mark.slow
@torch.no_grad()
def test_normal_bae(aux, monkeypatch):
    """With two layers a stage, where the released network has up to nine."""
    def fewer(path, name, **_):
        sys.path.insert(0, path)
        from geffnet import gen_efficientnet
        sys.path.pop(0)
        return gen_efficientnet._gen_efficientnet(
            name, channel_multiplier=1.6, depth_multiplier=0.6, bn_eps=1e-3, pad_type='same')

    monkeypatch.setattr(torch.hub, 'load', fewer)
    args = types.SimpleNamespace(sampling_ratio=0.4, importance_ratio=0.7, architecture='BN')
    module, image = enliven(aux('normalbae.nets.NNET').NNET(args)), picture(64, 96)
    params, config = known(module)
    assert config.kind == 'normal_bae' and len(config.blocks) == 7
    mean, std = (torch.tensor(v)[:, None, None] for v in (detector.MEAN, detector.STD))
    theirs = module((torched(image) / 255 - mean) / std)[0][-1][:, :3]
    close(params, config, image, channels_last(theirs))


TINY = DepthAnythingConfig(image_size=56, hidden_size=24, intermediate_size=96,
                           num_hidden_layers=4, num_attention_heads=3, out_indices=(1, 2, 3, 4),
                           neck_hidden_sizes=(8, 12, 16, 20), fusion_hidden_size=16,
                           head_hidden_size=8)


def depth_anything(c):
    backbone = transformers.Dinov2Config(
        hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, mlp_ratio=c.intermediate_size // c.hidden_size,
        image_size=c.image_size, patch_size=c.patch_size, apply_layernorm=True,
        reshape_hidden_states=False, out_indices=list(c.out_indices))
    return enliven(transformers.DepthAnythingForDepthEstimation(transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=c.patch_size,
        reassemble_hidden_size=c.hidden_size, neck_hidden_sizes=list(c.neck_hidden_sizes),
        fusion_hidden_size=c.fusion_hidden_size, head_hidden_size=c.head_hidden_size)))


@pytest.mark.parametrize('size', [(56, 56), (42, 84)])
@torch.no_grad()
def test_depth_anything(size, tmp_path):
    module = depth_anything(TINY)
    module.head.conv3.bias.fill_(30.0)
    pixels = np.random.default_rng(0).normal(0, 1, (2, *size, 3)).astype(np.float32)
    theirs = module(torched(pixels)).predicted_depth.numpy()
    module.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    tensors.pop('backbone.embeddings.mask_token')
    assert spec.names(TINY) == {name: a.shape for name, a in tensors.items()}
    ours = jax.jit(dpt.depth_anything, static_argnums=1)(arrays(tensors), TINY, pixels)
    assert (theirs > 0).mean() > 0.5 and theirs.std() > 0.05
    assert np.abs(np.asarray(ours) - theirs).max() <= NETWORK * theirs.max()


def pictured(aux, name, module, net, image, kind, **call):
    """The annotator's picture beside ours, of a picture of its own resolution."""
    theirs = getattr(aux(name), call.pop('of'))(*module)(
        image[0], detect_resolution=min(image.shape[1:3]), image_resolution=min(image.shape[1:3]),
        output_type='np', **call)
    return detect(kind, image[0], [net]).astype(int), theirs.astype(int)


@torch.no_grad()
def test_edges(aux):
    module, image = enliven(aux('hed').ControlNetHED_Apache2()), picture(64, 128)
    for i in range(1, 6):
        getattr(module, f'block{i}').projection.weight.mul_(0.02)
    net = Network(*known(module)[::-1])
    for kind, call in (('softedge_hed', {}), ('softedge_hedsafe', {'safe': True}),
                       ('scribble_hed', {'scribble': True})):
        ours, theirs = pictured(aux, 'hed', [module], net, image, kind, of='HEDdetector', **call)
        assert 0 < (theirs > 127).mean() < 1
        # Where rounding passes a whole number, a step of the grays, or a ridge's threshold.
        assert (abs(ours - theirs) > (kind == 'softedge_hed')).mean() <= 0.01, kind
    with pytest.raises(ValueError, match='scribble_hed needs .* ControlNetHED.pth'):
        detect('scribble_hed', image[0], [])


@torch.no_grad()
def test_lines(aux):
    module, image = enliven(aux('lineart').Generator(3, 1, 3)), picture(64, 64)
    net = Network(*known(module)[::-1])
    ours, theirs = pictured(aux, 'lineart', [module, None], net, image, 'lineart_realistic',
                            of='LineartDetector')
    assert theirs.std() > 20 and abs(ours - theirs).max() <= 1


@torch.no_grad()
def test_straight_lines(aux):
    module, image = enliven(aux('mlsd.models.mbv2_mlsd_large').MobileV2_MLSD_Large()), picture(
        64, 128)
    net = Network(*known(module)[::-1])
    ours, theirs = pictured(aux, 'mlsd', [module], net, image, 'mlsd', of='MLSDdetector')
    assert 0.01 < (theirs > 0).mean() < 0.9
    assert (ours != theirs).mean() <= 0.01  # ends that rounding moves by a pixel


def scene(rng, shape, count):
    """Maps [h,w,57] of people whose limbs cross, some without some points."""
    h, w = shape
    y, x = np.mgrid[:h, :w]
    heat, fields = np.zeros((h, w, 19)), np.zeros((h, w, 38))
    for _ in range(count):
        points = rng.uniform(0.05, 0.95, (18, 2)) * [w, h]
        points[rng.uniform(size=18) < 0.15] = np.nan
        for i, (px, py) in enumerate(points):
            if not np.isnan(px):
                heat[..., i] = np.maximum(heat[..., i], rng.uniform(0.5, 1) * np.exp(
                    -((x - px)**2 + (y - py)**2) / 3))
        for (a, b), field in zip(openpose.JOINTS, openpose.FIELDS):
            way = points[b] - points[a]
            if np.isnan(way).any():
                continue
            unit = way / np.linalg.norm(way)
            along = (x - points[a, 0]) * unit[0] + (y - points[a, 1]) * unit[1]
            across = abs((x - points[a, 0]) * unit[1] - (y - points[a, 1]) * unit[0])
            on = (along > -1) & (along < np.linalg.norm(way) + 1) & (across < 1)
            fields[..., field:field + 2][on] = unit
    return np.concatenate([fields, heat], -1).astype(np.float32)


class Fake(torch.nn.Module):
    """A network that gives made up maps, and remembers what it saw."""

    def __init__(self, make, out):
        super().__init__()
        self.weight, self.make, self.out = torch.nn.Parameter(torch.zeros(1)), make, out
        self.theirs, self.ours = [], []

    def forward(self, x):
        self.theirs.append(x[0].numpy())
        return self.out(torch.tensor(self.make(x.shape[2] // 8, x.shape[3] // 8)).permute(
            2, 0, 1)[None])

    def see(self, image):
        self.ours.append((image[..., ::-1].astype(np.float32) / 256 - 0.5).transpose(2, 0, 1))
        return self.make(image.shape[0] // 8, image.shape[1] // 8)


def blobs(seed, channels):
    """make(h, w): two spots of each part, the same at all sizes; some parts have none."""
    rng = np.random.default_rng(seed)
    at, value = rng.uniform(0, 1, (2, 2, channels)), rng.uniform(0.2, 1, (2, channels))
    value[:, rng.uniform(size=channels) < 0.2] = 0.01

    def make(h, w):
        y, x = np.mgrid[:h, :w] / max(h, w)
        far = (x[..., None] - at[:, 0, None, None])**2 + (y[..., None] - at[:, 1, None, None])**2
        return (value[:, None, None] * np.exp(-far / 0.01)).sum(0).astype(np.float32)

    return make


@pytest.mark.parametrize('seed, size, count', [(0, (240, 320), 1), (1, (400, 300), 3),
                                               (2, (151, 233), 5), (3, (512, 512), 2)])
def test_people(aux, seed, size, count):
    """Points joined to people, hands and faces, from the same maps; all that is seen of the
    picture; and the drawing."""
    rng, op = np.random.default_rng(seed), aux('open_pose')
    made = {}

    def body_maps(h, w):
        return made.setdefault((h, w), scene(rng, (h, w), count))

    fakes = [Fake(body_maps, lambda maps: (maps[:, :38], maps[:, 38:])),
             Fake(blobs(seed, 22), lambda maps: maps), Fake(blobs(seed, 71), lambda maps: [maps])]
    parts = [object.__new__(kind) for kind in (op.Body, op.Hand, op.Face)]
    for part, fake in zip(parts, fakes):
        part.model = fake
    image = picture(*size)[0]
    poses = op.OpenposeDetector(*parts).detect_poses(image, True, True)
    ours = openpose.people(image, *(fake.see for fake in fakes))
    assert len(ours) == len(poses) > 0
    for fake in fakes:
        assert len(fake.ours) == len(fake.theirs)
        for a, b in zip(fake.ours, fake.theirs):
            np.testing.assert_array_equal(a, b)
    for person, pose in zip(ours, poses):
        theirs = [(np.nan,) * 2 if k is None else (k.x, k.y) for k in pose.body.keypoints]
        np.testing.assert_array_equal(person.body, theirs)
        for side in ('left_hand', 'right_hand', 'face'):
            theirs = np.array([(k.x, k.y) for k in getattr(pose, side) or ()]).reshape(-1, 2)
            found = getattr(person, side)
            if side == 'face':  # there those that are not found are left out
                found = found[~np.isnan(found).any(1)]
                theirs = theirs[(theirs > 0).all(1)]
            theirs = np.where((theirs <= 0).any(1, keepdims=True), np.nan, theirs)
            np.testing.assert_allclose(found, theirs, atol=1e-6)  # theirs in float32
    bodies = [images.Person(person.body) for person in ours]
    np.testing.assert_array_equal(images.draw_pose(bodies, size[1], size[0]), op.draw_poses(
        poses, *size, draw_hand=False, draw_face=False))
    assert seed == 0 or fakes[1].ours and fakes[2].ours


@pytest.mark.parametrize('size', [(100, 150), (40, 31), (56, 56)])
def test_what_depth_anything_sees(size):
    """As by the preprocessor_config.json of Depth-Anything-V2-Small-hf, at a small size."""
    processor = transformers.DPTImageProcessorPil(
        size={'height': 56, 'width': 56}, keep_aspect_ratio=True, ensure_multiple_of=14,
        resample=3, image_mean=list(detector.MEAN), image_std=list(detector.STD))
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    theirs = processor(images=list(image), return_tensors='pt').pixel_values.permute(0, 2, 3, 1)
    ours = depth.pixels(image, depth._near(size, TINY), detector.MEAN, detector.STD)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs.numpy()).max() <= 1e-6
