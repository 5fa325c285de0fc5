"""ControlNet without a reference: zeros leave the U-Net alone, and shapes fit together."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY
from flax import traverse_util

from jaxsd.config import ControlNetConfig
from jaxsd.config_files import read_config
from jaxsd.models import controlnet, shapes, spec, unet

WIDTHS = (4, 6, 8, 10)


def control_config(family):
    return ControlNetConfig(**dataclasses.asdict(TINY[family].unet),
                            conditioning_embedding_out_channels=WIDTHS)


def copy_of_unet(family):
    cfg = control_config(family)
    net = spec.init_part(np.random.default_rng(0), shapes.unet(TINY[family].unet))
    return cfg, net, controlnet.init_from_unet(net, cfg, np.random.default_rng(1))


def inputs(cfg):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return (normal(2, 6, 10, cfg.in_channels), np.array([3.0, 500.0], np.float32),
            normal(2, 5, cfg.cross_attention_dim))


@pytest.mark.parametrize('family', TINY)
def test_a_copy_of_the_unet_has_the_names_and_shapes(family):
    cfg, net, params = copy_of_unet(family)
    flat = traverse_util.flatten_dict(params, sep='.')
    assert {k: spec.from_jax(k, np.asarray(v)).shape for k, v in flat.items()} == (
        shapes.controlnet(cfg))
    assert flat['mid_block.resnets.0.conv1.weight'] is (
        net['mid_block']['resnets']['0']['conv1']['weight'])


@pytest.mark.slow
def test_a_fresh_controlnet_leaves_the_unet_as_it_is_and_can_learn():
    cfg, net, params = copy_of_unet('sd1')
    x, t, context = inputs(cfg)
    hint = np.random.default_rng(1).uniform(size=(2, 48, 80, 3)).astype(np.float32)

    @jax.jit
    def run(net, params):
        def loss(params):
            states = controlnet.apply(params, cfg, x, t, context, controlnet.embed(params, hint))
            return sum(s.sum() for s in states), states
        gradient, residuals = jax.grad(loss, has_aux=True)(params)
        out = [unet.apply(net, TINY['sd1'].unet, x, t, context, residuals=r)
               for r in (None, residuals)]
        return residuals, *out, gradient

    residuals, plain, controlled, gradient = run(net, params)
    assert not any(np.any(r) for r in residuals)
    np.testing.assert_array_equal(plain, controlled)
    # At the first step only the zero convolutions learn, and all of them do.
    for part, tree in gradient.items():
        zero = part in ('controlnet_down_blocks', 'controlnet_mid_block')
        assert all(np.any(g) == zero for g in jax.tree.leaves(tree)), part


def test_residuals_must_be_one_for_one():
    _, net, _ = copy_of_unet('sd1')
    x, t, context = inputs(TINY['sd1'].unet)
    with pytest.raises(ValueError, match='zip'):
        jax.eval_shape(
            lambda p: unet.apply(p, TINY['sd1'].unet, x, t, context, residuals=[]), net)


@pytest.mark.parametrize('control, model, said', [
    ('sd15', 'sd21', r'for 1.x \(768-wide text\), the model is 2.x \(1024-wide text\)'),
    ('sd21', 'sdxl', r'for 2.x \(1024-wide text\), the model is SDXL \(2048-wide text\)'),
    ('sdxl', 'sdxl_refiner', r'for SDXL \(2048-.*, the model is the SDXL refiner \(1280-.*2560'),
])
def test_a_controlnet_of_another_version(control, model, said):
    configs = {name: read_config(name).unet for name in (control, model)}
    cfg = ControlNetConfig(**dataclasses.asdict(configs[control]))
    controlnet.check(cfg, configs[control])
    with pytest.raises(ValueError, match=said) as error:
        controlnet.check(cfg, configs[model])
    assert '\n' not in str(error.value)


def test_a_controlnet_fits_models_with_more_input_and_other_depths():
    cfg = ControlNetConfig(transformer_layers=(1, 1, 0, 0))
    controlnet.check(cfg, read_config('sd15_inpainting').unet)
    wide = dataclasses.replace(cfg, in_channels=8)
    with pytest.raises(ValueError, match='in_channels 8 instead of 4'):
        controlnet.check(wide, read_config('sd15').unet)
