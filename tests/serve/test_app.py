"""HTTP behind uvicorn on loopback, with an engine that waits to be told."""

import base64
import concurrent.futures
import contextlib
import json
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import tiny_detectors
import tiny_faces
from mains import opened, wait_for
from servers import (
    DEFAULTS,
    colour,
    counted,
    ending,
    gated,
    listening,
    service,
    slow,
)
from test_a1111 import png

import jaxsd
from jaxsd.serve import a1111
from jaxsd.serve.a1111 import Limits
from jaxsd.serve.app import Loaded, Service, Settings, build
from jaxsd.serve.choices import Choices
from jaxsd.serve.metrics import Metrics
from jaxsd.serve.queue import Queue
from jaxsd.serve.schemas import ExtraSingle

READ = 1.5  # s
KEY = 'secr\u00e9t'


@pytest.fixture(scope='module')
def parts():
    return gated()


@pytest.fixture(scope='module')
def shared(parts):
    found = service(*parts, queue=8, read=READ, body=20_000, timeout=30,
                    limits=Limits(pixels=2**15))
    with listening(found) as url:
        yield found, url


@pytest.fixture
def engine(parts):
    parts[0].started.clear()
    parts[0].gate.set()
    parts[0].broken = None
    yield parts[0]
    parts[0].gate.set()


@pytest.fixture
def url(shared, engine):
    wait_for(lambda: shared[0].loaded.queue.counts()[:2] == (0, 0))
    return shared[1]


def ask(url, route='txt2img', **fields):
    return httpx.post(f'{url}/sdapi/v1/{route}', json={'prompt': 'cat', **fields}, timeout=60)


def refused(answer, status, error, detail=''):
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert found['error'] == error and detail in found['detail'] and '\n' not in found['detail']
    assert sorted(found) == ['detail', 'error']


def test_an_answer_is_that_of_a1111(url, parts):
    answer = ask(url, seed=5, batch_size=2, steps=3, negative_prompt='dog',
                 sampler_name='Euler a').json()
    assert sorted(answer) == ['images', 'info', 'parameters']
    info = json.loads(answer['info'])
    assert info['all_seeds'] == [5, 6] and info['seed'] == 5 and info['steps'] == 3
    assert info['sampler_name'] == 'Euler a' and info['sd_model_name'] == 'emoji'
    assert info['all_prompts'] == ['cat'] * 2 and info['all_negative_prompts'] == ['dog'] * 2
    assert answer['parameters']['batch_size'] == 2 and answer['parameters']['seed'] == 5
    for i, text in enumerate(answer['images']):
        image = opened(text)
        np.testing.assert_array_equal(np.asarray(image), colour(5 + i))
        assert image.text['parameters'] == info['infotexts'][i]
        assert f'Sampler: Euler a, Schedule type: Normal, CFG scale: 4, Seed: {5 + i}' in (
            image.text['parameters'])
        record = json.loads(image.text['jaxsd'])
        [r] = parts[0].resolve([jaxsd.Request(**{
            **DEFAULTS, 'prompt': 'cat', 'negative_prompt': 'dog', 'seed': 5 + i, 'steps': 3,
            'sampler': 'euler_ancestral', 'schedule': 'normal'})])
        assert record['id'] == parts[1].of(r) and record['slots'] == 1
        assert not [v for v in record.values() if isinstance(v, str) and '/' in v]
    answer = ask(url, send_images=False, include_init_images=False, route='img2img',
                 init_images=[png()])
    assert answer.json()['images'] == [] and answer.json()['parameters']['init_images'] is None


def test_what_can_be_read(url):
    def get(route):
        return httpx.get(f'{url}/sdapi/v1/{route}').json()
    assert {'name': 'Euler a', 'aliases': ['euler_ancestral'], 'options': {}} in get('samplers')
    assert [s for s in get('schedulers') if s['label'] == 'Karras'][0]['name'] == 'karras'
    assert get('sd-models')[0]['title'] == get('options')['sd_model_checkpoint'] == 'emoji'
    assert get('progress')['progress'] == 0 and get('progress')['state']['job_count'] == 0
    info = httpx.post(f'{url}/sdapi/v1/png-info', json={'image': ask(url).json()['images'][0]})
    assert info.json()['info'].startswith('cat\nSteps: 4') and 'jaxsd' in info.json()['items']
    assert info.json()['parameters']['Prompt'] == 'cat'
    assert httpx.get(f'{url}/healthz').json() == {'status': 'ok'}


