"""Samplers as tables: the rows, and what the samplers' formulas share. numpy in float64.

Once `denoise(x, sigma)` is fixed, every fixed-step sampler is linear in the current point `x`, a
saved point `y`, fresh noise and the last few model outputs `e0, e1, ...` (newest first), with
coefficients that depend on the sigmas alone: Butcher's general linear methods. A sampler here
yields one `row` per model call; `scan.sample` runs any table.

A new sampler is one function that yields rows and one entry in its file's SAMPLERS, or in a file of
one's own `jaxsd.sampler` before it, whose docstring says what a sampler is. Its formulas read like
the paper's: a and b are the sigmas before and after a step, `e` the weights of e0, e1...

What is not linear has rows too, but a step of its own: `Custom`.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, ParamSpec

import jax
import numpy as np

HISTORY = 4  # model outputs that a row can reach back to; one number, so that all tables stack


class Row(NamedTuple):
    """One model call. Rows are Row with a leading axis [calls], or [calls, B] when per image;
    numpy, or traced.

    A row with sigma 0 calls no model: it only mixes. Padding is such rows with an identity mix.
    """

    sigma: Any  # []       noise level at which the model is called
    push: Any  # [2]      history entry e0 = push . (x, denoised)
    mix: Any  # [2,4+K]  (x, y) <- mix @ (x, y, noise, e0 .. eK-1, uncond)
    path: Any  # [2]      the noise is the image's Brownian path between these sigmas,
    #                            scaled to unit variance; equal: it is drawn independently

    @property
    def noisy(self) -> Any:
        """Which rows add fresh noise, bool."""
        return (self.mix[..., NOISE] != 0).any(-1)

    @property
    def unguided(self) -> bool:
        """Whether some row weighs the output without guidance, as those of CFG++ do."""
        return bool((np.asarray(self.mix)[..., UNCOND] != 0).any())

    def idle(self, count: int) -> 'Row':
        """So many rows that do nothing, to follow these."""
        tail = Row(*(np.zeros((count, *field.shape[1:])) for field in self))
        tail.mix[..., 0, 0] = tail.mix[..., 1, 1] = 1
        return tail


class Rule(NamedTuple):
    """Functions of one's own, of one picture each, as `jaxsd.sampler` and `jaxsd.guidance` say."""

    name: str
    step: Any  # of a sampler, or None; of guidance the function itself
    init: Callable | None = None
    point: Callable | None = None
    code: str = ''  # a hash of the file that they stand in

    def __repr__(self):
        return f'{self.name} {self.code}'  # names compiled programs, in all processes alike

    @staticmethod
    def call(function: Callable[..., Any], row: Mapping[str, Any], **given: Any) -> Any:
        """`function` with what it names of `given` and, as attributes of `row`, of a dict."""
        given['row'] = SimpleNamespace(**row)
        return function(**{name: given[name] for name in inspect.signature(function).parameters})


@jax.tree_util.register_pytree_node_class
class Custom:
    """The rows of a sampler with a step of its own, or the options of guidance that is a function.

    rule: the functions, which choose the program. fields: {name: array}, data; a leading axis of
    rows, then perhaps one of images, as in Row. Of a sampler `sigma` is among them, the level at
    which the model is called, 0: the row does nothing; and perhaps `path`, as in Row, and `noisy`,
    0 where the step needs no noise.
    """

    def __init__(self, rule: Rule, fields: Mapping[str, Any]) -> None:
        self.rule, self.fields = rule, dict(sorted(fields.items()))

    def tree_flatten(self) -> tuple[tuple, tuple]:
        return tuple(self.fields.values()), (self.rule, tuple(self.fields))

    @classmethod
    def tree_unflatten(cls, static: Any, values: Iterable[Any]) -> 'Custom':
        return cls(static[0], dict(zip(static[1], values)))

    @property
    def sigma(self) -> Any:
        """As in Row."""
        return self.fields['sigma']

    @property
    def path(self) -> Any:
        """As in Row."""
        return self.fields.get('path', np.zeros((*self.sigma.shape, 2)))

    @property
    def noisy(self) -> Any:
        """As in Row."""
        asked = 'noise' in inspect.signature(self.rule.step).parameters
        return (self.sigma > 0) & (self.fields.get('noisy', 1) != 0) & asked

    @property
    def unguided(self) -> bool:
        """As in Row."""
        return 'uncond' in inspect.signature(self.rule.step).parameters

    @property
    def free(self) -> bool:
        """Whether the picture decides where the model is called, and how often."""
        return self.rule.point is not None

    def idle(self, count: int) -> 'Custom':
        """So many rows that do nothing, to follow these."""
        def tail(a):  # the last row's values, with which a gradient is finite
            return np.broadcast_to(a[-1:] if len(a) else 0.0, (count, *a.shape[1:]))
        return Custom(self.rule, {**{name: tail(a) for name, a in self.fields.items()},
                                  'sigma': np.zeros((count, *self.sigma.shape[1:]))})


