"""Guidance: small functions on denoised pictures, and their strengths as data.

A field of `Guidance` that is None is absent from the compiled program; a field that is there is an
array, so that every image and every row may have its own value. All of it happens on the denoised
picture x0, which is the network's prediction but for an affine map: where a method depends on which
of the two it acts on, its function says so.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxsd.models.self_attention import Fewer

from .scan import Denoise, spread
from .tables import Custom


class Threshold(NamedTuple):
    """Dynamic thresholding, see `threshold`."""

    mimic: Any  # the guidance scale whose range of values is kept
    percentile: Any  # 0 to 1, of the absolute values; what lies above is clamped
    weight: Any  # 0: off


class ZeroStar(NamedTuple):
    """CFG-Zero*, see `zero_star`."""

    weight: Any  # of the optimised scale; 0: off
    init: Any  # 1 in the rows whose prediction is zero


class Projection(NamedTuple):
    """Adaptive projected guidance, see `project`."""

    eta: Any  # share of the part parallel to the conditional picture; 1: off
    norm: Any  # the longest difference allowed; infinity: off
    momentum: Any = None  # of the running sum of differences; needs `sample(..., memory=)`
    gain: Any = 1.0  # weight of the newest difference: 0, with momentum 1, keeps the sum


@functools.partial(jax.tree_util.register_dataclass, data_fields=['on'], meta_fields=['how'])
@dataclasses.dataclass(frozen=True)
class Shrink:
    """Deep shrink; `how`, a unet.DeepShrink, chooses the program."""

    how: Any
    on: Any  # 1 in the rows in which features are smaller


@functools.partial(jax.tree_util.register_dataclass, data_fields=['again'],
                   meta_fields=['layers'])
@dataclasses.dataclass(frozen=True)
class DeepCache:
    """See `unet.Deep`; `layers` chooses the program."""

    layers: int
    again: Any  # 1 in the rows that take features of an earlier one


class Guidance(NamedTuple):
    """How an image is guided: numbers, or arrays [B] or [calls,B] (a value per row and image)."""

    scale: Any = 1.0  # classifier-free guidance; None: the prompt alone, with no second picture
    rescale: Any = None  # phi
    threshold: Threshold | None = None
    zero_star: ZeroStar | None = None
    apg: Projection | None = None
    perp_neg: tuple | None = None  # a weight for each further negative
    pag: Any = None  # scale of perturbed-attention guidance
    image: Any = None  # scale of the image that the network sees, of instruct-pix2pix
    sag: Any = None  # scale of self-attention guidance
    freeu: tuple | None = None  # b1, b2, s1, s2: for `unet.apply`
    prompts: tuple | None = None  # a weight for each of several prompts, see `compose`
    function: Custom | None = None  # of one's own, see `jaxsd.guidance`; its field `on`, 0: off
    embedded: Any = None  # a scale that the network takes as an input, for `unet.apply`
    easycache: Any = None  # the threshold of `denoise.easycache`; 0: off
    shrink: Shrink | None = None
    deepcache: DeepCache | None = None
    attention: Fewer | None = None  # chooses the program

    @property
    def parts(self) -> int:
        """Pictures that the network sees per image: uncond, conds, negatives, perturbed, uncond
        without its image; or the prompt's alone."""
        if self.scale is None:
            return 1
        return (1 + len(self.prompts or (1,)) + len(self.perp_neg or ())
                + (self.pag is not None) + (self.image is not None))

    @property
    def momentum(self) -> bool:
        """Whether it remembers something from call to call."""
        return self.apg is not None and self.apg.momentum is not None

    def at(self, i: Any) -> 'Guidance':
        """The values in row i, [] or [B]."""
        return jax.tree.map(lambda a: jnp.asarray(a)[i] if np.ndim(a) == 2 else a, self)


