"""What a model's config knows survives in every layout: markers, header entries, config.json."""

import dataclasses
import json

import jax
import ml_dtypes  # noqa: F401 (names float8 for numpy)
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_manifests import SINGLE
from tiny import flat, random_params, same, small_config, sparse_file

import jaxsd
from jaxsd.config import ScheduleConfig, TinyVAEConfig
from jaxsd.config_files import read_config, versions
from jaxsd.models.spec import spec
from jaxsd.weights import marks, reading
from jaxsd.weights.files import open_tensors

# Of playground-v2.5-1024px-aesthetic's vae/config.json, and ComfyUI's SDXL_Playground_2_5.
MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]


def model_of(config, seed=0):
    rng = np.random.default_rng(seed)
    params = {part: random_params(rng, shapes) for part, shapes in spec(config).items()}
    return jaxsd.Model(config, params)


def with_schedule(config, **fields):
    return config.replace(schedule=dataclasses.replace(config.schedule, **fields))


@pytest.fixture(scope='module')
def xl():
    return model_of(small_config('sdxl'))


@pytest.fixture
def released_xl(monkeypatch):
    """Files of `xl` without a header count as SDXL."""
    monkeypatch.setattr(reading, 'read_config', lambda name: (
        small_config if name in versions() else read_config)(name))
    monkeypatch.setattr(reading, 'CANDIDATES', ('sd15', 'sdxl'))


