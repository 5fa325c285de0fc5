"""Prompts through `generate`: blocks, schedules, AND, weights, adapters and embeddings are data."""

import jax
import numpy as np
import pytest
from run.test_generate import _far, compilations, on_devices

import jaxsd
from jaxsd import Request
from jaxsd.models import spec
from jaxsd.run import inputs, resolve
from jaxsd.weights import Embedding
from jaxsd.weights.adapter_formats import Delta
from jaxsd.weights.adapters import Adapter

SOME = dict(seed=3, steps=4, sampler='euler', schedule='normal')
LONG = 'red cat, a green apple, a dog, ' * 3  # 18 words and 9 commas, blocks of 14


def settled(model):
    """With features whose mean is not 0, which A1111's weights divide by; `init` makes it 0."""
    def shift(path, a):
        at = jax.tree_util.keystr(path)
        return a + 0.3 if 'text_encoder' in at and 'final_layer_norm' in at else a
    return model.replace(params=jax.tree_util.tree_map_with_path(shift, model.params))


@pytest.fixture(scope='module')
def sd1(tiny_model):
    return settled(tiny_model('sd1'))


def data_of(model, *prompts, **fields):
    requests = [Request(prompt, **SOME | fields) for prompt in prompts]
    return inputs(model, resolve(requests, model.config))


def test_schedules_are_an_index_into_encoded_texts(sd1):
    """Of each step the text that holds; a batch with a plain prompt, which follows its own."""
    data = data_of(sd1, '[cat:dog:2] a', 'apple')
    rows = data.rows.sigma[:, 0] > 0
    text = data.steps.text_index[rows]
    assert (text[:, :, 0] == text[0, :, 0]).all()  # the negative prompt
    cat, *_, dog = text[:, 0, 1]
    assert text[:, 0, 1].tolist() == [cat, cat, cat, dog] and cat != dog  # as A1111 counts
    turns = data_of(sd1, '[cat|dog]', 'apple').steps.text_index[rows][:, 0, 1]
    assert turns.tolist() == [turns[0], turns[0], turns[2], turns[0]] and turns[0] != turns[2]
    assert len(set(text[:, 1, 1])) == 1
    constant = data_of(sd1, 'cat', 'apple')
    assert constant.steps.text_index is None


@pytest.mark.slow
def test_a_schedule_walks_as_its_texts_do(sd1):
    """Changing at the start is the second text, after the end the first one; between, neither."""
    model = sd1

    def draw(*prompts, **more):
        return jaxsd.generate(model, [Request(p, **SOME | more) for p in prompts])

    for sampler in ('euler', 'heun'):
        first, never, between, dog, cat = draw(
            '[cat:dog:0]', '[cat:dog:9]', '[cat:dog:1]', 'dog', 'cat', sampler=sampler, steps=9)
        assert _far(first, dog) <= 1 and _far(never, cat) <= 1
        assert min(_far(between, first), _far(between, never)) > 2


@pytest.mark.slow
def test_everything_about_prompts_is_data(sd1):
    """Words, weights of every rule, and when they change; each picture as it is alone."""
    model = sd1
    batch = [
        Request('a (red:1.4) [cat|dog] AND apple :0.6', 'dog', **SOME),
        Request('a red cat', 'a', **SOME | dict(seed=9, weighting='none')),
        Request('[a:green:0.5] (cat:0.7)', **SOME | dict(weighting='compel', sampler='heun')),
        Request('a (dog:1.2)', **SOME | dict(weighting='comfy', guidance=2.0)),
    ]
    images = jaxsd.generate(model, batch)
    for i in (0, 2):
        np.testing.assert_array_equal(images[i], jaxsd.generate(model, [batch[i]])[0])
    with compilations() as count:
        jaxsd.generate(model, [batch[0].replace(prompt='(red:0.5) [a|apple] AND cat :-1'),
                               batch[1].replace(prompt='cat', seed=2),
                               batch[2].replace(prompt='[red:a:0.2] (apple:0.2)', steps=9),
                               batch[3].replace(prompt='red (apple:0.7)', sampler='heun')])
    assert not count


@pytest.mark.slow
def test_and_adds_guidance_up(sd1):
    """`a AND a` of halves is a; a weight of 0 is nobody."""
    model = sd1
    images = jaxsd.generate(model, [Request(p, **SOME) for p in (
        'cat', 'cat:0.5 AND cat:0.5', 'cat AND dog:0', 'cat AND dog')])
    assert max(_far(images[0], image) for image in images[1:3]) <= 1 < _far(images[0], images[3])


