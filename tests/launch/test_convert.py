"""Inspecting, converting and merging from the command line."""

import hashlib
import json
import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest
from mains import run_main
from safetensors.numpy import load_file, save_file

import jaxsd
from launch import convert

WEIGHTS = pathlib.Path(__file__).resolve().parents[1] / 'weights'
GOLDENS = WEIGHTS.parent / 'goldens'


def described(path):
    return dict(convert.describe(path))


@pytest.fixture(scope='module')
def lora(tmp_path_factory, tiny_model):
    """A LoRA of one layer of the tiny model's U-Net: rank 2, alpha 1."""
    name = 'down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k'
    rng = np.random.default_rng(0)
    params = tiny_model('sd1').params['unet']['down_blocks']['0']['attentions']['0']
    width, out = params['transformer_blocks']['0']['attn2']['to_k']['weight'].shape
    path = tmp_path_factory.mktemp('lora') / 'lora.safetensors'
    save_file({f'lora_unet_{name}.lora_down.weight': rng.normal(size=(2, width)).astype('f4'),
               f'lora_unet_{name}.lora_up.weight': rng.normal(size=(out, 2)).astype('f4'),
               f'lora_unet_{name}.alpha': np.array(1, 'f4')}, path,
              {'ss_base_model_version': 'sd_v1', 'ss_output_name': 'a\x1b[31mb',
               'ss_tag_frequency': json.dumps({'10_cat': {'cat': 3, 'red': 1}, 'b': {'red': 7}}),
               'ss_long': 'x' * 1000})
    return path


def test_inspect_released_files(tmp_path, monkeypatch):
    sys.path.insert(0, str(WEIGHTS))
    from test_manifests import SINGLE
    from tiny import sparse_file
    shapes = {k: s for k, s in SINGLE['sd15_with_ema'].items() if not k.startswith('first_stage')}
    sparse_file(tmp_path / 'a.safetensors', shapes | {'stray': [3]}, 'F16')
    done = hashlib.sha256(b'gigabytes')
    monkeypatch.setattr(hashlib, 'file_digest', lambda *_: done)
    digest = done.hexdigest()
    found = described(tmp_path / 'a.safetensors')
    assert found == {
        'is': 'a whole checkpoint', 'format': 'safetensors', 'version': 'sd15',
        'prediction type': 'epsilon', 'unet': '859,520,964 parameters', 'vae': 'absent',
        'text_encoder': '123,060,480 parameters', 'dtypes': found['dtypes'],
        'averaged U-Net (model_ema)': '686 tensors', 'unexpected': '1 tensors: stray',
        'sha256': digest, 'short hash (A1111)': digest[:10]}
    assert found['dtypes'].startswith('float16 (')
    sparse_file(tmp_path / 'xl.safetensors', SINGLE['sdxl_base'] | {'v_pred': [0]}, 'F16')
    found = described(tmp_path / 'xl.safetensors')
    assert (found['version'], found['prediction type']) == ('sdxl', 'v_prediction')
    sparse_file(tmp_path / 'v2.safetensors', SINGLE['sd2'], 'F16')
    assert described(tmp_path / 'v2.safetensors')['prediction type'].startswith('not said')


def test_inspect_folders_and_pickles(checkpoint, tmp_path):
    found = described(checkpoint)
    assert found['version'] == 'custom' and found['dtypes'] == 'float32' and 'sha256' not in found
    golden = np.load(GOLDENS / 'pickles.npz')['old'].tobytes()
    (tmp_path / 'a.safetensors').write_bytes(golden)
    found = described(tmp_path / 'a.safetensors')
    assert found['format'] == 'a pickle of torch.save' and found['epoch'] == '0'
    assert 'float8_e4m3fn (1)' in found['dtypes']
    save_file({'clip_l': np.ones((2, 768), 'f4'), 'clip_g': np.ones((2, 1280), 'f4')},
              tmp_path / 'b.safetensors')
    lines = list(convert.describe(tmp_path / 'b.safetensors'))
    assert ('is', 'a textual inversion embedding') in lines
    assert {text for label, text in lines if label == 'vectors'} == {
        'clip_l: [2, 768]', 'clip_g: [2, 1280]'}


