"""What pictures cost, in floating point operations, known before they are made."""

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxsd.run.engine import Engine
from jaxsd.run.request import Request


def count(function: Callable[..., Any], *arguments: Any) -> tuple[int, int]:
    """Operations of the products and convolutions of a function -> (outside of while loops, in
    them, once round). A multiply-add is two; of branches the dearest one counts."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr):
    outside = inside = 0
    for step in jaxpr.eqns:
        name, given = step.primitive.name, step.params
        if name == 'dot_general':
            (contracted, _), _ = given['dimension_numbers']
            outside += 2 * math.prod(step.outvars[0].aval.shape) * math.prod(
                step.invars[0].aval.shape[i] for i in contracted)
        elif name == 'conv_general_dilated':
            kernel = step.invars[1].aval.shape
            outputs = kernel[given['dimension_numbers'].rhs_spec[0]]
            outside += 2 * math.prod(step.outvars[0].aval.shape) * math.prod(kernel) // outputs
        elif name == 'while':
            inside += sum(_count(given['body_jaxpr'].jaxpr))
        elif name == 'cond':
            outside += max(sum(_count(branch.jaxpr)) for branch in given['branches'])
        else:
            times = given['length'] if name == 'scan' else 1
            for inner in filter(lambda value: hasattr(value, 'eqns'), given.values()):
                more = _count(getattr(inner, 'jaxpr', inner))
                outside, inside = outside + times * more[0], inside + times * more[1]
    return outside, inside


def of(engine: Engine, request: Request) -> tuple[int, int, int]:
    """What a resolved request's picture costs on an Engine -> operations before and after its model
    calls, of one call on average, and the bytes that a device needs. Compiles."""
    replica = engine.replicas[0]
    outside = inside = calls = working = 0
    for stage in engine.prepare(request)[0]:
        *others, (loop, arguments), (decode, latents) = replica.programs(stage).parts
        for program, given in [*others, (decode, latents)]:
            outside += sum(count(program.function, *given))
        some = int(stage.calls[-1])
        calls += some
        inside += some * sum(count(loop.function, *arguments)) // replica.width(stage.kind.slots)
        for program, _ in replica.programs(stage).parts:
            needs = program.call.memory_analysis()
            working = max(working, needs.temp_size_in_bytes + needs.output_size_in_bytes)
    weights = sum(leaf.addressable_shards[0].data.nbytes for net in replica.nets
                  for leaf in jax.tree.leaves(net.params))
    at_once = len(engine.lanes) // len(engine.replicas)
    return outside, inside // max(calls, 1), weights + at_once * working
