"""ControlNets at work in diffusers' pipelines: one, several, spans, guess mode, with pictures."""

import diffusers
import numpy as np
import pytest
import torch
from pipelines import (
    BOUND,
    cells,
    far,
    normal,
    ours,
    picture,
    pipeline,
    random_model,
    request,
    theirs,
    tiny,
)
from test_models import arrays, excite

from jaxsd import Control
from jaxsd.config_files import _controlnet
from jaxsd.models.controlnet import MODES
from jaxsd.weights import Network

pytestmark = pytest.mark.parity
SIZE = 64


def control(pipe, seed, **config):
    """A ControlNet for a pipeline's U-Net."""
    torch.manual_seed(seed)
    return excited(diffusers.ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(16, 24, 32, 40)), seed, **config)


def excited(net, seed, **config):
    """A network of diffusers with noise where a fresh one has zeros."""
    excite(net, seed).register_to_config(**config)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1 and not p.any():
                p.normal_(std=p[0].numel() ** -0.5)
    return net


def built(name, kind, folder, tokenizer_folder):
    """Our model with three ControlNets, diffusers' pipeline of it, and diffusers' ControlNets."""
    model = random_model(tiny(name), tokenizer_folder)
    pipe = pipeline(kind, model, folder)
    nets = {'edges': control(pipe, 1), 'pose': control(pipe, 2),
            'shuffle': control(pipe, 3, global_pool_conditions=True)}
    return model.replace(controlnets={
        name: Network(_controlnet(dict(net.config)), arrays(net)) for name, net in nets.items()
    }), pipe, nets


def asked(cases):
    """The requests of cases; the hints are the pictures 0, 1, ... in the order of the controls."""
    return [request(**more, controls=[Control(net, picture(i, SIZE), *values, guess=guess)
                                      for i, (net, *values) in enumerate(nets)])
            for nets, guess, more in cases.values()]


def expected(pipe, nets, kind, case, noise):
    """diffusers' latents of a case."""
    used, guess, more = case
    more = dict(more)
    names, *values = zip(*((net, *(*some, *(1.0, 0.0, 1.0)[len(some):])) for net, *some in used))
    hints = [picture(i, SIZE) for i in range(len(used))]
    values = dict(zip(('controlnet_conditioning_scale', 'control_guidance_start',
                       'control_guidance_end'), map(list, values)))
    chosen = [nets[name] for name in names]
    if len(used) == 1:
        hints, chosen = hints[0], chosen[0]
        values = {key: value[0] for key, value in values.items()}
    running = kind(**pipe.components, controlnet=chosen)
    running.set_progress_bar_config(disable=True)
    sampler = more.pop('sampler', 'euler')
    more['control_image' if 'image' in more else 'image'] = hints
    if 'mask' in more:
        more['mask_image'] = more.pop('mask')
    return theirs(running, sampler, [noise], guess_mode=guess is not None, **values, **more)


# {case: (ControlNets with scale, start and end; guess mode; the request's other fields)}. One
# batch of ours has them all.
CASES = {
    'one': ([('edges', 0.8)], None, {}),
    'several': ([('edges', 0.7), ('pose', 1.2)], None, {}),
    'span': ([('edges', 1.0, 0.2, 0.8)], None, {}),
    'spans': ([('pose', 1.0, 0.0, 0.5), ('edges', 0.6, 0.3, 1.0)], None, {}),
    'guess': ([('pose', 1.5)], 'diffusers', {}),
    'guess several': ([('pose', 1.0), ('edges', 0.5)], 'diffusers', {}),
    'shuffle': ([('shuffle',)], None, {}),
    'img2img': ([('edges', 1.0, 0.3, 1.0)], None,
                {'image': picture(7, SIZE), 'strength': 0.8, 'sampler': 'dpmpp_2m'}),
    'inpaint': ([('pose',), ('edges', 0.5)], None,
                {'image': picture(8, SIZE), 'strength': 0.6, 'sampler': 'ddim',
                 'mask': cells(0, SIZE)}),
}
KINDS = {'img2img': diffusers.StableDiffusionControlNetImg2ImgPipeline,
         'inpaint': diffusers.StableDiffusionControlNetInpaintPipeline}


