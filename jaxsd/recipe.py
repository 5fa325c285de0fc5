"""What the files in configs/ have in common. No heavy imports: `--help` must be quick."""

from __future__ import annotations

import ast
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

if TYPE_CHECKING:
    from jaxsd.run.request import Request
    from jaxsd.typing import Device, Path
    from jaxsd.weights.model import Model

LONGEST = 2**16  # characters of options
NO_LITERAL = (SyntaxError, ValueError, RecursionError, MemoryError)  # the last: nested too deeply

MODELS = ('--checkpoints', '--vaes', '--controlnet', '--detectors')  # a folder may be one model

# Fields of a recipe: their default, or their type where the model or the file decides; and what
# they are.
FIELDS = {
    'width': (int, 'pixels, those that the model is made for if left out'),
    'height': (int, 'the same'),
    'steps': (int, 'steps of the sampler, those that suit the model if left out, most often 25'),
    'guidance': (float, 'classifier-free guidance scale, 1 for none; the same, most often 7'),
    'image_guidance': (float, 'instruct-pix2pix: the scale of the image, 1 for none; 1.5 if left '
                       'out'),
    'sampler': (str, 'its name, see docs/samplers.md; the same, most often dpmpp_2m'),
    'schedule': (str, 'noise schedule: a name, a .json file, levels as 14.6,7.3,1,0, or '
                 'diffusers:PATH, a scheduler_config.json; the same, most often karras'),
    'eta': (float, "noise of ddim and the ancestral samplers, the sampler's own if left out"),
    'sampler_options': ('', '"order=3, solver_type=heun", written like arguments in Python'),
    'schedule_options': ('', 'the same for the schedule'),
    'guidance_options': ('', 'the same for guidance: "rescale=0.7, interval=(0.1, 0.8)"'),
    'hires': ('', '"scale=2, upscaler=lanczos, strength=0.5": a second pass at a larger size, see '
              'jaxsd.Hires'),
    'aspect': (str, 'SDXL: 16:9 and the like, instead of width and height'),
    'dtype': ('auto', 'float32, bfloat16 or float16; auto: float32 on CPU, else bfloat16'),
    'quantize': (str, 'int8, float8_e4m3fn, q8_0, q4_0 and others: how weights are kept, for less '
                 'memory; they compute in dtype, see docs/memory.md'),
    'offload': (False, 'text encoders and VAE stay on the host but for their use'),
    'prediction': (str, 'epsilon or v_prediction, whatever the file says'),
    'base': (str, 'a model whose VAE or text encoders serve where a file has none'),
    'ema': (False, 'the averaged weights of a file that holds both'),
    'tile': (0, 'decode in tiles of so many pixels per side, for less memory; 0: in one piece'),
    'request': ('', 'any other field of jaxsd.Request: "mask_blur=4, crop=(0, 256)"'),
}


def recipe(checkpoint: Path, size: int | None, **changes: Any) -> ConfigDict:
    """A generation recipe as a locked ConfigDict of FIELDS; each is a flag, `--steps=30`.

    checkpoint: a folder, a .safetensors file or a Hugging Face Hub id; size: pixels per side, None:
    what the model is made for, or the image makes it.
    """
    config = ConfigDict({'checkpoint': str(checkpoint), **{
        name: placeholder(default) if isinstance(default, type) else default
        for name, (default, _) in FIELDS.items()}})
    if size:
        config.width = config.height = size
    config.update(changes)
    return config.lock()


def get_config() -> ConfigDict:
    """The recipe of a checkpoint that is given without one: its file says version, size, prediction
    and what suits it."""
    return recipe('', None)


def fields(config: ConfigDict, only: Collection[str] | None = None) -> dict[str, Any]:
    """What a recipe says of a jaxsd.Request -> a dict of its arguments.

    only: names of the recipe's fields that count; None: all.
    Raises ValueError for a field that a Request does not have.
    """
    from jaxsd.run.request import Request
    from jaxsd.sampling.choice import one_of
    more = options(config.request)
    for name in more:
        one_of('field of Request', name, Request.__dataclass_fields__)
    size = () if config.aspect else ('width', 'height')
    found = {name: config[name] for name in (
        'sampler', 'schedule', 'steps', 'guidance', 'image_guidance', 'eta', 'aspect', *size)}
    found |= {name: options(config[name]) for name in (
        'sampler_options', 'schedule_options', 'guidance_options')}
    if config.hires:
        found['hires'] = options(config.hires)
    if only is not None:
        found = {name: value for name, value in found.items() if name in only}
    return {**found, **more}


