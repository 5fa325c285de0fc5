"""Every released file converts to exactly the spec: real names and shapes, without the data."""

import dataclasses
import gzip
import json
import pathlib

import pytest
from tiny import sparse_file

from jaxsd.config_files import read_config, versions
from jaxsd.models.spec import count, spec
from jaxsd.models.spec import names as names_of
from jaxsd.weights import names, write_config
from jaxsd.weights.reading import open_folder, open_single

HERE = pathlib.Path(__file__).resolve()
DATA = HERE.parents[1] / 'data' / 'manifests'
SHARED = HERE.parents[3] / 'shared' / 'manifests'  # the originals, if beside the clone
SINGLE, FOLDERS = (json.loads(gzip.decompress((DATA / f'{kind}.json.gz').read_bytes()))
                   for kind in ('singlefile', 'diffusers'))

# single file: the version that it is; how many of its tensors the model does not use, and how many
# belong to the averaged copy.
FILES = {
    'sd15_emaonly': ('sd15', 15, 0), 'sd15_with_ema': ('sd15', 15, 686),
    'sd15_inpainting': ('sd15_inpainting', 15, 0), 'sd2': ('sd21', 28, 0),
    'sd2_inpainting': ('sd2_inpainting', 28, 0), 'sd2_depth': ('sd2_depth', 28 + 2, 0),
    'sdxl_base': ('sdxl', 4, 0), 'sdxl_refiner': ('sdxl_refiner', 3, 0),
    'sd2_x4_upscaler': ('x4_upscaler', 36, 0),
}
UNETS = {'sd1': 859_520_964, 'sd2': 865_910_724, 'sd15_inpainting': 859_535_364,
         'sd2_inpainting': 865_925_124, 'sd2_depth': 865_913_604, 'sdxl': 2_567_463_684,
         'sdxl_inpainting': 2_567_478_084, 'sdxl_refiner': 2_259_526_660,
         'x4_upscaler': 473_398_020, 'sd15_pix2pix': 859_532_484, 'sdxl_pix2pix': 2_567_475_204}
TEXTS = {'sd1': (123_060_480, 0), 'sd2': (340_387_840, 0), 'sdxl': (123_060_480, 694_659_840),
         'sdxl_refiner': (0, 694_659_840), 'x4_upscaler': (340_387_840, 0)}


def test_copies_are_the_originals():
    if not SHARED.exists():
        pytest.skip('the original manifests are not beside this clone')
    for kind, copies in (('singlefile', SINGLE), ('diffusers', FOLDERS)):
        for name, copy in copies.items():
            assert copy == json.loads((SHARED / kind / f'{name}.json').read_text()), name


@pytest.mark.slow
@pytest.mark.parametrize('name', FILES)
def test_single_file(name, tmp_path):
    version, extras, ema = FILES[name]
    path = tmp_path / 'model.safetensors'
    sparse_file(path, SINGLE[name])
    source = open_single(path, None, False, None)
    assert source.config == read_config(version)
    assert source.mismatches() == {}
    assert len(source.extras) == extras
    places = {p.name for table in source.places.values() for p in table.values()}
    assert len(places) + extras + ema == len(SINGLE[name])


@pytest.mark.slow
@pytest.mark.parametrize('name, version', [('sd15_with_ema', 'sd15_pix2pix'),
                                           ('sdxl_base', 'sdxl_pix2pix')])
def test_single_file_of_instruct_pix2pix(name, version, tmp_path):
    """timbrooks/instruct-pix2pix and CosXL Edit: a release's tensors but for the input channels."""
    shapes, first = dict(SINGLE[name]), 'model.diffusion_model.input_blocks.0.0.weight'
    shapes[first] = [shapes[first][0], 8, 3, 3]
    sparse_file(tmp_path / 'model.safetensors', shapes)
    source = open_single(tmp_path / 'model.safetensors', None, False, None)
    assert source.config == read_config(version) and source.config.version == version
    assert source.mismatches() == {}


