"""A1111's JSON to Requests and back: pure functions."""

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
import tiny_detectors
from PIL import Image, PngImagePlugin
from servers import DEFAULTS

import jaxsd
from jaxsd import sampling
from jaxsd.config import ControlNetConfig, ScheduleConfig
from jaxsd.serve import a1111, schemas
from jaxsd.weights import Network

LIMITS = a1111.Limits(pixels=2**14, steps=50, batch=8)


def read(model=schemas.Txt2Img, limits=LIMITS, **fields):
    body = a1111.parse(model, json.dumps(fields).encode())
    return a1111.requests(body, DEFAULTS, limits, 'emoji', '', 'refiner')


def png(array=None, mode='RGB', texts=None, kind='PNG'):
    if array is None:
        array = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    file, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        info.add_text(key, text)
    Image.fromarray(array).convert(mode).save(file, kind, pnginfo=info)
    return base64.b64encode(file.getvalue()).decode()


def test_what_is_left_open_is_the_recipes():
    [r] = read(prompt='cat', seed=None, steps=None, batch_size=None)
    assert (r.sampler, r.schedule, r.steps, r.guidance, r.width) == ('dpmpp_2m', 'karras', 4, 4, 64)
    assert r.switch == 1  # a refiner is loaded and not asked for


def test_seeds_count_up_and_round():
    made = read(seed=2**64 - 2, batch_size=2, n_iter=2)
    assert [r.seed for r in made] == [2**64 - 2, 2**64 - 1, 0, 1]
    first, second = read(seed=-1, batch_size=2)
    assert second.seed == first.seed + 1


@pytest.mark.parametrize('fields, sampler, schedule', [
    ({'sampler_name': 'Euler a'}, 'euler_ancestral', 'normal'),
    ({'sampler_index': 'Euler'}, 'euler', 'normal'),
    ({'sampler_name': 'Heun', 'sampler_index': 'Euler'}, 'heun', 'normal'),
    ({'sampler_name': 'DPM++ 2M'}, 'dpmpp_2m', 'karras'),  # what 'Automatic' means for it
    ({'sampler_name': 'DPM++ 2M', 'scheduler': 'Automatic'}, 'dpmpp_2m', 'karras'),
    ({'sampler_name': 'DPM++ 2M', 'scheduler': 'SGM Uniform'}, 'dpmpp_2m', 'sgm_uniform'),
    ({'sampler_name': 'DPM++ 2M Karras'}, 'dpmpp_2m', 'karras'),
    ({'sampler_name': 'DPM++ 2M SDE Exponential'}, 'dpmpp_2m_sde', 'exponential'),
    ({'sampler_name': 'DPM++ SDE Karras', 'scheduler': 'automatic'}, 'dpmpp_sde', 'karras'),
    ({'sampler_name': 'DDIM'}, 'ddim', 'ddim_uniform'),
    ({'sampler_name': 'er_sde', 'scheduler': 'kl_optimal'}, 'er_sde', 'kl_optimal'),
    ({'scheduler': 'Align Your Steps'}, 'dpmpp_2m', 'ays'),
    ({'sampler_name': ''}, 'dpmpp_2m', 'karras')])
def test_names_of_samplers_and_schedules(fields, sampler, schedule):
    [r] = read(**fields)
    assert (r.sampler, r.schedule) == (sampler, schedule)


def test_what_clients_send_unasked():
    usual = {
        'enable_hr': False, 'hr_scale': 2, 'hr_upscaler': 'Latent', 'hr_second_pass_steps': 0,
        'hr_resize_x': 0, 'hr_resize_y': 0, 'firstphase_width': 0, 'firstphase_height': 0,
        'denoising_strength': 0.7, 'styles': [], 'seed': -1, 'subseed': -1, 'subseed_strength': 0,
        'seed_resize_from_h': 0, 'seed_resize_from_w': -1, 'restore_faces': False, 'tiling': False,
        'do_not_save_samples': False, 'do_not_save_grid': False, 'eta': 1.0, 's_churn': 0,
        's_tmax': 0, 's_tmin': 0, 's_noise': 1, 'override_settings': {}, 'script_name': None,
        'override_settings_restore_afterwards': True, 'sampler_index': 'Euler', 'script_args': [],
        'send_images': True, 'save_images': False, 'alwayson_scripts': {}, 'comments': None}
    [r] = read(**usual)
    assert (r.sampler, r.eta, r.sampler_options, r.strength) == ('euler', None, {}, None)
    [r] = read(**{**usual, 'sampler_index': 'Euler a', 'eta': 0.5})
    assert r.eta == 0.5