@pytest.mark.parametrize('route, fields, message', [
    ('txt2img', {'width': 2048, 'height': 2048}, 'made for 64x64'),
    ('txt2img', {'width': 256, 'height': 256}, '256x256: expected at most 32768 pixels'),
    ('txt2img', {'prompt': ' AND '.join('abcdefgh')}, 'parts: expected at most 8'),
    ('txt2img', {'prompt': '[a|b]' + ' cat' * 900, 'steps': 20}, 'blocks of 75 tokens'),
    ('txt2img', {'prompt': '<lora:../../etc/passwd:1>'}, 'the model has none'),
    ('txt2img', {'sampler_name': 'DPM++ 2M', 's_churn': 0.5}, 'no option'),
    ('img2img', {'init_images': ['/etc/passwd']}, 'no file and no address'),
    ('img2img', {'init_images': [png()], 'mask': png(np.zeros((64, 48, 3), np.uint8))}, 'black'),
    ('img2img', {'init_images': [png()], 'mask': png(np.zeros((9, 9, 3), np.uint8))}, '9x9'),
    ('png-info', {}, 'image: Field required'), ('interrupt', {}, "unknown field 'prompt'")])
def test_bad_requests_are_422(url, engine, route, fields, message):
    refused(ask(url, route, **fields), 422, 'invalid', message)
    assert engine.started == []


def test_bad_bodies(url):
    def post(data, kind='application/json'):
        return httpx.post(f'{url}/sdapi/v1/txt2img', content=data,
                          headers={'content-type': kind} if kind else {})
    refused(post(b'{"cfg_scale": NaN}'), 422, 'invalid', 'finite')
    refused(post(b'[' * 15_000), 422, 'invalid', 'recursion')
    refused(post(b'{"prompt": "\xff"}'), 422, 'invalid', 'JSON')
    refused(post(b'{}', 'text/plain'), 415, 'unsupported')
    refused(post(b'{}', None), 415, 'unsupported')
    refused(post(b' ' * 20_001), 413, 'too_large')
    refused(post(iter([b' ' * 15_000] * 3)), 413, 'too_large')  # chunked: no length is told
    refused(httpx.get(f'{url}/sdapi/v1/txt2img'), 405, 'http')
    refused(httpx.get(f'{url}/../../etc/passwd'), 404, 'http')


def test_overload_is_429_with_a_time(url, engine):
    engine.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        answers = [pool.submit(ask, url, seed=seed) for seed in range(30)]
        wait_for(lambda: sum(a.done() for a in answers) >= 10)
        busy = ask(url, seed=99)
        engine.gate.set()
        answers = [a.result() for a in answers]
    refused(busy, 429, 'busy', 'the queue is full')
    assert int(busy.headers['retry-after']) >= 1
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 429} and codes.count(200) >= 8
    for seed, answer in enumerate(answers):
        if answer.status_code == 200:
            np.testing.assert_array_equal(opened(answer.json()['images'][0]), colour(seed))


def hold(engine, url, pool):
    """Keep the device busy -> the answer that will come."""
    engine.gate.clear()
    engine.started.clear()
    first = pool.submit(ask, url, seed=200)
    wait_for(lambda: engine.started == [200])
    return first


def test_a_client_that_hangs_up_is_not_worked_for(url, engine):
    before = counted(url, 'jaxsd_pictures_total', outcome='cancelled')
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = hold(engine, url, pool)
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f'{url}/sdapi/v1/txt2img', json={'seed': 1, 'batch_size': 3}, timeout=0.3)
        wait_for(lambda: counted(url, 'jaxsd_pictures_total', outcome='cancelled') == before + 3)
        engine.gate.set()
        assert first.result().status_code == 200
    assert engine.started == [200]
    wait_for(lambda: counted(url, 'jaxsd_requests_total', route='/sdapi/v1/txt2img', status='499'))