@pytest.mark.slow
@pytest.mark.parametrize('width', [1024, 768])
def test_single_file_of_unclip(width, tmp_path):
    """sd21-unclip-h and -l: 2.1's tensors, and those of their embedder and augmentor."""
    layers, wide = (32, 1280) if width == 1024 else (24, 1024)
    shapes, unet = dict(SINGLE['sd2']), 'model.diffusion_model.label_emb.0'
    shapes |= {f'{unet}.0.weight': [1280, 2 * width], f'{unet}.0.bias': [1280],
               f'{unet}.2.weight': [1280, 1280], f'{unet}.2.bias': [1280]}
    at = 'embedder.model.visual'
    shapes |= {f'{at}.conv1.weight': [wide, 3, 14, 14], f'{at}.class_embedding': [wide],
               f'{at}.positional_embedding': [257, wide], f'{at}.proj': [wide, width],
               'embedder.model.logit_scale': [], 'embedder.model.text_projection': [wide, width],
               'noise_augmentor.betas': [1000], 'noise_augmentor.data_mean': [1, width],
               'noise_augmentor.data_std': [1, width]}
    for norm in ('ln_pre', 'ln_post'):
        shapes |= {f'{at}.{norm}.weight': [wide], f'{at}.{norm}.bias': [wide]}
    for i in range(layers):
        block = f'{at}.transformer.resblocks.{i}'
        for name, rows, columns in (('attn.out_proj', wide, wide), ('mlp.c_fc', 4 * wide, wide),
                                    ('mlp.c_proj', wide, 4 * wide)):
            shapes |= {f'{block}.{name}.weight': [rows, columns], f'{block}.{name}.bias': [rows]}
        shapes |= {f'{block}.attn.in_proj_weight': [3 * wide, wide],
                   f'{block}.attn.in_proj_bias': [3 * wide]}
        for norm in ('ln_1', 'ln_2'):
            shapes |= {f'{block}.{norm}.weight': [wide], f'{block}.{norm}.bias': [wide]}
    sparse_file(tmp_path / 'model.safetensors', shapes)
    source = open_single(tmp_path / 'model.safetensors', None, False, None)
    source.config.check_fit()
    assert source.config.task == 'unclip' and source.mismatches() == {}
    assert len(source.extras) == 28 + 3


@pytest.mark.slow
@pytest.mark.parametrize('name', FILES)
def test_every_lost_or_changed_tensor_is_noticed(name, tmp_path):
    shapes = dict(SINGLE[name])
    config = read_config(FILES[name][0])
    used = [n for n in shapes if not names.is_extra(n, config) and not names.is_ema(n)]
    gone, changed = used[7], used[-3]
    del shapes[gone]
    shapes[changed] = [*shapes[changed][:-1], shapes[changed][-1] + 1]
    shapes['stray.weight'] = [1]
    sparse_file(tmp_path / 'model.safetensors', shapes)
    problems = open_single(tmp_path / 'model.safetensors', None, False, None).mismatches()
    assert {kind: list(found) for kind, found in problems.items()} == {
        'missing': [gone], 'mis-shaped': [changed], 'unexpected': ['stray.weight']}


@pytest.mark.parametrize('version', ['sd15', 'sd15_inpainting', 'sd21', 'sd2_inpainting',
                                     'sd2_depth', 'sdxl', 'sdxl_refiner', 'x4_upscaler', 'old'])
def test_folder(version, tmp_path):
    """The released folders; 'old' has SD 1.5's float32 VAE with its old attention names."""
    config = read_config('sd15' if version == 'old' else version)
    prefix = {'sdxl': 'sdxl_base', 'old': 'sd15'}.get(version, version)
    for part in spec(config):
        stem = 'model' if part.startswith(('text', 'depth')) else 'diffusion_pytorch_model'
        name = f'{prefix}_{part}' + '_old_attention_names' * (version == 'old' and part == 'vae')
        if name not in FOLDERS:  # 2.x's depth and inpainting folders share these with 2.1
            name = f'sd21_{part}'
        sparse_file(tmp_path / part / f'{stem}.safetensors', FOLDERS[name])
    source = open_folder(tmp_path, config, False, None)
    assert source.mismatches() == {}
    assert source.extras == []


