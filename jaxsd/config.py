"""The static description of a model: what the config.json files of a diffusers folder say."""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsd.typing import Path

VERSIONS = pathlib.Path(__file__).parent / 'versions'
TEXT_ENCODERS = ('text_encoder', 'text_encoder_2')
# The fields of a ScheduleConfig that say how a model was trained, without EDM.
BETAS = ('beta_start', 'beta_end', 'beta_schedule', 'rescale_betas_zero_snr', 'trained_betas')


def ranged(default: Any, low: float | None = None, high: float | None = None,
           above: float | None = None) -> Any:
    """A field of numbers, each from low (or above `above`) to high."""
    return dataclasses.field(default=default,
                             metadata={'low': low, 'high': high, 'above': above})


def choice(default: str, *others: str) -> Any:
    """A field of text."""
    return dataclasses.field(default=default, metadata={'choices': (default, *others)})


WIDTH, DEPTH = 65_536, 64  # far beyond any network there is; a slip shall not fill the memory


@dataclasses.dataclass(frozen=True)
class Checked:
    """A config class that checks the types and ranges of its fields when it is built.

    The type is that of the default, `X | None` in the annotation allows None; a tuple's entries
    are of the type of the default's. Subclasses add what concerns several fields in `check`.
    Raises ValueError that names the field, what was expected and what was found.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as JSON has it
                object.__setattr__(self, field.name, value := tuple(value))
            if not (value is None and 'None' in str(field.type)):
                _check_field(field, value)
        self.check()

    def check(self) -> None:
        """ValueError for fields that do not fit each other."""

    def same_length(self, *names: str) -> None:
        """ValueError unless these tuples have one entry per level."""
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) > 1 or not 0 < min(lengths.values()) <= 8:
            raise ValueError('expected one entry per level, 1 to 8 levels, in each of '
                             + ', '.join(f'{k} (found {n})' for k, n in lengths.items()))

    def divisible(self, what: str, widths: Sequence[int], by: str, parts: Sequence[int]) -> None:
        """ValueError unless every width is a multiple of the number beside it."""
        for width, part in zip(widths, parts):
            if width % part:
                raise ValueError(f'{what}: expected multiples of {by}={part}, found {width}')


def _check_field(field, value):
    rules, several = field.metadata, 'tuple' in str(field.type)
    one = rules.get('of') or type(field.default[0] if several else field.default)
    if several != isinstance(value, tuple):
        raise ValueError(f'{field.name}: expected {"a list" if several else "one value"}, found '
                         f'{value!r:.100}')
    for entry in value if several else (value,):
        plain = isinstance(entry, (int, float)) if one is float else isinstance(entry, one)
        if not plain or (one in (int, float) and isinstance(entry, bool)):
            name = {int: 'a whole number', float: 'a number', bool: 'true or false',
                    str: 'text'}.get(one, one.__name__)
            raise ValueError(f'{field.name}: expected {name}, found {entry!r:.100}')
        choices, low, high, above = (rules.get(k) for k in ('choices', 'low', 'high', 'above'))
        if choices and entry not in choices:
            raise ValueError(f'{field.name}={entry!r:.100} is not implemented; expected one of '
                             f'{choices}')
        if one is float and not math.isfinite(entry):
            raise ValueError(f'{field.name}: expected a finite number, found {entry}')
        if (low is not None and entry < low or high is not None and entry > high
                or above is not None and entry <= above):
            limits = [f'at least {low}'] * (low is not None) + [f'above {above}'] * (
                above is not None) + [f'at most {high}'] * (high is not None)
            raise ValueError(f'{field.name}: expected a number {" and ".join(limits)}, '
                             f'found {entry}')


@dataclasses.dataclass(frozen=True)
class TextConfig(Checked):
    """A CLIP text transformer. `skip` and `final_norm` say which hidden state the version uses."""

    vocab_size: int = ranged(49408, 1, 10**7)
    hidden_size: int = ranged(768, 1, WIDTH)
    intermediate_size: int = ranged(3072, 1, WIDTH)
    num_hidden_layers: int = ranged(12, 1, 256)
    num_attention_heads: int = ranged(12, 1, WIDTH)
    max_position_embeddings: int = ranged(77, 3, WIDTH)
    hidden_act: str = choice('quick_gelu', 'gelu')  # 'gelu' is the exact one
    layer_norm_eps: float = ranged(1e-5, above=0, high=1)
    eos_token_id: int = 2  # 2 is what old config.json files say when they mean "the highest id"
    projection_dim: int = ranged(0, 0, WIDTH)  # 0: no text_projection
    skip: int = ranged(0, 0, 255)  # layers left out at the end: 1 is the "penultimate" of SDXL
    final_norm: bool = True  # whether the hidden state passes the final layer norm

    def check(self) -> None:
        self.divisible('hidden_size', [self.hidden_size], 'num_attention_heads',
                       [self.num_attention_heads])


@dataclasses.dataclass(frozen=True)
class VisionConfig(Checked):
    """A CLIP vision transformer, CLIPVisionModelWithProjection; the defaults are ViT-H/14's."""

    hidden_size: int = ranged(1280, 1, WIDTH)
    intermediate_size: int = ranged(5120, 1, WIDTH)
    num_hidden_layers: int = ranged(32, 1, 256)
    num_attention_heads: int = ranged(16, 1, WIDTH)
    image_size: int = ranged(224, 1, WIDTH)
    patch_size: int = ranged(14, 1, WIDTH)
    hidden_act: str = choice('gelu', 'quick_gelu')
    layer_norm_eps: float = ranged(1e-5, above=0, high=1)
    projection_dim: int = ranged(1024, 1, WIDTH)

    def check(self) -> None:
        self.divisible('hidden_size', [self.hidden_size], 'num_attention_heads',
                       [self.num_attention_heads])

    @property
    def tokens(self) -> int:
        """Its patches, and the token of the class."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class ImageNormalizerConfig(Checked):
    """Mean and deviation of unCLIP's image embeddings, a StableUnCLIPImageNormalizer."""

    embedding_dim: int = ranged(768, 1, WIDTH)


@dataclasses.dataclass(frozen=True)
class IPAdapterConfig(Checked):
    """An IP-Adapter, see models.ip_adapter. Its file says all but `shortcut` by its tensors."""

    kind: str = choice('base', 'plus', 'full', 'faceid', 'faceid_plus')
    widths: tuple = ranged((320,), 1, WIDTH)  # of the U-Net's cross-attentions, in the file's order
    cross_attention_dim: int = ranged(768, 1, WIDTH)  # of the tokens that it makes
    features: int = ranged(1024, 0, WIDTH)  # of the image encoder; 0: it sees no picture
    tokens: int = ranged(4, 0, WIDTH)  # that it makes of a picture; 0: one of each of the encoder's
    face: int = ranged(0, 0, WIDTH)  # of the embedding of a face; 0: it takes none
    hidden_size: int = ranged(768, 1, WIDTH)  # of the resampler
    heads: int = ranged(12, 1, WIDTH)  # of the resampler, of 64 channels each
    depth: int = ranged(4, 0, DEPTH)  # of the resampler
    rank: int = ranged(0, 0, WIDTH)  # of the LoRA in the file; 0: there is none
    shortcut: bool = False  # the face's own tokens are added to the resampler's (plus v2)


