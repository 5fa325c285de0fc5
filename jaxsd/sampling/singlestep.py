"""Singlestep samplers: several calls a step, no memory from step to step (Runge-Kutta)."""

import numpy as np

from .tables import ancestral, churn, mix, noise_row, pairs, row, slope, table


@table
def heun(sigmas, s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0):
    """Karras et al. 2022, algorithm 2: Euler, then the mean of both slopes; two calls a step."""
    hats, kicks = churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    yield from noise_row(kicks[0])
    for a, b, kick in zip(hats, sigmas[1:], kicks[1:]):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        h = b - a
        yield row(a, mix(x=1, e=[h]), save=mix(x=1), push=slope(a))
        yield row(b, mix(y=1, noise=kick, e=[h / 2, h / 2]), push=slope(b))


@table
def dpm_2(sigmas, s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0):
    """The midpoint rule, the midpoint taken in log sigma; k-diffusion sample_dpm_2."""
    hats, kicks = churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    yield from noise_row(kicks[0])
    for a, b, kick in zip(hats, sigmas[1:], kicks[1:]):
        yield from _midpoint(a, b, kick)


@table
def dpm_2_ancestral(sigmas, eta=1.0, s_noise=1.0):
    """dpm_2 down to `down`, then noise up to the next sigma; k-diffusion."""
    for a, b in pairs(sigmas):
        down, up = ancestral(a, b, eta)
        yield from _midpoint(a, down, s_noise * up, path=(a, b))


def _midpoint(a, b, noise, path=(0, 0)):
    if b == 0:
        yield row(a, mix(noise=noise, e=[1]), path=path)
        return
    mid = np.sqrt(a * b)
    yield row(a, mix(x=1, e=[mid - a]), save=mix(x=1), push=slope(a))
    yield row(mid, mix(y=1, noise=noise, e=[b - a]), push=slope(mid), path=path)


@table
def dpmpp_2s_ancestral(sigmas, eta=1.0, s_noise=1.0):
    """DPM-Solver++(2S), ancestral, r = 1/2; k-diffusion sample_dpmpp_2s_ancestral."""
    for a, b in pairs(sigmas):
        down, up = ancestral(a, b, eta)
        noise = s_noise * up
        if down == 0:
            yield row(a, mix(noise=noise, e=[1]), path=(a, b))
            continue
        mid = np.sqrt(a * down)
        yield row(a, mix(x=mid / a, e=[1 - mid / a]), save=mix(x=1))
        yield row(mid, mix(y=down / a, noise=noise, e=[1 - down / a]), path=(a, b))


@table
def dpmpp_sde(sigmas, eta=1.0, s_noise=1.0, r=0.5):
    """DPM-Solver++ for the SDE, two calls a step, r the place of the second; k-diffusion."""
    if not 0 < r < 1:
        raise ValueError(f'r={r}: expected a number between 0 and 1')
    for a, b in pairs(sigmas):
        if b == 0:
            yield row(a, mix(e=[1]))
            continue
        mid, c = a ** (1 - r) * b**r, 1 / (2 * r)
        down, up = ancestral(a, mid, eta)
        yield row(a, mix(x=down / a, noise=s_noise * up, e=[1 - down / a]), save=mix(x=1),
                  path=(a, mid))
        down, up = ancestral(a, b, eta)
        gain = 1 - down / a
        yield row(mid, mix(y=down / a, noise=s_noise * up, e=[gain * c, gain * (1 - c)]),
                  path=(a, b))


SAMPLERS = (heun, dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral, dpmpp_sde)
