"""The main with the shipped model: every picture is what it is alone, and it ends as it should."""

import concurrent.futures
import json
import random
import signal

import httpx
import numpy as np
import pytest
from mains import ROOT, opened, run_main, serving, wait_for
from servers import DEFAULTS, counted, pixels
from test_a1111 import png

import jaxsd
from jaxsd.batch.identity import Identity
from jaxsd.run import Engine
from jaxsd.run.engine import CPU_SLOTS
from jaxsd.serve import a1111, schemas

SAMPLERS = ('Euler', 'Euler a', 'DPM++ 2M Karras', 'Heun')
PROMPTS = ('red apple', 'rocket', 'green apple', 'a (red:1.2) heart', 'rooster')


@pytest.fixture(scope='module')
def server():
    with serving('--max_batch=8', '--timeout=120') as (url, run):
        yield url, run


@pytest.fixture(scope='module')
def solo():
    """A body, and the slots of the programs of its pictures -> their ids, the pictures as they are
    alone in such a program, and these numbers."""
    model = jaxsd.load(ROOT / 'checkpoints' / 'emoji', 'float32')
    engines = {slots: Engine(model, slots=slots) for slots in (1, CPU_SLOTS)}
    identity = Identity(model, slots=None)

    def make(body, slots, kind=schemas.Txt2Img):
        body = a1111.parse(kind, json.dumps(body).encode())
        requests = engines[1].resolve(a1111.requests(
            body, {**DEFAULTS, 'steps': 20, 'guidance': 2.0}, a1111.Limits(), 'emoji'))
        return [(identity.of(r, n), pixels(engines[n].make([r])[0]), n)
                for r, n in zip(requests, slots, strict=True)]
    return make


def ask(url, body, route='txt2img'):
    answer = httpx.post(f'{url}/sdapi/v1/{route}', json=body, timeout=180)
    assert answer.status_code == 200, answer.text
    images = [opened(text) for text in answer.json()['images']]
    records = [json.loads(image.text['jaxsd']) for image in images]
    return [(record['id'], pixels(image), record['slots'])
            for record, image in zip(records, images)]


@pytest.mark.slow
def test_pictures_from_many_clients_are_what_they_are_alone(server, solo):
    url, _ = server
    draw = random.Random(0)
    bodies = [{'prompt': draw.choice(PROMPTS), 'seed': draw.randrange(2**64), 'cfg_scale': 3.5,
               'steps': draw.randrange(2, 9), 'sampler_name': draw.choice(SAMPLERS),
               'batch_size': 1 + n % 2} for n in range(20)]
    bodies.append(bodies[0])
    made = counted(url, 'jaxsd_pictures_total', outcome='made')
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda body: ask(url, body), bodies))
    for body, answer in zip(bodies, answers):
        assert answer == solo(body, [slots for *_, slots in answer]), body
    assert {slots for answer in answers for *_, slots in answer} == {1, CPU_SLOTS}
    assert len({found for answer in answers[:-1] for found in answer}) == 30  # none doubled
    made = counted(url, 'jaxsd_pictures_total', outcome='made') - made
    shared = counted(url, 'jaxsd_pictures_total', outcome='shared')
    assert made + shared == 31


@pytest.mark.slow
def test_painting_over(server, solo):
    mask = np.zeros((64, 48, 3), np.uint8)
    mask[20:50, 10:40] = 255
    body = {'init_images': [png()], 'mask': png(mask), 'prompt': 'rocket', 'seed': 3, 'steps': 4,
            'denoising_strength': 0.8, 'mask_blur': 2, 'inpaint_full_res_padding': 8,
            'inpainting_fill': 1, 'sampler_name': 'Euler'}
    assert ask(server[0], body, 'img2img') == solo(body, [1], schemas.Img2Img)


@pytest.mark.slow
def test_sigterm_finishes_what_runs(server):
    """Last, because it ends the server of the others."""
    url, run = server
    began = counted(url, 'jaxsd_pictures_total', outcome='made')
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(httpx.post, f'{url}/sdapi/v1/txt2img', timeout=60, json={
            'prompt': 'rocket', 'steps': 16, 'seed': n, 'batch_size': 4}) for n in range(0, 40, 4)]
        wait_for(lambda: counted(url, 'jaxsd_pictures_total', outcome='made') > began)
        run.send_signal(signal.SIGTERM)
        codes = [answer.result().status_code for answer in answers if not answer.exception()]
    assert run.wait(60) == 0
    assert 200 in codes and set(codes) <= {200, 503}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f'{url}/healthz')


@pytest.mark.parametrize('flags, message', [
    (['--host=0.0.0.0'], '--host=0.0.0.0: expected --api_key'),
    (['--max_batch=9', '--queue=8'], '--max_batch=9: expected at most --queue=8'),
    (['--checkpoint=/nowhere'], '/nowhere'), (['--port=0'], 'port')])
def test_flags_that_cannot_be(flags, message):
    code, _, stderr = run_main('-m', 'launch.serve', *flags)
    assert code in (1, 2) and message in stderr and stderr.count('\n') == 1, stderr
