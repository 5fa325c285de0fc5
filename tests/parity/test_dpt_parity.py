"""MiDaS against transformers: the network, the processor, the depth map of diffusers' pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util

from jaxsd.config import DPTConfig
from jaxsd.models import dpt, shapes, spec
from jaxsd.weights.configs import _depth

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4  # of the depth's deviation; float32 and two dozen layers give 1e-6 to 1e-5
TINY = DPTConfig(image_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=4,
                 num_attention_heads=3, backbone_out_indices=(0, 1, 2, 3),
                 neck_hidden_sizes=(32, 64, 24, 20), fusion_hidden_size=16, depths=(2, 1, 2),
                 embedding_size=16, hidden_sizes=(32, 64, 96), num_groups=2)


def lively(config, seed=0):
    """A DPTForDepthEstimation with random weights whose depth depends on the picture everywhere.

    Every tensor is random: norms around 1, biases around 0, weights that keep variance; the last
    bias lifts the depth over its ReLU.
    """
    module = transformers.DPTForDepthEstimation(transformers.DPTConfig(**{
        k: v for k, v in _depth(config).items() if k not in ('architectures', 'model_type')}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.2 * noise + (p.new_ones(()) if 'norm' in name and 'weight' in name
                                       else 0))
            elif 'cls_token' in name or 'position' in name:
                p.copy_(noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
        module.head.head[4].bias.fill_(4.0)
    return module.eval()


def arrays(module):
    return traverse_util.unflatten_dict(
        {k: jnp.asarray(spec.to_jax(k, v.detach().numpy()))
         for k, v in module.state_dict().items()}, sep='.')


def error(module, config, pixels, theirs):
    ours = np.asarray(jax.jit(dpt.apply, static_argnums=1)(arrays(module), config, pixels))
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape == pixels.shape[:3] and ours.dtype == np.float32
    # It depends on the picture: neither constant, nor cut off, nor alike for two pictures.
    assert theirs.std() > 0.05 and (theirs == 0).mean() < 0.1
    assert np.abs(theirs[0] - theirs[-1]).mean() > 0.2 * theirs.std() or len(theirs) == 1
    return np.abs(ours - theirs).max() / theirs.std()


def picture(*shape):
    """Smooth shapes and noise in [-1,1], float32."""
    rng = np.random.default_rng(0)
    coarse = torch.tensor(rng.uniform(-1, 1, (shape[0], 3, 4, 4)), dtype=torch.float32)
    smooth = torch.nn.functional.interpolate(coarse, shape[1:], mode='bicubic')
    return np.clip(smooth.permute(0, 2, 3, 1).numpy()
                   + 0.2 * rng.standard_normal((*shape, 3)), -1, 1).astype(np.float32)


def test_tiny():
    module, pixels = lively(TINY), picture(2, 64, 64)
    assert shapes.dpt(TINY) == {k: tuple(v.shape) for k, v in module.state_dict().items()}
    with torch.no_grad():
        theirs = module(torch.tensor(pixels).permute(0, 3, 1, 2)).predicted_depth
    assert error(module, TINY, pixels, theirs) <= TOLERANCE


@pytest.mark.parametrize('size', [(96, 64), (32, 160)])
def test_other_sizes(size, monkeypatch):
    """Sides that transformers refuses: its own layers, told the sides of the grid of patches."""
    module, pixels = lively(TINY), picture(2, *size)
    embeddings, reassemble = module.dpt.embeddings, module.neck.reassemble_stage
    interpolating, given = embeddings.forward, reassemble.forward
    monkeypatch.setattr(embeddings, 'forward', lambda x: interpolating(x, True))
    monkeypatch.setattr(reassemble, 'forward',
                        lambda states, *_: given(states, size[0] // 16, size[1] // 16))
    with torch.no_grad():
        theirs = module(torch.tensor(pixels).permute(0, 3, 1, 2)).predicted_depth
    assert error(module, TINY, pixels, theirs) <= TOLERANCE