def test_inspect_models_of_other_sizes(tiny_model, tmp_path):
    model, path = tiny_model('sd1'), tmp_path / 'a.safetensors'
    jaxsd.save(model, path, layout='single-file')
    assert described(path)['version'] == 'custom'  # the header holds its config
    save_file(load_file(path), path)
    found = described(path)
    assert found['version'].startswith('none that jaxsd knows') and found['dtypes'] == 'float32'
    for name, part in (('unet', 'unet'), ('vae', 'vae'), ('text encoders', 'text_encoder')):
        arrays = jax.tree.leaves(model.params[part])
        count = re.escape(f'{sum(a.size for a in arrays):,}')
        assert re.fullmatch(rf'{count} parameters in \d+ tensors', found[name])
    assert found['averaged U-Net (model_ema)'] == 'absent'


def test_inspect_lora(lora):
    code, stdout, stderr = run_main('-m', 'launch.convert', 'inspect', lora)
    assert code == 0, stderr
    assert '\x1b' not in stdout
    found = dict(line.split(': ', 1) for line in stdout.splitlines())
    assert found['is'] == 'a LoRA' and found['kind'] == 'LoRA'
    assert found['rank'] == '2' and found['alpha'] == '1.0' and found['layers'] == 'unet'
    assert found['ss_base_model_version'] == 'sd_v1'
    assert found['ss_tag_frequency'] == 'red (8), cat (3)'
    assert found['ss_long'] == 200 * 'x' + ' ...'
    assert found['sha256'] == hashlib.sha256(lora.read_bytes()).hexdigest()


@pytest.fixture
def main(monkeypatch, capsys):
    """main(*arguments, **flags): the main in this process -> what it printed."""
    def run(*arguments, **flags):
        defaults = dict.fromkeys(('layout', 'dtype', 'prediction', 'base', *convert.MERGING))
        flags = {**defaults, 'ema': False, 'strays': False, **flags}
        monkeypatch.setattr(convert, 'FLAGS', types.SimpleNamespace(**flags))
        convert.main(['convert', *map(str, arguments)])
        return capsys.readouterr().out

    return run


def test_convert_and_merge(checkpoint, lora, tmp_path, main):
    single = tmp_path / 'a.safetensors'
    assert main('convert', checkpoint, single, dtype='float16') == f'{single}\n'
    half = load_file(single)
    assert {str(a.dtype) for a in half.values()} == {'float16'}
    assert any(name.startswith('first_stage_model.') for name in half)
    assert main('merge', checkpoint, tmp_path / 'merged',
                lora=[f'path={lora}, unet=0.5, text=1']) == f'{tmp_path}/merged\n'
    model, merged = jaxsd.load(checkpoint), jaxsd.load(tmp_path / 'merged')

    def layer(model):
        block = model.params['unet']['down_blocks']['0']['attentions']['0']
        return np.asarray(block['transformer_blocks']['0']['attn2']['to_k']['weight'])
    tensors = {name.rpartition('to_k.')[2]: a for name, a in load_file(lora).items()}
    delta = 0.5 * (1 / 2) * tensors['lora_up.weight'] @ tensors['lora_down.weight']
    np.testing.assert_allclose(layer(merged) - layer(model), delta.T, atol=1e-6)
    assert abs(delta).max() > 0.1