def load(config: ConfigDict, checkpoint: str | None = None, device: Device | None = None,
         strays: bool = False) -> tuple[Model, str, str]:
    """A recipe's model, or another checkpoint in its dtype -> (model, its name, dtype).

    strays: leave out what is not the model's, see `jaxsd.load`.
    """
    import jax

    import jaxsd
    dtype, source = config.dtype, checkpoint or config.checkpoint
    if dtype == 'auto':
        dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    model = jaxsd.load(source, dtype=dtype, prediction_type=config.prediction, device=device,
                       ema=config.ema, base=config.base, strays=strays,
                       quantize=config.quantize, offload=config.offload)
    return model, model_name(source), dtype


def model_name(source: str) -> str:
    """What a checkpoint is called: as its file or folder, or its id on the Hub."""
    name = source.removesuffix('.safetensors').rstrip('/')
    return pathlib.Path(name).name if os.path.exists(source) else name


def complete(model: Model, requests: Sequence[Request] | None, dtype: str,
             loras: Mapping[str, Path], embeddings: Mapping[str, Path],
             device: Device | None = None, strays: bool = False,
             controlnets: Mapping[str, Path] = MappingProxyType({}), fitting: bool = False,
             upscalers: Mapping[str, Path] = MappingProxyType({}),
             ip_adapters: Mapping[str, Path] = MappingProxyType({}),
             image_encoders: Sequence[Path] = (),
             detectors: Mapping[str, Path] = MappingProxyType({})
             ) -> tuple[Model, dict[str, list[str]]]:
    """The model with what resolved requests name -> it, and what a picture's record says of that.

    requests: None: whatever is there counts as named. loras, embeddings: {name: path}, see `files`;
    ControlNets that requests name are named by their paths, `controlnets` {name: path} are there
    beside them. strays: see `jaxsd.load_adapter`. fitting: leave out LoRAs, embeddings and
    IP-Adapters that are not for this model, with a warning. upscalers: {name: path}, for Hires.
    ip_adapters: {name: path}, each with the one of image_encoders that gives what it reads.
    detectors: {name: path}, for hints.
    """
    import jaxsd
    from jaxsd.run.hires import passes
    from jaxsd.run.request import Hires
    from jaxsd.run.text_conditioning import parse_prompts
    nets = sorted({control.net for request in requests or () for control in request.controls})
    if requests is not None:
        drawn = [one for request in requests for one in passes(request)]
        asked = {name for request in drawn for name in parse_prompts(request).adapters}
        words = ' '.join({text for r in drawn for text in r.texts}).lower()
        loras = {name: path for name, path in loras.items() if name in asked}
        embeddings = {name: path for name, path in embeddings.items() if name.lower() in words}
        used = {request.hires.upscaler for request in requests if isinstance(request.hires, Hires)}
        upscalers = {name: path for name, path in upscalers.items() if name in used}
        seen = {prompt.net for request in requests for prompt in request.image_prompts}
        ip_adapters = {name: path for name, path in ip_adapters.items() if name in seen}
    model = model.replace(
        controlnets={n: _control(p, model, dtype, device)
                     for n, p in {**{n: n for n in nets}, **controlnets}.items()},
        adapters=_loaded(loras, fitting, lambda n, p: jaxsd.load_adapter(
            p, model, device, strays)),
        embeddings=_loaded(embeddings, fitting, lambda n, p: jaxsd.load_embedding(
            p, model.config, n)),
        upscalers=_loaded(upscalers, fitting, lambda n, p: jaxsd.load_upscaler(
            p, dtype, device)),
        ip_adapters=_ip_adapters(model, ip_adapters, image_encoders, dtype, device, fitting),
        detectors={n: jaxsd.load_detector(p, device=device) for n, p in detectors.items()})
    encoders = {'image_encoder': [str(path) for path in image_encoders]} if ip_adapters else {}
    return model, encoders | {flag: [f'{name}={path}' for name, path in found.items()]
                              for flag, found in (('lora', loras), ('embeddings', embeddings),
                                                  ('upscalers', upscalers),
                                                  ('ip_adapter', ip_adapters))}


def _control(path, model, dtype, device):
    """A ControlNet, one that a Control-LoRA makes of the model, or a T2I-Adapter -> Network."""
    import jaxsd
    from jaxsd.weights.parts import is_t2i_adapter
    if is_t2i_adapter(path):
        return jaxsd.load_t2i_adapter(path, dtype, device=device)
    return jaxsd.load_controlnet(path, dtype, device=device, base=model)