@dataclasses.dataclass(frozen=True)
class UNetConfig(Checked):
    """A U-Net. Tuples have one entry per resolution level, from the finest to the coarsest."""

    in_channels: int = ranged(4, 1, WIDTH)
    out_channels: int = ranged(4, 1, WIDTH)
    block_out_channels: tuple = ranged((320, 640, 1280, 1280), 1, WIDTH)
    layers_per_block: int = ranged(2, 1, DEPTH)
    # Transformer blocks per attention; 0: no attention.
    transformer_layers: tuple = ranged((1, 1, 1, 0), 0, DEPTH)
    # Where they differ within a level or between the halves, those of each attention, in the order
    # of the blocks: of the way down, then of the way up; (): as the levels say.
    transformer_depths: tuple = dataclasses.field(
        default=(), metadata={'of': int, 'low': 0, 'high': DEPTH})
    # Of the middle block; -1: it is one residual block, -2: there is none (ComfyUI's numbers).
    mid_transformer_layers: int = ranged(1, -2, DEPTH)
    heads: tuple = ranged((8, 8, 8, 8), 1, WIDTH)
    only_cross_attention: tuple = (False, False, False, False)  # not of the middle block
    cross_attention_dim: int = ranged(768, 1, WIDTH)
    use_linear_projection: bool = False
    norm_num_groups: int = ranged(32, 1, WIDTH)
    norm_eps: float = ranged(1e-5, above=0, high=1)
    num_class_embeds: int = ranged(0, 0, 10**7)  # rows of the class embedding table; 0: none
    class_proj_dim: int = ranged(0, 0, WIDTH)  # width of unCLIP's vector in its place; 0: none
    added_dim: int = ranged(0, 0, WIDTH)  # width of SDXL's `added` vector; 0: none
    added_time_dim: int = ranged(256, 1, WIDTH)  # sinusoids per time id inside `added`
    # Sinusoids of the guidance scale that the network takes as an input (LCM); 0: it takes none.
    time_cond_proj_dim: int = ranged(0, 0, WIDTH)
    sample_size: int = ranged(64, 1, WIDTH)  # the native latent height and width

    def check(self) -> None:
        self.same_length('block_out_channels', 'transformer_layers', 'heads',
                         'only_cross_attention')
        widths = self.block_out_channels
        self.divisible('block_out_channels', widths, 'norm_num_groups',
                       [self.norm_num_groups] * len(widths))
        attends = [*map(bool, self.transformer_layers[:-1]), True]  # the last is the middle block's
        self.divisible('block_out_channels', [w for w, a in zip(widths, attends) if a],
                       'attention heads', [h for h, a in zip(self.heads, attends) if a])
        if self.mid_transformer_layers == 0:
            raise ValueError('mid_transformer_layers: expected at least 1, or -1 or -2; found 0')
        if self.transformer_depths:
            levels, each = range(len(widths)), self.layers_per_block
            if len(self.transformer_depths) != len(widths) * (2 * each + 1):
                raise ValueError(f'transformer_depths: expected {len(widths) * (2 * each + 1)}, '
                                 f'one for each block; found {len(self.transformer_depths)}')
            if any((self.depth(side, level, i) > 0) != (self.transformer_layers[level] > 0)
                   for side in ('down', 'up') for level in levels
                   for i in range(each + (side == 'up'))):
                raise ValueError('transformer_depths: expected 0 for all blocks of a level without '
                                 f'attention and for no other; found {self.transformer_depths}')

    def depth(self, side: str, level: int, i: int) -> int:
        """The transformer blocks of the i-th attention of a level, on the way 'down' or 'up'."""
        if not self.transformer_depths:
            return self.transformer_layers[level]
        levels, each = len(self.block_out_channels), self.layers_per_block
        if side == 'down':
            return self.transformer_depths[level * each + i]
        return self.transformer_depths[levels * each + (levels - 1 - level) * (each + 1) + i]


@dataclasses.dataclass(frozen=True)
class KUNetConfig(Checked):
    """The U-Net of the x2 latent upscaler, see models/kunet.py. It has none of what is not a field.
    """

    in_channels: int = ranged(8, 1, WIDTH)
    out_channels: int = ranged(4, 1, WIDTH)  # and one more, of a variance, which is not used
    block_out_channels: tuple = ranged((384, 384, 768, 768), 1, WIDTH)
    layers_per_block: int = ranged(4, 1, DEPTH)
    attention_head_dim: int = ranged(64, 1, WIDTH)  # channels of a head
    cross_attention_dim: int = ranged(768, 1, WIDTH)
    time_cond_dim: int = ranged(896, 1, WIDTH)  # 128 for a noise level, and the pooled text
    norm_eps: float = ranged(1e-5, above=0, high=1)
    sample_size: int = ranged(128, 1, WIDTH)

    num_class_embeds = class_proj_dim = added_dim = added_time_dim = time_cond_proj_dim = 0
    mid_transformer_layers = -2

    def check(self) -> None:
        channels = self.block_out_channels
        if len(channels) < 3 or not channels[-1] == channels[-2] == 2 * channels[0]:
            raise ValueError(f'block_out_channels={channels}: expected at least three, the last '
                             'two twice the first')
        self.divisible('block_out_channels', channels[1:], 'attention_head_dim',
                       [self.attention_head_dim] * len(channels))

    @property
    def unit(self) -> int:
        """Latents along a side are a multiple of this."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """A ControlNet: the first half of a U-Net, and how wide the layers are that read the hint."""

    conditioning_channels: int = ranged(3, 1, WIDTH)
    conditioning_embedding_out_channels: tuple = ranged((16, 32, 96, 256), 1, WIDTH)
    global_pool_conditions: bool = False  # what it adds is averaged over the pixels (shuffle)
    # ControlNet-Union: how many kinds of hints it reads, 0: a plain ControlNet; and the heads and
    # layers of the transformer that sees all hints of a picture.
    num_control_type: int = ranged(0, 0, WIDTH)
    num_trans_head: int = ranged(8, 1, WIDTH)
    num_trans_layer: int = ranged(1, 1, DEPTH)

    def check(self) -> None:
        super().check()
        if self.num_control_type:
            self.divisible('block_out_channels', self.block_out_channels[:1], 'num_trans_head',
                           [self.num_trans_head])


@dataclasses.dataclass(frozen=True)
class T2IAdapterConfig(Checked):
    """A T2I-Adapter; `channels` has one entry per feature, from the finest to the coarsest, but for
    the last one of a light adapter, which is as wide as the one before."""

    in_channels: int = ranged(3, 1, WIDTH)
    channels: tuple = ranged((320, 640, 1280, 1280), 1, WIDTH)
    num_res_blocks: int = ranged(2, 1, DEPTH)
    # Pixels along each side of the squares that are read first.
    downscale_factor: int = ranged(8, 1, 256)
    adapter_type: str = choice('full_adapter', 'full_adapter_xl', 'light_adapter')

    def check(self) -> None:
        self.same_length('channels')

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each feature."""
        return self.channels + self.channels[-1:] * (self.adapter_type == 'light_adapter')

    @property
    def halved(self) -> Sequence[int]:
        """The features that are half as high and wide as the one before."""
        return (2,) if self.adapter_type == 'full_adapter_xl' else range(1, len(self.widths))