@pytest.mark.slow
def test_blocks(tiny_model):
    """A long prompt is read to its end; a batch of one and three blocks equals its solo runs."""
    model = tiny_model('sdxl')
    batch = [Request('cat', **SOME), Request(LONG, **SOME), Request(LONG + 'green', **SOME)]
    images = jaxsd.generate(model, batch)
    assert min(_far(a, b) for a, b in [(images[0], images[1]), (images[1], images[2])]) > 1
    for image, request in zip(images, batch):
        assert _far(image, jaxsd.generate(model, [request])[0]) <= 1
    with compilations() as count:
        jaxsd.generate(model, [batch[1].replace(prompt='a dog BREAK cat BREAK ' + 'red ' * 12)])
    assert not count


def test_clip_skip_is_data(sd1):
    model = sd1
    batch = [Request('cat', **SOME | dict(clip_skip=n)) for n in (1, 2)]
    images = jaxsd.generate(model, batch)
    assert _far(*images) > 1
    assert _far(images[0], jaxsd.generate(model, [Request('cat', **SOME)])[0]) <= 1
    with pytest.raises(ValueError, match='clip_skip=3: expected at most 2, the layers of text_enc'):
        jaxsd.generate(model, [batch[0].replace(clip_skip=3)])


@pytest.fixture
def adapted(sd1, tmp_path):
    """sd1 with two LoRAs of random weights, one of which leaves the text encoder alone."""
    from safetensors.numpy import save_file
    model, found = sd1, {}
    for seed, name in enumerate(('one', 'two')):
        rng = np.random.default_rng(seed)
        tensors = {}
        for part, prefix in (('unet', 'lora_unet'), ('text_encoder', 'lora_te')):
            for weight, (out, into, *_) in ((w, (*s, 0)) for w, s in spec.spec(model.config)[
                    part].items() if len(s) == 2 and '.attn1.to_q.' in w or 'mlp.fc1.w' in w):
                key = f'{prefix}_{weight.removesuffix(".weight").replace(".", "_")}'
                tensors[f'{key}.lora_down.weight'] = rng.standard_normal((3, into), np.float32)
                tensors[f'{key}.lora_up.weight'] = rng.standard_normal((out, 3), np.float32) / 3
                tensors[f'{key}.alpha'] = np.full((), 3, np.float32)
        save_file(tensors, tmp_path / f'{name}.safetensors')
        found[name] = jaxsd.load_adapter(tmp_path / f'{name}.safetensors', model)
    return model.replace(adapters=found)


@pytest.mark.slow
def test_adapters_are_data(adapted):
    """Each picture with its own, as merged; another weight or another adapter compiles nothing."""
    batch = [Request('cat', **SOME), Request('cat <lora:one:0.5>', **SOME),
             Request('cat', **SOME | dict(adapters={'two': (0.0, 0.8), 'one': 1.0}))]
    images = jaxsd.generate(adapted, batch)
    one, two = adapted.adapters.values()
    plain = adapted.replace(adapters={})
    for image, merged in zip(images, (
            plain, jaxsd.merge(plain, [(one, 0.5)]),
            jaxsd.merge(plain, [(one, 1.0), (two, (0.0, 0.8))]))):
        assert _far(image, jaxsd.generate(merged, [batch[0]])[0]) <= 1
    assert min(_far(images[0], images[1]), _far(images[1], images[2])) > 2
    jaxsd.generate(adapted, [batch[1]])
    with compilations() as count:
        jaxsd.generate(adapted, [batch[1].replace(prompt='<lora:two:0.1> dog')])
    assert not count
    with pytest.raises(ValueError, match="unknown adapter 'onne'.*one"):
        jaxsd.generate(adapted, [Request('<lora:onne:1>', **SOME)])
    with pytest.raises(ValueError, match="adapter 'one': the model has none; expected model.repl"):
        jaxsd.generate(plain, [batch[1]])


def test_embeddings(sd1):
    model = sd1
    vectors = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    model = model.replace(embeddings={'mine': Embedding('mine', {'text_encoder': vectors})})
    data = data_of(model, 'a mine cat', 'dog')
    assert data.embeddings['text_encoder'].shape == (2, 32)
    assert (data.tokens['text_encoder'].tokens[0, 1] < 0).sum() == 2
    plain, named = jaxsd.generate(model, [Request(p, **SOME) for p in ('a cat', 'a mine cat')])
    assert _far(plain, named) > 1
    with pytest.raises(ValueError, match="unknown embedding 'mien'.*mine"):
        data_of(model, 'embedding:mien')


