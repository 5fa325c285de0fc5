"""Pictures whose edges meet, against diffusers' networks with torch's circular padding."""

import copy

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

import jaxsd
from jaxsd.models import layers, unet, vae

pytestmark = pytest.mark.parity
MODES = {True: 'circular', False: 'constant'}


def _circular(net, axes):
    """A1111's apply_circular where both edges meet; else as InvokeAI pads, one axis after the
    other."""
    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            if axes == 'xy':
                layer.padding_mode = 'circular'
                continue

            def forward(x, weight, bias, layer=layer):
                down, across = layer.padding
                x = functional.pad(x, (across, across, 0, 0), MODES['x' in axes])
                x = functional.pad(x, (0, 0, down, down), MODES['y' in axes])
                return functional.conv2d(x, weight, bias, layer.stride)

            layer._conv_forward = forward
    return net


def _far(found, expected):
    expected = expected.permute(0, 2, 3, 1).numpy()
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope='module')
def model(tiny_model, tmp_path_factory):
    model = tiny_model('sd1')
    folder = tmp_path_factory.mktemp('seamless')
    jaxsd.save(model, folder)
    return (model, diffusers.UNet2DConditionModel.from_pretrained(folder / 'unet').eval(),
            diffusers.AutoencoderKL.from_pretrained(folder / 'vae').eval())


@pytest.mark.parametrize('axes', ['xy', 'x', 'y'])
def test_networks(model, axes):
    model, net, coder = model
    config, params = model.config, model.params
    rng = np.random.default_rng(0)
    x, text = (rng.normal(size=shape).astype(np.float32) for shape in (
        (2, 8, 16, 4), (2, 5, config.unet.cross_attention_dim)))
    image = rng.uniform(-1, 1, (1, 16, 32, 3)).astype(np.float32)
    x_, text_, image_ = (torch.from_numpy(a) for a in (x, text, image))
    with torch.no_grad():
        expected = _circular(net, axes)(x_.permute(0, 3, 1, 2), 500, text_).sample
        coder = _circular(coder, axes)
        decoded = coder.decode(x_[:1].permute(0, 3, 1, 2)).sample
        encoded = coder.encode(image_.permute(0, 3, 1, 2)).latent_dist.mean
    found = unet.apply(layers.seamless(params['unet'], axes), config.unet, jnp.asarray(x),
                       jnp.full(2, 500.0), jnp.asarray(text))
    weights = layers.seamless(params['vae'], axes)
    assert _far(found, expected) < 1e-5
    assert _far(vae.decode(weights, config.vae, jnp.asarray(x[:1])), decoded) < 1e-5
    assert _far(vae.encode(weights, config.vae, jnp.asarray(image))[0], encoded) < 1e-5