@dataclasses.dataclass(frozen=True)
class UpscalerConfig(Checked):
    """A network that enlarges pictures, see models/upscaler.py. `blocks` has the RRDBs, Compact's
    convolutions, or SwinIR's blocks of each layer; `ups` counts doublings."""

    kind: str = choice('rrdb', 'compact', 'swinir')
    scale: int = ranged(4, 1, 16)  # times the sides of a picture
    ups: int = ranged(2, 0, 4)
    unshuffle: int = ranged(1, 1, 4)  # RRDB: along each side, pixels that are read as channels
    channels: int = ranged(64, 1, WIDTH)
    growth: int = ranged(32, 1, WIDTH)  # RRDB: of its dense layers; SwinIR: channels at full size
    blocks: tuple = ranged((23,), 1, 256)
    heads: tuple = ranged((6,), 1, WIDTH)  # SwinIR, as what follows
    window: int = ranged(8, 1, 256)
    hidden: int = ranged(128, 1, WIDTH)  # width of the MLPs
    upsampler: str = choice('', 'pixelshuffle', 'pixelshuffledirect', 'nearest+conv')
    bottleneck: bool = False  # three convolutions after each layer (resi_connection='3conv')

    def check(self) -> None:
        if self.kind == 'swinir':
            if len(self.blocks) != len(self.heads):
                raise ValueError(f'expected one entry per layer in each of blocks (found '
                                 f'{len(self.blocks)}), heads (found {len(self.heads)})')
            self.divisible('channels', [self.channels] * len(self.heads), 'heads', self.heads)


@dataclasses.dataclass(frozen=True)
class DetectorConfig(Checked):
    """A network that finds what a ControlNet is to follow in a picture, see models/detector.py.

    channels: of the first convolution. blocks: OpenPose's stages; HED's convolutions of each block;
    lineart's residual blocks; the anime network's halvings; NormalBae's layers of each stage.
    """

    kind: str = choice('openpose', 'openpose_hand', 'openpose_face', 'hed', 'lineart',
                       'lineart_anime', 'mlsd', 'normal_bae')
    channels: int = ranged(64, 8, WIDTH)
    blocks: tuple = ranged((6,), 1, DEPTH)

    def check(self) -> None:
        expected = {'hed': 5, 'normal_bae': 7}.get(self.kind, 1)
        if len(self.blocks) != expected:
            raise ValueError(f'blocks of {self.kind}: expected {expected} numbers, found '
                             f'{len(self.blocks)}')


@dataclasses.dataclass(frozen=True)
class DepthAnythingConfig(Checked):
    """Depth Anything, 1 or 2: a DINOv2 whose layers `out_indices` (counted from 1) a DPT reads."""

    image_size: int = ranged(518, 14, WIDTH)
    patch_size: int = ranged(14, 1, WIDTH)
    hidden_size: int = ranged(384, 1, WIDTH)
    intermediate_size: int = ranged(1536, 1, WIDTH)
    num_hidden_layers: int = ranged(12, 1, 256)
    num_attention_heads: int = ranged(6, 1, WIDTH)
    out_indices: tuple = ranged((3, 6, 9, 12), 1, 256)
    neck_hidden_sizes: tuple = ranged((48, 96, 192, 384), 1, WIDTH)
    fusion_hidden_size: int = ranged(64, 2, WIDTH)
    head_hidden_size: int = ranged(32, 1, WIDTH)

    def check(self) -> None:
        self.divisible('hidden_size', [self.hidden_size], 'num_attention_heads',
                       [self.num_attention_heads])
        self.divisible('image_size', [self.image_size], 'patch_size', [self.patch_size])
        if len(self.out_indices) != 4 or len(self.neck_hidden_sizes) != 4:
            raise ValueError('expected four entries in each of out_indices (found '
                             f'{len(self.out_indices)}), neck_hidden_sizes (found '
                             f'{len(self.neck_hidden_sizes)})')
        if max(self.out_indices) > self.num_hidden_layers:
            raise ValueError(f'out_indices={self.out_indices}: expected numbers of '
                             f'{self.num_hidden_layers} layers')


