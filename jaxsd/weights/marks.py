"""What a single file says of its model beside the weights: marker tensors and its header's entries.

Markers are tensors that ComfyUI, A1111 and Forge look for and write. The header has the entries
of https://github.com/Stability-AI/ModelSpec, and one of our own that holds the whole ModelConfig:
names and shapes do not tell betas, zero terminal SNR, or how a VAE scales.
"""

import dataclasses
import json
import re
from typing import Any

import numpy as np

from jaxsd.config import (
    DPTConfig,
    ImageNormalizerConfig,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    VisionConfig,
)
from jaxsd.config_files import sampling_defaults, versions
from jaxsd.weights.files import Reader, printable

ENTRY = 'jaxsd.config'
MARKERS = ('v_pred', 'ztsnr', 'edm_vpred.sigma_max', 'edm_vpred.sigma_min', 'edm_mean', 'edm_std')
# Entries that say the prediction type, the first one counts, and the words for it.
PREDICTION_KEYS = ('modelspec.prediction_type', 'modelspec.predict_key', 'prediction_type',
                   'modelspec.architecture')
WORDS = {**dict.fromkeys(('epsilon', 'eps', 'noise', 'stable-diffusion-v2-512'), 'epsilon'),
         **dict.fromkeys(('v', 'v_prediction', 'v_pred', 'vpred', 'velocity',
                          'stable-diffusion-v2-768-v'), 'v_prediction'),
         **dict.fromkeys(('sample', 'x0'), 'sample')}
ARCHITECTURES = {
    'sd14': 'v1', 'sd15': 'v1', 'sd15_inpainting': 'v1-inpainting',
    **dict.fromkeys(('sd20', 'sd21', 'sd20_base', 'sd21_base'), 'v2-'), 'sd2_depth': 'v2-depth',
    'sd2_inpainting': 'v2-inpainting', 'sdxl': 'xl-v1-base', 'sdxl_inpainting': 'xl-v1-inpainting',
    'sdxl_refiner': 'xl-v1-refiner'}


def markers(config: ModelConfig) -> dict[str, np.ndarray]:
    """{name: array} of the marker tensors of a ModelConfig's single file."""
    schedule, vae = config.schedule, config.vae
    if schedule.edm and schedule.prediction_type == 'v_prediction':  # CosXL
        return {f'edm_vpred.{name}': np.array(getattr(schedule, name), np.float32)
                for name in ('sigma_max', 'sigma_min')}
    if schedule.edm:  # Playground v2.5
        shape = 1, vae.latent_channels, 1, 1
        return {name: np.array(values or [one] * shape[1], np.float32).reshape(shape)
                for name, values, one in (('edm_mean', vae.latents_mean, 0),
                                      ('edm_std', vae.latents_std, 1))}
    found = {'v_pred': schedule.prediction_type == 'v_prediction',
             'ztsnr': schedule.rescale_betas_zero_snr}
    return {name: np.zeros(0, np.float32) for name, marked in found.items() if marked}


def with_markers(config: ModelConfig, file: Reader) -> ModelConfig:
    """The config with what a file's marker tensors say; ValueError for EDM's that are unknown."""
    unknown = [name for name in file.shapes if name.startswith('edm') and name not in MARKERS]
    if unknown or ('edm_mean' in file.shapes) != ('edm_std' in file.shapes):
        raise ValueError(f'{file.path}: marks an EDM model with '
                         f'{", ".join(n for n in file.shapes if n.startswith("edm")):.200}; '
                         'expected edm_mean and edm_std, or edm_vpred.sigma_max and .sigma_min')
    found = {name: np.float32(file.read(name)) for name in MARKERS if name in file.shapes}
    written = markers(config)
    if found.keys() == written.keys() and all(
            np.array_equal(a.ravel(), written[name].ravel()) for name, a in found.items()):
        return config  # whose numbers may be more exact than float32
    change: dict[str, Any] = {}
    vae = config.vae
    if 'edm_vpred.sigma_max' in found:
        change = {'edm': True, 'prediction_type': 'v_prediction', 'sigma_data': 1.0} | {
            name: _number(file, f'edm_vpred.{name}', found)
            for name in ('sigma_max', 'sigma_min') if f'edm_vpred.{name}' in found}
    elif 'edm_mean' in found:
        edm = ('sigma_min', 'sigma_max', 'sigma_data')
        change = {name: getattr(ScheduleConfig, name) for name in edm} | {
            'edm': True, 'prediction_type': 'epsilon'}
        if not isinstance(vae, VAEConfig):
            raise ValueError(f'{file.path}: edm_mean and edm_std: expected a VAE beside them, '
                             'found a TAESD, whose latents have no mean and deviation')
        mean, std = (tuple(map(_float, found[name].ravel())) for name in ('edm_mean', 'edm_std'))
        try:
            vae = dataclasses.replace(vae, scaling_factor=0.5, latents_mean=mean, latents_std=std)
        except ValueError as error:
            raise ValueError(f'{file.path}: edm_mean and edm_std: {error}') from None
    elif 'v_pred' in found:
        change = {'prediction_type': 'v_prediction'}
    if 'ztsnr' in found:
        change['rescale_betas_zero_snr'] = True
    try:
        schedule = dataclasses.replace(config.schedule, **change)
    except ValueError as error:
        raise ValueError(f'{file.path}: its marker tensors {", ".join(found)}: {error}') from None
    return config.replace(schedule=schedule, vae=vae)


