"""Builds the emoji data set and its tokenizer: every Noto Color Emoji glyph with its CLDR name.

    python -m launch.emoji_data --size=64 --out=data/emoji64.npz

The .npz holds, for N emoji in CLDR order:
    images      uint8 [N,S,S,3], the glyph on white
    captions    str   [N], the CLDR short name in lower-case ASCII, unique
    codepoints  str   [N], e.g. '1F44B 1F3FB'
    groups      str   [N], e.g. 'Food & Drink'
    plain       bool  [N], True where the emoji carries no skin tone
    heldout     bool  [N], True where training must not see it: 5 % of those that carry a skin tone;
                the same person without the tone, and the tone on other persons, stay in
and with --edges, for a ControlNet:
    hints       uint8 [N,S,S,3], Canny edges
    repeats     int   [N], how often each comes in an epoch

The same input files give the same bytes. Nothing is downloaded.
"""

import collections
import hashlib
import json
import pathlib
import re
import unicodedata

import numpy as np
from absl import app, flags, logging
from PIL import Image, ImageDraw, ImageFont, features

from jaxsd.images.preprocess import canny

from . import plain_errors, retrieval

FLAGS = flags.FLAGS
HERE = pathlib.Path(__file__).parent
FONT = '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf'
NAMES = HERE / 'emoji_names.txt'
STRIKE = 109  # the one size of a CBDT font: its bitmaps are 136 wide and 128 high
MARGIN, GLYPH = 4, 128  # every bitmap of the font leaves 4 columns free on either side
PROBE = '\N{GRINNING FACE}'  # an emoji that every version of the font has
ROW = re.compile(r'([0-9A-F ]+?) *; fully-qualified +# \S+ E[0-9.]+ (.+)')
TONES = {chr(c) for c in range(0x1F3FB, 0x1F400)}
# CLIP's own pattern: contractions, runs of letters, single digits, runs of anything else.
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
START, END = '<|startoftext|>', '<|endoftext|>'
MAX_LENGTH = 24  # the longest caption takes 21 tokens with start and end
THRESHOLDS = 50, 150  # of Canny, for hints: they keep the outline of white glyphs


def read_names(path=NAMES):
    """Every fully-qualified emoji of a file in emoji-test.txt's format.

    Returns a list of (text, caption, group), e.g. ('\\U0001f34e', 'red apple', 'Food & Drink').
    Raises ValueError where two emoji would have one caption. Source: UTS #51.
    """
    rows, group = [], ''
    for line in pathlib.Path(path).read_text(encoding='utf-8').splitlines():
        if line.startswith('# group: '):
            group = line.removeprefix('# group: ')
        elif match := ROW.match(line):
            text = ''.join(chr(int(code, 16)) for code in match[1].split())
            rows.append((text, plain_ascii(match[2]), group))
    if not rows:
        raise ValueError(f'{path}: no fully-qualified emoji found; '
                         'expected the format of Unicode\'s emoji-test.txt')
    counts = collections.Counter(caption for _, caption, _ in rows)
    if twice := [caption for caption, count in counts.items() if count > 1]:
        raise ValueError(f'{path}: captions must be unique, found twice: {twice}')
    return rows


def plain_ascii(name):
    """A name as people type it: lower case, straight quotes, no accents."""
    name = name.lower().translate(str.maketrans('‘’“”', '\'\'""'))
    return unicodedata.normalize('NFKD', name).encode('ascii', 'ignore').decode()


def rank(salt, caption):
    """A hash that depends on the caption alone: lists sorted by it survive new emoji."""
    return hashlib.sha256(f'{salt}:{caption}'.encode()).hexdigest()


def is_plain(text):
    """Whether an emoji carries no skin-tone modifier."""
    return not TONES & set(text)


def held_out(names):
    """The captions that training must not see: a fixed 5 % of the emoji that carry a skin tone."""
    toned = [caption for text, caption, _ in names if not is_plain(text)]
    return set(sorted(toned, key=lambda caption: rank('heldout', caption))[:round(len(toned) / 20)])