@dataclasses.dataclass(frozen=True)
class VAEConfig(Checked):
    """An AutoencoderKL.

    Latents seen by the U-Net are `(z - shift_factor - latents_mean) * scaling_factor /
    latents_std`, the last two per channel (diffusers' SDXL pipelines); (): 0 and 1.
    """

    in_channels: int = ranged(3, 1, WIDTH)
    out_channels: int = ranged(3, 1, WIDTH)
    latent_channels: int = ranged(4, 1, WIDTH)
    block_out_channels: tuple = ranged((128, 256, 512, 512), 1, WIDTH)
    layers_per_block: int = ranged(2, 1, DEPTH)
    norm_num_groups: int = ranged(32, 1, WIDTH)
    scaling_factor: float | None = ranged(0.18215, above=0)
    shift_factor: float | None = 0.0
    latents_mean: tuple | None = dataclasses.field(default=(), metadata={'of': float})
    latents_std: tuple | None = dataclasses.field(default=(), metadata={'of': float, 'above': 0})
    force_upcast: bool | None = False  # float16 overflows: decode in float32 or bfloat16
    sample_size: int | None = ranged(512, 1, WIDTH)  # the native picture height and width

    def check(self) -> None:
        self.same_length('block_out_channels')
        self.divisible('block_out_channels', self.block_out_channels, 'norm_num_groups',
                       [self.norm_num_groups] * len(self.block_out_channels))
        for name in ('latents_mean', 'latents_std'):
            found = getattr(self, name)
            if found and len(found) != self.latent_channels:
                raise ValueError(f'{name}: expected latent_channels={self.latent_channels} '
                                 f'numbers, found {len(found)}')

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig(Checked):
    """An AutoencoderTiny (TAESD), a small stand-in for a VAE; entries as in VAEConfig."""

    in_channels: int = ranged(3, 1, WIDTH)
    out_channels: int = ranged(3, 1, WIDTH)
    latent_channels: int = ranged(4, 1, WIDTH)
    encoder_block_out_channels: tuple = ranged((64, 64, 64, 64), 1, WIDTH)
    decoder_block_out_channels: tuple = ranged((64, 64, 64, 64), 1, WIDTH)
    num_encoder_blocks: tuple = ranged((1, 3, 3, 3), 1, DEPTH)
    num_decoder_blocks: tuple = ranged((3, 3, 3, 1), 1, DEPTH)
    scaling_factor: float | None = ranged(1.0, above=0)
    shift_factor: float | None = 0.0
    force_upcast: bool | None = False

    latents_mean = latents_std = ()  # it has none

    def check(self) -> None:
        self.same_length('encoder_block_out_channels', 'decoder_block_out_channels',
                         'num_encoder_blocks', 'num_decoder_blocks')
        for name in ('encoder_block_out_channels', 'decoder_block_out_channels'):
            if len(set(getattr(self, name))) > 1:
                raise ValueError(f'{name}={list(getattr(self, name))} is not implemented; '
                                 'expected one width at all levels')

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class DPTConfig(Checked):
    """The hybrid DPT that MiDaS is: a ResNet stem, a vision transformer, reassembly and fusion."""

    image_size: int = ranged(384, 1, WIDTH)
    patch_size: int = ranged(16, 1, WIDTH)
    hidden_size: int = ranged(768, 1, WIDTH)
    intermediate_size: int = ranged(3072, 1, WIDTH)
    num_hidden_layers: int = ranged(12, 1, 256)
    num_attention_heads: int = ranged(12, 1, WIDTH)
    layer_norm_eps: float = ranged(1e-12, above=0, high=1)
    backbone_out_indices: tuple = ranged((2, 5, 8, 11), 0, 255)
    neck_hidden_sizes: tuple = ranged((256, 512, 768, 768), 1, WIDTH)
    fusion_hidden_size: int = ranged(256, 2, WIDTH)
    depths: tuple = ranged((3, 4, 9), 1, DEPTH)  # of the stem, bottlenecks per stage
    embedding_size: int = ranged(64, 1, WIDTH)
    hidden_sizes: tuple = ranged((256, 512, 1024), 1, WIDTH)  # of the stem, channels per stage
    num_groups: int = ranged(32, 1, WIDTH)

    def check(self) -> None:
        self.divisible('hidden_size', [self.hidden_size], 'num_attention_heads',
                       [self.num_attention_heads])
        self.divisible('image_size', [self.image_size], 'patch_size', [self.patch_size])
        self.same_length('depths', 'hidden_sizes')
        self.same_length('backbone_out_indices', 'neck_hidden_sizes')


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Checked):
    """The forward diffusion that the model was trained on.

    edm: Karras et al. 2022 (https://arxiv.org/abs/2206.00364), as Playground v2.5 (prediction
    'epsilon', sigma_data 0.5) and CosXL ('v_prediction', sigma_data 1): noise levels from
    sigma_min to sigma_max, timesteps of log(sigma) / 4, and no betas.
    """

    num_train_timesteps: int = ranged(1000, 2, 10**6)
    beta_start: float = ranged(0.00085, above=0, high=0.999)
    beta_end: float = ranged(0.012, above=0, high=0.999)
    beta_schedule: str = choice('scaled_linear', 'linear', 'squaredcos_cap_v2')
    prediction_type: str = choice('epsilon', 'v_prediction', 'sample')
    rescale_betas_zero_snr: bool = False
    # The betas themselves, instead of beta_start, beta_end and beta_schedule.
    trained_betas: tuple | None = dataclasses.field(
        default=None, metadata={'of': float, 'above': 0, 'high': 0.999})
    edm: bool = False
    sigma_min: float = ranged(0.002, above=0)
    sigma_max: float = ranged(80.0, above=0)
    sigma_data: float = ranged(0.5, above=0)

    def check(self) -> None:
        betas = self.trained_betas
        if betas is not None and len(betas) != self.num_train_timesteps:
            raise ValueError(f'trained_betas: expected num_train_timesteps='
                             f'{self.num_train_timesteps} numbers, found {len(betas)}')
        if self.edm and (betas is not None or self.rescale_betas_zero_snr
                         or self.prediction_type == 'sample'):
            raise ValueError('edm: has no betas, no zero terminal SNR and no prediction of samples')
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f'sigma_min={self.sigma_min}: expected less than '
                             f'sigma_max={self.sigma_max}')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything static about a model; hashable, so it can be a static argument of `jit`."""

    unet: UNetConfig | KUNetConfig
    vae: VAEConfig | TinyVAEConfig
    schedule: ScheduleConfig = ScheduleConfig()
    text_encoder: TextConfig | None = None
    text_encoder_2: TextConfig | None = None
    depth_estimator: DPTConfig | None = None
    image_encoder: VisionConfig | None = None  # unCLIP's, and what follows
    image_normalizer: ImageNormalizerConfig | None = None
    image_noise: ScheduleConfig | None = None  # how the image's embedding is noised
    low_res: ScheduleConfig | None = None  # upscalers: how the small picture is noised
    max_noise_level: int = 350  # upscalers: the last timestep of low_res that was trained on
    controlnets: tuple = ()  # (name, ControlNetConfig) of those at work in a program
    ip_adapters: tuple = ()  # (name, IPAdapterConfig) of those
    tiling: str = ''  # of pictures in a program: the axes, 'x', 'y' or both, whose edges meet
    aesthetic: bool = False  # the SDXL refiner's time ids end in an aesthetic score
    zero_negative: bool = False  # an empty negative prompt is zeros, not an encoded '' (SDXL base)
    # The released version it equals, see versions(); a label, no part of what the config is.
    version: str = dataclasses.field(default='custom', compare=False)
    # What suits it, see `run.resolving.suit`: arguments of a Request, and `scheduler`, the settings
    # of a scheduler_config.json. No part of what the config is either.
    defaults: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def replace(self, **parts: Any) -> 'ModelConfig':
        """A copy with some parts replaced, e.g. `replace(schedule=...)`."""
        return dataclasses.replace(self, **parts)

    @property
    def task(self) -> str:
        """What the U-Net sees beside the latents: '' (nothing), 'depth', 'inpainting' (a mask and
        what is around it), 'pix2pix' (an image to edit) or 'upscaler' (a small image); or
        'unclip', where it takes the embedding of an image; 'latent_upscaler': it sees the latents
        of an image of half the size.

        Raises ValueError for input channels that none of these has.
        """
        if isinstance(self.unet, KUNetConfig):
            return 'latent_upscaler'
        if self.unet.class_proj_dim:
            return 'unclip'
        latents, image = self.vae.latent_channels, self.vae.in_channels
        tasks = {0: '', 1: 'depth', 1 + latents: 'inpainting', latents: 'pix2pix'}
        tasks |= {image: 'upscaler'} if self.low_res or image != latents else {}
        found = tasks.get(self.unet.in_channels - latents)
        if found is None or (found == 'upscaler') != (self.low_res is not None):
            raise ValueError(
                f'a U-Net of {self.unet.in_channels} input channels for latents of {latents}: '
                f'expected as many (text to image), one more (depth), {latents} more '
                f'(instruct-pix2pix), {1 + latents} more (inpainting), or {image} more and a '
                'low_res_scheduler (upscaler)')
        return found

    def check_fit(self) -> None:
        """Raises ValueError, one line, where the networks are not made for each other."""
        texts = [text for text in (self.text_encoder, self.text_encoder_2) if text is not None]
        width = sum(text.hidden_size for text in texts)
        if texts and width != self.unet.cross_attention_dim:
            raise ValueError(f'the text encoders give features of {width}, and the U-Net takes '
                             f'cross_attention_dim={self.unet.cross_attention_dim}: expected the '
                             'text encoders that it was trained with')
        if self.unet.out_channels != self.vae.latent_channels:
            raise ValueError(f'the U-Net has out_channels={self.unet.out_channels}, and the VAE '
                             f'latent_channels={self.vae.latent_channels}: expected the VAE that '
                             'it was trained with')
        embeds = self.image_encoder.projection_dim if self.image_encoder else 0
        if self.unet.class_proj_dim != 2 * embeds or embeds and (
                self.image_noise is None or self.image_normalizer is None
                or self.image_normalizer.embedding_dim != embeds):
            raise ValueError(
                f'the U-Net takes class embeddings of {self.unet.class_proj_dim}, and an image '
                f'encoder gives {embeds}, beside which is their noise level: expected unCLIP\'s '
                'image_encoder, image_normalizer and image_noising_scheduler')
        ids = (5 if self.aesthetic else 6) * self.unet.added_time_dim
        if texts and self.unet.added_dim and self.unet.added_dim != texts[-1].projection_dim + ids:
            raise ValueError(
                f'the U-Net takes projection_class_embeddings_input_dim={self.unet.added_dim}, and '
                f'the text encoder and the sizes give {texts[-1].projection_dim} + {ids}: expected '
                'the text encoder that it was trained with, and requires_aesthetics_score for a '
                'refiner alone')

    def with_prediction(self, prediction_type: str) -> 'ModelConfig':
        """A copy with another prediction type: epsilon, v_prediction or sample."""
        schedule = dataclasses.replace(self.schedule, prediction_type=prediction_type)
        return self.replace(schedule=schedule)


def versions() -> list[str]:
    """Names of the released versions whose configs ship inside the package."""
    return sorted(p.name for p in VERSIONS.iterdir() if (p / 'model_index.json').exists())


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig that a diffusers folder's config.json files describe, of any sizes.

    folder: a path, or the name of a released version (`versions()`).
    Every key that diffusers 0.42 knows is read, of no effect on pictures, or refused unless it has
    the one value that is implemented; what a file leaves out has diffusers' default.
    Raises FileNotFoundError that names the missing component, ValueError of one line for a file
    that is damaged or asks for something that jaxsd does not implement.
    """
    folder = VERSIONS / folder if str(folder) in versions() else pathlib.Path(folder)
    index = read_json(folder / 'model_index.json', _index)
    unet = read_json(folder / 'unet' / 'config.json', _unet)
    parts = {
        'unet': unet,
        'vae': read_network_config(folder / 'vae', ('AutoencoderKL', 'AutoencoderTiny')),
        'schedule': read_json(folder / 'scheduler' / 'scheduler_config.json',
                              _k_schedule if isinstance(unet, KUNetConfig) else schedule_config),
        'aesthetic': index['requires_aesthetics_score'],
        'zero_negative': (unet.added_dim > 0 if index['force_zeros_for_empty_prompt'] is None
                          else index['force_zeros_for_empty_prompt']),
    }
    for name in TEXT_ENCODERS:
        if index[name]:
            build = functools.partial(_text, kind=index[name], xl=unet.added_dim > 0)
            parts[name] = read_json(folder / name / 'config.json', build)
            if isinstance(unet, KUNetConfig):
                parts[name] = dataclasses.replace(parts[name], final_norm=False)
    if index['low_res_scheduler']:
        parts['low_res'] = read_json(folder / 'low_res_scheduler' / 'scheduler_config.json',
                                     schedule_config)
        parts['max_noise_level'] = index['max_noise_level']
        if 'force_upcast' not in read_json(folder / 'vae' / 'config.json', dict):
            # The release is older than the key, which diffusers takes for true; only its
            # pipelines of upscalers and of SDXL look at it.
            parts['vae'] = dataclasses.replace(parts['vae'], force_upcast=True)
    if index['image_encoder']:
        for name, kind in (('image_encoder', 'CLIPVisionModelWithProjection'),
                           ('image_normalizer', 'StableUnCLIPImageNormalizer')):
            parts[name] = read_network_config(folder / name, [kind])
        parts['image_noise'] = read_json(
            folder / 'image_noising_scheduler' / 'scheduler_config.json', schedule_config)
    if index['depth_estimator']:
        parts['depth_estimator'] = read_json(folder / 'depth_estimator' / 'config.json', _depth)
    scheduler = read_json(folder / 'scheduler' / 'scheduler_config.json', _distilled_for)
    config = ModelConfig(**parts, defaults=index['_jaxsd'] | scheduler)
    if folder.parent == VERSIONS:
        return config.replace(version=folder.name)
    # Backwards: of 1.4 and 1.5, and of 2.0 and 2.1, which are alike, the later one.
    return config.replace(version=next(
        (v for v in reversed(versions()) if _same(config, read_config(v))), 'custom'))


