"""What pictures cost, in floating point operations, known before they are made."""

import math

import jax
import numpy as np

from jaxsd.run.inputs import BY_ROW


def count(function, *arguments):
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


def operations(run, params, data):
    """A walk, run(params, Inputs) -> (operations before and after its model calls, of one call)."""
    params, data = (jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), tree)
                    for tree in (params, data))
    if not hasattr(data.rows, 'mix'):  # adaptive steps: a loop, of as many rounds as it takes
        return count(run, params, data)
    rows = len(data.rows.sigma)

    def of(length):
        def resized(a):
            return jax.ShapeDtypeStruct((length, *a.shape[1:]), a.dtype) if (
                a.shape[:1] == (rows,)) else a

        fields = {name: jax.tree.map(resized, getattr(data, name)) for name in BY_ROW}
        return sum(count(run, params, data._replace(**fields)))

    one, two = of(1), of(2)
    return 2 * one - two, two - one
