"""One loop for all training: optimiser, averaging, meshes, checkpoints, log.

Nothing here knows what is trained: `fit` takes a loss, arrays to change and arrays that stay.
"""

import contextlib
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsd.run import sharded
from jaxsd.train.config import TrainConfig
from jaxsd.train.log import Log, Meter
from jaxsd.train.losses import Batch, Loss
from jaxsd.train.optimizers import evaluated, global_norm
from jaxsd.typing import Params, Path

Apply = Callable[[Params, Params, Batch, Array], Loss]  # (trainable, frozen, batch, key)
Batches = Callable[[int], Any]  # from a step on: an iterator of this host's rows, with close()
Step = Callable[['State', Params, Batch, Array], tuple['State', dict[str, Array]]]

@flax.struct.dataclass
class State:
    """Everything that a step changes; `ema` is the running average of `params`, or empty."""

    step: Array
    params: dict
    ema: dict
    optimizer: optax.OptState


class Preempted(SystemExit):
    """SIGTERM ended the training, which has saved where it stands."""


def make_step(loss: Apply, tx: optax.GradientTransformation, c: TrainConfig) -> Step:
    """step(state, frozen, batch, key) -> (state, metrics), pure.

    loss(trainable, frozen, batch, key), called with trainable arrays of c.dtype. Metrics are means
    over the c.accumulate parts of the batch, whose keys differ.
    """
    def cast(params, frozen, batch, key):
        return loss(jax.tree.map(lambda a: a.astype(c.dtype), params), frozen, batch, key)

    gradient = jax.value_and_grad(cast, has_aux=True)

    def accumulated(params, frozen, batch, key):
        if c.accumulate == 1:
            return gradient(params, frozen, batch, key)
        parts = jax.tree.map(lambda a: a.reshape(c.accumulate, -1, *a.shape[1:]), batch)

        def add(total, part):
            batch, i = part
            found = gradient(params, frozen, batch, jax.random.fold_in(key, i))
            return jax.tree.map(lambda t, f: t + f / c.accumulate, total, found), None

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(
            gradient, params, frozen, jax.tree.map(lambda a: a[0], parts), key))
        return jax.lax.scan(add, zeros, (parts, jnp.arange(c.accumulate)))[0]

    def step(state, frozen, batch, key):
        (value, metrics), grads = accumulated(state.params, frozen, batch, key)
        updates, opt = tx.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(c.ema, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema,
                           params if c.ema else {})
        metrics = {'loss': value, 'grad_norm': global_norm(grads), **metrics}
        return State(state.step + 1, params, ema, opt), metrics

    return step


def start(params: Params, tx: optax.GradientTransformation, c: TrainConfig) -> State:
    """The State before the first step. Copies: a step donates its state, buffer by buffer."""
    ema = jax.tree.map(jnp.array, params) if c.ema else {}
    return State(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params), ema, tx.init(params))


def result(state: State) -> Params:
    """What was trained: the running average where there is one."""
    return state.ema or evaluated(state.optimizer, state.params)