def load_font(path=FONT):
    """The font, ready to shape ligatures (flags, families, skin tones)."""
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(
            f'{path}: no such font. On Debian or Ubuntu: apt-get install fonts-noto-color-emoji; '
            'elsewhere give NotoColorEmoji.ttf with --font.')
    if not features.check('raqm'):
        raise ValueError('this Pillow was built without Raqm, which joins flags and skin tones; '
                         'install the wheel from PyPI: pip install --force-reinstall pillow')
    try:
        font = ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
        found = font.getbbox(PROBE)
    except OSError as error:
        found = error
    if found != (0, 0, GLYPH + 2 * MARGIN, GLYPH):
        raise ValueError(f'{path}: expected the bitmap (CBDT) form of Noto Color Emoji, with '
                         f'pictures of {GLYPH + 2 * MARGIN}x{GLYPH} pixels, found {found}')
    return font


def render(font, text, size):
    """One emoji on white, uint8 [size,size,3]; None where the font has no glyph for it.

    A sequence that the font does not know comes out as several glyphs, hence wider than one.
    """
    if font.getlength(text) != font.getlength(PROBE):
        return None
    glyph = Image.new('RGBA', (GLYPH, GLYPH), (255, 255, 255, 0))
    ImageDraw.Draw(glyph).text((-MARGIN, 0), text, font=font, embedded_color=True)
    if glyph.getchannel('A').getbbox() is None:
        return None
    image = Image.new('RGBA', glyph.size, 'white')
    image.alpha_composite(glyph)
    exact = GLYPH % size == 0  # then the mean of whole blocks is the sharpest without ringing
    method = Image.Resampling.BOX if exact else Image.Resampling.LANCZOS
    return np.asarray(image.convert('RGB').resize((size, size), method))


def build(names, font, size):
    """The data set as a dict of arrays, see the top of this file, and the captions left out."""
    heldout, rows, missing = held_out(names), [], []
    for text, caption, group in names:
        image = render(font, text, size)
        if image is None:
            missing.append(caption)
            continue
        codepoints = ' '.join(f'{ord(c):04X}' for c in text)
        rows.append((image, caption, codepoints, group, is_plain(text), caption in heldout))
    keys = ('images', 'captions', 'codepoints', 'groups', 'plain', 'heldout')
    return {key: np.array(column) for key, column in zip(keys, zip(*rows))}, missing


def learn_merges(captions):
    """Byte pair encoding that ends with one token for every word of the captions.

    captions: ASCII strings in lower case. Returns the merges, most frequent pair first; the last
    symbol of a word carries '</w>'. Equal counts go by alphabet, so the result is reproducible.
    Source: Sennrich et al. 2016, algorithm 1.
    """
    counts = collections.Counter(word for text in captions for word in WORDS.findall(text))
    words = {(*word[:-1], word[-1] + '</w>'): count for word, count in counts.items()}
    merges = []
    while words := {symbols: count for symbols, count in words.items() if len(symbols) > 1}:
        pairs = collections.Counter()
        for symbols, count in words.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {merge(symbols, best): count for symbols, count in words.items()}
    return merges


def merge(symbols, pair):
    """`symbols` with every adjacent `pair` joined, from left to right."""
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return tuple(joined)


def byte_symbols():
    """One printable character for each of the 256 bytes, in CLIP's order (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def write_tokenizer(folder, captions):
    """Write a tokenizer for the captions in CLIPTokenizer's files.

    As in CLIP the ids are: 256 bytes, 256 bytes that end a word, one per merge, start, end.
    """
    merges = learn_merges(captions)
    symbols = byte_symbols()
    vocab = [*symbols, *(s + '</w>' for s in symbols), *map(''.join, merges), START, END]
    special = {'bos_token': START, 'eos_token': END, 'unk_token': END, 'pad_token': END}
    config = {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': MAX_LENGTH,
              'do_lower_case': True, 'add_prefix_space': False, 'errors': 'replace', **special}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    lines = ['#version: 0.2', *(' '.join(pair) for pair in merges)]
    files = {'vocab.json': json.dumps(ids, ensure_ascii=False),
             'merges.txt': '\n'.join(lines) + '\n',
             'tokenizer_config.json': json.dumps(config, indent=2) + '\n',
             'special_tokens_map.json': json.dumps(special, indent=2) + '\n'}
    for name, text in files.items():
        (folder / name).write_text(text, encoding='utf-8')
    return len(ids)


def write_reference(folder, data):
    """Write what an evaluation without the font needs: pooled features and the lists of captions.

    emoji_eval.txt: 200 plain captions; emoji_heldout.txt: those that training must not see.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    features = np.round(retrieval.pool(data['images'])).astype(np.uint8)
    kept = {key: data[key] for key in ('captions', 'plain', 'heldout')}
    np.savez_compressed(folder / 'emoji_reference.npz', features=features, **kept)
    chosen = sorted(data['captions'][data['plain']], key=lambda text: rank('eval', text))[:200]
    for name, captions in ('eval', chosen), ('heldout', data['captions'][data['heldout']]):
        (folder / f'emoji_{name}.txt').write_text('\n'.join(captions) + '\n')