def combine(guidance: Guidance, uncond: Array, cond: Array, negatives: Sequence[Array],
            perturbed: Array | None, origin: Array | None, memory: Array | None = None,
            x: Array | None = None, sigma: Array | None = None,
            imageless: Array | None = None) -> tuple[Array, Array | None]:
    """Denoised pictures [B,...] -> the guided one, and memory.

    guidance: of one row, values [] or [B,1,...]. negatives: a list; perturbed: or None. origin: the
    picture that a prediction of zero means, or None where neither rescale nor zero_star is on. x,
    sigma [B]: what the model saw, for a function of one's own. imageless: where the network sees an
    image and uncond has it, uncond without: eq. 3 of https://arxiv.org/abs/2211.09800 is
    imageless + s_I (uncond - imageless) + s_T (cond - uncond), guidance by the text and
    (s_I - 1) (uncond - imageless).
    """
    g, target = guidance, uncond
    if g.zero_star is not None:
        target = zero_star(g.zero_star.weight, target, cond, origin)
    difference = cond - target
    if negatives:
        difference = perpendicular(g.perp_neg, difference, [n - target for n in negatives])
    if g.apg is not None:
        target, difference, memory = project(g.apg, target + difference, difference, memory)

    def at(scale):
        out = target + scale * difference
        if g.function is not None:
            out = own(g.function, out, target + difference, target, scale, x, sigma)
        if imageless is not None:
            out = out + (g.image - 1) * (uncond - imageless)
        return out if perturbed is None else out + g.pag * (cond - perturbed)

    out = at(g.scale)
    if g.threshold is not None:
        out = threshold(g.threshold, out, at(g.threshold.mimic))
    if g.rescale is not None:
        out = rescale(g.rescale, out, cond, origin)
    return out, memory


def own(function: Custom, plain: Array, cond: Array, uncond: Array, scale: Array, x: Array,
        sigma: Array) -> Array:
    """Guidance by a function of one's own, picture by picture, where it is on; else `plain`."""
    fields, scale, sigma = jax.tree.map(lambda a: jnp.broadcast_to(a.reshape(-1), len(x)),
                                        (function.fields, scale, sigma))
    on = spread(fields.pop('on') > 0, x.ndim)
    rule, given = function.rule, dict(cond=cond, uncond=uncond, scale=scale, x=x, sigma=sigma)
    return jnp.where(on, jax.vmap(lambda given: rule.call(rule.step, {}, **given))(given | fields),
                     plain)


def compose(weights: Sequence[Array], uncond: Array, conds: Sequence[Array]) -> Array:
    """Composable diffusion (https://arxiv.org/abs/2206.01714, eq. 11): several prompts as one.

    uncond + sum of w_i (cond_i - uncond), as A1111's AND; one prompt of weight 1 stays as it is, to
    the bit, whatever the others of its batch are. Weights that vary over the pixels, and are 1 in
    all, give each prompt its region: their sum is that of w_i cond_i.
    """
    first, *others = conds
    out = first + (weights[0] - 1) * (first - uncond)
    return out + sum(w * (cond - uncond) for w, cond in zip(weights[1:], others))


def zero_init(guidance: Guidance, out: Array, origin: Array | None) -> Array:
    """CFG-Zero*'s first steps: a prediction of zero where `init` is 1."""
    if guidance.zero_star is None:
        return out
    return jnp.where(guidance.zero_star.init > 0, origin, out)


def zero_star(weight: Array, uncond: Array, cond: Array, origin: Array) -> Array:
    """CFG-Zero* (https://arxiv.org/abs/2503.18886, eq. 10): uncond by its best scale.

    The projection of the conditional prediction onto the unconditional one, as in diffusers on the
    network's own prediction (made for velocities; defined for any).
    """
    u, c = uncond - origin, cond - origin
    best = _dot(c, u) / jnp.maximum(_dot(u, u), 1e-12)
    return uncond + weight * (best - 1) * u


