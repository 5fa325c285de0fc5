"""Pictures made again from their own files, to the bit, and from other programs' texts."""

import contextlib
import itertools
import json
import re
import sys

import numpy as np
import pytest
import tiny_detectors
import tiny_ip_adapters
from absl import flags
from conftest import TINY
from mains import ROOT, run_main
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file, save_file

import jaxsd
from jaxsd.run import infotext, picture
from jaxsd.run.generate import slots_for_requests
from launch import engine, generate


@contextlib.contextmanager
def _flags(define=generate.define_flags):
    """The main's flags, fresh, and away afterwards: other tests define theirs."""
    before = set(flags.FLAGS)
    define()
    try:
        yield
    finally:
        mine = flags.FlagValues()
        for name in set(flags.FLAGS) - before:  # --config.steps and the like among them
            mine[name] = flags.FLAGS[name]
        flags.FLAGS.remove_flag_values(mine)
        flags.FLAGS.unparse_flags()


@contextlib.contextmanager
def _unpainted():
    """Pictures are black and need no program, where only what is written beside them matters."""
    def black(model, requests, **_):
        return np.zeros((len(requests), 64, 64, 3), np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxsd, 'generate', black)
        yield


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(*flags) -> the pictures written, stderr; in this process, where programs compile once."""
    numbers = itertools.count()

    def make(*arguments, out=None):
        out = out or tmp_path / f'out{next(numbers)}'
        before = set(out.glob('*.png'))
        steps = [] if '--from' in str(arguments) else ['--config.steps=2']
        argv = ['generate', *steps, f'--out={out}', *arguments]
        monkeypatch.setattr(sys, 'argv', argv)
        with _flags():
            try:
                generate.main(generate.parse(argv))
            except SystemExit as stop:
                error = capsys.readouterr().err
                assert stop.code in (1, 2) and error.count('error: ') == 1
                assert set(out.glob('*.png')) == before
                return [], error
        return sorted(set(out.glob('*.png')) - before), capsys.readouterr().err

    return make


def _pixels(path):
    with Image.open(path) as file:
        return np.asarray(file)


@pytest.fixture
def repeat(run):
    """Make a picture again and compare it with the file."""
    def check(path, *flags):
        (again,), error = run(f'--from={path}', '--trust', *flags)
        np.testing.assert_array_equal(_pixels(again), _pixels(path))
        with Image.open(again) as new, Image.open(path) as old:
            assert json.loads(new.text['jaxsd']) == json.loads(old.text['jaxsd'])
            assert new.text['parameters'] == old.text['parameters']
        assert 'warning: made' not in error and 'note:' not in error, error

    return check


@pytest.fixture
def drawn(tmp_path):
    """Two pictures and a mask."""
    rng = np.random.default_rng(0)
    for name in 'ab':
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f'{name}.png')
    Image.fromarray(np.tile(np.uint8([[0] * 40 + [255] * 24]), (64, 1))).save(tmp_path / 'mask.png')
    return tmp_path


@pytest.mark.slow
def test_emoji(run, tmp_path):
    """In a folder that has pictures; and as a user does it, in another process."""
    out = tmp_path / 'out'
    for seed in (1, 2):
        run('--prompt=red apple', f'--seed={seed}', '--config.sampler=euler_ancestral', out=out)
    path = out / '00001-2-red-apple.png'
    code, stdout, stderr = run_main('-m', 'launch.generate', f'--out={out}', f'--from={path}')
    assert code == 0 and 'warning: made' not in stderr, stderr
    np.testing.assert_array_equal(_pixels(out / '00002-2-red-apple.png'), _pixels(path))
    assert (_pixels(path) != _pixels(out / '00000-1-red-apple.png')).any()


def test_emoji_of_several_prompts_and_a_batch(run, repeat):
    made, _ = run('--prompt=red apple', '--prompt=cat', '--num_images=2', '--seed=5',
                  '--config.sampler=dpmpp_2s_ancestral', '--negative_prompt=dog')
    repeat(made[2])  # the first cat of four pictures and a grid
    with Image.open(made[2]) as file:
        assert json.loads(file.text['jaxsd'])['slots'] == slots_for_requests(4)


def test_emoji_from_pictures(run, repeat, drawn):
    (made,), _ = run('--prompt=cat', f'--image={drawn}/a.png', '--strength=0.5')
    repeat(made)
    (made,), _ = run('--prompt=cat', f'--image={drawn}/a.png', f'--mask={drawn}/mask.png',
                     '--config.request=fill=edge, mask_blur=1')
    repeat(made)
    Image.open(drawn / 'b.png').save(drawn / 'a.png')
    _, error = run(f'--from={made}', '--trust')
    assert re.search('error: .*a.png has changed since .* was made from it\n$', error)
    (drawn / 'a.png').unlink()
    _, error = run(f'--from={made}', '--trust')
    assert re.search('error: no such file: .*a.png\n$', error)


@pytest.mark.slow
def test_flags_beside_it(run, repeat, checkpoint, drawn):
    size = '--config.width=64', '--config.height=64'
    (first,), _ = run(f'--checkpoint={checkpoint}', '--prompt=cat', '--seed=7', *size,
                      '--config.schedule=exponential', '--negative_prompt=dog')
    repeat(first)
    (other,), _ = run(f'--checkpoint={checkpoint}', '--prompt=cat', '--seed=8', *size,
                      '--config.schedule=exponential', '--negative_prompt=dog')
    (again,), _ = run(f'--from={first}', '--trust', '--seed=8')
    np.testing.assert_array_equal(_pixels(again), _pixels(other))
    with _unpainted():
        (again,), _ = run(f'--from={first}', '--trust', '--prompt=apple', '--config.steps=3',
                          '--negative_prompt=', f'--image={drawn}/a.png',
                          '--config.request=weighting=none')
        several, _ = run(f'--from={first}', '--trust', '--num_images=2')
    found = infotext.read(again).fields
    assert (found['prompt'], found['steps'], found['negative_prompt'], found['seed']) == (
        'apple', 3, '', 7)
    assert (found['schedule'], found['strength'], found['weighting']) == ('exponential', 0.75,
                                                                        'none')
    assert [path.name.split('-')[1] for path in several] == ['7', '8', 'grid.png']


@pytest.mark.slow
def test_emoji_with_a_hint(run, repeat, drawn):
    flag = f'--control=net={ROOT}/checkpoints/emoji_edges, image={drawn}/a.png, preprocess=scribble'
    (made,), _ = run('--prompt=cat', flag)
    repeat(made)
    Image.open(drawn / 'b.png').save(drawn / 'a.png')
    _, error = run(f'--from={made}', '--trust')
    assert re.search('error: .*a.png has changed since .* was made from it\n$', error)
    run(f'--from={made}', '--trust', flag)  # given anew, it may be another
    (made,), _ = run('--prompt=cat', f'--reference=image={drawn}/b.png, weight=0.5, end=0.9')
    repeat(made)
    _, error = run(f'--from={made}')
    assert re.search(r'error: .* names reference=.*--trust', error)
    _, error = run('--prompt=cat', '--reference=weight=0.5')
    assert 'expected image=PATH in it' in error
    net = tiny_detectors.write('ControlNetHED', drawn)
    (made,), _ = run('--prompt=cat', flag.replace('scribble', 'softedge_hed'), f'--detectors={net}')
    repeat(made)
    _, error = run(f'--from={made}')
    assert re.search(r'error: .* names .*detectors=.*--trust', error)


@pytest.mark.slow
def test_image_prompts(run, repeat, checkpoint, drawn):
    tiny_ip_adapters.adapters(TINY['sd1'].unet, drawn, plus='plus', face=('faceid', {'rank': 2}))
    jaxsd.save_network(tiny_ip_adapters.encoder(), drawn / 'look')
    np.save(drawn / 'face.npy', np.arange(12, dtype=np.float32))
    model = [f'--checkpoint={checkpoint}', '--prompt=cat', '--seed=7', '--width=64', '--height=64']
    nets = [f'--ip_adapter={drawn}/plus.safetensors', f'--ip_adapter=it={drawn}/face.safetensors']
    look, plus = f'--image_encoder={drawn}/look', f'--image_prompt=net=plus, image={drawn}/a.png'
    (made,), _ = run(*model, *nets, look, f'{plus}, weight=0.6, end=0.5, mask={drawn}/mask.png',
                     f'--image_prompt=net=it, embeds={drawn}/face.npy')
    repeat(made)
    _, error = run(f'--from={made}')
    assert re.search('error: .* names image_prompts=.*ip_adapter=.*image_encoder=.*--trust', error)
    with _unpainted():
        (again,), _ = run(f'--from={made}', '--trust', f'{plus}, weight=2')
    record = infotext.read(again)
    [prompt] = record.fields['image_prompts']
    assert (prompt.net, prompt.weight, prompt.mask) == ('plus', 2, None)
    assert record.run['ip_adapter'] == [f'plus={drawn}/plus.safetensors']  # what is not used is not
    Image.open(drawn / 'b.png').save(drawn / 'a.png')
    _, error = run(f'--from={made}', '--trust')
    assert re.search('error: .*a.png has changed since .* was made from it\n$', error)
    for more, message in (
            ([plus], "net='plus': expected its file as --ip_adapter=plus=PATH, and --image_enc"),
            ([plus, nets[1]], "unknown IP-Adapter 'plus'"),
            ([plus, nets[0]], '--image_encoder=PATH'),
            ([plus, nets[0], f'--image_encoder={checkpoint}'], 'folder of a CLIP image encoder'),
            ([f'{plus}, wieght=1', *nets], "did you mean 'weight'"),
            (['--image_prompt=image=a.png'], 'expected net=NAME in it'),
            (['--image_prompt=net=plus'], 'expected image= or embeds=')):
        assert message in run(*model, *more)[1]


@pytest.mark.slow
def test_adapters_embeddings_and_wildcards(run, repeat, checkpoint, drawn):
    rng = np.random.default_rng(0)
    layer = 'unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'
    (drawn / 'loras').mkdir()
    for name in ('style', 'other'):
        save_file({f'{layer}.lora_{side}.weight': rng.normal(size=shape).astype(np.float32)
                   for side, shape in (('A', (2, 32)), ('B', (32, 2)))},
                  drawn / 'loras' / f'{name}.safetensors')
    save_file({'emb_params': rng.normal(size=(2, 32)).astype(np.float32)},
              drawn / 'thing.safetensors')
    (drawn / 'words').mkdir()
    (drawn / 'words' / 'animal.txt').write_text('dog\ncat\n')
    flags = [f'--checkpoint={checkpoint}', '--seed=7', '--config.width=64', '--config.height=64',
             f'--lora={drawn}/loras', f'--embeddings=it={drawn}/thing.safetensors']
    (plain,), _ = run('--prompt=red it', *flags)
    repeat(plain)
    (made,), _ = run('--prompt=red it __animal__ <lora:style:0.8>', f'--wildcards={drawn}/words',
                     *flags)
    assert (_pixels(made) != _pixels(plain)).any()
    past = infotext.read(made)
    assert past.run['lora'] == [f'style={drawn}/loras/style.safetensors']
    assert '__' not in past.fields['prompt']
    repeat(made)
    _, error = run('--prompt=<lora:stile:1>', *flags)
    assert "unknown adapter 'stile': did you mean 'style'" in error
    _, error = run('--prompt=<lora:style:1>', *flags[:4])
    assert "adapter 'style': expected its file as --lora=PATH" in error
    (drawn / 'loras' / 'style.safetensors').unlink()
    _, error = run(f'--from={made}', '--trust')
    assert re.search('error: .*style.safetensors: no such file', error)


def test_strays(run, tiny_model, tmp_path):
    """What is not the model's, in a checkpoint and in a LoRA, is left out by one flag, which a
    picture's record and the engine of batch and serve know too."""
    rng = np.random.default_rng(0)
    jaxsd.save(tiny_model('sd1'), tmp_path / 'model')
    file = tmp_path / 'model' / 'unet' / 'diffusion_pytorch_model.safetensors'
    save_file(load_file(file) | {'merged': np.ones(3, 'f4')}, file)
    layers = ('unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q', 'unet.other')
    save_file({f'{layer}.lora_{side}.weight': rng.normal(size=shape).astype(np.float32)
               for layer in layers for side, shape in (('A', (2, 32)), ('B', (32, 2)))},
              tmp_path / 'style.safetensors')
    flags = ['--prompt=red <lora:style:1>', f'--checkpoint={tmp_path}/model', '--seed=7',
             '--config.width=64', '--config.height=64', f'--lora={tmp_path}/style.safetensors']
    _, error = run(*flags)
    assert '1 unexpected: unet/merged' in error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['x', *flags[1:2], *flags[-1:], '--strays'])
        with _flags(engine.define_flags):
            generate.parse(sys.argv)
            how = engine.describe()
    assert how['strays'] is True
    maker, _, how = engine.build(how)
    assert how['strays'] is True and maker.nets[0].adapters.keys() == {'style'}
    with pytest.raises(ValueError, match='1 unexpected: unet/merged'):
        engine.build(how | {'strays': False})
    with _unpainted():
        (made,), _ = run(*flags, '--strays')
        assert infotext.read(made).run['strays'] is True
        run(f'--from={made}', '--trust')