def test_options():
    [r] = read(sampler_name='DPM++ 2M SDE Heun', s_noise=0.9, s_tmax=0, eta=0.5)
    assert r.sampler_options == {'solver_type': 'heun', 's_noise': 0.9} and r.eta == 0.5
    [r] = read(override_settings={'CLIP_stop_at_last_layers': 2, 'eta_noise_seed_delta': 0,
                                  'randn_source': 'CPU', 'sd_model_checkpoint': 'emoji',
                                  'sd_vae': 'Automatic', 'emphasis': None})
    assert (r.clip_skip, r.noise) == (2, 'torch')
    [r] = read(refiner_checkpoint='refiner', refiner_switch_at=0.6)
    assert r.switch == 0.6


def test_noise_of_sde_samplers():
    found = [read(sampler_name=name, override_settings={'randn_source': source})[0].step_noise
             for name, source in (('DPM++ SDE', 'CPU'), ('DPM++ SDE', 'NV'), ('Euler a', 'CPU'))]
    assert found == ['philox', None, None]


def test_tiling():
    assert [r.tiling for r in read(tiling=True) + read(tiling=False) + read()] == ['xy', '', '']


def test_variations_of_a_seed():
    found = read(seed=5, subseed=2**64 - 1, subseed_strength=0.2, batch_size=2,
                 seed_resize_from_w=64, seed_resize_from_h=96,
                 override_settings={'eta_noise_seed_delta': 31337})
    assert [(r.seed, r.subseed) for r in found] == [(5, 2**64 - 1), (5, 0)]  # as A1111 counts
    assert found[0].seed_resize_from == (64, 96) and found[0].eta_noise_seed_delta == 31337
    drawn = read(subseed_strength=0.2, n_iter=2, seed_resize_from_w=512)
    assert drawn[0].subseed >= 0 and drawn[1].subseed == drawn[0].subseed + 1
    assert drawn[0].seed == drawn[1].seed and drawn[0].seed_resize_from is None
    answer = a1111.answer(a1111.parse(schemas.Txt2Img, {}), [(r, b'') for r in found],
                          ['Version: x'] * 2)
    info = json.loads(answer['info'])
    assert info['all_subseeds'] == [2**64 - 1, 0] and info['subseed_strength'] == 0.2
    assert (info['seed_resize_from_w'], info['seed_resize_from_h']) == (64, 96)


def test_pictures_and_masks():
    mask = np.zeros((64, 48, 3), np.uint8)
    mask[:, 24:] = 255
    given = {'init_images': [png()], 'mask': f'data:image/png;base64,{png(mask)}'}
    [r] = read(schemas.Img2Img, init_images=[png()], denoising_strength=0.4, resize_mode=2)
    assert (r.image.shape, r.strength, r.resize, r.mask) == ((64, 48, 3), 0.4, 'pad', None)
    [r] = read(schemas.Img2Img, **given)
    assert (r.strength, r.resize, r.mask_blur, r.only_masked, r.fill) == (
        0.75, 'stretch', 4, 0, 'edge')
    assert r.mask.min() == 0 and (r.mask[:, 24:] == 1).all()
    [r] = read(schemas.Img2Img, **given, inpainting_mask_invert=1, inpaint_full_res=False,
               mask_blur_x=2, mask_blur_y=2, inpainting_fill=2)
    assert (r.mask[:, :24] == 1).all() and (r.mask_blur, r.only_masked, r.fill) == (
        2, None, 'latent')


def test_scale_of_the_image():
    """Clients send it always: it counts where the model is an instruct-pix2pix."""
    body = a1111.parse(schemas.Img2Img, json.dumps({'init_images': [png()],
                                                    'image_cfg_scale': 1.2}).encode())
    scales = [a1111.requests(body, DEFAULTS, LIMITS, edits=edits)[0].image_guidance
              for edits in (False, True)]
    assert scales == [None, 1.2]


def test_what_a1111_takes_as_unset_or_by_another_name():
    first, second = read(seed=-2, styles=['', 'None'], n_iter=2)
    assert (first.seed, second.seed) == (2**64 - 2, 2**64 - 1)  # torch.manual_seed(-2)
    [r] = read(schemas.Img2Img, init_images=[png()], mask='', styles=[''])
    assert r.mask is None


