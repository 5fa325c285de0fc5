"""The U-Net's arguments for guidance: attention hooks and FreeU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from jaxsd.config_files import read_config
from jaxsd.models import shapes, spec, unet
from jaxsd.models.layers import attention, attention_received

CONFIG = TINY['sd1'].unet
PARAMS = spec.init(0, TINY['sd1'])['unet']
PLACES = [f'{block}.attentions.{i}.transformer_blocks.0.attn{n}' for block, i in (
    ('down_blocks.0', 0), ('mid_block', 0), ('up_blocks.1', 0), ('up_blocks.1', 1)) for n in (1, 2)]


def program(**more):
    x, context = jnp.ones((2, 8, 8, 4)), jnp.ones((2, 7, 32))
    return jax.make_jaxpr(
        lambda p, x: unet.apply(p, CONFIG, x, jnp.zeros(2), context, **more))(PARAMS, x)


@functools.partial(jax.jit, static_argnames='hook')
def evaluate(freeu=None, hook=None):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    context = rng.normal(size=(2, 7, 32)).astype(np.float32)
    return unet.apply(PARAMS, CONFIG, x, jnp.array([3.0, 700.0]), context, hook=hook, freeu=freeu)


def identity(place, heads, q, k, v):
    """The identity in the middle, the usual attention, given back, elsewhere."""
    return v if place == PLACES[2] else attention(q, k, v, heads)


def test_a_hook_sees_every_attention_and_changes_nothing_by_looking():
    seen = []

    def hook(place, heads, q, k, v):
        seen.append(place)
        assert heads == 4 and k.shape == v.shape
        assert k.shape == (q.shape if place.endswith('attn1') else (2, 7, q.shape[2]))

    assert str(program(hook=hook)) == str(program())
    assert seen == PLACES


@pytest.mark.slow
def test_what_a_hook_returns_is_the_attention():
    assert np.abs(evaluate(hook=identity) - evaluate()).max() > 1e-3
    assert str(program(hook=lambda place, heads, q, k, v: attention(q, k, v, heads))) == (
        str(program()))


def test_only_cross_attention_has_no_self_attention_to_hook():
    config = dataclasses.replace(CONFIG, only_cross_attention=(True, False))
    params = spec.init_part(np.random.default_rng(0), shapes.unet(config))
    seen = []
    jax.eval_shape(lambda p: unet.apply(
        p, config, jnp.ones((1, 8, 8, 4)), jnp.zeros(1), jnp.ones((1, 7, 32)),
        hook=lambda place, *_: seen.append(place)), params)
    assert seen == [place for place in PLACES if place != PLACES[0] and (
        place.endswith('attn2') or place.startswith('mid'))]


def test_the_cross_attentions_are_known_without_the_parameters():
    cross = [place for place in PLACES if place.endswith('attn2')]
    assert unet.cross_attentions(CONFIG) == {  # the middle block is last
        place: 64 if place.startswith('mid') else 32 for place in [cross[0], *cross[2:], cross[1]]}
    uneven = dataclasses.replace(  # as of distilled networks
        CONFIG, transformer_layers=(2, 0), transformer_depths=(2, 0, 0, 0, 1, 3),
        mid_transformer_layers=-1)
    for config in (uneven, *(read_config(version).unet for version in ('sd15', 'sd21', 'sdxl'))):
        found = {name.removesuffix('.to_k.weight'): shape[0]
                 for name, shape in shapes.unet(config).items() if 'attn2.to_k.' in name}
        assert unet.cross_attentions(config) == found


def test_attention_received_is_softmax_summed_over_queries():
    q, k = np.random.default_rng(0).normal(size=(2, 2, 6, 8))
    expected = np.zeros((2, 6))
    for b in range(2):
        for head in range(4):
            part = slice(2 * head, 2 * head + 2)
            scores = np.exp(q[b, :, part] @ k[b, :, part].T / np.sqrt(2))
            expected[b] += (scores / scores.sum(1, keepdims=True)).sum(0) / 4
    np.testing.assert_allclose(attention_received(q, k, 4), expected, atol=1e-6)


def test_freeu_of_one_is_off_and_images_may_differ():
    def values(first, second):
        return tuple(np.array(pair, np.float32) for pair in zip(first, second))

    strong, one = (1.3, 1.4, 0.9, 0.2), (1.0, 1.0, 1.0, 1.0)
    both, mixed = evaluate(values(strong, strong)), evaluate(values(one, strong))
    np.testing.assert_array_equal(mixed[1], both[1])
    np.testing.assert_allclose(mixed[0], evaluate()[0], atol=1e-6)  # another program: rounding
    assert np.abs(mixed[1] - evaluate()[1]).max() > 1e-3
