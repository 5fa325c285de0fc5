"""One loop for every stage: optimiser, averaging, data parallelism, checkpoints, curves.

Nothing here compiles: whoever drives it passes a step through `jax.jit` first.
"""

import csv
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxsd.train.losses import Batch, Loss
from jaxsd.typing import Params, Path


@flax.struct.dataclass
class State:
    """Everything that a step changes; `ema` is the running average of `params`."""

    step: jax.Array
    params: dict
    ema: dict
    optimizer: optax.OptState


Step = Callable[[State, Batch, jax.Array], tuple[State, dict[str, jax.Array]]]


def optimizer(c: ConfigDict) -> optax.GradientTransformation:
    """AdamW, global-norm clipping, cosine decay with warm-up.

    c: learning_rate, warmup, steps, weight_decay, clip, b2.
    """
    rate = optax.warmup_cosine_decay_schedule(0, c.learning_rate, c.warmup, c.steps,
                                              0.02 * c.learning_rate)
    return optax.chain(optax.clip_by_global_norm(c.clip),
                       optax.adamw(rate, b2=c.b2, weight_decay=c.weight_decay,
                                   mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p)))


def make_step(loss: Callable[[Params, Batch, jax.Array], Loss], tx: optax.GradientTransformation,
              ema_decay: float, dtype: DTypeLike = jnp.float32) -> Step:
    """step(state, batch, key) -> (state, metrics); loss(params, batch, key) in `dtype`.

    The average warms up, as in timm: decay_t = min(decay, (1 + t) / (10 + t)).
    """
    def step(state, batch, key):
        def cast(params):
            return loss(jax.tree.map(lambda a: a.astype(dtype), params), batch, key)

        (value, metrics), grads = jax.value_and_grad(cast, has_aux=True)(state.params)
        updates, opt = tx.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        metrics = {'loss': value, 'grad_norm': optax.tree.norm(grads), **metrics}
        return State(state.step + 1, params, ema, opt), metrics

    return step


def batches(weights: np.ndarray, size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Endless index arrays [size], shuffled anew each epoch; the same from any `start` step.

    weights int [N]: how often each example comes in an epoch.
    """
    pool = np.repeat(np.arange(len(weights)), weights)
    per_epoch, step = len(pool) // size, start
    if per_epoch == 0:
        raise ValueError(f'batch size {size}: the data set has only {len(pool)} examples an epoch')
    while True:
        epoch = step // per_epoch
        order = np.random.default_rng((seed, epoch)).permutation(pool)
        for i in range(step % per_epoch, per_epoch):
            yield order[i * size:(i + 1) * size]
            step += 1


def save_state(path: pathlib.Path, state: State) -> None:
    """Write a State to one safetensors file, under a temporary name first: a kill leaves the old
    one."""
    arrays = {name: np.asarray(a) for name, a in _named(state)[0].items()}
    part = path.with_suffix('.part')
    save_file(arrays, part)
    with open(part, 'rb') as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def load_state(path: pathlib.Path, state: State) -> State:
    """Read what `save_state` wrote, into the structure of `state`."""
    template, structure = _named(state)
    with safe_open(path, 'numpy') as file:
        shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
        expected = {k: a.shape for k, a in template.items()}
        wrong = sorted(k for k in shapes.keys() | expected.keys()
                       if shapes.get(k) != expected.get(k))
        if wrong:
            raise ValueError(f'{path}: written for another model or optimiser, {len(wrong)} arrays '
                             f'differ, {wrong[0]!r} first; remove it, or train into another folder')
        return jax.tree.unflatten(structure, [file.get_tensor(k) for k in template])


def _named(tree):
    """({name: leaf}, structure), in the tree's own order."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='|'): leaf
            for path, leaf in leaves}, structure


def start(params: Params, tx: optax.GradientTransformation) -> State:
    """The State before the first step. Copies: a step donates its state, buffer by buffer."""
    return State(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params),
                 jax.tree.map(jnp.array, params), tx.init(params))


