"""The client of PyPI's webuiapi against a server with the shipped model: each picture is the one
that Python draws from the same settings."""

import base64
import concurrent.futures
import hashlib
import io
import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_detectors
import tiny_faces
from mains import ROOT, run_main, serving, wait_for
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

import jaxsd
from jaxsd import images
from jaxsd.config import UpscalerConfig
from jaxsd.models.upscaler import names
from jaxsd.run import Engine

pytestmark = pytest.mark.slow

webuiapi = pytest.importorskip('webuiapi')
EMOJI, EDGES = ROOT / 'checkpoints' / 'emoji', ROOT / 'checkpoints' / 'emoji_edges'
UPSCALER = UpscalerConfig(kind='rrdb', scale=2, ups=1, channels=8, growth=4, blocks=(1,))
SKETCH = ROOT / 'docs' / 'examples' / 'sketch.png'
USUAL = dict(prompt='red apple', seed=7, steps=6, cfg_scale=4, width=64, height=64,
             sampler_name='DPM++ 2M', scheduler='Karras')


@pytest.fixture(scope='module')
def model():
    return jaxsd.load(EMOJI, 'float32')


@pytest.fixture(scope='module')
def files(model, tmp_path_factory):
    """What the server is given beside the shipped model."""
    root = tmp_path_factory.mktemp('webui')
    for name in ('checkpoints', 'vaes', 'loras', 'embeddings', 'upscalers', 'detectors'):
        (root / name).mkdir()
    shutil.copytree(EMOJI, root / 'checkpoints' / 'emoji')
    unet = dict(model.params['unet'])
    unet['conv_out'] = {name: a * np.float32(1.1) for name, a in unet['conv_out'].items()}
    jaxsd.save(model.replace(params=model.params | {'unet': unet}), root / 'checkpoints' / 'loud')
    vae = dict(model.params['vae'])
    vae['decoder'] = dict(vae['decoder'])
    vae['decoder']['conv_out'] = {n: a * 0.5 for n, a in vae['decoder']['conv_out'].items()}
    jaxsd.save(model.replace(params=model.params | {'vae': vae}), root / 'soft')
    shutil.copytree(root / 'soft' / 'vae', root / 'vaes' / 'soft')
    draw = np.random.default_rng(0).standard_normal
    width = model.config.unet.block_out_channels[-1]
    layer = 'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q'
    save_file({f'{layer}.lora_down.weight': draw((2, width)).astype(np.float32),
               f'{layer}.lora_up.weight': draw((width, 2)).astype(np.float32)},
              root / 'loras' / 'bold.safetensors')
    save_file({f'{layer}.lora_down.weight': np.ones((2, width + 1), np.float32),
               f'{layer}.lora_up.weight': np.ones((width + 1, 2), np.float32)},
              root / 'loras' / 'wide.safetensors')  # of another model: left out
    size = model.config.text_encoder.hidden_size
    save_file({'emb_params': draw((2, size)).astype(np.float32)},
              root / 'embeddings' / 'shiny.safetensors')
    save_file({name: 0.1 * draw(shape).astype(np.float32) for name, shape in names(
        UPSCALER).items()}, root / 'upscalers' / 'sharp.safetensors')
    for name in ('ControlNetHED', 'facenet'):
        tiny_detectors.write(name, root / 'detectors')
    save_file(tiny_detectors.blind(), root / 'detectors' / 'body_pose_model.safetensors')
    tiny_faces.write(root / 'GFPGANv1.4.safetensors')
    return root


@pytest.fixture(scope='module')
def server(files):
    flags = [f'--{flag}={files / folder}' for flag, folder in (
        ('checkpoints', 'checkpoints'), ('vaes', 'vaes'), ('lora', 'loras'),
        ('embeddings', 'embeddings'), ('upscalers', 'upscalers'), ('detectors', 'detectors'))]
    flags.append(f'--restore_faces={files}/GFPGANv1.4.safetensors')
    with serving('--config=emoji', f'--controlnet=edges={EDGES}', *flags) as (url, _):
        yield url


