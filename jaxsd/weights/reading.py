"""Read a diffusers folder or a single-file checkpoint into a Model, strictly."""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from jaxsd.config import (
    TEXT_ENCODERS,
    ImageNormalizerConfig,
    ModelConfig,
    ScheduleConfig,
    UNetConfig,
    VisionConfig,
)
from jaxsd.config_files import VERSIONS, read_config
from jaxsd.models import quantized, unet
from jaxsd.models.spec import spec, to_jax
from jaxsd.prompt.tokenizer import Tokenizer
from jaxsd.typing import Device, Params, Path
from jaxsd.weights import hub, marks, names
from jaxsd.weights.configs import TOKENIZERS
from jaxsd.weights.files import (
    LazyArray,
    Reader,
    TensorFile,
    as_dtype,
    component_files,
    open_tensors,
    printable,
)
from jaxsd.weights.model import Model

log = logging.getLogger('jaxsd')
# What a single file can be. Its tensors are the same for sd14 and sd15, and for all of 2.x's
# text-to-image models.
CANDIDATES = ('sd15', 'sd15_inpainting', 'sd15_pix2pix', 'sd21', 'sd2_inpainting', 'sd2_depth',
              'sdxl', 'sdxl_inpainting', 'sdxl_pix2pix', 'sdxl_refiner', 'x4_upscaler')
UNCLIP = 'noise_augmentor.data_mean'  # a tensor that unCLIP has beside 2.1's


def load(path: Path, dtype: DTypeLike | None = 'float32', config: ModelConfig | None = None,
         prediction_type: str | None = None, device: 'Device | None' = None, ema: bool = False,
         base: Path | None = None, strays: bool = False, lazy: bool = False,
         quantize: str | None = None, offload: bool = False) -> Model:
    """Read a model from a diffusers folder, a single file or the Hugging Face Hub.

    path: a folder, a file (.safetensors, or a pickle of torch.save: .ckpt, .pt ..., in which
        nothing is run), or a Hub id ('owner/name') or a model that comes with jaxsd ('emoji',
        'emoji_edges'), where there is no such path.
    dtype: float32, float16 or bfloat16 for all weights; None keeps each tensor's own.
    config: a ModelConfig that replaces what the folder's config.json files, or the names and
        shapes in a single file, say.
    prediction_type: epsilon, v_prediction or sample, whatever the file says. The order: this,
        marker tensors, the header, for 2.x a test on the U-Net's output (see `prediction`).
    device: a jax Device or Sharding on which every tensor is put as soon as it is read.
    ema: the U-Net's averaged weights, of a single file that holds both (model_ema.*).
    base: a model, as `path`, whose VAE or text encoders serve where a single file has none.
    strays: leave out tensors of a single file or folder that are not the model's, with a warning.
    lazy: leave the tensors in the files: leaves are `files.LazyArray`s, for `merge`,
        `merge_models` and `save`; what is not finite is then an error when it is written.
    quantize: a kind of models.quantized.KINDS ('int8', 'float8_e4m3fn', 'q4_0' ...), in which the
        weights of the U-Net's and the text encoders' blocks are kept; they compute in `dtype`.
    offload: all but the U-Net stays on the host, as numpy arrays, and is moved to a device for each
        text and each picture that it encodes or decodes.
    Raises ValueError that lists every missing, unexpected, mis-shaped and non-finite tensor;
    ValueError or FileNotFoundError of one line for files that cannot be read.
    Memory: the weights in `dtype`, or as they are kept, and the largest tensor.
    """
    dtype = as_dtype(dtype)
    quantized.check(quantize)
    if quantize and (lazy or dtype is None):
        raise ValueError(f'quantize={quantize!r}: expected a dtype to compute in, and no lazy=True')
    if offload and lazy:
        raise ValueError('offload and lazy: expected one of them')
    half = dtype is not None and dtype.itemsize == 2
    source = open_source(path, config, half, prediction_type, ema)
    tokenizers = {}
    absent = [] if source.path.is_dir() else source.absent()
    if absent:
        if base is None:
            raise ValueError(f'{path}: has no {", ".join(absent)}; give base=, a model of the same '
                             'version to take it from')
        other = open_source(base, None, half)
        source.take(absent, other)
        tokenizers = _tokenizers(other.path, other.config, absent)
    if strays:
        source.drop_strays()
    params, extras = source.read(dtype, device, lazy, quantize, offload)
    if source.untold:
        source.settle(prediction(jax.tree.map(np.asarray, params['unet']), source.config.unet))
        log.info('%s: does not say what it predicts; by its output %s', path,
                 source.config.schedule.prediction_type)
    tokenizers |= _tokenizers(source.path, source.config, params.keys() - set(absent))
    return Model(source.config, params, tokenizers, extras)