def read_network_config(folder: Path, classes: Sequence[str] | None = None) -> Any:
    """The config of the single network whose config.json a folder holds, such as a ControlNet's.

    classes: the names of classes that are expected; None: any of NETWORKS.
    Raises FileNotFoundError, and ValueError for a kind or a setting that jaxsd does not implement.
    """
    classes = classes or tuple(NETWORKS)

    def network(content):
        kind = content.get('_class_name') or (content.get('architectures') or [None])[0]
        if kind not in classes:
            raise ValueError(f'describes a {kind or "network of no name"}; '
                             f'expected {" or ".join(classes)}')
        return NETWORKS[kind](content)

    return read_json(pathlib.Path(folder) / 'config.json', network)


def _same(config, released):
    """Whether a config has a release's networks and prediction type; VAEs get swapped, and a
    depth estimator may be left out where depth maps are given."""
    same = released.replace(vae=config.vae, aesthetic=config.aesthetic,
                            zero_negative=config.zero_negative,
                            depth_estimator=config.depth_estimator)
    return same == config and released.vae.factor == config.vae.factor


def read_json(path: pathlib.Path, build: Callable[[dict], Any]) -> Any:
    """build(content) of a JSON file that holds an object; errors name the file, in one line."""
    if not path.exists():
        part = path.parent.name if path.name != 'model_index.json' else 'model_index.json'
        raise FileNotFoundError(
            f'{path}: no such file. A diffusers folder needs its {part!r} component; '
            'download the whole folder, or give a single .safetensors file instead.')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: not valid JSON ({error})') from None
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected an object of settings, found {content!r:.100}')
    try:
        return build(content)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f'{path}: a setting is not of the kind that diffusers writes '
                         f'({type(error).__name__}: {error})') from None
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


# What diffusers' and transformers' classes take a setting for that a file leaves out.
_DOWN = ('CrossAttnDownBlock2D',) * 3 + ('DownBlock2D',)
_DEFAULTS = {
    'unet': {'cross_attention_dim': 1280, 'down_block_types': _DOWN,
             'up_block_types': tuple(k.replace('Down', 'Up') for k in reversed(_DOWN))},
    'kunet': {'layers_per_block': 2, 'attention_head_dim': 8, 'cross_attention_dim': 1280,
              'block_out_channels': (320, 640, 1280, 1280), 'out_channels': 4},
    'controlnet_union': {'conditioning_embedding_out_channels': (48, 96, 192, 384),
                         'num_control_type': 6},
    'vae': {'block_out_channels': (64,), 'layers_per_block': 1, 'sample_size': 32,
            'down_block_types': ('DownEncoderBlock2D',), 'up_block_types': ('UpDecoderBlock2D',)},
    'text': {'hidden_size': 512, 'intermediate_size': 2048, 'num_attention_heads': 8,
             'eos_token_id': 49407, 'projection_dim': 512},
    'vision': {'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12,
               'num_attention_heads': 12, 'patch_size': 32, 'hidden_act': 'quick_gelu',
               'projection_dim': 512},
    'dpt': {'is_hybrid': False, 'neck_hidden_sizes': (96, 192, 384, 768),
            'reassemble_factors': [4, 2, 1, 0.5]},
}

