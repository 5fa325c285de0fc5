"""Schedules made to measure for a model, a sampler and a number of steps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from jaxsd import sampling
from jaxsd.lab.ode import denoiser, problem
from jaxsd.run.inputs import Inputs
from jaxsd.run.pipeline import memory, once
from jaxsd.run.request import Request
from jaxsd.sampling.choice import call, choose
from jaxsd.sampling.tables import NOISE
from jaxsd.weights import Model

Progress = Callable[[int, float], object]  # the update, its loss


def search(model: Model, requests: Sequence[Request], steps: Sequence[int], method: str = 'gits',
           **options: Any) -> dict[int, np.ndarray]:
    """Find a schedule for each number of steps -> {steps: float64 sigmas [steps + 1]}.

    model: a loaded jaxsd.Model. requests: jaxsd.Request of one size; their prompts, seeds and
    guidance, the same at all levels, are what the schedule is made for. steps: whole numbers.
    method and its options: 'gits' (see gits) or 'learn' (see learned). All schedules begin at the
    model's largest sigma and end in 0.
    Raises ValueError for an unknown method or option and for too many steps.
    """
    return call('method', method, choose('method', method, METHODS), model, requests, steps,
                **options)


def gits(model: Model, requests: Sequence[Request], steps: Sequence[int], levels: int = 60,
         schedule: str = 'karras', teacher: str = 'dpmpp_2m', coeff: float = 1.0,
         spread: float = 0.3) -> dict[int, np.ndarray]:
    """Pick the best of many levels by dynamic programming, for all numbers of steps at once.

    The teacher's fine solution (a sampler of one call a step) over `levels` levels of a schedule
    gives the points x_i; a jump i -> j costs the distance of an Euler step from x_i to x_j. The
    path of the least sum of coeff^k cost_k is taken: Chen et al. 2024, section 4,
    https://arxiv.org/abs/2405.11326. Unlike there, a distance at level sigma counts for what is
    left of it at the end, 1 / sqrt(1 + (sigma / spread)^2): exactly so for data of that standard
    deviation, and close to what is measured on a model; spread=inf counts all levels alike.
    """
    sigmas = sampling.schedule(schedule, levels, model.config.schedule)
    for n in steps:
        if n not in range(1, levels + 1):
            raise ValueError(f'steps={n}: expected a whole number from 1 to levels={levels}')
    data = problem(model, requests)
    rows = sampling.plan(teacher, sigmas)
    if len(rows.sigma) != levels:
        raise ValueError(f'teacher {teacher!r}: expected a sampler of one call a step')
    x, (points, denoised) = _denoise_loop(model.params, data, rows, _start(data, sigmas),
                                  config=model.config, info=_seen)
    points = np.append(points, x[None], axis=0)  # [levels + 1,B,...]
    cost = jumps(points, np.asarray(denoised), sigmas) / np.hypot(1, sigmas / spread)
    paths = shortest(cost, steps, coeff)
    return {n: sigmas[path] for n, path in paths.items()}


def jumps(points: np.ndarray, denoised: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Mean distance of Euler's step i -> j from the point at j -> [levels + 1] x 2; inf upwards."""
    count = len(sigmas)
    cost = np.full((count, count), np.inf)
    for i, j in zip(*np.triu_indices(count, 1)):
        part = sigmas[j] / sigmas[i]
        miss = part * points[i] + (1 - part) * denoised[i] - points[j]
        cost[i, j] = np.linalg.norm(miss.reshape(len(miss), -1), axis=1).mean()
    return cost


def shortest(cost: np.ndarray, steps: Sequence[int], coeff: float = 1.0) -> dict[int, list[int]]:
    """The cheapest paths of n jumps from the first level to the last -> {n: indices [n + 1]}.

    cost: [L,L], of a jump i -> j, inf where there is none. A path costs the sum of coeff^k
    cost_k, k the number of the jump.
    """
    rest, choice = [cost[:, -1]], []  # of the best way from each level to the end; where it goes
    for _ in range(max(steps) - 1):
        total = cost + coeff * rest[-1]
        choice.append(total.argmin(1))
        rest.append(total.min(1))
    paths = {}
    for n in steps:
        path = [0]
        for k in range(n - 2, -1, -1):
            path.append(int(choice[k][path[-1]]))
        paths[n] = [*path, len(cost) - 1]
    return paths


def learned(model: Model, requests: Sequence[Request], steps: Sequence[int],
            sampler: str = 'dpmpp_2m', start: str = 'karras', updates: int = 30, rate: float = 0.15,
            batch: int = 8, reference: int = 100, progress: Progress | None = None,
            **options: Any) -> dict[int, np.ndarray]:
    """Learn schedules for a sampler by gradients through its steps, see `learn`.

    The loss is the root mean square distance, in latents, of its end to what `reference`
    steps of dpmpp_2m make of the same prompt and seed, mean over the images of a batch; batches
    take turns. An update costs about as much as four of its solutions. start: the schedule to begin
    with.
    options: the sampler's.
    """
    config, params = model.config, model.params
    batches = []
    for k in range(0, len(requests), batch):
        data = problem(model, requests[k:k + batch])
        batches.append((data, converged(model, data, reference)))

    found = {}
    for n in steps:
        sigmas = sampling.schedule(start, n, config.schedule)

        def loss(rows, k):
            data, target = batches[k % len(batches)]
            return _slope(params, data, rows, _start(data, sigmas), target, config=config)  # noqa: B023

        found[n] = learn(loss, sampler, sigmas, updates, rate, progress, **options)
    return found


