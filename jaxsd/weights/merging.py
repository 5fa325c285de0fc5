"""Checkpoints merged into one, tensor by tensor, by the formulas that people merge with."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flax import traverse_util

from jaxsd.models.spec import spec
from jaxsd.sampling.choice import check_number, one_of
from jaxsd.weights import names
from jaxsd.weights.adapters import made_like
from jaxsd.weights.files import LazyArray
from jaxsd.weights.model import Model

Weights = float | Mapping[str, float] | Sequence[float]


def _weighted_sum(w, a, b):
    return (1 - w) * a + w * b


def _slerp(w, a, b):
    sizes = np.linalg.norm(a), np.linalg.norm(b)
    if not all(sizes):
        return _weighted_sum(w, a, b)
    a_unit, b_unit = a / sizes[0], b / sizes[1]
    angle = np.arccos(np.clip((a_unit * b_unit).sum(), -1, 1))
    if np.sin(angle) < 1e-6:  # parallel, or opposite: no way between them is the shortest
        return _weighted_sum(w, a, b)
    turned = (a_unit * np.sin((1 - w) * angle) + b_unit * np.sin(w * angle)) / np.sin(angle)
    return turned * _weighted_sum(w, *sizes)


def _add_difference(w, a, b, c):
    return a + w * (b - c)


def _train_difference(w, a, b, c):
    learnt, apart = b - c, abs(b - a)
    whole = abs(learnt) + apart
    part = np.divide(apart, whole, out=np.zeros_like(whole), where=whole > 0)
    return a + 1.8 * w * part * learnt


# {name: (formula(w, a, b) or (w, a, b, c) in float32, how many models it takes)}
METHODS: dict[str, tuple[Callable[..., np.ndarray], int]] = {
    'weighted_sum': (_weighted_sum, 2), 'slerp': (_slerp, 2),
    'add_difference': (_add_difference, 3), 'train_difference': (_train_difference, 3)}


def merge_models(models: Sequence[Model], method: str = 'weighted_sum', weight: float = 0.5,
                 blocks: Weights | None = None) -> Model:
    """One Model of two or three; the first gives what is not weights.

    method: 'weighted_sum', (1 - w) A + w B; 'slerp', along the sphere, each tensor for itself
    (sd-mecha's slerp); 'add_difference', A + w (B - C) (A1111); 'train_difference', A +
    1.8 w (B - C) |B - A| / (|B - C| + |B - A|) (SuperMerger's trainDifference).
    weight: w. blocks: w of blocks of the U-Net, as SuperMerger and MBW name them: {'BASE': 0,
    'IN00': 0.3, 'M00': 1, 'OUT11': 0.5 ...}, the others keep `weight`; or a list of all of
    `block_names`. BASE is what is not U-Net; the time embedding goes with IN00, the output layers
    with the last OUT.
    In float32, then back to A's dtype. Where A's U-Net sees more channels (inpainting), the others
    change those that they have. Models of lazy arrays (`load(path, lazy=True)`) give lazy ones.
    Raises ValueError for models that are not of one kind, and for blocks that A does not have.
    """
    one_of('method', method, METHODS)
    formula, count = METHODS[method]
    models = list(models)
    if len(models) != count:
        raise ValueError(f'{method}: expected {count} models, found {len(models)}')
    check_number('weight', weight)
    first, *others = models
    weights = _block_weights(first, weight, blocks)
    for letter, other in zip('BC', others):
        _same_kind(first, other, letter)
    places = names.places(first.config, spec(first.config))

    def merged(part, name, *arrays):
        block = _block(places[part][name].name, first) if part == 'unet' else 'BASE'
        w = np.float32(weights[block])

        def compute():
            a, *rest = (np.ascontiguousarray(array, np.float32) for array in arrays)
            seen = a[..., :rest[0].shape[-2], :] if a.shape != rest[0].shape else a  # HWIO
            found = formula(w, seen, *rest)
            if seen is not a:
                found = np.concatenate([found, a[..., seen.shape[-2]:, :]], -2)
            return found.astype(arrays[0].dtype)

        lazy = any(isinstance(array, LazyArray) for array in arrays)
        return made_like(arrays[0], compute, lazy)

    params = {}
    for part in first.params:
        flat = [traverse_util.flatten_dict(model.params[part], sep='.') for model in models]
        params[part] = traverse_util.unflatten_dict(
            {name: merged(part, name, *(f[name] for f in flat)) for name in flat[0]}, sep='.')
    return first.replace(params=params)


def block_names(model: Model) -> list[str]:
    """['BASE', 'IN00', ..., 'M00', 'OUT00', ...] of a model."""
    table = names.places(model.config, spec(model.config))['unet']
    found = {_block(place.name, model) for place in table.values()} | {'BASE'}
    order = ('BASE', 'IN', 'M', 'OUT')
    return sorted(found, key=lambda name: (order.index(name.rstrip('0123456789')), name))


def _block(place, model):
    """The block of a U-Net's tensor by its name in a single file."""
    name = place.removeprefix('model.diffusion_model.')
    if found := re.match(r'(in|out)put_blocks\.(\d+)\.', name):
        return f'{found[1].upper()}{int(found[2]):02}'
    if name.startswith('middle_block'):
        return 'M00'
    if name.startswith('time_embed'):
        return 'IN00'
    config = model.config.unet
    last = len(config.block_out_channels) * (config.layers_per_block + 1) - 1
    return f'OUT{last:02}' if name.startswith('out.') else 'BASE'


def _block_weights(model, weight, blocks):
    """{block: its weight}."""
    known = block_names(model)
    if blocks is None:
        blocks = {}
    if not isinstance(blocks, Mapping):
        if len(blocks) != len(known):
            raise ValueError(f'blocks: expected {len(known)} weights, of {", ".join(known)}; found '
                             f'{len(blocks)}')
        blocks = dict(zip(known, blocks))
    blocks = {str(name).upper(): value for name, value in blocks.items()}
    for name, value in blocks.items():
        one_of('block', name, known)
        check_number(f'weight of block {name}', value)
    return dict.fromkeys(known, weight) | blocks


def _same_kind(first, other, letter):
    """ValueError where the other model's tensors are not those of the first."""
    ours, theirs = spec(first.config), spec(other.config)
    wider = first.config.unet.in_channels > other.config.unet.in_channels == 4
    wrong = [part for part in ours.keys() | theirs.keys() if ours.get(part) != theirs.get(part)
             and not (part == 'unet' and wider and _but_input(ours) == _but_input(theirs))]
    if wrong:
        raise ValueError(f'model {letter} is {other.config.version}, A is {first.config.version}, '
                         f'and their {", ".join(sorted(wrong))} differ; expected models of one '
                         'kind')
    predict = [model.config.schedule.prediction_type for model in (first, other)]
    if predict[0] != predict[1]:
        raise ValueError(f'model {letter} predicts {predict[1]}, A predicts {predict[0]}; a '
                         'mixture of them predicts neither')


def _but_input(table):
    return {name: shape for name, shape in table['unet'].items() if name != 'conv_in.weight'}
