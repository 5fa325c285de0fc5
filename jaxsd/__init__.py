"""Stable Diffusion as pure functions in JAX: one compiled program, everything else is data."""

import importlib
import importlib.metadata
import os
from typing import TYPE_CHECKING

# jaxlib 0.10 on CPU returns wrong sums from some fused reductions (jax issue 39103). XLA reads the
# flag when it starts and aborts on flags it does not know, hence the version check. What the user
# has set stays.
if (importlib.metadata.version('jaxlib').startswith('0.10.')
        and 'ynn_fusion_type' not in os.environ.get('XLA_FLAGS', '')):
    os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '')
                               + ' --xla_cpu_experimental_ynn_fusion_type=-reduce').strip()

__version__ = '0.1.0'
__all__ = ['Adapter', 'Control', 'Embedding', 'Engine', 'Hires', 'IPAdapter', 'ImagePrompt',
           'Model', 'ModelConfig', 'Network', 'Preview', 'Reference', 'Region', 'Request',
           'detect', 'generate', 'guidance', 'load', 'load_adapter', 'load_controlnet',
           'load_depth_estimator', 'load_detector', 'load_embedding', 'load_face_restorer',
           'load_image_encoder', 'load_ip_adapter', 'load_plugin', 'load_t2i_adapter',
           'load_upscaler', 'load_vae', 'merge', 'merge_models', 'read_config', 'restore_faces',
           'sampler', 'save', 'save_adapter', 'save_embedding', 'save_network', 'schedule',
           'upscale', 'versions']

if TYPE_CHECKING:
    from jaxsd.config import ModelConfig
    from jaxsd.config_files import read_config, versions
    from jaxsd.run import Control, Engine, Hires, ImagePrompt, Reference, Region, Request
    from jaxsd.run.detectors import detect
    from jaxsd.run.faces import restore_faces
    from jaxsd.run.generate import Preview, generate
    from jaxsd.run.upscale import upscale
    from jaxsd.sampling.plugins import guidance, load_plugin, sampler, schedule
    from jaxsd.weights import (
        Adapter,
        Embedding,
        IPAdapter,
        Model,
        Network,
        load,
        load_adapter,
        load_controlnet,
        load_depth_estimator,
        load_detector,
        load_embedding,
        load_face_restorer,
        load_image_encoder,
        load_ip_adapter,
        load_t2i_adapter,
        load_upscaler,
        load_vae,
        merge,
        merge_models,
        save,
        save_adapter,
        save_embedding,
        save_network,
    )
else:
    def __dir__():
        return [*__all__, '__version__']

    def __getattr__(name):
        """Each name is imported when it is first used, from the first module that has it."""
        if name in __all__:
            modules = (importlib.import_module(f'jaxsd.{module}')
                       for module in ('config', 'config_files', 'weights', 'run',
                                      'sampling.plugins'))
            return next(getattr(module, name) for module in modules if hasattr(module, name))
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