def make_mesh(c: TrainConfig) -> Mesh:
    """All devices as a mesh of the axes data and fsdp; ValueError where they do not divide."""
    count = jax.device_count()
    if count % c.fsdp or c.batch_size // c.accumulate % count:
        raise ValueError(f'fsdp={c.fsdp}, batch_size={c.batch_size}, accumulate={c.accumulate}: '
                         f'expected fsdp to divide the {count} devices, and these the parts of a '
                         'batch')
    return jax.make_mesh((count // c.fsdp, c.fsdp), ('data', 'fsdp'),
                         axis_types=(AxisType.Auto,) * 2)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where the arrays of a tree lie: matrices are spread over the fsdp axis, vectors on all."""
    def place(a):
        axis = sharded.axis(a.shape, mesh.shape['fsdp']) if mesh.shape['fsdp'] > 1 else None
        return NamedSharding(mesh, PartitionSpec(
            *() if axis is None else (None,) * axis + ('fsdp',)))

    return jax.tree.map(place, tree)


def fit(loss: Apply, trainable: Params, frozen: Params, batches: Batches,
        tx: optax.GradientTransformation, c: TrainConfig, out: Path,
        sample: Callable[[Params, int], Array | np.ndarray] | None = None,
        heldout: Sequence[Mapping[str, Any]] = (), data: str = '',
        about: str = '') -> Params:
    """Take steps until c.steps -> what was trained, see `result`.

    batches(step): an iterator over this host's part of each batch from this step on. out: folder
    for checkpoints/, log.csv, TensorBoard's events and samples/; a training that is there already
    goes on where it was, on any number of devices, if its `data`, a fingerprint, is the same.
    sample(params, step): a grid uint8 [H,W,3] that is kept there; heldout: this host's part of
    batches that are not trained on, whose loss at fixed timesteps is logged; both each
    c.sample_every steps. about: text for the run's page. After SIGTERM the state is saved and
    Preempted raised. Raises FloatingPointError when the loss or the state is not finite; such a
    state is never saved.
    """
    out = pathlib.Path(out)
    mesh = make_mesh(c)
    state = jax.eval_shape(lambda: start(trainable, tx, c))
    places = shardings(state, mesh)
    checkpoints = Checkpoints(out / 'checkpoints', c, jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, places), data)
    state = checkpoints.restore() or jax.device_put(start(trainable, tx, c), places)
    frozen = jax.device_put(frozen, shardings(frozen, mesh))
    programs = Programs(jax.jit(make_step(loss, tx, c), donate_argnums=0,
                                out_shardings=(places, None)))
    rows, evaluate = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))), make_evaluate(loss, c)
    key, first = jax.random.key(c.seed), int(state.step)
    log, meter = Log(out, first, c.steps, about), Meter(c)
    # Closed at the end: a loader has threads.
    with checkpoints, log, contextlib.closing(batches(first)) as examples, Ending() as ending:
        for i in range(first, c.steps):
            with meter.waiting():
                batch = placed(next(examples), rows)
            arguments = state, frozen, batch, jax.random.fold_in(key, i)
            with meter.paused():
                program = programs.of(*arguments)
            state, metrics = program(*arguments)
            meter.add(metrics)
            done, last = i + 1, i + 1 == c.steps
            ends = ending.after(done)
            if done % c.log_every == 0 or last:
                row = meter.row(programs.flops)
                _check(np.isfinite(row['loss']), done, checkpoints)
                log.write(done, row)
            if done % c.save_every == 0 or last or ends:
                # A finite loss can have an infinite gradient: what counts is what would be saved.
                _check(_finite(state), done, checkpoints)
                with meter.paused():
                    checkpoints.save(done, state)
            if ends and not last:
                checkpoints.wait()
                raise Preempted(f'ended by SIGTERM after step {done}, which is saved in '
                                f'{checkpoints.folder}; start again to go on')
            if c.sample_every and (done % c.sample_every == 0 or last):
                with meter.paused():
                    if heldout:
                        log.write(done, {'heldout': float(np.mean([
                            evaluate(result(state), frozen, placed(batch, rows), i)
                            for batch in heldout for i in range(TIMES)]))})
                    if sample is not None:
                        params = whole(result(state))
                        if jax.process_index() == 0:
                            log.image(done, sample(params, done))
            if done % c.save_every == 0 or last:
                with meter.paused():
                    log.draw()
            log.advance()
    return whole(result(state))


TIMES = 8  # fixed timesteps of the held-out loss, spread evenly


def make_evaluate(loss: Apply, c: TrainConfig) -> Callable[..., Array]:
    """evaluate(params, frozen, batch, i) -> the loss at timestep (i + 1/2) / TIMES of 1000, with
    the same noise each time."""
    @jax.jit
    def evaluate(params, frozen, batch, i):
        B = len(jax.tree.leaves(batch)[0])
        batch = batch | {'timesteps': jnp.full(B, 1000 * (2 * i + 1) // (2 * TIMES))}
        params = jax.tree.map(lambda a: a.astype(c.dtype), params)
        return loss(params, frozen, batch, jax.random.key(i))[0]

    return evaluate


def placed(batch: Mapping[str, Any], rows: NamedSharding) -> dict[str, Any]:
    """This host's part of a batch on its devices, as part of the whole."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(rows, np.asarray(a)),
                        dict(batch))


def whole(tree: Any) -> Any:
    """Arrays of a mesh as numpy's, on every host."""
    def one(a):
        if a.is_fully_addressable:
            return np.asarray(a)
        everywhere = NamedSharding(a.sharding.mesh, PartitionSpec())
        return np.asarray(jax.jit(lambda a: a, out_shardings=everywhere)(a))

    return jax.tree.map(one, tree)


@jax.jit
def _finite(tree):
    return jnp.all(jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]))


def _check(finite, step, checkpoints):
    if not finite:
        kept = checkpoints.latest()
        kept = (f'{checkpoints.folder} holds the last good state, step {kept}' if kept
                else 'nothing was saved yet')
        raise FloatingPointError(f'the training is not finite after step {step}; {kept}: lower the '
                                 'learning rate and start again, it goes on from there')


