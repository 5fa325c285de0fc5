"""How a picture was made, read back from its file."""

import json
import re

import numpy as np
import pytest
from conftest import at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from mains import ROOT
from PIL import Image

from jaxsd.run import infotext, picture
from jaxsd.run.request import WEIGHTINGS, Control, Hires, ImagePrompt, Request
from jaxsd.sampling.names import SAMPLER_NAMES, SCHEDULE_NAMES

BLANK = np.zeros((8, 8, 3), np.uint8)
# As stable-diffusion-webui 1.10 writes it; what is read from it stands in the tests.
A1111 = '''girl with an artist's beret, (blue eyes:1.2), [cat|dog]
in the desert <lora:add_detail:0.6>
Negative prompt: ugly, (fat:1.2),
blurry
Steps: 28, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 7.5, Seed: 965400086, \
Size: 512x768, Model hash: 45dee52b1c, Model: a model, VAE hash: 735e4c3a44, \
VAE: vae-ft-mse.safetensors, Clip skip: 2, ENSD: 31337, RNG: CPU, Emphasis: Ignore, \
Lora hashes: "add_detail: 7c6bad76eb54", TI hashes: "easynegative: c74b4e810b03", \
Token merging ratio: 0.5, Hypernet: "a, b", Variation seed: 5, Variation seed strength: 0.1, \
Version: v1.10.1'''


def test_parse_as_a1111_does():
    prompt, negative, pairs = infotext.parse(A1111)
    assert prompt == ("girl with an artist's beret, (blue eyes:1.2), [cat|dog]\n"
                      'in the desert <lora:add_detail:0.6>')
    assert negative == 'ugly, (fat:1.2),\nblurry'
    assert list(pairs)[:3] == ['Steps', 'Sampler', 'Schedule type'] and len(pairs) == 21
    assert pairs['Lora hashes'] == 'add_detail: 7c6bad76eb54' and pairs['Hypernet'] == 'a, b'
    assert infotext.parse('a\nb: 1, c: 2') == ('a\nb: 1, c: 2', '', {})  # two pairs are prose
    assert infotext.parse('Negative prompt: x\nSteps: 1, Seed: 2, Size: 8x8')[:2] == ('', 'x')


def test_what_a1111_wrote():
    past = infotext.foreign(A1111)
    found = dict(past.fields)
    assert found.pop('prompt').endswith('<lora:add_detail:0.6>')
    assert found.pop('negative_prompt') == 'ugly, (fat:1.2),\nblurry'
    assert found == dict(
        steps=28, sampler='dpmpp_2m_sde', schedule='karras', guidance=7.5, seed=965400086,
        width=512, height=768, clip_skip=2, noise='torch', schedule_options={}, sampler_options={},
        step_noise='philox', eta_noise_seed_delta=31337, subseed=5, subseed_strength=0.1)
    assert past.run == {'model': 'a model'}
    for part in ("'vae-ft-mse.safetensors'.*--vae", 'Emphasis: Ignore',
                 'Token merging ratio: 0.5', 'Hypernet: a, b'):
        assert any(re.search(part, note) for note in past.notes), part
    assert len(past.notes) == 4
    Request(**past.fields)


def _fields(settings):
    return infotext.foreign(f'x\nSteps: 20, {settings}, CFG scale: 7, Seed: 1').fields


@pytest.mark.parametrize('written, sampler, schedule', [
    ('Sampler: DPM++ 2M Karras', 'dpmpp_2m', 'karras'),
    ('Sampler: DPM++ 2M', 'dpmpp_2m', 'normal'),  # before 1.9 a name without a schedule had none
    ('Sampler: DPM++ 2M, Schedule type: Automatic', 'dpmpp_2m', 'karras'),
    ('Sampler: Euler a, Schedule type: Automatic', 'euler_ancestral', 'normal'),
    ('Sampler: DPM++ 3M SDE Exponential', 'dpmpp_3m_sde', 'exponential'),
    ('Sampler: DPM2 a Karras', 'dpm_2_ancestral', 'karras'),
    ('Sampler: Euler, Schedule type: SGM Uniform', 'euler', 'sgm_uniform'),
    ('Sampler: Euler, Schedule type: Uniform', 'euler', 'normal'),
    ('Sampler: DDIM', 'ddim', 'ddim_uniform'),
    ('Sampler: Heun, Schedule type: Align Your Steps', 'heun', 'ays'),
    ('Sampler: euler_ancestral', 'euler_ancestral', 'normal'),
])
def test_samplers_and_schedules(written, sampler, schedule):
    found = _fields(written)
    assert (found['sampler'], found['schedule']) == (sampler, schedule)


