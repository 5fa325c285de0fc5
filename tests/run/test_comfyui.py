"""Graphs of ComfyUI, read back from its pictures."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsd.run import comfyui, infotext, picture
from jaxsd.run.request import Hires, Request


def node(kind, **inputs):
    return {'class_type': kind, 'inputs': inputs, '_meta': {'title': kind}}


# What ComfyUI's own first workflow is saved as.
DEFAULT = {
    '3': node('KSampler', seed=156680208700286, steps=20, cfg=8.0, sampler_name='euler',
              scheduler='normal', denoise=1.0, model=['4', 0], positive=['6', 0],
              negative=['7', 0], latent_image=['5', 0]),
    '4': node('CheckpointLoaderSimple', ckpt_name='sd\\v1-5-pruned-emaonly.safetensors'),
    '5': node('EmptyLatentImage', width=512, height=768, batch_size=1),
    '6': node('CLIPTextEncode', text='a glass bottle, (galaxy:1.2)', clip=['4', 1]),
    '7': node('CLIPTextEncode', text='text, watermark', clip=['4', 1]),
    '8': node('VAEDecode', samples=['3', 0], vae=['4', 2]),
    '9': node('SaveImage', filename_prefix='ComfyUI', images=['8', 0]),
}


def changed(**nodes):
    """DEFAULT with other nodes or inputs; `_3={'cfg': 2}` changes inputs, `n3=node` a node."""
    graph = json.loads(json.dumps(DEFAULT))
    for key, value in nodes.items():
        if key[0] == '_':
            graph[key[1:]]['inputs'] |= value
        else:
            graph[key[1:]] = value
    return graph


def read(**nodes):
    return comfyui.read(json.dumps(changed(**nodes)))


def test_the_first_workflow():
    fields, run, notes = read()
    assert run == {'model': 'v1-5-pruned-emaonly'} and notes == []
    assert fields == dict(
        prompt='a glass bottle, (galaxy:1.2)', negative_prompt='text, watermark', steps=20,
        seed=156680208700286, guidance=8.0, sampler='euler', schedule='normal', width=512,
        height=768, noise='torch', weighting='comfy', sampler_options={}, schedule_options={})
    Request(**fields)


def test_a_picture_of_it(tmp_path):
    texts = {'prompt': json.dumps(DEFAULT), 'workflow': '{}'}
    picture.write_png(tmp_path / 'a.png', np.zeros((8, 8, 3), np.uint8), texts)
    past = infotext.read(tmp_path / 'a.png')
    assert past.fields['seed'] == 156680208700286 and past.run == {'model': 'v1-5-pruned-emaonly'}
    saver = 'cat\nSteps: 3, Sampler: Euler, Seed: 4, Size: 8x8'
    assert infotext.from_texts('a', texts | {'parameters': saver}).fields['seed'] == 4


def test_loras_clip_skip_a_vae_and_what_patches_the_model():
    fields, run, notes = read(
        _3={'model': ['12', 0]}, _6={'clip': ['11', 0]}, _7={'clip': ['11', 0]},
        _8={'vae': ['13', 0]}, n13=node('VAELoader', vae_name='kl-f8.safetensors'),
        n10=node('LoraLoader', lora_name='a/one.safetensors', strength_model=0.8,
                 strength_clip=0.5, model=['4', 0], clip=['4', 1]),
        n14=node('LoraLoaderModelOnly', lora_name='two.safetensors', strength_model=0.3,
                 model=['10', 0]),
        n11=node('CLIPSetLastLayer', stop_at_clip_layer=-2, clip=['10', 1]),
        n12=node('RescaleCFG', multiplier=0.7, model=['15', 0]),
        n15=node('HyperTile', tile_size=256, model=['16', 0]),
        n16=node('ModelSamplingDiscrete', sampling='v_prediction', zsnr=False, model=['14', 0]))
    assert fields['adapters'] == {'one': (0.8, 0.5), 'two': (0.3, 0.0)}
    assert fields['clip_skip'] == 2 and fields['guidance_options'] == {'rescale': 0.7}
    assert run == {'model': 'v1-5-pruned-emaonly', 'prediction': 'v_prediction'}
    assert notes == ['HyperTile, on the way to the model, is not honoured',
                     "'kl-f8.safetensors' is not known by its name alone: give its file as --vae"]
    Request(**fields)


def test_patches_that_are_guidance_options():
    fields, _, notes = read(
        _3={'model': ['10', 0]}, n10=node('FreeU', b1=1.3, b2=1.4, s1=0.9, s2=0.2, model=['11', 0]),
        n11=node('PatchModelAddDownscale', block_number=3, downscale_factor=2.0, start_percent=0.0,
                 end_percent=0.35, downscale_after_skip=True, downscale_method='bicubic',
                 upscale_method='bicubic', model=['12', 0]),
        n12=node('EasyCache', reuse_threshold=0.2, start_percent=0.15, end_percent=0.95,
                 verbose=False, model=['13', 0]),
        n13=node('TomePatchModel', ratio=0.3, model=['4', 0]))
    assert fields['guidance_options'] == {
        'freeu': (1.3, 1.4, 0.9, 0.2), 'easycache': {'threshold': 0.2, 'start': 0.15, 'end': 0.95},
        'token_merging': {'ratio': 0.3},
        'deep_shrink': {'block': 3, 'factor': 2.0, 'start': 0.0, 'end': 0.35, 'after_skip': True,
                        'downscale_method': 'bicubic', 'upscale_method': 'bicubic'}}
    assert [note.split(':')[0] for note in notes] == ['PatchModelAddDownscale', 'EasyCache']
    Request(**fields)


def test_from_a_picture_and_with_a_hint():
    fields, _, notes = read(
        _3={'denoise': 0.6, 'latent_image': ['20', 0], 'positive': ['22', 0],
            'negative': ['22', 1]},
        n20=node('VAEEncode', pixels=['21', 0], vae=['4', 2]),
        n21=node('LoadImage', image='photo.png'),
        n22=node('ControlNetApplyAdvanced', positive=['6', 0], negative=['7', 0], strength=0.8,
                 start_percent=0.0, end_percent=0.5, control_net=['23', 0], image=['21', 0]),
        n23=node('ControlNetLoader', control_net_name='canny.pth'))
    assert fields['strength'] == 0.6 and fields['schedule_options'] == {'convention': 'comfyui'}
    assert (fields['prompt'], fields['negative_prompt']) == ('a glass bottle, (galaxy:1.2)',
                                                            'text, watermark')
    assert notes[0].endswith('--control="net=canny, image=PATH, scale=0.8, start=0, end=0.5"')
    assert 'give it as --image' in notes[1] and len(notes) == 2


def test_custom_samplers():
    fields, _, notes = read(
        n3=node('SamplerCustomAdvanced', noise=['30', 0], guider=['31', 0], sampler=['32', 0],
                sigmas=['33', 0], latent_image=['5', 0]),
        n30=node('RandomNoise', noise_seed=['34', 0]), n34=node('PrimitiveInt', value=77),
        n31=node('CFGGuider', cfg=5.5, model=['4', 0], positive=['6', 0], negative=['7', 0]),
        n32=node('SamplerDPMPP_2S_Ancestral', eta=0.5, s_noise=1.0),
        n33=node('KarrasScheduler', steps=12, sigma_max=10.0, sigma_min=0.1, rho=5.0))
    assert not notes and (fields['seed'], fields['guidance'], fields['steps']) == (77, 5.5, 12)
    assert fields['sampler'] == 'dpmpp_2s_ancestral'
    assert fields['sampler_options'] == {'eta': 0.5, 's_noise': 1.0}
    assert (fields['schedule'], fields['schedule_options']) == (
        'karras', {'sigma_max': 10.0, 'sigma_min': 0.1, 'rho': 5.0})
    turbo, _, notes = read(
        n3=node('SamplerCustom', add_noise=True, noise_seed=5, cfg=1.0, model=['4', 0],
                positive=['6', 0], negative=['7', 0], sampler=['32', 0], sigmas=['33', 0],
                latent_image=['5', 0]),
        n32=node('KSamplerSelect', sampler_name='dpm_2'),
        n33=node('SDTurboScheduler', steps=2, denoise=0.5, model=['4', 0]))
    assert turbo['schedule_options'] == {'discard_penultimate': False, 'start': 5} and not notes
    basic, _, _ = read(
        n3=node('SamplerCustom', add_noise=True, noise_seed=5, cfg=1.0, model=['4', 0],
                positive=['6', 0], negative=['7', 0], sampler=['32', 0], sigmas=['33', 0],
                latent_image=['5', 0]),
        n32=node('KSamplerSelect', sampler_name='lcm'),
        n33=node('BasicScheduler', steps=4, denoise=1.0, scheduler='sgm_uniform', model=['4', 0]))
    assert (basic['sampler'], basic['schedule'], basic['steps']) == ('lcm', 'sgm_uniform', 4)
    for found in (fields, turbo, basic):
        Request(**found)


@pytest.mark.parametrize('name, sampler, options, levels', [
    ('ddim', 'euler', {}, {}), ('uni_pc', 'unipc', {'variant': 'bh1'}, True),
    ('uni_pc_bh2', 'unipc', {'variant': 'bh2'}, True), ('dpm_2', 'dpm_2', {}, True),
    ('dpmpp_3m_sde', 'dpmpp_3m_sde', {}, False), ('euler_cfg_pp', 'euler_cfg_pp', {}, {})])
def test_samplers_whose_levels_ksampler_chooses(name, sampler, options, levels):
    fields, _, _ = read(_3={'sampler_name': name})
    assert (fields['sampler'], fields['sampler_options']) == (sampler, options)
    assert fields['schedule_options'] == (
        levels if levels == {} else {'discard_penultimate': levels})


def test_two_passes():
    again = {'seed': 156680208700286, 'steps': 10, 'cfg': 8.0, 'sampler_name': 'euler',
             'scheduler': 'normal', 'denoise': 0.5, 'model': ['4', 0], 'positive': ['6', 0],
             'negative': ['7', 0], 'latent_image': ['40', 0]}
    graph = dict(
        _8={'samples': ['41', 0]}, n41=node('KSampler', **again),
        n40=node('LatentUpscaleBy', upscale_method='nearest-exact', scale_by=1.5,
                 samples=['3', 0]))
    fields, _, notes = read(**graph)
    assert not notes and fields['steps'] == 20
    assert Request(**fields).hires == Hires(1.5, upscaler='latent_nearest', strength=0.5, steps=10)
    refined, _, notes = read(
        _8={'samples': ['41', 0]},
        n41=node('KSamplerAdvanced', **again | {
            'latent_image': ['3', 0], 'add_noise': 'disable', 'start_at_step': 16, 'steps': 20,
            'noise_seed': 1}))
    assert refined['switch'] == 0.8 and '--refiner' in notes[0]


def test_where_noise_is_drawn(tiny_model):
    """Steps of ancestral samplers on the GPU, Brownian trees on the CPU but for the _gpu ones."""
    for name, drawn in (('euler_ancestral', 'philox'), ('dpmpp_2m_sde_gpu', 'philox'),
                        ('dpmpp_2m_sde', None), ('euler', None), ('lcm', 'philox')):
        assert read(_3={'sampler_name': name})[0].get('step_noise') == drawn
    _, _, notes = read(n3=node('KSamplerAdvanced', add_noise='disable', **{
        name: value for name, value in DEFAULT['3']['inputs'].items() if name != 'denoise'}))
    assert any('begins without noise' in note for note in notes)
    saver = infotext.foreign('x\nSteps: 3, Sampler: euler_ancestral_karras, Seed: 4, Size: 8x8, '
                             'Version: ComfyUI')
    assert saver.fields['step_noise'] == 'philox'


def test_clip_skip_is_counted_from_the_last_layer(tiny_model):
    """SDXL's own layer is -2 there."""
    request = Request(**read(_6={'clip': ['11', 0]}, _7={'clip': ['11', 0]}, n11=node(
        'CLIPSetLastLayer', stop_at_clip_layer=-3, clip=['4', 1]))[0])
    assert request.clip_skip == 3
    for family, skip in (('sd1', 3), ('sdxl', 2)):
        [found], notes = infotext.fit([request], tiny_model(family).config)
        assert found.clip_skip == skip and not notes


