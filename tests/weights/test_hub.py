"""Hub ids, without a network: its boundary is replaced, or the cache holds the files."""

import pathlib
import shutil

import numpy as np
import pytest
from tiny import flat, random_model, same

import jaxsd
from jaxsd.weights import hub

COMMIT = 'c0ffee' + 34 * '0'


@pytest.fixture(scope='module')
def repository(tmp_path_factory):
    """A diffusers folder with everything that repositories hold besides what is needed."""
    folder = tmp_path_factory.mktemp('repository') / 'repo'
    model = random_model('sd15', tokenizers=True)
    jaxsd.save(model, folder)
    for part in ('unet', 'vae'):
        whole = folder / part / 'diffusion_pytorch_model.safetensors'
        shutil.copy(whole, whole.with_name('diffusion_pytorch_model.fp16.safetensors'))
        shutil.copy(whole, whole.with_name('diffusion_pytorch_model.non_ema.safetensors'))
        (folder / part / 'diffusion_pytorch_model.bin').write_bytes(b'pickle')
    for name in ('v1-5-pruned.ckpt', 'v1-5-pruned.safetensors', 'README.md', 'unet/model.onnx',
                 'unet/flax_model.msgpack', 'safety_checker/model.safetensors'):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b'large')
    return folder, model


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())


@pytest.mark.parametrize('half', [False, True])
def test_only_what_is_needed(repository, half):
    from huggingface_hub.utils import filter_repo_objects
    files = files_of(repository[0])
    wanted = sorted(filter_repo_objects(files, allow_patterns=hub.needed('a/b', files, half)))
    variant = '.fp16' if half else ''
    assert wanted == sorted([
        'model_index.json', 'scheduler/scheduler_config.json', 'text_encoder/config.json',
        'text_encoder/model.safetensors', 'tokenizer/merges.txt', 'tokenizer/vocab.json',
        'tokenizer/special_tokens_map.json', 'tokenizer/tokenizer_config.json',
        'unet/config.json', f'unet/diffusion_pytorch_model{variant}.safetensors',
        'vae/config.json', f'vae/diffusion_pytorch_model{variant}.safetensors'])


def test_shards_of_the_chosen_variant():
    stem = 'unet/diffusion_pytorch_model'
    files = ['model_index.json', f'{stem}.safetensors.index.json',
             f'{stem}-00001-of-00002.safetensors', f'{stem}-00002-of-00002.safetensors',
             f'{stem}.fp16.safetensors.index.json', f'{stem}.fp16-00001-of-00001.safetensors']
    assert set(files[1:4]) <= set(hub.needed('a/b', files))
    assert not set(files[4:]) & set(hub.needed('a/b', files))
    assert set(files[4:]) <= set(hub.needed('a/b', files, half=True))


def test_pickles_where_there_is_nothing_else():
    stem = 'text_encoder/pytorch_model'
    files = ['model_index.json', 'unet/diffusion_pytorch_model.bin', f'{stem}.bin.index.json',
             f'{stem}-00001-of-00001.bin', 'vae/diffusion_pytorch_model.bin',
             'vae/diffusion_pytorch_model.safetensors']
    assert [f for f in files if f in hub.needed('a/b', files)] == files[:4] + files[5:]


def test_repositories_that_cannot_be_read():
    with pytest.raises(ValueError, match='model_index.json'):
        hub.needed('a/b', ['model.safetensors'])


def test_downloads_what_is_needed(repository, monkeypatch, tmp_path):
    """Only the two calls that reach the network are replaced."""
    import huggingface_hub as hf
    folder, model = repository
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append(repo)
        for name in hf.utils.filter_repo_objects(files_of(folder), allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, tmp_path / name)
        return str(tmp_path)
    monkeypatch.setattr(hf.HfApi, 'list_repo_files', lambda self, repo: files_of(folder))
    monkeypatch.setattr(hf, 'snapshot_download', snapshot_download)
    found = jaxsd.load('some-owner/some.model')
    assert asked == ['some-owner/some.model']
    assert same(flat(found.params), flat(model.params))
    assert not (tmp_path / 'v1-5-pruned.ckpt').exists()


def test_offline_from_the_cache(repository, monkeypatch, tmp_path):
    import huggingface_hub.constants as constants
    folder, model = repository
    home = tmp_path / 'models--owner--cached'
    shutil.copytree(folder, home / 'snapshots' / COMMIT)
    (home / 'refs').mkdir()
    (home / 'refs' / 'main').write_text(COMMIT)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    found = jaxsd.load('owner/cached')
    assert same(flat(found.params), flat(model.params))
    assert np.array_equal(found.tokenizers['text_encoder'](['a cat'])[0, :4],
                          [49406, 320, 2368, 49407])
    with pytest.raises(FileNotFoundError) as caught:
        jaxsd.load('owner/absent')
    assert '\n' not in str(caught.value)
    assert 'owner/absent' in str(caught.value) and 'cannot be reached' in str(caught.value)


@pytest.mark.parametrize('name, is_id', [
    ('stabilityai/stable-diffusion-2-1', True), ('a/b', True), ('model', False), ('a/b/c', False),
    ('./a', False), ('/a/b', False), ('a/b.safetensors', False), ('a/b.ckpt', False),
    (pathlib.Path('owner/name'), True)])
def test_what_is_a_hub_id(name, is_id):
    assert hub.is_hub_id(name) == is_id