def test_embeddings_of_adapters_are_for_the_requests_that_name_them(sd1):
    """Whatever stands beside them in a batch; a file of one's own comes before them (A1111)."""
    rng = np.random.default_rng(0)
    one, two, own = (Embedding('mine', {'text_encoder': rng.standard_normal((n, 32), np.float32)})
                     for n in (2, 3, 1))
    adapted = sd1.replace(adapters={name: Adapter({}, embeddings={'mine': e})
                                    for name, e in (('one', one), ('two', two))})
    prompts = 'a mine cat', 'a mine cat <lora:one:1>', 'a mine cat <lora:two:0>'
    for model, counts in ((adapted, (0, 2, 3)),
                          (adapted.replace(embeddings={'mine': own}), (1, 1, 1))):
        for order in (prompts, prompts[::-1]):
            data = data_of(model, *order)
            found = (data.tokens['text_encoder'].tokens[:, 1] < 0).sum(-1)
            assert dict(zip(order, found)) == dict(zip(prompts, counts))
            alone = [data_of(model, prompt) for prompt in order]
            assert [(d.tokens['text_encoder'].tokens[0, 1] < 0).sum() for d in alone] == [*found]


SPREAD = [Request('[a:green:0.5] (cat:0.7)', **SOME | dict(weighting='compel')),
          Request('a red <lora:one:0.5> mine', **SOME | dict(noise='torch', clip_skip=2)),
          Request('cat AND dog:-0.5', **SOME | dict(sampler='euler_ancestral', noise='philox'))]


def whole(model):
    """sd1 with an adapter, a full change of one layer, and an embedding, the same anywhere."""
    rng = np.random.default_rng(5)
    weight = model.params['unet']['mid_block']['attentions']['0']['proj_in']['weight']
    full = Adapter({'unet': {'mid_block.attentions.0.proj_in.weight': Delta(
        dense=rng.standard_normal(weight.shape, np.float32))}})
    vectors = rng.standard_normal((2, 32)).astype(np.float32)
    return model.replace(adapters={'one': full}, embeddings={
        'mine': Embedding('mine', {'text_encoder': vectors})})


@pytest.mark.slow
def test_over_devices_with_padding(sd1, tmp_path):
    """Three pictures on two devices: what they share is not split, what is theirs is."""
    found = on_devices(2, tmp_path / 'a.npy', """
from test_prompts import SPREAD, settled, whole
np.save(path, jaxsd.generate(whole(settled(model)), SPREAD))
""")
    assert _far(found, jaxsd.generate(whole(sd1), SPREAD)) <= 1


def test_dynamic_prompts_are_resolved_by_the_seed(sd1):
    config = sd1.config
    request = Request('{a|b} __x__', '{1|2|3}', seed=5, wildcards={'x': ['u', 'v']})
    (one,), (two,) = resolve([request], config), resolve([request], config)
    assert one == two or (one.prompt, one.negative_prompt) == (two.prompt, two.negative_prompt)
    assert '{' not in one.prompt + one.negative_prompt and '__' not in one.prompt
    assert resolve([one], config)[0].prompt == one.prompt
    found = {resolve([request.replace(seed=i)], config)[0].prompt for i in range(40)}
    assert found == {'a u', 'a v', 'b u', 'b v'}


@pytest.mark.parametrize('fields, message', [
    (dict(weighting='a111'), "unknown weighting 'a111': did you mean 'a1111'"),
    (dict(cut='sharp'), "unknown cut 'sharp'"),
    (dict(noise='cuda'), "unknown noise 'cuda'"),
    (dict(clip_skip=0), 'clip_skip=0: expected a whole number between 1 and 100'),
    (dict(noise_batch=(2, 2)), "noise_batch's place=2: expected a whole number between 0 and 1"),
    (dict(adapters=['x']), 'adapters=.*: expected a mapping from names to weights'),
    (dict(adapters={'x': (1, 2, 3)}), 'adapters: x=.*: expected a weight or two'),
    (dict(adapters={'x': float('nan')}), "weight of adapter 'x'=nan: expected a finite number"),
])
def test_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**fields)


def test_changing_prompts_need_steps(sd1):
    with pytest.raises(ValueError, match='a prompt that changes over the steps: expected no'):
        data_of(sd1, '[cat:dog:0.5]', sampler='dpm_adaptive')
