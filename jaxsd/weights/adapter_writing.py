"""Write an adapter that was trained: in kohya's names, or in those of PEFT and diffusers.

Entries of the header are those of https://github.com/kohya-ss/sd-scripts (train_network.py) and
https://github.com/Stability-AI/ModelSpec; PEFT's settings stand where diffusers keeps them.
"""

import collections
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxsd.models.spec import spec
from jaxsd.typing import Path
from jaxsd.weights import names
from jaxsd.weights.adapters import Adapter
from jaxsd.weights.files import as_dtype
from jaxsd.weights.writing import finite, write_new

# What a layout writes after a layer's name, by the part; others stand there as they are. PEFT
# leaves out the .weight of a DoRA's norms; transformers 5 then passes over those of text encoders.
LAYOUTS = {
    'kohya': {'down': 'lora_down.weight', 'up': 'lora_up.weight', 'magnitude': 'dora_scale'},
    'diffusers': {'down': 'lora_A.weight', 'up': 'lora_B.weight',
                  'magnitude': 'lora_magnitude_vector.weight'},
}
ALGORITHMS = {'hada_w1_a': 'loha', 'lokr_w1': 'lokr', 'magnitude': 'locon', 'down': 'lora'}


def save_adapter(adapter: Adapter, path: Path, layout: str = 'kohya',
                 dtype: DTypeLike | None = None, metadata: Mapping[str, Any] | None = None,
                 overwrite: bool = False) -> None:
    """Write an adapter that was trained, one with `parts`, as one .safetensors file.

    layout: 'kohya', which A1111, ComfyUI and diffusers read (but diffusers no DoRA, LoHa or LoKr);
        'diffusers', PEFT's names and settings, of a LoRA or DoRA. `load_adapter` reads both.
    dtype: of the tensors; None: float32.
    metadata: further entries of the header, before ours of the same name: {entry: text, or what is
        to be written as JSON}, {'ss_tag_frequency': {'10_cat': {'cat': 12}}} say.
    overwrite: replace a file that exists.
    Raises ValueError for an adapter that was read from a file, a layout that cannot hold it, a
    dtype that cannot, and a path that exists.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout {layout!r}: expected one of {", ".join(LAYOUTS)}')
    if not adapter.parts or adapter.config is None:
        raise ValueError('this adapter has no parts: expected one that was trained; one that was '
                         'read is in its file')
    config, dtype = adapter.config, np.dtype(as_dtype(dtype) or np.float32)
    path = pathlib.Path(path).expanduser()
    algorithm = _algorithm(adapter.parts)
    if layout == 'diffusers' and algorithm in ('loha', 'lokr'):
        raise ValueError(f"layout 'diffusers': diffusers reads no {algorithm} in it; "
                         "layout='kohya' is the one")
    shapes = spec(config)
    spellings = _spellings(config) if layout == 'kohya' else {}
    tensors = {}
    for component, layers in adapter.parts.items():
        for layer, parts in layers.items():
            shape = shapes[component][f'{layer}.weight']
            at = spellings.get((component, layer)) or f'{component}.{layer}'
            for part, array in parts.items():
                if part == 'magnitude':
                    array = _magnitude(np.asarray(array), shape, layout)
                elif part == 'alpha' and layout == 'diffusers':
                    continue
                tensors[f'{at}.{LAYOUTS[layout].get(part, part)}'] = finite(at, array, dtype)
    entries = (_kohya(adapter.parts, config, algorithm, path.stem) if layout == 'kohya' else
               {'lora_adapter_metadata': json.dumps(_peft(adapter.parts, algorithm))})
    if layout == 'kohya':
        entries['sshs_model_hash'] = _hash(tensors)
    given = {name: value if isinstance(value, str) else json.dumps(value)
             for name, value in (metadata or {}).items()}
    write_new(path, tensors, entries | given, overwrite)


def _algorithm(parts):
    """Which of ALGORITHMS an adapter's parts are of; 'locon' is LyCORIS' name of a DoRA's LoRA."""
    found = next(iter(next(iter(parts.values())).values()))
    return next(name for part, name in ALGORITHMS.items() if part in found)


def _magnitude(array, shape, layout):
    """A DoRA's norms [O] in the shape that a layout has for a layer's weight of `shape`."""
    ones = (1,) * (len(shape) - 2)
    if layout == 'kohya':
        return array.reshape(-1, 1, *ones)
    return array.reshape(1, -1, *ones) if ones else array


