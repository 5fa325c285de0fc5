"""Names in the files of adapters (LoRA and its kin): which layer a key means, and which part of it.

One table per network, {name with underscores for dots: layer}, holds a layer's name in diffusers
folders of all ages and in single files; a key is brought to the same form and looked up.
"""

import functools
import re

from jaxsd.config import TEXT_ENCODERS, ModelConfig
from jaxsd.models.spec import spec
from jaxsd.weights import names

# What a key says after its layer: diffusers' spellings, PEFT's (with the adapter's name inside when
# a model in memory was dumped), kohya's and LyCORIS'.
_KEY = re.compile(
    r'(?P<layer>.+?)(?:'
    r'(?:[._]lora|\.lora_linear_layer)[._](?P<side>down|up|mid|A|B)(?:\.\w+)?(?:\.weight)?'
    r'|\.lora_(?P<norm>magnitude_vector)(?:\.\w+)*'
    r'|(?:[._]lora|\.lora_linear_layer)?\.(?P<alpha>alpha)'
    r'|\.(?P<glora>[ab][12])\.weight'
    r'|\.(?P<part>scalar|dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)'
    r'|diff|diff_b|set_weight|w_norm|b_norm|on_input|weight|oft_blocks|rescale))')
_PARTS = {'A': 'down', 'B': 'up', 'magnitude_vector': 'magnitude', 'w_norm': 'diff',
          'b_norm': 'diff_b'}

_COMPONENTS = (  # prefixes in the tables' form, the first that fits
    (r'(lora_unet|unet|(model_)?diffusion_model)_', ('unet',)),
    (r'(lora_te2|text_encoder_2|text_encoders_clip_g_transformer)_', ('text_encoder_2',)),
    (r'lora_te1_', ('text_encoder',)),
    (r'(lora_te|text_encoder|text_encoders_clip_[lhg]_transformer)_', TEXT_ENCODERS),
    (r'', ('unet', *TEXT_ENCODERS)),
)


def split(key: str) -> tuple[str, str] | None:
    """A key -> (layer as the file writes it, part: 'down', 'hada_t1' ... or '' where it is none),
    or None for what is to be passed over."""
    if '.base_layer.' in key:  # the model's own weight, in a dump of a model with adapters
        return None
    found = _KEY.fullmatch(key)
    if not found:
        return key, ''
    part = next(value for name, value in found.groupdict().items() if name != 'layer' and value)
    return found['layer'], _PARTS.get(part, part)


def find(layer: str, config: ModelConfig) -> tuple[str, str] | None:
    """A layer as a file writes it -> (component, its name in the diffusers folder), or None."""
    name = re.sub(r'^(base_model_model_|lycoris_)+', '', layer.replace('.', '_'))
    name = name.replace('_processor_', '_')
    prefix, parts = next((found[0], parts) for pattern, parts in _COMPONENTS
                         if (found := re.match(pattern, name)))
    for part in parts:
        if getattr(config, part):
            known = _layers(config)[part].get(name.removeprefix(prefix))
            if known or prefix:
                return known and (part, known)
    return None


@functools.lru_cache(16)
def _layers(config):
    """{component: {spelling: layer}} of the U-Net and the text encoders."""
    shapes = spec(config)
    prefixes, places = names.prefixes(config), names.places(config, shapes)
    found = {}
    for part in ('unet', *TEXT_ENCODERS):
        table = found[part] = {}
        for name, place in places.get(part, {}).items():
            if name.endswith('embedding.weight'):
                continue  # a table, no layer
            layer = name.rpartition('.')[0]
            spellings = _spellings(layer)
            if not place.how:  # fused and transposed ones are no layers of their own
                single = place.name.removeprefix(prefixes[part])
                spellings.append(single.rpartition('.')[0])
            table.update({s.replace('.', '_'): layer for s in spellings})
    return found


def _spellings(layer):
    """A layer's name in diffusers folders, and as older or newer versions write it."""
    old = layer.removesuffix('.0') if layer.endswith('to_out.0') else layer
    for new, before in (('q_proj', 'to_q'), ('k_proj', 'to_k'), ('v_proj', 'to_v'),
                        ('out_proj', 'to_out')):  # text encoders, before diffusers 0.17
        old = re.sub(rf'self_attn\.{new}$', f'self_attn.{before}', old)
    return [s.removeprefix(start) for s in (layer, old) for start in ('', 'text_model.')]