def open_source(path: Path, config: ModelConfig | None = None, half: bool = False,
                prediction_type: str | None = None, ema: bool = False) -> 'Source':
    """The Source of a model at a path or on the Hub; arguments as of `load`."""
    found = pathlib.Path(path).expanduser()
    if not found.exists():
        found = hub.shipped(path)
        if found is None and not hub.is_hub_id(path):
            raise FileNotFoundError(f'{path}: no such file or folder')
        found = found or hub.download(str(path), half)
    if not found.is_dir():
        return open_single(found, config, half, prediction_type, ema)
    if ema:
        raise ValueError(f'{path}: is a folder, which holds one U-Net; ema=True is for a single '
                         'file that holds two')
    return open_folder(found, config, half, prediction_type)


class Source:
    """The tensors that a model is made of, found in files but not read yet.

    tensors: {stored name: (its file's reader, name in that file)}; extras: the stored names that
    are kept as they are; places: {component: {folder name: Place}}, see names.py. untold: whether
    the output has to tell a 2.x model's prediction type; size: the native pixels that it says.
    """

    def __init__(self, path, config, shapes, tensors, places, extras, untold=False, size=None):
        self.path, self.config, self.shapes = path, config, shapes
        self.tensors, self.places, self.extras = tensors, places, extras
        self.untold, self.size = untold, size

    def read(self, dtype: np.dtype | None, device: 'Device | None' = None, lazy: bool = False,
             quantize: str | None = None, offload: bool = False
             ) -> tuple[dict[str, Params], dict[str, np.ndarray]]:
        """-> params, extras. One pass over everything, then one error for all that is wrong."""
        problems = self.mismatches()
        if lazy:
            self._complain(problems)
        wrong = {name for found in problems.values() for name in found}
        params = {part: {} for part in self.places}
        for part, table in self.places.items():
            for name, place in table.items():
                if lazy:
                    params[part][name] = self._lazy(place, name, self.shapes[part][name], dtype)
                elif place.name not in wrong:
                    cast, problem = self._cast(place, self.shapes[part][name], dtype)
                    if problem:
                        problems.setdefault(problem, {})[place.name] = ''
                    if not problems:
                        kept = quantized.quantize(part, name, cast, quantize) or {
                            name: to_jax(name, cast)}
                        if offload and part != 'unet':
                            kept = {name: np.ascontiguousarray(a) for name, a in kept.items()}
                        else:
                            kept = jax.device_put(kept, device)
                        params[part] |= kept
        self._complain(problems)
        return ({part: traverse_util.unflatten_dict(flat, sep='.')
                 for part, flat in params.items()},
                {name: self._raw(name) for name in self.extras})

    def absent(self) -> list[str]:
        """The components of which there is no tensor."""
        return [part for part, table in self.places.items()
                if not any(place.name in self.tensors for place in table.values())]

    def take(self, parts: Iterable[str], base: 'Source') -> None:
        """Complete it with these components of another Source."""
        for part in parts:
            if self.shapes[part] != base.shapes.get(part):
                raise ValueError(f'{base.path}: has no {part} for {self.path}, which is '
                                 f'{self.config.version}; found {base.config.version}')
            self.places[part] = base.places[part]
            self.tensors |= {place.name: base.tensors[place.name]
                             for place in base.places[part].values() if place.name in base.tensors}
        self.config = self.config.replace(**{part: getattr(base.config, part) for part in parts})

    def settle(self, prediction_type: str) -> None:
        """What the output of a 2.x model told."""
        other, config = _version2(prediction_type, self.size), self.config
        vae = other.vae if config.vae == read_config('sd21').vae else config.vae
        self.config = config.replace(unet=other.unet, vae=vae, version=other.version
                                     ).with_prediction(prediction_type)
        self.untold = False

    def drop_strays(self) -> None:
        """Leave out the tensors that are not the model's, and log them."""
        found = list(self.mismatches().get('unexpected', ()))
        if found:
            log.warning('%s: left out %d tensors that are not the model\'s: %s', self.path,
                        len(found), printable(', '.join(found)))
        for name in found:
            del self.tensors[name]

    def mismatches(self) -> dict[str, dict[str, str]]:
        """{kind of problem: {stored name: detail}}, from the headers alone."""
        expected = {place.name: place.shape(self.shapes[part][name])
                    for part, table in self.places.items() for name, place in table.items()}
        problems = {
            'missing': dict.fromkeys(sorted(expected.keys() - self.tensors.keys()), ''),
            'unexpected': dict.fromkeys(
                sorted(self.tensors.keys() - expected.keys() - set(self.extras)), ''),
            'mis-shaped': {}, 'not floating point': {},
        }
        for name in expected.keys() & self.tensors.keys():
            shape, (file, inner) = expected[name], self.tensors[name]
            found, dtype = file.shapes[inner], file.dtypes[inner]
            if squeeze(found) != squeeze(shape):
                problems['mis-shaped'][name] = f' (expected {list(shape)}, found {list(found)})'
            elif dtype.kind in 'iub':
                problems['not floating point'][name] = f' (found {dtype})'
        return {kind: found for kind, found in problems.items() if found}

    def _raw(self, name):
        file, inner = self.tensors[name]
        return file.read(inner)

    def _get(self, place, shape):
        file, inner = self.tensors[place.name]
        if place.how in ('q', 'k', 'v'):
            return file.read(inner, rows=('qkv'.index(place.how), shape[0]))
        array = file.read(inner)
        return array.T if place.how == 'T' else array.reshape(shape)

    def _cast(self, place, shape, dtype):
        """A tensor in a dtype, and what is wrong with its numbers, or ''."""
        array = self._get(place, shape)
        with np.errstate(over='ignore'):
            cast = array if dtype is None else array.astype(dtype, copy=False)
        if np.isfinite(cast).all():
            return cast, ''
        return cast, (f'too large for {dtype}' if np.isfinite(array).all()
                      else 'not finite (NaN or infinity)')

    def _lazy(self, place, name, shape, dtype):
        file, inner = self.tensors[place.name]

        def get():
            cast, problem = self._cast(place, shape, dtype)
            self._complain({problem: {place.name: ''}} if problem else {})
            return to_jax(name, cast)

        return LazyArray(to_jax(name, np.broadcast_to(0, shape)).shape,
                         file.dtypes[inner] if dtype is None else dtype, get)

    def _complain(self, problems, most=20):
        if not problems:
            return
        lists = []
        for kind, found in problems.items():
            lines = [name + detail for name, detail in sorted(found.items())]
            more = f' and {len(lines) - most} more' if len(lines) > most else ''
            lists.append(f'{len(lines)} {kind}: {", ".join(lines[:most])}{more}')
        what = getattr(self.config, 'version', ', '.join(self.places))  # or the network's kind
        stray = ', or strays=True (--strays) to leave out the unexpected ones'
        raise ValueError(printable(
            f'{self.path}: the tensors are not those of the expected model ({what}): '
            f'{"; ".join(lists)}. Download the file again, or give config= for a model of other '
            'sizes' + stray * ('unexpected' in problems and hasattr(self.config, 'version'))))