def perpendicular(weights: Sequence[Array], positive: Array, negatives: Sequence[Array]) -> Array:
    """Perp-Neg (https://arxiv.org/abs/2304.04968, algorithm 1): negatives cannot undo the positive.

    All are differences to the unconditional picture; of each negative only the part perpendicular
    to the positive counts. ComfyUI's PerpNegGuider, for several negatives and per image.
    """
    length = jnp.maximum(_dot(positive, positive), 1e-12)
    return positive - sum(w * (n - _dot(n, positive) / length * positive)
                          for w, n in zip(weights, negatives))


def project(apg: Projection, cond: Array, difference: Array,
            memory: Array | None = None) -> tuple[Array, Array, Array | None]:
    """APG (https://arxiv.org/abs/2410.02416, algorithm 1) -> start, direction, memory.

    Guidance is start + scale * direction = cond + (scale - 1) * direction. Acts on denoised
    pictures, as the paper does; memory [B,...] is the running sum, None without momentum.
    """
    if apg.momentum is not None:
        difference = memory = apg.gain * difference + apg.momentum * memory
    length = jnp.sqrt(_dot(difference, difference))
    difference = difference * jnp.minimum(1, apg.norm / jnp.maximum(length, 1e-12))
    along = _dot(difference, cond) / jnp.maximum(_dot(cond, cond), 1e-24) * cond
    direction = difference + (apg.eta - 1) * along
    return cond - direction, direction, memory


def threshold(to: Threshold, out: Array, mimic: Array) -> Array:
    """Dynamic thresholding in latents: keep the range that a lower guidance scale has.

    Per image and channel, around the mean: values beyond s = max(percentile of |out|,
    max |mimic|) are clamped, then s shrinks to max |mimic|. Imagen's (https://arxiv.org/abs/
    2205.11487, section 2.3) with the pixel range replaced by that of `mimic`; the extension
    sd-dynamic-thresholding with its defaults (mean, per channel, absolute values).
    """
    pixels = tuple(range(1, out.ndim - 1))
    mean = out.mean(pixels, keepdims=True)
    centred = out - mean
    limit = jnp.abs(mimic - mimic.mean(pixels, keepdims=True)).max(pixels, keepdims=True)
    s = jnp.maximum(_quantile(jnp.abs(centred), to.percentile), limit)
    kept = mean + jnp.clip(centred, -s, s) * (limit / jnp.maximum(s, 1e-12))
    return out + to.weight * (kept - out)


def rescale(phi: Array, out: Array, cond: Array, origin: Array) -> Array:
    """Rescaled guidance (https://arxiv.org/abs/2305.08891, section 3.4): keep cond's deviation.

    diffusers' rescale_noise_cfg: of the network's own prediction, whatever its type (ComfyUI's
    RescaleCFG always takes v).
    """
    prediction = out - origin
    ratio = _deviation(cond - origin) / jnp.maximum(_deviation(prediction), 1e-12)
    return out + phi * (ratio - 1) * prediction


def zero_prediction(x: Array, sigma: Array, prediction_type: str,
                    sigma_data: float | None = None) -> Array:
    """The denoised picture that a prediction of zero means; x [B,...], sigma like x or [B,1,...].

    A prediction is a multiple of (denoised - this), so that ratios of predictions are ratios of
    these differences. sigma_data: of an EDM model, where a prediction of zero means c_skip x.
    """
    if sigma_data is not None:
        return x * jnp.square(sigma_data / jnp.hypot(sigma, sigma_data))
    share: dict[str, Any] = {
        'epsilon': 1.0, 'v_prediction': 1 / jnp.square(jnp.hypot(sigma, 1)), 'sample': 0.0}
    return x * share[prediction_type]