# Settings with the values that are implemented. A file that leaves one out means the first.
_FIXED = {
    'unet': {
        '_class_name': ('UNet2DConditionModel', 'ControlNetModel', 'ControlNetUnionModel'),
        'act_fn': ('silu', 'swish'), 'flip_sin_to_cos': (True,), 'freq_shift': (0,),
        'center_input_sample': (False,), 'downsample_padding': (1,), 'mid_block_scale_factor': (1,),
        'dual_cross_attention': (False,), 'resnet_time_scale_shift': ('default',),
        'mid_block_type': ('UNetMidBlock2DCrossAttn', 'UNetMidBlock2D', None),
        'time_embedding_type': ('positional',),
        'time_embedding_dim': (None,), 'class_embed_type': (None, 'projection'),
        'attention_type': ('default',),
        'addition_embed_type': (None, 'text_time'), 'encoder_hid_dim': (None,),
        'encoder_hid_dim_type': (None,), 'class_embeddings_concat': (False,),
        'cross_attention_norm': (None,), 'conv_in_kernel': (3,), 'conv_out_kernel': (3,),
        'timestep_post_act': (None,), 'time_embedding_act_fn': (None,),
        'resnet_skip_time_act': (False,), 'resnet_out_scale_factor': (1.0,),
        'mid_block_only_cross_attention': (None, False),
        'controlnet_conditioning_channel_order': ('rgb',),
    },
    'kunet': {
        '_class_name': ('UNet2DConditionModel',), 'act_fn': ('gelu',), 'flip_sin_to_cos': (True,),
        'center_input_sample': (False,), 'mid_block_type': (None,), 'norm_num_groups': (None,),
        'time_embedding_type': ('fourier',), 'time_embedding_dim': (None,),
        'timestep_post_act': ('gelu',), 'conv_in_kernel': (1,), 'conv_out_kernel': (1,),
        'class_embed_type': (None,), 'addition_embed_type': (None,), 'encoder_hid_dim': (None,),
        'encoder_hid_dim_type': (None,), 'time_embedding_act_fn': (None,),
    },
    'vae': {'act_fn': ('silu', 'swish'), 'use_quant_conv': (True,), 'use_post_quant_conv': (True,),
            'mid_block_add_attention': (True,)},
    'tiny_vae': {'act_fn': ('relu',), 'upsample_fn': ('nearest',),
                 'upsampling_scaling_factor': (2,)},
    'text': {'model_type': ('clip_text_model', 'clip')},
    'vision': {'model_type': ('clip_vision_model', 'clip'), 'num_channels': (3,)},
    'dpt': {
        'is_hybrid': (True,), 'readout_type': ('project',), 'hidden_act': ('gelu',),
        'qkv_bias': (True,), 'reassemble_factors': ([1, 1, 1, 0.5],), 'num_channels': (3,),
        'neck_ignore_stages': ([0, 1],), 'head_in_index': (-1,), 'add_projection': (False,),
        'use_batch_norm_in_fusion_residual': (False,), 'use_bias_in_fusion_residual': (None, True),
    },
    'dpt_backbone': {
        'model_type': ('bit',), 'layer_type': ('bottleneck',), 'global_padding': ('same', 'SAME'),
        'embedding_dynamic_padding': (True,), 'hidden_act': ('relu',), 'output_stride': (32, None),
        'width_factor': (1,), 'num_channels': (3,),
    },
    'scheduler': {
        'use_flow_sigmas': (False,), 'timestep_type': ('discrete',), 'thresholding': (False,),
        'variance_type': ('fixed_small', 'fixed_small_log', 'fixed_large', 'fixed_large_log', None),
        'use_dynamic_shifting': (False,), 'shift_terminal': (None,), 'flow_shift': (1.0,),
    },
    'model_index': {  # classes of components; (None, None): there is none
        'unet': (('diffusers', 'UNet2DConditionModel'),),
        **dict.fromkeys(TEXT_ENCODERS, ((None, None), ('transformers', 'CLIPTextModel'),
                                        ('transformers', 'CLIPTextModelWithProjection'))),
        **dict.fromkeys(('tokenizer', 'tokenizer_2'),
                        ((None, None), ('transformers', 'CLIPTokenizer'),
                         ('transformers', 'CLIPTokenizerFast'))),
        'low_res_scheduler': ((None, None), ('diffusers', 'DDPMScheduler')),
        'depth_estimator': ((None, None), ('transformers', 'DPTForDepthEstimation')),
        'image_encoder': ((None, None), ('transformers', 'CLIPVisionModelWithProjection')),
    },
}

# Settings of which null is what diffusers takes them for where a file leaves them out.
_NULL = ('sample_size', 'num_class_embeds', 'addition_time_embed_dim', 'num_attention_heads',
         'time_cond_proj_dim', 'projection_class_embeddings_input_dim', 'shift_factor',
         'latents_mean', 'latents_std', 'trained_betas', 'sigma_min', 'sigma_max',
         'backbone_config', 'low_res_scheduler', 'depth_estimator', 'image_encoder',
         'force_zeros_for_empty_prompt', *TEXT_ENCODERS, 'tokenizer', 'tokenizer_2', '_class_name')

# Schedulers of diffusers whose models jaxsd samples: (beta_start, beta_end, beta_schedule) that
# they take where a file does not say. How they step and space timesteps is a request's to say.
BETAS_OF = {
    **dict.fromkeys((
        'DDIM', 'DDIMInverse', 'DDIMParallel', 'DDPM', 'DDPMParallel', 'DEISMultistep',
        'DPMSolverMultistep', 'DPMSolverMultistepInverse', 'DPMSolverSinglestep', 'PNDM',
        'SASolver', 'EulerAncestralDiscrete', 'EulerDiscrete', 'LMSDiscrete', 'UniPCMultistep'),
        (0.0001, 0.02, 'linear')),
    **dict.fromkeys(('DPMSolverSDE', 'HeunDiscrete', 'KDPM2AncestralDiscrete', 'KDPM2Discrete'),
                    (0.00085, 0.012, 'linear')),
    **dict.fromkeys(('LCM', 'TCD'), (0.00085, 0.012, 'scaled_linear')),
}
EDM_SCHEDULERS = ('EDMEuler', 'EDMDPMSolverMultistep')
_PIPELINE = re.compile(r'(StableDiffusion(XL)?|LatentConsistencyModel)(ControlNet|Adapter)?'
                       r'(Img2Img|Inpaint|Depth2Img|InstructPix2Pix|Upscale|LatentUpscale)?'
                       r'Pipeline(Legacy)?'
                       r'|StableUnCLIPImg2ImgPipeline')


# Settings that are taken apart before a config class checks them.
_LEVELS: tuple[Any, str] = (list, tuple), 'a list of one entry per level'
_KINDS = {'block_out_channels': _LEVELS, 'down_block_types': _LEVELS, 'up_block_types': _LEVELS,
          'backbone_config': (dict, 'an object of settings')}


def _settings(kind, content):
    """A config.json's settings over diffusers' defaults; ValueError for what is not implemented."""
    given = {k: v for k, v in content.items() if v is not None or k not in _NULL}
    settings = {**_DEFAULTS.get(kind, {}), **given}
    for key, (kinds, what) in _KINDS.items():
        if key in settings and not isinstance(settings[key], kinds):
            raise ValueError(f'{key}: expected {what}, found {settings[key]!r:.100}')
    for key, values in _FIXED[kind].items():
        found = settings.get(key, values[0])
        found = tuple(found) if isinstance(found, list) and isinstance(values[0], tuple) else found
        if not any(found == v and isinstance(found, bool) == isinstance(v, bool) for v in values):
            raise ValueError(f'{key}={found!r:.100} is not implemented; expected '
                             f'{" or ".join(map(repr, values))}')
    return settings