def test_interrupt_takes_back_one_task(url, engine):
    def interrupt(name):
        return httpx.post(f'{url}/sdapi/v1/interrupt', json={'force_task_id': name})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = hold(engine, url, pool)
        second = pool.submit(ask, url, seed=1, force_task_id='mine')
        wait_for(lambda: counted(url, 'jaxsd_queue_pictures') == 1)
        state = httpx.get(f'{url}/sdapi/v1/progress').json()
        assert state['state']['job_count'] == 2 and state['eta_relative'] > 0
        refused(ask(url, seed=2, force_task_id='mine'), 422, 'invalid', 'not in use')
        refused(interrupt('other'), 404, 'not_found')
        assert interrupt('mine').json() == {}
        refused(second.result(), 409, 'interrupted')
        refused(interrupt('mine'), 404, 'not_found')
        engine.gate.set()
        assert first.result().status_code == 200
    assert engine.started == [200]
    assert ask(url, seed=1, force_task_id='mine').status_code == 200  # free again


def test_interrupt_and_skip_without_a_name(url, engine):
    """Of all requests; those that have pictures by then are answered with them."""
    def post(route, **headers):
        return httpx.post(f'{url}/sdapi/v1/{route}', headers=headers)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = hold(engine, url, pool)
        second = pool.submit(ask, url, seed=300, n_iter=3)
        wait_for(lambda: counted(url, 'jaxsd_queue_pictures') == 3)
        refused(post('skip', origin='http://evil.example'), 403, 'forbidden', 'origin')
        refused(httpx.post(f'{url}/sdapi/v1/skip', content=b'{}'), 415, 'unsupported')
        assert post('skip', origin=url).json() == {}  # one of each
        refused(first.result(), 409, 'interrupted')
        wait_for(lambda: engine.started == [200, 301])
        engine.gate.set()
        assert [int(np.asarray(opened(text))[0, 0, 0]) for text in second.result().json()['images']
                ] == [301 % 251, 302 % 251]
        assert json.loads(second.result().json()['info'])['all_seeds'] == [301, 302]
        first = hold(engine, url, pool)
        second = pool.submit(ask, url, seed=400, n_iter=2)
        wait_for(lambda: counted(url, 'jaxsd_queue_pictures') == 2)
        assert post('interrupt').json() == {}
        refused(first.result(), 409, 'interrupted')
        refused(second.result(), 409, 'interrupted')
        engine.gate.set()
    assert 400 not in engine.started


def test_time_out_is_504(parts, engine):
    found = service(*parts, timeout=0.5)
    engine.started.clear()
    with listening(found) as url, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = hold(engine, url, pool)
        refused(ask(url, seed=1), 504, 'timeout')
        refused(first.result(), 504, 'timeout')
        assert counted(url, 'jaxsd_queue_pictures') == 0
        wait_for(lambda: counted(url, 'jaxsd_pictures_total', outcome='cancelled') == 2)
        engine.gate.set()
        assert ask(url, seed=3).status_code == 200
    assert engine.started[0] == 200 and engine.started[-1] == 3


def test_what_the_device_raises_is_500_in_one_line(url, engine):
    engine.broken = RuntimeError('RESOURCE_EXHAUSTED: no memory\nand a long story')
    refused(ask(url), 500, 'failed', 'RESOURCE_EXHAUSTED: no memory')
    engine.broken = None
    assert ask(url).status_code == 200


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_dead_worker_makes_it_unhealthy(monkeypatch):
    engine, identity = gated()
    found = service(engine, identity)
    with listening(found) as url:
        monkeypatch.setattr(engine, '_wait', lambda lane: 1 / 0)
        assert ask(url, seed=1).status_code == 200  # it waited for this one already
        wait_for(lambda: not engine.alive)
        refused(ask(url), 503, 'unavailable', 'cannot make pictures any more')
        refused(httpx.get(f'{url}/healthz'), 503, 'unavailable', 'restarted')


