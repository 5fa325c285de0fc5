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
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np

HISTORY = 4  # model outputs that a row can reach back to; one number, so that all tables stack


class Row(NamedTuple):
    """One model call. Rows are Row with a leading axis [calls], or [calls, B] when per image.

    A row with sigma 0 calls no model: it only mixes. Padding is such rows with an identity mix.
    """

    sigma: np.ndarray  # []       noise level at which the model is called
    push: np.ndarray  # [2]      history entry e0 = push . (x, denoised)
    mix: np.ndarray  # [2,4+K]  (x, y) <- mix @ (x, y, noise, e0 .. eK-1, uncond)
    path: np.ndarray  # [2]      the noise is the image's Brownian path between these sigmas,
    #                            scaled to unit variance; equal: it is drawn independently

    @property
    def noisy(self):
        """Which rows add fresh noise, bool."""
        return (self.mix[..., NOISE] != 0).any(-1)

    def idle(self, count):
        """So many rows that do nothing, to follow these."""
        tail = Row(*(np.zeros((count, *field.shape[1:])) for field in self))
        tail.mix[..., 0, 0] = tail.mix[..., 1, 1] = 1
        return tail


class Rule(NamedTuple):
    """Functions of one's own, of one picture each, as `jaxsd.sampler` and `jaxsd.guidance` say."""

    name: str
    step: Callable  # of a sampler; of guidance the function itself
    init: Callable | None = None
    point: Callable | None = None
    code: str = ''  # a hash of the file that they stand in

    def __repr__(self):
        return f'{self.name} {self.code}'  # names compiled programs, in all processes alike

    @staticmethod
    def call(function, row, **given):
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

    def __init__(self, rule, fields):
        self.rule, self.fields = rule, dict(sorted(fields.items()))

    def tree_flatten(self):
        return tuple(self.fields.values()), (self.rule, tuple(self.fields))

    @classmethod
    def tree_unflatten(cls, static, values):
        return cls(static[0], dict(zip(static[1], values)))

    @property
    def sigma(self):
        """As in Row."""
        return self.fields['sigma']

    @property
    def path(self):
        """As in Row."""
        return self.fields.get('path', np.zeros((*self.sigma.shape, 2)))

    @property
    def noisy(self):
        """As in Row."""
        asked = 'noise' in inspect.signature(self.rule.step).parameters
        return (self.sigma > 0) & (self.fields.get('noisy', 1) != 0) & asked

    @property
    def free(self):
        """Whether the picture decides where the model is called, and how often."""
        return self.rule.point is not None

    def idle(self, count):
        """So many rows that do nothing, to follow these."""
        def tail(a):  # the last row's values, with which a gradient is finite
            return np.broadcast_to(a[-1:] if len(a) else 0.0, (count, *a.shape[1:]))
        return Custom(self.rule, {**{name: tail(a) for name, a in self.fields.items()},
                                  'sigma': np.zeros((count, *self.sigma.shape[1:]))})


Rows = Row
NOISE, UNCOND = 2, -1  # the columns of Row.mix that weigh fresh noise and the unguided output
DENOISED = (0.0, 1.0)  # push: e0 is the denoised picture


def slope(sigma):
    """The push that makes e0 the ODE's derivative, d = (x - denoised) / sigma."""
    return (1 / sigma, -1 / sigma)


def mix(x=0.0, y=0.0, noise=0.0, e=(), uncond=0.0):
    """One row of a mix: the weights of x, y, noise, e0, e1, ..., the unguided output -> [4+K]."""
    return np.array([x, y, noise, *e] + [0.0] * (HISTORY - len(e)) + [uncond])


def row(sigma, to, save=None, push=DENOISED, path=(0.0, 0.0)):
    """A model call at sigma: `to` makes the new x, `save` the new y (None: y stays).

    path: of the noise, if there is any.
    """
    both = np.stack([to, mix(y=1) if save is None else save])
    path = path if both[:, NOISE].any() else (0, 0)
    return Row(np.float64(sigma), np.array(push), both, np.array(path, np.float64))


def table(sampler):
    """Make a generator of rows a function `(sigmas, **options) -> Rows`."""
    @functools.wraps(sampler)
    def rows(sigmas, **options):
        return Row(*map(np.stack, zip(*sampler(sigmas, **options))))
    return rows


def custom(rule, rows):
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


def pairs(sigmas):
    """The steps (a, b) of a list of sigmas."""
    return zip(sigmas[:-1], sigmas[1:])


def ancestral(a, b, eta):
    """Split a step a -> b into a deterministic part to `down` and fresh noise `up`.

    up^2 + down^2 = b^2; eta = 1 is DDPM's posterior variance, b^2 (a^2 - b^2) / a^2.
    """
    up = min(b, eta * b * np.sqrt(1 - (b / a) ** 2))
    return np.sqrt(b**2 - up**2), up


def sde_noise(a, b, eta, s_noise):
    """The noise of the reverse SDE with stochasticity eta over a step a -> b, exactly."""
    return s_noise * b * np.sqrt(-np.expm1(2 * eta * np.log(b / a)))


def churn(sigmas, s_churn, s_tmin, s_tmax, s_noise):
    """Karras et al. 2022, algorithm 2: levels to call at, and the noise that leads to each.

    -> hats [steps], kicks [steps + 1]: kicks[i] is added before step i, so the step before it
    carries it; before the first step a row without a model call does.
    """
    a = sigmas[:-1]
    gamma = min(s_churn / len(a), np.sqrt(2) - 1) * ((s_tmin <= a) & (a <= s_tmax))
    return a * (1 + gamma), np.append(s_noise * a * np.sqrt((1 + gamma) ** 2 - 1), 0.0)


def noise_row(weight):
    """A row that only adds noise, if there is any to add."""
    if weight > 0:
        yield row(0, mix(x=1, noise=weight), push=(0, 0))


def within(option, value, low, high):
    """Raise a ValueError unless the value is a whole number from low to high."""
    try:
        whole = low <= value <= high and value == int(value)
    except (TypeError, ValueError):  # text, lists
        whole = False
    if not whole:
        raise ValueError(f'{option}={value}: expected a whole number from {low} to {high}')