def _pick(cls, settings, **renamed):
    """Build `cls` from the settings that carry its fields' names."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{**{k: v for k, v in settings.items() if k in names}, **renamed})


def _index(content):
    """What model_index.json says -> {component: its class or None; setting: value}."""
    index = _settings('model_index', content)
    pipeline = index.get('_class_name', 'StableDiffusionPipeline')
    if not isinstance(pipeline, str) or not _PIPELINE.fullmatch(pipeline):
        raise ValueError(f'_class_name={pipeline!r:.100} is not implemented; expected a pipeline '
                         'of Stable Diffusion 1.x, 2.x or XL such as StableDiffusionXLPipeline')
    found = {}
    for part in (*TEXT_ENCODERS, 'low_res_scheduler', 'depth_estimator', 'image_encoder'):
        found[part] = index.get(part, (None, None))[1]
    if bool(found['image_encoder']) != pipeline.startswith('StableUnCLIP'):
        raise ValueError(f'image_encoder={found["image_encoder"]!r} of a {pipeline}: expected one '
                         'with StableUnCLIPImg2ImgPipeline alone; IP-Adapters have their own')
    for name, default in (('requires_aesthetics_score', False),
                          ('force_zeros_for_empty_prompt', None)):
        found[name] = index.get(name, default)
        if not isinstance(found[name], (bool, type(default))):
            raise ValueError(f'{name}: expected true or false, found {found[name]!r:.100}')
    found['_jaxsd'] = sampling_defaults(index.get('_jaxsd', {}))
    found['max_noise_level'] = level = index.get('max_noise_level', 350)
    if not isinstance(level, int) or not 0 <= level < 1000:
        raise ValueError(f'max_noise_level: expected a whole number from 0 to 999, found {level!r}')
    return found


def schedule_config(content: Mapping[str, Any]) -> ScheduleConfig:
    """What a scheduler_config.json says of the forward diffusion."""
    settings = _settings('scheduler', content)
    kind = str(settings.get('_class_name', 'DDIMScheduler')).removesuffix('Scheduler')
    if kind in EDM_SCHEDULERS:
        return _pick(ScheduleConfig, settings, edm=True)
    if kind not in BETAS_OF:
        raise ValueError(f'_class_name={kind + "Scheduler"!r:.100} is not implemented; expected '
                         f'one of {", ".join(sorted([*BETAS_OF, *EDM_SCHEDULERS]))}')
    defaults = dict(zip(('beta_start', 'beta_end', 'beta_schedule'), BETAS_OF[kind]))
    settings = {**defaults, **settings}
    edm = ('edm', 'sigma_min', 'sigma_max', 'sigma_data')  # others' sigmas are ends of a schedule
    return _pick(ScheduleConfig, {k: v for k, v in settings.items() if k not in edm})


def _distilled_for(content):
    """{'scheduler': its settings} of a scheduler that a model needs: LCM's and TCD's, and timesteps
    that begin with the last one, as of models distilled to few steps or trained to zero terminal
    SNR. Others, as 1.x's PNDM, are what was usual when the folder was written: {}."""
    name = str(content.get('_class_name')).removesuffix('Scheduler')
    if name not in ('LCM', 'TCD') and content.get('timestep_spacing') != 'trailing':
        return {}
    known = ('_diffusers_version', 'num_train_timesteps', 'prediction_type', *BETAS)
    return {'scheduler': {k: v for k, v in content.items() if k not in known}}


def sampling_defaults(given: Any) -> dict[str, Any]:
    """What a model says of how it is sampled, checked: arguments of a Request, and `scheduler`.

    A schedule is a name or a list of levels, and no file. Raises ValueError.
    """
    if not isinstance(given, dict):
        raise ValueError(f'_jaxsd: expected an object such as {{"steps": 4}}, found {given!r:.100}')
    kinds: dict[str, Any] = {
        'sampler': str, 'schedule': (str, list), 'steps': int, 'guidance': (int, float),
        'sampler_options': dict, 'schedule_options': dict, 'scheduler': dict}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f'_jaxsd: {name!r:.100} is unknown; expected some of '
                             f'{", ".join(kinds)}')
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise ValueError(f'_jaxsd: {name}={value!r:.100} is of the wrong kind')
        if name == 'schedule' and isinstance(value, str) and not value.isidentifier():
            raise ValueError(f'_jaxsd: schedule={value!r:.100}: expected a name, or a list of '
                             'noise levels')
    return given


def _text(content, kind, xl):
    settings = _settings('text', content)
    projected = kind == 'CLIPTextModelWithProjection'
    return _pick(TextConfig, settings, skip=int(xl), final_norm=not xl,
                 projection_dim=settings['projection_dim'] if projected else 0)


def _vision(content):
    return _pick(VisionConfig, _settings('vision', content))


def _image_normalizer(content):
    return _pick(ImageNormalizerConfig, content)


def _controlnet(content):
    down = content.get('down_block_types') or _DOWN
    up = [kind.replace('Down', 'Up') for kind in reversed(down)]
    found = _unet(content | {'up_block_types': up}, ControlNetConfig)
    if found.num_control_type:  # the first files of ControlNet-Union say that they are a ControlNet
        for key in ('num_trans_channel', 'num_proj_channel'):
            if (width := content.get(key, 320)) != found.block_out_channels[0]:
                raise ValueError(f'{key}={width!r:.100} is not implemented; expected the first of '
                                 f'block_out_channels, {found.block_out_channels[0]}')
    return found


def _controlnet_union(content):
    return _controlnet(_DEFAULTS['controlnet_union'] | content)


def _k_schedule(content):
    """That of the x2 latent upscaler. Its scheduler has 1.x's betas and says 'original_sample',
    which its pipeline makes of what the network says, as of an EDM model."""
    found = schedule_config({**content, 'prediction_type': 'epsilon'})
    if found != ScheduleConfig() or content.get('prediction_type') != 'original_sample':
        raise ValueError("expected 1.x's betas and prediction_type='original_sample', as of the x2 "
                         'latent upscaler')
    return K_SCHEDULE


# Of k-diffusion: the noise levels of 1.x's betas.
K_SCHEDULE = ScheduleConfig(edm=True, sigma_data=1.0, sigma_min=0.029167532920837402,
                            sigma_max=14.614642143249512)


def _kunet(content):
    settings = _settings('kunet', content)
    levels = len(settings['block_out_channels'])
    for key, side in (('down_block_types', 'Down'), ('up_block_types', 'Up')):
        kinds = [f'K{side}Block2D', *[f'KCrossAttn{side}Block2D'] * (levels - 1)]
        if list(settings[key]) != (kinds if side == 'Down' else kinds[::-1]):
            raise ValueError(f'{key}={settings[key]!r:.100}: expected one without attention at the '
                             'finest level, as of the x2 latent upscaler')
    single = {key: _alike(settings, key) for key in (
        'layers_per_block', 'cross_attention_dim', 'sample_size', 'attention_head_dim')
        if settings.get(key) is not None}
    return _pick(KUNetConfig, settings | single, out_channels=settings['out_channels'] - 1,
                 time_cond_dim=settings['time_cond_proj_dim'])