def bare(model, path, **tensors):
    """A model's single file without a header and markers, with these tensors."""
    jaxsd.save(model, path, 'single-file')
    save_file({k: a for k, a in load_file(path).items() if k not in marks.MARKERS} | {
        k.replace('vpred_', 'vpred.'): np.asarray(a, 'f4') for k, a in tensors.items()}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize('tensors, schedule, vae', [
    ({'v_pred': []}, {'prediction_type': 'v_prediction'}, {}),
    ({'v_pred': [], 'ztsnr': []},
     {'prediction_type': 'v_prediction', 'rescale_betas_zero_snr': True}, {}),
    ({'edm_mean': np.reshape(MEAN, (1, 4, 1, 1)), 'edm_std': np.reshape(STD, (1, 4, 1, 1))},
     {'edm': True, 'sigma_min': 0.002, 'sigma_max': 80.0, 'sigma_data': 0.5},
     {'scaling_factor': 0.5, 'latents_mean': tuple(MEAN), 'latents_std': tuple(STD)}),
    ({'edm_vpred_sigma_max': 120.0, 'edm_vpred_sigma_min': 0.25},
     {'edm': True, 'prediction_type': 'v_prediction', 'sigma_min': 0.25, 'sigma_max': 120.0,
      'sigma_data': 1.0}, {}),
    ({'edm_vpred_sigma_max': [500.0]},
     {'edm': True, 'prediction_type': 'v_prediction', 'sigma_min': 0.002, 'sigma_max': 500.0,
      'sigma_data': 1.0}, {}),
])
def test_marker_tensors(tensors, schedule, vae, xl, released_xl, tmp_path):
    """As ComfyUI's supported_models.SDXL and diffusers' from_single_file read them."""
    found = jaxsd.load(bare(xl, tmp_path / 'a.safetensors', **tensors))
    expected = with_schedule(xl.config, **schedule)
    assert found.config == expected.replace(vae=dataclasses.replace(xl.config.vae, **vae))
    jaxsd.save(found, tmp_path / 'folder')
    jaxsd.save(jaxsd.load(tmp_path / 'folder'), tmp_path / 'b.safetensors', 'single-file')
    names = {k.replace('vpred_', 'vpred.') for k in tensors}
    written = load_file(tmp_path / 'b.safetensors')
    assert names <= {k for k in written if k in marks.MARKERS} <= names | {'edm_vpred.sigma_min'}
    for name, value in tensors.items():
        array = written[name.replace('vpred_', 'vpred.')]
        assert np.array_equal(array.ravel(), np.float32(value).ravel())
    save_file(written, tmp_path / 'b.safetensors')  # without a header
    assert jaxsd.load(tmp_path / 'b.safetensors').config == found.config


@pytest.mark.parametrize('tensors, said', [
    ({'edm_mean': MEAN}, 'marks an EDM model with edm_mean; expected edm_mean and edm_std'),
    ({'edm_new': [1.0]}, 'marks an EDM model with edm_new'),
    ({'edm_mean': MEAN, 'edm_std': [0.0] * 4}, 'edm_std: latents_std: .* above 0'),
    ({'edm_mean': [0.0], 'edm_std': [1.0]}, 'latents_mean: expected latent_channels=4'),
    ({'edm_vpred_sigma_max': [1.0, 2.0]}, r'sigma_max: expected one number, found shape \[2\]'),
    ({'edm_vpred_sigma_max': -1.0}, 'sigma_max: expected a number above 0'),
    ({'edm_vpred_sigma_max': 120.0, 'ztsnr': []}, 'edm: has no betas'),
])
def test_markers_that_are_unknown_or_damaged(tensors, said, xl, released_xl, tmp_path):
    path = bare(xl, tmp_path / 'a.safetensors', **tensors)
    for strays in (False, True):  # leaving an EDM mark out would draw noise
        with pytest.raises(ValueError, match=said) as caught:
            jaxsd.load(path, strays=strays)
        assert '\n' not in str(caught.value) and str(path) in str(caught.value)


def test_a_mean_of_latents_beside_a_taesd(xl, tmp_path):
    path, tiny = tmp_path / 'a.safetensors', TinyVAEConfig()
    jaxsd.save(model_of(xl.config.replace(vae=tiny)), path, 'single-file')
    save_file(load_file(path) | {'edm_mean': np.float32(MEAN), 'edm_std': np.float32(STD)}, path,
              open_tensors(path).metadata)
    with pytest.raises(ValueError, match='edm_std: expected a VAE beside them, found a TAESD'):
        jaxsd.load(path)


def test_the_header_is_written_and_read(xl, tmp_path):
    """Markers and https://github.com/Stability-AI/ModelSpec for others, the config for us."""
    config = with_schedule(xl.config, prediction_type='v_prediction', rescale_betas_zero_snr=True)
    jaxsd.save(xl.replace(config=config), tmp_path / 'mine.safetensors', 'single-file')
    file = open_tensors(tmp_path / 'mine.safetensors')
    assert file.shapes['v_pred'] == file.shapes['ztsnr'] == (0,)
    assert {k: v for k, v in file.metadata.items() if k != 'jaxsd.config'} == {
        'format': 'pt', 'modelspec.sai_model_spec': '1.0.0', 'modelspec.title': 'mine',
        'modelspec.prediction_type': 'v', 'modelspec.resolution': '64x64'}
    assert jaxsd.load(tmp_path / 'mine.safetensors').config == config


def test_what_is_given_replaces_what_a_folder_says(xl, tmp_path, caplog):
    jaxsd.save(xl, tmp_path / 'model')
    for kind, warnings in (('epsilon', 0), (None, 0), ('v_prediction', 1)):
        found = jaxsd.load(tmp_path / 'model', prediction_type=kind).config
        assert found == xl.config.with_prediction(kind or 'epsilon')
        assert caplog.text.count('its scheduler_config.json says epsilon') == warnings


@pytest.mark.parametrize('version', versions())
def test_every_version_is_in_its_header(version):
    config = read_config(version)
    entries = marks.metadata(config, 'a')

    class File:
        path, metadata, shapes = 'a.safetensors', entries, marks.markers(config)
        read = marks.markers(config).__getitem__
    assert marks.read_entry(File) == config and marks.read_entry(File).version == version
    assert marks.with_markers(config, File) == config
    assert {kind for kind, _ in marks.predictions(File)} == {config.schedule.prediction_type}
    assert marks.native_size(File) == config.unet.sample_size * config.vae.factor


def entry(change):
    """A changed `jaxsd.config`, in a file of no tensors."""
    content = json.loads(marks.metadata(small_config('sd15'), 'a')['jaxsd.config'])
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize('text', [
    '', '[]', '{', '{}', '{"vae": {}}', '[' * 100_000, '1' * 5000, 'null',
    entry(lambda c: c.update(new=1)), entry(lambda c: c['unet'].update(new=1)),
    entry(lambda c: c['unet'].update(heads='2')), entry(lambda c: c.update(unet=None)),
    entry(lambda c: c['unet'].update(layers_per_block=10**9)),
    entry(lambda c: c['vae'].update(scaling_factor=10**400)),
    entry(lambda c: c['schedule'].update(beta_start=-1)),
    entry(lambda c: c.update(aesthetic='yes')), entry(lambda c: c.update(max_noise_level=None)),
    entry(lambda c: c.update(controlnets=[1])),
])
def test_a_damaged_entry_is_one_line(text, tmp_path):
    path = tmp_path / 'a.safetensors'
    sparse_file(path, SINGLE['sd15_emaonly'], metadata={'jaxsd.config': text})
    with pytest.raises(ValueError, match='jaxsd.config is damaged or of another version') as caught:
        jaxsd.load(path)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 600


def betas(draw):
    n = draw(st.integers(2, 6))
    return tuple(draw(st.lists(st.floats(1e-4, 0.9), min_size=n, max_size=n)))


@st.composite
def configs(draw):
    """ModelConfigs that differ from SDXL in what names and shapes do not tell."""
    of = small_config('sdxl')
    kind = draw(st.sampled_from(['plain', 'trained', 'edm']))
    v = st.sampled_from(['epsilon', 'v_prediction'])
    if kind == 'edm':
        schedule = ScheduleConfig(
            edm=True, prediction_type=draw(v), sigma_min=draw(st.floats(1e-3, 0.1)),
            sigma_max=draw(st.floats(10, 500)), sigma_data=draw(st.sampled_from([0.5, 1.0])))
    else:
        schedule = ScheduleConfig(
            prediction_type=draw(v | st.just('sample')), rescale_betas_zero_snr=draw(st.booleans()))
        if kind == 'trained':
            found = betas(draw)
            schedule = dataclasses.replace(schedule, trained_betas=found,
                                           num_train_timesteps=len(found))
        else:
            schedule = dataclasses.replace(
                schedule, beta_start=draw(st.floats(1e-5, 1e-2)),
                beta_end=draw(st.floats(0.01, 0.5)),
                beta_schedule=draw(st.sampled_from(['linear', 'scaled_linear',
                                                    'squaredcos_cap_v2'])))
    numbers = st.lists(st.floats(0.01, 9), min_size=4, max_size=4).map(tuple) | st.just(())
    vae = dataclasses.replace(
        of.vae, scaling_factor=draw(st.floats(0.01, 2)), shift_factor=draw(st.floats(-1, 1)),
        latents_mean=draw(numbers), latents_std=draw(numbers), force_upcast=draw(st.booleans()),
        sample_size=draw(st.integers(8, 2048)))
    unet = dataclasses.replace(of.unet, sample_size=draw(st.integers(1, 256)),
                               norm_eps=draw(st.sampled_from([1e-5, 1e-6])))
    return of.replace(unet=unet, vae=vae, schedule=schedule, aesthetic=draw(st.booleans()),
                      zero_negative=draw(st.booleans()))


def cast(params, dtype):
    return jax.tree.map(lambda a: a.astype(dtype), params)


FLOAT8 = ('float8_e4m3fn', 'float8_e5m2')


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs(), steps=st.lists(
    st.tuples(st.sampled_from(['diffusers', 'single-file']),
              st.sampled_from([None, 'float32', 'float16', 'bfloat16', *FLOAT8])),
    min_size=1, max_size=4))