def _ip_adapters(model, paths, image_encoders, dtype, device, fitting):
    """{name: IPAdapter} of files, each with an image encoder that fits, if there is one."""
    import jaxsd
    from jaxsd.models import ip_adapter
    from jaxsd.weights.ip_adapters import check_encoder, fits
    encoders = [jaxsd.load_image_encoder(path, dtype, device=device)
                for path in image_encoders] if paths else []

    def load(name, path):
        found = jaxsd.load_ip_adapter(path, None, dtype, device)
        ip_adapter.check(found.config, model.config.unet)
        own = [encoder for encoder in encoders if fits(found.config, encoder.config)]
        if encoders and not own:
            check_encoder(path, found.config, encoders[0])
        return dataclasses.replace(found, image_encoder=own[0] if own else None)

    return _loaded(paths, fitting, load)


def _loaded(paths, fitting, load):
    """{name: load(name, path)}; fitting: without those that raise ValueError."""
    found = {}
    for name, path in paths.items():
        try:
            found[name] = load(name, path)
        except ValueError as error:
            if not fitting:
                raise
            warnings.warn(f'{name} is left out: {error}', stacklevel=3)
    return found


def options(text: str) -> dict[str, Any]:
    """'order=3, solver_type=heun, interval=(0.2, 0.8)' -> a dict; bare words are strings.

    Raises ValueError for anything but names with literal values.
    """
    check_length(text)
    try:
        call = ast.parse(f'dict({text})', mode='eval').body
        if not isinstance(call, ast.Call):
            raise ValueError
        names = [word.arg for word in call.keywords]
        if (call.args or not isinstance(call.func, ast.Name) or None in names
                or len(set(names)) < len(names)):
            raise ValueError
        return {str(word.arg): word.value.id if isinstance(word.value, ast.Name)
                else ast.literal_eval(word.value) for word in call.keywords}
    except NO_LITERAL:
        raise ValueError(f'options {shorten(text)}: expected names with values, for example '
                         '"order=3, solver_type=heun"') from None


def check_length(text: str) -> None:
    """Raises ValueError for options of more than LONGEST characters."""
    if len(text) > LONGEST:
        raise ValueError(f'options {shorten(text)}: expected at most {LONGEST} characters')


def shorten(text: str) -> str:
    """A text as an error tells it."""
    return repr(text) if len(text) <= 200 else f'{text[:200]!r}... ({len(text)} characters)'


def words(flag: str, text: str,
          example: str = '"net=PATH, image=PATH, scale=0.5"') -> dict[str, Any]:
    """'net=a/b, scale=0.5' -> a dict; values that are no Python literals are strings, paths too."""
    check_length(text)
    found = {}
    for part in text.split(','):
        name, equals, value = (piece.strip() for piece in part.partition('='))
        if not equals or not name.isidentifier() or name in found:
            raise ValueError(f'{flag}={shorten(text)}: expected names with values, for example '
                             f'{example}')
        try:
            found[name] = ast.literal_eval(value)
        except NO_LITERAL:
            found[name] = value
    return found


def _is_model(flag, path):
    """Whether this is a folder of diffusers, of the kind that a flag takes."""
    return (path / ('model_index' if flag == '--checkpoints' else 'config')
            ).with_suffix('.json').is_file()


def files(flag: str, texts: Iterable[str]) -> dict[str, str]:
    """[name=]PATH, of a file or of a folder of files -> {name: path}; without a name the file's,
    or of --embeddings those in it. For MODELS a folder of diffusers is as good as a file.

    Raises FileNotFoundError, and ValueError for two files of one name.
    """
    from jaxsd.weights import embeddings
    from jaxsd.weights.files import PICKLES
    inside, models = flag == '--embeddings', flag in MODELS
    endings, found = embeddings.ENDINGS if inside else ('.safetensors', '.gguf', *PICKLES), {}
    for text in texts:
        name, equals, path = text.partition('=')
        path = pathlib.Path(text if os.path.exists(text) or not equals else path)
        if not path.exists():
            raise FileNotFoundError(f'{flag}={text}: no such file or folder: {path}')
        if (path.is_file() or models and _is_model(flag, path)) and str(path) != text:
            named = [(name, path)]
        elif inside:
            named = embeddings.listed(path)
        elif models and _is_model(flag, path):
            named = [(path.resolve().name, path)]
        elif path.is_dir():
            named = [(p.stem if p.is_file() else p.name, p) for p in sorted(path.iterdir())
                     if p.suffix in endings or models and _is_model(flag, p)]
        else:
            named = [(path.stem, path)]
        if not named:
            raise ValueError(f'{flag}={text}: expected files in the folder that end in '
                             f'{", ".join(endings)}')
        for name, path in named:
            if found.setdefault(name, str(path)) != str(path):
                raise ValueError(f'{flag}: {found[name]} and {path} are both called {name!r}; give '
                                 f'one of them another name: {flag}=NAME=PATH')
    return found
