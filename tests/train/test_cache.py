"""Latents and text features on disk: whole, of the right content, and only computed once."""

import dataclasses
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxsd.batch.identity import digest
from jaxsd.models import clip, vae
from jaxsd.train import data
from jaxsd.train.cache import Cache, cache_latents, cache_texts
from jaxsd.train.data_config import data_config
from jaxsd.train.examples import read_sets

ROOT = pathlib.Path(__file__).resolve().parents[2]


def pictures(path, count=10):
    path.mkdir()
    for i in range(count):
        size, rng = random.Random(i), np.random.default_rng(i)
        shape = size.randrange(40, 90), size.randrange(40, 90), 3
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path / f'{i}.png')
        (path / f'{i}.txt').write_text(f'{i}')
    return path


def setting(path, count=10, **fields):
    config = data_config(dict(sets=str(pictures(path, count)), resolution=64, bucket_step=16,
                              **fields))
    return read_sets(config).examples, config


class Encoder:
    """A linear one: means of 8 x 8 pixels, and their negatives. It counts what it is given."""

    def __init__(self):
        self.shapes, self.texts = [], []

    def __call__(self, images):
        assert images.dtype == np.uint8
        self.shapes.append(images.shape)
        b, h, w, c = images.shape
        mean = images.reshape(b, h // 8, 8, w // 8, 8, c).astype(np.float32).mean((2, 4))
        return {'moments': np.concatenate([mean, -mean], -1)}

    def words(self, captions):
        self.texts.append(list(captions))
        return {'context': np.float32([[[len(c), 7]] for c in captions]),
                'pooled': np.float32([[sum(map(ord, c))] for c in captions])}


def files(folder):
    return sorted(p for p in pathlib.Path(folder).rglob('*') if p.is_file()
                  and not p.name.startswith('.lock'))


def test_batches_carry_the_latents_of_their_pictures(tmp_path):
    examples, config = setting(tmp_path / 'in', flip=True)
    cache, encoder = Cache(tmp_path / 'cache', 'vae'), Encoder()
    assert cache_latents(examples, config, encoder, cache, 4) == 20  # and mirrored
    assert {shape[0] for shape in encoder.shapes} == {4}
    assert len(set(encoder.shapes)) == len(data.Buckets(examples, config, 1).slots)
    heights = [shape[1:3] for shape in encoder.shapes]
    assert heights == sorted(heights, key=lambda s: s[::-1])  # one bucket after the other
    seen = set()
    for plain, cached in zip(*(data.batches(examples, config, 4, latents=latents)
                               for latents in (None, cache))):
        expected = Encoder()(plain.pop('image'))['moments']
        np.testing.assert_array_equal(cached.pop('moments'), expected)
        assert plain.keys() == cached.keys()
        seen |= {tuple(ids) for ids in cached['time_ids']}
        if len(seen) >= 10:
            break


def test_what_is_there_is_not_computed_again(tmp_path):
    examples, config = setting(tmp_path / 'in')
    cache = Cache(tmp_path / 'cache', 'vae')
    assert cache_latents(examples, config, Encoder(), cache, 4) == 10
    encoder, before = Encoder(), {f: f.stat().st_mtime_ns for f in files(tmp_path / 'cache')}
    assert cache_latents(examples, config, encoder, cache, 4) == 0 and not encoder.shapes
    assert before == {f: f.stat().st_mtime_ns for f in files(tmp_path / 'cache')}
    for i in range(10):  # names do not matter
        (tmp_path / 'in' / f'{i}.png').rename(tmp_path / 'in' / f'other{i}.png')
    assert cache_latents(read_sets(config).examples, config, encoder, cache, 4) == 0
    other = dataclasses.replace(config, flip=True)
    assert cache_latents(read_sets(config).examples, other, encoder, cache, 4) == 10
    assert cache_latents(read_sets(config).examples, config, encoder,
                         Cache(tmp_path / 'cache', 'another vae'), 4) == 10
    small = dataclasses.replace(config, resolution=(32,))
    assert cache_latents(read_sets(small).examples, small, encoder, cache, 4) == 10


@pytest.mark.parametrize('damage', [
    lambda data: data[:len(data) // 2], lambda data: b'', lambda data: bytes(len(data)),
    lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    lambda data: data.replace(b'moments', b'momentz')])
def test_a_damaged_file_is_computed_anew(tmp_path, damage):
    examples, config = setting(tmp_path / 'in')
    cache = Cache(tmp_path / 'cache', 'vae')
    cache_latents(examples, config, Encoder(), cache, 4)
    file = files(tmp_path / 'cache')[3]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    loader = data.batches(examples, config, 10, latents=cache)
    with pytest.raises(ValueError, match=f'{file.name} is missing or damaged: start again'):
        for _ in range(10):
            next(loader)
    loader.close()
    assert cache_latents(examples, config, Encoder(), cache, 4) == 1
    assert file.read_bytes() == whole


SCRIPT = textwrap.dedent('''
    import sys, time
    import numpy as np
    sys.path.insert(0, 'tests/train')
    from test_cache import Encoder
    from jaxsd.train.cache import Cache, cache_latents
    from jaxsd.train.data_config import data_config
    from jaxsd.train.examples import read_sets

    def slow(images):
        time.sleep(0.02)
        return Encoder()(images)

    config = data_config(dict(sets=sys.argv[1], resolution=64, bucket_step=16))
    print('started', flush=True)
    print(cache_latents(read_sets(config).examples, config, slow, Cache(sys.argv[2], 'vae'), 1))
''')


@pytest.mark.slow
def test_a_kill_leaves_whole_files_only(tmp_path):
    """Killed twice at any moment, the rest is computed, and nothing else lies there."""
    examples, config = setting(tmp_path / 'in', 60)
    folder = tmp_path / 'cache'
    command = [sys.executable, '-c', SCRIPT, str(tmp_path / 'in'), str(folder)]
    cache, there = Cache(folder, 'vae'), 0
    for kill in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
        end = time.monotonic() + 60
        while sum(f.suffix == '.safetensors' for f in files(folder)) < there + 5 + kill:
            assert process.poll() is None and time.monotonic() < end
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole = [f for f in files(folder) if f.suffix == '.safetensors']
        assert there < len(whole) < 60
        there = len(whole)
    before = {f: f.read_bytes() for f in whole}
    assert cache_latents(examples, config, Encoder(), cache, 4) == 60 - there
    assert len(files(folder)) == 60 and all(f.suffix == '.safetensors' for f in files(folder))
    assert all(f.read_bytes() == content for f, content in before.items())
    assert cache_latents(examples, config, Encoder(), cache, 4) == 0


HALF = '''
import os, pathlib, signal
write = pathlib.Path.write_bytes
count = iter(range(8, -1, -1))

def half(path, data):
    if next(count):
        return write(path, data)
    write(path, data[:len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

pathlib.Path.write_bytes = half
'''
UNNAMED = '''
import os, signal
replace = os.replace
count = iter(range(8, -1, -1))
os.replace = lambda *names: (replace(*names) if next(count)
                             else os.kill(os.getpid(), signal.SIGKILL))
'''


@pytest.mark.parametrize('moment', [HALF, UNNAMED], ids=['half written', 'before the rename'])
def test_a_kill_at_the_worst_moment(tmp_path, moment):
    examples, config = setting(tmp_path / 'in', 20)
    folder = tmp_path / 'cache'
    process = subprocess.run([sys.executable, '-c', moment + SCRIPT, str(tmp_path / 'in'),
                              str(folder)], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    assert [f.suffix for f in files(folder)].count('.safetensors') == 8
    assert [f.suffix for f in files(folder)].count('.tmp') == 1
    cache_latents(examples, config, Encoder(), Cache(tmp_path / 'clean', 'vae'), 4)
    assert cache_latents(examples, config, Encoder(), Cache(folder, 'vae'), 4) == 12
    assert [(f.name, f.read_bytes()) for f in files(folder)] == [
        (f.name, f.read_bytes()) for f in files(tmp_path / 'clean')]


def test_another_training_waits_for_the_one_that_fills(tmp_path):
    pictures(tmp_path / 'in', 20)
    command = [sys.executable, '-c', SCRIPT, str(tmp_path / 'in'), str(tmp_path / 'cache')]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    out = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(out) == [['started', '0'], ['started', '20']]


def test_hosts_share_the_work(tmp_path):
    examples, config = setting(tmp_path / 'in')
    cache = Cache(tmp_path / 'cache', 'vae')
    counts = [cache_latents(examples, config, Encoder(), cache, 4, process=p, processes=3)
              for p in range(3)]
    assert counts == [4, 3, 3]
    assert cache_latents(examples, config, Encoder(), cache, 4) == 0


def test_random_crops_and_shuffled_tags_are_refused(tmp_path):
    examples, config = setting(tmp_path / 'in', 3)
    cache = Cache(tmp_path / 'cache', 'x')
    random_crop = dataclasses.replace(config, crop='random')
    with pytest.raises(ValueError, match="crop='random'"):
        cache_latents(examples, random_crop, Encoder(), cache)
    with pytest.raises(ValueError, match="crop='random'"):
        data.batches(examples, random_crop, 2, latents=cache)
    for field in dict(shuffle_tags=True), dict(tag_dropout=0.5):
        other = dataclasses.replace(config, **field)
        with pytest.raises(ValueError, match='shuffle_tags, tag_dropout'):
            cache_texts(examples, other, Encoder().words, cache)
        with pytest.raises(ValueError, match='shuffle_tags, tag_dropout'):
            data.batches(examples, other, 2, texts=cache)
    assert not files(tmp_path / 'cache')


def test_text_features_with_dropped_captions(tmp_path):
    examples, config = setting(tmp_path / 'in', caption_dropout=0.4)
    examples[3] = dataclasses.replace(examples[3], captions=('one', 'two'))
    cache, encoder = Cache(tmp_path / 'cache', 'clip'), Encoder()
    assert cache_texts(examples, config, encoder.words, cache, 4) == 12  # 9, two more, and ''
    assert [len(texts) for texts in encoder.texts] == [4, 4, 4]
    assert cache_texts(examples, config, encoder.words, cache, 4) == 0
    loader = data.batches(examples, config, 5, texts=cache)
    plain = data.batches(examples, config, 5, tokenize=Encoder().words)
    lengths = set()
    for _ in range(12):
        batch, expected = next(loader), next(plain)
        for name in 'context', 'pooled', 'image':
            np.testing.assert_array_equal(batch[name], expected[name])
        lengths |= set(batch['context'][:, 0, 0])
    assert lengths == {0, 1, 3}
    loader.close()
    plain.close()


@pytest.mark.slow
def test_a_models_own_latents_and_features(tmp_path, tiny_model):
    """The VAE's moments of the picture and CLIP's states of its caption, as a step computes them
    without a cache."""
    model = tiny_model('sdxl')
    params, config = model.params, model.config

    @jax.jit
    def encode(images):
        return {'moments': jnp.concatenate(vae.encode(
            params['vae'], config.vae, images.astype(jnp.float32) / 127.5 - 1), -1)}

    def words(captions):
        found = [clip.encode(params[name], getattr(config, name), model.tokenizers[name](captions))
                 for name in ('text_encoder', 'text_encoder_2')]
        return {'context': np.concatenate([f.hidden for f in found], -1),
                'pooled': found[1].pooled}

    examples, settings = setting(tmp_path / 'in', 6, flip=True)
    latents = Cache(tmp_path / 'cache', digest(params['vae']))
    texts = Cache(tmp_path / 'cache', digest([params['text_encoder'], params['text_encoder_2']]))
    assert cache_latents(examples, settings, encode, latents, 2) == 12
    assert cache_texts(examples, settings, words, texts, 4) == 7
    plain = data.batches(examples, settings, 2, 5, words)
    cached = data.batches(examples, settings, 2, 5, latents=latents, texts=texts)
    for _ in range(6):
        one, other = next(plain), next(cached)
        expected = encode(one['image'])['moments']
        np.testing.assert_allclose(other['moments'], expected, atol=1e-5)
        for name in 'context', 'pooled':
            np.testing.assert_allclose(other[name], one[name], atol=1e-5)
    plain.close()
    cached.close()
