"""Files of adapters with random tensors, in every format and spelling, for tests."""

import numpy as np

from jaxsd.models.spec import spec
from jaxsd.weights import names

SIZE = 0.2  # deviation of the factors: what is added is about as large as what it is added to
KOHYA = {'down': '.lora_down.weight', 'up': '.lora_up.weight', 'mid': '.lora_mid.weight'}
PEFT = {'down': '.lora_A.weight', 'up': '.lora_B.weight', 'magnitude': '.lora_magnitude_vector'}
PLAIN = {'down': '.down.weight', 'up': '.up.weight'}


def layers(config):
    """[(component, layer, shape of its weight)]: linear layers and convolutions."""
    return [(part, name.removesuffix('.weight'), shape)
            for part, shapes in spec(config).items() if part == 'unet' or part.startswith('text')
            for name, shape in shapes.items()
            if len(shape) > 1 and not name.endswith('embedding.weight')
            and name != 'text_projection.weight']


def attentions(config):
    """Those of `layers` that diffusers' training scripts give a LoRA."""
    return [layer for layer in layers(config) if '.attn' in layer[1] or 'self_attn' in layer[1]]


def kohya(part, layer, config):
    te = 'te1' if config.text_encoder_2 else 'te'
    part = {'unet': 'unet', 'text_encoder': te, 'text_encoder_2': 'te2'}[part]
    return f'lora_{part}_{layer.replace(".", "_")}'


def sgm(part, layer, config):
    """kohya's names for SDXL."""
    if part == 'unet':
        place = names.places(config, spec(config))[part][f'{layer}.weight'].name
        layer = place.removeprefix('model.diffusion_model.').removesuffix('.weight')
    return kohya(part, layer, config)


def peft(part, layer, config):
    return f'{part}.{layer}'


def trained(part, layer, config):
    """diffusers' training scripts'."""
    return f'{part}.{layer}.{"lora" if part == "unet" else "lora_linear_layer"}'


def processors(part, layer, config):
    """diffusers' before 0.21."""
    above, _, last = layer.removesuffix('.0').rpartition('.')
    if part == 'unet':
        return f'{part}.{above}.processor.{last}_lora'
    return f'{part}.{above}.to_{last.removesuffix("_proj")}_lora'


def draw(rng, *shape):
    return (SIZE * rng.standard_normal(shape)).astype(np.float32)


def lora(rng, shape, rank=3):
    """A LoRA, or the LoCon of a convolution."""
    return {'down': draw(rng, rank, *shape[1:]),
            'up': draw(rng, shape[0], rank, *(1 for _ in shape[2:]))}


def file(config, spelling, suffixes, make, chosen, seed=0, alpha=None):
    """{key: array} of an adapter: make(rng, shape) -> {part: array}, suffixes {part: its key}."""
    rng, found = np.random.default_rng(seed), {}
    for part, layer, shape in chosen:
        at = spelling(part, layer, config)
        for name, array in make(rng, shape).items():
            found[at + suffixes.get(name, f'.{name}')] = array
        if alpha is not None:
            found[f'{at}.alpha'] = np.array(alpha, np.float32)
    return found
