"""From a network's raw prediction to `denoise(x, sigma, i)`, and guidance around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsd.config import ScheduleConfig

from .guidance import Guidance, blur_where, combine, compose, zero_init, zero_prediction
from .scan import Denoise, spread
from .schedules import model_sigmas


def denoiser(net: Callable[..., Any], config: ScheduleConfig) -> Denoise:
    """Wrap a network as `denoise(x, sigma, i) -> denoised`, all [B,...], sigma [] or [B].

    net(x_in, t, i) -> prediction: x_in [B,...] has unit scale (the training convention), t [B] is
    the float timestep, i the row's index; it may return (prediction, more), then denoise returns
    (denoised, more). config: ScheduleConfig, whose prediction_type says what
    the network predicts:
        epsilon:       x0 = x - sigma eps
        v_prediction:  x0 = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v
                       (https://arxiv.org/abs/2202.00512)
        sample:        x0 itself
    With config.edm (https://arxiv.org/abs/2206.00364, table 1, last column) s = sigma_data,
    x_in = x / sqrt(sigma^2 + s^2), and x0 = s^2 / (sigma^2 + s^2) x +- s sigma / sqrt(sigma^2 +
    s^2) out, plus for 'epsilon' and minus for 'v_prediction', as diffusers' EDM schedulers.
    """
    kind = config.prediction_type
    data = config.sigma_data if config.edm else 1
    sign = 1 if config.edm and kind == 'epsilon' else -1

    def denoise(x, sigma, i=None):
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        t = timestep(sigma, config)
        sigma = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        norm = jnp.hypot(sigma, data)  # does not overflow where sigma^2 would
        x_in = x / norm
        out = net(x_in, t, i)
        out, *more = out if isinstance(out, tuple) else (out,)
        out = out.astype(x.dtype)
        if kind == 'v_prediction' or config.edm:
            out = data**2 * x_in / norm + sign * data * sigma / norm * out
        elif kind == 'epsilon':
            out = x - sigma * out
        return (out, *more) if more else out

    return denoise


def timestep(sigma: Array, config: ScheduleConfig) -> Array:
    """Noise levels -> float timesteps, linear in log sigma, clamped; traced, any shape.

    log(sigma) / 4, not clamped, for EDM models (c_noise).

    float32 leaves an error of about 1e-4 in t, so a sigma of the model's own table would miss
    its whole timestep by that much; within 1e-3 it is taken to be meant. Gradients pass.
    """
    if config.edm:
        return jnp.log(sigma) / 4
    logs = np.log(model_sigmas(config))
    t = jnp.interp(jnp.log(sigma), logs.astype(sigma.dtype),
                   np.arange(len(logs), dtype=sigma.dtype))
    gap = lax.stop_gradient(jnp.round(t) - t)
    return t + jnp.where(jnp.abs(gap) < 1e-3, gap, 0)


def pair(*parts: Array) -> Array:
    """Arrays [B,...], uncond, cond and maybe more -> [P*B,...] as uncond 0, cond 0, uncond 1, ...

    Image after image, so that a batch sharded over devices stays where it is; concatenating all
    of uncond and all of cond would move it.
    """
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def guided(denoise: Denoise, guidance: Guidance | ArrayLike, prediction_type: str = 'epsilon',
           unguided: Denoise | None = None, sigma_data: float | None = None,
           regions: Array | None = None) -> Denoise:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598): uncond + g (cond - uncond).

    denoise: takes `parts` pictures per image in `pair`'s order: uncond, cond (or several, see
    `compose`), then perp_neg's negatives, the perturbed one, and uncond without the image that the
    others have, where there are any; cond alone where the scale is None. guidance: g,
    [] or [B], or a Guidance, data. prediction_type, and sigma_data of an EDM
    model: of the network, for the kinds that act on its prediction.
    unguided: the denoiser of the unconditional pictures alone, for self-attention guidance;
    denoise then returns (denoised, attention received per position [P*B,T]). regions [B,...,K]:
    the weights of K prompts are multiplied with these, pixel by pixel.
    -> denoise(x, sigma, i) for B images, which gives (guided, uncond); with momentum
    denoise(x, sigma, i, memory), memory [B,...] zeros at first, which gives that and the memory.
    """
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    parts = guidance.parts

    def guide(x, sigma, i=None, memory=None):
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        out = denoise(pair(*[x] * parts), pair(*[sigma] * parts), i)
        out, *received = out if isinstance(out, tuple) else (out,)
        if guidance.scale is None:
            return out, out
        out = out.reshape(-1, parts, *x.shape[1:])
        uncond, cond, *more = (out[:, k] for k in range(parts))
        row = jax.tree.map(lambda a: spread(jnp.asarray(a, out.dtype), x.ndim), guidance.at(i))
        imageless = None if row.image is None else more.pop()
        perturbed = None if row.pag is None else more.pop()
        if row.prompts is not None:
            weights, others = row.prompts, len(row.prompts) - 1
            if regions is not None:
                weights = [w * regions[..., k, None] for k, w in enumerate(weights)]
            cond, more = compose(weights, uncond, [cond, *more[:others]]), more[others:]
        origin = None
        if row.rescale is not None or row.zero_star is not None:
            origin = zero_prediction(x, spread(sigma, x.ndim), prediction_type, sigma_data)
        result, memory = combine(row, uncond, cond, more, perturbed, origin, memory, x,
                                 sigma, imageless)
        if row.sag is not None:
            blurred = blur_where(uncond, received[0][::parts])
            again = unguided(x + blurred - uncond, sigma, i)
            result = result + row.sag * (blurred - again)
        result = zero_init(row, result, origin)
        return (result, uncond) if memory is None else ((result, uncond), memory)

    return guide


class Reuse(NamedTuple):
    """What `easycache` remembers of each image."""

    x: Array  # [B,...]: what the model was asked for at the row before, of unit scale
    noise: Array  # [B,...]: what it said at its last call, and without guidance
    uncond: Array
    rate: Array  # [B]: how much that changes where x changes by so much
    estimate: Array  # [B]: how much it has changed since, of its size
    calls: Array  # [B]: of the model, up to 2

    @classmethod
    def of(cls, x: Array) -> 'Reuse':
        """Before the first row."""
        nothing, zero = jnp.zeros_like(x), jnp.zeros(len(x), x.dtype)
        return cls(nothing, nothing, nothing, zero, zero, zero)


def easycache(denoise: Denoise, threshold: Array, idle: Array) -> Denoise:
    """A denoiser that gives the noise of its last call again where little would have changed.

    EasyCache (https://arxiv.org/abs/2507.02860, eq. 5 to 7), as ComfyUI estimates: how much the
    predicted noise changes is taken to be how much x does, times the ratio of both at the last
    call; while these estimates add up to less than threshold [B], of the noise's size, the model is
    not called. It is called for all if for one; idle [B]: who does not count. The noise itself is
    given again: on the emoji model that was nearer than x plus a difference, as the paper has it
    for models of flows, than the picture, and than going on along the last change.
    -> denoise(x, sigma, i, reuse, *memory) -> ((denoised, uncond), reuse, *memory).
    """
    def size(a):
        return jnp.abs(a).mean(tuple(range(1, a.ndim)))

    def cached(x, sigma, i, last, *memory):
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        level = spread(sigma, x.ndim)
        seen = x / jnp.hypot(1, level)
        change = size(seen - last.x)
        estimate = last.estimate + last.rate * change / jnp.maximum(size(last.noise), 1e-12)
        reuse = (last.calls >= 2) & (estimate < threshold)
        again = x - level * last.noise, x - level * last.uncond

        def call():
            out = denoise(x, sigma, i, *memory)
            out, *after = out if memory else (out,)
            return out if isinstance(out, tuple) else (out, out), tuple(after)

        out, after = lax.cond(jnp.all(reuse | idle), lambda: (again, memory), call)
        out = jax.tree.map(lambda old, new: jnp.where(spread(reuse, x.ndim), old, new), again, out)
        noise, uncond = ((x - a) / level for a in out)
        rate = size(noise - last.noise) / jnp.maximum(change, 1e-12)
        return (out, Reuse(seen, noise, uncond, jnp.where(reuse, last.rate, rate),
                           jnp.where(reuse, estimate, 0), jnp.minimum(last.calls + ~reuse, 2)),
                *after)

    return cached


def inpainted(denoise: Denoise, picture: Array, free: Callable[[Any], Array]) -> Denoise:
    """A denoiser whose answer is known in part: `picture` where free is 0, its own where it is 1.

    denoise: as `guided` gives it, or plain. picture [B,...]: latents; free(i) -> [B,...,1], 0 to 1,
    in row i. Started from picture + sigma * noise, the denoise loop then carries the known part
    along at the right noise level, whatever the sampler: all are exact for a constant denoised
    picture.
    diffusers' 4-channel StableDiffusionInpaintPipeline, which replaces the known part of x after
    each step instead, gives the same for a sampler without noise of its own.
    """
    def fill(x, sigma, i=None, *memory):
        out = denoise(x, sigma, i, *memory)
        out, *memory = out if memory else (out,)
        weight = free(i)
        out = jax.tree.map(lambda a: picture + weight * (a - picture), out)
        return (out, *memory) if memory else out

    return fill