@pytest.mark.parametrize('change, message', [
    ({'checkpoint': 'stranger/model'}, 'a.png names checkpoint=stranger/model: give it as a flag'),
    ({'base': 'stranger/model'}, 'a.png names base=stranger/model: give it as a flag, or --trust'),
    ({'vae': '/etc/passwd', 'refiner': 'a/b'}, 'names vae=/etc/passwd, refiner=a/b: give them as'),
    ({'control': ['net=a/b, image=/etc/shadow']}, 'ControlNets and 0 hints'),
    ({'lora': ['/etc'], 'embeddings': ['/root']}, "names lora=.'/etc'., embeddings=.'/root'.: "),
    ({'request': {'image': '/etc/passwd'}}, 'names image=/etc/passwd: give it as a flag'),
    ({'request': {'image': '/no/such/file'}}, 'names image=/no/such/file: give it as a flag'),
    ({'request': {'wildcards': '/etc'}}, 'a.png names wildcards=/etc: give it as a flag'),
    ({'request': {'schedule': '/etc/x.json'}}, 'a.png names schedule=/etc/x.json: give it'),
    ({'request': {'controls': [{'net': 'a/b', 'image': '/etc/shadow'}]}}, 'a.png names controls='),
    ({'checkpoint': 'a\x1b[2J\x07b'}, r'names checkpoint=a\\x1b\[2J\\x07b: give it as a flag'),
    ({'checkpoint': 'x' * 9999}, 'names checkpoint=x{200}\\.\\.\\.: give it as a flag'),
    ({'request': {'prompt': 'a' * 2**20}}, 'its record has [0-9]* characters: expected at most'),
    ({'request': {'steps': 10**9}}, 'its record is damaged: steps'),
    ({'request': {'width': 10**6}}, 'its record is damaged: '),
    ({'slots': 10**9}, 'its record is damaged: slots=1000000000'),
    ({'tile': -1}, 'its record is damaged: tile=-1'),
    ({'dtype': 'float\x1b[31m'}, r'dtype .float\\x1b\[31m.: expected one of float32'),
])
def test_what_a_strangers_record_may_not_say(run, monkeypatch, drawn, change, message):
    record = json.loads(picture.record(
        jaxsd.Request('cat', seed=3), checkpoint=str(ROOT / 'checkpoints' / 'emoji'),
        dtype='float32'))
    record['request'] |= change.get('request', {})
    path = drawn / 'a.png'
    picture.write_png(path, np.zeros((8, 8, 3), np.uint8), {
        'jaxsd': json.dumps(record | {k: v for k, v in change.items() if k != 'request'})})
    if 'dtype' not in change:
        monkeypatch.setattr(jaxsd, 'load', lambda *_, **__: pytest.fail('it looked for the model'))
    _, error = run(f'--from={path}')
    assert re.search(f'error: [^\n]*{message}[^\n]*\n$', error), error
    assert error.replace('\n', '').isprintable() and len(error) < 1000


