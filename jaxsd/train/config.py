"""All settings of a training, by section of a recipe. No heavy imports: `--help` must be quick."""

import dataclasses
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxsd.config import Checked, choice, ranged
from jaxsd.train.data_config import DataConfig, SetConfig, data_config


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked):
    """How long and on what.

    batch_size: examples of a step on all devices together; accumulate: parts that it is taken in,
    one after another. dtype: of the computation; what is trained and its averages are float32.
    ema: the running average's decay, which warms up as min(ema, (1 + t) / (10 + t)); 0: none.
    remat: the U-Net's states are computed again for the gradient. fsdp: devices that weights are
    spread over; the batch is spread over all. keep: checkpoints that are kept.
    save_every, log_every, sample_every (0: never): steps.
    """

    steps: int = ranged(1000, 1)
    batch_size: int = ranged(1, 1)
    accumulate: int = ranged(1, 1)
    seed: int = ranged(0, 0, 2**31 - 1)
    dtype: str = choice('float32', 'bfloat16')
    ema: float = ranged(0.0, 0, 1)
    remat: bool = False
    fsdp: int = ranged(1, 1)
    save_every: int = ranged(500, 1)
    log_every: int = ranged(10, 1)
    sample_every: int = ranged(0, 0)
    keep: int = ranged(1, 1)

    def check(self) -> None:
        if self.batch_size % self.accumulate:
            raise ValueError(f'batch_size={self.batch_size}: expected a multiple of '
                             f'accumulate={self.accumulate}')


@dataclasses.dataclass(frozen=True)
class LossConfig(Checked):
    """What is minimised; the defaults are what the released models were trained with.

    objective: 'diffusion'; 'consistency', distillation to few steps (losses.consistency);
        'preference', by pairs of pictures (losses.preference).
    timesteps: of TIMESTEPS, from min_timestep up to and without max_timestep (0: all).
    weighting: of WEIGHTINGS; 'none': the network's own error as it is.
    gamma: of min_snr and soft_min_snr; p2_gamma: p2's exponent; sigma_data: of edm.
    noise_offset: deviation of what is added to all pixels of a channel (Guttenberg 2023).
    multires_noise_iterations: coarser noises that are added, each half as fine, times
        multires_noise_discount, its square ...; the sum has deviation 1 (Whitaker 2023); 0: none.
    input_perturbation: more noise in the input than in the target (Ning et al. 2023, 0.1 there).
    """

    objective: str = choice('diffusion', 'consistency', 'preference')
    timesteps: str = choice('uniform', 'cubic', 'logit_normal', 'stratified')
    min_timestep: int = ranged(0, 0)
    max_timestep: int = ranged(0, 0)
    logit_mean: float = 0.0
    logit_std: float = ranged(1.0, above=0)
    weighting: str = choice('none', 'debiased', 'edm', 'epsilon', 'min_snr', 'p2', 'sample',
                            'soft_min_snr', 'v_prediction')
    gamma: float = ranged(5.0, above=0)
    p2_gamma: float = ranged(1.0, 0)
    sigma_data: float = ranged(0.5, above=0)
    error: str = choice('l2', 'huber', 'smooth_l1')
    huber_c: float = ranged(0.1, above=0, high=1)
    huber_schedule: str = choice('snr', 'constant', 'exponential')
    noise_offset: float = ranged(0.0, 0)
    multires_noise_iterations: int = ranged(0, 0, 10)
    multires_noise_discount: float = ranged(0.3, 0, 1)
    input_perturbation: float = ranged(0.0, 0)
    guidance_min: float = ranged(2.0, 0)  # of consistency
    guidance_max: float = ranged(8.0, 0)
    solver_steps: int = ranged(50, 1, 1000)
    beta: float = ranged(2500.0, above=0)  # of preference


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
    """How parameters follow their gradients.

    learning_rate: of the U-Net and all else, text_encoder_learning_rate: of text encoders (0: the
    same); prodigy finds its own and takes 1. schedule: after `warmup` steps from 0, down to `final`
    times the rate; cycles, power: of cosine_with_restarts, polynomial. clip: the gradients' largest
    norm, of all together; 0: any. decay_vectors: weight decay of biases and norms, as torch's.
    """

    name: str = choice('adamw', 'adafactor', 'lion', 'prodigy', 'schedule_free', 'sgd')
    learning_rate: float = ranged(1e-4, above=0)
    text_encoder_learning_rate: float = ranged(0.0, 0)
    schedule: str = choice('constant', 'cosine', 'cosine_with_restarts', 'linear', 'polynomial')
    warmup: int = ranged(0, 0)
    final: float = ranged(0.0, 0, 1)
    cycles: int = ranged(1, 1)
    power: float = ranged(1.0, above=0)
    b1: float = ranged(0.9, 0, 1)
    b2: float = ranged(0.999, 0, 1)
    eps: float = ranged(1e-8, above=0)
    weight_decay: float = ranged(0.01, 0)
    decay_vectors: bool = True
    clip: float = ranged(1.0, 0)


