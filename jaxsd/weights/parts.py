"""Read and write one network alone: a VAE, a ControlNet, a T2I-Adapter, a depth estimator, an image
encoder, an upscaler, a face restorer, a detector."""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import traverse_util
from jax.typing import DTypeLike

from jaxsd.config import (
    Checked,
    ControlNetConfig,
    DepthAnythingConfig,
    DPTConfig,
    KUNetConfig,
    T2IAdapterConfig,
    TinyVAEConfig,
    VAEConfig,
    VisionConfig,
)
from jaxsd.config_files import VERSIONS, read_config, read_network_config
from jaxsd.models import codeformer, detector, gfpgan, spec, upscaler
from jaxsd.typing import Device, Path
from jaxsd.weights import control_loras, hub, names
from jaxsd.weights.configs import write_network_config
from jaxsd.weights.files import (
    as_dtype,
    component_files,
    open_tensors,
    printable,
    write_tensors,
)
from jaxsd.weights.model import Model, Network
from jaxsd.weights.reading import Source, network_tensors, squeeze
from jaxsd.weights.writing import LAYOUTS, check, replacing_folder, stored, write_component


class Kind(NamedTuple):
    """A kind of network.

    what: its name in messages; classes: what a config.json may say that it is; released(): the
    configs to try for a file without a config.json; prefixes: what its names may start with in
    single files.
    """

    what: str
    classes: tuple
    released: Callable[[], list]
    prefixes: tuple = ('',)


def _vaes():
    """1.x to SDXL share names and shapes, so a file does not tell what else sets them apart."""
    unsaid = dict.fromkeys(('scaling_factor', 'shift_factor', 'latents_mean', 'latents_std',
                            'force_upcast', 'sample_size'))
    return [TinyVAEConfig(), *(dataclasses.replace(read_config(version).vae, **unsaid)
                               for version in ('sd15', 'x4_upscaler'))]


def _controlnets():
    return [read_network_config(VERSIONS / f'controlnet_{version}')
            for version in ('sd15', 'sd21', 'sdxl')]


def _with_modes(config, shapes):
    """A ControlNet's config with the modes of a ControlNet-Union that its tensors show: the first
    config.json files of these did not say them. shapes: {name: shape}."""
    modes = [shape[0] for name, shape in shapes.items()
             if name.endswith('task_embedding') and shape]
    if not modes or not isinstance(config, ControlNetConfig):
        return config
    layers = sum(name.endswith('.attn.in_proj_weight') for name in shapes)
    return dataclasses.replace(config, num_control_type=modes[0], num_trans_layer=max(layers, 1))


def _t2i_adapters():
    kinds = (T2IAdapterConfig(),
             T2IAdapterConfig(downscale_factor=16, adapter_type='full_adapter_xl'),
             T2IAdapterConfig(channels=(320, 640, 1280), num_res_blocks=4,
                              adapter_type='light_adapter'))
    return [dataclasses.replace(c, in_channels=n) for c in kinds for n in (3, 1)]  # 1: gray hints


def _depth_estimators():
    """MiDaS' hybrid DPT, and Depth Anything 2, small, base and large."""
    return [DPTConfig(), *(DepthAnythingConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64,
        num_hidden_layers=layers, out_indices=read, neck_hidden_sizes=neck, fusion_hidden_size=fused
        ) for width, layers, read, neck, fused in (
            (384, 12, (3, 6, 9, 12), (48, 96, 192, 384), 64),
            (768, 12, (3, 6, 9, 12), (96, 192, 384, 768), 128),
            (1024, 24, (5, 12, 18, 24), (256, 512, 1024, 1024), 256)))]


def _image_encoders():
    """OpenCLIP's ViT-H/14 and ViT-bigG/14, and OpenAI's ViT-L/14."""
    return [VisionConfig(), VisionConfig(hidden_size=1664, intermediate_size=8192,
                                         num_hidden_layers=48, projection_dim=1280),
            VisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                         hidden_act='quick_gelu', projection_dim=768)]


KINDS = {
    'vae': Kind('VAE', ('AutoencoderKL', 'AutoencoderTiny'), _vaes, ('', 'first_stage_model.')),
    'controlnet': Kind('ControlNet', ('ControlNetModel', 'ControlNetUnionModel'),
                       _controlnets, ('', 'control_model.')),
    't2i_adapter': Kind('T2I-Adapter', ('T2IAdapter',), _t2i_adapters),
    'depth_estimator': Kind('depth estimator', (
        'DPTForDepthEstimation', 'DepthAnythingForDepthEstimation'), _depth_estimators,
                            ('', 'depth_model.model.')),
    'image_encoder': Kind('CLIP image encoder', ('CLIPVisionModelWithProjection',), _image_encoders,
                          ('', 'visual.')),
}