@pytest.fixture(scope='module')
def controlled(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('controlled') / 'model'
    model, pipe, nets = built('sd1', diffusers.StableDiffusionPipeline, folder, tokenizer_folder)
    return pipe, nets, ours(model, asked(CASES), normal(1).repeat(len(CASES), 0))


@pytest.mark.parametrize('name', CASES)
def test_control(controlled, name):
    pipe, nets, found = controlled
    i = list(CASES).index(name)
    kind = KINDS.get(name, diffusers.StableDiffusionControlNetPipeline)
    wanted = expected(pipe, nets, kind, CASES[name], normal(1))
    assert far(found[i:i + 1], wanted) <= BOUND
    others = np.delete(found, i, 0)
    assert min(far(other[None], wanted) for other in others) > 100 * BOUND  # each says its own


XL = {name: CASES[name] for name in ('one', 'several', 'span', 'guess')}


def test_control_of_sdxl(tokenizer_folder, tmp_path):
    model, pipe, nets = built('sdxl', diffusers.StableDiffusionXLPipeline, tmp_path / 'model',
                              tokenizer_folder)
    found = ours(model, asked(XL), normal(1).repeat(len(XL), 0))
    for i, (name, case) in enumerate(XL.items()):
        wanted = expected(pipe, nets, diffusers.StableDiffusionXLControlNetPipeline, case,
                          normal(1))
        assert far(found[i:i + 1], wanted) <= BOUND, name


# ControlNet-Union: {case: (modes with scale, start and end; guess mode)}.
UNIONS = {
    'openpose': ([('openpose', 0.8)], None), 'repaint': ([('repaint', 1.0)], None),
    'several': ([('depth', 0.7), ('canny', 1.2)], None),
    'spans': ([('tile', 1.0, 0.0, 0.6), ('scribble', 0.6, 0.4, 1.0)], None),
    'guess': ([('normal', 1.5)], 'diffusers'),
    'guess several': ([('segment', 1.0), ('mlsd', 0.5), ('lineart', 0.8)], 'diffusers'),
}


def test_union_of_sdxl(tokenizer_folder, tmp_path):
    """One program of ours, with places for three hints, has all modes and numbers of hints."""
    model = random_model(tiny('sdxl'), tokenizer_folder)
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, model, tmp_path / 'model')
    torch.manual_seed(1)
    sizes = {name: pipe.unet.config[name] for name in (
        'block_out_channels', 'layers_per_block', 'norm_num_groups', 'cross_attention_dim',
        'attention_head_dim', 'down_block_types', 'transformer_layers_per_block',
        'use_linear_projection', 'addition_embed_type', 'addition_time_embed_dim',
        'projection_class_embeddings_input_dim')}
    width = sizes['block_out_channels'][0]
    union = excited(diffusers.ControlNetUnionModel(
        **sizes, conditioning_embedding_out_channels=(16, 24, 32, 40), num_control_type=8,
        num_trans_channel=width, num_trans_head=2, num_proj_channel=width), 1)
    model = model.replace(controlnets={'union': Network(_controlnet(dict(union.config)),
                                                        arrays(union))})
    found = ours(model, [request(controls=[
        Control('union', picture(i, SIZE), *values, guess=guess, mode=mode)
        for i, (mode, *values) in enumerate(hints)]) for hints, guess in UNIONS.values()],
        normal(1).repeat(len(UNIONS), 0))
    running = diffusers.StableDiffusionXLControlNetUnionPipeline(
        **pipe.components, controlnet=union)
    running.set_progress_bar_config(disable=True)
    forward = union.forward
    # In guess mode diffusers gives it the modes of both prompts with the latents of one, and stops.
    union.forward = lambda sample, *args, control_type, **more: forward(
        sample, *args, control_type=control_type[:len(sample)], **more)
    for i, (name, (hints, guess)) in enumerate(UNIONS.items()):
        modes, *values = zip(*((mode, *(*some, *(1.0, 0.0, 1.0)[len(some):]))
                               for mode, *some in hints))
        wanted = theirs(
            running, 'euler', [normal(1)], guess_mode=guess is not None,
            control_image=[picture(k, SIZE) for k in range(len(hints))],
            control_mode=[MODES[mode] for mode in modes], **dict(zip((
                'controlnet_conditioning_scale', 'control_guidance_start',
                'control_guidance_end'), map(list, values))))
        assert far(found[i:i + 1], wanted) <= BOUND, name
        others = np.delete(found, i, 0)
        assert min(far(other[None], wanted) for other in others) > 100 * BOUND
