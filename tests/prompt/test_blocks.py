"""Blocks of tokens, weights and embeddings, against A1111's and ComfyUI's own code and by rule."""

import functools
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_clip

from jaxsd.config_files import VERSIONS
from jaxsd.prompt import blocks, conditioning, grammar
from jaxsd.prompt.emphasis import BREAK, Segment
from jaxsd.prompt.tokenizer import Tokenizer
from jaxsd.run.request import WEIGHTINGS

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'prompt_features.npz')
TOKENIZERS = {'text_encoder': Tokenizer.from_folder(VERSIONS / 'sdxl' / 'tokenizer'),
              'text_encoder_2': Tokenizer.from_folder(VERSIONS / 'sdxl' / 'tokenizer_2')}
EMBEDDINGS = {name: SimpleNamespace(vectors={
    encoder: tiny_clip.vectors(name, seed)
    for encoder, (_, seed) in tiny_clip.FAMILIES['sdxl'].items()}) for name in tiny_clip.VECTORS}


@functools.cache
def encoder(family):
    """encode(texts, ids, zero, skip) of a family, compiled; embeddings=: the vectors' table."""
    own, config = tiny_clip.model(family)
    run = jax.jit(lambda params, *data: conditioning.encode(params, config, *data))

    def encode(texts, ids=None, zero=None, skip=None, embeddings=None, params=own):
        extra = {'embeddings': embeddings} if embeddings else {}
        return jax.tree.map(np.asarray, run(params | extra, texts, ids, zero, skip))

    return encode


def read(images, weighting='a1111', cut='comma', family='sd15', embeddings=None, widths=None):
    """Images of N texts, strings or segments -> what blocks.texts makes of them."""
    images = [[[Segment(t, 1.0)] if isinstance(t, str) else t for t in image] for image in images]
    rules = [[rule] * len(images) if isinstance(rule, str) else rule for rule in (weighting, cut)]
    tokenizers = {name: TOKENIZERS[name] for name in tiny_clip.FAMILIES[family]}
    return blocks.texts(tokenizers, lambda name: images, *rules, embeddings, widths)


def encode(images, weighting='a1111', cut='comma', family='sd15', embeddings=None, **more):
    texts, table = read(images, weighting, cut, family, embeddings)
    ids = None
    if family == 'sdxl':
        ids = np.zeros((len(images), len(images[0]), 6), np.float32)
    return encoder(family)(texts, ids, embeddings=table, **more)


def segments(how, weighting):
    """What the grammar makes of the golden's texts, which have no schedules nor AND any more."""
    return [grammar.plan(str(text), tiny_clip.STEPS, weighting, negative=True).parts[0]
            .schedule[-1][1] for text in GOLDEN['texts'][GOLDEN[f'{how}/which']]]


@pytest.mark.slow
@pytest.mark.parametrize('how, weighting, cut, family, skip', [
    ('a1111/sd15', 'a1111', 'comma', 'sd15', 0), ('a1111/hard', 'a1111', 'hard', 'sd15', 0),
    ('a1111/skip', 'a1111', 'comma', 'sd15', 1), ('a1111/none', 'none', 'comma', 'sd15', 0),
    ('a1111/sdxl', 'a1111', 'comma', 'sdxl', 0), ('comfy/sd15', 'comfy', 'word', 'sd15', 0),
    ('comfy/sdxl', 'comfy', 'word', 'sdxl', 0)])
def test_features_equal_the_references(how, weighting, cut, family, skip):
    texts, K = segments(how, weighting), GOLDEN[f'{how}/blocks']
    tokenizers = {name: TOKENIZERS[name] for name in tiny_clip.FAMILIES[family]}
    written = np.arange(K.max()) < K[:, None]  # [texts,K]; the other blocks are empty
    rows, table = read([[text] for text in texts], weighting, cut, family, EMBEDDINGS)
    last = list(tokenizers)[-1]
    tokens = np.maximum(rows[last].tokens[:, :K.max()], 0)
    if how != 'a1111/sdxl':  # where it pads as the first encoder does, until it encodes
        np.testing.assert_array_equal(tokens[written], GOLDEN[f'{how}/tokens'])
    assert (tokens[~written] == TOKENIZERS[last].row([])).all()
    ids = np.zeros((len(texts), 1, 6), np.float32)
    found = encoder(family)(rows, ids, None, np.full(len(texts), skip, np.int32), table)
    context = found.context.reshape(*written.shape, 77, -1)[written]
    parts = {name: tiny_clip.project(context[..., 32 * i:32 * i + 32])
             for i, name in enumerate(tokenizers)}
    if family == 'sdxl':
        parts['pooled'] = found.added[:, 0, :24]
    compared = [name for name in parts if f'{how}/{name}' in GOLDEN]
    assert compared
    for name in compared:
        expected = GOLDEN[f'{how}/{name}']
        error = np.abs(parts[name] - expected).max() / expected.std()
        print(how, name, error)
        assert error <= 1e-5  # measured: up to 6e-6