# The kind of a config, whose files have original names.
ORIGINAL = {VAEConfig: 'vae', TinyVAEConfig: 'vae', ControlNetConfig: 'controlnet',
            T2IAdapterConfig: 't2i_adapter', DPTConfig: 'depth_estimator',
            DepthAnythingConfig: 'depth_estimator',
            VisionConfig: 'image_encoder'}


def load_vae(path: Path, dtype: DTypeLike | None = 'float32',
             config: VAEConfig | TinyVAEConfig | None = None,
             device: 'Device | None' = None) -> Network:
    """Read a VAE, a Network for `model.with_vae`; arguments as of `load_part`."""
    return load_part('vae', path, dtype, config, device)


def load_controlnet(path: Path, dtype: DTypeLike | None = 'float32',
                    config: ControlNetConfig | None = None,
                    device: 'Device | None' = None, base: Model | None = None) -> Network:
    """Read a ControlNet, a Network; arguments as of `load_part`.

    base: the model whose U-Net a Control-LoRA's factors are added to; others do not need it.
    Raises ValueError for a Control-LoRA without it, or with another model.
    """
    found = pathlib.Path(path).expanduser()
    if not found.is_file() or not control_loras.is_control_lora(
            (file := open_tensors(found)).shapes):
        return load_part('controlnet', path, dtype, config, device)
    if base is None or isinstance(base.config.unet, KUNetConfig):
        raise ValueError(f'{path}: a Control-LoRA, of which a ControlNet is made with the U-Net of '
                         'a model of its version: give it as base=model')
    config = config or control_loras.config_for(base.config.unet, file.shapes)
    merged = control_loras.MergedFile(file, config, base)
    tensors: dict = {name: (merged, name) for name in merged.shapes}
    params, _ = _source('controlnet', path, config, tensors, _places(
        'controlnet', config, '', ())).read(as_dtype(dtype), device)
    return Network(config, params['controlnet'])


def load_t2i_adapter(path: Path, dtype: DTypeLike | None = 'float32',
                     config: T2IAdapterConfig | None = None,
                     device: 'Device | None' = None) -> Network:
    """Read a T2I-Adapter, a Network; arguments as of `load_part`."""
    return load_part('t2i_adapter', path, dtype, config, device)


def is_t2i_adapter(path: Path) -> bool:
    """Whether a file, or a folder of diffusers, holds a T2I-Adapter. Raises as `open_tensors`."""
    found = pathlib.Path(path).expanduser()
    if found.is_file():
        return names.kind(open_tensors(found).shapes)[1] == 'load_t2i_adapter'
    said = found / 'config.json'
    return said.is_file() and '"T2IAdapter"' in said.read_text('utf-8', 'replace')


def load_depth_estimator(path: Path, dtype: DTypeLike | None = 'float32',
                         config: DPTConfig | DepthAnythingConfig | None = None,
                         device: 'Device | None' = None) -> Network:
    """Read MiDaS' hybrid DPT or Depth Anything, a Network for `run.depth.estimate`; arguments as of
    `load_part`."""
    return load_part('depth_estimator', path, dtype, config, device)


def load_image_encoder(path: Path, dtype: DTypeLike | None = 'float32',
                       config: VisionConfig | None = None,
                       device: 'Device | None' = None) -> Network:
    """Read CLIP's vision transformer, a Network for `load_ip_adapter`; arguments as of
    `load_part`."""
    return load_part('image_encoder', path, dtype, config, device)


def load_part(kind: str, path: Path, dtype: DTypeLike | None = 'float32',
              config: Checked | None = None, device: 'Device | None' = None) -> Network:
    """Read one network of a kind in KINDS from a folder, a file or the Hub.

    path: a folder with a config.json; a whole model's folder or file, of which it takes this
        component; a file (.safetensors, or a pickle of torch.save) in the original or in
        diffusers' names; or a Hub id ('owner/name') where there is no such path.
    dtype, device: as of `load`. config: replaces what config.json, or names and shapes, say.
    Raises ValueError that lists everything that is wrong with the tensors; ValueError or
    FileNotFoundError of one line for files that cannot be read or are of another kind.
    """
    dtype = as_dtype(dtype)
    half = dtype is not None and dtype.itemsize == 2
    found = pathlib.Path(path).expanduser()
    if not found.exists():
        found = hub.shipped(path)
        if found is None and not hub.is_hub_id(path):
            raise FileNotFoundError(f'{path}: no such file or folder')
        found = found or hub.download(str(path), half, kind)
    source = (_open_folder(kind, found, config, half) if found.is_dir()
              else _open_file(kind, found, config))
    params, _ = source.read(dtype, device)
    return Network(source.config, params[kind])


