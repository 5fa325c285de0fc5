"""IP-Adapter against diffusers, and its image encoder against transformers, on the same weights."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_ip_adapters
import torch
import transformers
from diffusers.image_processor import IPAdapterMaskProcessor
from flax import traverse_util
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
from safetensors.numpy import load_file, save_file
from test_models import arrays, close, excite
from tiny_ip_adapters import VISION
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import jaxsd
from jaxsd import ImagePrompt
from jaxsd.models import clip, ip_adapter, shapes, spec
from jaxsd.run import image_prompts
from jaxsd.weights import Network, names

pytestmark = pytest.mark.parity
SIZE = 64


def encoder(config=VISION, seed=3):
    """A transformers model of random weights."""
    torch.manual_seed(seed)
    made = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**dataclasses.asdict(config)))
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
    return excite(made, seed)


def processor(size=VISION.image_size):
    return CLIPImageProcessorPil(size={'shortest_edge': size},
                                 crop_size={'height': size, 'width': size})


def as_state(tensors):
    """The same as diffusers takes it."""
    state = {'image_proj': {}, 'ip_adapter': {}}
    for name, a in tensors.items():
        part, _, rest = name.partition('.')
        state[part][rest] = torch.tensor(a)
    return state


def projected(tensors, cfg, *features):
    """Our tokens for torch's features, by params in a file's layout."""
    params = traverse_util.unflatten_dict(
        {name: jnp.asarray(spec.to_jax(name, a)) for name, a in tensors.items()}, sep='.')
    return jax.jit(ip_adapter.project, static_argnums=1)(
        params, cfg, *(None if f is None else f.numpy() for f in features))


@pytest.mark.parametrize('act, patch', [('gelu', 10), ('quick_gelu', 7)])
def test_the_image_encoder(act, patch):
    config = dataclasses.replace(VISION, hidden_act=act, patch_size=patch, num_attention_heads=2)
    model = encoder(config)
    assert spec.names(config) == {
        k if k.startswith('v') else f'vision_model.{k}': v for k, v in
        ((k, tuple(v.shape)) for k, v in model.state_dict().items()) if 'position_ids' not in k}
    pixels = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, 30, 30)).astype(np.float32))
    found = jax.jit(clip.encode_image, static_argnums=1)(
        arrays(model), config, pixels.permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True)
    close(found.hidden, expected.hidden_states[-2])
    close(found.embeds, expected.image_embeds)


@pytest.mark.parametrize('size', [(40, 30), (31, 77), (29, 90), (17, 12)])
def test_what_the_encoder_sees_of_a_picture(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected = processor()(images=image, return_tensors='np')['pixel_values'][0]
    found = clip.normalised(image_prompts.square(image, 30)).transpose(2, 0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_projections_against_diffusers():
    """Each kind's tokens, from the layers that diffusers makes of the file."""
    unet_cfg = tiny('sd1').unet
    convert = diffusers.UNet2DConditionModel._convert_ip_adapter_image_proj_to_diffusers
    holder = type('', (), {'device': 'cpu', 'dtype': torch.float32})()
    generator = torch.Generator().manual_seed(0)
    for kind in ('base', 'plus', 'full', 'faceid', 'faceid_plus'):
        cfg = tiny_ip_adapters.config(kind, unet_cfg)
        tensors = tiny_ip_adapters.tensors(cfg, 1)
        assert ip_adapter.detect({n: a.shape for n, a in tensors.items()}) == cfg
        layer = convert(holder, as_state(tensors)['image_proj'], low_cpu_mem_usage=False)
        image = torch.randn((3, 24) if kind == 'base' else (3, 10, 32), generator=generator)
        face = torch.randn((3, 12), generator=generator)
        given = {'faceid': (None, face), 'faceid_plus': (image, face)}.get(kind, (image, None))
        for shortcut in (False, True)[:1 + (kind == 'faceid_plus')]:
            if kind == 'faceid_plus':
                layer.clip_embeds, layer.shortcut = image[:, None], shortcut
            with torch.no_grad():
                expected = layer(image if cfg.face == 0 else face)
            found = projected(tensors, dataclasses.replace(cfg, shortcut=shortcut), *given)
            close(found, expected)