def test_faces(monkeypatch, tmp_path):
    """The extras restore faces in the enlarged picture, where the server has a network for it."""
    nets = {name: tiny_detectors.network(name) for name in ('body_pose_model', 'facenet')}
    restorer = jaxsd.load_face_restorer(tiny_faces.write(tmp_path / 'GFPGANv1.4.safetensors'))
    engine, identity = gated()
    engine.nets[0].detectors.update(nets)
    image = np.random.default_rng(0).integers(0, 256, (30, 45, 3), np.uint8)
    body = {'image': png(image), 'upscaler_1': 'Nearest', 'upscaling_resize': 2,
            'gfpgan_visibility': 0.6}
    tiny_faces.seen(monkeypatch, tiny_faces.POINTS)
    found, large = service(engine, identity), image.repeat(2, 0).repeat(2, 1)
    with listening(found) as url:
        answer = httpx.post(f'{url}/sdapi/v1/extra-single-image', json=body)
        refused(answer, 422, 'invalid', 'started without --restore_faces=PATH')
        assert httpx.get(f'{url}/sdapi/v1/face-restorers').json() == []
        found.loaded = found.loaded._replace(restorer=restorer)
        answer = httpx.post(f'{url}/sdapi/v1/extra-single-image', json=body, timeout=60)
        expected = jaxsd.restore_faces(restorer, large, nets, 0.6)
        assert np.array_equal(opened(answer.json()['image']), expected)
        assert (expected != large).any()
        [there] = httpx.get(f'{url}/sdapi/v1/face-restorers').json()
        assert there == {'name': 'GFPGAN', 'cmd_dir': None}
        answer = httpx.post(f'{url}/sdapi/v1/extra-single-image', json=body | {
            'gfpgan_visibility': 0, 'codeformer_visibility': 1})
        refused(answer, 422, 'invalid', 'restores faces by GFPGAN, it was started without')


def test_which_restorer():
    """A1111's names, and a weight for CodeFormer alone."""
    former = jaxsd.Network(tiny_faces.FORMER, {})
    assert a1111.restorer_name(former) == 'CodeFormer'
    body = {'image': '', 'codeformer_visibility': 0.7}
    assert a1111.faces(ExtraSingle(**body), former) == (0.7, 0.0)
    assert a1111.faces(ExtraSingle(**body, codeformer_weight=0.3), former) == (0.7, 0.3)
    assert a1111.faces(ExtraSingle(image=''), former) is None


def test_another_model_waits_for_what_was_asked_for(parts, engine):
    """And a model that cannot be loaded leaves the one before."""
    metrics, loads = Metrics(), []

    def load(checkpoint=None, vae=None):
        loads.append((checkpoint and checkpoint.name, vae and vae.name))
        if vae and vae.name == 'bad':
            raise ValueError('/secret/bad is no VAE')
        return Loaded(Queue(*gated(), metrics), checkpoint.name if checkpoint else 'a', '', '', {})

    found = Service(Settings(DEFAULTS), metrics, load, Choices(lambda: {
        'checkpoints': {'a': '/secret/a', 'b': '/secret/b'}, 'vaes': {'bad': '/secret/bad'}}))
    wait_for(lambda: found.loaded)
    first_engine = found.loaded.queue.engine
    with listening(found) as url, concurrent.futures.ThreadPoolExecutor(3) as pool:
        first_engine.gate.clear()
        first = pool.submit(ask, url, seed=200)
        wait_for(lambda: 200 in first_engine.started)
        switched = pool.submit(found.switch, 'b')
        wait_for(lambda: found.loaded is None)
        refused(ask(url, seed=201), 503, 'unavailable', 'no model is loaded now')
        assert not switched.done()
        first_engine.gate.set()
        assert json.loads(first.result().json()['info'])['sd_model_name'] == 'a'
        switched.result(30)
        assert not first_engine.alive and found.current().name == 'b'
        assert json.loads(ask(url, seed=201).json()['info'])['sd_model_name'] == 'b'
        answer = httpx.post(f'{url}/sdapi/v1/options', json={'sd_vae': 'bad'}, timeout=60)
        refused(answer, 500, 'failed', 'bad is no VAE')
        assert 'secret' not in answer.text and found.current().name == 'b'
        assert loads == [(None, None), ('b', None), ('b', 'bad'), ('b', None)]
        with pytest.raises(ValueError, match='Known: a, b'):
            found.switch('c')


