"""The emoji data set, its tokenizer, and the measurement of what a model learnt from it."""

import json
import pathlib

import numpy as np
import pytest

from launch import emoji_data, evaluate, retrieval

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / 'checkpoints' / 'emoji' / 'tokenizer'
LISTS = ROOT / 'tests' / 'data'
needs_font = pytest.mark.skipif(not pathlib.Path(emoji_data.FONT).exists(),
                                reason='needs the Debian package fonts-noto-color-emoji')


@pytest.fixture(scope='module')
def names():
    return emoji_data.read_names()


@pytest.fixture(scope='module')
def captions(names):
    return [caption for _, caption, _ in names]


@pytest.fixture(scope='module')
def reference():
    return retrieval.read_reference(LISTS / 'emoji_reference.npz')


@pytest.fixture(scope='module')
def tokenizer():
    from transformers import CLIPTokenizer
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def test_names_are_the_whole_keyboard(names, captions):
    assert len(names) == 3788 and len(set(captions)) == 3788
    assert ('\N{RED APPLE}', 'red apple', 'Food & Drink') in names
    assert all(caption.isascii() and caption == caption.lower() for caption in captions)
    assert {'flag: curacao', "twelve o'clock", 'keycap: #'} <= set(captions)


def test_names_must_be_unique_and_present(tmp_path):
    path = tmp_path / 'names.txt'
    path.write_text('1F34E ; fully-qualified # x E0.6 apple\n'
                    '1F34F ; fully-qualified # y E1.0 Apple')
    with pytest.raises(ValueError, match=r"found twice: \['apple'\]"):
        emoji_data.read_names(path)
    path.write_text('1F34E ; unqualified # x E0.6 apple\n')
    with pytest.raises(ValueError, match='no fully-qualified emoji'):
        emoji_data.read_names(path)


def test_heldout_is_a_fixed_twentieth_of_the_toned_emoji(names, captions, reference):
    heldout = emoji_data.held_out(names)
    toned = {caption for text, caption, _ in names if not emoji_data.is_plain(text)}
    assert heldout < toned and len(heldout) == round(len(toned) / 20) == 94
    assert sorted(heldout) == sorted((LISTS / 'emoji_heldout.txt').read_text().splitlines())
    assert heldout == set(reference['captions'][reference['heldout']])
    for caption in heldout:  # the same person without the tone stays in
        start, end = caption.split(': ', 1)
        rest = [part for part in end.split(', ') if not part.endswith('skin tone')]
        # Couples of no gender (person, person) have no name of their own without tones.
        rest = [] if rest == ['person', 'person'] else rest
        plain = f'{start}: {", ".join(rest)}' if rest else start
        assert plain in captions and plain not in heldout, plain


def test_shipped_lists_agree(names, captions, reference):
    assert reference['features'].shape == (3788, 768)
    assert reference['captions'].tolist() == captions
    assert reference['plain'].tolist() == [emoji_data.is_plain(text) for text, _, _ in names]
    fixed = (LISTS / 'emoji_eval.txt').read_text().splitlines()
    assert len(set(fixed)) == 200
    assert set(fixed) <= set(reference['captions'][reference['plain']])


@needs_font
def test_build(names, reference):
    chosen = [row for row in names if row[1] in
              ('red apple', 'flag: norway', 'woman astronaut: dark skin tone', 'keycap: 7')]
    unknown = ('\U0001F1E8\U0001F1F6\N{ZERO WIDTH JOINER}\N{RED APPLE}', 'no such thing', 'x')
    font = emoji_data.load_font()
    data, missing = emoji_data.build([*chosen, unknown], font, 64)
    assert missing == ['no such thing'] and len(chosen) == 4
    assert data['images'].shape == (4, 64, 64, 3) and data['images'].dtype == np.uint8
    assert data['plain'].tolist() == [caption != 'woman astronaut: dark skin tone'
                                      for caption in data['captions']]
    rows = [reference['captions'].tolist().index(caption) for caption in data['captions']]
    ranks = retrieval.ranks(retrieval.pool(data['images']), rows, reference['features'])
    assert ranks.tolist() == [0, 0, 0, 0]
    apple = data['images'][data['captions'].tolist().index('red apple')]
    assert (apple[0, 0] == 255).all()
    assert apple[40, 32, 0] > 150 > 80 > apple[40, 32, 2]  # the middle is red
    large = emoji_data.render(font, '\N{RED APPLE}', 128)
    means = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(means - apple).max() <= 1  # 64 pixels are means of the font's own 128


