"""Stable Diffusion 1.5's U-Net at full size, random weights: one call against diffusers."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from test_models import arrays

from jaxsd.config_files import VERSIONS, read_config
from jaxsd.models import shapes, spec, unet

pytestmark = pytest.mark.parity


def test_sd15_unet():
    torch.manual_seed(0)
    cfg = read_config('sd15').unet
    module = diffusers.UNet2DConditionModel.from_config(json.loads(
        (VERSIONS / 'sd15' / 'unet' / 'config.json').read_text())).eval()
    assert sum(p.numel() for p in module.parameters()) == spec.count(shapes.unet(cfg)) == 859520964
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 64, 64, 4)).astype(np.float32)
    context = rng.normal(size=(1, 77, 768)).astype(np.float32)
    t = np.array([481.0], np.float32)
    with torch.inference_mode():
        theirs = module(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t),
                        torch.tensor(context)).sample.permute(0, 2, 3, 1).numpy()
    params = arrays(module)
    del module
    ours = jax.jit(lambda p, *a: unet.apply(p, cfg, *a))(params, x, t, context)
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()