# Clients that are slow, or worse.


def talk(url, *parts, pause=0.0):
    """Send parts over a socket -> what comes until the other side closes, and after how long."""
    host, port = url.removeprefix('http://').split(':')
    began = time.monotonic()
    with socket.create_connection((host, int(port)), 20) as sock:
        with contextlib.suppress(OSError):
            for part in parts:
                sock.sendall(part)
                time.sleep(pause)
        found = b''
        with contextlib.suppress(ConnectionResetError):
            while data := sock.recv(2**16):
                found += data
    return found, time.monotonic() - began


HEAD = (b'POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: localhost\r\n'
        b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n')


def test_slow_clients_are_sent_away(url):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        silent = pool.submit(talk, url)
        head = pool.submit(talk, url, *[bytes([c]) for c in HEAD], pause=0.2)
        body = pool.submit(talk, url, HEAD, *[b' '] * 100, pause=0.2)
        again = pool.submit(talk, url, b'GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n',
                            *[b'G'] * 100, pause=0.2)
        assert ask(url).status_code == 200
        assert silent.result()[0] == b'' and head.result()[0] == b''
        assert body.result()[0].startswith(b'HTTP/1.1 408')
        assert again.result()[0].startswith(b'HTTP/1.1 200')
        for some in (silent, body):
            assert READ - 0.5 < some.result()[1] < READ + 3


def test_dropped_and_malformed_connections(url):
    host, port = url.removeprefix('http://').split(':')
    for part in (b'', b'\0\1\2', HEAD, HEAD + b'{"prompt"'):
        for _ in range(20):
            sock = socket.create_connection((host, int(port)))
            sock.sendall(part)
            sock.close()
    assert talk(url, b'\x16\x03\x01 nonsense\r\n\r\n')[0].startswith(b'HTTP/1.1 400')
    assert ask(url).status_code == 200


def test_a_body_that_is_still_coming_when_the_server_stops(parts, engine):
    found = service(*parts, read=3)
    engine.started.clear()
    with listening(found) as url, concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = hold(engine, url, pool)
        late = pool.submit(talk, url, HEAD, b'{}' + b' ' * 98, pause=0.7)
        time.sleep(0.3)
        stop = threading.Thread(target=found.stop)
        stop.start()
        assert late.result()[0].startswith(b'HTTP/1.1 503')
        refused(httpx.get(f'{url}/healthz'), 503, 'unavailable', 'stopping')
        engine.gate.set()
        assert first.result().status_code == 200
        stop.join(10)


# Who may come in.


def test_key_and_host(parts):
    found = service(*parts, key=KEY)

    def basic(text):
        return 'Basic ' + base64.b64encode(text.encode()).decode()

    with listening(found) as url:
        def get(route='/metrics', **headers):
            return httpx.get(url + route, headers={
                k: v.encode() for k, v in headers.items()}).status_code
        for route in ('/metrics', '/openapi.json', '/sdapi/v1/progress', '/nothing'):
            answer = httpx.get(url + route)
            refused(answer, 401, 'unauthorized')
            assert answer.headers['www-authenticate'].startswith('Basic')
        refused(ask(url), 401, 'unauthorized')
        assert get('/healthz') == 200
        assert get(authorization=f'Bearer {KEY}') == get(authorization=basic(f'me:{KEY}')) == 200
        for wrong in ('', 'Bearer', f'Bearer {KEY}x', KEY, 'Basic', 'Basic \u00e9',
                      basic(KEY), basic(f'{KEY}:'), basic('me:'), f'Digest {KEY}'):
            assert get(authorization=wrong) == 401, wrong
        assert get('/healthz', host='evil.example') == get('/healthz', host='') == 403
        assert get('/healthz', host='[::1]:7860') == get('/healthz', host='LOCALHOST') == 200


@pytest.mark.parametrize('settings, good, bad', [
    ({}, ('localhost', '127.0.0.1:80', '[::1]'), ('evil.example', '10.0.0.5', 'studio')),
    ({'hosts': ('studio',), 'addresses': True}, ('studio', 'STUDIO:80', '10.0.0.5', '[fe80::1]:7'),
     ('evil.example', '10.0.0.5.evil.example', '')),
    ({'hosts': None, 'key': KEY}, ('evil.example', ''), ())])
def test_hosts(parts, settings, good, bad):
    """A page of another site, whose name was led to this address (DNS rebinding), is refused."""
    with listening(service(*parts, **settings)) as url:
        for hosts, status in ((good, 200), (bad, 403)):
            for host in hosts:
                answer = httpx.get(f'{url}/healthz', headers={'host': host})
                assert answer.status_code == status, host


@pytest.mark.slow
def test_pictures_that_take_too_long_end_and_keep_nobody_waiting(parts, engine, monkeypatch):
    found = service(*parts, decode=4)
    with listening(found) as url, concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert ask(url, 'img2img', init_images=[png()]).status_code == 200  # decoders are there
        with monkeypatch.context() as patched:
            patched.setattr('jaxsd.images.read_bytes', slow)
            hanging = [pool.submit(ask, url, 'img2img', init_images=[png()]) for _ in range(4)]
            wait_for(lambda: found.picture_pool._work_queue.empty() and
                     len(found.picture_pool._threads) == 4)
            assert ask(url, seed=5).status_code == 200
            assert httpx.get(f'{url}/healthz').status_code == 200
            assert sum(one.done() for one in hanging) <= 2  # two decoders, 4 s each time
            for one in hanging:
                refused(one.result(30), 422, 'invalid', 'init_images.0: could not be decoded in 4')
            patched.setattr('jaxsd.images.read_bytes', ending)
            refused(ask(url, 'img2img', init_images=[png()]), 422, 'invalid', 'not be decoded')
        assert ask(url, 'img2img', init_images=[png()]).status_code == 200


def test_a_jpeg_of_thousands_of_scans(parts, engine, many_scans):
    text = base64.b64encode(many_scans).decode()
    with listening(service(*parts)) as url:
        for route, fields in (('img2img', {'init_images': [text]}), ('png-info', {'image': text})):
            answer = httpx.post(f'{url}/sdapi/v1/{route}', json=fields, timeout=60)
            refused(answer, 422, 'invalid', 'scans, expected at most 200')


def test_before_the_model_is_there():
    wait = threading.Event()
    with listening(service(type('', (), {}), None, load=wait.wait)) as url:
        for route in ('/healthz', '/sdapi/v1/progress', '/sdapi/v1/options'):
            refused(httpx.get(url + route), 503, 'unavailable', 'being loaded')
        refused(ask(url), 503, 'unavailable', 'being loaded')
        assert httpx.get(f'{url}/metrics').status_code == 200
        wait.set()


@pytest.mark.slow
def test_the_document(parts):
    """Every example that the OpenAPI document allows is answered as it says, and never by 5xx."""
    schemathesis = pytest.importorskip('schemathesis')
    from hypothesis import HealthCheck, given, settings
    from schemathesis import checks
    parts[0].gate.set()
    app = build(service(*parts, queue=64, hosts=None))
    document = schemathesis.openapi.from_asgi('/openapi.json', app)
    wanted = [checks.not_a_server_error, *(
        check for check in checks.CHECKS.get_all()
        if check.__name__ in ('status_code_conformance', 'content_type_conformance',
                              'response_schema_conformance', 'response_headers_conformance'))]
    seen = set()
    for operation in document.get_all_operations():
        operation = operation.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=20, deadline=None, database=None, derandomize=True,
                  suppress_health_check=list(HealthCheck))
        def check(case):
            answer = case.call()
            case.validate_response(answer, checks=wanted)
            seen.add((case.path, answer.status_code))
        check()
    assert {path for path, _ in seen} == set(document.raw_schema['paths'])
    assert ('/sdapi/v1/txt2img', 200) in seen