def blur_where(x0: Float[Array, 'B H W C'], received: Float[Array, 'B T'], deviation: float = 1.0,
               size: int = 9) -> Float[Array, 'B H W C']:
    """Blur x0 [B,H,W,C] where it is attended to most; received [B,T], attention per position.

    Self-attention guidance (https://arxiv.org/abs/2210.00939, eq. 13 to 15) as in diffusers: the
    T positions are x0 at a coarser resolution, those that receive more than the mean 1 are blurred
    by a Gaussian of `size` x `size` taps.
    """
    H, W = shape = x0.shape[1:3]
    while shape[0] * shape[1] > received.shape[1]:
        shape = tuple(-(-n // 2) for n in shape)
    mask = (received > 1).reshape(-1, *shape)  # [B,h,w] -> [B,H,W], the nearest position
    mask = mask[:, np.arange(H) * shape[0] // H][:, :, np.arange(W) * shape[1] // W]
    taps = np.arange(size) - size // 2
    kernel = np.exp(-np.square(taps / deviation) / 2)
    kernel /= kernel.sum()
    edge = size // 2
    blurred: Any = jnp.pad(x0, ((0, 0), (edge, edge), (edge, edge), (0, 0)), mode='reflect')
    blurred = sum(float(k) * blurred[:, i:i + H] for i, k in enumerate(kernel))
    blurred = sum(float(k) * blurred[:, :, i:i + W] for i, k in enumerate(kernel))
    return jnp.where(mask[..., None], blurred, x0)


def autoguided(denoise: Denoise, weak: Denoise, scale: ArrayLike) -> Denoise:
    """Autoguidance (https://arxiv.org/abs/2406.02507): away from a weaker model's output.

    denoise, weak: two denoisers (x, sigma, i) -> denoised; scale: [], [B] or [calls,B], 1: none.
    -> a denoiser like them: weak + scale (denoise - weak).
    """
    def guide(x, sigma, i=None):
        good, bad = denoise(x, sigma, i), weak(x, sigma, i)
        return bad + spread(Guidance(scale).at(i).scale, x.ndim) * (good - bad)

    return guide


def steered(denoise: Denoise, log_prob: Callable[[Array], Array],
            scale: ArrayLike = 1.0) -> Denoise:
    """Classifier guidance: sample from p(x0) times exp(log_prob(x0)), by its gradient.

    denoise(x, sigma, i) -> denoised [B,...], or (denoised, uncond) as `guided` gives. log_prob(x0)
    -> [B], in nats: any differentiable log p(y | x0), of a classifier, a loss on a decoded picture.
    scale: [], [B] or [calls,B]. -> a denoiser like the given one.

    The score of p(y | x) at a noisy x is taken to be grad_x log_prob(denoised(x)), through the
    denoiser (https://arxiv.org/abs/2105.05233 with the estimate of https://arxiv.org/abs/2209.14687,
    eq. 10; exact where log_prob is linear), and by Tweedie's formula a score moves the denoised
    picture by sigma^2 times itself.
    """
    def steer(x, sigma, i=None):
        def value(x):
            out = denoise(x, sigma, i)
            return log_prob(out[0] if isinstance(out, tuple) else out).sum(), out

        gradient, out = jax.grad(value, has_aux=True)(x)
        factor = spread(Guidance(scale).at(i).scale, x.ndim) * jnp.square(spread(sigma, x.ndim))
        if isinstance(out, tuple):
            return out[0] + factor * gradient, out[1]
        return out + factor * gradient

    return steer


def _dot(a, b):
    """Inner product of each image, [B,1,...]."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdims=True)


def _deviation(a):
    centred = a - a.mean(tuple(range(1, a.ndim)), keepdims=True)
    return jnp.sqrt(_dot(centred, centred))


def _quantile(a, q):
    """jnp.quantile over the pixels of a [B,H,W,C] with a q for each image -> [B,1,1,C]."""
    ordered = jnp.sort(a.reshape(a.shape[0], -1, a.shape[-1]), axis=1)  # [B,H*W,C]
    last = ordered.shape[1] - 1
    place = jnp.broadcast_to(q, (len(a), *(1,) * (a.ndim - 1))).reshape(-1, 1, 1) * last
    low = jnp.clip(jnp.floor(place), 0, last).astype(jnp.int32)
    below, above = (jnp.take_along_axis(ordered, jnp.minimum(k, last), 1) for k in (low, low + 1))
    value = below + (place - low) * (above - below)
    return value.reshape(len(a), *(1,) * (a.ndim - 2), -1)