@pytest.mark.parametrize('name, sampler, schedule', [
    # modules/sd_samplers_kdiffusion.py and sd_samplers_timesteps.py, today's and those of 1.5
    ('k_euler_a', 'euler_ancestral', 'normal'), ('k_euler', 'euler', 'normal'),
    ('k_euler_ancestral', 'euler_ancestral', 'normal'), ('k_lms', 'lms', 'normal'),
    ('k_heun', 'heun', 'normal'), ('k_dpm_2', 'dpm_2', 'karras'),
    ('k_dpm_2_a', 'dpm_2_ancestral', 'karras'), ('k_dpm_fast', 'dpm_fast', 'normal'),
    ('k_dpm_ad', 'dpm_adaptive', 'normal'), ('k_dpmpp_2s_a', 'dpmpp_2s_ancestral', 'karras'),
    ('k_dpmpp_2m', 'dpmpp_2m', 'karras'), ('k_dpmpp_sde', 'dpmpp_sde', 'karras'),
    ('k_dpmpp_2m_ka', 'dpmpp_2m', 'karras'), ('k_lms_ka', 'lms', 'karras'),
    ('k_dpm_2_a_ka', 'dpm_2_ancestral', 'karras'), ('K_Euler_A', 'euler_ancestral', 'normal'),
    ('k_dpmpp_2m_sde', 'dpmpp_2m_sde', 'exponential'), ('k_lcm', 'lcm', 'normal'),
    ('ddim_cfgpp', 'euler_cfg_pp', 'normal'), ('ddim', 'ddim', 'ddim_uniform'),
    ('plms', 'plms', 'ddim_uniform'), ('unipc', 'unipc', 'ddim_uniform'),
    ('restart', 'restart', 'karras')])
def test_aliases_of_samplers(name, sampler, schedule):
    [r] = read(sampler_name=name)
    assert (r.sampler, r.schedule) == (sampler, schedule)


@pytest.mark.parametrize('fields, mode', [
    ({'union_control_type': 'Depth'}, 'depth'), ({'union_control_type': 'Hard Edge'}, 'canny'),
    ({'union_control_type': 'Inpaint', 'module': 'tile'}, 'repaint'),
    ({'module': 'tile_resample'}, 'tile'), ({'union_control_type': 'Unknown'}, None), ({}, None)])
def test_units_of_a_union(fields, mode):
    """Two units of it are two hints; without a type they have the preprocessor's."""
    nets = {'union': Network(ControlNetConfig(num_control_type=8), {}),
            'plain': Network(ControlNetConfig(), {})}
    unit = {'model': 'union', 'image': png()}
    body = a1111.parse(schemas.Txt2Img, json.dumps({'alwayson_scripts': {'ControlNet': {
        'args': [unit | fields, unit | {'union_control_type': 'OpenPose'}]}}}).encode())

    def modes():
        request, = a1111.requests(body, DEFAULTS, LIMITS, 'emoji', controlnets=nets)
        return [control.mode for control in request.controls]

    if mode is None:
        with pytest.raises(ValueError, match="'union' names a ControlNet twice.*or a mode to"):
            modes()
    else:
        assert modes() == [mode, 'openpose']
    plain = a1111.parse(schemas.ControlUnit, {'model': 'plain', 'module': 'canny',
                                              'union_control_type': 'Depth'})
    assert a1111._control(plain, np.zeros((64, 64, 3), np.uint8), {}, nets).mode is None
    with pytest.raises(ValueError, match="unknown union_control_type 'Edge'"):
        a1111._control(plain.model_copy(update={'union_control_type': 'Edge'}), None, {}, nets)


