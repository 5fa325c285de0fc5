"""Random detectors that are small enough for tests, by the names of the published files."""

import numpy as np
from safetensors.numpy import save_file

from jaxsd.config import DetectorConfig
from jaxsd.models import spec
from jaxsd.weights import Network

CONFIGS = {'body_pose_model': DetectorConfig('openpose', 8, (2,)),
           'hand_pose_model': DetectorConfig('openpose_hand', 8, (2,)),
           'facenet': DetectorConfig('openpose_face', 8, (2,)),
           'ControlNetHED': DetectorConfig('hed', 8, (1, 1, 1, 1, 1)),
           'sk_model': DetectorConfig('lineart', 8, (1,)),
           'sk_model2': DetectorConfig('lineart', 8, (1,)),
           'netG': DetectorConfig('lineart_anime', 8, (4,))}


def tensors(name):
    """{name: array} as the file has them, such that hints depend on the picture."""
    rng = np.random.default_rng(list(CONFIGS).index(name))
    found = {}
    for key, shape in spec.names(CONFIGS[name]).items():
        scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
        found[key] = (scale * rng.standard_normal(shape)).astype('f4')
    if 'norm' in found:
        found['norm'] = np.full((1, 3, 1, 1), 128, 'f4')
        for key in found:
            if 'projection.weight' in key:
                found[key] *= 0.02
    return found


def blind(name='body_pose_model'):
    """Tensors of a body network that sees nobody."""
    found = tensors(name)
    found['Mconv7_stage2_L2.bias'] -= 100
    return found


def network(name):
    """A Network, as load_detector gives it."""
    from flax import traverse_util
    return Network(CONFIGS[name], traverse_util.unflatten_dict(
        {key: spec.to_jax(key, a) for key, a in tensors(name).items()}, sep='.'))


def write(name, folder):
    """A file for --detectors -> its path."""
    path = folder / f'{name}.safetensors'
    save_file(tensors(name), path)
    return path