def test_what_a1111_does_otherwise():
    assert _fields('Sampler: UniPC')['sampler_options'] == {'order': 3, 'variant': 'bh1'}
    assert _fields('Sampler: UniPC, UniPC variant: vary_coeff, UniPC order: 2')[
        'sampler_options'] == {'order': 2, 'variant': 'vary_coeff'}
    assert _fields('Sampler: DPM fast')['sampler_options'] == {'eta': 1}
    assert _fields('Sampler: DPM fast, Eta: 0.5')['eta'] == 0.5
    assert _fields('Sampler: Heun, Sigma churn: 0.5')['sampler_options'] == {'s_churn': 0.5}
    assert _fields('Sampler: LMS, Schedule type: Beta')['schedule_options'] == {'space': 'sigma'}
    assert _fields('Sampler: Euler Karras, Schedule max sigma: 10, Schedule min sigma: 0')[
        'schedule_options'] == {'sigma_max': 10}
    assert [_fields(f'Sampler: Euler{rng}')['noise'] for rng in (
        '', ', RNG: GPU', ', RNG: NV', ', RNG: CPU')] == ['philox', 'philox', 'philox', 'torch']
    assert _fields('Sampler: Euler, Emphasis: None')['weighting'] == 'none'
    assert _fields('Sampler: Euler, Emphasis: No norm')['weighting'] == 'no_norm'


def test_pictures_made_in_two_passes_or_from_pictures():
    hires = infotext.foreign('x\nSteps: 20, Sampler: Euler, Seed: 1, Denoising strength: 0.4, '
                             'Hires upscale: 2, Hires upscaler: Latent')
    assert 'strength' not in hires.fields and not hires.notes
    assert hires.fields['hires'] == {'strength': 0.4, 'scale': 2.0, 'upscaler': 'latent'}
    assert hires.fields['schedule_options'] == {'convention': 'comfyui'}
    unknown = infotext.foreign('x\nSteps: 20, Sampler: Euler, Seed: 1, Denoising strength: 0.4, '
                               'Hires upscale: 2, Hires upscaler: R-ESRGAN 4x+')
    assert 'hires' not in unknown.fields and 'R-ESRGAN 4x+' in unknown.notes[0]
    image = infotext.foreign('x\nSteps: 20, Sampler: Euler, Seed: 1, Denoising strength: 0.4, '
                             'Mask blur: 4')
    assert image.fields['schedule_options'] == {'convention': 'a1111'}
    assert (image.fields['strength'], image.fields['mask_blur']) == (0.4, 4)
    assert image.notes == ['the picture that it was made from is not in the text: give it as '
                           '--image']


def test_what_is_not_understood():
    past = infotext.foreign('x\nSteps: many, Sampler: Foo, Size: 3x4x5, RNG: dice, Seed: 1')
    assert past.fields['seed'] == 1 and not {'steps', 'width', 'sampler'} & set(past.fields)
    assert [note.split(':')[0] for note in past.notes] == ['Steps', 'Size', 'RNG', 'Sampler']


def test_models_that_know_no_clip_skip(tiny_model):
    request = Request(clip_skip=2, schedule='ays')
    (kept,), notes = infotext.fit([request], tiny_model('sd1').config)
    assert kept == request and not notes
    (sdxl, _), notes = infotext.fit([request, request], tiny_model('sdxl').config)
    assert (sdxl.clip_skip, sdxl.schedule_options, len(notes)) == (1, {'table': 'sdxl'}, 1)


LINES = st.lists(st.text(st.characters(exclude_categories=('C', 'Z')), min_size=1).filter(
    lambda line: not line.startswith('Negative prompt:')), max_size=3).map('\n'.join)
NUMBERS = st.floats(0.01, 30)


@settings(max_examples=300, deadline=None)
@given(st.builds(
    Request, prompt=LINES, negative_prompt=LINES, seed=st.integers(0, 2**64 - 1),
    steps=st.integers(1, 200), guidance=NUMBERS, width=st.integers(1, 2048),
    height=st.integers(1, 2048), clip_skip=st.integers(1, 12),
    sampler=st.sampled_from(sorted(set(SAMPLER_NAMES.values()))),
    schedule=st.sampled_from(sorted(set(SCHEDULE_NAMES.values()) - {'lambda_uniform'}))
    | st.just((14.6, 1 / 3, 0.0)) | st.just('a b/levels.json'),
    weighting=st.sampled_from(WEIGHTINGS), eta=st.none() | NUMBERS,
    noise=st.sampled_from(['threefry', 'torch', 'philox']), mask_blur=st.just(0) | NUMBERS),
    LINES)