class Checkpoints:
    """States in a folder, by orbax: written beside the training, whole or not at all."""

    def __init__(self, folder: pathlib.Path, c: TrainConfig, state: State, data: str = ''):
        """state: of jax.ShapeDtypeStructs with the shardings to restore to; data: a fingerprint of
        what is trained on."""
        import orbax.checkpoint as ocp  # slow to import
        self.ocp, self.folder, self.expected = ocp, folder.absolute(), state
        self.manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=c.keep))
        self.kind: dict[str, Any] = {'data': data, 'shapes': {
            jax.tree_util.keystr(path, simple=True, separator='/'): list(a.shape)
            for path, a in jax.tree_util.tree_flatten_with_path(state)[0]}}

    def latest(self) -> int | None:
        """The step of the newest one."""
        return self.manager.latest_step()

    def restore(self) -> State | None:
        """The newest State; None if there is none.

        Raises ValueError for one of another model or optimiser, or of other data.
        """
        step, args = self.latest(), self.ocp.args
        if step is None:
            return None
        kind = self.manager.restore(step, args=args.Composite(kind=args.JsonRestore()))['kind']
        known, ours = kind['shapes'], self.kind['shapes']
        wrong = sorted(k for k in known.keys() | ours.keys() if known.get(k) != ours.get(k))
        remedy = 'remove it, or train into another folder'
        if wrong:
            raise ValueError(f'{self.folder}: written for another model or optimiser, {len(wrong)} '
                             f'arrays differ, {wrong[0]!r} first; {remedy}')
        if kind['data'] != self.kind['data']:
            raise ValueError(f'{self.folder}: a training on other pictures or in other batches; '
                             f'{remedy}')
        return self.manager.restore(step, args=args.Composite(
            state=args.StandardRestore(self.expected)))['state']

    def save(self, step: int, state: State) -> None:
        """Begin to write a State."""
        args = self.ocp.args
        if self.latest() != step:
            self.manager.save(step, args=args.Composite(
                state=args.StandardSave(state), kind=args.JsonSave(self.kind)))

    def wait(self) -> None:
        """Until what was begun is written."""
        self.manager.wait_until_finished()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.manager.close()


class Ending:
    """Context in which SIGTERM is noted, not obeyed; of several processes all end after the same
    step, which JAX agrees on."""

    def __init__(self):
        self.signalled = False
        self.alone = jax.process_count() == 1
        self.main = threading.current_thread() is threading.main_thread()

    def __enter__(self):
        if self.alone and self.main:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number, frame):
        self.signalled = True

    def after(self, step: int) -> bool:
        """Whether this step is the last one."""
        return self.signalled if self.alone else bool(
            multihost_utils.reached_preemption_sync_point(step))

    def __exit__(self, *error):
        if self.alone and self.main:
            signal.signal(signal.SIGTERM, self.before)


class Programs:
    """The step, compiled for each shape of batch; says when."""

    def __init__(self, step: Any):
        self.step, self.known, self.flops = step, {}, 0.0

    def of(self, *arguments: Any) -> Callable[..., Any]:
        """The program for these arguments."""
        shapes = tuple(a.shape for a in jax.tree.leaves(arguments[2]))
        if shapes not in self.known:
            clock = time.monotonic()
            tqdm.tqdm.write(f'compiling the step for batches of {_described(arguments[2])} ...')
            program = self.known[shapes] = self.step.lower(*arguments).compile()
            tqdm.tqdm.write(f'compiled in {time.monotonic() - clock:.1f} s')
            cost = program.cost_analysis() or {}
            self.flops = float(cost.get('flops', 0))  # of one device
        return self.known[shapes]


def _described(batch):
    return ', '.join(f'{name} {"x".join(map(str, a.shape))}' for name, a in batch.items()
                     if hasattr(a, 'shape'))


def arrays(data: Mapping[str, Any], repeats: np.ndarray, batch_size: int, seed: int) -> Batches:
    """Endless batches of arrays in memory, shuffled anew each epoch, for `fit`.

    data: arrays of leading axis N, in nested dicts; repeats int [N]: how often each comes in an
    epoch. Raises ValueError where an epoch has less than a batch.
    """
    pool = np.repeat(np.arange(len(repeats)), repeats)
    per_epoch = len(pool) // batch_size
    if not per_epoch:
        raise ValueError(f'batch_size={batch_size}: the data set has only {len(pool)} examples an '
                         'epoch')

    def batches(step):
        while True:
            epoch = step // per_epoch
            order = np.random.default_rng((seed, epoch)).permutation(pool)
            for i in range(step % per_epoch, per_epoch):
                rows = order[i * batch_size:(i + 1) * batch_size]
                yield jax.tree.map(lambda a, rows=rows: a[rows], data)
            step += per_epoch - step % per_epoch

    return batches