@dataclasses.dataclass(frozen=True)
class FullConfig(Checked):
    """Weights of the model itself. components: 'unet', 'text_encoder', 'text_encoder_2'; layers: a
    regular expression that the names of those to be trained match in part; '': all."""

    components: tuple = ('unet',)
    layers: str = ''


@dataclasses.dataclass(frozen=True)
class AdapterConfig(Checked):
    """A LoRA or one of its kin.

    kind: 'lora' (Hu et al. 2021), 'dora' (Liu et al. 2024), 'loha' (Hyeon-Woo et al. 2021), 'lokr'
    (Yeh et al. 2023). rank: of each layer's change, which is scaled by alpha / rank (alpha 0: the
    rank). conv_rank, conv_alpha: of 3x3 convolutions; 0: those are not trained. layers: a name of
    LAYERS, or a regular expression that layers' names match in part. factor: of lokr, the largest
    side of its smaller matrix.
    """

    kind: str = choice('lora', 'dora', 'loha', 'lokr')
    rank: int = ranged(16, 1, 4096)
    alpha: float = ranged(0.0, 0)
    conv_rank: int = ranged(0, 0, 4096)
    conv_alpha: float = ranged(0.0, 0)
    layers: str = 'transformer'
    components: tuple = ('unet',)
    factor: int = ranged(16, 1)


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig(Checked):
    """A textual inversion (Gal et al. 2022).

    token: the word that captions have for it; vectors: how many it stands for; initial: words whose
    vectors they start as, in turns, such as the thing's kind.
    """

    token: str = ''
    vectors: int = ranged(1, 1, 75)
    initial: str = 'object'

    def check(self) -> None:
        if not self.token.strip():
            raise ValueError("token='': expected the word that captions have for what is learnt")
        if not self.initial.strip():
            raise ValueError("initial='': expected a word to start from, such as 'object'")


@dataclasses.dataclass(frozen=True)
class ControlConfig(Checked):
    """A network that reads hints. start: one to go on with, a path; '': a ControlNet that is a copy
    of the U-Net's first half, or a new T2I-Adapter. channels: of the hint. gain: of its fresh
    layers' initial weights. network: {field: value} of its config that differ from the U-Net's."""

    start: str = ''
    channels: int = ranged(3, 1, 64)
    gain: float = ranged(1.0, above=0)
    network: tuple = dataclasses.field(default=(), metadata={'of': tuple})


@dataclasses.dataclass(frozen=True)
class SampleConfig(Checked):
    """Pictures that a training draws on its way, each c.train.sample_every steps.

    prompts: seeds are 0, 1, 2 ...; request: other fields of jaxsd.Request, 'steps=20, guidance=3'.
    """

    prompts: tuple = dataclasses.field(default=(), metadata={'of': str})
    request: str = ''


@dataclasses.dataclass(frozen=True)
class PriorConfig(Checked):
    """Prior preservation (Ruiz et al. 2023): pictures of the class, drawn by the model itself.

    prompt: of the class, 'a photo of a dog'; '': none. count: of pictures. request: as of
    SampleConfig.
    """

    prompt: str = ''
    count: int = ranged(100, 1)
    request: str = ''


LAYOUTS = {  # of what a method's result can be written in
    'lora': ('kohya', 'diffusers'), 'textual_inversion': (),
    **dict.fromkeys(('full', 'controlnet', 't2i_adapter'), ('diffusers', 'single-file'))}


