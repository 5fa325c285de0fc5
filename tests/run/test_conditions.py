"""Pictures, masks, hints, depth and classes: data in one program, limits, clear errors."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from test_generate import _far, compilations, on_devices

import jaxsd
from jaxsd import Control, Preview, Request, sampling
from jaxsd.config import ControlNetConfig, DPTConfig, ScheduleConfig, T2IAdapterConfig
from jaxsd.models import shapes, spec
from jaxsd.run import decode, encode_image
from jaxsd.run.inputs import inputs
from jaxsd.run.resolving import BUCKETS, bucket, resolve
from jaxsd.weights import Network

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (64, 64, 3), np.uint8)
OTHER = RNG.integers(0, 256, (64, 64, 3), np.uint8)
HALF = np.zeros((64, 64), np.uint8)
HALF[:, 32:] = 255
SLOPE = np.tile(np.linspace(0, 1, 64), (64, 1))


def at_random(network, **fields):
    """A ControlNet for the tiny 1.x model whose outputs are not zero."""
    config = ControlNetConfig(**dataclasses.asdict(network) | fields)
    params = spec.init_part(np.random.default_rng(1), shapes.controlnet(config))
    return Network(config, params)


def widened(tiny_model, in_channels, family='sd1', **parts):
    """A tiny model with more input channels, and whatever else its config is to have."""
    model = tiny_model(family)
    unet = dataclasses.replace(model.config.unet, in_channels=in_channels,
                               num_class_embeds=parts.pop('num_class_embeds', 0))
    config = model.config.replace(unet=unet, **parts)
    return model.replace(config=config, params=spec.init(0, config))


def steer(model):
    """The tiny 1.x model with two ControlNets and a T2I-Adapter."""
    net = at_random(model.config.unet)
    other = Network(net.config, jax.tree.map(lambda a: -a, net.params))
    adapter = T2IAdapterConfig(channels=model.config.unet.block_out_channels, num_res_blocks=1)
    adapter = Network(adapter, spec.init_part(np.random.default_rng(2), spec.names(adapter)))
    return model.replace(controlnets={'edges': net, 'pose': other, 'sketch': adapter})


@pytest.fixture(scope='module')
def steered(tiny_model):
    return steer(tiny_model('sd1'))


@pytest.fixture(scope='module')
def united(steered):
    """The same with a ControlNet-Union of six modes."""
    net = at_random(steered.config.unet, num_control_type=6, num_trans_head=2)
    return steered.replace(controlnets=steered.controlnets | {'union': net})


@pytest.mark.slow
def test_strength_0_is_the_round_trip_and_1_is_text_to_image(tiny_model):
    model = tiny_model('sd1')
    text = Request('cat', seed=3, steps=4)
    images = jaxsd.generate(model, [text.replace(image=PICTURE, strength=s) for s in (0, 0.5, 1)])

    @jax.jit
    def round_trip(params):
        latents = encode_image(params, model.config, PICTURE[None].astype(np.float32) / 127.5 - 1)
        return decode(params, model.config, latents)[0]

    assert _far(images[0], np.asarray(round_trip(model.params))[0]) <= 1
    assert _far(images[2], jaxsd.generate(model, [text])[0]) <= 1
    assert min(_far(images[1], images[0]), _far(images[1], images[2])) > 5


@pytest.mark.parametrize('convention, steps, strength, calls', [
    ('a1111', 20, 0.01, 1), ('a1111', 20, 0.0, 1), ('a1111', 20, 0.5, 11),
    ('comfyui', 200, 0.05, 200), ('comfyui', 20, 0.0, 0), ('diffusers', 20, 0.05, 1)])
def test_steps_of_small_strengths(tiny_model, convention, steps, strength, calls):
    """As many as there: A1111's setup_img2img_steps, ComfyUI's KSampler, diffusers' get_timesteps.
    """
    model = tiny_model('sd1')
    request = Request('cat', seed=1, steps=steps, image=PICTURE, strength=strength,
                      sampler='euler', schedule_options={'convention': convention})
    rows = inputs(model, resolve([request], model.config)).rows
    assert sampling.calls(rows) == calls


def test_a_strength_of_no_steps_names_the_fields(tiny_model):
    request = Request('cat', steps=20, image=PICTURE, strength=0.01)
    with pytest.raises(ValueError, match="steps=20 .*strength.* are 0 of 20 steps.*'a1111'"):
        jaxsd.generate(tiny_model('sd1'), [request])


# All of them paint on PICTURE; strengths, masks, modes, fills, samplers and conventions differ.
PAINTED = [
    Request('cat', seed=1, steps=4, image=PICTURE, mask=HALF),
    Request('dog', seed=2, steps=5, image=PICTURE, mask=HALF, mask_blur=2, strength=0.7,
            sampler='euler_ancestral', fill='edge'),
    Request('a', seed=3, steps=4, image=PICTURE, mask=SLOPE, mask_mode='strength', sampler='heun'),
    Request('red', seed=4, steps=3, image=PICTURE, mask=HALF, strength=0.5, fill='latent',
            schedule_options={'convention': 'comfyui'}),
    Request('cat', seed=5, steps=4, image=PICTURE, strength=0.4, fill='noise'),
    Request('cat', seed=6, steps=4),
]


@pytest.mark.slow
def test_painting_is_data_and_keeps_what_is_not_masked(tiny_model):
    model = tiny_model('sd1')
    images = jaxsd.generate(model, PAINTED)
    alone = [jaxsd.generate(model, [PAINTED[0]])[0]]
    with compilations() as count:
        again = jaxsd.generate(model, PAINTED[::-1])[::-1]
        alone += [jaxsd.generate(model, [r])[0] for r in PAINTED[1:4]]
        jaxsd.generate(model, [PAINTED[0].replace(image=OTHER, mask=SLOPE, strength=0.3)])
    assert not count
    for i in range(4):
        assert _far(images[i], alone[i]) <= 1
    np.testing.assert_array_equal(images, again)
    for image, kept in ((images[0], 32), (images[1], 32 - 7), (images[2], 1), (images[3], 32)):
        np.testing.assert_array_equal(image[:, :kept], PICTURE[:, :kept])
        assert _far(image[:, kept + 8:], PICTURE[:, kept + 8:]) > 20


def test_only_masked_and_outpainting_keep_the_rest(tiny_model):
    model = tiny_model('sd1')
    big = RNG.integers(0, 256, (150, 201, 3), np.uint8)
    mask = np.zeros((150, 201), bool)
    mask[100:130, 20:60] = True
    first = Request('cat', seed=1, steps=2, image=big, mask=mask, only_masked=5)
    image, = jaxsd.generate(model, [first])
    assert image.shape == big.shape
    np.testing.assert_array_equal(image[~mask], big[~mask])
    assert _far(image[mask], big[mask]) > 20

    small = big[:31, :50]
    grow = [(3, 20, 11, 8), (14, 33, 0, 0)]
    grown = jaxsd.generate(model, [Request('cat', seed=1, steps=2, image=small, outpaint=sides)
                                   for sides in grow])
    assert [image.shape for image in grown] == [(59, 64, 3), (64, 64, 3)]
    for image, (left, top, _, _) in zip(grown, grow):
        np.testing.assert_array_equal(image[top:top + 31, left:left + 50], small)


@pytest.mark.slow
def test_modes_are_data(united):
    """Modes, and of several hints their scales and spans, differ within one program; pictures made
    together are those made alone."""
    text, edges = Request('cat', seed=1, steps=3), Control('union', OTHER, mode='canny')
    replace = dataclasses.replace
    pairs = [[edges, Control('union', PICTURE, mode=mode)] for mode in ('depth', 'openpose')]
    requests = [text.replace(controls=controls) for controls in (
        [edges], [replace(edges, mode='depth')], [replace(edges, scale=0.5)], [], *pairs,
        [replace(edges, scale=0.5), pairs[0][1]], [replace(edges, end=0.5), pairs[0][1]],
        [replace(edges, guess='original')], [replace(edges, image=PICTURE)])]
    images = jaxsd.generate(united, requests)
    with compilations() as count:
        np.testing.assert_array_equal(jaxsd.generate(united, requests[::-1]), images[::-1])
    assert not count
    for i, j in np.ndindex(len(requests), len(requests)):
        assert i == j or _far(images[i], images[j]) > 0, (i, j)
    for i, request in enumerate(requests):
        assert _far(images[i], jaxsd.generate(united, [request])[0]) <= 1, i
    # As the field names the same modes, and the order of hints says nothing.
    same = [text.replace(controls=[replace(edges, mode=mode)]) for mode in ('mlsd', 3)]
    same.append(text.replace(controls=pairs[0][::-1]))
    for image, i in zip(jaxsd.generate(united, same), (0, 0, 4)):
        assert _far(image, images[i]) <= 1
    # Hints that all are at their end, or of scale 0, are none.
    silent = text.replace(controls=[replace(c, scale=0.0) for c in pairs[0]])
    assert _far(jaxsd.generate(united, [silent])[0], images[3]) <= 1


@pytest.mark.parametrize('controls, message', [
    ([Control('union', OTHER)], "control 'union': mode=None: expected what the hint is, of this "
     'ControlNet one of openpose, depth, hed, pidi, scribble, ted, canny, .* segment$'),
    ([Control('union', OTHER, mode='tile')], "mode='tile': expected .* segment$"),
    ([Control('union', OTHER, mode=6)], 'mode=6: expected'),
    ([Control('edges', OTHER, mode='canny')], "control 'edges': mode is for a ControlNet-Union"),
    ([Control('sketch', OTHER, mode=3)], "control 'sketch': mode is for a ControlNet-Union"),
])
def test_modes_that_a_network_has_not(united, controls, message):
    with pytest.raises(ValueError, match=message) as caught:
        jaxsd.generate(united, [Request('cat', controls=controls)])
    assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_controls_are_data(steered):
    """Scales, spans, guess mode and which of three nets is at work differ within one program."""
    text = Request('cat', seed=1, steps=4)
    edges, pose, sketch = (Control(net, OTHER) for net in ('edges', 'pose', 'sketch'))
    replace = dataclasses.replace
    requests = [text.replace(controls=controls) for controls in (
        [edges], [replace(edges, scale=0.0), pose], [edges, replace(pose, image=PICTURE)], [],
        [replace(edges, start=0.5)], [replace(edges, end=0.5)], [replace(edges, scale=0.5)],
        [replace(edges, guess='diffusers')], [replace(edges, guess='original')], [sketch],
        [edges, replace(sketch, end=0.5)], [replace(edges, guess='soft')])]
    images = jaxsd.generate(steered, requests)
    with compilations() as count:
        np.testing.assert_array_equal(jaxsd.generate(steered, requests[::-1]), images[::-1])
    assert not count
    for i, j in np.ndindex(12, 12):
        assert i == j or _far(images[i], images[j]) > 0, (i, j)
    assert _far(images[3], jaxsd.generate(steered, [text])[0]) <= 1
    assert _far(images[0], jaxsd.generate(steered, requests[:1])[0]) <= 1


@pytest.mark.slow
def test_soft_weights_count_for_both_prompts(steered):
    """As from a net whose outputs are so much less; without a negative prompt as in guess mode."""
    net = steered.controlnets['edges']
    params = dict(net.params)
    count = len(params['controlnet_down_blocks']) + 1
    less = [np.float32(0.825 ** (count - 1 - i)) for i in range(count)]
    params['controlnet_mid_block'] = jax.tree.map(lambda a: a * less[-1],
                                                  params['controlnet_mid_block'])
    params['controlnet_down_blocks'] = {name: jax.tree.map(lambda a, i=int(name): a * less[i], p)
                                        for name, p in params['controlnet_down_blocks'].items()}
    model = steered.replace(controlnets={**steered.controlnets,
                                         'less': Network(net.config, params)})
    text = Request('cat', 'dog', seed=1, steps=3, guidance=6)
    modes = [Control('edges', OTHER, guess=guess) for guess in ('soft', 'original', None)]
    soft, original, plain, less = jaxsd.generate(model, [
        text.replace(controls=[control]) for control in (*modes, Control('less', OTHER))])
    assert _far(soft, less) <= 1 and min(_far(soft, original), _far(soft, plain)) > 5
    soft, original = jaxsd.generate(model, [
        text.replace(controls=[control], guidance=1.0) for control in modes[:2]])
    assert _far(soft, original) <= 1  # uncond + 1 * (cond - uncond), and uncond is another one


# Three pictures on two devices, with masks and hints.
SPREAD = [
    Request('cat', seed=1, steps=4, image=PICTURE, mask=HALF, controls=[Control('edges', OTHER)]),
    Request('dog', seed=2, steps=2, image=OTHER, strength=0.5),
    Request('a', seed=3, steps=4, image=OTHER, mask=SLOPE, mask_mode='strength',
            controls=[Control('edges', PICTURE, start=0.5)]),
]


@pytest.mark.slow
def test_conditions_are_spread_over_devices(steered, tmp_path):
    seen = []
    found = on_devices(2, tmp_path / 'a.npz', """