Rows = Row
Table = Row | Custom  # all that `plan` gives
NOISE, UNCOND = 2, -1  # the columns of Row.mix that weigh fresh noise and the unguided output
DENOISED = (0.0, 1.0)  # push: e0 is the denoised picture


P = ParamSpec('P')


def slope(sigma: float) -> tuple[float, float]:
    """The push that makes e0 the ODE's derivative, d = (x - denoised) / sigma."""
    return (1 / sigma, -1 / sigma)


def mix(x: float = 0.0, y: float = 0.0, noise: float = 0.0, e: Sequence[float] | np.ndarray = (),
        uncond: float = 0.0) -> np.ndarray:
    """One row of a mix: the weights of x, y, noise, e0, e1, ..., the unguided output -> [4+K]."""
    return np.array([x, y, noise, *e] + [0.0] * (HISTORY - len(e)) + [uncond])


def row(sigma: float, to: np.ndarray, save: np.ndarray | None = None,
        push: tuple[float, float] = DENOISED, path: tuple[float, float] = (0.0, 0.0)) -> Row:
    """A model call at sigma: `to` makes the new x, `save` the new y (None: y stays).

    path: of the noise, if there is any.
    """
    both = np.stack([to, mix(y=1) if save is None else save])
    path = path if both[:, NOISE].any() else (0, 0)
    return Row(np.float64(sigma), np.array(push), both, np.array(path, np.float64))


def table(sampler: Callable[P, Iterator[Row]]) -> Callable[P, Row]:
    """Make a generator of rows a function `(sigmas, **options) -> Rows`."""
    @functools.wraps(sampler)
    def rows(*sigmas: P.args, **options: P.kwargs) -> Row:
        return Row(*map(np.stack, zip(*sampler(*sigmas, **options))))
    return rows


def custom(rule: Rule, rows: Iterable[Any]) -> Custom:
    """Rows of a Rule, dicts of numbers or arrays -> Custom. Raises ValueError for others."""
    rows = list(rows)
    if not rows or not all(isinstance(row, dict) and 'sigma' in row for row in rows):
        raise ValueError(f'sampler {rule.name!r} has a step of its own: expected a row of it to be '
                         f'a dict with sigma in it, found {str(*rows[:1])[:200]!r}')
    if len({tuple(sorted(row)) for row in rows}) > 1:
        raise ValueError(f'sampler {rule.name!r}: expected the same names in all of its rows')
    try:
        fields = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}
    except (TypeError, ValueError):
        raise ValueError(f'sampler {rule.name!r}: expected numbers in its rows, or arrays of one '
                         'shape') from None
    if fields['sigma'].ndim != 1 or not (fields['sigma'] > 0).all():
        raise ValueError(f'sampler {rule.name!r}: expected a sigma above 0 in each row')
    return Custom(rule, fields)


def pairs(sigmas: Sequence[float] | np.ndarray) -> Iterator[tuple[float, float]]:
    """The steps (a, b) of a list of sigmas."""
    return zip(sigmas[:-1], sigmas[1:])


def ancestral(a: float, b: float, eta: float) -> tuple[float, float]:
    """Split a step a -> b into a deterministic part to `down` and fresh noise `up`.

    up^2 + down^2 = b^2; eta = 1 is DDPM's posterior variance, b^2 (a^2 - b^2) / a^2.
    """
    up = min(b, eta * b * np.sqrt(1 - (b / a) ** 2))
    return np.sqrt(b**2 - up**2), up


def sde_noise(a: float, b: float, eta: float, s_noise: float) -> float:
    """The noise of the reverse SDE with stochasticity eta over a step a -> b, exactly."""
    return s_noise * b * np.sqrt(-np.expm1(2 * eta * np.log(b / a)))


def churn(sigmas: np.ndarray, s_churn: float, s_tmin: float, s_tmax: float,
          s_noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Karras et al. 2022, algorithm 2: levels to call at, and the noise that leads to each.

    -> hats [steps], kicks [steps + 1]: kicks[i] is added before step i, so the step before it
    carries it; before the first step a row without a model call does.
    """
    a = sigmas[:-1]
    gamma = min(s_churn / len(a), np.sqrt(2) - 1) * ((s_tmin <= a) & (a <= s_tmax))
    return a * (1 + gamma), np.append(s_noise * a * np.sqrt((1 + gamma) ** 2 - 1), 0.0)


def noise_row(weight: float) -> Iterator[Row]:
    """A row that only adds noise, if there is any to add."""
    if weight > 0:
        yield row(0, mix(x=1, noise=weight), push=(0, 0))


def within(option: str, value: Any, low: int, high: int) -> None:
    """Raise a ValueError unless the value is a whole number from low to high."""
    try:
        whole = low <= value <= high and value == int(value)
    except (TypeError, ValueError):  # text, lists
        whole = False
    if not whole:
        raise ValueError(f'{option}={value}: expected a whole number from {low} to {high}')