def test_config_and_arrays_survive_any_layouts_and_dtypes(config, steps, xl, tmp_path_factory):
    folder = tmp_path_factory.mktemp('steps')
    model, expected = xl.replace(config=config), flat(xl.params)
    for i, (layout, dtype) in enumerate(steps):
        path = folder / f'{i}.safetensors' if layout == 'single-file' else folder / str(i)
        if dtype in FLOAT8:  # weights that others made so
            model = model.replace(params=cast(model.params, dtype))
        jaxsd.save(model, path, layout, None if dtype in FLOAT8 else dtype)
        expected = {k: a.astype(dtype or a.dtype) for k, a in expected.items()}
        model = jaxsd.load(path, None)
        assert model.config == config
        assert same(flat(model.params), expected)


def test_a_single_file_of_a_network_that_takes_the_guidance_scale(released_xl, tmp_path):
    """As LCM's: one tensor more, whose width counts."""
    config = small_config('sd15')
    config = config.replace(unet=dataclasses.replace(config.unet, time_cond_proj_dim=16))
    path = bare(model_of(config), tmp_path / 'a.safetensors')
    assert 'model.diffusion_model.time_embed.cond_proj.weight' in load_file(path)
    found = jaxsd.load(path).config
    assert found.unet == config.unet and found.version == 'custom'