def test_missing_font():
    with pytest.raises(FileNotFoundError, match='apt-get install fonts-noto-color-emoji'):
        emoji_data.load_font('/no/such/font.ttf')


def test_wrong_font(tmp_path):
    path = tmp_path / 'font.ttf'
    path.write_bytes(b'no font')
    with pytest.raises(ValueError, match='expected the bitmap .CBDT. form of Noto Color Emoji'):
        emoji_data.load_font(path)


def test_learn_merges_by_hand():
    # 'ab' is in every word, so it goes first; 'abab' ends in it, 'abc' does not.
    assert emoji_data.learn_merges(['abc abc abab']) == [
        ('a', 'b'), ('ab', 'c</w>'), ('a', 'b</w>'), ('ab', 'ab</w>')]


def test_tokenizer_ids():
    """The ids have no gap, the bytes come first as in CLIP, start and end are last."""
    vocab = json.loads((TOKENIZER / 'vocab.json').read_text(encoding='utf-8'))
    tokens = sorted(vocab, key=vocab.get)
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert tokens[:2] == ['!', '"'] and tokens[256:258] == ['!</w>', '"</w>']
    assert tokens[-2:] == ['<|startoftext|>', '<|endoftext|>']


def test_write_tokenizer(captions, tmp_path):
    from transformers import CLIPTokenizer
    some = captions[:40]
    size = emoji_data.write_tokenizer(tmp_path, some)
    for path in TOKENIZER.iterdir():
        if 'config' in path.name or 'special' in path.name:
            assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    words = {word for caption in some for word in emoji_data.WORDS.findall(caption)}
    assert all(len(tokenizer(word)['input_ids']) == 3 for word in words)
    assert tokenizer('face')['input_ids'][::2] == [size - 2, size - 1]


def test_one_token_a_word(captions, tokenizer):
    """Every caption is start, one token for each of its words, end; and it reads back."""
    ids = tokenizer(captions)['input_ids']
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    for caption, row in zip(captions, ids):
        words = emoji_data.WORDS.findall(caption)
        assert [start, *row[1:-1], end] == row
        assert tokenizer.convert_ids_to_tokens(row[1:-1]) == [word + '</w>' for word in words]
        assert tokenizer.decode(row, skip_special_tokens=True) == ' '.join(words)
    assert max(map(len, ids)) == 21 <= tokenizer.model_max_length


@pytest.mark.parametrize('text', ['naïve', '日本語', '🍎', 'ÜBER', '_-_', '\x01\x7f'])
def test_any_text_has_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)['input_ids'], skip_special_tokens=True) == text.lower()


def test_padding(tokenizer):
    row = tokenizer('red apple', padding='max_length')['input_ids']
    assert len(row) == tokenizer.model_max_length and set(row[3:]) == {len(tokenizer) - 1}


def test_pool_is_the_mean_of_cells():
    images = np.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).astype(np.uint8)
    pooled = retrieval.pool(images).reshape(2, 16, 16, 3)
    assert pooled[1, 3, 5, 2] == images[1, 6:8, 10:12, 2].mean()
    with pytest.raises(ValueError, match='40x40: expected multiples of 16'):
        retrieval.pool(np.zeros((1, 40, 40, 3), np.uint8))