def test_what_is_written_is_read(request, model):
    past = infotext.foreign(picture.parameters(request, model))
    assert Request(**past.fields) == request and not past.notes
    assert past.run == ({'model': model} if model else {})


def test_adapters_stand_in_the_prompt():
    text = picture.parameters(Request(prompt='cat', adapters={'a': 0.8, 'b': (1, 0.5)}))
    assert text.startswith('cat <lora:a:0.8:0.8> <lora:b:0.5:1>\n')


@pytest.mark.parametrize('ending', ['jpg', 'webp'])
@pytest.mark.parametrize('head, code', [(b'UNICODE\0', 'utf-16-be'), (b'UNICODE\0', 'utf-16-le'),
                                        (b'ASCII\0\0\0', 'ascii')])
def test_texts_in_exif(tmp_path, ending, head, code):
    exif = Image.Exif()
    text = 'cat\nSteps: 3, Sampler: Euler, Seed: 4'
    exif.get_ifd(0x8769)[0x9286] = head + text.encode(code)
    Image.new('RGB', (8, 8)).save(tmp_path / f'a.{ending}', exif=exif)
    assert infotext.read(tmp_path / f'a.{ending}').fields['steps'] == 3


def _record(path, request, **run):
    text = picture.record(request, **run)
    picture.write_png(path, BLANK, {'jaxsd': text})
    return path


def test_our_own_record(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    request = Request(
        prompt='für', image=tmp_path / 'a.png', mask=str(tmp_path / 'a.png'), steps=3, strength=0.5,
        guidance=[3, 2, 1], schedule=np.array([9, 1, 0.1, 0]), adapters={'x': 0.5}, seed=2**63,
        sampler_options={'order': np.int64(2)}, guidance_options={'perp_neg': [('dog', 1.0)]},
        controls=[Control('net', str(tmp_path / 'a.png'), 0.5, mode='mlsd')])
    past = infotext.read(_record(tmp_path / 'b.png', request, checkpoint='c', batch=3))
    assert not past.notes and past.run['checkpoint'] == 'c' and past.run['batch'] == 3
    again = Request(**past.fields)
    assert vars(again.controls[0]) == vars(request.controls[0])
    assert again.replace(controls=()) == request.replace(
        controls=(), image=str(tmp_path / 'a.png'))
    assert infotext.differences(past.run) == ''
    old = past.run | {'versions': {**past.run['versions'], 'jax': '0.1'}, 'device': 'H100'}
    assert infotext.differences(old).startswith('made with jax 0.1, here ')
    assert 'device H100, here cpu' in infotext.differences(old)


def test_files_that_changed_and_pictures_that_were_none(tmp_path):
    image = tmp_path / 'a.png'
    Image.new('RGB', (8, 8)).save(image)
    path = _record(tmp_path / 'b.png', Request(image=str(image)))
    Image.new('RGB', (8, 8)).save(image, compress_level=1)
    infotext.read(path).check_files()  # other bytes, the same pixels
    Image.new('RGB', (8, 8), 'red').save(image)
    past = infotext.read(path)
    with pytest.raises(ValueError, match='a.png has changed since the picture was made from it'):
        past.check_files()
    past.check_files(['mask'])
    image.unlink()
    with pytest.raises(FileNotFoundError, match='no such file: .*a.png'):
        past.check_files()
    assert infotext.read(path).named() == {'image': str(image)}
    request = Request(image=BLANK, controls=[Control('net', BLANK)])
    past = infotext.read(_record(path, request))
    assert past.fields['image'] is None and past.fields['controls'] == ()
    assert [note.split(':')[0] for note in past.notes] == ['image', "ControlNet 'net'"]


def test_image_prompts_in_a_record(tmp_path):
    for name in 'ab':
        Image.new('RGB', (8, 8)).save(tmp_path / f'{name}.png')
    np.save(tmp_path / 'face.npy', np.zeros(4))
    a, b, face = (str(tmp_path / name) for name in ('a.png', 'b.png', 'face.npy'))
    request = Request(image_prompts=[
        ImagePrompt('plus', [a, b], 0.5, end=0.7, blocks={'up': {'block_0': [0, 1, 0]}}),
        ImagePrompt('face', embeds=face, mask=b), ImagePrompt('plus', BLANK)])
    path = _record(tmp_path / 'c.png', request, ip_adapter=['plus=x'], image_encoder=['y'])
    past = infotext.read(path)
    assert past.run['ip_adapter'] == ['plus=x'] and past.run['image_encoder'] == ['y']
    assert {'ip_adapter', 'image_encoder', 'image_prompts'} == past.named().keys()
    assert past.notes == ["image prompt 'plus': was given as an array, which the record does not "
                          'hold']
    plus, other = Request(**past.fields).image_prompts
    assert vars(other) == vars(request.image_prompts[1])
    assert vars(plus) == vars(request.image_prompts[0]) | {'blocks': {'up': {'block_0': [0, 1, 0]}}}
    past.check_files()
    np.save(tmp_path / 'face.npy', np.ones(4))
    with pytest.raises(ValueError, match='face.npy has changed since'):
        past.check_files()
    past.check_files(['image'])


def test_a_schedule_file_that_changed(tmp_path):
    levels = tmp_path / 'levels.json'
    levels.write_text('[9, 1, 0]')
    path = _record(tmp_path / 'b.png', Request(schedule=levels))
    assert infotext.read(path).fields['schedule'] == str(levels)
    levels.write_text('[9, 2, 0]')
    assert infotext.read(path).named() == {'schedule': str(levels)}
    with pytest.raises(ValueError, match='levels.json has changed'):
        infotext.read(path).check_files()


def test_files_that_say_nothing(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / 'plain.png')
    (tmp_path / 'text.png').write_text('no picture')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'plain.png').read_bytes()[:40])
    picture.write_png(tmp_path / 'bad.png', BLANK, {'jaxsd': '{"a": 1}'})
    for name, message in (('plain', 'does not say how'), ('text', 'expected a picture'),
                          ('cut', 'damaged|expected a picture'), ('bad', 'record is damaged')):
        with pytest.raises(ValueError, match=message) as error:
            infotext.read(tmp_path / f'{name}.png')
        assert '\n' not in str(error.value)
    with pytest.raises(FileNotFoundError, match='no such file'):
        infotext.read(tmp_path / 'none.png')


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.sampled_from([-1, 0, 2**31, 10**400, 0.5])
    | st.text(max_size=5) | st.sampled_from(['/etc/passwd', 'a/b', '\x1b[2J', 'nan', 'x' * 999]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(
        st.text(max_size=5) | st.sampled_from(['sha256', 'image', 'net']), values, max_size=3),
    max_leaves=8)
