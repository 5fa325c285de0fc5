"""The training loop: order of examples, resuming after a kill or on other devices, states."""

import csv
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd.train import loop, optimizers
from jaxsd.train.config import OptimizerConfig, TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPTIMIZER = OptimizerConfig(learning_rate=0.3, warmup=2, weight_decay=0.0)


def settings(**changes):
    return TrainConfig(**{'steps': 40, 'batch_size': 4, 'ema': 0.9, 'save_every': 5, 'log_every': 5,
                          **changes})


def regression(out, c, slow=0.0, optimizer=OPTIMIZER, data='', width=3):
    """Fit a line, through the whole loop -> the averaged parameters."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 3)).astype(np.float32)
    examples = {'x': x, 'y': x @ np.array([1.0, -2.0, 3.0], np.float32)}
    params = {'unet': {'w': jnp.zeros((width, 8))}}

    def loss(params, frozen, batch, key):
        noise = frozen['scale'] * jax.random.normal(key, ())  # the key counts, too
        guess = batch['x'] @ params['unet']['w'][:3]
        return jnp.square(guess.mean(-1) - batch['y'] + noise).mean(), {'noise': noise}

    def batches(step):
        part = c.batch_size // jax.process_count()
        rows = slice(part * jax.process_index(), part * (jax.process_index() + 1))
        for batch in loop.arrays(examples, np.ones(10, int), c.batch_size, c.seed)(step):
            time.sleep(slow)
            yield {name: array[rows] for name, array in batch.items()}

    found = loop.fit(loss, params, {'scale': jnp.float32(0.1)}, batches,
                     optimizers.optimizer(optimizer, c.steps, params), c, out, data=data)
    return found['unet']['w']


def curve(folder):
    with open(folder / 'log.csv', newline='') as file:
        return [(r['step'], r['loss'], r['noise']) for r in csv.DictReader(file)]


def test_batches_are_the_same_from_any_step():
    rows = {'row': np.arange(5)}
    whole = [b['row'] for b, _ in zip(loop.arrays(rows, np.array([1, 2, 0, 3, 1]), 2, 7)(0),
                                      range(12))]
    for start in (0, 3, 5, 11):
        found = next(loop.arrays(rows, np.array([1, 2, 0, 3, 1]), 2, 7)(start))
        np.testing.assert_array_equal(found['row'], whole[start])


def test_an_epoch_has_each_example_as_often_as_its_repeats():
    repeats = np.array([1, 2, 0, 3, 2])
    found = loop.arrays({'row': np.arange(5)}, repeats, 2, 7)(0)
    epochs = [np.concatenate([next(found)['row'] for _ in range(4)]) for _ in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.bincount(epoch, minlength=5), repeats)
    assert (epochs[0] != epochs[1]).any()


def run_elsewhere(out, changes='', devices=1, slow=0.0):
    """The regression in a process of its own, with its output as it comes; the result is saved.

    Here tests compile without optimisations, there programs are those that users have."""
    code = ('import sys; sys.path[:0] = ["tests/train"]; import test_loop as t, numpy as np; '
            f'found = t.regression({str(out)!r}, t.settings({changes}), {slow}); '
            f'np.save({str(out / "found.npy")!r}, found)')
    environment = os.environ | {
        'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_as_two(out, changes, slow=0.0):
    """The regression as two processes, each of which loads half of each batch."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    code = ('import sys, jax; sys.path[:0] = ["tests/train"]; which = int(sys.argv[1]); '
            f'jax.distributed.initialize("localhost:{port}", 2, which); '
            'import test_loop as t, numpy as np; '
            f'found = t.regression({str(out)!r}, t.settings({changes}), {slow}); '
            f'which or np.save({str(out / "found.npy")!r}, found)')
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    return [subprocess.Popen([sys.executable, '-c', code, str(which)], cwd=ROOT, env=environment,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for which in range(2)]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """With weights spread over both; ended by SIGTERM to one of them, and gone on with."""
    expected = regression(tmp_path / 'one', settings())
    both = run_as_two(tmp_path / 'two', 'fsdp=2', slow=0.03)
    for line in both[0].stdout:
        if '"step": 10' in line:
            both[1].send_signal(signal.SIGTERM)
            break
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert all('ended by SIGTERM after step' in error for error in errors), errors
    both = run_as_two(tmp_path / 'two', 'fsdp=2')
    found = finished(both[0], tmp_path / 'two')
    finished(both[1], tmp_path / 'two')
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # The row in which the training was interrupted is a mean over fewer steps.
    rows, expected = (np.array(curve(tmp_path / name), float) for name in ('two', 'one'))
    np.testing.assert_array_equal(rows[:, 0], expected[:, 0])
    np.testing.assert_allclose(rows[-3:], expected[-3:], rtol=1e-4)


def finished(process, out):
    """The result of `run_elsewhere`."""
    _, err = process.communicate()
    assert process.returncode == 0, err
    return np.load(out / 'found.npy')


@pytest.mark.slow
def test_killed_at_random_and_resumed_ends_bit_for_bit_the_same(tmp_path):
    """A real process, killed with SIGKILL between two log lines and while it saves."""
    expected = finished(run_elsewhere(tmp_path / 'whole'), tmp_path / 'whole')
    for step in (10, 25):
        process = run_elsewhere(tmp_path / 'killed', slow=0.03)
        for line in process.stdout:
            if f'"step": {step},' in line or f'"step": {step}}}' in line:
                time.sleep(random.uniform(0, 0.15))
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        process.stdout.close()
        process.stderr.close()
    found = finished(run_elsewhere(tmp_path / 'killed'), tmp_path / 'killed')
    np.testing.assert_array_equal(found, expected)
    assert curve(tmp_path / 'killed') == curve(tmp_path / 'whole')
    assert len(curve(tmp_path / 'whole')) == 8
    assert (tmp_path / 'killed' / 'curve.png').read_bytes().startswith(b'\x89PNG')
    assert list((tmp_path / 'killed' / 'tensorboard').glob('events.out.tfevents.*'))


@pytest.mark.slow
def test_sigterm_saves_and_ends(tmp_path):
    process = run_elsewhere(tmp_path / 'run', 'save_every=1000', slow=0.03)
    for line in process.stdout:
        if '"step": 10' in line:
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate()
    assert process.returncode == 1 and 'ended by SIGTERM after step' in err.splitlines()[-1]
    found = regression(tmp_path / 'run', settings(save_every=1000))
    np.testing.assert_allclose(found, regression(tmp_path / 'whole', settings()), rtol=1e-5)
    assert len(curve(tmp_path / 'run')) == 8


@pytest.mark.slow
def test_other_numbers_of_devices(tmp_path):
    """The same on 8 devices as on 1, and begun on 8, spread over them, it ends so on 2."""
    expected = regression(tmp_path / 'one', settings(batch_size=8))
    for name, changes in {'data': 'batch_size=8', 'fsdp': 'batch_size=8, fsdp=8'}.items():
        finished(run_elsewhere(tmp_path / name, f'{changes}, steps=20', devices=8), tmp_path / name)
        one = curve(tmp_path / 'one')[:4]
        np.testing.assert_allclose(np.array(curve(tmp_path / name), float), np.array(one, float),
                                   rtol=1e-5)
    found = finished(run_elsewhere(tmp_path / 'fsdp', 'batch_size=8, fsdp=2', devices=2),
                     tmp_path / 'fsdp')
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_are_the_batch(tmp_path):
    """The mean over the parts of a batch, of which each draws noise of its own."""
    def gradient(accumulate):
        c = settings(accumulate=accumulate, ema=0.0)
        params = {'unet': {'w': jnp.ones(3)}}
        tx = optimizers.optimizer(OptimizerConfig(name='sgd', learning_rate=1.0, b1=0.0, clip=0.0),
                                  4, params)
        step = loop.make_step(lambda p, frozen, batch, key: (
            jnp.square(batch @ p['unet']['w']).mean(), {}), tx, c)
        batch = jax.random.normal(jax.random.key(1), (8, 3))
        state, metrics = step(loop.start(params, tx, c), {}, batch, jax.random.key(0))
        return state.params['unet']['w'], metrics['loss']

    for whole, parts in zip(gradient(1), gradient(4)):
        np.testing.assert_allclose(whole, parts, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion', 'prodigy', 'schedule_free', 'sgd'])
def test_all_optimisers_learn(tmp_path, name):
    rate = {'prodigy': 1.0, 'lion': 0.1, 'sgd': 0.1}.get(name, 0.3)
    optimizer = OptimizerConfig(name=name, learning_rate=rate, warmup=2, weight_decay=0.0)
    found = regression(tmp_path, settings(steps=300, ema=0.0, log_every=300), optimizer=optimizer)
    assert np.abs(found.mean(-1) - [1, -2, 3]).max() < 0.5


@pytest.mark.parametrize('other, said', [
    ({'width': 4}, 'another model'), ({'data': 'b'}, 'on other pictures')])
def test_a_state_of_another_training_is_refused(tmp_path, other, said):
    regression(tmp_path, settings(steps=5))
    with pytest.raises(ValueError, match=said) as error:
        regression(tmp_path, settings(steps=5), **other)
    assert '\n' not in str(error.value) and 'remove it' in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('every', [5, 7])
def test_what_is_not_finite_stops_and_keeps_the_last_state(tmp_path, every):
    """Whether logging or saving comes first after the damage."""
    expected = regression(tmp_path, settings(steps=5))
    with pytest.raises(FloatingPointError, match='holds the last good state, step 5'):
        regression(tmp_path, settings(steps=40, save_every=every, log_every=20),
                   optimizer=OptimizerConfig(learning_rate=1e38, warmup=2, weight_decay=0.0))
    np.testing.assert_array_equal(regression(tmp_path, settings(steps=5)), expected)


def test_what_cannot_be_shared_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match='fsdp=3'):
        regression(tmp_path, settings(fsdp=3))
    with pytest.raises(ValueError, match='multiple of accumulate=3'):
        settings(accumulate=3)