def _foreign(path, text):
    info = PngImagePlugin.PngInfo()
    info.add_text('parameters', text)
    Image.new('RGB', (8, 8)).save(path, pnginfo=info)
    return path


def test_texts_of_other_programs(run, checkpoint, tmp_path):
    path = _foreign(tmp_path / 'a.png', 'red cat\nNegative prompt: dog\nSteps: 3, Sampler: DPM++ '
                    '2M Karras, CFG scale: 5, Seed: 9, Size: 64x64, Model: anything, '
                    'Face restoration: GFPGAN, Model hash: 45dee52b1c, '
                    'Denoising strength: 0.5')
    _, error = run(f'--from={path}')
    assert "made with 'anything', and does not say where that is: give it as --chec" in error
    (made,), error = run(f'--from={path}', f'--checkpoint={checkpoint}')
    assert re.findall('^note: (.*)$', error, re.M) == [
        'the picture that it was made from is not in the text: give it as --image',
        'Face restoration: GFPGAN is not honoured']
    [line] = re.findall('^warning: (model.*)$', error, re.M)
    assert line.startswith('model: the picture was made with the file of hash 45dee52b1c, and ')
    text = Image.open(made).text['parameters']
    assert re.search(rf'Model hash: {line[-10:]}, Model: ', text)
    _, error = run(f'--from={made}', f'--checkpoint={checkpoint}')
    assert 'hash' not in error
    found = infotext.read(made).fields
    assert found['noise'] == 'philox' and found['seed'] == 9 and found['steps'] == 3
    assert (found['sampler'], found['schedule'], found['guidance']) == ('dpmpp_2m', 'karras', 5)
    with _unpainted():
        (again,), error = run(f'--from={path}', f'--checkpoint={checkpoint}', f'--image={path}')
    assert infotext.read(again).fields['strength'] == 0.5