def open_folder(folder: pathlib.Path, config: ModelConfig | None, half: bool,
                prediction_type: str | None) -> Source:
    single = (folder / 'config.json').exists() and not (folder / 'model_index.json').exists()
    if single and not config:
        _refuse_others(folder, [n for f in component_files(folder, half) for n in f.shapes])
    config = config or read_config(folder)
    config = _given(folder, config, prediction_type, [
        (config.schedule.prediction_type, 'its scheduler_config.json')])
    shapes, tensors, places = spec(config), {}, {}
    for part, expected in shapes.items():
        found = network_tensors(part, component_files(folder / part, half))
        tensors |= {f'{part}/{name}': where for name, where in found.items()
                    if not name.endswith('.position_ids')}  # a constant that older versions saved
        places[part] = {name: names.Place(f'{part}/{name}') for name in expected}
    extras = []
    if (folder / 'extras.safetensors').exists():
        file = TensorFile(folder / 'extras.safetensors')  # jaxsd's own, see save
        extras = [name for name in file.shapes if name not in marks.MARKERS]
        tensors.update({name: (file, name) for name in extras})
    return Source(folder, config, shapes, tensors, places, extras)


def open_single(path: pathlib.Path, config: ModelConfig | None, half: bool,
                prediction_type: str | None, ema: bool = False) -> Source:
    file = open_tensors(path)
    size, said, untold = marks.native_size(file), marks.predictions(file), False
    if config is not None:
        prediction_type = prediction_type or config.schedule.prediction_type
    else:
        config = marks.read_entry(file)
        if config is None:
            kind = prediction_type or (said[0][0] if said else None)
            if kind not in (prediction_type, *marks.WORDS.values()):
                raise ValueError(printable(
                    f'{path}: {said[0][1]} says {kind!r}, a prediction type that is not '
                    'implemented; expected epsilon, v or sample; prediction_type= replaces it'))
            config, untold = _detect(file, kind, size)
        config = marks.with_markers(config, file)
        untold = untold and not config.schedule.edm
    config = _given(path, config, prediction_type, said)
    tensors = {name: (file, inner) for name, inner in names.renamed(
        (name for name in file.shapes if not names.is_ema(name) and name not in marks.MARKERS),
        names.in_single).items()}
    shapes = spec(config)
    places = names.places(config, shapes, tensors)
    if ema:
        averaged = {place.name: names.ema(place.name) for place in places['unet'].values()}
        if not any(name in file.shapes for name in averaged.values()):
            raise ValueError(f'{path}: has no averaged weights (model_ema.*); load it without '
                             'ema=True')
        tensors = {k: v for k, v in tensors.items() if k not in averaged} | {
            name: (file, inner) for name, inner in averaged.items() if inner in file.shapes}
    elif averaged := sum(map(names.is_ema, file.shapes)):
        log.warning('%s: ignoring model_ema.*, the averaged copy of the U-Net (%d tensors); '
                    'ema=True reads it instead', path, averaged)
    used = {place.name for table in places.values() for place in table.values()}
    extras = [name for name in tensors if name not in used and names.is_extra(name, config)]
    return Source(path, config, shapes, tensors, places, extras, untold, size)


