"""Samplers against converged references: many pictures as one packed run, and what they show.

An error is the root mean square of final latent less reference, the same seed, prompt and guidance
(`target` says which reference). Latents have about unit scale; no decoder blurs what is measured.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from jaxsd import sampling
from jaxsd.run import Request, decode, inputs, latents, lengthened, networks, resolve
from jaxsd.sampling.tables import UNCOND
from jaxsd.weights import Model

REFERENCE = {'sampler': 'dpmpp_2m', 'sampler_options': {}, 'eta': None}  # of the ODE
GRID = {'schedule': 'karras', 'schedule_options': {}}  # on which every reference is computed


Choice = tuple[str, Mapping[str, Any]]  # a sampler or a schedule, and its options


class Line(NamedTuple):
    """One sampler on one schedule with one guidance, over its numbers of steps (tuples)."""

    sampler: str
    schedule: str
    guidance: float
    steps: tuple
    calls: tuple
    errors: tuple  # geometric mean over prompts and seeds; nan: nothing to converge to
    seconds: tuple  # per picture, mean
    top1: tuple  # part of the pictures whose nearest emoji is the right one; nan: not measured
    order: float  # see `order`
    needed: float  # fewest calls from which on the error stays within the tolerance; inf: more


@dataclasses.dataclass(frozen=True)
class Shot:
    """One picture of a sweep."""

    index: int  # of its request
    calls: int
    seconds: float  # its share of its microbatch's time, in proportion to model calls
    error: float  # nan where there is nothing to converge to
    latent: np.ndarray  # [h,w,L]
    target: np.ndarray | None  # [h,w,L] the reference


def expand(samplers: Sequence[Choice], schedules: Sequence[Choice], steps: Sequence[int],
           guidances: Sequence[float], prompts: Sequence[str], seeds: Sequence[int],
           **fields: Any) -> list[Request]:
    """A Request for every combination; samplers and schedules are pairs (name, options)."""
    return [
        Request(sampler=sampler, sampler_options=dict(sampler_options), schedule=schedule,
                schedule_options=dict(schedule_options), steps=count, guidance=guidance,
                prompt=prompt, seed=seed, **fields)
        for guidance, prompt, seed, (schedule, schedule_options), (sampler, sampler_options), count
        in itertools.product(guidances, prompts, seeds, schedules, samplers, steps)]


def label(name: Any, options: Mapping[str, Any]) -> str:
    """('unipc', {'order': 3}) -> 'unipc(order=3)', the way it is written on the command line."""
    text = ', '.join(f'{key}={value}' for key, value in options.items())
    return f'{name}({text})' if text else name


def kind(rows: Any) -> str:
    """What the pictures of a table converge to with ever more steps.

    'ode': the probability-flow ODE's. 'own': an SDE's along the image's Brownian path. 'none':
    nothing, because noise is drawn independently, or because CFG++ (the unguided output) adds the
    whole of the guidance in every step, so that more steps guide more.
    """
    noisy = rows.noisy
    free = rows.path[..., 0] == rows.path[..., 1]
    if (noisy & free).any() or isinstance(rows, sampling.Row) and rows.mix[..., UNCOND].any():
        return 'none'
    return 'own' if noisy.any() else 'ode'


def target(request: Request, kind: str, steps: int) -> Request | None:
    """The request whose picture this one should approach, or None.

    The same sampler for kind 'own', DPM++ 2M for 'ode'; both with so many steps of karras over the
    model's whole range of noise.
    """
    if kind == 'none':
        return None
    return request.replace(steps=steps, **GRID, **(REFERENCE if kind == 'ode' else {}))


def sweep(model: Model, requests: Sequence[Request], batch_size: int = 16,
          reference_steps: int = 1000,
          on_step: Callable[[int, int], object] | None = None) -> Iterator[list[Shot]]:
    """Draw requests and their references as one packed run; yields lists of Shot, in any order.

    Requests are sorted by model calls and cut into microbatches of batch_size, the last one padded,
    in which samplers, schedules, steps and guidance mix: one compilation per step bucket. Nothing
    of a microbatch is kept but the references. All requests have one size; a single device is used.
    on_step(done, total): called as microbatches finish, with their model calls.
    """
    requests = resolve(requests, model.config)
    seen = {}

    def look(request):  # (calls, 0 if free; kind; whom it shares a batch with), once
        key = _key(request.replace(prompt='', negative_prompt='', seed=0, guidance=1.0))
        if key not in seen:
            rows = inputs(model, [request]).rows
            calls = 0 if sampling.free(rows) else int(sampling.calls(rows)[0])
            seen[key] = calls, kind(rows), jax.tree.structure(rows)
        return seen[key]

    goals = [target(r, look(r)[1], reference_steps) for r in requests]
    references = [*{_key(goal): goal for goal in goals if goal is not None}.values()]
    first, then = _pack(references, look, batch_size), _pack(requests, look, batch_size)
    total = (sum(look(references[part[0]])[0] for part in first)
             + sum(look(requests[part[0]])[0] for part in then))
    run = _runner(model, batch_size, total, on_step)
    ends = {}
    for part in first:
        part = [references[i] for i in part]
        ends.update(zip(map(_key, part), run(part)[0]))
    for part in then:
        yield [_shot(i, latent, calls, seconds, ends.get(_key(goals[i])))
               for i, latent, calls, seconds in zip(part, *run([requests[i] for i in part]))]


def _shot(index, latent, calls, seconds, target):
    error = np.nan if target is None else rms(latent - target)
    return Shot(index, int(calls), float(seconds), error, latent, target)


def _key(request):
    """Requests hold dicts, so they cannot be keys themselves."""
    return repr(request)


def _pack(requests, look, size):
    """Requests -> microbatches of their indices, with like numbers of model calls, longest first;
    samplers with steps of their own on their own."""
    groups = {}
    for i in sorted(range(len(requests)),
                    key=lambda i: (-look(requests[i])[0], requests[i].sampler)):
        groups.setdefault(look(requests[i])[2], []).append(i)
    return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]


def _runner(model, batch_size, total, on_step):
    """A function from a microbatch to latents [n,h,w,L], calls [n] and seconds [n]."""
    done, programs = 0, {}
    worker = concurrent.futures.ThreadPoolExecutor(1)

    def run(part):
        nonlocal done
        data = lengthened(inputs(model, part + part[-1:] * (batch_size - len(part))))
        params, config = networks(model, data)
        key = config, jax.tree.structure(data), *(a.shape for a in jax.tree.leaves(data))
        if key not in programs:  # compiled beforehand, so that no picture's time includes it
            programs[key] = jax.jit(functools.partial(
                _latents, config=config, height=part[0].height, width=part[0].width)).lower(
                    params, data).compile()
        start = time.perf_counter()
        # Not in this thread, because nobody hears a Ctrl-C inside of XLA.
        ends, calls = worker.submit(
            lambda: [np.asarray(a) for a in programs[key](params, data)]).result()
        took = time.perf_counter() - start
        if on_step is not None:
            done += 0 if sampling.free(data.rows) else int(calls.max())
            on_step(done, total)
        return [a[:len(part)] for a in (ends, calls, took * calls / calls.sum())]

    return run


def _latents(params, data, *, config, height, width):
    """-> latents [B,h,w,L], model calls [B]."""
    ends, called = latents(params, data, config, height, width, info=lambda call: call.sigma > 0)
    return ends, called.sum(0)


def rms(x: np.ndarray) -> float:
    """Root mean square of an array."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def painter(model: Model,
            batch_size: int) -> Callable[[Sequence[np.ndarray]], UInt8[np.ndarray, 'N H W 3']]:
    """A function from latents [N,h,w,L] to pictures uint8 [N,H,W,3], batch_size at a time."""
    program = jax.jit(lambda params, latent: decode(params, model.config, latent)[0])

    def pictures(ends):
        done = []
        for start in range(0, len(ends), batch_size):
            part = np.stack(ends[start:start + batch_size])
            extra = batch_size - len(part)
            padded = np.pad(part, [(0, extra)] + [(0, 0)] * (part.ndim - 1), mode='edge')
            done.append(np.asarray(program(model.params, padded))[:len(part)])
        return np.concatenate(done)

    return pictures


