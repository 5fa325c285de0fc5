"""Stable Diffusion as pure functions in JAX: one compiled program, everything else is data."""

import importlib
import importlib.metadata
import os

# jaxlib 0.10 on CPU returns wrong sums from some fused reductions (jax issue 39103). XLA reads the
# flag when it starts and aborts on flags it does not know, hence the version check. What the user
# has set stays.
if (importlib.metadata.version('jaxlib').startswith('0.10.')
        and 'ynn_fusion_type' not in os.environ.get('XLA_FLAGS', '')):
    os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '')
                               + ' --xla_cpu_experimental_ynn_fusion_type=-reduce').strip()

__version__ = '0.1.0'

_WHERE = {
    **dict.fromkeys(('load', 'save', 'Model', 'Network', 'load_vae', 'load_controlnet',
                     'load_t2i_adapter', 'load_depth_estimator', 'load_embedding', 'Embedding',
                     'load_adapter', 'Adapter', 'merge', 'save_network'), 'jaxsd.weights'),
    'read_config': 'jaxsd.config', 'ModelConfig': 'jaxsd.config', 'versions': 'jaxsd.config',
    **dict.fromkeys(('generate', 'Engine', 'Request', 'Control', 'Preview'), 'jaxsd.run'),
    **dict.fromkeys(('sampler', 'schedule', 'guidance', 'load_plugin'), 'jaxsd.sampling.plugins'),
}
__all__ = sorted(_WHERE)


def __dir__():
    return [*__all__, '__version__']


def __getattr__(name):
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