RECORD = json.loads(picture.record(
    Request(image=BLANK, controls=[Control('net', BLANK)],
            image_prompts=[ImagePrompt('net', BLANK)]), checkpoint='c', base=None, ema=False,
    dtype='float32', tile=0, batch=1, lora=['a'], hint_size=[8, 8], id='x'))


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([(key,) for key in RECORD] + [('request', key) for key in RECORD['request']]
                       + [('request', 'controls', 0, key) for key in ('net', 'image', 'scale')]
                       + [('request', 'image_prompts', 0, key) for key in (
                           'net', 'image', 'weight', 'blocks', 'embeds', 'x')]),
       JSON)
def test_any_value_in_a_record_is_taken_as_a_plan_takes_it_or_is_one_line(place, value):
    record = part = json.loads(json.dumps(RECORD))
    *above, last = place
    for key in above:
        part = part[key]
    part[last] = value
    try:
        past = infotext._recorded('a.png', json.dumps(record))
    except ValueError as error:
        assert re.fullmatch(r'a\.png: its record (is damaged|has \d+ char)[^\n]{0,250}', str(error))
        return
    Request(**past.fields | {'image': past.fields.get('image') or 'given'})
    for name, named in past.named().items():
        assert isinstance(named, (str, list, tuple)), name


def test_a_record_of_a_newer_program(tmp_path):
    text = json.loads(picture.record(Request()))
    text['request']['magic'] = 3
    picture.write_png(tmp_path / 'a.png', BLANK, {'jaxsd': json.dumps(text)})
    past = infotext.read(tmp_path / 'a.png')
    assert 'magic' not in past.fields and past.notes[0].startswith('magic=3: unknown here')