def load_upscaler(path: Path, dtype: DTypeLike | None = 'float32',
                  device: 'Device | None' = None) -> Network:
    """Read a network that enlarges pictures, a Network for `jaxsd.upscale` and `Hires`.

    path: a file of an RRDBNet (ESRGAN, Real-ESRGAN, BSRGAN and what was trained from them), a
        SRVGGNetCompact or a SwinIR, of colours, in any of the names that such files have; .pth or
        .safetensors. Its tensors say which it is.
    dtype, device: as of `load`. Raises as `load_part`.
    """
    return _by_tensors(path, 'upscaler', open_tensors(pathlib.Path(path).expanduser()), upscaler,
                       'an ESRGAN, a Real-ESRGAN, a Compact or a SwinIR', dtype, device)


def load_face_restorer(path: Path, dtype: DTypeLike | None = 'float32',
                       device: 'Device | None' = None) -> Network:
    """Read a network that restores faces, a Network for `jaxsd.restore_faces`.

    path: a file of GFPGAN v1.2, v1.3 or v1.4 (GFPGANv1.4.pth) or of CodeFormer (codeformer.pth),
        .pth or .safetensors. Its tensors say which it is.
    dtype, device: as of `load`; float16 is too narrow for both. Raises as `load_part`.
    """
    file = open_tensors(pathlib.Path(path).expanduser())
    module = codeformer if any('ft_layers.' in name for name in file.shapes) else gfpgan
    network = _by_tensors(path, 'face restorer', file, module, 'GFPGAN v1.2, v1.3 or v1.4, or '
                          'CodeFormer', dtype, device)
    if any(a.dtype == 'float16' for a in jax.tree.leaves(network.params)):
        raise ValueError(printable(f'{path} in float16: expected float32 or bfloat16, face '
                                   'restorers exceed what float16 holds'))
    return network


def load_detector(path: Path, dtype: DTypeLike | None = 'float32',
                  device: 'Device | None' = None) -> Network:
    """Read a network that finds what a ControlNet is to follow, a Network for `jaxsd.detect`.

    path: a file of lllyasviel/Annotators (body_pose_model.pth, hand_pose_model.pth, facenet.pth,
        ControlNetHED.pth, sk_model.pth, sk_model2.pth, netG.pth, mlsd_large_512_fp32.pth,
        scannet.pt), .pth or .safetensors, whose tensors say which it is; or a depth estimator, see
        `load_depth_estimator`.
    dtype, device: as of `load`. Raises as `load_part`.
    """
    found = pathlib.Path(path).expanduser()
    if not found.is_file():
        return load_depth_estimator(path, dtype, device=device)
    file = open_tensors(found)
    what, reader, _ = names.kind(file.shapes)
    if reader == 'load_depth_estimator':
        return load_depth_estimator(path, dtype, device=device)
    return _by_tensors(path, 'detector', file, detector, 'OpenPose, HED, lineart, M-LSD, '
                       'NormalBae, MiDaS or Depth Anything', dtype, device)


def _by_tensors(path, kind, file, module, expected, dtype, device):
    """A file whose config a module of models/ reads off its tensors -> Network. expected: what the
    ValueError for others says."""
    tensors = {name: (file, inner) for name, inner in module.renamed(file.shapes).items()}
    try:
        config = module.config_of({name: file.shapes[inner]
                                   for name, (_, inner) in tensors.items()})
    except (ValueError, LookupError) as error:
        what, reader, _ = names.kind(file.shapes)
        itself = f'load_{kind.replace(" ", "_")}'
        use = (f'expected {expected}' if reader in ('', itself) else
               f'read it with jaxsd.{reader}')
        raise ValueError(printable(
            f'{path}: not {"an" if kind[0] in "aeiou" else "a"} {kind} that jaxsd knows ({error}), '
            f'by its {len(file.shapes)} tensors such as {", ".join(list(file.shapes)[:3])} it is '
            f'{what}; {use}')) from None
    table = spec.names(config)
    source = Source(path, config, {kind: table}, tensors,
                    {kind: {name: names.Place(name) for name in table}}, [])
    params, _ = source.read(as_dtype(dtype), device)
    return Network(config, params[kind])