class Client(webuiapi.WebUIApi):
    """Each call with scripts of its own: webuiapi keeps those of the calls before."""

    def txt2img(self, **fields):
        return super().txt2img(**{'alwayson_scripts': {}, **fields})

    def img2img(self, **fields):
        return super().img2img(**{'alwayson_scripts': {}, **fields})


@pytest.fixture
def client(server):
    return Client(port=int(server.rpartition(':')[2]))


def same(answer, model, *requests):
    """The pictures of an answer are those that Python draws."""
    for image, request in zip(answer.images, requests, strict=True):
        slots = json.loads(image.text['jaxsd'])['slots']
        [expected] = jaxsd.generate(model, request, slots=slots)
        np.testing.assert_array_equal(np.asarray(image), expected)


def asked(**fields):
    return jaxsd.Request(**{'prompt': 'red apple', 'seed': 7, 'steps': 6, 'guidance': 4, **fields})


def test_text_to_image(client, model):
    found = client.txt2img(**USUAL)
    same(found, model, asked())
    assert json.loads(found.image.text['jaxsd'])['slots'] == 1  # alone it costs one picture
    found = client.txt2img(**USUAL | {'sampler_name': 'Euler a', 'batch_size': 2, 'n_iter': 2},
                           negative_prompt='green', eta=0.5)
    same(found, model, *(asked(seed=7 + i, sampler='euler_ancestral', negative_prompt='green',
                               eta=0.5) for i in range(4)))
    assert found.info['all_seeds'] == [7, 8, 9, 10] and found.parameters['steps'] == 6