# How programs write the same picture: the text, and what it leaves of sampler and schedule.
RESOURCES = json.dumps([{'type': 'checkpoint', 'modelVersionId': 7, 'modelName': 'Seed: 3, b: 4'}])
STYLES = {
    'a1111': '{prompt}{negative}\nSteps: {steps}, Sampler: DPM++ 2M, Schedule type: Karras, '
             'CFG scale: {guidance}, Seed: {seed}, Size: {width}x{height}, Model: m, '
             'Hires prompt: {quoted}, Version: v1.10.1',
    'before 1.6': '{prompt}{negative}\nSteps: {steps}, Sampler: DPM++ 2M Karras, '
                  'CFG scale: {guidance}, Seed: {seed}, Size: {width}x{height}',
    'dynamic prompts': '{prompt}{negative}\nSteps: {steps}, Sampler: DPM++ 2M Karras, CFG scale: '
                       '{guidance}, Seed: {seed}, Size: {width}x{height}, Version: v1.6.0\n'
                       'Template: {{a|b}}, Seed: 4, Size: 9x9\nNegative Template: {prompt}',
    'a value of lines': '{prompt}{negative}\nSteps: {steps}, Sampler: DPM++ 2M Karras, '
                        'Detail: red\nand blue, CFG scale: {guidance}, Seed: {seed}, '
                        'Other: a\nb,\nSize: {width}x{height}, Model: m, Version: v1.9.4',
    'a pair a line': '{prompt}{negative}\nSteps: {steps}\nSampler: DPM++ 2M Karras\n'
                     'CFG scale: {guidance}\nSeed: {seed}\nSize: {width}x{height}',
    'forge': '{prompt}{negative}\nSteps: {steps}, Sampler: DPM++ 2M, Schedule type: Karras, '
             'CFG scale: {guidance}, Distilled CFG Scale: 3.5, Seed: {seed}, '
             'Size: {width}x{height}, Model: m, Version: f2.0.1v1.10.1-previous-659-gc055f2d4, '
             'Module 1: a, Source: "a, b"',
    'civitai': '{prompt}{negative}\nSteps: {steps}, CFG scale: {guidance}, Sampler: DPM++ 2M Karras'
               ', Seed: {seed}, Size: {width}x{height}, Created Date: 2026-01-02T03:04:05.6789Z, '
               f'Civitai resources: {RESOURCES.replace("{", "{{").replace("}", "}}")}, '
               'Civitai metadata: {{"Steps": 3, "remixOfId": 5}}',
    'comfyui, image saver': '{prompt}\nNegative prompt: {asked}\nSteps: {steps}, Sampler: DPM++ 2M '
                            'Karras, CFG scale: {guidance}, Seed: {seed}, Size: {width}x{height}, '
                            'Model: m, Hashes: {{"model":"1","LORA:x: y":"2"}}, Version: ComfyUI',
    'comfyui, image saver of old': '{prompt}\nNegative prompt: {asked}\nSteps: {steps}, Sampler: '
                                   'dpmpp_2m, Scheduler: karras, CFG Scale: {guidance}, Seed: '
                                   '{seed}, Size: {width}x{height}, Version: ComfyUI',
    'comfyui, with metadata': '{prompt}\nNegative prompt: {asked}\nSteps: {steps}, Sampler: '
                              'dpmpp_2m_karras, CFG scale: {guidance}, Seed: {seed}, '
                              'Size: {width}x{height}, Model: m.safetensors, '
                              'Hashes: {{"model": "1"}}',
}
HIRES = {'prompt': 'a\nb, c: d'}
WORDS = st.lists(st.sampled_from([
    'cat', 'a red', '(blue:1.2)', '<lora:x:0.5>,', ', ', 'on: it', '[a|b]', '{c', '"', '\n', '\n\n',
    'in 20 steps: no', 'size']), max_size=8).map(lambda words: re.sub(
        ' *\n *', '\n', ' '.join(' '.join(words).split(' '))).strip())


@pytest.mark.parametrize('style', STYLES)
@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS, st.integers(1, 150), st.integers(0, 2**32), st.sampled_from(['7', '4.5']),
       st.integers(64, 2048), st.sampled_from(['as it is', 'one line', 'CRLF', 'blank lines']))