# {adapter of ours: its kind, and perhaps fields of its config}.
KINDS = {'base': 'base', 'other': 'base', 'plus': 'plus', 'full': 'full',
         'face': ('faceid', {'rank': 3})}
FACES = np.random.default_rng(5).standard_normal((2, 12)).astype(np.float32)
MASKS = [cells(1, SIZE), cells(2, SIZE)]


def prompt(net, seed, **more):
    return ImagePrompt(net, picture(seed, SIZE), **more)


# {case: (image prompts, the request's other fields)}. One batch of ours has them all.
CASES = {
    'base': ([prompt('base', 1, weight=0.7)], {}),
    'plus': ([prompt('plus', 2)], {}),
    'full': ([prompt('full', 3, weight=0.5)], {}),
    'face': ([ImagePrompt('face', embeds=FACES[0], weight=0.8)], {}),
    'faces': ([ImagePrompt('face', embeds=FACES)], {}),
    'several': ([prompt('base', 1, weight=0.6), prompt('plus', 2, weight=0.9)], {}),
    'two of a kind': ([prompt('base', 1, weight=0.6), prompt('other', 4, weight=-0.5)], {}),
    'as one': ([ImagePrompt('plus', [picture(1, SIZE), picture(2, 48)], weight=0.8)], {}),
    'masks': ([prompt('plus', 1, weight=0.8, mask=MASKS[0]),
               prompt('plus', 2, weight=0.4, mask=MASKS[1])], {}),
    'mask and none': ([prompt('base', 3, mask=MASKS[1])], {}),
    'blocks': ([prompt('base', 1, weight=1.5, blocks={'down': 1, 'up': {'block_1': [0, 0.5]}})],
               {}),
    'img2img': ([prompt('plus', 1)],
                {'image': picture(7, SIZE), 'strength': 0.8, 'sampler': 'dpmpp_2m'}),
}


@pytest.fixture(scope='module')
def prompted(tokenizer_folder, tmp_path_factory):
    """diffusers' pipeline, the adapters' files as diffusers takes them, and our latents."""
    return built('sd1', diffusers.StableDiffusionPipeline, CASES, tokenizer_folder,
                 tmp_path_factory.mktemp('prompted'))


def built(family, kind, cases, tokenizer_folder, folder):
    model = random_model(tiny(family), tokenizer_folder)
    pipe = pipeline(kind, model, folder / 'model')
    look = encoder()
    model = model.replace(ip_adapters=tiny_ip_adapters.adapters(
        model.config.unet, folder, Network(VISION, arrays(look)), **KINDS))
    files = {name: as_state(load_file(folder / f'{name}.safetensors')) for name in KINDS}
    asked = [request(**more, image_prompts=prompts) for prompts, more in cases.values()]
    found = ours(model, asked, normal(1).repeat(len(cases), 0))
    return pipe, look, files, found


def expected(pipe, look, files, case, kind=None):
    """diffusers' latents of a case."""
    prompts, more = case
    nets = list(dict.fromkeys(prompt.net for prompt in prompts))
    running = pipe if kind is None else kind(**pipe.components)
    running.set_progress_bar_config(disable=True)
    running.register_modules(image_encoder=look, feature_extractor=processor())
    running.load_ip_adapter([files[net] for net in nets], subfolder='', weight_name=nets,
                            image_encoder_folder=None)
    mine = [[p for p in prompts if p.net == net] for net in nets]
    more, kwargs = dict(more), {}
    if any(p.mask for p in prompts):
        made = IPAdapterMaskProcessor().preprocess([p.mask for p in prompts], SIZE, SIZE)
        kwargs['cross_attention_kwargs'] = {'ip_adapter_masks': [made[:, 0][None]]}
        scales = [[p.weight for p in some] for some in mine]
    else:
        scales = [scaled(p) for p, in mine]
    for attn in running.unet.attn_processors.values():
        if hasattr(attn, 'scale'):
            attn.scale = [None] * len(nets)
    running.set_ip_adapter_scale(scales)
    if prompts[0].embeds is not None:
        face = torch.tensor(np.atleast_2d(prompts[0].embeds))[None]
        kwargs['ip_adapter_image_embeds'] = [torch.cat([torch.zeros_like(face), face])]
    else:
        kwargs['ip_adapter_image'] = [[i for p in some for i in p.pictures] for some in mine]
    found = theirs(running, more.pop('sampler', 'euler'), [normal(1)], **kwargs, **more)
    running.unload_lora_weights()
    running.unload_ip_adapter()
    return found


