"""Fine-tuning by recipes, from a folder of pictures to the files that others load."""

import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from safetensors.numpy import load_file

import jaxsd
from jaxsd.config import T2IAdapterConfig
from jaxsd.models import spec, unet
from jaxsd.run.pipeline import once
from jaxsd.train import config, finetune, memory, methods

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / 'weights'))
from tiny import random_model  # noqa: E402

pytestmark = pytest.mark.usefixtures('forgets_programs')
PROMPT = 'red apple'


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder of eight pictures with captions, and hints of the same names in another."""
    folder = tmp_path_factory.mktemp('pictures')
    (folder / 'hints').mkdir()
    (folder / '2_cat').mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        image = np.full((64, 64, 3), 255, np.uint8)
        image[8 + i:40 + i, 8:56] = rng.integers(0, 256, 3)
        Image.fromarray(image).save(folder / '2_cat' / f'{i}.png')
        (folder / '2_cat' / f'{i}.txt').write_text(['red apple', 'a dog <it>'][i % 2])
        Image.fromarray(255 - image).save(folder / 'hints' / f'{i}.png')
    return folder


def recipe(method, folder, pictures, checkpoint, **fields):
    """A short training on the tiny model."""
    sections = {
        'data': {'sets': {'cats': {'path': str(pictures / '2_cat')}}, 'resolution': (64,),
                 'buckets': False},
        'train': {'steps': 2, 'batch_size': 4, 'log_every': 1},
        'optimizer': {'learning_rate': 1e-2}}
    for name, changes in fields.pop('sections', {}).items():
        sections[name] = sections.get(name, {}) | changes
    export = 'result.safetensors' if method in ('lora', 'textual_inversion') else 'result'
    return config.recipe(method, **{
        'model': str(checkpoint), 'out': str(folder / 'run'), 'export': str(folder / export),
        **fields, **sections})


def draw(model, **fields):
    request = jaxsd.Request(PROMPT, steps=2, width=64, height=64, **fields)
    return np.asarray(jaxsd.generate(model, [request]))[0].astype(int)


@pytest.mark.slow
def test_a_lora_with_all_its_surroundings(tmp_path, pictures, checkpoint):
    """Cached latents and texts, a held-out part, samples: and the file draws what the run drew."""
    c = recipe('lora', tmp_path, pictures, checkpoint, sections={
        'data': {'cache': str(tmp_path / 'cache'), 'cache_latents': True, 'cache_texts': True,
                 'heldout': 0.3, 'caption_dropout': 0.2, 'flip': True},
        'lora': {'rank': 2, 'conv_rank': 2, 'layers': 'all'},
        'train': {'sample_every': 1}, 'optimizer': {'learning_rate': 0.1},
        'sample': {'prompts': (PROMPT,), 'request': 'steps=2'}})
    finetune.fine_tune(c)
    run = tmp_path / 'run'
    head, *rows = (run / 'log.csv').read_text().splitlines()
    assert len(rows) == 2 and {'loss', 'heldout', 'input_wait', 'examples_per_second'} <= {
        *head.split(',')}
    page = (run / 'index.html').read_text()
    assert 'step 2' in page and 'samples/000002.png' in page and 'conv_rank: 2' in page
    model = jaxsd.load(checkpoint)
    adapter = jaxsd.load_adapter(c.export, model)
    drawn = draw(jaxsd.merge(model, {adapter: 1.0}), seed=0)
    assert np.abs(drawn - draw(model, seed=0)).max() > 8
    shown = np.asarray(Image.open(run / 'samples' / '000002.png')).astype(int)
    assert np.abs(drawn - shown).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dora', 'lokr'])
def test_kin_of_a_lora(tmp_path, pictures, checkpoint, kind):
    c = recipe('lora', tmp_path, pictures, checkpoint, sections={
        'lora': {'rank': 2, 'kind': kind, 'components': ('unet', 'text_encoder')}})
    found = finetune.fine_tune(c)
    model = jaxsd.load(checkpoint)
    ours, loaded = (draw(jaxsd.merge(model, {a: 1.0}), seed=0)
                    for a in (found, jaxsd.load_adapter(c.export, model)))
    assert np.abs(ours - loaded).max() <= 1 and np.abs(ours - draw(model, seed=0)).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize('kind, rank', [('lora', 2), ('loha', 16)])
def test_convolutions_that_are_prepared_once_are_trained_too(kind, rank):
    """Tiles of a frozen weight stay, unless a change is added to it, as of a large LoHa."""
    model, rng = jaxsd.load('emoji'), np.random.default_rng(0)
    method = methods.lora(model, config.AdapterConfig(kind=kind, layers='resnets', conv_rank=rank),
                          rng)
    trainable = jax.tree.map(lambda a: a + rng.normal(0, 0.1, a.shape).astype('f'),
                             method.trainable)
    frozen = {'unet': jax.tree.map(lambda a: a.astype('float32'), method.frozen['unet'])}
    prepared = once(frozen)
    assert 'tiles' in prepared['unet']['mid_block']['resnets']['0']['conv1']
    x = rng.normal(size=(1, 8, 8, 16)).astype('float32')
    context = rng.normal(size=(1, 77, 192)).astype('float32')

    def predict(params):
        return unet.apply(params['unet'], model.config.unet, x, np.array([500.0]), context)

    plain, ours = predict(method.apply(frozen, trainable)), predict(
        once(method.apply(prepared, trainable)))
    np.testing.assert_allclose(ours, plain, atol=1e-4 * np.std(plain))
    assert np.abs(predict(frozen) - plain).max() > 0.1 * np.std(plain)


@pytest.mark.slow
def test_a_textual_inversion(tmp_path, pictures, checkpoint):
    c = recipe('textual_inversion', tmp_path, pictures, checkpoint, sections={
        'textual_inversion': {'token': '<it>', 'vectors': 2, 'initial': 'cat'}})
    found = finetune.fine_tune(c)
    model = jaxsd.load(checkpoint)
    loaded = jaxsd.load_embedding(c.export, model.config)
    for name, vectors in found.vectors.items():
        assert vectors.shape[0] == 2
        np.testing.assert_array_equal(loaded.vectors[name], vectors)
    start = model.params['text_encoder']['text_model']['embeddings']['token_embedding']['weight']
    first = start[model.tokenizers['text_encoder'].ids('cat')[0]]
    assert np.abs(found.vectors['text_encoder'][0] - first).max() > 1e-3


@pytest.mark.slow
def test_a_controlnet(tmp_path, pictures, checkpoint):
    data = {'sets': {'cats': {'path': str(pictures / '2_cat'), 'hints': str(pictures / 'hints')}}}
    c = recipe('controlnet', tmp_path, pictures, checkpoint, sections={
        'data': data, 'controlnet': {
            'network': (('conditioning_embedding_out_channels', (4, 4, 8, 8)),)}})
    finetune.fine_tune(c)
    net = jaxsd.load_controlnet(c.export)
    assert all(np.any(p['weight']) for p in net.params['controlnet_down_blocks'].values())
    model = jaxsd.load(checkpoint)
    steered = model.replace(controlnets={'hint': net})
    hint = np.zeros((64, 64, 3), np.uint8)
    controls = [jaxsd.Control('hint', hint)]
    assert (draw(steered, seed=0, controls=controls) != draw(model, seed=0)).any()


@pytest.mark.slow
def test_dreambooth_draws_its_class_once(tmp_path, pictures, checkpoint):
    """Prior preservation, of the model and its text encoder; the pictures of the class stay."""
    c = recipe('full', tmp_path, pictures, checkpoint, sections={
        'full': {'components': ('unet', 'text_encoder')},
        'data': {'prior_weight': 0.5}, 'train': {'accumulate': 2},
        'prior': {'prompt': 'dog', 'count': 4, 'request': 'steps=2'}})
    finetune.fine_tune(c)
    drawn = sorted((tmp_path / 'run' / 'class_pictures').glob('*.png'))
    assert len(drawn) == 4
    before = drawn[0].read_bytes()
    model, start = jaxsd.load(c.export), jaxsd.load(checkpoint)
    for part in ('unet', 'text_encoder'):
        assert np.any(_first(model.params[part]) != _first(start.params[part]))
    finetune.fine_tune(c)  # nothing is left to do
    assert drawn[0].read_bytes() == before


def _first(tree):
    while isinstance(tree, dict):
        tree = tree[min(tree)]
    return tree


@pytest.mark.slow
def test_nine_channels_from_four(tmp_path, pictures, checkpoint):
    c = recipe('full', tmp_path, pictures, checkpoint, inpainting=True)
    finetune.fine_tune(c)
    model = jaxsd.load(c.export)
    assert model.config.unet.in_channels == 2 * model.config.vae.latent_channels + 1
    assert np.any(model.params['unet']['conv_in']['weight'][:, :, -5:])
    image = np.asarray(Image.open(pictures / '2_cat' / '0.png'))
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    drawn = draw(model, seed=0, image=image, mask=mask)
    assert (drawn[:32] != image[:32]).any()


@pytest.mark.slow
def test_a_depth_model_sees_the_depth_of_its_pictures(tmp_path, pictures):
    """Estimated once, and kept beside the latents."""
    jaxsd.save(random_model('sd2_depth', tokenizers=True), tmp_path / 'depth')
    c = recipe('full', tmp_path, pictures, tmp_path / 'depth')
    with pytest.raises(ValueError, match='expected cache_latents=True for a depth model'):
        finetune.fine_tune(c)
    c.data.update(cache=str(tmp_path / 'cache'), cache_latents=True)
    found = finetune.fine_tune(c)
    kept = load_file(next((tmp_path / 'cache').rglob('*.safetensors')))
    assert kept['depth'].shape == (8, 8, 1) and kept['depth'].min() == -1
    before = jaxsd.load(tmp_path / 'depth').params['unet']['conv_in']['weight']
    assert np.any(found.params['unet']['conv_in']['weight'][:, :, 4] != before[:, :, 4])
    assert 'depth_estimator' in jaxsd.load(c.export).params


@pytest.mark.slow
def test_few_steps_and_preferences(tmp_path, pictures, checkpoint):
    hints = {'sets': {'cats': {'path': str(pictures / '2_cat'), 'hints': str(pictures / 'hints')}}}
    for objective, data in {'consistency': {}, 'preference': hints}.items():
        c = recipe('lora', tmp_path / objective, pictures, checkpoint, sections={
            'data': data, 'loss': {'objective': objective}})
        finetune.fine_tune(c)
        assert pathlib.Path(c.export).exists()


@pytest.mark.parametrize('method, fields, said', [
    ('lora', {'export': 'lora'}, "export='lora': expected a file"),
    ('lora', {'layout': 'single-file'}, "layout='single-file': expected 'kohya' or 'diffusers'"),
    ('lora', {'layout': 'diffusers', 'sections': {'lora': {'kind': 'loha'}}},
     "layout='diffusers': diffusers reads no loha in it; expected 'kohya'"),
    ('controlnet', {'layout': 'kohya'}, "layout='kohya': expected 'diffusers' or 'single-file'"),
    ('controlnet', {'layout': 'single-file'}, 'expected a file for method=controlnet, '),
    ('lora', {'inpainting': True}, "inpainting: the first layer gets new channels"),
    ('lora', {'zero_terminal_snr': True}, "from which 'epsilon' says nothing"),
    ('lora', {'sections': {'lora': {'layers': 'nothing'}}}, "layers='nothing': no layer of unet"),
    ('lora', {'sections': {'lora': {'components': ('vae',)}}}, "this model has no 'vae' to train"),
    ('lora', {'sections': {'loss': {'weighting': 'min'}}}, "loss.weighting='min' is not impl"),
    ('lora', {'sections': {'data': {'sets': {'cats': {'path': 'nowhere'}}}}}, 'nowhere'),
    ('lora', {'sections': {'optimizer': {'warmup': 2}}}, 'optimizer.warmup=2: expected less than'),
    ('lora', {'sections': {'train': {'accumulate': 3}}}, 'train.batch_size=4: expected a mult'),
    ('full', {'layers': 0, 'sections': {'full': {'layers': 'nope'}}}, "layers='nope': no par"),
    ('full', {'sections': {'loss': {'objective': 'consistency'}}}, "expected method='lora'"),
    ('textual_inversion', {}, "textual_inversion.token='': expected the word"),
    ('textual_inversion', {'sections': {'textual_inversion': {'token': '<other>'}}},
     "token='<other>': no caption has it"),
    ('controlnet', {}, 'the pictures have no hints')])
def test_what_cannot_be_trained_is_one_line(tmp_path, pictures, checkpoint, method, fields, said):
    fields.pop('layers', None)
    c = recipe(method, tmp_path, pictures, checkpoint, **fields)
    with pytest.raises((ValueError, FileNotFoundError), match=None) as error:
        finetune.fine_tune(c)
    assert said in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_a_union_is_not_trained(checkpoint):
    c = config.ControlConfig(network=(('num_control_type', 6),))
    with pytest.raises(ValueError, match='training a ControlNet-Union is not implemented'):
        methods.control(jaxsd.load(checkpoint), c, np.random.default_rng(0))


def test_a_bad_picture_is_named_once_or_ends_it(tmp_path, pictures, checkpoint, capsys):
    shutil.copytree(pictures / '2_cat', tmp_path / 'in')
    (tmp_path / 'in' / 'bad.png').write_text('no picture')
    c = recipe('lora', tmp_path, pictures, checkpoint, sections={
        'data': {'sets': {'cats': {'path': str(tmp_path / 'in')}}}})
    assert len(finetune.read_pictures(config.read(c)).examples) == 8
    said = capsys.readouterr()
    assert (said.out + said.err).count('bad.png') == 1
    with pytest.raises(ValueError, match='bad.png') as error:
        finetune.fine_tune(c, strict=True)
    assert '\n' not in str(error.value)


@pytest.mark.slow
def test_memory_is_told_without_weights(tmp_path, pictures, checkpoint):
    """Trainable, optimiser and frozen bytes by hand; rematerialisation needs less."""
    def estimate(method, **sections):
        return memory.estimate(config.read(recipe(method, tmp_path, pictures, checkpoint,
                                                  sections=sections)))

    count = spec.count(spec.spec(TINY['sd1']))
    found = estimate('full', train={'ema': 0.9})
    unet = spec.count(spec.names(TINY['sd1'].unet))
    assert found.parameters == unet and found.trainable == 4 * unet
    assert 0 <= found.optimizer - 3 * 4 * unet < 100  # Adam's two, the average, counters
    assert found.frozen == 4 * (count - unet)
    assert found.total == sum(found[:4])
    again = estimate('full', train={'remat': True, 'ema': 0.9})
    assert again.temporary < found.temporary and again.trainable == found.trainable
    small = estimate('lora', lora={'rank': 2})
    assert 0 < small.parameters < unet / 10


def test_a_result_is_written_again_in_its_layout_and_dtype(tmp_path):
    """As after a run that went on: the export is the run's own."""
    cfg = T2IAdapterConfig(channels=(4, 8), downscale_factor=2)
    net = jaxsd.Network(cfg, spec.init_part(np.random.default_rng(0), spec.names(cfg)))
    word = jaxsd.Embedding('it', {'text_encoder': np.ones((2, 768), np.float32)})
    for result, layout in ((net, 'single-file'), (word, '')) * 2:
        finetune.export(result, tmp_path / 'a.safetensors', layout, 'float16')
        found = load_file(tmp_path / 'a.safetensors')
        assert {a.dtype for a in found.values()} == {np.dtype(np.float16)}
        assert ('body.0.block1.weight' in found) == (result is net)


def test_nothing_of_others_is_written_over(tmp_path, pictures, checkpoint):
    c = recipe('full', tmp_path, pictures, checkpoint)
    c.export = str(checkpoint)
    with pytest.raises(ValueError, match='is there already, and this run did not write it'):
        finetune.fine_tune(c)


@pytest.mark.slow
def test_every_shipped_recipe_reads():
    folder = pathlib.Path(__file__).resolve().parents[2] / 'configs'
    names = [path.stem for path in folder.glob('train_*.py')]
    for name in names:
        space = {}
        exec((folder / f'{name}.py').read_text(), space)  # noqa: S102
        c = space['get_config']()
        if 'stages' not in c:
            c.model = c.model or 'emoji'
            assert config.read(c).base.method == c.method
    assert len(names) >= 4