def order(calls: Sequence[float], errors: Sequence[float], floor: float = 0.0,
          points: int = 3) -> float:
    """Measured convergence order: minus the slope of log error against log calls.

    Least squares over the last `points` whose error is above 3 times the floor, the reference's own
    error; nan where these have not two numbers of calls, or some have nothing to converge to.
    """
    calls, errors = np.asarray(calls, np.float64), np.asarray(errors, np.float64)
    good = np.flatnonzero(np.isfinite(errors) & (errors > 3 * floor))[-points:]
    if len({*calls[good]}) < 2 or np.isnan(errors).any():
        return np.nan
    return float(-np.polyfit(np.log(calls[good]), np.log(errors[good]), 1)[0])


def record(request: Request, shot: Shot, rank: float | None = None) -> dict[str, Any]:
    """One row of results; rank: retrieval's, 0 if the right emoji is nearest, or None."""
    return {'sampler': label(request.sampler, request.sampler_options),
            'schedule': label(request.schedule, request.schedule_options),
            'guidance': request.guidance, 'steps': request.steps, 'prompt': request.prompt,
            'seed': request.seed, 'calls': shot.calls, 'error': shot.error,
            'seconds': shot.seconds, 'rank': rank}


def needed(calls: Sequence[float], errors: Sequence[float], tolerance: float) -> float:
    """The fewest calls from which on every error is within the tolerance; inf if none are."""
    close = np.asarray(errors) <= tolerance * (1 + 1e-9)  # a mean may miss it by rounding
    stays = np.logical_and.accumulate(close[::-1])[::-1]
    return float(np.asarray(calls, np.float64)[stays].min(initial=np.inf))


def placing(line: Line) -> tuple[float, float]:
    """To sort lines by: the fewest calls that are needed, then the error there."""
    return line.needed, dict(zip(line.calls, line.errors)).get(line.needed, np.inf)


def mean_error(errors: Sequence[float]) -> float:
    """Geometric mean, the mean of a log plot; nan errors stay nan."""
    with np.errstate(divide='ignore'):
        return float(np.exp(np.mean(np.log(errors))))


def lines(results: Iterable[Mapping[str, Any]], floor: float, tolerance: float) -> list[Line]:
    """Results -> a Line per sampler, schedule and guidance, in the results' order.

    results: dicts, see `record`. floor: the reference's own error. tolerance: see `needed`.
    """
    found = {}
    for result in results:
        key = result['sampler'], result['schedule'], result['guidance']
        found.setdefault(key, {}).setdefault(result['steps'], []).append(result)
    made = []
    for (sampler, schedule, guidance), points in found.items():
        groups = [points[steps] for steps in sorted(points)]
        calls = tuple(np.mean([r['calls'] for r in group]) for group in groups)
        errors = tuple(mean_error([r['error'] for r in group]) for group in groups)
        made.append(Line(
            sampler, schedule, guidance, tuple(sorted(points)), calls, errors,
            tuple(np.mean([r['seconds'] for r in group]) for group in groups),
            tuple(np.mean([np.nan if r['rank'] is None else r['rank'] == 0 for r in group])
                  for group in groups),
            order(calls, errors, floor), needed(calls, errors, tolerance)))
    return made
