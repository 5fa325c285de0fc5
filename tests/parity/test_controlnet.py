"""ControlNet and T2I-Adapter against diffusers, with its U-Net, tiny, in float32."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from test_models import UNETS, arrays, close, excite, nchw, shapes_of

from jaxsd.config import ControlNetConfig
from jaxsd.config_files import _controlnet, _t2i_adapter, _unet
from jaxsd.models import controlnet, shapes, t2i_adapter, unet
from jaxsd.models.layers import timestep_embedding
from jaxsd.weights import Network, load_controlnet, load_t2i_adapter, save_network

pytestmark = pytest.mark.parity


# SDXL with all its levels: an adapter for it has one feature more, for the middle block.
THREE = {'block_out_channels': (32, 64, 64), 'attention_head_dim': (2, 4, 4),
         'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
         'transformer_layers_per_block': (1, 1, 2)}
WIDE = {'block_out_channels': (32, 64, 64), 'down_block_types': (
    'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D')}


def networks(family, more=None):
    """diffusers' U-Net and ControlNet of a family in miniature, with zero convolutions of noise."""
    torch.manual_seed(0)
    down = ('CrossAttnDownBlock2D', 'DownBlock2D')
    settings = {'block_out_channels': (32, 64), 'layers_per_block': 1, 'norm_num_groups': 8,
                'down_block_types': down} | UNETS[family] | (more or {})
    up = {'up_block_types': [kind.replace('Down', 'Up')
                             for kind in reversed(settings['down_block_types'])]}
    net = excite(diffusers.UNet2DConditionModel(**settings | up), 1)
    settings.pop('up_block_types', None)
    control = excite(diffusers.ControlNetModel(
        **settings, conditioning_embedding_out_channels=(16, 24, 32, 40)), 2)
    with torch.no_grad():
        for p in control.parameters():
            if p.ndim == 4 and not p.any():
                p.normal_(std=p[0].numel() ** -0.5)
    return net, control


def conditions(cfg, rng):
    """SDXL's further inputs, for us and for diffusers."""
    if not cfg.added_dim:
        return {}, {}
    ids = rng.integers(0, 100, (2, 6)).astype(np.float32)
    pooled = rng.normal(size=(2, 32)).astype(np.float32)
    sinusoids = timestep_embedding(ids, cfg.added_time_dim).reshape(2, -1)
    return {'added': np.concatenate([pooled, sinusoids], -1)}, {
        'added_cond_kwargs': {'text_embeds': torch.tensor(pooled), 'time_ids': torch.tensor(ids)}}


@pytest.mark.parametrize('family, size, pool', [
    ('sd1', (9, 14), False), ('sd2', (16, 8), True), ('sdxl', (16, 16), False)])
def test_residuals_and_controlled_unet(family, size, pool):
    net, control = networks(family)
    control.register_to_config(global_pool_conditions=pool)
    cfg, unet_cfg = _controlnet(dict(control.config)), _unet(dict(net.config))
    assert cfg.global_pool_conditions == pool and isinstance(cfg, ControlNetConfig)
    assert {f.name: getattr(cfg, f.name) for f in dataclasses.fields(unet_cfg)} == (
        dataclasses.asdict(unet_cfg))
    assert shapes.controlnet(cfg) == shapes_of(control)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 4)).astype(np.float32)
    hint = rng.uniform(size=(2, 8 * size[0], 8 * size[1], 3)).astype(np.float32)
    context = rng.normal(size=(2, 7, cfg.cross_attention_dim)).astype(np.float32)
    t = np.array([3, 801.5], np.float32)
    more, theirs = conditions(cfg, rng)
    scales = (0.7, 1.3)  # of each picture

    @jax.jit
    def ours(control, net):
        embedded = controlnet.embed(control, hint)
        residuals = controlnet.apply(control, cfg, x, t, context, embedded, **more)
        scaled = [r * np.reshape(scales, (2, 1, 1, 1)) for r in residuals]
        return residuals, unet.apply(net, unet_cfg, x, t, context, residuals=scaled, **more)

    residuals, out = ours(arrays(control), arrays(net))
    inputs = (nchw(x), torch.tensor(t), torch.tensor(context))
    with torch.no_grad():
        down, mid = control(*inputs, controlnet_cond=nchw(hint), return_dict=False, **theirs)
        assert len(residuals) == len(down) + 1
        for mine, other in zip(residuals, (*down, mid)):
            close(mine, other.permute(0, 2, 3, 1))
        s = torch.tensor(scales).reshape(2, 1, 1, 1)
        plain = net(*inputs, **theirs).sample
        expected = net(*inputs, down_block_additional_residuals=[d * s for d in down],
                       mid_block_additional_residual=mid * s, **theirs).sample
    assert (expected - plain).std() > 0.1 * plain.std()
    close(out, expected.permute(0, 2, 3, 1))