def test_sdxl_texts():
    fields, _, notes = read(
        n6=node('CLIPTextEncodeSDXL', width=1024, height=1536, crop_w=0, crop_h=8,
                target_width=1024, target_height=1536, text_g='a style', text_l='a cat',
                clip=['4', 1]))
    assert (fields['prompt'], fields['prompt_2']) == ('a cat', 'a style') and not notes
    assert (fields['original_size'], fields['crop']) == ((1536, 1024), (8, 0))
    Request(**fields)


def test_what_is_not_read():
    fields, _, notes = read(
        _3={'seed': ['50', 0], 'sampler_name': 'magic', 'scheduler': 'tan', 'steps': ['51', 0]},
        n50=node('Seed (rgthree)', seed=99, mode='fixed'),
        n51=node('MathExpression', a=1, b=2), _5={'batch_size': 4},
        _6={'text': 'a [cat|dog] <lora:x:1>'})
    assert fields['seed'] == 99 and not {'sampler', 'schedule', 'steps'} & set(fields)
    assert fields['noise_batch'] == (0, 4)
    for part, line in zip(('MathExpression', 'sampler_name: magic', 'scheduler: tan', 'one of 4',
                           'letters in ComfyUI'), notes, strict=True):
        assert part in line


@pytest.mark.parametrize('text', ['', 'a cat', '[]', '{}', '{"1": 2}', '{"1": {"inputs": {}}}'])
def test_texts_that_are_no_graphs(text):
    assert comfyui.read(text) is None