def network_tensors(part: str, files: Iterable[Reader]) -> dict[str, tuple[Reader, str]]:
    """{a tensor's name in a current folder: (file, name in it)} of one component's files."""
    where = {}
    for file in files:
        found = names.renamed(file.shapes, lambda name: names.in_folder(part, name))
        where |= {f'{inner} (a second time)' if name in where else name: (file, inner)
                  for name, inner in found.items()}
    return where


def _given(path, config, prediction_type, said):
    """The config with the prediction type that was given; one warning where others are said."""
    if prediction_type:
        config = config.with_prediction(prediction_type)
    taken = config.schedule.prediction_type
    others = [f'{where} says {kind}' for kind, where in said if kind != taken]
    if others:
        log.warning('%s: taken as a model that predicts %s, %s, though %s', path, taken,
                    'as given' if prediction_type else f'as {said[0][1]} says',
                    printable(', '.join(others)))
    return config


def _detect(file, prediction_type=None, size=None):
    """The ModelConfig of the released version whose names and shapes a single file has, and
    whether only its output tells the prediction type.

    prediction_type, size: what is known of it, the native pixels per side.
    """
    _refuse_others(file.path, file.shapes)

    stored = {names.in_single(name): shape for name, shape in file.shapes.items()}
    squeezed = {name: squeeze(shape) for name, shape in stored.items()}

    def agreement(version):
        config = read_config(version).replace(depth_estimator=None)  # a file may lack it
        shapes = spec(config)
        expected = {place.name: place.shape(shapes[part][name])
                    for part, table in names.places(config, shapes, stored).items()
                    for name, place in table.items()}
        same = sum(squeezed.get(name) == squeeze(shape) for name, shape in expected.items())
        exact = sum(stored.get(name) == shape for name, shape in expected.items())
        return same / len(expected), exact / len(expected)  # 1x1 convolutions or matrices

    scores = {version: agreement(version) for version in CANDIDATES}
    best = max(scores, key=scores.get)  # the first one of equals
    if scores[best][0] < 0.25:
        raise ValueError(printable(
            f'{file.path}: not a Stable Diffusion checkpoint that jaxsd knows; expected the '
            'tensors of 1.x, 2.x, the x4 upscaler, SDXL or its refiner (model.diffusion_model.*, '
            f'first_stage_model.* ...), found {len(file.shapes)} tensors such as '
            f'{", ".join(list(file.shapes)[:3])}. Give config= for a model of other sizes.'))
    if best == 'sd21' and UNCLIP in stored:
        return _unclip(stored[UNCLIP][-1], size), False
    if best == 'sd21':
        return _version2(prediction_type or 'v_prediction', size), prediction_type is None
    config = read_config(best)
    built = names.as_built(config.unet, squeezed)
    if built != config.unet:
        config = config.replace(unet=built, version='custom')
    config = _sized(config, size)
    width = next((shape for name, shape in stored.items() if re.fullmatch(
        r'model\.diffusion_model\.time_embed(ding)?\.cond_proj\.weight', name)), None)
    if width is not None:  # LCM's
        config = config.replace(version='custom', unet=dataclasses.replace(
            config.unet, time_cond_proj_dim=width[-1]))
    if not any(name.startswith('depth_model.') for name in file.shapes):
        config = config.replace(depth_estimator=None)
    return config.with_prediction(prediction_type) if prediction_type else config, False