def converged(model: Model, data: Inputs, steps: int) -> Float[Array, 'B h w L']:
    """The ends of many steps of dpmpp_2m over karras' levels, for a `problem` -> [B,h,w,L]."""
    return solve(model, data, 'dpmpp_2m', sampling.schedule('karras', steps, model.config.schedule))


def solve(model: Model, data: Inputs, sampler: str, sigmas: np.ndarray,
          **options: Any) -> Float[Array, 'B h w L']:
    """Walk a `problem` down the sigmas, without fresh noise -> latents [B,h,w,L]."""
    rows = _table(sampler, sigmas, options)
    return _denoise_loop(model.params, data, rows, _start(data, sigmas), config=model.config)


def learn(loss: Callable[[Any, int], tuple[Any, Any]], sampler: str, sigmas: np.ndarray,
          updates: int = 30, rate: float = 0.15, progress: Progress | None = None,
          **options: Any) -> np.ndarray:
    """Gradient descent on the levels of a sampler, its ends kept -> float64 sigmas [steps + 1].

    loss(rows, k) -> (value, its gradient with respect to rows), for update k; rows are padded to
    `sampling.bucket`. sampler: one without noise; options: its own. sigmas: where to begin. Adam
    at `rate`, falling to 0 like a cosine, on the logarithm of the gaps in log sigma, so that the
    levels stay in order; where the last sigma is 0, the one before it is free.
    progress(k, value): called after each update.
    The gradient is the loss's, times the table's by central differences in float64 on the host.
    """
    begin = np.asarray(sigmas, np.float64)
    _table(sampler, begin, options)
    gaps = -np.diff(np.log(begin[begin > 0]))
    total = gaps.sum() if begin[-1] > 0 else None

    def levels(z):
        gaps = np.exp(np.asarray(z, np.float64))
        gaps *= 1 if total is None else total / gaps.sum()
        inner = begin[0] * np.exp(-np.cumsum(gaps))
        return np.concatenate([begin[:1], inner, begin[len(inner) + 1:]])

    z = jnp.log(gaps)
    adam = optax.adam(optax.cosine_decay_schedule(rate, updates))
    state = adam.init(z)
    for k in range(updates):
        value, slope = loss(_table(sampler, levels(z), options), k)
        slope = chain(slope, lambda z: _table(sampler, levels(z), options), z)
        change, state = adam.update(jnp.asarray(slope, z.dtype), state)
        z = optax.apply_updates(z, change)
        if progress is not None:
            progress(k, float(value))
    return levels(z)


def chain(slope: Any, table: Callable[[np.ndarray], Any], z: np.ndarray | Array,
          h: float = 1e-5) -> np.ndarray:
    """d loss / d rows, and rows = table(z) -> d loss / d z [n], float64; error of order h^2."""
    z, found = np.asarray(z, np.float64), []
    for step in h * np.eye(len(z)):
        change = jax.tree.map(lambda up, down: (up - down) / (2 * h), table(z + step),
                              table(z - step))
        found.append(sum(np.vdot(s, c) for s, c in zip(slope, change)))
    return np.array(found)


def _table(sampler, sigmas, options):
    """A padded table, so that all numbers of steps share a program."""
    rows = sampling.plan(sampler, sigmas, **options)
    if rows.mix[..., NOISE].any():
        raise ValueError(f'sampler {sampler!r} with {options}: expected one without fresh noise')
    return sampling.pad(rows, sampling.bucket(len(rows.sigma)))


def _start(data, sigmas):
    return data.noise * np.float32(sigmas[0])


@functools.partial(jax.jit, static_argnames=('config', 'info'))
def _denoise_loop(params, data, rows, x, *, config, info=None):
    return sampling.sample(denoiser(once(params), config, data), x, rows,
                           lambda i: jnp.zeros_like(x), info,
                           memory(x, data.steps.guidance, config))


def _seen(call):
    return call.x, call.denoised


@functools.partial(jax.jit, static_argnames='config')
def _slope(params, data, rows, x, target, *, config):
    """Mean distance to the target, and its gradient with respect to the table."""
    def loss(rows):
        miss = _denoise_loop(params, data, rows, x, config=config) - target
        return jnp.sqrt(jnp.square(miss).mean(range(1, miss.ndim)) + 1e-12).mean()

    rows = jax.tree.map(lambda field: jnp.asarray(field, jnp.float32), rows)
    return jax.value_and_grad(loss)(rows)


METHODS: dict[str, Callable[..., dict[int, np.ndarray]]] = {'gits': gits, 'learn': learned}