def test_modules_of_detectors():
    """By the names of sd-webui-controlnet, old ones too, where the server has the networks."""
    nets = {'union': Network(ControlNetConfig(num_control_type=8), {})}
    there = {name: tiny_detectors.network(name) for name in ('ControlNetHED', 'sk_model')}
    assert a1111.modules({}) == [*a1111.MODULES, 'reference_only']
    assert a1111.modules(there)[-5:] == ['softedge_hed', 'softedge_hedsafe', 'scribble_hed',
                                         'lineart_realistic', 'reference_only']
    image = np.random.default_rng(0).integers(0, 255, (80, 96, 3), np.uint8)
    for module, mode in (('hed', 'scribble'), ('softedge_hed', 'scribble'), ('lineart', 'canny')):
        kind = a1111.ALIASES.get(module, module)
        unit = a1111.parse(schemas.ControlUnit, {'model': 'union', 'module': module,
                                                 'processor_res': 64})
        control = a1111._control(unit, image, {}, nets, there)
        assert control.mode == mode
        looked = jaxsd.images.fit(image, 64, 64, 'stretch')  # 77x64 in steps of 64
        np.testing.assert_array_equal(control.image, jaxsd.detect(kind, looked, there))
    with pytest.raises(ValueError, match='openpose_full needs .* body_pose_model.pth.*--detectors'):
        a1111.detect('openpose_full', image, detectors=there)
    with pytest.raises(ValueError, match="unknown module 'softedge_pidinet'.*softedge_hed"):
        a1111.detect('softedge_pidinet', image, detectors=there)


def test_a_reference():
    """A unit without a model; its mode or its first threshold is the fidelity."""
    def read(*units):
        body = a1111.parse(schemas.Txt2Img, json.dumps({'alwayson_scripts': {'ControlNet': {
            'args': [{'module': 'reference_only', 'image': png(), **unit} for unit in units]}}}
            ).encode())
        request, = a1111.requests(body, DEFAULTS, LIMITS, 'emoji')
        return request.reference

    for unit, expected in (({}, (1, 0, 1, 0.5)), ({'model': 'None', 'weight': 1.6}, (1, 0, 1, 0.5)),
                           ({'threshold_a': 0.8, 'weight': 0.4, 'guidance_end': 0.7},
                            (0.4, 0, 0.7, 0.8)), ({'control_mode': 1}, (1, 0, 1, 0)),
                           ({'control_mode': 'ControlNet is more important'}, (1, 0, 1, 1))):
        found = read(unit)
        assert (found.weight, found.start, found.end, found.fidelity) == expected
        assert found.image.shape[2] == 3
    for units, message in (([{}, {}], '2 units of reference_only: expected one'),
                           ([{'threshold_a': 3}], 'reference fidelity=3')):
        with pytest.raises(ValueError, match=message):
            read(*units)


def test_the_alias_of_heun():
    [r] = read(sampler_name='k_dpmpp_2m_sde_heun')
    assert (r.sampler, r.sampler_options) == ('dpmpp_2m_sde', {'solver_type': 'heun'})


@pytest.mark.parametrize('steps, strength, calls', [(20, 0.01, 1), (20, 0.0, 1), (20, 0.75, 16),
                                                    (20, 1.0, 20), (50, 0.5, 26)])
def test_img2img_walks_as_many_steps_as_there(steps, strength, calls):
    """modules/sd_samplers_common.py (setup_img2img_steps): int(min(strength, 0.999) steps) + 1."""
    [r] = read(schemas.Img2Img, init_images=[png()], steps=steps, denoising_strength=strength,
               sampler_name='Euler')
    assert r.schedule_options == {'convention': 'a1111'}
    levels = sampling.schedule(r.schedule, r.steps, ScheduleConfig(), denoise=r.strength,
                               **r.schedule_options)
    assert len(levels) - 1 == calls