def test_ranks_by_hand():
    reference = np.array([[0, 0], [4, 0], [4, 0], [9, 9]], np.uint8)
    found = np.array([[1, 0], [4, 1], [4, 1], [1, 0]], float)
    assert retrieval.ranks(found, [0, 2, 0, 3], reference).tolist() == [0, 0, 2, 3]
    assert retrieval.nearest(found, reference).tolist() == [0, 1, 1, 0]
    assert retrieval.score(np.array([0, 0, 2, 7])) == {'top1': 0.5, 'top5': 0.75, 'n': 4}


def pictures(features):
    """Pictures of 32 pixels whose pooled features are the given ones."""
    return features.reshape(-1, 16, 16, 3).repeat(2, 1).repeat(2, 2)


def test_data_set_finds_itself(reference):
    """A model that drew the data set itself would score 100 %; one a caption off, nothing."""
    rows = {caption: row for row, caption in enumerate(reference['captions'])}
    heldout = reference['captions'][reference['heldout']]
    fixed = (LISTS / 'emoji_eval.txt').read_text().splitlines()

    def draw(captions):
        return pictures(reference['features'][[rows[caption] for caption in captions]])

    for chosen in fixed, heldout:
        result, images = evaluate.measure(draw, chosen, reference)
        assert (result['top1'], result['top5'], result['n']) == (1.0, 1.0, len(chosen))
        assert result['wrong'] == {} and images.shape == (len(chosen), 32, 32, 3)
        assert {r['top1'] for r in result['groups'].values()} == {1.0}
        assert sum(r['n'] for r in result['groups'].values()) == len(chosen)
    shifted, _ = evaluate.measure(lambda some: np.roll(draw(some), 1, 0), fixed, reference)
    assert shifted['top1'] == 0 and len(shifted['wrong']) == 200
    assert shifted['groups']['Flags']['top1'] == 0 and shifted['groups']['Flags']['n'] == 23
    assert "Flags" in evaluate.table({'plain': shifted}, {})
    with pytest.raises(ValueError, match=r"no emoji of the reference: \['a red apple'\]"):
        evaluate.measure(draw, ['a red apple'], reference)


def test_contact_sheet():
    images = np.full((10, 64, 64, 3), 200, np.uint8)
    sheet = evaluate.contact_sheet(images, ['thing'] * 10, columns=4)
    width, height = 128 + 16, 128 + 45 + 16
    assert sheet.shape == (3 * height, 4 * width, 3)
    assert (sheet[8:136, 8:136] == 200).all() and (sheet[-100:, -200:] == 255).all()
    assert sheet[136:151, 8:136].min() < 100  # the caption, in black below
    assert evaluate.wrap('one two three', 7, len) == ['one two', 'three']


def test_a_controlnets_data_has_edges_and_hides_what_is_held_out():
    images = np.full((6, 64, 64, 3), 255, np.uint8)
    for i, image in enumerate(images):
        image[8 + i:56 - i, 8:56] = 40
    data = {'images': images, 'plain': np.arange(6) % 2 == 0, 'heldout': np.arange(6) == 5,
            'captions': np.array(['cat', 'cat: dark', 'dog', 'dog: dark', 'catfish', 'dogfish'])}
    found = emoji_data.with_edges(data, ['cat'])
    assert found['images'].shape == found['hints'].shape == (18, 64, 64, 3)
    assert found['captions'].tolist() == data['captions'].tolist() * 3
    # The unseen caption and its tones are hidden, a longer word is not; the glyph itself comes
    # four times as often as each of its smaller copies.
    assert found['heldout'].tolist() == [True, True, False, False, False, True] * 3
    assert found['repeats'].tolist() == [4] * 6 + [1] * 12
    for image, drawn in zip(found['images'], found['hints']):
        dark = np.argwhere(image[..., 0] < 150)
        for line in np.argwhere(drawn[..., 0]):  # every edge lies at the border of the square
            assert np.abs(dark - line).max(1).min() <= 1
        assert set(np.unique(drawn)) == {0, 255} and (image[0] == 255).all()
    assert (np.count_nonzero(found['images'][6:, ..., 0] < 150, (1, 2))
            < np.count_nonzero(np.tile(images, (2, 1, 1, 1))[..., 0] < 150, (1, 2))).all()