def union(more=None):
    """diffusers' ControlNetUnionModel for SDXL in miniature, no weight of it zero."""
    torch.manual_seed(0)
    settings = {'block_out_channels': (32, 64), 'layers_per_block': 1, 'norm_num_groups': 8,
                **UNETS['sdxl'], 'conditioning_embedding_out_channels': (16, 24, 32, 40),
                'num_control_type': 8, 'num_trans_channel': 32, 'num_trans_head': 4,
                'num_trans_layer': 2, 'num_proj_channel': 32} | (more or {})
    settings.pop('up_block_types')
    net = excite(diffusers.ControlNetUnionModel(**settings), 2)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1 and not p.any():
                p.normal_(std=p[0].numel() ** -0.5)
    return net


# Modes, with their scales, of one picture.
HINTS = [*([(n, 0.7)] for n in range(8)), [(1, 0.6), (3, 1.2)], [(0, 1.0), (7, 0.0), (3, 0.5)],
         [(3, 0.8), (3, 0.9)]]


def test_union_of_every_mode_and_of_several():
    """One call of ours with what diffusers needs one for each; its scales are outside of it where
    a picture has one hint, and inside where it has several."""
    net = union()
    cfg, count, most = _controlnet(dict(net.config)), len(HINTS), max(map(len, HINTS))
    assert cfg.num_control_type == 8 and shapes.controlnet(cfg) == shapes_of(net)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 8, 12, 4)).astype(np.float32)
    pixels = rng.uniform(size=(count, most, 64, 96, 3)).astype(np.float32)
    context = rng.normal(size=(count, 7, cfg.cross_attention_dim)).astype(np.float32)
    ids = rng.integers(0, 100, (count, 6)).astype(np.float32)
    pooled = rng.normal(size=(count, 32)).astype(np.float32)
    added = np.concatenate([
        pooled, timestep_embedding(ids, cfg.added_time_dim).reshape(count, -1)], -1)
    t = np.linspace(3, 901.5, count).astype(np.float32)
    modes, scales = np.full((count, most), -1), np.full((count, most), 9, np.float32)
    for i, some in enumerate(HINTS):
        modes[i, :len(some)] = [mode for mode, _ in some]
        scales[i, :len(some)] = [1 if len(some) == 1 else scale for _, scale in some]
    params = arrays(net)
    ours = jax.jit(lambda p, modes: controlnet.apply(
        p, cfg, x, t, context, controlnet.embed(p, pixels), added, None, modes, scales))
    found, other = ours(params, modes), ours(params, np.roll(modes, 1, 0))
    assert (np.abs(other[-1] - found[-1]).max((1, 2, 3)) > 0.01 * found[-1].std()).all()
    for i, some in enumerate(HINTS):
        used = [mode for mode, _ in some]
        kinds = torch.zeros(1, 8).scatter_(1, torch.tensor([used]), 1)
        with torch.no_grad():
            down, mid = net(
                nchw(x[i:i + 1]), torch.tensor(t[i:i + 1]), torch.tensor(context[i:i + 1]),
                [nchw(pixels[i, k][None]) for k in range(len(some))], kinds, used,
                [scale for _, scale in some], return_dict=False, added_cond_kwargs={
                    'text_embeds': torch.tensor(pooled[i:i + 1]),
                    'time_ids': torch.tensor(ids[i:i + 1])})
        for mine, other in zip(found, (*down, mid), strict=True):
            mine = mine[i:i + 1] * (some[0][1] if len(some) == 1 else 1)
            close(mine, other.permute(0, 2, 3, 1))


