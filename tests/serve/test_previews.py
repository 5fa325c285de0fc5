"""What pictures look like while they are made, with the shipped model."""

import numpy as np
import pytest
from mains import ROOT, wait_for

import jaxsd
from jaxsd.batch.identity import Identity
from jaxsd.serve.metrics import Metrics
from jaxsd.serve.previews import Previews
from jaxsd.serve.queue import Queue

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def queue():
    model = jaxsd.load(ROOT / 'checkpoints' / 'emoji', 'float32')
    with jaxsd.Engine(model, lone=True) as engine:
        queue = Queue(engine, Identity(model, slots=None), Metrics())
        yield queue
        queue.stop()


def ask(queue, *seeds, **fields):
    return queue.submit(queue.engine.resolve([
        jaxsd.Request('red apple', seed=seed, guidance=4, **fields) for seed in seeds]))


def distance(a, b):
    return np.abs(a.astype(float) - b).mean()


def test_a_job_shows_how_far_it_is_and_what_it_is_by_now(queue):
    job, seen, states = ask(queue, 1, 2, steps=100, sampler='euler_ancestral'), [], []
    assert job.progress() == (0, 200) and job.previews() == [None, None]
    states.append(job.state())

    def look():
        done, total = job.progress()
        states.append(job.state())
        images = job.previews()
        if 0 < done < total and images[0] is not None:
            seen.append((done, images[0]))
        return job.future.done()

    wait_for(look, 200)
    made = job.future.result()
    assert job.progress() == (200, 200) and job.state() == 'done'
    for image, result in zip(job.previews(), made, strict=True):
        np.testing.assert_array_equal(image, result.image)
    assert len({done for done, _ in seen}) > 5 and [d for d, _ in seen] == sorted(
        d for d, _ in seen)
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for _, image in seen)
    early, late = (distance(seen[i][1], made[0].image) for i in (0, -1))
    assert late < 5 < early  # it came to be the picture
    assert [s for i, s in enumerate(states) if not i or states[i - 1] != s][-2:] == [
        'running', 'done']


def test_what_is_taken_back_is_not_shown(queue):
    job = ask(queue, 3, steps=400)
    wait_for(lambda: job.progress()[0] > 0, 200)
    assert queue.cancel(job) and job.previews() == [None]
    wait_for(lambda: queue.engine.counts() == (0, 0))


def test_the_programs_of_a_kind_are_named(queue):
    job = ask(queue, 4, steps=4, width=72)
    wait_for(lambda: job.state() == 'compiling')
    job.future.result(200)
    assert job.state() == 'done'


def test_larger_latents_have_the_colours_of_the_pictures_before(queue):
    """Of 9x8 cells, one pixel each."""
    fields = {'steps': 8, 'width': 72, 'height': 64}
    found = Previews(queue.engine)
    tasks = [queue.engine.submit(queue.engine.resolve([jaxsd.Request(
        prompt, seed=5, **fields)])[0]) for prompt in ('red apple', 'rocket', 'rooster', 'heart')]
    for task in tasks:
        task.future.result(200)
    assert found._linear(tasks[0].denoised) is None
    for task in tasks[1:]:
        found.learn(task)
    image = found._linear(tasks[0].denoised)
    means = tasks[0].future.result().reshape(8, 8, 9, 8, 3).mean((1, 3))
    assert image.shape == (8, 9, 3)
    assert distance(image, means) < 0.5 * distance(means, means.mean((0, 1)))


def test_a_small_vae_shows_all_pictures(queue):
    """Here the model's own."""
    engine, model = queue.engine, queue.engine.nets[0]
    other = Queue(engine, queue.identity, Metrics(), preview=jaxsd.Network(
        model.config.vae, model.params['vae']))
    job, seen = ask(other, 6, steps=60, width=72), []

    def look():
        if (image := job.previews()[0]) is not None and job.progress()[0] < 60:
            seen.append(image)
        return job.future.done()

    wait_for(look, 200)
    assert seen and all(image.shape == (64, 72, 3) for image in seen)
    assert distance(seen[-1], job.future.result()[0].image) < 5
