"""A model as the flags of `batch` and `serve` describe it, brought onto this host's devices."""

import math
import os
import sys
import time
from types import SimpleNamespace

from absl import flags

from jaxsd.recipe import FIELDS, complete, files, load

from . import generate

FLAGS = flags.FLAGS


def define_flags():
    """Which model, and how much of it at once; not at import: other mains have flags so named."""
    generate.define_model_flags()
    flags.DEFINE_integer('slots', None, 'Pictures that a program denoises at once; if left out, 8, '
                         'on a CPU 4 of up to 64x64 pixels and 1 of larger ones; other numbers may '
                         'change their last bits.', 1)
    flags.DEFINE_enum('weights', 'auto', ['auto', 'replicated', 'sharded'], 'Whole on each device, '
                      'or spread over those of a host and gathered layer by layer; auto: where '
                      'they would fill more than three quarters of a device.')


def describe():
    """What the flags say of the model, as JSON can keep it: for `build`, here or elsewhere."""
    recipe = FLAGS.config
    plugins = [os.path.abspath(path) for path in FLAGS.plugin]
    return {**{name: recipe[name] for name in generate.RECIPE}, **({'plugin': plugins} if plugins
                                                                   else {}),
            **{name: FLAGS[name].value for name in ('vae', 'refiner', 'strays', 'image_encoder')
               if FLAGS[name].value},
            **{name: [f'{key}={path}' for key, path in files(
                f'--{name}', FLAGS[name].value or ()).items()] for name in (
                    'lora', 'embeddings', 'upscalers', 'ip_adapter')},
            'checkpoint': FLAGS.checkpoint or recipe.checkpoint, 'slots': FLAGS.slots,
            'weights': FLAGS.weights}


def build(how, requests=None, devices=None, lone=False):
    """-> Engine, Identity, and `how` with what it came to: dtype, the model's name, the settings
    that ids are made of, and of LoRAs, embeddings and IP-Adapters those that the requests name
    (None: all).
    lone: as of Engine."""
    import jaxsd
    from jaxsd.batch.identity import Identity
    from jaxsd.run import Engine
    from jaxsd.sampling import plugins
    plugins.load_plugins(how.get('plugin', ()))  # in Ray's actors nothing else does
    start = time.perf_counter()
    # A run that began before a field was there has its default.
    recipe = SimpleNamespace(**{name: None if isinstance(default, type) else default
                                for name, (default, _) in FIELDS.items()} | how)
    strays = how.get('strays', False)
    model, name, dtype = load(recipe, strays=strays)
    if how.get('vae'):
        model = model.with_vae(jaxsd.load_vae(how['vae'], dtype))
    refiner = load(recipe, how['refiner'], strays=strays)[0] if how.get('refiner') else None
    adapters, embeddings, controlnets, upscalers, ip_adapters, detectors = (
        files(f'--{flag}', how.get(flag, ())) for flag in (
            'lora', 'embeddings', 'controlnet', 'upscalers', 'ip_adapter', 'detectors'))
    model, named = complete(model, requests, dtype, adapters, embeddings, strays=strays,
                            controlnets=controlnets, fitting=how.get('fitting', False),
                            upscalers=upscalers, ip_adapters=ip_adapters,
                            image_encoders=how.get('image_encoder', ()), detectors=detectors)
    tile = how['tile'] or None
    spread = how['weights'] == 'sharded' or how['weights'] == 'auto' and not _fits(model, refiner)
    if spread and recipe.offload:
        raise ValueError('--weights=sharded spreads all weights over the devices: expected it, or '
                         'where they do not fit on one, without --config.offload')
    engine = Engine(model, refiner, how['slots'], tile, devices, spread, lone=lone)
    identity = Identity(model, refiner, slots=engine.slots, tile=tile,
                        spread=len(engine.devices) if spread else None)
    print(f'{name}: {model.config.version}, {dtype}, on {len(engine.devices)} device(s), loaded in '
          f'{time.perf_counter() - start:.1f} s', file=sys.stderr)
    return engine, identity, how | named | {'dtype': dtype, 'model': name, 'slots': engine.slots,
                                            'settings': identity.settings}


def _fits(*models):
    """Whether weights fill at most three quarters of a device; where none says its size, yes."""
    import jax
    needed = sum(a.nbytes for model in models if model for a in jax.tree.leaves(model.params)
                 if isinstance(a, jax.Array))
    room = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', math.inf)
    return needed <= 0.75 * room
