"""DDIM, DDPM and UniPC as their papers write them, in the training convention or in lambda.

diffusers, which tests/parity compares with, keeps its tables in float32.
"""

import math

import numpy as np
import pytest
from reference import check


def ddim(model, x, sigmas, noise, eta=0.0, s_noise=1.0):
    """Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12 and 16."""
    abar = 1 / (1 + sigmas**2)
    x = x * np.sqrt(abar[0])
    for a, b in zip(abar[:-1], abar[1:]):
        x0 = model(x / np.sqrt(a), np.sqrt((1 - a) / a))
        eps = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
        s = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
        x = np.sqrt(b) * x0 + np.sqrt(1 - b - s**2) * eps
        if s > 0:
            x = x + s * s_noise * noise()
    return x / np.sqrt(abar[-1])


def ddpm(model, x, sigmas, noise, s_noise=1.0):
    """Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 7, of whatever timesteps."""
    abar = 1 / (1 + sigmas**2)
    x = x * np.sqrt(abar[0])
    for a, b in zip(abar[:-1], abar[1:]):
        alpha, beta = a / b, 1 - a / b
        x0 = model(x / np.sqrt(a), np.sqrt((1 - a) / a))
        x = (np.sqrt(b) * beta * x0 + np.sqrt(alpha) * (1 - b) * x) / (1 - a)
        if b < 1:
            x = x + np.sqrt((1 - b) / (1 - a) * beta) * s_noise * noise()
    return x / np.sqrt(abar[-1])


def unipc(model, x, sigmas, noise, order=2, variant='bh2'):
    """Zhao et al. 2023, https://arxiv.org/abs/2302.04867, algorithms 1, 2, 7 and 8, x0-prediction.

    alpha is 1 in terms of sigma. The corrector's output is not evaluated anew.
    """
    lambdas, steps = -np.log(np.append(sigmas[:-1], sigmas[-1] or 1e-300)), len(sigmas) - 1
    outs, before, p = [], None, 0

    def step(x, i, p, new=None):
        """From sigmas[i] to the next with outs[i], outs[i - 1], ...; corrected with `new`."""
        h = lambdas[i + 1] - lambdas[i]
        b = -h if variant == 'bh1' else math.expm1(-h)
        r = [(lambdas[i - m] - lambdas[i]) / h for m in range(1, p)]
        differences = [(outs[i - m] - outs[i]) / r[m - 1] for m in range(1, p)]
        if new is not None:
            r, differences = [*r, 1.0], [*differences, new - outs[i]]
        result = sigmas[i + 1] / sigmas[i] * x - math.expm1(-h) * outs[i]
        if differences:
            # phi_k(-h) by its recursion, phi_0 = exp
            phi, moments = math.exp(-h), []
            for k in range(len(r) + 1):
                phi = (phi - 1 / math.factorial(k)) / -h
                moments.append(phi)
            matrix = np.array([[rk**n for rk in r] for n in range(len(r))])
            right = [-h * moments[n + 1] * math.factorial(n + 1) / b for n in range(len(r))]
            weights = np.linalg.solve(matrix, right)
            if (p == 2 and new is None) or (p == 1 and new is not None):
                weights = [0.5]
            result = result - b * sum(w * d for w, d in zip(weights, differences))
        return result

    for i, sigma in enumerate(sigmas[:-1]):
        new = model(x, sigma)
        if i > 0:
            x = step(before, i - 1, p, new)
        outs.append(new)
        before, p = x, min(order, i + 1, steps - i)
        x = step(x, i, p)
    return x


@pytest.mark.parametrize('loop, options', [
    (ddim, {}), (ddim, {'eta': 1.0}), (ddim, {'eta': 0.4, 's_noise': 0.9}), (ddpm, {}),
    (ddpm, {'s_noise': 1.1}), (unipc, {}), (unipc, {'order': 1}), (unipc, {'order': 3}),
    (unipc, {'order': 2, 'variant': 'bh1'}), (unipc, {'order': 3, 'variant': 'bh1'}),
])
def test_equals_the_paper(loop, options):
    check(loop.__name__, loop, **options)