@pytest.mark.slow
def test_merge_models(checkpoint, lora, tmp_path, main):
    """A + w (B - C) with blocks of another weight, another VAE and a LoRA, in one go."""
    a = jaxsd.load(checkpoint)
    b, c = (a.replace(params=jax.tree.map(lambda x, k=k: x * k, a.params)) for k in (3, 2))
    for name, model in (('b', b), ('c', c)):
        jaxsd.save(model, tmp_path / f'{name}.safetensors', 'single-file')
    vae = jaxsd.Network(c.config.vae, c.params['vae'])
    jaxsd.save_network(vae, tmp_path / 'vae')
    out = tmp_path / 'out.safetensors'
    main('merge', checkpoint, out, model_b=str(tmp_path / 'b.safetensors'),
         model_c=str(tmp_path / 'c.safetensors'), blocks='M00=0.5, BASE=0',
         vae=str(tmp_path / 'vae'), lora=[f'path={lora}'])
    found, (delta,) = jaxsd.load(out), jaxsd.load_adapter(lora, a).deltas['unet'].items()
    expected = jax.tree.map(lambda x: 2 * x, a.params['unet'])  # A + (3 A - 2 A)
    expected['mid_block'] = jax.tree.map(lambda x: 1.5 * x, a.params['unet']['mid_block'])
    *above, last = delta[0].split('.')
    place = expected
    for key in above:
        place = place[key]
    place[last] = place[last] + delta[1].of(np.asarray(place[last]))
    for part, tree in {'unet': expected, 'text_encoder': a.params['text_encoder'],
                       'vae': c.params['vae']}.items():
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
                     found.params[part], tree)
    half = tmp_path / 'half'
    main('merge', checkpoint, half, model_b=str(tmp_path / 'b.safetensors'), dtype='float16')
    conv = jaxsd.load(half, dtype=None).params['unet']['conv_in']['weight']
    assert conv.dtype == 'float16'
    np.testing.assert_allclose(conv, 2 * a.params['unet']['conv_in']['weight'], rtol=2e-3)


@pytest.mark.parametrize('flags, said', [
    (dict(weight=0.5), '--weight goes with --model_b'),
    (dict(model_b='b', blocks='a, b'), '--blocks="a, b": expected "BASE=0, IN00=0.3'),
    (dict(model_b='none'), 'none: no such file'),
    (dict(model_b='SELF', method='slurp'), "unknown method 'slurp': did you mean 'slerp'?"),
    (dict(model_b='SELF', method='add_difference'), 'add_difference: expected 3 models, found 2'),
    (dict(model_b='SELF', blocks='IN77=1'), "unknown block 'IN77'")])
def test_bad_merges(flags, said, checkpoint, tmp_path, main):
    flags = {name: str(checkpoint) if value == 'SELF' else value for name, value in flags.items()}
    with pytest.raises(SystemExit) as caught:
        main('merge', checkpoint, tmp_path / 'out', lora=[], **flags | {
            'vae': None if 'model_b' in flags else 'x'})
    assert re.fullmatch(r'error: [^\n]*', str(caught.value)) and said in str(caught.value)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('arguments, lora, said', [
    ([], None, 'expected inspect FILE | convert SOURCE OUT | merge SOURCE OUT; found nothing'),
    (['inspect'], None, 'found inspect'), (['explain', 'a'], None, 'found explain a'),
    (['inspect', 'none.ckpt'], None, 'none.ckpt: no such file'),
    (['convert', 'none.ckpt', 'out'], None, 'none.ckpt: no such file'),
    (['merge', 'a', 'b'], None, 'merge: expected --model_b=PATH, --lora='),
    (['convert', 'a', 'b'], ['path=c'], '--lora goes with merge'),
    (['merge', 'a', 'b'], ['weight=1'], 'expected path='),
    (['merge', 'a', 'b'], ['path=c, weight=x'], 'the number weight='),
    (['merge', 'a', 'b'], ['path=c, weight=1, unet=2'], 'expected path='),
    (['inspect', 'EVIL'], None, "asks for 'os.system'"),
])
def test_bad_input_is_one_clear_line(arguments, lora, said, tmp_path, main):
    (tmp_path / 'evil.ckpt').write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    arguments = [str(tmp_path / 'evil.ckpt') if a == 'EVIL' else a for a in arguments]
    with pytest.raises(SystemExit) as caught:
        main(*arguments, lora=lora)
    assert re.fullmatch(r'error: [^\n]*', str(caught.value)) and said in str(caught.value)
