"""From requests to pictures: the one pure function, its jit, and the files it ends in."""

from jaxsd.run.generate import Inputs, denoise_latents, generate, inputs, pipeline, replicated
from jaxsd.run.request import Request, resolve

__all__ = ['Inputs', 'Request', 'denoise_latents', 'generate', 'inputs', 'pipeline', 'replicated',
           'resolve']