def test_styles_of_other_programs(style, prompt, negative, steps, seed, guidance, width, how):
    if how == 'one line':
        prompt, negative = (' '.join(text.split()) for text in (prompt, negative))
    text = STYLES[style].format(
        prompt=prompt, asked=negative, negative=negative and f'\nNegative prompt: {negative}',
        steps=steps, seed=seed, guidance=guidance, width=width, height=512,
        quoted=json.dumps('a\nb, c: d'))
    if how == 'one line':
        if style == 'dynamic prompts':  # nothing tells where its lines were
            return
        text = ' '.join(text.split('\n'))
        if style == 'a pair a line':
            with pytest.raises(ValueError, match='looks like settings'):
                infotext.foreign(text)
            return
    past = infotext.foreign({'CRLF': text.replace('\n', '\r\n'), 'blank lines': re.sub(
        '\n(Negative prompt:|Steps:)', r'\n\n\1', text)}.get(how, text))
    comfy = 'Version: ComfyUI' in text
    assert past.fields == dict(
        prompt=prompt, negative_prompt=negative, steps=steps, seed=seed, guidance=float(guidance),
        width=width, height=512, sampler='dpmpp_2m', schedule='karras', sampler_options={},
        schedule_options={'convention': 'comfyui'} if 'Hires' in text else {},
        noise='torch' if comfy else 'philox', **{'weighting': 'comfy'} if comfy else {},
        **{'hires': HIRES} if 'Hires' in text else {})
    Request(**past.fields)


@pytest.mark.parametrize('text', [
    'cat, steps=20, seed=4, sampler=euler', 'cat\nsampler: Euler | steps: 20 | seed: 4',
    'cat\nNegative prompt: dog, Sampler: Euler, Seed: 5\nb, cc: 4, dd: 5, ee: 6'])
def test_settings_in_a_prompt_are_an_error(text):
    with pytest.raises(ValueError, match=r'settings \([a-z, ]*seed[a-z, ]*\) stands in the prompt'):
        infotext.foreign(text)
    infotext.parse(text)


A1111_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@settings(max_examples=1000, deadline=None)
@given(st.text('ab -/:,",\\\t1', max_size=30))
def test_pairs_are_those_of_a1111s_own_pattern(text):
    assert infotext._pairs(text) == A1111_PAIR.findall(text)


@pytest.mark.parametrize('piece', [
    'a', '1', '_', ' ', '-', '/', '"', '\\', ':', ',', 'a:', 'ab:', 'ab:"', 'ab:"\\"', 'ab: 1,',
    'a, b', '\n', '\nab', '[{', '{"a":', 'ab: [{"', 'ab: [[{', 'ab: {"":0}', 'Steps: 1 ',
    '\nSteps: 1', 'Seed: ', '\nTemplate: ', 'steps=', 'Negative prompt: ', 'ab: 1, cd: 2, ef: 3\n'])
def test_a_text_is_read_in_linear_time(piece):
    text = (piece * 10**6)[:infotext.LONGEST - 40]
    with at_most(5):
        infotext.foreign(f'{text}\nSteps: 1, Seed: 2, Size: 8x8')
        infotext.foreign(f'Steps: 1, Seed: 2, Size: 8x8, {text}')
    with pytest.raises(ValueError, match='has 1000000 characters: expected at most'):
        infotext.foreign((piece * 10**6)[:10**6])


def test_a_record_of_before_images_and_controls():
    """A picture that was written before requests had these fields."""
    past = infotext.read(ROOT / 'tests' / 'data' / 'before_controls.png')
    assert not past.notes and 'controls' in Request.__dataclass_fields__
    request = Request(**past.fields)
    assert (request.prompt, request.seed, request.controls) == ('red apple', 7, ())


def test_a_second_pass_is_told_and_read_back():
    hires = Hires(width=128, height=96, upscaler='lanczos', strength=0.5, steps=8,
                  sampler='euler_ancestral', schedule='normal', guidance=5.0,
                  prompt='a cat, sharp', negative_prompt='blur')
    request = Request('cat', seed=1, width=64, height=48, guidance=4, hires=hires)
    text = picture.parameters(request)
    assert ('Denoising strength: 0.5, Hires resize: 128x96, Hires steps: 8, '
            'Hires upscaler: Lanczos, Hires sampler: Euler a, Hires schedule type: Normal, '
            'Hires CFG Scale: 5, '
            'Hires prompt: "a cat, sharp", Hires negative prompt: blur') in text
    found = infotext.foreign(text)
    assert not found.notes and Request(**found.fields).hires == hires
    scaled = picture.parameters(request.replace(hires=Hires(scale=1.5)))
    assert 'Denoising strength: 0.7, Hires upscale: 1.5, Hires upscaler: Latent, ' in scaled
