"""Hashes of files of weights, in pictures and read back."""

import hashlib
import json
import pathlib
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsd.run import hashes, infotext, picture
from jaxsd.run.request import Request


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for name in ('model', 'vae', 'style'):
        save_file({'a': rng.normal(size=400_000)}, tmp_path / f'{name}.safetensors')
    return {'checkpoint': f'{tmp_path}/model.safetensors', 'vae': f'{tmp_path}/vae.safetensors',
            'lora': [f'style={tmp_path}/style.safetensors']}


def _sha(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def test_what_a1111_calls_files(files, tmp_path):
    path = tmp_path / 'style.safetensors'
    save_file({'a': np.arange(8.0)}, path, {'name': 'one'})
    first = hashes.sha256(path), hashes.tensors_sha256(path)
    assert first[0] == _sha(path)
    # The tensors follow the header, whose length is the first 8 bytes.
    assert first[1] == hashlib.sha256(np.arange(8.0).tobytes()).hexdigest()
    save_file({'a': np.arange(8.0)}, path, {'name': 'another'})
    assert hashes.sha256(path) != first[0] and hashes.tensors_sha256(path) == first[1]
    model = files['checkpoint']
    assert hashes.old_hash(model) == hashlib.sha256(
        pathlib.Path(model).read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    (tmp_path / 'folder' / 'unet').mkdir(parents=True)
    for nothing in (tmp_path / 'gone', tmp_path / 'folder', 'runwayml/stable-diffusion-v1-5'):
        assert hashes.sha256(nothing) is hashes.tensors_sha256(nothing) is None
    save_file({'a': np.zeros(3)}, tmp_path / 'folder' / 'unet' / 'a.safetensors')
    assert hashes.sha256(tmp_path / 'folder') == _sha(tmp_path / 'folder/unet/a.safetensors')


def test_they_are_in_the_text_and_in_the_record(files):
    known = hashes.of_files(files)
    assert known == {'model': _sha(files['checkpoint'])[:10], 'vae': _sha(files['vae'])[:10],
                     'lora:style': hashes.tensors_sha256(files['lora'][0][6:])[:12]}
    request = Request('cat <lora:style:0.5>', seed=1, steps=2, guidance=7, width=64, height=64)
    line = picture.parameters(request, 'model', 'vae', hashes=known)
    assert (f'Model hash: {known["model"]}, Model: model, VAE hash: {known["vae"]}, VAE: vae, '
            in line) and f'Lora hashes: "style: {known["lora:style"]}", ' in line
    assert 'Lora hashes' not in picture.parameters(request.replace(prompt='cat'), hashes=known)
    past = infotext.foreign(line)
    assert past.hashes == known and not [n for n in past.notes if 'hash' in n.lower()]
    record = picture.record(request, hashes=known)
    ours = infotext.from_texts('a.png', {'jaxsd': record})
    assert ours.hashes == known and 'hashes' not in ours.run
    bad = json.dumps(json.loads(record) | {'hashes': {'model': 3}})
    with pytest.raises(ValueError, match='record is damaged'):
        infotext.from_texts('a.png', {'jaxsd': bad})


def test_a_server_has_them_when_they_are_computed(files):
    pytest.importorskip('fastapi')
    from jaxsd.serve.choices import Choices
    found = Choices(lambda: {'checkpoints': {'m': files['checkpoint']}, 'vaes': {'v': files['vae']},
                             'lora': {'style': files['lora'][0][6:]}})
    end = time.monotonic() + 5
    while len(found.hashes('m', 'v')) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert found.hashes('m', 'v') == hashes.of_files(files)
    assert found.hashes('other').keys() == {'lora:style'}


def test_another_file_is_named(files):
    known = hashes.of_files(files)
    assert hashes.differences(known, files) == []
    whole = {'lora:style': hashes.sha256(files['lora'][0][6:])[:10].upper(),  # Civitai's AutoV2
             'model': hashes.old_hash(files['checkpoint'])}
    assert hashes.differences(whole, files) == []
    wrong = known | {'model': '45dee52b1c', 'lora:style': '7c6bad76eb54', 'vae': '735e4c3a'}
    assert hashes.differences(wrong, files) == [
        f'model: the picture was made with the file of hash 45dee52b1c, and {files["checkpoint"]} '
        f'has {known["model"]}',
        f'vae: the picture was made with the file of hash 735e4c3a, and {files["vae"]} '
        f'has {known["vae"][:8]}',
        'LoRA style: the picture was made with the file of hash 7c6bad76eb54, and '
        f'{files["lora"][0][6:]} has {known["lora:style"]}']
    assert hashes.differences(wrong, {'checkpoint': 'a/hub-id'}) == []


def test_hashes_as_others_write_them():
    text = ('cat\nSteps: 3, Sampler: Euler, Seed: 4, Model hash: 45DEE52B1C, Lora hashes: "a b: '
            '7c6bad76eb54, c: 1c1c1c1c1c1c", Version: v1.9')
    assert infotext.foreign(text).hashes == {
        'model': '45DEE52B1C', 'lora:a b': '7c6bad76eb54', 'lora:c': '1c1c1c1c1c1c'}
    savers = ('cat\nSteps: 3, Sampler: Euler, Seed: 4, Hashes: {"model": "45dee52b1c", '
              '"LORA:x": "7c6bad76eb", "vae": 3}, Version: ComfyUI')
    assert infotext.foreign(savers).hashes == {'model': '45dee52b1c', 'lora:x': '7c6bad76eb'}


def test_large_files_are_read_once(files, monkeypatch):
    kept, path = {}, files['checkpoint']
    monkeypatch.setattr(hashes, 'LARGE', 100)
    monkeypatch.setattr(hashes, 'recall', lambda file: kept)
    monkeypatch.setattr(hashes, 'remember', lambda file, **values: kept.update(values))
    hashes._computed.cache_clear()
    first = hashes.sha256(path)
    hashes._computed.cache_clear()  # as in another process
    monkeypatch.setattr(hashes.hashlib, 'file_digest', None)
    assert hashes.sha256(path) == first and len(kept) == 1
    monkeypatch.undo()
    save_file({'a': np.zeros(3)}, path)
    assert hashes.sha256(path) == _sha(path) != first
