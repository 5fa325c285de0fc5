"""What `load` returns and `save` takes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import GetAttrKey

from jaxsd.config import ModelConfig
from jaxsd.typing import Params


def on_host(params: Params) -> bool:
    """Whether arrays are numpy's: they stay on the host, and are moved to a device for each use."""
    return all(isinstance(array, np.ndarray) for array in jax.tree.leaves(params))


class _Tree:
    """A dataclass as a pytree: the fields in ARRAYS are children, the others are static, equal if
    they are the same objects or, for a config, equal."""

    ARRAYS: tuple[str, ...] = ()
    config: Any

    def tree_flatten_with_keys(self) -> tuple[list, '_Static']:
        """For jax.tree_util."""
        rest = {name: value for name, value in vars(self).items() if name not in self.ARRAYS}
        return [(GetAttrKey(name), getattr(self, name)) for name in self.ARRAYS], _Static(rest)

    def __repr__(self):
        """In a line: not every number of the weights."""
        leaves = jax.tree.leaves(self)
        version = getattr(self.config, 'version', type(self.config).__name__)
        kinds = sorted({str(leaf.dtype) for leaf in leaves if hasattr(leaf, 'dtype')})
        count = sum(leaf.size for leaf in leaves if hasattr(leaf, 'size'))
        return (f'{type(self).__name__}({version}, {count / 1e6:.1f} M parameters, '
                f'{", ".join(kinds)})')

    @classmethod
    def tree_unflatten(cls, static: Any, children: Sequence[Any]) -> Any:
        """For jax.tree_util."""
        return cls(**static.fields, **dict(zip(cls.ARRAYS, children)))


class _Static:
    def __init__(self, fields):
        self.fields = fields

    def _key(self):
        return [value if name == 'config' else id(value)
                for name, value in sorted(self.fields.items())]

    def __eq__(self, other):
        return isinstance(other, _Static) and self._key() == other._key()

    def __hash__(self):
        return hash(tuple(self._key()))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Network(_Tree):
    """One network alone: its config (VAEConfig, ControlNetConfig ...) and its nested arrays. A
    pytree of its params.

    A config has None where a file that holds only tensors cannot say, see `Model.with_vae`.
    """

    ARRAYS = ('params',)

    config: Any
    params: Params


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class IPAdapter(_Tree):
    """An IP-Adapter: its config (IPAdapterConfig), its nested arrays, and the image encoder that it
    reads pictures with (a Network) or None. A pytree of params and image_encoder."""

    ARRAYS = ('params', 'image_encoder')

    config: Any
    params: Params
    image_encoder: Network | None = None


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model(_Tree):
    """A model's static description, its arrays and its tokenizers. A pytree of params, controlnets
    and ip_adapters, for jax.jit, jax.device_put, jax.tree.map and orbax; the rest is static.

    params: {component: nested dict of jax arrays}, in our axis order (models.spec.to_jax), keys
        as in a diffusers folder: params['unet']['conv_in']['weight']. Components of numpy arrays
        but the U-Net stay on the host, see `load`'s offload.
    tokenizers: {'text_encoder' / 'text_encoder_2': prompt.tokenizer.Tokenizer}.
    extras: {name in a single file: numpy array} of what single files hold and the model does not
        use (schedule buffers, 2.x's last text layer ...), kept so that a round trip loses nothing.
    controlnets: {name: Network}, the ControlNets that requests may name; `save` leaves them out.
    adapters: {name: Adapter}, LoRAs and their like, that requests may name; left out too.
    embeddings: {name: Embedding}, textual inversions that prompts may name; left out too.
    upscalers: {name: Network}, of load_upscaler, that Hires may name; left out too.
    ip_adapters: {name: IPAdapter}, that image prompts may name; left out too.
    detectors: {name: Network}, of load_detector, with which a server makes hints; left out too.
    """

    ARRAYS = ('params', 'controlnets', 'ip_adapters')

    config: ModelConfig
    params: dict
    tokenizers: dict = dataclasses.field(default_factory=dict)
    extras: dict = dataclasses.field(default_factory=dict)
    controlnets: dict = dataclasses.field(default_factory=dict)
    adapters: dict = dataclasses.field(default_factory=dict)
    embeddings: dict = dataclasses.field(default_factory=dict)
    upscalers: dict = dataclasses.field(default_factory=dict)
    ip_adapters: dict = dataclasses.field(default_factory=dict)
    detectors: dict = dataclasses.field(default_factory=dict)

    def replace(self, **parts: Any) -> 'Model':
        """A copy with some parts replaced, e.g. `replace(params=...)`."""
        return dataclasses.replace(self, **parts)

    def with_vae(self, network: Network) -> 'Model':
        """A copy with another VAE, a Network that `jaxsd.load_vae` gave.

        What a file without a config.json cannot say (scaling_factor, shift_factor, force_upcast,
        sample_size) stays this model's, and so does whether it is kept on the host. Raises
        ValueError when its latents are not the model's.
        """
        ours, other = self.config.vae, network.config
        for what, name in (('channels', 'latent_channels'), ('pixels', 'factor')):
            if getattr(ours, name) != getattr(other, name):
                raise ValueError(
                    f"this VAE's latents have {getattr(other, name)} {what} each, the model's "
                    f'have {getattr(ours, name)}; give a VAE made for the model')
        unsaid = {name: getattr(ours, name) for name, value in vars(other).items()
                  if value is None}
        params = network.params
        if on_host(self.params['vae']):
            params = jax.tree.map(np.asarray, params)
        return self.replace(config=self.config.replace(vae=dataclasses.replace(other, **unsaid)),
                            params=self.params | {'vae': params})