def test_a_graph_of_comfyui(run, checkpoint, tmp_path):
    """The same seed, steps and noise as by flags."""
    nodes = {'3': ('KSampler', dict(
        seed=9, steps=3, cfg=5.0, sampler_name='euler', scheduler='karras', denoise=1.0,
        model=['4', 0], positive=['6', 0], negative=['7', 0], latent_image=['5', 0])),
        '4': ('CheckpointLoaderSimple', {'ckpt_name': 'anything.ckpt'}),
        '5': ('EmptyLatentImage', {'width': 64, 'height': 64, 'batch_size': 1}),
        '6': ('CLIPTextEncode', {'text': 'red cat', 'clip': ['4', 1]}),
        '7': ('CLIPTextEncode', {'text': 'dog', 'clip': ['4', 1]}),
        '8': ('VAEDecode', {'samples': ['3', 0], 'vae': ['4', 2]}),
        '9': ('SaveImage', {'images': ['8', 0]})}
    info = PngImagePlugin.PngInfo()
    info.add_text('prompt', json.dumps({key: {'class_type': kind, 'inputs': inputs}
                                        for key, (kind, inputs) in nodes.items()}))
    path = tmp_path / 'a.png'
    Image.new('RGB', (8, 8)).save(path, pnginfo=info)
    _, error = run(f'--from={path}')
    assert "made with 'anything', and does not say where that is" in error
    (made,), error = run(f'--from={path}', f'--checkpoint={checkpoint}')
    assert 'note:' not in error
    (same,), _ = run('--prompt=red cat', '--negative_prompt=dog', '--seed=9', '--steps=3',
                     '--guidance=5', '--sampler=euler', '--schedule=karras', '--width=64',
                     '--height=64', '--request=noise=torch, weighting=comfy',
                     f'--checkpoint={checkpoint}')
    assert (_pixels(made) == _pixels(same)).all()