def _spellings(config):
    """{(component, layer): its name in kohya's files}. SDXL's U-Net has the single file's names."""
    shapes = spec(config)
    places = names.places(config, shapes)['unet'] if config.unet.added_dim else {}
    prefix, found = names.prefixes(config)['unet'], {}
    te = 'te1' if config.text_encoder_2 else 'te'
    starts = {'unet': 'lora_unet', 'text_encoder': f'lora_{te}', 'text_encoder_2': 'lora_te2'}
    for component, start in starts.items():
        for name in shapes.get(component, ()):
            place = name
            if component == 'unet' and places:
                place = places[name].name.removeprefix(prefix)
            layer, place = (n.removesuffix('.weight') for n in (name, place))
            found[component, layer] = f'{start}_{place.replace(".", "_")}'
    return found


def _ranks(parts):
    """{component: {layer: (rank, alpha)}}; of matrices that are whole the rank is their alpha."""
    def rank(p):
        for part, axis in (('down', 0), ('hada_w1_b', 0), ('lokr_w2_a', 1)):
            if part in p:
                return p[part].shape[axis]
        return _number(p['alpha'])

    return {component: {layer: (rank(p), _number(p['alpha'])) for layer, p in layers.items()}
            for component, layers in parts.items()}


def _number(value):
    """An int where it is one."""
    return int(value) if float(value).is_integer() else float(value)


def _common(pairs):
    return collections.Counter(pairs).most_common(1)[0][0]


def _kohya(parts, config, algorithm, title):
    """Entries of the header that A1111 and ComfyUI show and go by."""
    shapes, linear, conv = spec(config), [], []
    for component, layers in _ranks(parts).items():
        for layer, pair in layers.items():
            wide = shapes[component][f'{layer}.weight'][2:] not in ((), (1, 1))
            (conv if wide else linear).append(pair)
    rank, alpha = _common(linear or conv)
    arguments = {} if algorithm == 'lora' else {'algo': algorithm}
    if algorithm == 'locon':
        arguments['dora_wd'] = 'True'
    if conv:
        arguments |= dict(zip(('conv_dim', 'conv_alpha'), map(str, _common(conv))))
    xl, v = config.unet.added_dim > 0, config.schedule.prediction_type == 'v_prediction'
    v2 = not xl and bool(config.text_encoder) and names.is_openclip(config.text_encoder)
    base = 'sdxl_base_v1-0' if xl else f'sd_v{1 + v2}{"_v" * v}'
    kind = 'xl-v1-base' if xl else ('v2-768-v' if v else 'v2-512') if v2 else 'v1'
    size = config.unet.sample_size * config.vae.factor
    predicts = config.schedule.prediction_type.replace('v_prediction', 'v')
    return {
        'ss_network_module': 'networks.lora' if algorithm == 'lora' else 'lycoris.kohya',
        'ss_network_dim': str(rank), 'ss_network_alpha': str(alpha),
        'ss_network_args': json.dumps(arguments), 'ss_base_model_version': base,
        'ss_v2': str(v2), 'ss_output_name': title,
        'modelspec.sai_model_spec': '1.0.0', 'modelspec.title': title,
        'modelspec.architecture': f'stable-diffusion-{kind}/lora',
        'modelspec.implementation': 'https://github.com/Stability-AI/generative-models' if xl
        else 'diffusers',
        'modelspec.resolution': f'{size}x{size}', 'modelspec.prediction_type': predicts}


def _hash(tensors):
    """sd-scripts' hash of a file: SHA-256 of its data, which lie in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()


def _peft(parts, algorithm):
    """PEFT's LoraConfig of each network, in one dict as diffusers has it. Names of text encoders'
    layers stand without their first part, which not every version of transformers has."""
    found = {}
    for component, layers in _ranks(parts).items():
        layers = {layer.removeprefix('text_model.'): pair for layer, pair in layers.items()}
        rank, alpha = (_common(pair[i] for pair in layers.values()) for i in (0, 1))
        found |= {f'{component}.{key}': value for key, value in {
            'r': rank, 'lora_alpha': alpha, 'use_dora': algorithm == 'locon',
            'target_modules': list(layers),
            'rank_pattern': {layer: r for layer, (r, _) in layers.items() if r != rank},
            'alpha_pattern': {layer: a for layer, (_, a) in layers.items() if a != alpha},
        }.items()}
    return found
