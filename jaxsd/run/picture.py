"""PNG files that say how they were made, and grids of pictures."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import platform
import re
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import UInt8

import jaxsd
from jaxsd import images
from jaxsd.images.reading import Picture
from jaxsd.run.request import Hires, Request
from jaxsd.run.text_conditioning import parse_prompts
from jaxsd.sampling import plugins, schedule_file
from jaxsd.sampling.names import A1111_SAMPLERS, A1111_SCHEDULES
from jaxsd.typing import Path

WEIGHTINGS = {'no_norm': 'No norm', 'none': 'None', 'comfy': 'comfy',
              'compel': 'compel', 'plain': 'plain'}  # a1111: the default there
NOISES = {'torch': 'CPU', 'philox': 'NV'}
UPSCALERS = {'latent': 'Latent', 'latent_bicubic': 'Latent (bicubic)',
             'latent_bicubic_antialiased': 'Latent (bicubic antialiased)',
             'latent_nearest': 'Latent (nearest-exact)', 'latent_nearest_floor': 'Latent (nearest)',
             'lanczos': 'Lanczos', 'nearest': 'Nearest'}


def parameters(request: Request, model: str = '', vae: str = '', refiner: str = '',
               unfinished: tuple[int, int] | None = None,
               hashes: Mapping[str, str] = MappingProxyType({})) -> str:
    """The `parameters` text that A1111 writes into its PNG files.

    Prompt, then `Negative prompt:` if there is one, then one line of `Key: value` pairs. Adapters
    stand in the prompt. A guidance for each step is told by its first: `record` has them all.
    model, vae, refiner: their names. unfinished: of a picture that was interrupted, how many model
    calls were done, of how many. hashes: of `hashes.of_files`; of LoRAs those that the prompt or
    the request names are written.
    """
    strength = None if request.image is None else request.strength
    if isinstance(request.hires, Hires):
        strength = request.hires.strength
    pairs = {
        'Steps': request.steps or '',
        'Sampler': A1111_SAMPLERS.get(request.sampler, request.sampler) or '',
        'Schedule type': '' if request.schedule is None else _schedule(request.schedule),
        'CFG scale': '' if request.guidance is None else _short(np.ravel(request.guidance)[0]),
        'Image CFG scale': '' if request.image_guidance is None else _short(
            np.ravel(request.image_guidance)[0]),
        'Seed': request.seed,
        'Size': f'{request.width}x{request.height}',
        'Model hash': hashes.get('model', ''),
        'Model': model,
        'VAE hash': hashes.get('vae', '') if vae else '',
        'VAE': vae,
        'Variation seed': request.subseed if request.subseed_strength else '',
        'Variation seed strength': _short(request.subseed_strength)
        if request.subseed_strength else '',
        'Seed resize from': '{}x{}'.format(*request.seed_resize_from)
        if request.seed_resize_from else '',
        'Denoising strength': '' if strength is None else _short(strength),
        **(_hires(request.hires) if isinstance(request.hires, Hires) else {}),
        'Mask blur': _short(request.mask_blur) if request.mask_blur else '',
        'Clip skip': request.clip_skip if request.clip_skip > 1 else '',
        'ENSD': request.eta_noise_seed_delta or '',
        'RNG': NOISES.get(request.noise, ''),
        'Tiling': True if request.tiling == 'xy' else request.tiling,
        'Step RNG': NOISES.get(request.step_noise or '', ''),
        'Eta': '' if request.eta is None else _short(request.eta),
        'Emphasis': WEIGHTINGS.get(request.weighting, ''),
        'Refiner': refiner,
        'Refiner switch at': _short(request.switch) if refiner else '',
        'Lora hashes': _lora_hashes(request, hashes),
        'Unfinished': f'{unfinished[0]} of {unfinished[1]} model calls' if unfinished else '',
        'Version': f'jaxsd {jaxsd.__version__}',
    }
    tags = [f'<lora:{name}:{_short(text)}:{_short(unet)}>'
            for name, (unet, text) in request.adapters.items()]
    lines = [' '.join([request.prompt, *tags])]
    if request.negative_prompt:
        lines.append(f'Negative prompt: {request.negative_prompt}')
    lines.append(', '.join(f'{k}: {_quote(v)}' for k, v in pairs.items() if v != ''))
    return '\n'.join(lines)


def _lora_hashes(request, hashes):
    """'one: 7c6bad76eb54, two: ...' of the LoRAs that a request names."""
    if not any(name.startswith('lora:') for name in hashes):
        return ''
    found = [(name, hashes.get(f'lora:{name}')) for name in parse_prompts(request).adapters]
    return ', '.join(f'{name}: {digest}' for name, digest in found if digest)


def _schedule(schedule: Any) -> str:
    """A schedule as A1111 calls it."""
    if not isinstance(schedule, str):  # the noise levels themselves
        schedule = ','.join(map(_short, schedule))
    return A1111_SCHEDULES.get(schedule, schedule)


def _hires(hires):
    """A1111's pairs for a second pass."""
    size = hires.width, hires.height
    return {
        'Hires upscale': _short(hires.scale) if size == (None, None) else '',
        'Hires resize': '' if size == (None, None) else '{}x{}'.format(*(n or 0 for n in size)),
        'Hires steps': hires.steps or '',
        'Hires upscaler': UPSCALERS.get(hires.upscaler, hires.upscaler),
        'Hires sampler': A1111_SAMPLERS.get(hires.sampler, hires.sampler) or '',
        'Hires schedule type': '' if hires.schedule is None else _schedule(hires.schedule),
        'Hires CFG Scale': '' if hires.guidance is None else _short(hires.guidance),
        'Hires prompt': hires.prompt or '',
        'Hires negative prompt': hires.negative_prompt or ''}