def test_image_to_image_and_inpainting(client, model):
    sketch = Image.open(SKETCH).convert('RGB')
    found = client.img2img(images=[sketch], denoising_strength=0.6, **USUAL)
    a1111 = {'schedule_options': {'convention': 'a1111'}, 'resize': 'stretch'}
    same(found, model, asked(image=SKETCH, strength=0.6, **a1111))
    mask = Image.new('L', sketch.size)
    mask.paste(255, (sketch.width // 4, sketch.height // 4, sketch.width, sketch.height))
    found = client.img2img(images=[sketch], mask_image=mask, mask_blur=2, inpainting_fill=1,
                           denoising_strength=0.9, inpaint_full_res=False, **USUAL)
    same(found, model, asked(image=SKETCH, strength=0.9, mask=mask, mask_blur=2, fill='original',
                             **a1111))


def test_hires_fix(client, model):
    """As many steps in the second pass as it is given."""
    second = {'schedule_options': {'convention': 'comfyui'}}
    found = client.txt2img(**USUAL, enable_hr=True, hr_scale=1.5, denoising_strength=0.6,
                           hr_upscaler=webuiapi.HiResUpscaler.Latent, hr_second_pass_steps=4)
    same(found, model, asked(**second, hires={'scale': 1.5, 'strength': 0.6, 'steps': 4}))
    assert found.image.size == (96, 96) and found.info['denoising_strength'] == 0.6
    assert 'Hires upscale: 1.5, Hires steps: 4, Hires upscaler: Latent' in (
        found.info['infotexts'][0])
    found = client.txt2img(**USUAL, enable_hr=True, hr_resize_x=96, denoising_strength=0.5,
                           hr_upscaler='Lanczos', hr_sampler_name='Euler a', batch_size=2,
                           hr_prompt='a red apple', hr_negative_prompt='green')
    same(found, model, *(asked(**second, seed=7 + i, hires=jaxsd.Hires(
        width=96, strength=0.5, upscaler='lanczos', sampler='euler_ancestral', schedule='normal',
        prompt='a red apple', negative_prompt='green')) for i in range(2)))
    with pytest.raises(RuntimeError, match='422.*unknown hr_upscaler.*R-ESRGAN 4x'):
        client.txt2img(**USUAL, enable_hr=True, hr_upscaler=webuiapi.HiResUpscaler.ESRGAN_4x)


@pytest.mark.slow
def test_the_command_line_draws_the_same(client, tmp_path):
    """From flags that say what A1111's words say, and from the picture's own record."""
    def drawn(name, *flags):
        code, _, error = run_main('-m', 'launch.generate', *flags, f'--out={tmp_path / name}')
        assert code == 0, error
        [file] = (tmp_path / name).glob('*.png')
        return np.asarray(Image.open(file))

    made = client.txt2img(**USUAL, negative_prompt='green', enable_hr=True, hr_scale=1.5,
                          hr_upscaler='Lanczos', denoising_strength=0.6, hr_second_pass_steps=4
                          ).image
    np.testing.assert_array_equal(np.asarray(made), drawn(
        'flags', '--config=emoji', '--prompt=red apple', '--negative_prompt=green', '--seed=7',
        '--steps=6', '--guidance=4', '--width=64', '--height=64', '--sampler=dpmpp_2m',
        '--schedule=karras', '--schedule_options=convention=comfyui',
        '--hires=scale=1.5, upscaler=lanczos, strength=0.6, steps=4'))
    texts = PngImagePlugin.PngInfo()
    for name, text in made.text.items():
        texts.add_text(name, text)
    made.save(tmp_path / 'made.png', pnginfo=texts)
    np.testing.assert_array_equal(np.asarray(made), drawn(
        'record', f'--from={tmp_path / "made.png"}', f'--checkpoint={EMOJI}'))


def test_controlnet(client, model):
    controlled = model.replace(controlnets={'edges': jaxsd.load_controlnet(EDGES, 'float32')})
    sketch = Image.open(SKETCH).convert('RGB').resize((64, 64))
    assert [name.partition(' [')[0] for name in client.controlnet_model_list()] == ['edges']
    assert {'none', 'canny', 'tile', 'softedge_hed'} <= set(client.controlnet_module_list())
    assert 'openpose_hand' not in client.controlnet_module_list()
    detected = client.controlnet_detect([sketch], 'softedge_hed', 64)
    np.testing.assert_array_equal(np.asarray(detected.image), jaxsd.detect(
        'softedge_hed', sketch, [tiny_detectors.network('ControlNetHED')]))
    assert client.controlnet_version() == 3
    canny = images.canny(np.asarray(sketch), 50, 100)
    detected = client.controlnet_detect([sketch], 'canny', 64, 50, 100)
    np.testing.assert_array_equal(np.asarray(detected.image), canny)

    unit = webuiapi.ControlNetUnit(
        sketch, module='canny', model=client.controlnet_model_list()[0], weight=0.8,
        threshold_a=50, threshold_b=100, guidance_end=0.7, pixel_perfect=True)
    control = jaxsd.Control('edges', canny, 0.8, end=0.7)
    same(client.txt2img(**USUAL, controlnet_units=[unit]), controlled, asked(controls=[control]))
    unit = webuiapi.ControlNetUnit(Image.fromarray(canny), model='edges', control_mode=2)
    same(client.txt2img(**USUAL, controlnet_units=[unit], enable_hr=True, hr_scale=1.5), controlled,
         asked(controls=[jaxsd.Control('edges', canny, guess='original')],
               schedule_options={'convention': 'comfyui'}, hires={'scale': 1.5}))
    unit = webuiapi.ControlNetUnit(Image.fromarray(canny), model='edges', control_mode=1)
    same(client.txt2img(**USUAL, controlnet_units=[unit]), controlled,
         asked(controls=[jaxsd.Control('edges', canny, guess='soft')]))
    unit = webuiapi.ControlNetUnit(module='none', model='edges')  # of the picture to start from
    same(client.img2img(images=[sketch], controlnet_units=[unit], **USUAL), controlled,
         asked(image=sketch, controls=[jaxsd.Control('edges', sketch)],
               schedule_options={'convention': 'a1111'}))
    off = webuiapi.ControlNetUnit(enabled=False)
    same(client.txt2img(**USUAL, controlnet_units=[off]), model, asked())
    for fields, message in (({'model': 'depth'}, 'unknown ControlNet'), (
            {'module': 'openpose_hand'}, 'hand_pose_model.pth'), (
            {'control_mode': 3}, 'expected 0, 1, 2 or Balanced, My prompt is more'), (
            {'mask': sketch}, 'mask')):
        unit = webuiapi.ControlNetUnit(**{'image': sketch, 'model': 'edges', **fields})
        with pytest.raises(RuntimeError, match=f'422.*{message}'):
            client.txt2img(**USUAL, controlnet_units=[unit])
    with pytest.raises(RuntimeError, match='422.*ADetailer'):
        client.txt2img(**USUAL, adetailer=[webuiapi.ADetailer()])


def test_png_info(client):
    found = client.png_info(client.txt2img(**USUAL).image)
    assert found.info.startswith('red apple\nSteps: 6, Sampler: DPM++ 2M, Schedule type: Karras')
    assert found.parameters['Seed'] == '7'


def test_progress_with_a_picture_then_interrupt_and_skip(client, model):
    """Those under way come as they were at that model call."""
    many = {**USUAL, 'sampler_name': 'Euler a', 'scheduler': 'Normal', 'n_iter': 3}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for end, most in ((client.skip, 1), (client.interrupt, 3)):
            answer = pool.submit(client.txt2img, **many | {'steps': 60})
            seen = []

            def shown(seen=seen):
                found = client.get_progress()
                if found['current_image']:
                    seen.append(found)
                return bool(seen) and seen[-1]['progress'] > seen[0]['progress']
            wait_for(shown, 100)
            image = Image.open(io.BytesIO(base64.b64decode(
                seen[-1]['current_image'])))
            assert image.size[0] in (64, 128) and image.size[1] in (64, 128)
            assert 0 < seen[0]['progress'] < seen[-1]['progress'] < 1
            assert seen[-1]['state']['job_count'] == 3
            assert 0 < seen[-1]['state']['sampling_step'] < seen[-1]['state']['sampling_steps'] == (
                180)
            end()
            found = answer.result(100)
            calls = found.info['unfinished']
            assert len(found.images) == len(calls) and 1 <= len(list(filter(None, calls))) <= most
            assert len(calls) == 3 or most == 3
            for at, image, seed in zip(calls, found.images, found.info['all_seeds']):
                if at:
                    assert 0 < at[0] < at[1] == 60 and 'jaxsd' not in image.text
                    assert f'Unfinished: {at[0]} of 60 model calls, Version: jaxsd' in (
                        image.info['parameters'])
                    np.testing.assert_array_equal(np.asarray(image), at_call(
                        model, asked(seed=seed, steps=60, sampler='euler_ancestral',
                                     schedule='normal'), at[0]))
            wait_for(lambda: client.get_progress()['state']['job_count'] == 0)
    assert client.get_progress()['progress'] == 0


def at_call(model, request, call):
    """What a picture of the programs for several is after so many model calls."""
    found = {}

    def watch(task, look):
        found[task.done] = np.asarray(task.decode()[0])[0]

    with Engine(model) as engine:
        engine.submit(*engine.resolve([request]), watch, every=1).future.result(100)
    return found[call]


def digits(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def test_models_are_listed_and_changed(client, model, files):
    wait_for(lambda: all(one['hash'] for one in client.get_sd_models()))
    loud = digits(files / 'checkpoints' / 'loud' / 'unet' / 'diffusion_pytorch_model.safetensors')
    emoji = digits(EMOJI / 'unet' / 'diffusion_pytorch_model.safetensors')
    assert [(m['title'], m['model_name'], m['sha256'], m['filename'])
            for m in client.get_sd_models()] == [
        (f'emoji [{emoji[:10]}]', 'emoji', emoji, 'emoji'),
        (f'loud [{loud[:10]}]', 'loud', loud, 'loud')]
    assert client.util_get_current_model() == f'emoji [{emoji[:10]}]'
    assert client.get_sd_vae() == [{'model_name': 'soft', 'filename': 'soft'}]

    client.util_set_model('loud')
    assert client.get_options()['sd_model_checkpoint'] == f'loud [{loud[:10]}]'
    other = jaxsd.load(files / 'checkpoints' / 'loud', 'float32')
    found = client.txt2img(**USUAL, override_settings={'sd_model_checkpoint': loud[:10]})
    same(found, other, asked())
    assert found.info['sd_model_name'] == 'loud'
    assert np.asarray(found.image).tolist() != np.asarray(
        jaxsd.generate(model, asked())[0]).tolist()

    client.set_options({'sd_model_checkpoint': 'emoji', 'sd_vae': 'soft',
                        'CLIP_stop_at_last_layers': 2})
    soft = model.with_vae(jaxsd.load_vae(files / 'vaes' / 'soft', 'float32'))
    same(client.txt2img(**USUAL), soft, asked(clip_skip=2))
    assert client.get_options()['sd_vae'] == 'soft'
    client.set_options({'sd_vae': 'Automatic', 'CLIP_stop_at_last_layers': 1})
    same(client.txt2img(**USUAL), model, asked())

    for options, message in (({'sd_model_checkpoint': 'other'}, 'Known: emoji ['),
                             ({'sd_vae': '../soft'}, 'Known: soft'),
                             ({'outdir_samples': '/'}, 'unknown field')):
        answer = client.session.post(f'{client.baseurl}/options', json=options)
        assert answer.status_code == 422 and message in answer.json()['detail'], answer.text
    with pytest.raises(RuntimeError, match='422.*POST /sdapi/v1/options loads another'):
        client.txt2img(**USUAL, override_settings={'sd_model_checkpoint': 'loud'})


def test_names_in_prompts(client, model, files):
    assert [(one['name'], one['path']) for one in client.get_loras()] == [
        ('bold', 'bold.safetensors')]
    found = client.get_embeddings()
    assert found['skipped'] == {} and found['loaded']['shiny']['vectors'] == 2
    own = model.replace(
        adapters={'bold': jaxsd.load_adapter(files / 'loras' / 'bold.safetensors', model)},
        embeddings={'shiny': jaxsd.load_embedding(
            files / 'embeddings' / 'shiny.safetensors', model.config, 'shiny')})
    for prompt in ('red apple <lora:bold:0.8>', 'shiny apple'):
        same(client.txt2img(**USUAL | {'prompt': prompt}), own, asked(prompt=prompt))


def test_what_is_found_after_a_refresh(client, files):
    file = files / 'loras' / 'late.safetensors'
    shutil.copy(files / 'loras' / 'bold.safetensors', file)
    shutil.copytree(EMOJI, files / 'checkpoints' / 'late')
    try:
        assert len(client.get_sd_models()) == 2
        client.refresh_checkpoints()
        assert [m['model_name'] for m in client.get_sd_models()] == ['emoji', 'late', 'loud']
        assert [one['name'] for one in client.get_loras()] == ['bold', 'late']
    finally:
        file.unlink()
        shutil.rmtree(files / 'checkpoints' / 'late')
    assert client.session.post(f'{client.baseurl}/refresh-loras').status_code == 200
    assert len(client.get_sd_models()) == 2 and len(client.get_loras()) == 1


def test_a_model_that_cannot_be_loaded_leaves_the_one_before(client, model, files):
    file = files / 'checkpoints' / 'broken.safetensors'
    file.write_bytes(b'\0' * 100)
    client.refresh_checkpoints()
    answer = client.session.post(f'{client.baseurl}/options', json={
        'sd_model_checkpoint': 'broken'})
    file.unlink()
    client.refresh_checkpoints()
    assert str(files) not in answer.text
    assert answer.status_code == 500 and 'broken.safetensors: not a whole' in answer.text
    same(client.txt2img(**USUAL), model, asked())


def test_upscalers(client, model, files):
    """Pictures enlarged alone, two of them at once and mixed; and between two passes."""
    network = jaxsd.load_upscaler(files / 'upscalers' / 'sharp.safetensors')
    image = Image.open(EMOJI.parents[1] / 'docs' / 'examples' / 'apple.png').convert('RGB').resize(
        (40, 30))
    large = jaxsd.upscale(network, image)
    found = client.extra_single_image(image, upscaler_1='sharp', upscaling_resize=2).image
    np.testing.assert_array_equal(found, large)
    lanczos = np.asarray(image.resize((80, 60), Image.Resampling.LANCZOS), np.float32)
    found = client.extra_single_image(image, upscaler_1='sharp', upscaler_2='Lanczos',
                                      extras_upscaler_2_visibility=0.25).image
    assert np.abs(np.asarray(found) - (0.75 * large + 0.25 * lanczos)).max() <= 0.51
    found = client.extra_batch_images([image, image], upscaler_1='Nearest', resize_mode=1,
                                      upscaling_resize_w=60, upscaling_resize_h=60).images
    assert [one.size for one in found] == [(60, 60)] * 2
    assert client.extra_single_image(image).image.size == (40, 30)  # A1111's None
    found = client.extra_single_image(image, upscaler_1='sharp', upscaling_resize=2,
                                      gfpgan_visibility=1.0).image
    np.testing.assert_array_equal(found, large)  # in which there are no faces

    def sent(image):
        file = io.BytesIO()
        image.save(file, 'PNG')
        return base64.b64encode(file.getvalue()).decode()

    url = f'{client.baseurl}/extra-single-image'
    for body, said in ((dict(upscaler_1='sharper'), "unknown upscaler_1 'sharper': did you mean"),
                       (dict(gfpgan_visibility=1.5), 'gfpgan_visibility'),
                       (dict(codeformer_visibility=1.0), 'codeformer_visibility'),
                       (dict(upscaling_resize=3.5, upscaler_1='sharp', image=sent(
                           image.resize((1100, 1000)))), 'comes to 17600000 pixels on its way'),
                       (dict(upscaling_resize=16, upscaler_1='sharp', image=sent(
                           image.resize((1500, 1000)))), 'expected at most 16777216')):
        answer = client.session.post(url, json={'image': sent(image)} | body)
        assert answer.status_code in (400, 422) and said in answer.text, answer.text
    same(client.txt2img(**USUAL | dict(enable_hr=True, hr_upscaler='sharp', hr_scale=1.5,
                                       denoising_strength=0.5)),
         model.replace(upscalers={'sharp': network}),
         asked(schedule_options={'convention': 'comfyui'},
               hires={'upscaler': 'sharp', 'scale': 1.5, 'strength': 0.5}))


def test_what_there_is_beside(client):
    assert {one['name']: one['scale'] for one in client.get_upscalers()} == {
        'None': 4, 'Lanczos': 4, 'Nearest': 4, 'sharp': 2}
    assert 'Latent' in [one['name'] for one in client.get_latent_upscale_modes()]
    assert [one['name'] for one in client.get_face_restorers()] == ['GFPGAN']
    assert client.get_hypernetworks() == []
    assert client.get_prompt_styles() == client.get_realesrgan_models() == []
    assert client.get_cmd_flags()['api'] is True
    assert client.get_memory()['ram']['total'] > client.get_memory()['ram']['used'] > 0
    assert client.get_scripts() == {'txt2img': ['controlnet'], 'img2img': ['controlnet']}
    assert 'Euler a' in client.util_get_sampler_names()
    assert 'karras' in client.util_get_scheduler_names()
    client.util_wait_for_ready()
    root = client.baseurl.removesuffix('/sdapi/v1')
    assert client.session.get(f'{root}/internal/ping').json() == {}
    page = client.session.get(f'{root}/docs').text
    assert all(f'<code>{path}</code>' in page for path in (
        '/sdapi/v1/txt2img', '/controlnet/detect', '/sdapi/v1/memory', '/metrics'))
    assert 'enable_hr' in page and 'http' not in page and '<script' not in page
    for path in ('sam/heartbeat', 'sdapi/v1/artists', 'tagger/v1/interrogators'):
        assert client.session.get(f'{root}/{path}').status_code == 404


def test_unload_and_reload(client, model):
    post = client.session.post
    assert post(f'{client.baseurl}/unload-checkpoint').status_code == 200
    with pytest.raises(RuntimeError, match='503.*no model is loaded'):
        client.txt2img(**USUAL)
    assert post(f'{client.baseurl}/reload-checkpoint').status_code == 200
    same(client.txt2img(**USUAL), model, asked())


def test_no_path_of_the_server_is_told(client, files):
    for route in ('sd-models', 'sd-vae', 'loras', 'embeddings', 'upscalers', 'options',
                  'cmd-flags', 'scripts', 'memory'):
        text = client.session.get(f'{client.baseurl}/{route}').text
        assert str(files) not in text and str(ROOT) not in text, route
