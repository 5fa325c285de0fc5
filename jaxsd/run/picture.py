"""PNG files that say how they were made, and grids of pictures."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import tempfile

import numpy as np

import jaxsd

# The names that stable-diffusion-webui (A1111) knows, so that its "PNG Info" reads our pictures.
SAMPLERS = {
    'euler': 'Euler', 'euler_ancestral': 'Euler a', 'heun': 'Heun', 'dpm_2': 'DPM2',
    'dpm_2_ancestral': 'DPM2 a', 'lms': 'LMS', 'ddim': 'DDIM', 'ddpm': 'DDPM',
    'dpmpp_2m': 'DPM++ 2M', 'dpmpp_2m_sde': 'DPM++ 2M SDE', 'dpmpp_sde': 'DPM++ SDE',
    'dpmpp_2s_ancestral': 'DPM++ 2S a', 'dpmpp_3m_sde': 'DPM++ 3M SDE', 'unipc': 'UniPC',
    'dpm_fast': 'DPM fast', 'dpm_adaptive': 'DPM adaptive', 'restart': 'Restart', 'lcm': 'LCM',
    'plms': 'PLMS',
}
SCHEDULES = {
    'normal': 'Normal', 'karras': 'Karras', 'exponential': 'Exponential',
    'sgm_uniform': 'SGM Uniform', 'simple': 'Simple', 'ddim_uniform': 'DDIM',
    'polyexponential': 'Polyexponential', 'kl_optimal': 'KL Optimal', 'ays': 'Align Your Steps',
    'beta': 'Beta',
}


def parameters(request, model=''):
    """The `parameters` text that A1111 writes into its PNG files.

    Prompt, then `Negative prompt:` if there is one, then one line of `Key: value` pairs. A guidance
    for each step is told by its first: `record` has them all.
    """
    schedule = request.schedule
    if not isinstance(schedule, str):  # the noise levels themselves
        schedule = ','.join(f'{level:g}' for level in schedule)
    pairs = {
        'Steps': request.steps,
        'Sampler': SAMPLERS.get(request.sampler, request.sampler),
        'Schedule type': SCHEDULES.get(schedule, schedule),
        'CFG scale': f'{np.ravel(request.guidance)[0]:g}',
        'Seed': request.seed,
        'Size': f'{request.width}x{request.height}',
        'Model': model,
        'Denoising strength': '' if request.image is None else f'{request.strength:g}',
        'Eta': '' if request.eta is None else f'{request.eta:g}',
        'Version': f'jaxsd {jaxsd.__version__}',
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f'Negative prompt: {request.negative_prompt}')
    lines.append(', '.join(f'{k}: {_quote(v)}' for k, v in pairs.items() if v != ''))
    return '\n'.join(lines)


def _quote(value):
    """A1111 quotes values that its own reader would take apart."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n') else text


def record(request, **more):
    """The complete request and the versions that ran it, as JSON text."""
    names = ('jax', 'jaxlib', 'flax', 'transformers', 'numpy')
    versions = {name: importlib.metadata.version(name) for name in names}
    return json.dumps({'request': _fields(request), **more,
                       'versions': {'jaxsd': jaxsd.__version__, **versions}}, default=_describe,
                      ensure_ascii=False)


def _fields(request):
    return {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}


def _describe(value):
    """What JSON does not know: controls, paths, and pictures given as such, by their hash."""
    if dataclasses.is_dataclass(value):
        return _fields(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    pixels = np.ascontiguousarray(value)
    return f'{type(value).__name__} {pixels.shape} sha256:{hashlib.sha256(pixels).hexdigest()}'


def write_png(path, image, texts=None):
    """Write an image, uint8 [H,W,3], with text chunks; a file of that name is there whole or not
    at all (a temporary file next to it, then a rename)."""
    from PIL import Image, PngImagePlugin
    info = PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        info.add_itxt(key, text) if not text.isascii() else info.add_text(key, text)
    path = pathlib.Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix='.', suffix='.tmp')
    try:
        with os.fdopen(handle, 'wb') as file:
            Image.fromarray(np.asarray(image)).save(file, 'PNG', pnginfo=info)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for the owner only
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def grid(images, columns=None):
    """Images uint8 [B,H,W,3] -> one picture [rows*H, columns*W, 3], white where none is left."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:count] = images
    cells = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return cells.reshape(rows * height, columns * width, channels)


def check_folder(path):
    """Make the folder, and make sure that files can be written there.

    Raises OSError, before hours of sampling rather than after.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass
    return path