def test_counts():
    texts = [[[Segment('a, b ' * 60, 1.0)], []],
             [[Segment('a', 1.0), BREAK, Segment('b', 1.0)], []]]
    counts = blocks.count(TOKENIZERS, lambda name: texts, ['comma', 'hard'])
    assert counts.tolist() == [3, 2]


def test_plain_prompts_cost_one_row_for_each_block_and_text():
    texts, table = read([['a cat', ''], ['dog', 'cat ' * 80]], family='sdxl')
    for some in texts.values():
        assert some.tokens.shape == (2, 4, 77) and some.source.shape == (2, 2, 2, 1)
        assert some.keep is None and table is None and not some.restore.any()
        assert (some.weight == 1).all() and (some.source.ravel() == [*range(4)] * 2).all()


def test_weights_of_one_are_plain_text():
    parts = [Segment('a red ', 1.0), Segment('cat, hat', 1.0)]
    whole = encode([['a red cat, hat']])
    for weighting in WEIGHTINGS:
        np.testing.assert_array_equal(encode([[parts]], weighting).context, whole.context)


def test_without_the_norm_features_are_only_scaled():
    plain, = encode([['a red cat']]).context
    found, = encode([[[Segment('a', 1.0), Segment('red cat', 1.4)]]], 'no_norm').context
    weights = np.ones((77, 1), np.float32)
    weights[2:4] = 1.4
    np.testing.assert_allclose(found[0], plain[0] * weights, rtol=1e-6)


def test_rules_differ_and_mix_in_a_batch_without_a_trace():
    """What an image becomes depends on itself alone, to the bit, whatever its neighbours ask."""
    text = [Segment('a red ', 0.6), Segment('cat ' * 90, 1.2), Segment('hat', 0.3)]
    rules = ['a1111', 'comfy', 'compel', 'none']
    other = [Segment('dog', 0.5), Segment('dog', 0.4), BREAK, Segment('b', 1.5), Segment('c', 0.2)]
    mixed = encode([[text, other]] * 4, rules).context
    for i, rule in enumerate(rules):
        others = rules[i + 1:] + rules[:i]
        again = encode([[text, other]] + [[other, text]] * 3, [rule, *others]).context
        np.testing.assert_array_equal(again[0], mixed[i])
        for j in range(i):
            assert np.abs(mixed[i] - mixed[j]).max() > 0.01


def test_brackets_in_brackets_multiply_where_their_words_are():
    text, = (part.schedule[0][1] for part in grammar.plan(
        'a ((red (cat:1.5)) [[dog]])', 20, 'a1111').parts)
    weight = read([[text]])[0]['text_encoder'].weight[0, 0, 0, 0]
    np.testing.assert_allclose(weight[:7], [1, 1, 1.1**2, 1.1**2 * 1.5, 1.1**-1, 1, 1], rtol=1e-6)


def test_texts_of_nothing_and_of_fifty_blocks():
    rules = ['a1111', 'comfy', 'compel', 'none']
    nothing = read([[(), [Segment(' ', 0.5)]]] * 4, rules)[0]['text_encoder']
    row = TOKENIZERS['text_encoder'].row([])
    assert nothing.tokens.tolist() == [[row] * 2] * 4 and (nothing.weight == 1).all()
    text = [Segment('cat ' * (25 * 75), 1.0), Segment('dog ' * (25 * 75), 0.5)]
    long = read([[text, ()]] * 4, rules)[0]['text_encoder']
    assert long.source.shape[:3] == (4, 2, 50)
    assert (long.tokens[:, :50, 1:-1] == np.repeat([2368, 1929], 25)[:, None]).all()
    own = long.weight[:, 0, :, 0, 1]
    assert (own[:, 0] == 1).all()  # compel: half of it is the text without its dogs
    np.testing.assert_allclose(own[:, -1], [0.5, 0.5, 0.25, 1])


