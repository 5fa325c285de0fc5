"""Explicit lists of noise levels, and schedule files."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from mains import ROOT
from test_schedules import log_linear

import jaxsd
from jaxsd import sampling
from jaxsd.config import ScheduleConfig

CONFIG = ScheduleConfig()


@pytest.mark.parametrize('name', [
    '14.6,7.3,1,0', ' 14.6, 7.3, 1, 0', [14.6, 7.3, 1, 0], (14.6, 7.3, 1, 0),
    np.array([14.6, 7.3, 1, 0])])
def test_explicit_list(name):
    np.testing.assert_array_equal(sampling.schedule(name, 3, CONFIG), [14.6, 7.3, 1, 0])
    got = sampling.schedule(name, 2, CONFIG, denoise=0.6)
    np.testing.assert_array_equal(got, [7.3, 1, 0])
    got = sampling.schedule(name, 2, CONFIG, discard_penultimate=True)
    np.testing.assert_array_equal(got, [14.6, 7.3, 0])


def test_explicit_list_may_end_above_zero():
    np.testing.assert_array_equal(sampling.schedule('14,7,1', 2, CONFIG), [14, 7, 1])
    np.testing.assert_array_equal(sampling.schedule('14,7,1', 2, CONFIG, final='zero'), [14, 7, 0])


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'mine.json')


def test_schedule_file(path):
    lists = {steps: sampling.schedule('karras', steps, CONFIG, rho=5.0) for steps in (4, 6, 12)}
    sampling.write_schedule(path, lists, CONFIG, label='emoji')
    for steps, sigmas in lists.items():
        np.testing.assert_array_equal(sampling.schedule(path, steps, CONFIG), sigmas)
    np.testing.assert_array_equal(sampling.schedule(pathlib.Path(path), 6, CONFIG), lists[6])
    for steps in (1, 5, 9, 30):  # the nearest larger list, else the largest
        source = lists[min((n for n in lists if n >= steps), default=12)]
        expected = np.append(log_linear(source[:-1], steps) if steps > 1 else source[0], 0)
        np.testing.assert_allclose(sampling.schedule(path, steps, CONFIG), expected, rtol=1e-12)
    got = sampling.schedule(path, 6, CONFIG, sigma_max=10.0, denoise=0.5, convention='diffusers')
    assert len(got) == 4
    assert [p.name for p in pathlib.Path(path).parent.iterdir()] == ['mine.json']


def test_schedule_file_that_ends_above_zero(path):
    sampling.write_schedule(path, {2: [8.0, 2.0, 0.5]}, CONFIG)
    np.testing.assert_array_equal(sampling.schedule(path, 2, CONFIG), [8, 2, 0.5])
    got = sampling.schedule(path, 4, CONFIG)
    np.testing.assert_allclose(got, [8, 4, 2, 1, 0.5])
    np.testing.assert_allclose(sampling.schedule(path, 4, CONFIG, final='zero'), [8, 4, 2, 1, 0])


def test_schedule_file_of_trained_betas(path):
    config = dataclasses.replace(CONFIG, num_train_timesteps=2, trained_betas=(0.1, 0.2))
    sampling.write_schedule(path, {1: [9, 0]}, config)
    np.testing.assert_array_equal(sampling.schedule(path, 1, config), [9, 0])


@pytest.mark.parametrize('name', ['emoji_gits', 'emoji_learnt'])
def test_shipped_schedule_file(name):
    """Written before ScheduleConfig had EDM's fields: it is for a model without them."""
    path = ROOT / 'configs' / 'schedules' / f'{name}.json'
    config = jaxsd.read_config(ROOT / 'checkpoints' / 'emoji').schedule
    assert len(sampling.schedule(path, 6, config)) == 7
    with pytest.raises(ValueError, match='made for edm=False, and this model has True'):
        sampling.schedule(path, 6, dataclasses.replace(config, edm=True))


