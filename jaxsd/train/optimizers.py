"""Optimisers and learning rates by name, all of them optax's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxsd.train.config import OptimizerConfig
from jaxsd.typing import Params

Rate = Callable[[Any], Any]  # step -> learning rate

# After the warm-up: (learning rate, steps, OptimizerConfig) -> a Rate.
SCHEDULES: dict[str, Callable[..., Rate]] = {
    'constant': lambda rate, steps, c: optax.constant_schedule(rate),
    'linear': lambda rate, steps, c: optax.linear_schedule(rate, c.final * rate, steps),
    'cosine': lambda rate, steps, c: optax.cosine_decay_schedule(rate, steps, c.final),
    'cosine_with_restarts': lambda rate, steps, c: optax.join_schedules(
        [optax.cosine_decay_schedule(rate, steps // c.cycles, c.final)] * c.cycles,
        [i * (steps // c.cycles) for i in range(1, c.cycles)]),
    'polynomial': lambda rate, steps, c: optax.polynomial_schedule(
        rate, c.final * rate, c.power, steps),
}

# (Rate, OptimizerConfig, mask of what decays) -> optax's transformation.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    'adamw': lambda rate, c, mask: optax.adamw(
        rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=mask),
    'adafactor': lambda rate, c, mask: optax.adafactor(
        rate, multiply_by_parameter_scale=False, weight_decay_rate=c.weight_decay or None,
        weight_decay_mask=mask),
    'lion': lambda rate, c, mask: optax.lion(
        rate, c.b1, c.b2, weight_decay=c.weight_decay, mask=mask),
    'prodigy': lambda rate, c, mask: contrib.prodigy(
        rate, (c.b1, c.b2), eps=c.eps, weight_decay=c.weight_decay, safeguard_warmup=True),
    'schedule_free': lambda rate, c, mask: contrib.schedule_free_adamw(
        rate(c.warmup), c.warmup or None, c.b1, c.b2, c.eps, c.weight_decay),
    'sgd': lambda rate, c, mask: optax.sgd(rate, c.b1 or None),
}


def learning_rate(c: OptimizerConfig, steps: int, part: str = 'unet') -> Rate:
    """The learning rate of a component over `steps` steps; ValueError if the warm-up is longer."""
    if c.warmup >= steps:
        raise ValueError(f'optimizer.warmup={c.warmup}: expected less than the {steps} steps')
    rate = c.learning_rate
    if part.startswith('text_encoder') and c.text_encoder_learning_rate:
        rate = c.text_encoder_learning_rate
    after = SCHEDULES[c.schedule](rate, steps - c.warmup, c)
    if not c.warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, rate, c.warmup), after], [c.warmup])


def optimizer(c: OptimizerConfig, steps: int, params: Params) -> optax.GradientTransformation:
    """What changes `params`, {component: arrays}, over `steps` steps."""
    def mask(tree):
        return jax.tree.map(lambda a: c.decay_vectors or a.ndim > 1, tree)

    def change(part):
        return OPTIMIZERS[c.name](learning_rate(c, steps, part), c, mask)

    if c.text_encoder_learning_rate in (0, c.learning_rate) or len(params) == 1:
        chosen = change(next(iter(params)))
    elif c.name == 'schedule_free':
        raise ValueError('optimizer.text_encoder_learning_rate: schedule_free has one learning '
                         'rate for all; leave it 0, or take another optimizer.name')
    else:
        labels = {part: jax.tree.map(lambda _, part=part: part, tree)
                  for part, tree in params.items()}
        chosen = optax.multi_transform({part: change(part) for part in params}, labels)
    return optax.chain(clip_by_global_norm(c.clip), chosen) if c.clip else chosen


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """optax's, with `global_norm`."""
    def clip(grads, params=None):
        norm = global_norm(grads)
        scale = jnp.where(norm < most, 1, most / norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)

    return optax.stateless(clip)


def global_norm(tree: Any) -> jax.Array:
    """The norm of all numbers together, float32. As one sum, XLA on CPU would write the squares of
    an array first and read them with one thread; the barrier keeps it two sums."""
    def squares(a):
        a = jnp.square(a.astype(jnp.float32))
        if a.ndim > 1 and a.size // a.shape[-1] % 32 == 0:
            a = jax.lax.optimization_barrier(a.reshape(-1, 32, a.shape[-1]).sum(1))
        return a.sum()

    return jnp.sqrt(sum(squares(a) for a in jax.tree.leaves(tree)))


def evaluated(state: optax.OptState, params: Params) -> Params:
    """The parameters to draw with and to keep: schedule_free's average, else as they are."""
    def is_free(node):
        return isinstance(node, contrib.ScheduleFreeState)

    free = [node for node in jax.tree.leaves(state, is_leaf=is_free) if is_free(node)]
    return contrib.schedule_free_eval_params(free[0], params) if free else params
