"""Random networks for faces that are small enough for tests, and faces where a test wants them."""

import numpy as np
from safetensors.numpy import save_file

from jaxsd.config import CodeFormerConfig, GFPGANConfig
from jaxsd.images import faces, openpose
from jaxsd.images.pose import Person
from jaxsd.models import spec

SMALL = GFPGANConfig((4, 4, 4, 4), 6)  # 32 pixels, as
FORMER = CodeFormerConfig((32, 32), 4, 8, 8, 1, 8, 16, (32,))
POINTS = (faces.TEMPLATE / 8 - (40, 38)) @ [[0.5, 0.1], [-0.1, 0.5]] + (50, 30)


def write(path, config=SMALL):
    """A file of one, a GFPGAN's with what its training needed."""
    rng = np.random.default_rng(0)
    tensors = {f'params_ema.{name}': (0.3 * rng.standard_normal(shape)).astype('f4')
               for name, shape in spec.names(config).items()}
    if config is SMALL:
        tensors |= {'params_ema.toRGB.0.weight': np.zeros((3, 4, 1, 1), 'f4'),
                    'params_ema.stylegan_decoder.style_mlp.1.weight': np.zeros((6, 6), 'f4')}
    save_file(tensors, path)
    return path


def person(points, width, height):
    """A Person whose face has these five points in pixels, and no others but the eyes' rims."""
    face = np.full((70, 2), np.nan)
    for part, at in zip(faces.POINTS, points):
        face[part] = at / np.array([width, height])
    return Person(np.full((18, 2), np.nan), face=face)


def seen(monkeypatch, *found, size=(90, 60)):
    """Have these be found, each five points in pixels, in a picture of this size."""
    people = [person(points, *size) for points in found]
    monkeypatch.setattr(openpose, 'people', lambda image, body, hand, face: people)