def scaled(prompt):
    """A weight, or weights of blocks, as set_ip_adapter_scale takes it."""
    def times(value):
        if isinstance(value, dict):
            return {key: times(v) for key, v in value.items()}
        return [prompt.weight * v for v in value] if isinstance(value, list) else (
            prompt.weight * value)
    return times(1 if prompt.blocks is None else prompt.blocks)


@pytest.mark.parametrize('name', CASES)
def test_image_prompts(prompted, name):
    pipe, look, files, found = prompted
    i = list(CASES).index(name)
    kind = diffusers.StableDiffusionImg2ImgPipeline if 'image' in CASES[name][1] else None
    wanted = expected(pipe, look, files, CASES[name], kind)
    assert far(found[i:i + 1], wanted) <= BOUND
    others = np.delete(found, i, 0)
    assert min(far(other[None], wanted) for other in others) > 100 * BOUND  # each says its own


XL = {name: CASES[name] for name in ('base', 'plus', 'masks')}


def test_image_prompts_of_sdxl(tokenizer_folder, tmp_path):
    pipe, look, files, found = built('sdxl', diffusers.StableDiffusionXLPipeline, XL,
                                     tokenizer_folder, tmp_path)
    for i, (name, case) in enumerate(XL.items()):
        assert far(found[i:i + 1], expected(pipe, look, files, case)) <= BOUND, name


def test_the_image_encoders_layouts(tmp_path):
    """transformers' folder and our copy of it; OpenCLIP's names, whose file has both sides."""
    model = encoder()
    model.save_pretrained(tmp_path / 'theirs')
    network = jaxsd.load_image_encoder(tmp_path / 'theirs')
    assert network.config == VISION
    jaxsd.save_network(network, tmp_path / 'ours')
    again, info = transformers.CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / 'ours', output_loading_info=True)
    assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys'))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    table = shapes.vision(VISION)
    flat = traverse_util.flatten_dict(network.params, sep='.')
    stored = {}
    for name, place in names.network_places('image_encoder', VISION, table, 'visual.').items():
        array = spec.from_jax(name, np.asarray(flat[name]))
        if place.how in ('q', 'k', 'v'):
            stored.setdefault(place.name, {})[place.how] = array
        else:
            stored[place.name] = array.T if place.how == 'T' else array
    stored = {n: np.concatenate([a[c] for c in 'qkv']) if isinstance(a, dict) else a
              for n, a in stored.items()}
    assert stored['visual.transformer.resblocks.0.attn.in_proj_weight'].shape == (96, 32)
    assert stored['visual.proj'].shape == (32, 24)
    save_file({n: np.ascontiguousarray(a) for n, a in stored.items()} | {
        'text_projection': np.zeros((3, 3), np.float32), 'logit_scale': np.zeros((), np.float32),
        'transformer.resblocks.0.ln_1.weight': np.zeros(3, np.float32)},
        tmp_path / 'open_clip.safetensors')
    found = jaxsd.load_image_encoder(tmp_path / 'open_clip.safetensors', config=VISION)
    jax.tree.map(np.testing.assert_array_equal, found.params, network.params)


@pytest.mark.parametrize('kind', ['plus', 'faceid'])
def test_a_pickle_as_h94_writes_it(kind, tmp_path):
    config = tiny_ip_adapters.config(kind, tiny('sd1').unet)
    tensors = tiny_ip_adapters.tensors(config, 0)
    torch.save(as_state(tensors), tmp_path / 'ip-adapter.bin')
    found = jaxsd.load_ip_adapter(tmp_path / 'ip-adapter.bin')
    assert found.config == config
    flat = traverse_util.flatten_dict(found.params, sep='.')
    assert flat.keys() == tensors.keys()
    for name, array in flat.items():
        np.testing.assert_array_equal(spec.from_jax(name, np.asarray(array)), tensors[name])