def _version2(prediction_type, size):
    """The ModelConfig of 2.1's text-to-image models, of which one predicts v."""
    version = 'sd21' if prediction_type == 'v_prediction' else 'sd21_base'
    return _sized(read_config(version), size).with_prediction(prediction_type)


def _unclip(width, size):
    """The ModelConfig of 2.1's unCLIP, whose image encoder gives embeddings of this width: CLIP's
    ViT-H's or ViT-L's."""
    config = _sized(read_config('sd21'), size)
    small = {'hidden_size': 1024, 'intermediate_size': 4096, 'num_hidden_layers': 24,
             'hidden_act': 'quick_gelu', 'projection_dim': 768}
    return config.replace(
        unet=dataclasses.replace(config.unet, class_proj_dim=2 * width), version='custom',
        image_encoder=VisionConfig(**small) if width == 768 else VisionConfig(),
        image_normalizer=ImageNormalizerConfig(width),
        image_noise=ScheduleConfig(beta_schedule='squaredcos_cap_v2'))


def _sized(config, size):
    """The config with the native size in pixels, where it is known."""
    latents = size and size // config.vae.factor
    return config.replace(unet=dataclasses.replace(
        config.unet, sample_size=latents or config.unet.sample_size))


def prediction(params: Params, config: UNetConfig) -> str:
    """What a 2.x U-Net predicts, 'epsilon' or 'v_prediction', by what A1111 looks at.

    At the last timestep its input is nothing but noise, which a model that predicts noise gives
    back; one that predicts v gives the negative picture.
    """
    x = jnp.full((1, 8, 8, config.in_channels), 0.5)
    context = jnp.full((1, 2, config.cross_attention_dim), 0.5)

    @jax.jit
    def apply(params):
        wide = jax.tree.map(lambda a: a.astype('bfloat16') if a.dtype == 'float16' else a, params)
        return unet.apply(wide, config, x, jnp.full(1, 999.0), context)

    mean = float(jnp.mean(apply(params) - x))  # in float16 2.1 overflows
    if not np.isfinite(mean):
        raise ValueError('the output of the U-Net, which tells what a 2.x model predicts, is not '
                         'finite; give prediction_type=')
    return 'v_prediction' if mean < -1 else 'epsilon'


def _refuse_others(path, found):
    """ValueError if tensors of these names are known to be something else than a whole model."""
    what, reader, name = names.kind(found)
    if name and reader != 'load':
        use = f'read it with jaxsd.{reader}' if reader else 'jaxsd reads no such file'
        raise ValueError(printable(
            f'{path}: is {what}, by its tensor {name}; expected a whole model; {use}'))


def squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer may be kept as a 1x1 convolution, or the other way round."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _tokenizers(folder, config, parts):
    """Of the text encoders among these parts: the folder's own, or CLIP's for CLIP's vocabulary."""
    index = folder / 'model_index.json'
    index = json.loads(index.read_text()) if index.exists() else {}
    found = {}
    for part in TEXT_ENCODERS:
        text, name = getattr(config, part), TOKENIZERS[part]
        if part not in parts:
            continue
        if (folder / name).is_dir():
            found[part] = Tokenizer.from_folder(folder / name)
        elif index.get(name, [None])[0]:
            raise FileNotFoundError(f'{folder / name}: no such folder. A diffusers folder needs '
                                    f'its {name!r} component; download the whole folder.')
        elif text.vocab_size == 49408:
            pad = '!' if names.is_openclip(text) else None
            found[part] = Tokenizer.from_folder(VERSIONS / 'clip', pad=pad)
        else:
            log.warning('%s: no tokenizer for the %d tokens of its %s; prompts need one', folder,
                        text.vocab_size, part)
    return found