def test_a_graph_without_a_sampler_is_one_line():
    graph = {'1': node('UltimateSampler', seed=1), '2': node('SaveImage', images=['1', 0])}
    with pytest.raises(ValueError, match=r'no sampler that is known here \(UltimateSampler\)'):
        comfyui.read(json.dumps(graph))
    with pytest.raises(ValueError, match='^a.png: .*UltimateSampler'):
        infotext.from_texts('a.png', {'prompt': json.dumps(graph)})


LINKS = st.tuples(st.sampled_from([*DEFAULT, '99']), st.integers(0, 1)).map(list)
ANY = LINKS | st.none() | st.text(max_size=4) | st.integers() | st.floats() | st.booleans()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([(key, name) for key, one in DEFAULT.items() for name in one['inputs']]),
       ANY, st.sampled_from(['KSampler', 'LoraLoader', 'VAEEncode', 'ControlNetApply', 'X', None]))
def test_any_graph_is_read_or_one_line(place, value, kind):
    graph = json.loads(json.dumps(DEFAULT))
    key, name = place
    graph[key]['inputs'][name] = value
    graph[key]['class_type'] = kind or graph[key]['class_type']
    try:
        past = infotext.from_texts('a.png', {'prompt': json.dumps(graph)})
    except ValueError as error:
        assert '\n' not in str(error)
        return
    Request(**past.fields | ({'image': 'x'} if 'strength' in past.fields else {}))