from test_conditions import SPREAD, steer
seen = []
model = steer(model)
vae = jaxsd.Network(config.vae, model.params['vae'])
images = jaxsd.generate(model, SPREAD, preview=jaxsd.Preview(
    vae, lambda done, total, images: seen.append(images), every=3))
np.savez(path, images=images, seen=np.stack(seen))
""")
    vae = Network(steered.config.vae, steered.params['vae'])
    images = jaxsd.generate(steered, SPREAD, preview=Preview(
        vae, lambda done, total, images: seen.append(images), every=3))
    np.testing.assert_array_equal(found['images'], images)
    np.testing.assert_array_equal(found['seen'][-1], seen[-1])


@pytest.mark.slow
def test_depth_class_and_text_together(tiny_model):
    model = widened(tiny_model, 5, num_class_embeds=7)
    first = Request('cat', seed=1, steps=3, depth=SLOPE, class_label=2)
    requests = [first, first.replace(depth=1 - SLOPE), first.replace(class_label=3),
                first.replace(prompt='dog'), first.replace(class_label=None),
                first.replace(negative_class_label=4)]
    net = at_random(dataclasses.replace(model.config.unet, in_channels=4))  # it sees no depth map
    model = model.replace(controlnets={'edges': net})
    requests.append(first.replace(controls=[Control('edges', OTHER)]))
    images = jaxsd.generate(model, requests)
    for i, j in np.ndindex(7, 7):
        assert i == j or _far(images[i], images[j]) > 0, (i, j)


@pytest.mark.slow
def test_an_inpainting_model_sees_the_mask(tiny_model):
    model = widened(tiny_model, 9)
    request = Request('cat', seed=1, steps=3, image=PICTURE, mask=HALF)
    images = jaxsd.generate(model, [request, request.replace(mask=HALF.T), request.replace(
        image=OTHER), Request('cat', seed=1, steps=3)])
    np.testing.assert_array_equal(images[0][:, :32], PICTURE[:, :32])
    np.testing.assert_array_equal(images[1][:32], PICTURE[:32])
    assert _far(images[0][:, 32:], images[2][:, 32:]) > 0  # the model saw another left half


@pytest.mark.slow
def test_an_upscaler_enlarges(tiny_model):
    vae = dataclasses.replace(tiny_model('sd1').config.vae, block_out_channels=(16, 16, 16))
    model = widened(tiny_model, 7, vae=vae, num_class_embeds=30, low_res=ScheduleConfig(
        beta_start=0.0001, beta_end=0.02, beta_schedule='scaled_linear'))
    small = PICTURE[:12, :20]
    request = Request('cat', seed=1, steps=3, image=small)
    images = jaxsd.generate(model, [request, request.replace(class_label=3), request.replace(
        image=OTHER[:12, :20])])
    assert images.shape == (3, 48, 80, 3)
    assert resolve([request], model.config)[0].strength == 1  # from noise, all the way
    assert min(_far(images[0], images[1]), _far(images[0], images[2])) > 0


@pytest.mark.slow
def test_a_refiner_takes_over(tiny_model):
    base, refiner = tiny_model('sdxl'), tiny_model('refiner')
    text = Request('cat', seed=1, steps=5, sampler='euler')
    seen = []
    images = jaxsd.generate(base, [text.replace(switch=s) for s in (0.0, 0.6, 1.0)],
                            refiner=refiner, on_step=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted({d for d, _ in seen})
    same_vae = refiner.replace(params=refiner.params | {'vae': base.params['vae']})
    alone = jaxsd.generate(base, [text])[0]
    handed = jaxsd.generate(base, [text.replace(switch=1.0)], refiner=same_vae)[0]
    assert _far(handed, alone) <= 1
    assert _far(images[0], jaxsd.generate(refiner, [text])[0]) <= 1
    assert min(_far(images[1], images[0]), _far(images[1], images[2])) > 0


def test_previews_show_the_pictures_come(tiny_model):
    model = tiny_model('sd1')
    vae, seen = Network(model.config.vae, model.params['vae']), []
    preview = Preview(vae, lambda done, total, images: seen.append((done, total, images)), every=2)
    images = jaxsd.generate(model, [Request('cat', seed=s, steps=5, sampler='euler')
                                    for s in (1, 2)], preview=preview)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert len(seen) >= 4 and {total for _, total, _ in seen} == {10}
    assert _far(seen[-1][2], images) <= 1 < _far(seen[0][2], images)
    with pytest.raises(ValueError, match='preview: expected latents like the model'):
        other = Network(dataclasses.replace(vae.config, latent_channels=3), vae.params)
        jaxsd.generate(model, [Request('cat')], preview=preview._replace(vae=other))


def test_two_prompts(tiny_model):
    model = tiny_model('sdxl')
    request = Request('cat', 'dog', seed=1, steps=2)
    images = jaxsd.generate(model, [request, request.replace(prompt_2='cat'), request.replace(
        prompt_2='red'), request.replace(negative_prompt_2='red')])
    np.testing.assert_array_equal(images[0], images[1])
    assert _far(images[0], images[2]) > 0 and _far(images[0], images[3]) > 0


def test_aspects(tiny_model):
    assert len(set(BUCKETS)) == 41 and all(abs(w * h / 2**20 - 1) < 0.1 for w, h in BUCKETS)
    assert [bucket(name) for name in ('16:9', '1:1', '2:3', '21:9', '1152x896')] == [
        (1344, 768), (1024, 1024), (832, 1216), (1536, 640), (1152, 896)]
    request, = resolve([Request(aspect='9:16', force_size=True)], tiny_model('sdxl').config)
    assert (request.width, request.height) == (768, 1344)


@pytest.mark.parametrize('fields, message', [
    (dict(strength=1.5, image=PICTURE), 'strength=1.5: expected a number from 0 to 1'),
    (dict(strength=0.5), 'strength=0.5: expected image='),
    (dict(mask=HALF), 'mask: expected image='),
    (dict(image=PICTURE, only_masked=4), 'only_masked=4: expected mask='),
    (dict(image=PICTURE, outpaint=(1, 2, 3)), 'outpaint.*expected four whole numbers'),
    (dict(image=PICTURE, outpaint=(0, 0, 0, 0)), 'expected pixels to add'),
    (dict(image=PICTURE, outpaint=(0, 0, 0, -8)), 'outpaint=-8: expected a whole number between 0'),
    (dict(image=PICTURE, mask=HALF, outpaint=(8, 0, 0, 0)), 'mask and outpaint: expected one'),
    (dict(image=PICTURE, resize='squeeze'), "unknown resize 'squeeze'"),
    (dict(image=PICTURE, mask=HALF, mask_mode='soft'), "unknown mask_mode 'soft'"),
    (dict(image=PICTURE, mask=HALF, fill='grey'), "unknown fill 'grey'"),
    (dict(controls=['edges']), 'expected a list of jaxsd.Control'),
    (dict(controls=[Control('a', OTHER)] * 2), 'names a ControlNet twice'),
    (dict(controls=[Control('a', OTHER, mode=1), Control('a', OTHER)]), 'a mode to each hint'),
    (dict(controls=[Control('a', OTHER, mode=1, guess=g) for g in (None, 'soft')]), 'same guess'),
    (dict(class_label=-1), 'class_label=-1'), (dict(prompt_2=3), 'prompt_2=3: expected a string'),
    (dict(aspect='wide', image=None), "aspect='wide'.*16:9|aspect='wide': expected an SDXL"),
    # What only the model can tell:
    (dict(image=PICTURE, mask=HALF[:32]), 'image is 64x64 and the mask 64x32'),
    (dict(image='missing.png'), 'no such file: missing.png'),
    (dict(image=__file__), 'not an image'),
    (dict(depth=SLOPE), 'depth: this model does not follow depth maps'),
    (dict(class_label=1), 'class_label: this model has no classes'),
    (dict(negative_class_label=1), 'negative_class_label: this model has no classes'),
    (dict(controls=[Control('edge', OTHER)]), "unknown ControlNet 'edge': did you mean 'edges'"),
    (dict(image=PICTURE, outpaint=(8, 0, 0, 0), width=64, height=64), 'expected neither beside'),
    (dict(image=PICTURE, mask=SLOPE, mask_mode='strength', sampler='dpm_adaptive'),
     'no change over the steps with dpm_adaptive'),
    (dict(controls=[Control('edges', OTHER, start=0.5)], sampler='dpm_adaptive'),
     "control 'edges' with start or end: expected no change over the steps"),
])
def test_bad_requests(steered, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        jaxsd.generate(steered, [Request('cat', seed=1, **fields)])
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('options, message', [
    (dict(scale='much'), "scale='much'"), (dict(start=0.5, end=0.5), 'expected start < end'),
    (dict(end=2), 'end=2'), (dict(guess='yes'), "unknown guess mode 'yes'"),
    (dict(mode='edge'), "unknown mode 'edge': did you mean"), (dict(mode=-1), 'control mode=-1'),
    (dict(image=None), 'the hint')])
def test_bad_controls(options, message):
    with pytest.raises(ValueError, match=message):
        Control(**{'net': 'edges', 'image': OTHER, **options})


def test_what_does_not_fit_the_model(tiny_model, steered):
    with pytest.raises(ValueError, match='expected depth=, or image='):
        jaxsd.generate(widened(tiny_model, 5), [Request('cat')])
    with pytest.raises(ValueError, match='only 0.5'):
        jaxsd.generate(widened(tiny_model, 5), [Request('cat', depth=np.full((64, 64), 0.5))])
    with pytest.raises(ValueError, match='class_label=9: expected 0 to 6'):
        jaxsd.generate(widened(tiny_model, 4, num_class_embeds=7), [Request(class_label=9)])
    with pytest.raises(ValueError, match='a U-Net of 6 input channels'):
        jaxsd.generate(widened(tiny_model, 6), [Request('cat')])
    upscaler = widened(tiny_model, 7, num_class_embeds=30, low_res=ScheduleConfig())
    for wrong, message in ((Request('cat'), 'the small picture that this model enlarges'),
                           (Request('cat', image=PICTURE, mask=HALF), 'mask: an upscaler'),
                           (Request('cat', image=PICTURE, strength=0.5), 'expected 1 with an')):
        with pytest.raises(ValueError, match=message):
            jaxsd.generate(upscaler, [wrong])
    with pytest.raises(ValueError, match='1.x|2.x|SDXL|wide'):
        jaxsd.generate(tiny_model('sdxl').replace(controlnets=steered.controlnets),
                       [Request('cat', controls=[Control('edges', OTHER)])])
    with pytest.raises(ValueError, match='refiner: expected latents like'):
        jaxsd.generate(tiny_model('sdxl'), [Request('cat')], refiner=widened(
            tiny_model, 4, 'refiner', vae=dataclasses.replace(
                tiny_model('sd1').config.vae, block_out_channels=(16, 16))))


def test_pictures_of_any_mode(tiny_model, tmp_path):
    """A palette PNG of another size, resized in three ways, from its path."""
    Image.fromarray(PICTURE[:40]).quantize(16).save(tmp_path / 'a.png')
    request = Request('cat', seed=1, steps=3, image=tmp_path / 'a.png', strength=0)
    crop, pad, stretch = jaxsd.generate(tiny_model('sd1'), [
        request.replace(resize=how) for how in ('crop', 'pad', 'stretch')])
    assert min(_far(crop, pad), _far(pad, stretch), _far(crop, stretch)) > 0


def test_depth_estimator_config_is_static():
    """So that it can stand in a ModelConfig, which is an argument of jit."""
    assert hash(DPTConfig()) == hash(DPTConfig())