def _number(file, name, found):
    if found[name].size != 1:
        raise ValueError(f'{file.path}: {name}: expected one number, found shape '
                         f'{list(found[name].shape)}')
    return _float(found[name].ravel()[0])


def _float(number):
    """A float32 as the decimal that it stands for: 0.002, not 0.0020000000949949026."""
    return float(str(number))


def predictions(file: Reader) -> list[tuple[str, str]]:
    """What a file says that its model predicts: [(what, where it says so)], the strongest first.

    A word that stands for none of the prediction types is given as it is.
    """
    found = []
    for name, kind in (('edm_vpred.sigma_max', 'v_prediction'), ('edm_mean', 'epsilon'),
                       ('v_pred', 'v_prediction')):
        if name in file.shapes:
            found.append((kind, f'the tensor {name}'))
    if (entry := read_entry(file)) is not None:
        found.append((entry.schedule.prediction_type, f'the header\'s {ENTRY}'))
    for key in PREDICTION_KEYS:
        word = str(file.metadata.get(key) or '').strip().lower()
        if word in WORDS or word and key != 'modelspec.architecture':
            found.append((WORDS.get(word.replace('-', '_'), WORDS.get(word, word[:40])),
                          f'the header\'s {key}'))
    return found


def native_size(file: Reader) -> int | None:
    """The pixels per side in a header's `modelspec.resolution` ('1024x1024'); None if not said."""
    found = re.fullmatch(r'(\d{2,4})(?:x\1)?', str(file.metadata.get('modelspec.resolution', '')))
    size = int(found[1]) if found else 0
    return size if 64 <= size <= 4096 and size % 64 == 0 else None


def metadata(config: ModelConfig, title: str) -> dict[str, str]:
    """{entry: text} of a ModelConfig's single file."""
    predicts = config.schedule.prediction_type.replace('v_prediction', 'v')
    spec = {'sai_model_spec': '1.0.0', 'title': title, 'prediction_type': predicts,
            'resolution': '{0}x{0}'.format(config.unet.sample_size * config.vae.factor)}
    if config.version in ARCHITECTURES:
        kind = ARCHITECTURES[config.version]
        kind += {'v': '768-v'}.get(predicts, '512') if kind == 'v2-' else ''
        spec |= {'architecture': f'stable-diffusion-{kind}',
                 'implementation': 'https://github.com/Stability-AI/generative-models'}
    whole = dataclasses.asdict(config.replace(controlnets=(), ip_adapters=(), tiling=''))
    del whole['controlnets'], whole['ip_adapters'], whole['tiling']
    new = (whole, 'defaults'), *((whole, part) for part in (
        'image_encoder', 'image_normalizer', 'image_noise')), (whole['unet'], 'class_proj_dim')
    for fields, name in new:  # which older versions do not know
        if not fields[name]:
            del fields[name]
    return {f'modelspec.{name}': text for name, text in spec.items()} | {
        ENTRY: json.dumps(whole, separators=(',', ':'), allow_nan=False)}


def read_entry(file: Reader) -> ModelConfig | None:
    """The ModelConfig in a header's entry of ours; None where there is none.

    Raises ValueError of one line for an entry that is not what `metadata` writes.
    """
    if ENTRY not in file.metadata:
        return None
    try:
        given = json.loads(file.metadata[ENTRY])
        tiny = 'num_encoder_blocks' in given['vae']
        kinds = {'unet': UNetConfig, 'vae': TinyVAEConfig if tiny else VAEConfig,
                 'schedule': ScheduleConfig, 'low_res': ScheduleConfig, 'text_encoder': TextConfig,
                 'text_encoder_2': TextConfig, 'depth_estimator': DPTConfig,
                 'image_encoder': VisionConfig, 'image_normalizer': ImageNormalizerConfig,
                 'image_noise': ScheduleConfig}
        parts: dict[str, Any] = {
            name: kinds[name](**value) if name in kinds and value is not None else value
            for name, value in given.items()}
        sampling_defaults(parts.get('defaults', {}))
        if parts.get('version') not in versions():
            parts['version'] = 'custom'
        config = ModelConfig(**parts)
        for name in ('max_noise_level', 'aesthetic', 'zero_negative'):
            if type(getattr(config, name)) is not type(getattr(ModelConfig, name)):
                raise ValueError(f'{name}={getattr(config, name)!r:.100}')
        if (None in (config.unet, config.vae, config.schedule) or config.controlnets
                or config.ip_adapters or config.tiling or not 0 <= config.max_noise_level < 1000):
            raise ValueError('no unet, vae or schedule, or a max_noise_level beyond 0 to 999')
        return config
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError,
            RecursionError) as error:
        raise ValueError(printable(
            f'{file.path}: its header\'s {ENTRY} is damaged or of another version of jaxsd '
            f'({str(error):.200}); give config=')) from None
