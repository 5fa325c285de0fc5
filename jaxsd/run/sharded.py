"""Weights spread over the devices of a host, for models that do not fit on one of them.

Each device still makes its own pictures. A layer's weights are gathered when it runs and are whole
for it alone (fully sharded data parallel, https://arxiv.org/abs/2304.11277), so that the pictures
are made of the same numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsd.typing import Params

AXIS = 'data'  # of meshes over the devices of a host
WHOLE = ('controlnet', 'ip_adapter', 'adapters')


def axis(shape: tuple[int, ...], devices: int) -> int | None:
    """The dimension along which an array is spread: the largest that the devices divide; None for
    vectors and for arrays without one."""
    found = [i for i, n in enumerate(shape) if n % devices == 0]
    return max(found, key=lambda i: shape[i]) if len(shape) > 1 and found else None


def place(params: Params, mesh: Mesh) -> Params:
    """Spread nested dicts of arrays over a mesh of one axis."""
    return jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, _spec(axis(a.shape, mesh.size)))), params)


def run(params: Params, *arguments: Any, function: Callable[..., Any], mesh: Mesh,
        **static: Any) -> Any:
    """function(params, *arguments), in which each device has whole arguments, and its part of the
    params, gathered where they are looked up. WHOLE are whole: not all devices call ControlNets in
    the same rows, and the others are small."""
    def along(name, a):
        return None if name[0].key in WHOLE else axis(a.shape, mesh.size)

    axes = {part: None if part in WHOLE else found for part, found in
            jax.tree_util.tree_map_with_path(along, params).items()}
    specs = jax.tree_util.tree_map_with_path(lambda name, a: _spec(along(name, a)), params)

    def local(params, *arguments):
        return function(_Whole(params, axes), *arguments, **static)

    return jax.shard_map(local, mesh=mesh, in_specs=(specs, *[PartitionSpec()] * len(arguments)),
                         out_specs=PartitionSpec(), check_vma=False)(params, *arguments)


def _spec(along):
    return PartitionSpec() if along is None else PartitionSpec(*[None] * along, AXIS)


@jax.tree_util.register_pytree_node_class
class _Whole(dict):
    """Nested dicts of arrays of which this device has parts: whole when they are looked up."""

    def __init__(self, parts, axes):
        super().__init__(parts)
        self.axes = axes

    def __getitem__(self, key):
        part, along = super().__getitem__(key), (self.axes or {}).get(key)
        if isinstance(part, dict):
            return part if isinstance(part, _Whole) else _Whole(part, along)
        return part if along is None else lax.all_gather(part, AXIS, axis=along, tiled=True)

    def get(self, key, default=None):
        return self[key] if key in self else default  # noqa: SIM401, dict's would not gather

    def items(self):
        return [(key, self[key]) for key in self]

    def __or__(self, more):
        return _Whole(dict(self) | more, self.axes)

    def tree_flatten(self):
        return list(dict.values(self)), (list(self), self.axes)

    @classmethod
    def tree_unflatten(cls, names: Any, parts: Any) -> '_Whole':
        return cls(dict(zip(names[0], parts)), names[1])