def _unet(content, cls=UNetConfig):
    if isinstance(content.get('down_block_types'), list | tuple) and (
            'KDownBlock2D' in content['down_block_types']):
        return _kunet(content)
    settings = _settings('unet', content)
    channels = settings.get('block_out_channels', UNetConfig.block_out_channels)
    levels = len(channels)
    layers, depths = _depths(settings, levels)
    kinds = settings['down_block_types'], settings['up_block_types']
    if any(len(found) != levels for found in kinds):
        raise ValueError(f'block_out_channels has {levels} levels, down_block_types and '
                         f'up_block_types have {len(kinds[0])} and {len(kinds[1])}')
    for kind, up in zip(kinds[0], reversed(kinds[1])):
        if (kind.replace('Down', 'Up') != up
                or kind not in ('DownBlock2D', 'CrossAttnDownBlock2D')):
            raise ValueError(f'blocks {kind!r} and {up!r} at one level are not implemented; '
                             'expected (CrossAttn)DownBlock2D and its Up twin')
    attention = [kind.startswith('CrossAttn') for kind in kinds[0]]
    heads = 'num_attention_heads' if settings.get('num_attention_heads') else 'attention_head_dim'
    added = settings.get('addition_embed_type') == 'text_time'
    projected = settings.get('class_embed_type') == 'projection'
    if (added or projected) and 'projection_class_embeddings_input_dim' not in settings:
        raise ValueError(f'{"addition_embed" if added else "class_embed"}_type='
                         f'{"text_time" if added else "projection"!r}: expected '
                         'projection_class_embeddings_input_dim as well')
    single = {key: _alike(settings, key) for key in
              ('layers_per_block', 'cross_attention_dim', 'sample_size') if key in settings}
    mid = {'UNetMidBlock2D': -1, None: -2}.get(
        settings.get('mid_block_type', 'UNetMidBlock2DCrossAttn'), layers[-1])
    if depths:
        each = single.get('layers_per_block', UNetConfig.layers_per_block)
        counts = [each] * levels + [each + 1] * levels
        depths = tuple(n * a for found, count, a in zip(depths, counts, attention + attention[::-1])
                       for n in _several(found, count))
    return _pick(
        cls, settings | single,
        transformer_layers=tuple(n * a for n, a in zip(layers, attention)),
        mid_transformer_layers=mid, transformer_depths=depths,
        heads=_per_level(settings, heads, 8, levels),
        only_cross_attention=_per_level(settings, 'only_cross_attention', False, levels),
        added_dim=settings['projection_class_embeddings_input_dim'] if added else 0,
        class_proj_dim=settings['projection_class_embeddings_input_dim'] if projected else 0,
        added_time_dim=settings.get('addition_time_embed_dim', 256))


def _depths(settings, levels):
    """transformer_layers_per_block of each level, and of the blocks of both halves, each one number
    or a list, in the order of the blocks; () where the levels say all."""
    down, up = (settings.get(f'{kind}transformer_layers_per_block') for kind in ('', 'reverse_'))
    if up is None:
        return _per_level(settings, 'transformer_layers_per_block', 1, levels), ()
    down, up = ([found] * levels if isinstance(found, int) else found
                for found in (1 if down is None else down, up))
    for name, found in (('', down), ('reverse_', up)):
        if not isinstance(found, list) or len(found) != levels:
            raise ValueError(f'{name}transformer_layers_per_block={found!r:.100}: expected one '
                             f'entry for each of the {levels} levels')
    return tuple(n[0] if isinstance(n, list) and n else n for n in down), (*down, *up)


def _several(value, count):
    """One number for each of `count` blocks."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise ValueError(f'transformer_layers_per_block: expected {count} numbers for the blocks '
                         f'of a level, found {value!r:.100}')
    return value


def _vae(content):
    settings = _settings('vae', content)
    levels = len(settings['block_out_channels'])
    for key, kind in (('down_block_types', 'DownEncoderBlock2D'),
                      ('up_block_types', 'UpDecoderBlock2D')):
        if list(settings[key]) != [kind] * levels:
            raise ValueError(f'{key}={settings[key]!r:.100} is not implemented; expected {kind!r} '
                             f'for each of the {levels} levels of block_out_channels')
    size = {'sample_size': _alike(settings, 'sample_size')}
    return _pick(VAEConfig, settings | size)


def _tiny_vae(content):
    return _pick(TinyVAEConfig, _settings('tiny_vae', content))


def _depth(content):
    settings = _settings('dpt', content)
    backbone = _settings('dpt_backbone', settings.get('backbone_config') or {})
    found = _pick(DPTConfig, backbone | settings)
    return dataclasses.replace(found, hidden_sizes=found.hidden_sizes[:len(found.depths)])


def _depth_anything(content):
    backbone = content.get('backbone_config') or {}
    for where, key, known in (
            (content, 'depth_estimation_type', ('relative',)), (content, 'head_in_index', (-1,)),
            (content, 'reassemble_factors', ([4, 2, 1, 0.5],)),
            (backbone, 'model_type', ('dinov2',)), (backbone, 'use_swiglu_ffn', (False,)),
            (backbone, 'hidden_act', ('gelu',)), (backbone, 'apply_layernorm', (True,)),
            (backbone, 'layer_norm_eps', (1e-6,)), (backbone, 'qkv_bias', (True,))):
        if where.get(key, known[0]) not in known:
            raise ValueError(f'{key}={where[key]!r:.100} is not implemented; expected {known[0]!r}')
    width, ratio = backbone.get('hidden_size', 768), backbone.get('mlp_ratio', 4)
    dinov2 = {'hidden_size': width, 'intermediate_size': int(width * ratio),
              'image_size': backbone.get('image_size', 224),
              'num_attention_heads': backbone.get('num_attention_heads', 12),
              'num_hidden_layers': backbone.get('num_hidden_layers', 12)}
    if 'out_indices' not in backbone:
        raise ValueError('backbone_config: expected out_indices in it')
    return _pick(DepthAnythingConfig, content | dinov2 | {'out_indices': backbone['out_indices']})


def _t2i_adapter(content):
    return _pick(T2IAdapterConfig, content)


# By diffusers' and transformers' names.
NETWORKS = {'AutoencoderKL': _vae, 'AutoencoderTiny': _tiny_vae,
            'ControlNetModel': _controlnet, 'ControlNetUnionModel': _controlnet_union,
            'T2IAdapter': _t2i_adapter,
            'DPTForDepthEstimation': _depth,
            'DepthAnythingForDepthEstimation': _depth_anything,
            'CLIPVisionModelWithProjection': _vision,
            'StableUnCLIPImageNormalizer': _image_normalizer}


def _per_level(settings, key, default, levels):
    """A setting that is one value, or a list of one per level."""
    value = settings.get(key, default)
    if not isinstance(value, (list, tuple)):
        return (value,) * levels
    if len(value) != levels or any(isinstance(v, (list, tuple)) for v in value):
        raise ValueError(f'{key}={value!r:.100} is not implemented; expected one value, or one '
                         f'for each of the {levels} levels')
    return tuple(value)


def _alike(settings, key):
    """A setting that is one value, or a list of one value again and again."""
    value = settings[key]
    if isinstance(value, (list, tuple)):
        if not value or any(v != value[0] for v in value):
            raise ValueError(f'{key}={value!r:.100} is not implemented; expected one value')
        return value[0]
    return value