@dataclasses.dataclass(frozen=True)
class BaseConfig(Checked):
    """A recipe's own fields.

    model: what is fine-tuned, as of jaxsd.load. method: what is trained; its settings are the
    recipe's section of that name. out: the run's folder. export: where the result goes; layout of
    its files ('': kohya's for adapters, diffusers' for the rest) and dtype ('': as it was trained).
    prediction_type, zero_terminal_snr: what the model is to be trained for, where that is another
    than what it was made for (Lin et al. 2024). blocks: of 75 tokens of a caption that are read.
    inpainting: the U-Net gets the nine channels of an inpainting model, if it has not got them.
    """

    model: str = ''
    method: str = choice('lora', 'controlnet', 'full', 't2i_adapter', 'textual_inversion')
    out: str = ''
    export: str = ''
    layout: str = choice('', 'diffusers', 'kohya', 'single-file')
    dtype: str = choice('', 'float16', 'bfloat16', 'float32')
    prediction_type: str = choice('', 'epsilon', 'v_prediction', 'sample')
    zero_terminal_snr: bool = False
    blocks: int = ranged(1, 1, 16)
    inpainting: bool = False

    def check(self) -> None:
        if self.inpainting and self.method != 'full':
            raise ValueError(f'inpainting: the first layer gets new channels, which '
                             f"method={self.method!r} does not train; expected 'full'")
        if self.layout and self.layout not in LAYOUTS[self.method]:
            known = ' or '.join(map(repr, LAYOUTS[self.method])) or 'none'
            raise ValueError(f'layout={self.layout!r}: expected {known} for method={self.method!r}')
        for name in ('model', 'out', 'export'):
            if not getattr(self, name):
                raise ValueError(f'{name}: expected a path, found none')


SECTIONS: dict[str, type[Checked]] = {
    'data': DataConfig, 'loss': LossConfig, 'optimizer': OptimizerConfig, 'train': TrainConfig,
    'sample': SampleConfig, 'prior': PriorConfig}
METHODS: dict[str, type[Checked]] = {
    'full': FullConfig, 'lora': AdapterConfig, 'textual_inversion': EmbeddingConfig,
    'controlnet': ControlConfig, 't2i_adapter': ControlConfig}


class Settings(NamedTuple):
    """A recipe, checked; method: the settings of base.method."""

    base: BaseConfig
    method: Any
    data: DataConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    sample: SampleConfig
    prior: PriorConfig


def recipe(method: str, **fields: Any) -> ConfigDict:
    """A training recipe as a locked ConfigDict: all fields with their defaults, each a flag.

    fields: of BaseConfig, and sections as dicts: train={'steps': 500}, lora={'rank': 8}; data's
    sets by names of your own. Raises KeyError for fields that there are not.
    """
    c = ConfigDict(_defaults(BaseConfig) | {'method': method})
    for name, cls in {**SECTIONS, method: METHODS[method]}.items():
        c[name] = ConfigDict(_defaults(cls))
    del c.data['sets']
    data = dict(fields.pop('data', {}))
    c.data.sets = ConfigDict({name: _defaults(SetConfig) | one
                              for name, one in dict(data.pop('sets', {})).items()})
    c.lock()
    c.update(fields | {'data': data})
    return c


def _defaults(cls):
    return {field.name: placeholder(field.metadata['of']) if field.default is None
            else field.default for field in dataclasses.fields(cls)}


def stage(train: dict[str, Any], optimizer: dict[str, Any], loss: dict[str, Any] | None = None,
          **more: Any) -> ConfigDict:
    """A stage of a training from scratch, see train.from_scratch: its sections, and more fields."""
    c = ConfigDict({name: ConfigDict(_defaults(SECTIONS[name]))
                    for name in ('train', 'optimizer', 'loss')} | more)
    c.lock()
    c.update({'train': train, 'optimizer': optimizer, 'loss': loss or {}})
    return c


def read(c: ConfigDict) -> Settings:
    """A recipe -> Settings. Raises ValueError that names the field, what it has and what it may."""
    base = _section('', BaseConfig, {k: v for k, v in c.items() if not isinstance(v, ConfigDict)})
    parts = {name: _section(f'{name}.', cls, c.get(name, {})) for name, cls in SECTIONS.items()}
    method = _section(f'{base.method}.', METHODS[base.method], c.get(base.method, {}))
    if base.layout == 'diffusers' and getattr(method, 'kind', '') in ('loha', 'lokr'):
        raise ValueError(f"layout='diffusers': diffusers reads no {method.kind} in it; expected "
                         "'kohya'")
    known = {*SECTIONS, base.method}
    for name, value in c.items():
        if isinstance(value, ConfigDict) and name not in known:
            raise ValueError(f'{name}: no section of a recipe for method={base.method!r}; expected '
                             f'{", ".join(sorted(known))}')
    return Settings(base, method, **parts)


def _section(name, cls, values):
    try:
        return data_config(values) if cls is DataConfig else cls(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f'{name}{error}') from None