def _short(value):
    """A number as people write it, with all of its digits where it has more."""
    return f'{value:g}' if float(f'{value:g}') == value else repr(float(value))


def _quote(value):
    """A1111 quotes values that its own reader would take apart."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n') else text


def record(request: Request, **run: Any) -> str:
    """The complete request, the files that it follows, and what made it, as JSON text; of plugins
    the hash of their code.

    run: what else a repetition needs, see launch/generate.py.
    """
    hashes = {name: digest(name) for name in files(request)}
    if own := plugins.used(request):
        run['plugins'] = own
    return json.dumps({'request': _fields(request), **run, 'files': hashes, 'versions': versions(),
                       'device': device()}, default=describe, ensure_ascii=False)


def versions() -> dict[str, str]:
    """What the bits of a picture may depend on -> {package: version}."""
    names = ('jax', 'jaxlib', 'flax', 'tokenizers', 'numpy')
    return {'jaxsd': jaxsd.__version__} | {
        name: importlib.metadata.version(name) for name in names}


def device() -> str:
    """The kind of device that pictures are made on, 'NVIDIA H100 80GB HBM3' or 'cpu (...)'."""
    import jax
    kind = jax.devices()[0].device_kind
    return f'cpu ({_processor()})' if kind == 'cpu' else kind


def _processor():
    """What this machine's processor is called, as exactly as it says."""
    try:
        text = pathlib.Path('/proc/cpuinfo').read_text()
        names = re.findall(r'^model name\s*: (.*)$', text, re.MULTILINE)
    except OSError:
        names = []
    return (names or [platform.processor() or platform.machine()])[0]


def digest(path: Path) -> str:
    """The sha256 of a picture's pixels, with gray to its 16 bits and transparency, or of a file
    that is no picture. Raises as `images.read` does."""
    if os.fspath(path).endswith(('.json', '.npy')):
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    return hashlib.sha256(images.read(path).tobytes()
                          + images.read_gray(path).tobytes()).hexdigest()


def files(request: Request) -> set[str]:
    """The paths of the files that a request names."""
    given: list[Any] = [request.image, request.mask, request.depth,
                        *(c.image for c in request.controls)]
    for prompt in request.image_prompts:
        given += prompt.sources
    given += [region.mask for region in request.regions]
    if request.reference is not None:
        given.append(request.reference.image)
    given.append(schedule_file(request.schedule))
    return {os.fspath(path) for path in given if isinstance(path, (str, os.PathLike))}


def _fields(request):
    return {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}


def describe(value: Any) -> Any:
    """What JSON does not know: controls, image prompts, paths, and pictures given as such, by their
    hash."""
    if dataclasses.is_dataclass(value):
        return _fields(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    pixels = np.ascontiguousarray(value)
    return {'shape': list(pixels.shape), 'sha256': hashlib.sha256(pixels.data).hexdigest()}


def unicode(text: str) -> bytes:
    """Text as UTF-8, in which names of files that are none become escapes of JSON."""
    return text.encode(errors='backslashreplace')


def png(image: Picture, texts: Mapping[str, str] | None = None) -> bytes:
    """An image, uint8 [H,W,3], and text chunks -> the bytes of a PNG file."""
    from PIL import Image, PngImagePlugin
    info = PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        text = unicode(text).decode()
        info.add_itxt(key, text) if not text.isascii() else info.add_text(key, text)
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, 'PNG', pnginfo=info)
    return file.getvalue()


def thumbnail(image: Picture, side: int = 256) -> bytes | None:
    """An image, uint8 [H,W,3] -> the bytes of a WebP of at most `side` pixels, or None where the
    image is no larger itself."""
    from PIL import Image
    if max(image.shape[:2]) <= side:
        return None
    small, file = Image.fromarray(image), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, 'WebP', quality=80)
    return file.getvalue()


def write_png(path: Path, image: Picture, texts: Mapping[str, str] | None = None) -> None:
    """Write an image, uint8 [H,W,3], with text chunks, as `write_whole` does."""
    write_whole(path, png(image, texts))


def write_whole(path: Path, data: bytes, sync: bool = False) -> None:
    """Write bytes so that a file of that name is there whole or not at all (a temporary file next
    to it, then a rename); sync: also after the machine lost power."""
    path = pathlib.Path(path)
    handle, temporary = tempfile.mkstemp('.tmp', f'.{path.name[:40]}.', path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(handle)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for the owner only
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


@functools.cache  # asked once: setting it is the only way to ask, and threads share it
def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def grid(images: UInt8[np.ndarray, 'B H W C'],
         columns: int | None = None) -> UInt8[np.ndarray, 'H W C']:
    """Images uint8 [B,H,W,3] -> one picture [rows*H, columns*W, 3], white where none is left."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:count] = images
    cells = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return cells.reshape(rows * height, columns * width, channels)


def check_folder(path: Path) -> pathlib.Path:
    """Make the folder, and make sure that files can be written there.

    Raises OSError, before hours of sampling rather than after.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass
    return path
