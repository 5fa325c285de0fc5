"""Samplers as tables: the rows, and what the samplers' formulas share. numpy in float64.

Once `denoise(x, sigma)` is fixed, every fixed-step sampler is linear in the current point `x`, a
saved point `y`, fresh noise and the last few model outputs `e0, e1, ...` (newest first), with
coefficients that depend on the sigmas alone: Butcher's general linear methods. A sampler here
yields one `row` per model call; `scan.sample` runs any table.

A new sampler is one function that yields rows and one entry in its file's SAMPLERS. Its formulas
read like the paper's: a and b are the sigmas before and after a step, `e` the weights of e0, e1...
"""

import functools
from typing import NamedTuple

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
    if value not in range(low, high + 1):
        raise ValueError(f'{option}={value}: expected a whole number from {low} to {high}')