def wide(width, height):
    """A PNG that says it is so large, and holds nothing of it."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack(
            '>I', zlib.crc32(kind + data))
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return base64.b64encode(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(
        b'IDAT', zlib.compress(bytes(10**6))) + chunk(b'IEND', b'')).decode()


CUT = base64.b64encode(base64.b64decode(png())[:3000]).decode()
EPS = base64.b64encode(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n').decode()


@pytest.mark.parametrize('fields, message', [
    ({'step': 4}, "unknown field 'step': did you mean 'steps'"),
    ({'x' * 10**6: 4}, 'unknown field .x{80}.: did'),
    ({'sampler_name': 'Eular a'}, "unknown sampler 'Eular a': did you mean 'Euler a'"),
    ({'sampler_name': 'a' * 10**6}, 'sampler_name: .*at most 128'),
    ({'scheduler': 'Karas'}, "unknown scheduler 'karas': did you mean 'karras'"),
    ({'scheduler': '/etc/x.json'}, "unknown scheduler '/etc/x.json'"),
    ({'scheduler': '14.6,7,1,0'}, 'unknown scheduler'),
    ({'scheduler': ['karras']}, 'scheduler: .*valid string'),
    ({'seed': 2**64}, 'seed'), ({'seed': -2**63 - 1}, 'seed'), ({'seed': 1.5}, 'seed'),
    ({'seed': True}, 'seed'), ({'steps': '4'}, "steps: .*valid integer, found '4'"),
    ({'steps': 51}, 'steps=51: expected at most 50'), ({'steps': 0}, 'steps'),
    ({'cfg_scale': float('nan')}, 'cfg_scale: .*finite'),
    ({'cfg_scale': float('inf')}, 'cfg_scale: .*finite'),
    ({'width': 65}, 'width: .*multiple of 8'), ({'width': 10**9}, 'width'),
    ({'batch_size': 3, 'n_iter': 3}, r'batch_size \* n_iter=9: expected at most 8'),
    ({'prompt': 'a' * 4001}, 'prompt: .*at most 4000'), ({'prompt': 3}, 'prompt'),
    ({'subseed_strength': 1.1}, 'subseed_strength: .*less than or equal to 1'),
    ({'subseed': 2**64}, 'subseed'), ({'seed_resize_from_w': 2**30}, 'seed_resize_from_w'),
    ({'seed_resize_from_w': 8192, 'seed_resize_from_h': 8192}, 'seed_resize_from_h=8192: expected'),
    ({'styles': ['a']}, r'styles\.0: .*not supported'),
    ({'save_images': True}, 'save_images'),
    ({'enable_hr': True, 'hr_upscaler': 'ESRGAN_4x'}, "unknown hr_upscaler 'ESRGAN_4x'"),
    ({'enable_hr': True, 'hr_second_pass_steps': 51}, 'hr_second_pass_steps=51: .*most 50'),
    ({'enable_hr': True, 'denoising_strength': 2}, 'hires strength=2'),
    ({'enable_hr': True, 'firstphase_width': 64}, 'firstphase_width=64: expected width'),
    ({'enable_hr': True, 'hr_checkpoint_name': 'x'}, "unknown hr_checkpoint_name 'x'"),
    ({'alwayson_scripts': {'x': {'args': []}}}, 'alwayson_scripts.x: there is no such script'),
    ({'alwayson_scripts': {'controlnet': {'args': [3]}}}, 'the body: .*ControlUnit'),
    ({'alwayson_scripts': {'ControlNet': {'args': [{'image': png(), 'model': 'x'}]}}},
     "unknown ControlNet 'x': there are none"),
    ({'alwayson_scripts': {'controlnet': {'args': [{'model': 'x'}]}}}, 'image: expected the hint'),
    ({'tiling': 'x'}, 'tiling: .*boolean'), ({'script_name': 'x'}, 'script_name'),
    ({'refiner_checkpoint': '../../x'}, "unknown refiner_checkpoint '../../x'"),
    ({'override_settings': {'sd_model_checkpoint': '/etc/passwd'}}, "expected 'emoji'"),
    ({'override_settings': {'sd_model_checkpont': 'x'}}, "mean 'sd_model_checkpoint'"),
    ({'override_settings': {'eta_noise_seed_delta': 'x'}}, "eta_noise_seed_delta='x': expected"),
    ({'override_settings': {'CLIP_stop_at_last_layers': 0}}, 'clip_skip=0'),
    ({'override_settings': {'randn_source': 3}}, 'randn_source'),
    ({'image': '/etc/passwd'}, "unknown field 'image'"),
    ({'wildcards': '/etc'}, "unknown field 'wildcards'"),
    ({'schedule': '/etc/x.json'}, "unknown field 'schedule'")])
def test_wrong_fields_are_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        read(**fields)
    assert '\n' not in str(error.value) and len(str(error.value)) < 2500


@pytest.mark.parametrize('name', ['init_images', 'mask'])
@pytest.mark.parametrize('text, message', [
    ('/etc/passwd', 'no file and no address is read'), ('/etc/passwdd', 'bytes that are none'),
    ('file:///etc/passwd', 'no file'), ('http://127.0.0.1/x.png', 'no file'),
    ('data:image/png;base64,/etc/hosts', 'no file'), ('AAAA', 'bytes that are none'),
    ('data:text/html;base64,AAAA', 'bytes that are none'), ('\xff\u2603', 'no file'),
    ('A' * 999, 'no file'), (EPS, 'bytes that are none'), (wide(60000, 60000), 'that are none'),
    (wide(300, 300), '90000 pixels: expected at most 65536'), (CUT, 'damaged or cut off')])
def test_wrong_pictures(name, text, message):
    fields = {'init_images': [png()], name: [text] if name == 'init_images' else text}
    with pytest.raises(ValueError, match=message) as error:
        read(schemas.Img2Img, **fields)
    assert '\n' not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize('fields, message', [
    ({}, 'init_images'), ({'init_images': []}, 'init_images'),
    ({'init_images': [png()] * 2}, 'init_images'), ({'init_images': png()}, 'init_images'),
    ({'resize_mode': 3}, 'resize_mode'), ({'inpainting_fill': 4}, 'inpainting_fill'),
    ({'denoising_strength': 1.1}, 'denoising_strength'), ({'mask_blur': -1}, 'mask_blur'),
    ({'mask': png(), 'mask_blur_x': 1, 'mask_blur_y': 2}, 'expected the same of both'),
    ({'latent_mask': png()}, 'latent_mask')])
def test_wrong_img2img(fields, message):
    given = {'init_images': [png()], **fields} if fields else {}
    with pytest.raises(ValueError, match=message):
        read(schemas.Img2Img, **given)


def test_units_of_ip_adapters():
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)

    def read(**unit):
        unit = {'image': png(image), 'module': 'ip-adapter_clip_h', 'model': 'plus [1234]', **unit}
        body = a1111.parse(schemas.Txt2Img, json.dumps(
            {'alwayson_scripts': {'controlnet': {'args': [unit]}}}).encode())
        [found] = a1111.requests(body, DEFAULTS, LIMITS, 'emoji', ip_adapters=['plus'],
                                 controlnets={'edges': Network(ControlNetConfig(), {})})
        return found

    [prompt] = read(weight=0.6, guidance_end=0.8, pixel_perfect=True).image_prompts
    assert (prompt.net, prompt.weight, prompt.start, prompt.end) == ('plus', 0.6, 0, 0.8)
    np.testing.assert_array_equal(prompt.image, image)
    assert read(module='none', model='edges').controls and not read(
        module='none', model='edges').image_prompts
    for unit, message in (({'model': 'edges'}, "unknown IP-Adapter 'edges'"),
                          ({'control_mode': 2}, 'control_mode=2: expected Balanced'),
                          ({'module': 'ip-adapter_face_id'}, 'unknown ControlNet'),
                          ({'module': 'ip-adapter_face_id', 'model': 'edges'}, 'unknown module')):
        with pytest.raises(ValueError, match=message):
            read(**unit)


@pytest.mark.parametrize('data', [b'', b'[', b'{"a":', b'null', b'3', b'"x"', b'\xff\xfe{}',
                                  b'{"prompt": "\\ud800"}', b'[' * 10**5, b'{"a":' * 10**5])
def test_what_is_no_json(data):
    with pytest.raises(ValueError, match='the body: ') as error:
        a1111.parse(schemas.Txt2Img, data)
    assert '\n' not in str(error.value) and len(str(error.value)) < 300


def test_png_info():
    text = 'cat\nNegative prompt: dog\nSteps: 4, Sampler: Euler, Seed: 3, Size: 64x64'
    info, items, parameters = a1111.png_info(png(texts={'parameters': text, 'Author': 'me'}),
                                             LIMITS)
    assert info == text and items == {'Author': 'me'}
    assert parameters['Prompt'] == 'cat' and parameters['Negative prompt'] == 'dog'
    assert (parameters['Seed'], parameters['Sampler']) == ('3', 'Euler')
    assert a1111.png_info(png(kind='JPEG'), LIMITS)[0::2] == ('', {})
    with pytest.raises(ValueError, match='cut off'):
        a1111.png_info(CUT, LIMITS)
    packed = png(texts={})  # a text that unpacks to more than Pillow allows
    data, text = base64.b64decode(packed), b'a\0\0' + zlib.compress(bytes(10**8))
    chunk = struct.pack('>I', len(text)) + b'zTXt' + text + struct.pack(
        '>I', zlib.crc32(b'zTXt' + text))
    with pytest.raises(ValueError, match='image'):
        a1111.png_info(base64.b64encode(data[:33] + chunk + data[33:]).decode(), LIMITS)
