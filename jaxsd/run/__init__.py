"""From requests to pictures: the one pure function, its jit, and the files it ends in."""

from jaxsd.run.generate import Preview, generate, replicated
from jaxsd.run.inputs import Inputs, inputs, networks
from jaxsd.run.request import Control, Request, resolve
from jaxsd.run.walk import (
    Conditions,
    condition,
    decode,
    denoise_latents,
    encode,
    latents,
    pipeline,
)

__all__ = ['Conditions', 'Control', 'Inputs', 'Preview', 'Request', 'condition', 'decode',
           'denoise_latents', 'encode', 'generate', 'inputs', 'latents', 'networks', 'pipeline',
           'replicated', 'resolve']
