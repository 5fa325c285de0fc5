"""What InvokeAI wrote, read back from its pictures."""

import json

import pytest

from jaxsd.run import infotext
from jaxsd.run.request import Request

# As version 5 writes them.
NEW = {
    'generation_mode': 'txt2img', 'positive_prompt': 'a lonely robot, book++',
    'negative_prompt': 'blurry', 'width': 512, 'height': 640, 'seed': 1618033988,
    'rand_device': 'cpu', 'cfg_scale': 7.5, 'cfg_rescale_multiplier': 0.5, 'steps': 30,
    'scheduler': 'dpmpp_2m_k', 'clip_skip': 1, 'app_version': '5.4.2',
    'model': {'key': '9f', 'hash': 'blake3:aa', 'name': 'dreamshaper', 'base': 'sd-1',
              'type': 'main'},
    'loras': [{'model': {'key': '9f', 'name': 'add-detail', 'base': 'sd-1', 'type': 'lora'},
               'weight': 0.6}],
    'vae': {'key': 'v', 'name': 'sd-vae-ft-mse', 'base': 'sd-1', 'type': 'vae'},
    'controlnets': [{'image': {'image_name': 'x.png'}, 'control_weight': 1}],
    'canvas_v2_metadata': {'a': 1}}
# As version 2 wrote them.
OLD = {
    'model': 'stable diffusion', 'model_weights': 'analog', 'model_hash': 'a9a1',
    'app_id': 'invoke-ai/InvokeAI', 'app_version': 'v2.2.4', 'image': {
        'prompt': [{'prompt': 'a landscape [blurry, text] at sunset', 'weight': 1}], 'steps': 50,
        'cfg_scale': 12, 'threshold': 0, 'perlin': 0.1, 'height': 768, 'width': 512,
        'seed': 2502935700, 'seamless': False, 'hires_fix': False, 'type': 'txt2img',
        'postprocessing': None, 'sampler': 'k_euler_a', 'variations': []}}


def read(key, value):
    text = value if isinstance(value, str) else json.dumps(value)
    return infotext.from_texts('a.png', {key: text})


def test_what_it_writes():
    past = read('invokeai_metadata', NEW)
    assert past.run == {'model': 'dreamshaper'}
    assert past.fields == dict(
        prompt='a lonely robot, book++', negative_prompt='blurry', width=512, height=640,
        seed=1618033988, guidance=7.5, steps=30, weighting='compel', noise='torch', clip_skip=2,
        guidance_options={'rescale': 0.5}, adapters={'add-detail': 0.6},
        sampler='dpm_solver_multistep', schedule='diffusers',
        sampler_options={'order': 2, 'algorithm': 'dpmsolver++', 'solver_type': 'midpoint'},
        schedule_options={'scheduler': 'DPMSolverMultistep', 'steps_offset': 1,
                          'use_karras_sigmas': True, 'set_alpha_to_one': False})
    assert [note.split(' ')[0] for note in past.notes] == [
        'ControlNets', "'sd-vae-ft-mse'", 'canvas_v2_metadata:']
    Request(**past.fields)


def test_versions_3_and_pictures_from_pictures():
    past = read('invokeai_metadata', NEW | {
        'model': {'model_name': 'sdxl', 'base_model': 'sdxl', 'model_type': 'main'},
        'loras': [{'lora': {'model_name': 'x', 'base_model': 'sdxl'}, 'weight': 0.5}],
        'generation_mode': 'sdxl_img2img', 'strength': 0.4, 'init_image': 'photo.png',
        'scheduler': 'euler', 'rand_device': 'cuda', 'positive_style_prompt': 'ink'})
    assert past.run == {'model': 'sdxl'} and past.fields['adapters'] == {'x': 0.5}
    assert past.fields['schedule_options']['timestep_spacing'] == 'leading'
    assert (past.fields['sampler'], past.fields['noise']) == ('euler', 'philox')
    assert (past.fields['strength'], past.fields['prompt_2']) == (0.4, 'ink')
    assert any('--image' in note for note in past.notes)


@pytest.mark.parametrize('key', ['sd-metadata', 'Dream'])
def test_what_it_wrote_once(key):
    dream = '"a landscape [blurry, text] at sunset" -s 50 -S 2502935700 -W 512 -H 768 -C 12 ' \
            '-A k_euler_a --perlin 0.1'
    past = read(key, OLD if key == 'sd-metadata' else dream)
    assert past.fields == dict(
        prompt='a landscape at sunset', negative_prompt='blurry, text', steps=50,
        seed=2502935700, guidance=12.0, width=512, height=768, sampler='euler_ancestral',
        schedule='normal', weighting='compel', noise='philox')
    assert past.run == ({'model': 'analog'} if key == 'sd-metadata' else {})
    assert [note.split(':')[0] for note in past.notes][0] == 'perlin'
    Request(**past.fields)


def test_what_is_unknown_or_damaged():
    past = read('invokeai_metadata', {'scheduler': 'magic', 'seed': 'x', 'steps': 3})
    assert [note.split(':')[0] for note in past.notes] == ['seed', 'scheduler']
    assert past.fields['steps'] == 3 and 'sampler' not in past.fields
    with pytest.raises(ValueError, match='^a.png: invokeai_metadata: expected JSON'):
        read('invokeai_metadata', '{')
    few = read('sd-metadata', {'image': {'prompt': 'x', 'steps': 10, 'sampler': 'k_lms'}})
    assert few.fields['schedule'] == 'karras'
