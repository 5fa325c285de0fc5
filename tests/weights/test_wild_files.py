"""Files as they are shared: pickles, two copies of the U-Net, parts left out, strays, float8."""

import itertools
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from test_manifests import FOLDERS, SINGLE
from test_pickles import packed
from tiny import flat, random_model, random_params, same, small_config, sparse_file

import jaxsd
from jaxsd.models.spec import from_jax, spec
from jaxsd.weights import names, reading
from jaxsd.weights.files import open_tensors
from jaxsd.weights.reading import open_single


@pytest.fixture(scope='module')
def model():
    return random_model('sd15')


@pytest.fixture(scope='module')
def saved(model, tmp_path_factory):
    """The model as a folder, and the tensors of its single file."""
    folder = tmp_path_factory.mktemp('saved')
    jaxsd.save(model, folder / 'folder')
    jaxsd.save(model, folder / 'a.safetensors', layout='single-file')
    return folder / 'folder', load_file(folder / 'a.safetensors')


def torch_file(tensors, wrapper='state_dict'):
    """What torch.save writes of {wrapper: tensors}; float32, all in one storage."""
    def text(value):
        return b'X' + len(value).to_bytes(4, 'little') + value.encode()

    def numbers(values):
        return b'(' + b''.join(b'J' + int(value).to_bytes(4, 'little') for value in values) + b't'
    data = b''.join(a.tobytes() for a in tensors.values())
    storage = (b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu')
               + numbers([len(data) // 4])[1:-1] + b'tQq\x00')
    code, offset = b'\x80\x02' + storage + b'0}' + text(wrapper) + b'}(', 0
    for name, a in tensors.items():
        strides = [s // 4 for s in a.strides]
        code += (text(name) + b'ctorch._utils\n_rebuild_tensor_v2\n(h\x00'
                 + numbers([offset])[1:-1] + numbers(a.shape) + numbers(strides)
                 + b'\x89NtR')
        offset += a.size
    return packed(code + b'us.', data=data)


def fails(path, kind=ValueError, **options):
    with pytest.raises(kind) as caught:
        jaxsd.load(path, **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('name', ['model.ckpt', 'model.pt', 'renamed.safetensors'])
def test_a_checkpoint_that_is_a_pickle(name, model, saved, tmp_path):
    (tmp_path / name).write_bytes(torch_file(saved[1]))
    found = jaxsd.load(tmp_path / name, config=model.config)
    assert same(flat(found.params), flat(model.params))


def test_a_folder_of_pickles(model, saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / 'folder')
    for part in spec(model.config):
        old = next((folder / part).glob('*.safetensors'))
        stem = 'pytorch_model' if part == 'text_encoder' else 'diffusion_pytorch_model'
        (folder / part / f'{stem}.bin').write_bytes(torch_file(load_file(old), 'module'))
        old.unlink()
    assert same(flat(jaxsd.load(folder).params), flat(model.params))
    vae = jaxsd.load_vae(shutil.copy(folder / 'vae' / 'diffusion_pytorch_model.bin',
                                     tmp_path / 'a.vae.pt'), config=model.config.vae)
    assert same(flat(vae.params), flat(model.params['vae']))


def with_averages(tensors):
    """{name: tensor} with a second U-Net, twice the first, in model_ema's names."""
    prefix = 'model.diffusion_model.'
    return tensors | {names.ema(name): 2 * a for name, a in tensors.items()
                      if name.startswith(prefix)} | {'model_ema.decay': np.ones((), 'f4')}


def test_averaged_weights_by_choice(model, saved, tmp_path, caplog):
    path = tmp_path / 'a.safetensors'
    save_file(with_averages(saved[1]), path)
    plain = jaxsd.load(path, config=model.config)
    assert same(flat(plain.params), flat(model.params)) and 'ema=True' in caplog.text
    caplog.clear()
    averaged = jaxsd.load(path, config=model.config, ema=True)
    assert 'model_ema' not in caplog.text and plain.extras.keys() == averaged.extras.keys()
    assert same(flat(averaged.params['unet']),
                {k: 2 * a for k, a in flat(model.params['unet']).items()})
    for part in ('vae', 'text_encoder'):
        assert same(flat(averaged.params[part]), flat(model.params[part]))
    tensors = with_averages(saved[1])
    del tensors['model_ema.diffusion_modelout2bias']
    save_file(tensors, path)
    assert '1 missing: model.diffusion_model.out.2.bias' in fails(path, config=model.config,
                                                                  ema=True)
    save_file(saved[1], path)
    assert 'no averaged weights' in fails(path, config=model.config, ema=True)
    assert 'is a folder' in fails(saved[0], ema=True)


def test_averaged_weights_of_the_released_file(tmp_path):
    sparse_file(tmp_path / 'a.safetensors', SINGLE['sd15_with_ema'])
    source = open_single(tmp_path / 'a.safetensors', None, False, None, ema=True)
    assert source.mismatches() == {}
    read = [source.tensors[place.name][1] for place in source.places['unet'].values()]
    assert len(set(read)) == 686 and all(name.startswith('model_ema.') for name in read)


@pytest.mark.slow
@pytest.mark.parametrize('parts', [['vae'], ['text_encoder'], ['vae', 'text_encoder']])
def test_missing_parts_from_a_base(parts, model, saved, tmp_path):
    prefixes = tuple(names.prefixes(model.config)[part] for part in parts)
    tensors = {k: 3 * a for k, a in saved[1].items() if not k.startswith(prefixes)}
    path = tmp_path / 'a.safetensors'
    save_file(tensors, path)
    said = fails(path, config=model.config)
    assert f'has no {", ".join(parts)}; give base=' in said
    base = tmp_path / 'base.safetensors'
    jaxsd.save(model, base, layout='single-file')
    found = jaxsd.load(path, config=model.config, base=saved[0])
    for part in spec(model.config):
        factor = 1 if part in parts else 3
        assert same(flat(found.params[part]),
                    {k: factor * a for k, a in flat(model.params[part]).items()})
    assert 'no such file' in fails(path, FileNotFoundError, config=model.config,
                                   base=tmp_path / 'none.safetensors')
    jaxsd.save(random_model('sd21'), tmp_path / 'other')
    if 'text_encoder' in parts:
        return  # in miniature the two versions' encoders are alike
    assert same(flat(jaxsd.load(path, config=model.config, base=tmp_path / 'other').params['vae']),
                flat(random_model('sd21').params['vae']))


def test_a_unet_alone_without_its_prefix(model, saved, tmp_path):
    """As ComfyUI keeps them in diffusion_models."""
    prefix = names.prefixes(model.config)['unet']
    tensors = {k.removeprefix(prefix): 3 * a for k, a in saved[1].items() if k.startswith(prefix)}
    save_file(tensors, tmp_path / 'a.safetensors')
    found = jaxsd.load(tmp_path / 'a.safetensors', config=model.config, base=saved[0])
    assert same(flat(found.params['unet']),
                {k: 3 * a for k, a in flat(model.params['unet']).items()})
    assert same(flat(found.params['vae']), flat(model.params['vae']))


@pytest.mark.parametrize('name, version', [
    ('sd15_emaonly', 'sd15'), ('sdxl_base', 'sdxl'), ('sdxl_refiner', 'sdxl_refiner'),
    ('sd2_x4_upscaler', 'x4_upscaler')])
def test_released_unets_alone(name, version, tmp_path):
    prefix = 'model.diffusion_model.'
    sparse_file(tmp_path / 'a.safetensors', {
        k.removeprefix(prefix): s for k, s in SINGLE[name].items() if k.startswith(prefix)}, 'F16')
    source = open_single(tmp_path / 'a.safetensors', None, True, None)
    assert source.config.version == version and 'unet' not in source.absent()
    assert source.mismatches().keys() <= {'missing'}


def test_a_unet_alone_in_diffusers_names(model, saved, tmp_path):
    """As diffusers saves them, without the folder's config.json."""
    path = shutil.copy(saved[0] / 'unet' / 'diffusion_pytorch_model.safetensors', tmp_path)
    found = jaxsd.load(path, config=model.config, base=saved[0])
    assert same(flat(found.params), flat(model.params))
    for name, version in (('sd15_unet', 'sd15'), ('sdxl_base_unet', 'sdxl')):
        sparse_file(tmp_path / 'a.safetensors', FOLDERS[name], 'F16')
        source = open_single(tmp_path / 'a.safetensors', None, True, None)
        assert source.config.version == version and source.mismatches().keys() == {'missing'}
        assert source.absent() == [part for part in source.places if part != 'unet']


@pytest.mark.slow
@pytest.mark.parametrize('version', ['sd15', 'sd21', 'sdxl', 'sdxl_refiner'])
@pytest.mark.parametrize('seed', range(3))
def test_any_mixture_of_known_spellings(version, seed, tmp_path):
    """Every tensor under one of the names that files have for it, whatever the others have."""
    config, rng, tensors = small_config(version), np.random.default_rng(seed), {}
    model = jaxsd.Model(config, {part: random_params(rng, s) for part, s in spec(config).items()})
    prefixes = names.prefixes(config)
    for part, shapes in spec(config).items():
        arrays = traverse_util.flatten_dict(model.params[part], sep='.')
        for name, place in names.network_places(part, getattr(config, part), shapes,
                                                prefixes[part]).items():
            options = [p for p in (place, *names._spellings(name, prefixes[part], part,
                                                            shapes[name], place))
                       if p.how not in ('q', 'k', 'v')]  # fused: the three are one
            place = options[rng.integers(len(options))]
            if part == 'vae':
                for block, new in (('mid.attn_1', 'q'), ('mid_block.attentions.0', 'to_q')):
                    old = rng.choice(['to_q', 'query', 'q'])
                    place = place._replace(name=place.name.replace(f'{block}.{new}.',
                                                                   f'{block}.{old}.'))
            array = from_jax(name, np.asarray(arrays[name]))
            array = array.T if place.how == 'T' else array.reshape(place.shape(array.shape))
            tensors[place.name] = np.ascontiguousarray(array)
    save_file(tensors, tmp_path / 'a.safetensors')
    found = jaxsd.load(tmp_path / 'a.safetensors', config=config)
    assert same(flat(found.params), flat(model.params))
    vae = jaxsd.load_vae(tmp_path / 'a.safetensors', config=config.vae)
    assert same(flat(vae.params), flat(model.params['vae']))


@pytest.mark.parametrize('old, new', [
    ('q', 'to_q'), ('q', 'query'), ('k', 'to_k'), ('v', 'value'), ('proj_out', 'to_out.0'),
    ('proj_out', 'proj_attn'), ('norm', 'group_norm')])
def test_a_vaes_attention_under_the_names_of_folders(old, new, model, saved, tmp_path):
    """What converters wrote after diffusers renamed its layers."""
    def rename(name, block):
        return name.replace(f'{block}.{old}.', f'{block}.{new}.')
    tensors = {rename(k, 'mid.attn_1'): a for k, a in saved[1].items()}
    assert tensors.keys() != saved[1].keys()
    save_file(tensors, tmp_path / 'a.safetensors')
    found = jaxsd.load(tmp_path / 'a.safetensors', config=model.config)
    assert same(flat(found.params), flat(model.params))
    tensors |= {k: a for k, a in saved[1].items() if f'attn_1.{old}.bias' in k}
    save_file(tensors, tmp_path / 'a.safetensors')
    assert '2 unexpected: ' in fails(tmp_path / 'a.safetensors', config=model.config)


# {file: tensors that ComfyUI and trainers leave in files of that version}, and their shapes.
LEFT = {
    'sd15_emaonly': {'cond_stage_model.logit_scale': [], 'cond_stage_model.text_projection':
                     [768, 768], 'cond_stage_model.transformer.text_projection.weight': [768, 768],
                     'global_step': [], 'first_stage_model.loss.logvar': []},
    'sd2': {'cond_stage_model.logit_scale': [], 'cond_stage_model.model.text_projection.weight':
            [1024, 1024], 'cond_stage_model.transformer.logit_scale': []},
    'sdxl_base': {'conditioner.embedders.0.logit_scale': [], 'epoch': [],
                  'conditioner.embedders.0.text_projection': [768, 768],
                  'conditioner.embedders.0.transformer.text_projection.weight': [768, 768],
                  'conditioner.embedders.1.logit_scale': []},
    'sdxl_refiner': {'conditioner.embedders.0.logit_scale': [], 'global_step': []},
}


@pytest.mark.parametrize('name', LEFT)
def test_what_other_programs_leave_in_checkpoints(name, tmp_path):
    sparse_file(tmp_path / 'a.safetensors', SINGLE[name] | LEFT[name], 'F16')
    source = open_single(tmp_path / 'a.safetensors', None, True, None)
    assert source.mismatches() == {} and LEFT[name].keys() <= set(source.extras)


def test_a_base_of_another_version(tmp_path):
    """The released shapes: a U-Net of SDXL cannot take what it lacks from 1.5."""
    sparse_file(tmp_path / 'xl.safetensors', {
        k: s for k, s in SINGLE['sdxl_base'].items() if k.startswith('model.')}, 'F16')
    sparse_file(tmp_path / 'base.safetensors', SINGLE['sd15_emaonly'], 'F16')
    xl = open_single(tmp_path / 'xl.safetensors', None, True, None)
    assert xl.absent() == ['vae', 'text_encoder', 'text_encoder_2']
    with pytest.raises(ValueError, match='has no text_encoder_2 for .*is sdxl; found sd15'):
        xl.take(xl.absent(), open_single(tmp_path / 'base.safetensors', None, True, None))


def test_the_parts_of_a_base_bring_their_tokenizers(tmp_path):
    whole = random_model('sd15', tokenizers=True)
    jaxsd.save(whole, tmp_path / 'base')
    jaxsd.save(whole, tmp_path / 'a.safetensors', layout='single-file')
    save_file({k: a for k, a in load_file(tmp_path / 'a.safetensors').items()
               if not k.startswith('cond_stage_model.')}, tmp_path / 'a.safetensors')
    found = jaxsd.load(tmp_path / 'a.safetensors', config=whole.config, base=tmp_path / 'base')
    assert found.tokenizers.keys() == {'text_encoder'}


def test_strays(model, saved, tmp_path, caplog):
    path = tmp_path / 'a.safetensors'
    strays = {'model.diffusion_model.merged.weight': np.zeros(3, 'f4'), 'lora_a': np.ones(1, 'f4')}
    save_file(saved[1] | strays, path)
    said = fails(path, config=model.config)
    assert '2 unexpected: lora_a, model.diffusion_model.merged.weight' in said
    assert 'strays=True' in said and not caplog.text
    found = jaxsd.load(path, config=model.config, strays=True)
    assert same(flat(found.params), flat(model.params)) and not found.extras.keys() & strays.keys()
    assert 'left out 2 tensors' in caplog.text and 'lora_a' in caplog.text
    tensors = saved[1] | strays
    del tensors['model.diffusion_model.out.2.bias']
    save_file(tensors, path)
    said = fails(path, config=model.config, strays=True)
    assert 'out.2.bias' in said and 'unexpected' not in said and 'strays=True' not in said


def test_names_of_several_lines_are_shown_in_one(model, saved, tmp_path):
    save_file(saved[1] | {'a\nb': np.zeros(3, 'f4')}, tmp_path / 'a.safetensors')
    said = fails(tmp_path / 'a.safetensors', config=model.config)
    assert '1 unexpected: a\N{REPLACEMENT CHARACTER}b.' in said


FLOAT8 = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


@pytest.mark.parametrize('float8', FLOAT8)
def test_float8(float8, model, saved, tmp_path):
    path = tmp_path / 'a.safetensors'
    stored = {k: a.astype(float8) for k, a in saved[1].items()}
    save_file(stored, path)
    assert {str(d) for d in open_tensors(path).dtypes.values()} == {np.dtype(float8).name}
    found = jaxsd.load(path, 'bfloat16', config=model.config)
    expected = {k: a.astype(float8).astype('bfloat16') for k, a in flat(model.params).items()}
    assert same(flat(found.params), expected)
    kept = jaxsd.load(path, None, config=model.config)
    jaxsd.save(kept, tmp_path / 'b.safetensors', layout='single-file')
    again = open_tensors(tmp_path / 'b.safetensors')
    assert same({name: again.read(name) for name in again.shapes}, stored)


@pytest.mark.parametrize('scale, scale_input, mark', [
    ('scale_weight', 'scale_input', 'model.diffusion_model.scaled_fp8'),
    ('weight_scale', 'input_scale', 'model.diffusion_model.out.2.comfy_quant')])
def test_scaled_float8(scale, scale_input, mark, model, saved, tmp_path):
    """ComfyUI's: weight = stored * scale, one scale per layer."""
    path, tensors, expected = tmp_path / 'a.safetensors', {}, {}
    for i, (name, a) in enumerate(saved[1].items()):
        if a.ndim > 1 and name.endswith('.weight'):
            factor = np.float32(0.25 + i % 7)
            tensors[name] = (a / factor).astype(ml_dtypes.float8_e4m3fn)
            tensors[name.removesuffix('weight') + scale] = np.full(() if i % 2 else 1, factor)
            tensors[name.removesuffix('weight') + scale_input] = np.ones((), 'f4')
            expected[name] = tensors[name].astype('f4') * factor
        else:
            tensors[name] = expected[name] = a
    tensors[mark] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    save_file(tensors, path)
    save_file(expected, tmp_path / 'b.safetensors')
    found, plain = (jaxsd.load(p, config=model.config) for p in (path, tmp_path / 'b.safetensors'))
    assert same(flat(found.params), flat(plain.params))
    assert not same(flat(found.params), flat(model.params))
    name = next(n for n in expected if tensors[n].dtype != np.float32)
    tensors[name.removesuffix('weight') + scale] = np.ones(8, 'f4')  # per row
    save_file(tensors, path)
    assert 'one scale per tensor' in fails(path, config=model.config)


FUZZ = r'''
import pathlib, random, re, signal, sys
from test_wild_files import use
from test_pickles import mutated
from jaxsd.weights.files import open_tensors
path, data = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_bytes()
length = 8 + int.from_bytes(data[:8], 'little')
def peak():
    status = pathlib.Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) * 1024
rng, fine = random.Random(0), 0
path.write_bytes(data)
use(path)
before = peak()
for i in range(1000):
    signal.alarm(10)  # ends the process
    path.write_bytes(mutated(data[:length], rng) + data[length:])
    fine += use(path)
print(fine, peak() - before)
'''


def use(path):
    """Read everything; whether that went well. Only errors for users, of one line, may come."""
    try:
        file = open_tensors(path)
        for name in file.shapes:
            assert file.read(name).nbytes <= path.stat().st_size
        return True
    except (ValueError, FileNotFoundError) as error:
        assert '\n' not in str(error), error
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc/self/status')
def test_fuzzed_headers(tmp_path):
    """1,000 mutations of a header: no crash, no hang, no more memory than twice the file."""
    rng = np.random.default_rng(0)
    kinds = itertools.cycle((np.float32, np.float16, ml_dtypes.bfloat16, *FLOAT8, np.int64))
    tensors = {f'layer.{i}.weight': rng.normal(size=(40 + i, 1200)).astype(next(kinds))
               for i in range(40)}
    save_file(tensors, tmp_path / 'whole.safetensors', {'format': 'pt', 'ss_note': 'x' * 50})
    done = subprocess.run(
        [sys.executable, '-c', FUZZ, tmp_path / 'a.safetensors', tmp_path / 'whole.safetensors'],
        cwd=__file__.rpartition('/')[0], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fine, peak = map(int, done.stdout.split())
    assert 0 < fine < 1000
    assert peak < 2 * (tmp_path / 'whole.safetensors').stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize('bias, dtype, version', [
    (-0.4, 'float32', 'sd21_base'), (-0.6, 'float16', 'sd21')])
def test_the_output_tells_what_a_2x_model_predicts(bias, dtype, version, tmp_path, monkeypatch):
    """As A1111's is_using_v_parameterization_for_sd2: of an input of 0.5 everywhere, v is where the
    mean of (output - input) is below -1."""
    monkeypatch.setattr(reading, 'read_config', small_config)
    monkeypatch.setattr(reading, 'CANDIDATES', ('sd15', 'sd21'))
    config, rng, path = small_config('sd21'), np.random.default_rng(0), tmp_path / 'a.safetensors'
    params = {part: random_params(rng, shapes) for part, shapes in spec(config).items()}
    out = params['unet']['conv_out']
    params['unet']['conv_out'] = {'weight': 0 * out['weight'], 'bias': 0 * out['bias'] + bias}
    jaxsd.save(jaxsd.Model(config, params), path, 'single-file')
    save_file({k: a for k, a in load_file(path).items() if k != 'v_pred'}, path)  # no header too
    assert jaxsd.load(path, dtype).config == small_config(version)
    for kind, given in (('v_prediction', 'sd21'), ('epsilon', 'sd21_base')):
        assert jaxsd.load(path, dtype, prediction_type=kind).config == small_config(given)
