"""What `load` returns and `save` takes."""

import dataclasses

from jaxsd.config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model's static description, its arrays and its tokenizers.

    params: {component: nested dict of jax arrays}, in our axis order (models.spec.to_jax), keys
        as in a diffusers folder: params['unet']['conv_in']['weight'].
    tokenizers: {'text_encoder' / 'text_encoder_2': prompt.tokenizer.Tokenizer}.
    extras: {name in a single file: numpy array} of what single files hold and the model does not
        use (schedule buffers, 2.x's last text layer ...), kept so that a round trip loses nothing.
    controlnets: {name: Network}, the ControlNets that requests may name; `save` leaves them out.
    """

    config: ModelConfig
    params: dict
    tokenizers: dict = dataclasses.field(default_factory=dict)
    extras: dict = dataclasses.field(default_factory=dict)
    controlnets: dict = dataclasses.field(default_factory=dict)

    def replace(self, **parts):
        """A copy with some parts replaced, e.g. `replace(params=...)`."""
        return dataclasses.replace(self, **parts)