def fit(step: Step, state: State, data: Mapping[str, np.ndarray], weights: np.ndarray,
        c: ConfigDict, out: Path, preview: Callable[[Params, int], object] | None = None) -> Params:
    """Take steps until c.steps and return the running average of the parameters.

    step(state, batch, key): a compiled `make_step`. data: {name: array}, those with a leading axis
    of len(weights) are indexed by the example, the others passed whole. c: batch_size, steps,
    seed, save_every, log_every. out: folder for state.safetensors, log.csv, curve.png and whatever
    preview(ema, step) writes; what is there already is taken up again. The batch is spread over all
    local devices. Raises FloatingPointError when the loss or the state is not finite; such a
    state is never saved.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    saved = out / 'state.safetensors'
    if saved.exists():
        state = load_state(saved, state)
    first = int(state.step)
    log = _Log(out, first)
    mesh = jax.make_mesh((jax.local_device_count(),), ('data',), axis_types=(AxisType.Auto,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ('data',)))
    if c.batch_size % mesh.size:
        raise ValueError(f'batch_size {c.batch_size}: expected a multiple of the number of '
                         f'devices, {mesh.size}')
    state = jax.device_put(state, whole)
    fixed = {k: jax.device_put(v, whole) for k, v in data.items() if len(v) != len(weights)}
    key, index = jax.random.key(c.seed), batches(weights, c.batch_size, c.seed, first)
    metrics, clock = [], time.monotonic()
    for i in range(first, c.steps):
        rows = next(index)
        batch = {k: jax.device_put(v[rows], split) for k, v in data.items() if k not in fixed}
        state, found = step(state, batch | fixed, jax.random.fold_in(key, i))
        metrics.append(found)
        done = i + 1
        if done % c.log_every == 0 or done == c.steps:
            row = {k: float(np.mean([m[k] for m in metrics])) for k in found}
            _check(np.isfinite(row['loss']), done, saved)
            seconds = (time.monotonic() - clock) / len(metrics)
            log.write({'step': done, **row, 'seconds_per_step': seconds})
            metrics, clock = [], time.monotonic()
        if done % c.save_every == 0 or done == c.steps:
            # A finite loss can have an infinite gradient: what counts is what would be saved.
            _check(all(np.isfinite(a).all() for a in jax.tree.leaves(state)), done, saved)
            save_state(saved, state)
            log.draw()
            if preview is not None:
                preview(jax.device_get(state.ema), done)
            clock = time.monotonic() if not metrics else clock
    return jax.device_get(state.ema)


def _check(finite, step, saved):
    if not finite:
        kept = f'{saved} holds the last good state' if saved.exists() else 'nothing was saved yet'
        raise FloatingPointError(f'the training is not finite after step {step}; {kept}: lower the '
                                 'learning rate and start again, it goes on from there')


class _Log:
    """Metrics as a CSV and a curve, printed too; rows after `first` go when training resumes."""

    def __init__(self, folder, first):
        self.path, self.curve, self.rows = folder / 'log.csv', folder / 'curve.png', []
        if self.path.exists():
            with open(self.path, newline='') as file:
                self.rows = [r for r in csv.DictReader(file) if int(r['step']) <= first]

    def write(self, row):
        print(json.dumps({k: round(v, 5) for k, v in row.items()}), flush=True)
        self.rows.append(row)
        part = self.path.with_suffix('.part')
        with open(part, 'w', newline='') as file:
            writer = csv.DictWriter(file, row.keys())
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, self.path)

    def draw(self):
        if self.rows:
            draw_curve(self.rows, self.curve)


def draw_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the metrics of a log, a list of dicts, against the step, each in its own panel."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    names = [k for k in rows[0] if k not in ('step', 'seconds_per_step')]
    figure, panels = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for panel, name in zip(panels[0], names):
        values = np.array([float(r[name]) for r in rows])
        panel.plot([int(r['step']) for r in rows], values, linewidth=0.8)
        panel.set(title=name, xlabel='step', yscale='log' if (values > 0).all() else 'linear')
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
