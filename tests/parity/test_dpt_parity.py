"""MiDaS against transformers: the network, the processor, the depth map of diffusers' pipeline."""

import pathlib
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util
from PIL import Image

import jaxsd
from jaxsd import read_config
from jaxsd.config import DPTConfig
from jaxsd.models import dpt, shapes, spec
from jaxsd.run import depth
from jaxsd.weights.configs import _depth, _preprocessor

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'weights'))
from tiny import flat, random_model, same  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4  # of the depth's deviation; float32 and two dozen layers give 1e-6 to 1e-5
TINY = DPTConfig(image_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=4,
                 num_attention_heads=3, backbone_out_indices=(0, 1, 2, 3),
                 neck_hidden_sizes=(32, 64, 24, 20), fusion_hidden_size=16, depths=(2, 1, 2),
                 embedding_size=16, hidden_sizes=(32, 64, 96), num_groups=2)


def lively(config, seed=0):
    """The DPTForDepthEstimation of a DPTConfig, see `enliven`."""
    return enliven(transformers.DPTForDepthEstimation(transformers.DPTConfig(**{
        k: v for k, v in _depth(config).items() if k not in ('architectures', 'model_type')})),
        seed)


def enliven(module, seed=0):
    """Random weights with which the depth depends on the picture everywhere.

    Every tensor is random: norms around 1, biases around 0, weights that keep variance; the last
    bias lifts the depth over its ReLU.
    """
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


def test_full_size():
    """The released architecture, 122 million parameters: as near to float64 as torch's float32.

    Its random weights amplify rounding: torch's own float32 is 2.5e-4 of the deviation away from
    its float64, jaxsd's 1.2e-4.
    """
    config = read_config('sd2_depth').depth_estimator
    module, pixels = lively(config), picture(1, 384, 384)
    x, params = torch.tensor(pixels).permute(0, 3, 1, 2), arrays(module)
    with torch.no_grad():
        single = module(x).predicted_depth.numpy()
        exact = module.double()(x.double()).predicted_depth.numpy()
    ours = np.asarray(jax.jit(dpt.apply, static_argnums=1)(params, config, pixels))
    assert exact.std() > 0.05 and (exact == 0).mean() < 0.1
    ours, theirs = (np.abs(a - exact).max() / exact.std() for a in (ours, single))
    assert ours <= max(TOLERANCE, theirs)


@pytest.mark.parametrize('size', [(100, 150), (31, 40), (64, 64)])
def test_processor(size):
    """Pictures larger and smaller than the network's, and of its size."""
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    processor = transformers.DPTImageProcessorPil.from_dict(_preprocessor(TINY))
    theirs = processor(images=list(images), return_tensors='pt').pixel_values.permute(0, 2, 3, 1)
    assert np.abs(depth.pixels(images, (64, 64)) - theirs.numpy()).max() <= 1e-6


@pytest.mark.parametrize('size', [(64, 64), (96, 40), (7, 130)])
def test_depth_map(size):
    """Smaller and larger than the map; as StableDiffusionDepth2ImgPipeline.prepare_depth_map."""
    maps = np.random.default_rng(0).gamma(2, 300, (2, 48, 96)).astype(np.float32)
    out = torch.nn.functional.interpolate(torch.tensor(maps)[:, None], size, mode='bicubic',
                                          align_corners=False)
    low, high = (f(out, dim=[1, 2, 3], keepdim=True) for f in (torch.amin, torch.amax))
    theirs = (2 * (out - low) / (high - low) - 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(depth.condition(maps, *size) - theirs).max() <= 1e-5


def test_pipeline(tmp_path):
    """diffusers' own pipeline from what jaxsd saves: its depth of a picture is ours."""
    model = random_model('sd2_depth', tokenizers=True)
    module = lively(model.config.depth_estimator)
    model = model.replace(params=model.params | {'depth_estimator': arrays(module)})
    jaxsd.save(model, tmp_path / 'ours')
    pipeline = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / 'ours')
    for name, tensor in module.state_dict().items():
        assert torch.equal(pipeline.depth_estimator.state_dict()[name], tensor), name
    image = ((picture(1, 72, 96)[0] + 1) * 127.5).astype(np.uint8)
    with torch.no_grad():
        theirs = pipeline.prepare_depth_map(Image.fromarray(image), None, 1, False, torch.float32,
                                            torch.device('cpu'))
    ours = depth.condition(depth.estimate(model, image[None]), 72 // 8, 96 // 8)
    assert np.abs(ours - theirs.permute(0, 2, 3, 1).numpy()).max() <= TOLERANCE
    pipeline.save_pretrained(tmp_path / 'theirs')
    found = jaxsd.load(tmp_path / 'theirs')
    assert found.config == model.config
    assert same(flat(found.params), flat(model.params))
