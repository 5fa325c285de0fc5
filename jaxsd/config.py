"""The static description of a model: what the config.json files of a diffusers folder say."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

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
class GFPGANConfig(Checked):
    """GFPGAN, see models/gfpgan.py. channels: of its U-Net at 4, 8, 16 ... pixels; the
    generator has twice as many. style: numbers of a layer's style."""

    channels: tuple = ranged((256, 256, 256, 256, 256, 128, 64, 32), 1, WIDTH)
    style: int = ranged(512, 1, WIDTH)

    def check(self) -> None:
        if not 2 <= len(self.channels) <= 9:
            raise ValueError(f'channels: expected 2 to 9 numbers, found {len(self.channels)}')

    @property
    def size(self) -> int:
        """Pixels along the sides of a face."""
        return 2 ** (len(self.channels) + 1)


@dataclasses.dataclass(frozen=True)
class CodeFormerConfig(Checked):
    """CodeFormer, see models/codeformer.py. channels: at each size, from the largest; codebook: its
    entries, of `codes` numbers; connect: sizes at which the generator sees the encoder's features;
    width, layers and heads: of the transformer, over latent x latent places."""

    channels: tuple = ranged((64, 128, 128, 256, 256, 512), 1, WIDTH)
    codes: int = ranged(256, 1, WIDTH)
    codebook: int = ranged(1024, 1, WIDTH)
    width: int = ranged(512, 1, WIDTH)
    layers: int = ranged(9, 1, 256)
    heads: int = ranged(8, 1, WIDTH)
    latent: int = ranged(16, 1, 256)
    connect: tuple = ranged((32, 64, 128, 256), 1, WIDTH)

    def check(self) -> None:
        if not 2 <= len(self.channels) <= 9:
            raise ValueError(f'channels: expected 2 to 9 numbers, found {len(self.channels)}')
        self.divisible('width', [self.width], 'heads', [self.heads])
        sizes = [self.size >> i for i in range(len(self.channels) - 1)]
        if not set(self.connect) <= set(sizes):
            raise ValueError(f'connect={self.connect}: expected sizes among {sizes}')

    @property
    def size(self) -> int:
        """Pixels along the sides of a face."""
        return self.latent << (len(self.channels) - 1)


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