def test_a_mean_of_zero_is_not_restored():
    """Where the final norm leaves nothing of it, A1111 divides 0 by 0."""
    params, _ = tiny_clip.model('sd15')
    norm = params['text_encoder']['text_model']['final_layer_norm']
    norm['weight'], norm['bias'] = np.ones(32, np.float32), np.zeros(32, np.float32)
    texts = [[[Segment('a red ', 1.0), Segment('cat', w)]] for w in (1.5, 0.0)]
    found = encode(texts, params=params).context
    plain = encode([['a red cat']] * 2, params=params).context
    assert abs(plain.mean()) < 1e-6
    expected = plain.copy()
    expected[:, 0, 3] *= [[1.5], [0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_features_of_16_bits_are_mixed_in_32():
    params = jax.tree.map(lambda a: a.astype('bfloat16'), tiny_clip.model('sd15')[0])
    text = [Segment('a red ', 0.7), Segment('cat', 1.3)]
    mixed = encode([[text]], params=params).context
    plain = encode([[text]], 'none', params=params).context
    assert mixed.dtype == plain.dtype == 'bfloat16'
    expected = plain.astype(np.float64)
    expected[0, 0, 1:4] *= np.float64([[0.7], [0.7], [1.3]])
    expected *= plain.astype(np.float64).mean() / expected.mean()
    found = mixed.astype(np.float64)
    # 2^-8: what the last rounding may change, no more
    np.testing.assert_allclose(found, expected, rtol=1.01 * 2**-8, atol=1e-6)


def test_vectors_stand_where_their_names_do():
    for mention in ('bad-hands-5', 'embedding:bad-hands-5', '<bad-hands-5>',
                    'embedding:bad-hands-5.pt'):
        texts, table = read([[f'a {mention} cat sks']], embeddings=EMBEDDINGS)
        row = texts['text_encoder'].tokens[0, 0]
        assert row[:7].tolist() == [49406, 320, -1, -2, 2368, -3, 49407]
        vectors = [tiny_clip.vectors(name, 0) for name in ('bad-hands-5', 'sks')]
        np.testing.assert_array_equal(table['text_encoder'], [*np.concatenate(vectors), [0] * 32])
    # A vector equal to a token's own is that token.
    params, _ = tiny_clip.model('sd15')
    own = params['text_encoder']['text_model']['embeddings']['token_embedding']['weight'][[1125]]
    same = {'zzyzx': SimpleNamespace(vectors={'text_encoder': own})}  # "photo"
    np.testing.assert_array_equal(encode([['a zzyzx of a cat']], embeddings=same).context,
                                  encode([['a photo of a cat']]).context)


def test_vectors_stay_in_one_block():
    text = 'cat ' * 74 + 'bad-hands-5'
    for cut, at in (('comma', (1, 1)), ('hard', (1, 1)), ('word', (1, 1))):
        row = read([[text]], cut=cut, embeddings=EMBEDDINGS)[0]['text_encoder'].tokens[0]
        assert np.argwhere(row == -1).tolist() == [list(at)]


def test_bad_embeddings_are_named():
    with pytest.raises(ValueError, match="unknown embedding 'easynegativ'.*'easynegative'"):
        read([['embedding:easynegativ, cat']], embeddings=EMBEDDINGS)
    with pytest.raises(ValueError, match='model.embeddings, found none'):
        read([['embedding:easynegative']])
    old = {'old': SimpleNamespace(vectors={'text_encoder': np.zeros((1, 32))})}
    with pytest.raises(ValueError, match="'old'.*text_encoder_2.*another version"):
        read([['<old>']], family='sdxl', embeddings=old)
    with pytest.raises(ValueError, match="'old': its vectors have 32 numbers .* expected 768 numb"):
        read([['<old>']], embeddings=old, widths={'text_encoder': 768})


def test_zeros_are_of_the_texts_asked_for():
    texts, _ = read([['a', 'b'], ['c', 'd']], family='sdxl')
    zero = np.array([[True, False], [False, True]])
    found = encoder('sdxl')(texts, np.ones((2, 2, 6), np.float32), zero)
    np.testing.assert_array_equal(found.context.any((2, 3)), ~zero)
    np.testing.assert_array_equal(found.added[..., :24].any(2), ~zero)
    assert found.added[..., 24:].any(2).all()  # time ids are no text