@pytest.mark.parametrize('version', versions())
def test_parameter_counts(version):
    """The published counts; every config in the package has one."""
    shapes = spec(read_config(version))

    def of(table):  # an entry of its own, or its family's
        return table.get(version) or table['sdxl' if 'xl' in version else version[:3]]
    assert count(shapes['unet']) == of(UNETS)
    assert count(shapes['vae']) == (55_325_927 if version == 'x4_upscaler' else 83_653_863)
    assert tuple(count(shapes.get(t, {})) for t in ('text_encoder', 'text_encoder_2')) == of(TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize('keys, prediction, zero_snr', [
    ((), 'epsilon', False), (('v_pred',), 'v_prediction', False),
    (('v_pred', 'ztsnr'), 'v_prediction', True)])
def test_sdxl_files_say_what_they_predict(keys, prediction, zero_snr, tmp_path):
    sparse_file(tmp_path / 'a.safetensors', SINGLE['sdxl_base'] | {key: [0] for key in keys})
    source = open_single(tmp_path / 'a.safetensors', None, False, None)
    schedule = source.config.schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == (prediction, zero_snr)
    assert source.mismatches() == {} and not set(keys) & set(source.extras)


@pytest.mark.slow
def test_sd2_files_do_not_say_what_they_predict(tmp_path, caplog):
    sparse_file(tmp_path / 'a.safetensors', SINGLE['sd2'])
    source = open_single(tmp_path / 'a.safetensors', None, False, None)
    assert source.config.version == 'sd21' and source.untold
    for kind, version in (('v_prediction', 'sd21'), ('epsilon', 'sd21_base')):
        source.settle(kind)
        assert source.config == read_config(version) and source.config.version == version
        given = open_single(tmp_path / 'a.safetensors', None, False, kind)
        assert given.config == read_config(version) and not given.untold
    given = open_single(tmp_path / 'a.safetensors', read_config('sd20_base'), False, None)
    assert given.config == read_config('sd20_base') and not given.untold
    assert not caplog.text


@pytest.mark.slow
@pytest.mark.parametrize('file, metadata, prediction, pixels', [
    ('sdxl_base', {'modelspec.prediction_type': 'v'}, 'v_prediction', 1024),
    ('sdxl_base', {'prediction_type': 'v_prediction'}, 'v_prediction', 1024),
    ('sdxl_base', {'modelspec.predict_key': 'v'}, 'v_prediction', 1024),  # ComfyUI's word
    ('sdxl_base', {'modelspec.prediction_type': 'epsilon'}, 'epsilon', 1024),
    ('sd15_emaonly', {'modelspec.prediction_type': 'V', 'modelspec.resolution': '768x768'},
     'v_prediction', 768),
    ('sd2', {'modelspec.prediction_type': 'epsilon', 'modelspec.resolution': '512x512'},
     'epsilon', 512),
    ('sd2', {'modelspec.prediction_type': 'v', 'modelspec.resolution': '512x512'},
     'v_prediction', 512),
    ('sd2', {'modelspec.architecture': 'stable-diffusion-v2-512'}, 'epsilon', 512),
    ('sd2', {'modelspec.architecture': 'stable-diffusion-v2-768-v'}, 'v_prediction', 768),
])
def test_headers_say_what_files_predict(file, metadata, prediction, pixels, tmp_path, caplog):
    """As https://github.com/Stability-AI/ModelSpec and kohya's sai_model_spec write it."""
    sparse_file(tmp_path / 'a.safetensors', SINGLE[file], metadata=metadata)
    source = open_single(tmp_path / 'a.safetensors', None, False, None)
    assert source.config.schedule.prediction_type == prediction and not source.untold
    assert source.config.unet.sample_size * 8 == pixels
    assert not caplog.text


@pytest.mark.slow
@pytest.mark.parametrize('given, marker, metadata, prediction, words', [
    ('epsilon', True, {'modelspec.prediction_type': 'v'}, 'epsilon',
     'epsilon, as given, though the tensor v_pred says v_prediction, the header\'s '
     'modelspec.prediction_type says v_prediction'),
    (None, True, {'modelspec.prediction_type': 'epsilon'}, 'v_prediction',
     'v_prediction, as the tensor v_pred says, though the header\'s modelspec.prediction_type '
     'says epsilon'),
    (None, False, {'modelspec.prediction_type': 'v', 'prediction_type': 'epsilon'}, 'v_prediction',
     'the header\'s prediction_type says epsilon'),
    ('epsilon', False, {'modelspec.prediction_type': 'flow'}, 'epsilon', 'says flow'),
    ('config', True, {}, 'epsilon', 'the tensor v_pred says v_prediction'),
])
def test_a_conflict_is_one_warning(given, marker, metadata, prediction, words, tmp_path, caplog):
    """The order: what was given, tensors, the header."""
    sparse_file(tmp_path / 'a.safetensors', SINGLE['sdxl_base'] | {'v_pred': [0]} if marker else
                SINGLE['sdxl_base'], metadata=metadata)
    config = read_config('sdxl') if given == 'config' else None
    given = None if config else given
    source = open_single(tmp_path / 'a.safetensors', config, False, given)
    assert source.config.schedule.prediction_type == prediction
    assert len(caplog.records) == 1 and words in caplog.text


def test_a_prediction_type_that_is_not_implemented(tmp_path):
    sparse_file(tmp_path / 'a.safetensors', SINGLE['sdxl_base'],
                metadata={'modelspec.prediction_type': 'flow'})
    with pytest.raises(ValueError, match="modelspec.prediction_type says 'flow'.*not implemented"):
        open_single(tmp_path / 'a.safetensors', None, False, None)


def test_depth_estimator():
    """Its parameters in a folder and in a single file, which also holds the ImageNet head."""
    config = read_config('sd2_depth')
    assert count(spec(config)['depth_estimator']) == 122_377_985
    single = {n: tuple(s) for n, s in SINGLE['sd2_depth'].items() if n.startswith('depth_model.')}
    assert (len(single), count(single)) == (368, 123_146_985)
    head = {n: s for n, s in single.items() if names.is_extra(n, config)}
    assert count(head) == 769_000 and all('.head.' in n for n in head)


@pytest.mark.parametrize('layout', ['folder', 'single'])
def test_depth_model_without_its_estimator(layout, tmp_path):
    """Depth maps may be given: nothing in a file, [null, null] in a folder's model_index.json."""
    config = read_config('sd2_depth').replace(depth_estimator=None)
    if layout == 'single':
        sparse_file(tmp_path / 'a.safetensors', {
            n: s for n, s in SINGLE['sd2_depth'].items() if not n.startswith('depth_model.')})
        source = open_single(tmp_path / 'a.safetensors', None, False, None)
    else:
        write_config(config, tmp_path)
        index = json.loads((tmp_path / 'model_index.json').read_text())
        assert index['depth_estimator'] == index['feature_extractor'] == [None, None]
        for part, shapes in spec(config).items():
            stem = 'model' if part.startswith('text') else 'diffusion_pytorch_model'
            sparse_file(tmp_path / part / f'{stem}.safetensors', shapes)
        source = open_folder(tmp_path, None, False, None)
    assert source.mismatches() == {}
    assert source.config == config and source.config.version == 'sd2_depth'


def test_lost_depth_estimator(tmp_path):
    """A file that has half of it is no file without it."""
    lost = [n for n in SINGLE['sd2_depth'] if n.startswith('depth_model.model.pretrained')]
    sparse_file(tmp_path / 'a.safetensors',
                {n: s for n, s in SINGLE['sd2_depth'].items() if n not in lost})
    problems = open_single(tmp_path / 'a.safetensors', None, False, None).mismatches()
    assert list(problems) == ['missing'] and len(problems['missing']) == len(lost) - 2


# Distilled U-Nets as their config.json or ComfyUI's supported_models.py have them: what they change
# of a released one, and how many million parameters their authors say that leaves.
DISTILLED = {
    'SSD-1B': ('sdxl', dict(
        mid_transformer_layers=-1, transformer_layers=(0, 2, 4),
        transformer_depths=(0, 0, 2, 2, 4, 4, 4, 4, 10, 2, 1, 1, 0, 0, 0)), 1300),
    'Vega': ('sdxl', dict(mid_transformer_layers=-1, transformer_layers=(0, 1, 2)), 745),
    'KOALA-700M': ('sdxl', dict(layers_per_block=1, mid_transformer_layers=-2,
                                transformer_layers=(0, 2, 5)), 782),
    'KOALA-1B': ('sdxl', dict(layers_per_block=1, mid_transformer_layers=6,
                              transformer_layers=(0, 2, 6)), 1161),
    'BK-SDM base': ('sd15', dict(layers_per_block=1), 580),
    'small-sd': ('sd15', dict(layers_per_block=1, mid_transformer_layers=-2), 482),
    'tiny-sd': ('sd15', dict(layers_per_block=1, mid_transformer_layers=-2,
                             block_out_channels=(320, 640, 1280), heads=(8, 8, 8),
                             transformer_layers=(1, 1, 1), only_cross_attention=(False,) * 3), 323),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', DISTILLED)
def test_distilled(name, tmp_path):
    """Blocks that are missing, or deeper in one half than in the other, from a folder's config and
    from the names in a single file."""
    base, changes, millions = DISTILLED[name]
    released = read_config(base)
    config = released.replace(unet=dataclasses.replace(released.unet, **changes), version='custom')
    assert abs(count(names_of(config.unet)) / 1e6 - millions) < 0.03 * millions
    write_config(config, tmp_path / 'folder')
    assert read_config(tmp_path / 'folder') == config
    shapes = spec(config)
    tensors = {place.name: place.shape(shapes[part][name])
               for part, table in names.places(config, shapes).items()
               for name, place in table.items()}
    sparse_file(tmp_path / 'a.safetensors', tensors, 'F16')
    source = open_single(tmp_path / 'a.safetensors', None, False, None)
    assert source.config == config and not source.mismatches()
    lost = 'model.diffusion_model.output_blocks.2.0.in_layers.2.weight'
    sparse_file(tmp_path / 'b.safetensors', {k: s for k, s in tensors.items() if k != lost}, 'F16')
    source = open_single(tmp_path / 'b.safetensors', None, False, None)
    assert lost in source.mismatches()['missing']
