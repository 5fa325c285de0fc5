"""From requests to pictures: pure functions, the engine that runs them, and files."""

from jaxsd.run.detectors import detect
from jaxsd.run.engine import Engine
from jaxsd.run.faces import restore_faces
from jaxsd.run.generate import Preview, generate
from jaxsd.run.inputs import Inputs, inputs, lengthened, networks
from jaxsd.run.pipeline import (
    Encoded,
    advance,
    decode,
    denoiser,
    encode,
    encode_image,
    encode_text,
    latents,
    pipeline,
    start,
)
from jaxsd.run.request import Control, Hires, ImagePrompt, Reference, Region, Request
from jaxsd.run.resolving import resolve
from jaxsd.run.upscale import upscale

__all__ = ['Control', 'Encoded', 'Engine', 'Hires', 'ImagePrompt', 'Inputs', 'Preview',
           'Reference', 'Region', 'Request', 'advance', 'decode', 'denoiser', 'detect', 'encode',
           'encode_image', 'encode_text', 'generate', 'inputs', 'latents', 'lengthened', 'networks',
           'pipeline', 'resolve', 'restore_faces', 'start', 'upscale']