def test_init_from_unet_is_diffusers_from_unet():
    net, _ = networks('sdxl')
    theirs = diffusers.ControlNetModel.from_unet(net)
    cfg = _controlnet(dict(theirs.config))
    found = controlnet.init_from_unet(arrays(net), cfg, np.random.default_rng(0))
    expected = arrays(theirs)
    blocks = expected['controlnet_cond_embedding'].pop('blocks')
    first = expected['controlnet_cond_embedding'].pop('conv_in')
    fresh = {k: found['controlnet_cond_embedding'].pop(k) for k in ('blocks', 'conv_in')}
    jax.tree.map(np.testing.assert_array_equal, found, expected)  # copies and zeros, all equal
    for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves({'blocks': blocks, 'conv_in': first})):
        assert a.shape == b.shape and (a.ndim == 1 or 0.5 < a.std() / b.std() < 2)


@pytest.mark.parametrize('family, levels, kind, size, channels', [
    ('sd1', None, 'full_adapter', (9, 14), (32, 64)),
    ('sd1', WIDE, 'light_adapter', (9, 14), (32, 64)),
    ('sdxl', THREE, 'full_adapter_xl', (16, 12), (32, 64, 64, 64))])
def test_adapted_unet(family, levels, kind, size, channels):
    net, _ = networks(family, levels)
    torch.manual_seed(0)
    adapter = excite(diffusers.T2IAdapter(
        channels=channels, adapter_type=kind, downscale_factor=16 if kind.endswith('xl') else 8), 3)
    cfg, unet_cfg = _t2i_adapter(dict(adapter.config)), _unet(dict(net.config))
    assert t2i_adapter.names(cfg) == shapes_of(adapter)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 4)).astype(np.float32)
    hint = rng.uniform(size=(2, 8 * size[0], 8 * size[1], 3)).astype(np.float32)
    context = rng.normal(size=(2, 7, unet_cfg.cross_attention_dim)).astype(np.float32)
    more, theirs = conditions(unet_cfg, rng)
    t = np.array([3, 801.5], np.float32)

    @jax.jit
    def ours(adapter, net):
        features = t2i_adapter.apply(adapter, cfg, hint)
        return features, unet.apply(net, unet_cfg, x, t, context, features=features, **more)

    features, out = ours(arrays(adapter), arrays(net))
    with torch.no_grad():
        expected = adapter(nchw(hint))
        for mine, other in zip(features, expected, strict=True):
            close(mine, other.permute(0, 2, 3, 1))
        inputs = (nchw(x), torch.tensor(t), torch.tensor(context))
        plain = net(*inputs, **theirs).sample
        expected = net(*inputs, down_intrablock_additional_residuals=expected, **theirs).sample
    assert (expected - plain).std() > 0.1 * plain.std()
    close(out, expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize('family', ['sd1', 'sd2', 'sdxl', 'union', 'adapter'])
def test_folders_go_both_ways(family, tmp_path):
    """diffusers loads what we save, with no name missing, and we load what it saves."""
    if family == 'adapter':
        module = diffusers.T2IAdapter(channels=(8, 16, 16))
        read, load = _t2i_adapter, load_t2i_adapter
    else:
        module = union() if family == 'union' else networks(family)[1]
        read, load = _controlnet, load_controlnet
    cfg, params = read(dict(module.config)), arrays(module)
    save_network(Network(cfg, params), tmp_path / 'ours')
    theirs, report = type(module).from_pretrained(tmp_path / 'ours', output_loading_info=True)
    assert not any(report.values())
    assert read(dict(theirs.config)) == cfg
    module.save_pretrained(tmp_path / 'theirs')
    again = load(tmp_path / 'theirs')
    assert again.config == cfg
    for tree in (arrays(theirs), again.params):
        jax.tree.map(np.testing.assert_array_equal, tree, params)
