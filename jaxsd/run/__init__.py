"""From requests to pictures: the one pure function, its jit, and the files it ends in."""

from jaxsd.run.generate import (
    Inputs,
    decode,
    denoise_latents,
    generate,
    inputs,
    latents,
    pipeline,
    replicated,
)
from jaxsd.run.request import Request, resolve

__all__ = ['Inputs', 'Request', 'decode', 'denoise_latents', 'generate', 'inputs', 'latents',
           'pipeline', 'replicated', 'resolve']
