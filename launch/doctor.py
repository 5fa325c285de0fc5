"""What is installed, on which devices it works, and whether they compute what they should.

python -m launch.doctor
"""

import importlib.metadata
import os
import pathlib
import platform
import re
import time

from absl import app

from . import plain_errors

EXTRAS = ('cuda13', 'cuda12', 'tpu', 'k8s', 'hints', 'gguf', 'train', 'serve', 'studio', 'ray')
# Of the emoji model's VAE: mean and deviation of the picture that it makes of threefry's first
# normal numbers, float32 on a CPU.
EXPECTED, MOST = (212.04, 53.09), 0.5  # of 255; bfloat16 products stay within it


def missing(extra):
    """The packages of an extra that are not installed."""
    found = []
    for line in importlib.metadata.requires('jaxsd') or ():
        name, _, condition = line.partition(';')
        if re.search(f'extra == ["\']{extra}["\']', condition):
            inner = re.search(r'\[(.*?)\]', name)
            name = re.match(r'[\w.-]+', name)[0]
            if name == 'jaxsd':
                found += missing(inner[1])
                continue
            name = {'cuda12': 'jax-cuda12-plugin', 'cuda13': 'jax-cuda13-plugin', 'tpu': 'libtpu',
                    'k8s': 'kubernetes'}[extra] if inner and name == 'jax' else name
            try:
                importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found.append(name)
    return found


def measured():
    """-> mean and deviation of the picture of EXPECTED, here, and the seconds that it took."""
    import jax
    import numpy as np

    import jaxsd
    from jaxsd.run import decode
    model = jaxsd.load('emoji')
    side, channels = model.config.unet.sample_size, model.config.vae.latent_channels
    latents = jax.random.normal(jax.random.key(0), (1, side, side, channels))
    draw = jax.jit(lambda params, latents: decode(params, model.config, latents)[0])
    start = time.perf_counter()
    image = np.asarray(draw({'vae': model.params['vae']}, latents), np.float64)
    return image.mean(), image.std(), time.perf_counter() - start


def run():
    """Print it all. Raises ValueError where the device computes something else."""
    import jax

    from jaxsd.run import picture
    versions = {**picture.versions(), 'python': platform.python_version()}
    print('versions:', ', '.join(f'{name} {version}' for name, version in versions.items()))
    for device in jax.local_devices():
        room = (device.memory_stats() or {}).get('bytes_limit')
        size = f', {room / 2**30:.1f} GiB' if room else ''
        print(f'device {device.id}: {device.platform}, {device.device_kind}{size}')
    folder = pathlib.Path(os.environ.get('JAX_COMPILATION_CACHE_DIR', ''))
    kept = [path.stat().st_size for path in folder.glob('*')] if folder.is_absolute() else []
    print(f'compiled programs: {folder}, {len(kept)} files, {sum(kept) / 2**20:.0f} MiB')
    for extra in EXTRAS:
        names = missing(extra)
        print(f'extra {extra}:', f"missing {', '.join(names)}: pip install 'jaxsd[{extra}]'"
              if names else 'installed')
    mean, deviation, seconds = measured()
    if max(abs(mean - EXPECTED[0]), abs(deviation - EXPECTED[1])) > MOST:
        raise ValueError(f'the emoji VAE gives a picture of mean {mean:.2f} and deviation '
                         f'{deviation:.2f}: expected {EXPECTED[0]} and {EXPECTED[1]}, within '
                         f'{MOST}; this device or this version of jaxlib computes wrongly')
    print(f'self-check: passed, {seconds:.1f} s')


if __name__ == '__main__':
    app.run(plain_errors(run))