@pytest.mark.parametrize('field, value, match', [
    ('prediction_type', 'v_prediction',
     r"mine.json \(label 'emoji'\) was made for prediction_type='epsilon', and this model has "
     r"'v_prediction'"),
    ('beta_end', 0.02, "made for beta_end=0.012, and this model has 0.02"),
    ('rescale_betas_zero_snr', True, "rescale_betas_zero_snr=False, and this model has True"),
])
def test_schedule_file_from_another_model(path, field, value, match):
    sampling.write_schedule(path, {1: [9, 0]}, CONFIG, label='emoji')
    with pytest.raises(ValueError, match=match) as error:
        sampling.schedule(path, 1, dataclasses.replace(CONFIG, **{field: value}))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('change, match', [
    ({'format': 'other'}, 'expected JSON with "format": "jaxsd-schedule" and "version": 1'),
    ({'version': 2}, '"version": 1'),
    ({'config': None}, 'expected JSON with'),
    ({'config': {}}, "made for num_train_timesteps=None, and this model has 1000"),
    ({'sigmas': {}}, 'expected sigmas by step count'),
    ({'sigmas': [9, 0]}, 'expected sigmas by step count'),
    ({'sigmas': {'2': [9, 9, 0]}}, 'sigmas of 2 steps: .* strictly decrease'),
    ({'sigmas': {'2': [9, 3, -1]}}, 'none below 0'),
    ({'sigmas': {'2': [float('nan'), 3, 0]}}, 'must be finite'),
    ({'sigmas': {'2': [9, 0]}}, 'sigmas of 2 steps: found 2 numbers'),
    ({'sigmas': {'two': [9, 1, 0]}}, 'sigmas of two steps: found 3 numbers'),
    ({'sigmas': {'2': [9, 'x', 0]}}, 'expected sigmas, a list of numbers'),
    ({'sigmas': {'2': None}}, 'expected'),
])
def test_wrong_schedule_file(path, change, match):
    sampling.write_schedule(path, {1: [9, 0]}, CONFIG)
    file = json.loads(pathlib.Path(path).read_text())
    pathlib.Path(path).write_text(json.dumps({**file, **change}))
    with pytest.raises(ValueError, match=match) as error:
        sampling.schedule(path, 1, CONFIG)
    assert '\n' not in str(error.value) and 'mine.json' in str(error.value)


@pytest.mark.parametrize('text, match', [
    (None, 'mine.json: No such file'), ('{"a": ', 'not valid JSON'), ('[1]', 'expected JSON with')])
def test_unreadable_schedule_file(path, text, match):
    if text is not None:
        pathlib.Path(path).write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        sampling.schedule(path, 1, CONFIG)
    assert '\n' not in str(error.value)


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    sampling.write_schedule(path, {1: [9, 0]}, CONFIG)
    before = pathlib.Path(path).read_text()
    for lists, match in (({1: [0, 9]}, 'strictly decrease'), ({2: [9, 0]}, 'found 2 numbers')):
        with pytest.raises(ValueError, match=match):
            sampling.write_schedule(path, lists, CONFIG)

    def full(*_):
        raise OSError('disk full')

    monkeypatch.setattr('os.replace', full)
    with pytest.raises(OSError, match='disk full'):
        sampling.write_schedule(path, {1: [8, 0]}, CONFIG)
    assert pathlib.Path(path).read_text() == before
    assert [p.name for p in pathlib.Path(path).parent.iterdir()] == ['mine.json']
    with pytest.raises(ValueError, match='ends in .json'):
        sampling.write_schedule(path + '.txt', {1: [8, 0]}, CONFIG)


def test_known_schedule_opens_nothing():
    for name in (*sampling.SCHEDULES, 'no/such/file.json', '3,2,1,0', [3, 2, 0],
                 pathlib.Path('x.json')):
        assert callable(sampling.known_schedule(name))
    for name in ('karas', '14.6', '14.6;0', '3,2,2,0', '3,x,0', '3,', [3], [[3, 2]], 'x.txt', None):
        with pytest.raises(ValueError) as asked:
            sampling.known_schedule(name)
        with pytest.raises(ValueError) as made:
            sampling.schedule(name, 3, CONFIG)
        assert str(asked.value) == str(made.value) and '\n' not in str(made.value)