def test_versions_that_differ(run, checkpoint, tmp_path):
    request = jaxsd.Request('cat', seed=3, width=64, height=64, steps=2)
    text = json.loads(picture.record(request, checkpoint=str(checkpoint), dtype='float32'))
    text['versions']['jax'], text['device'] = '0.1', 'TPU v9'
    path = tmp_path / 'a.png'
    picture.write_png(path, np.zeros((8, 8, 3), np.uint8), {'jaxsd': json.dumps(text)})
    (made,), error = run(f'--from={path}', '--trust')
    warnings = re.findall('^warning: .*$', error, re.M)
    assert len(warnings) == 1 and 'made with jax 0.1, here' in warnings[0]
    assert 'device TPU v9, here cpu' in warnings[0]


@pytest.mark.parametrize('flags, message', [
    (['--from={tmp}/none.png'], 'no such file: .*none.png'),
    (['--from={tmp}/a.png'], 'a.png does not say how it was made'),
    (['--prompt=a', '--lora={tmp}/none'], '--lora=.*no such file or folder: .*none'),
    (['--prompt=a', '--lora=x={tmp}/none'], '--lora=x=.*no such file or folder: /.*none'),
    (['--prompt=a', '--embeddings={tmp}'], 'expected files in the folder that end in .safe'),
    (['--prompt=a', '--lora={tmp}/a.png', '--lora=a={tmp}/b.png'], "are both called 'a'"),
])
def test_bad_input_is_one_clear_line(run, drawn, flags, message):
    _, error = run(*(flag.format(tmp=drawn) for flag in flags))
    assert re.search(f'error: [^\n]*{message}[^\n]*\n$', error), error
