"""The probability-flow ODE, dx/dsigma = eps(x, sigma) = (x - denoised) / sigma, run upwards.

Here `denoise` is what `sampling.sample` takes: denoise(x, sigma, i) -> denoised [B,...], or
(denoised, uncond). `i` is the index of the step on the way down over the same sigmas.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jaxsd import sampling
from jaxsd.config import ModelConfig
from jaxsd.run import denoiser as network_denoiser
from jaxsd.run import encode, encode_text, inputs, resolve
from jaxsd.run.inputs import Inputs
from jaxsd.run.pipeline import memory
from jaxsd.run.request import Request
from jaxsd.sampling.choice import choose
from jaxsd.sampling.scan import lift
from jaxsd.typing import Params
from jaxsd.weights import Model

Denoise = Callable[..., Any]  # denoise(x, sigma, i), see above

# Explicit Runge-Kutta methods in which each slope needs only the one before:
# where each slope is taken, as a part of the step, and its weight.
RUNGE_KUTTA = {
    'heun': ((0, 1), (1 / 2, 1 / 2)),
    'rk4': ((0, 1 / 2, 1 / 2, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
PROBES = {'rademacher': jax.random.rademacher, 'gaussian': jax.random.normal}


def problem(model: Model, requests: Sequence[Request]) -> Inputs:
    """Requests of one size -> run.Inputs, for other levels than the requests' own.

    Prompts and guidance are the requests', the noise what their seeds start from, standard normal;
    sampler, schedule and steps do not matter. Raises ValueError for guidance that changes on the
    way, whose steps would be others, and for pictures, masks and hints: text alone is followed.
    """
    config = model.config
    if any(r.image is not None or r.controls or r.depth is not None for r in requests):
        raise ValueError('image, depth, controls: expected none, what is asked here follows text '
                         'alone')
    requests = [r.replace(sampler='euler', sampler_options={}, eta=None)
                for r in resolve(requests, config)]
    shape = (requests[0].height // config.vae.factor, requests[0].width // config.vae.factor,
             config.vae.latent_channels)
    noise = sampling.initial(sampling.keys([r.seed for r in requests]), shape)
    data = inputs(model, requests, np.asarray(noise))
    for name in ('easycache', 'deepcache'):
        if getattr(data.steps.guidance, name) is not None:
            raise ValueError(f'{name}: expected none: what the model says must not depend on what '
                             'it said before')
    called = data.rows.sigma > 0
    if data.steps.text_index is not None or any(
            (leaf != leaf[:1])[called].any() for leaf in jax.tree.leaves(data.steps.guidance)):
        raise ValueError('a prompt or guidance that changes over the steps: expected the same at '
                         'all levels')
    return data._replace(steps=jax.tree.map(lambda a: a[:1], data.steps))


def denoiser(params: Params, config: ModelConfig, data: Inputs) -> Denoise:
    """A model's guided denoise(x, sigma, i) for the images of a `problem`; to be called under jit.

    Guidance with a memory begins anew in every call that is not given one, as a fourth argument.
    """
    factor = config.vae.factor
    height, width = (factor * n for n in data.noise.shape[1:3])
    encoded, _ = encode(params, config, data, encode_text(params, config, data), height, width)
    guided = network_denoiser(params, config, encoded)
    step = jax.tree.map(lambda a: jnp.asarray(a)[0], data.steps)

    def denoise(x, sigma, i=None, *given):
        if step.guidance.momentum and not given:
            return guided(x, sigma, step, memory(x, step.guidance, config))[0]
        return guided(x, sigma, step, *given)

    return denoise


def invert(denoise: Denoise, x: Array, sigmas: np.ndarray, iterations: int = 50,
           tolerance: float | None = None) -> tuple[Array, Float[Array, ' B']]:
    """Find the noise from which the Euler method (DDIM) over `sigmas` leads exactly to x.

    x: [B,...] at sigmas[-1] > 0. sigmas: numpy [steps + 1], strictly decreasing.
    -> (the point at sigmas[0] [B,...], residual [B]: the largest over the steps, relative).
    A step a -> b of it, x_b = x_a + (b - a) eps(x_a, a), is solved for x_a by iterating
    x_a <- x_b + (a - b) eps(x_a, a), each image until its residual, relative and root mean
    square, is within the tolerance (None: 10 roundings of x's dtype), or `iterations` times. A
    step costs two model calls and one per iteration, as many as its slowest image needs.
    iterations=0: plain DDIM inversion, which takes eps at x_b instead (diffusers'
    DDIMInverseScheduler). It converges where (a - b) times the Lipschitz constant of eps is
    below 1; a large residual says that the sigmas are too far apart.
    Fixed points: Pan et al. 2023, https://arxiv.org/abs/2309.04907.
    Raises ValueError for sigmas that end in 0.
    """
    sigmas = _positive(sigmas)
    x = lift(x)
    tolerance = 10 * jnp.finfo(x.dtype).eps if tolerance is None else tolerance

    def up(x_b, step):
        a, b, scale, i = step

        def image(x):
            return x_b + (a - b) * _eps(denoise, x, a, i)

        def residual(x, image):
            return _rms(image - x) / jnp.maximum(_rms(image), jnp.finfo(x.dtype).tiny)

        def unsolved(carry):
            *_, residual, count = carry
            return jnp.any(residual > tolerance) & (count < iterations)

        def iterate(carry):
            x, then, worst, count = carry
            open_ = (worst > tolerance).reshape(-1, *(1,) * (x.ndim - 1))
            x = jnp.where(open_, then, x)
            then = image(x)
            return x, then, residual(x, then), count + 1

        x = image(x_b * scale)  # the same point in the training convention, at unit scale
        then = image(x)
        x, _, worst, _ = lax.while_loop(unsolved, iterate, (x, then, residual(x, then), 0))
        return x, worst

    a, b = sigmas[:-1], sigmas[1:]
    steps = tuple(jnp.asarray(s[::-1], x.dtype) for s in (a, b, np.hypot(1, a) / np.hypot(1, b)))
    x, residuals = lax.scan(up, x, (*steps, jnp.arange(len(a))[::-1]))
    return x, residuals.max(0)


def log_likelihood(denoise: Denoise, x: Array, sigmas: np.ndarray, keys: Array, probes: int = 1,
                   method: str = 'heun', probe: str = 'rademacher') -> Float[Array, ' B']:
    """Log density of x under the probability-flow ODE, in nats -> [B].

    log p(x) = log N(x(sigmas[0]); 0, sigmas[0]^2) + the integral of div eps dsigma from
    sigmas[-1] to sigmas[0] (Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 39): the
    density of data plus noise of level sigmas[-1]. The divergence is estimated without bias as
    the mean over probes v of v . (d eps / dx) v (Hutchinson); k-diffusion log_likelihood.
    x: [B,...]; sigmas: numpy [steps + 1], strictly decreasing, above 0; keys: [B], from which
    `probes` probes are drawn per image, 'rademacher' or 'gaussian', the same at all levels, so
    that an image does not depend on its batch. method: 'heun' or 'rk4', 2 or 4 slopes a step.
    The normal prior at sigmas[0] is exact only as sigmas[0] grows.
    Raises ValueError for sigmas that end in 0 and for unknown methods and probes.
    """
    sigmas = _positive(sigmas)
    if probes < 1:
        raise ValueError(f'probes={probes}: expected at least 1')
    x = lift(x)
    nodes, weights = (jnp.asarray(t, x.dtype) for t in choose('method', method, RUNGE_KUTTA))
    draw = choose('probe', probe, PROBES)
    v = jax.vmap(lambda key: draw(key, (probes, *x.shape[1:]), x.dtype), out_axes=1)(keys)

    def slopes(x, sigma, i):
        """eps and the estimate of its divergence, [B,...] and [B]."""
        def push(v):
            return jax.jvp(lambda x: _eps(denoise, x, sigma, i), (x,), (v,))

        eps, changes = jax.vmap(push, out_axes=(None, 0))(v)
        return eps, (v * changes).sum(range(2, v.ndim)).mean(0)

    def up(carry, step):
        a, b, i = step

        def stage(state, tableau):
            slope, total = state
            node, weight = tableau
            new = slopes(carry[0] + node * (a - b) * slope, b + node * (a - b), i)
            return (new[0], jax.tree.map(lambda t, n: t + weight * (a - b) * n, total, new)), None

        (_, carry), _ = lax.scan(stage, (jnp.zeros_like(x), carry), (nodes, weights))
        return carry, None

    steps = (jnp.asarray(sigmas[:-1][::-1], x.dtype), jnp.asarray(sigmas[1:][::-1], x.dtype),
             jnp.arange(len(sigmas) - 1)[::-1])
    (x, gain), _ = lax.scan(up, (x, jnp.zeros(len(x), x.dtype)), steps)
    prior = -0.5 * jnp.square(x / sigmas[0]) - np.log(sigmas[0]) - 0.5 * np.log(2 * np.pi)
    return prior.sum(range(1, x.ndim)) + gain


def _positive(sigmas):
    """Check the sigmas of steps that are to be reversed -> float64 [steps + 1]."""
    sampling.plan('euler', sigmas)  # its errors
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas[-1] == 0:
        raise ValueError("sigmas end in 0, where steps cannot be reversed: expected a last "
                         "sigma above 0; use final='sigma_min', or drop the 0")
    return sigmas


def _eps(denoise, x, sigma, i):
    out = denoise(x, sigma, i)
    return (x - (out[0] if isinstance(out, tuple) else out)) / sigma


def _rms(x):
    """[B,...] -> [B]"""
    return jnp.sqrt(jnp.square(x).mean(range(1, x.ndim)))