def smaller(images, seed):
    """Each picture [N,H,W,3] uint8 at 60 to 95 % of its size, somewhere on white."""
    rng = np.random.default_rng(seed)
    out = np.full_like(images, 255)
    for sheet, image in zip(out, images):
        size = round(len(image) * rng.uniform(0.6, 0.95))
        y, x = rng.integers(0, len(image) - size + 1, 2)
        sheet[y:y + size, x:x + size] = Image.fromarray(image).resize(
            (size, size), Image.Resampling.LANCZOS)
    return out


def with_edges(data, unseen, copies=2):
    """The data set of a ControlNet for edges: `data`, smaller copies of each picture, and hints.

    unseen: captions that are held out, with their skin tones, beside those that are already.
    A picture itself comes four times as often as each of its copies.
    """
    captions = data['captions'].tolist()
    tones = tuple(f'{caption}: ' for caption in unseen)  # of the same glyph: nearly its edges
    hidden = [text in unseen or text.startswith(tones) for text in captions]
    data = data | {'heldout': data['heldout'] | hidden}
    images = np.concatenate([data['images'], *(smaller(data['images'], i) for i in range(copies))])
    again = {key: np.concatenate([column] * (1 + copies)) for key, column in data.items()}
    return again | {
        'images': images, 'hints': np.stack([canny(image, *THRESHOLDS) for image in images]),
        'repeats': np.repeat([4, 1], [len(captions), copies * len(captions)])}


def run():
    names = read_names(FLAGS.captions)
    if FLAGS.tokenizer:
        size = write_tokenizer(FLAGS.tokenizer, [caption for _, caption, _ in names])
        logging.info('%s: %d tokens', FLAGS.tokenizer, size)
    data, missing = build(names, load_font(FLAGS.font), FLAGS.size)
    if FLAGS.edges:
        data = with_edges(data, pathlib.Path(FLAGS.edges).read_text().splitlines())
    name = f'emoji{"_edges" if FLAGS.edges else ""}{FLAGS.size}.npz'
    out = pathlib.Path(FLAGS.out or f'data/{name}')
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix('.partial.npz')
    np.savez_compressed(partial, **data)
    partial.replace(out)  # there whole or not at all
    if FLAGS.reference:
        write_reference(FLAGS.reference, data)
    if missing:
        logging.warning('the font lacks %d emoji: %s', len(missing), ', '.join(missing))
    logging.info('%s: %d emoji of %d pixels, %d plain, %d held out', out, len(data['images']),
                 FLAGS.size, data['plain'].sum(), data['heldout'].sum())


def define_flags():
    """In a function, so that one process can import several mains."""
    flags.DEFINE_integer('size', 64, 'Height and width of the pictures in pixels.',
                         lower_bound=8)
    flags.DEFINE_string('out', None, 'The .npz to write; data/emoji<size>.npz by default.')
    flags.DEFINE_string('font', FONT, 'The Noto Color Emoji font, in its bitmap (CBDT) form.')
    flags.DEFINE_string(
        'captions', str(NAMES), 'Emoji and their names: the shipped list, or any emoji-test.txt.')
    flags.DEFINE_string('tokenizer', None, 'Also train the tokenizer into this folder.')
    flags.DEFINE_string(
        'edges', None, "A ControlNet's data, with edges as hints and smaller copies; the captions "
        'in this file are held out: tests/data/emoji_eval.txt.')
    flags.DEFINE_string(
        'reference', None, 'Also write what launch.evaluate reads into this folder: pooled '
        'features and the fixed lists of captions.')


if __name__ == '__main__':
    define_flags()
    app.run(plain_errors(run))
