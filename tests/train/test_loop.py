"""The training loop: order of examples, resuming after a kill, strict states."""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxsd.train import loop

ROOT = pathlib.Path(__file__).resolve().parents[2]


def settings(**changes):
    return ml_collections.ConfigDict({
        'steps': 40, 'batch_size': 4, 'seed': 0, 'learning_rate': 0.3, 'warmup': 2, 'clip': 1.0,
        'b2': 0.99, 'weight_decay': 0.0, 'ema': 0.9, 'save_every': 5, 'log_every': 5, **changes})


def regression(out, c, slow=0.0):
    """Fit a line, through the whole loop -> the averaged parameters."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 3)).astype(np.float32)
    data = {'x': x, 'y': x @ np.array([1.0, -2.0, 3.0], np.float32)}
    tx = loop.optimizer(c)

    def loss(params, batch, key):
        time.sleep(slow)
        return jnp.square(batch['x'] @ params['w'] - batch['y']).mean(), {}

    compiled = jax.jit(loop.make_step(loss, tx, c.ema), donate_argnums=0)

    def step(*arguments):
        time.sleep(slow)
        return compiled(*arguments)

    return loop.fit(step, loop.start({'w': jnp.zeros(3)}, tx), data, np.ones(10, int), c, out)


def test_batches_are_the_same_from_any_step():
    weights = np.array([1, 2, 0, 3, 1])
    whole = [next(b) for b in [loop.batches(weights, 2, 7, 0)] for _ in range(12)]
    for start in (0, 3, 5, 11):
        np.testing.assert_array_equal(next(loop.batches(weights, 2, 7, start)), whole[start])


def test_an_epoch_has_each_example_as_often_as_its_weight():
    weights = np.array([1, 2, 0, 3, 2])
    found = loop.batches(weights, 2, 7, 0)
    epochs = [np.concatenate([next(found) for _ in range(4)]) for _ in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.bincount(epoch, minlength=5), weights)
    assert (epochs[0] != epochs[1]).any()


def test_killed_training_ends_as_if_nothing_had_happened(tmp_path):
    """A real process, killed with SIGKILL, started again: the same weights and the same curve."""
    expected = regression(tmp_path / 'whole', settings())
    code = ('import sys; sys.path[:0] = ["tests/train"]; import test_loop as t; '
            f't.regression({str(tmp_path / "killed")!r}, t.settings(), slow=0.05)')
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=environment,
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:  # killed in the middle, once two states have been written
        if '"step": 15' in line:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    found = regression(tmp_path / 'killed', settings())
    np.testing.assert_array_equal(found['w'], expected['w'])
    assert np.abs(found['w'] - [1, -2, 3]).max() < 0.3

    def curve(name):
        with open(tmp_path / name / 'log.csv', newline='') as file:
            return [(r['step'], r['loss']) for r in csv.DictReader(file)]

    assert curve('killed') == curve('whole') and len(curve('whole')) == 8
    assert (tmp_path / 'killed' / 'curve.png').read_bytes().startswith(b'\x89PNG')


def test_a_state_of_another_model_is_refused(tmp_path):
    c = settings(steps=5)
    regression(tmp_path, c)
    other = loop.start({'w': jnp.zeros(4)}, loop.optimizer(c))
    with pytest.raises(ValueError, match='another model') as error:
        loop.load_state(tmp_path / 'state.safetensors', other)
    assert '\n' not in str(error.value) and 'remove it' in str(error.value)


@pytest.mark.parametrize('every', [5, 6, 7])
def test_what_is_not_finite_stops_and_keeps_the_last_state(tmp_path, every):
    """Whether logging or saving comes first after the damage."""
    regression(tmp_path, settings(steps=5))
    before = (tmp_path / 'state.safetensors').read_bytes()
    with pytest.raises(FloatingPointError, match='holds the last good state'):
        regression(tmp_path, settings(steps=40, learning_rate=float('inf'), save_every=every,
                                      log_every=20))
    assert (tmp_path / 'state.safetensors').read_bytes() == before