def save_network(network: Network, path: Path, dtype: DTypeLike | None = None,
                 layout: str = 'diffusers') -> None:
    """Write one network as a folder that diffusers reads, config.json and its weights, or as one
    .safetensors file in the original names (of a ControlNet: control_model. ...; those of a
    ControlNet-Union are diffusers').

    layout: 'diffusers' or 'single-file'; a file of other sizes than the released ones needs
        `config` to be read again. dtype: of all weights in the file; None keeps each array's own.
    Raises ValueError when the arrays are not those of the config, or it leaves something unsaid.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout {layout!r}: expected one of {LAYOUTS}')
    unsaid = [name for name, value in vars(network.config).items() if value is None]
    if unsaid:
        raise ValueError(f'the config does not say {", ".join(unsaid)}, which a config.json has '
                         'to; set them with dataclasses.replace')
    shapes, path = spec.names(network.config), pathlib.Path(path).expanduser()
    arrays = traverse_util.flatten_dict(network.params, sep='.')
    check({'network': shapes}, {'network': arrays})
    if layout == 'single-file':
        if path.is_dir() or path.suffix != '.safetensors':
            raise ValueError(f'{path}: expected the name of a .safetensors file')
        kind = next(k for c, k in ORIGINAL.items() if isinstance(network.config, c))
        prefix = {'controlnet': 'control_model.', 'image_encoder': 'visual.'}.get(kind, '')
        if getattr(network.config, 'num_control_type', 0):
            prefix = ''
        table = names.network_places(kind, network.config, shapes, prefix)
        write_tensors(path, stored(arrays, shapes, table, as_dtype(dtype)))
        return
    with replacing_folder(path) as temporary:
        write_network_config(network.config, temporary)
        theirs = isinstance(network.config, (DPTConfig, DepthAnythingConfig, VisionConfig))
        part = 'depth_estimator' if theirs else 'network'
        write_component(temporary, part, shapes, arrays, as_dtype(dtype))


def _open_folder(kind, folder, config, half):
    inside = next((f for f in (folder, folder / kind) if (f / 'config.json').exists()), None)
    if inside is None:
        raise FileNotFoundError(f'{folder}: has no config.json and no {kind}/config.json; expected '
                                f'the folder of a {KINDS[kind].what} or of a whole model')
    said = config or read_network_config(inside, KINDS[kind].classes)
    tensors = network_tensors(kind, component_files(inside, half))
    config = config or _with_modes(said, {name: file.shapes[inner]
                                          for name, (file, inner) in tensors.items()})
    tensors = {n: where for n, where in tensors.items()
               if kind not in ('image_encoder', 'depth_estimator') or not names.is_extra(n, config)}
    return _source(kind, inside, config, tensors, _places(kind, config, '', tensors))


def _open_file(kind, path, config):
    """As the config and the layout, of all that are possible, that most tensors agree with."""
    what, _, released, prefixes = KINDS[kind]
    tensors = network_tensors(kind, [open_tensors(path)])
    if all(name[0].isdigit() for name in tensors):
        tensors = _taesd(path)
    shapes = {name: file.shapes[inner] for name, (file, inner) in tensors.items()}
    options = [(c, prefix, _places(kind, c, prefix, shapes))
               for c in ([config] if config else [_with_modes(c, shapes) for c in released()])
               for prefix in prefixes]

    def agreement(option):
        expected = spec.names(option[0])
        same = sum(squeeze(shapes[place.name]) == squeeze(place.shape(expected[name]))
                   for name, place in option[2].items() if place.name in shapes)
        return same / len(expected)

    best = max(options, key=agreement)
    if agreement(best) < 0.25:
        raise ValueError(printable(
            f'{path}: not a {what} that jaxsd knows, by its {len(shapes)} tensors such as '
            f'{", ".join(list(shapes)[:3])} it is {names.kind(shapes)[0]}; give a {what}, or '
            'config= for one of other sizes'))
    config, prefix, places = best
    if isinstance(config, DepthAnythingConfig) and path.name.startswith('depth_anything_vit'):
        last = config.num_hidden_layers  # the first version reads others: its files' names say it
        config = dataclasses.replace(config, out_indices=tuple(range(last - 3, last + 1)))
    used = {place.name for place in places.values()}
    return _source(kind, path, config, {
        name: where for name, where in tensors.items() if (name in used or name.startswith(prefix))
        and not names.is_extra(name.removeprefix(prefix), config)}, places)


def _taesd(path):
    """The tensors of TAESD's own two files, as one: path is either of them."""
    found = {}
    for side in ('encoder', 'decoder'):
        file = open_tensors(path.with_name(re.sub('encoder|decoder', side, path.name)))
        found |= {f'taesd_{side}.{name}': (file, name) for name in file.shapes}
    return found


def _places(kind, config, prefix, stored):
    return names.network_places(kind, config, spec.names(config), prefix, stored)


def _source(kind, path, config, tensors, places):
    return Source(path, config, {kind: spec.names(config)}, tensors, {kind: places}, [])
