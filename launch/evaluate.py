"""Measures the emoji model: does a caption bring its picture, and how sharp is the VAE?

    python -m launch.evaluate --config=configs/emoji.py --grid=docs/emoji_grid.png

Each caption is drawn once, all with one seed, and looked up among all emoji (launch/retrieval.py).
Reported are the rates at which the right emoji is the nearest and among the five nearest: for plain
captions with the recipe's guidance and with guidance 1, and for the skin tones that training never
saw; for plain captions beside a sketch of 16x16 pixels (image to image, strength 0.6), and beside
the left half of the picture (inpainting); and the PSNR of the VAE over the whole data set. The last
two need that to have been built. --plain measures the first row alone, and the seconds per picture:

    python -m launch.evaluate --plain --lora=runs/emoji_lcm/lcm.safetensors \
        --config.sampler=lcm --config.steps=4 --config.guidance=1
"""

import json
import pathlib
import time

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from PIL import Image, ImageDraw, ImageFont

import jaxsd
from jaxsd import recipe
from jaxsd.models import vae
from jaxsd.run import picture
from jaxsd.run.resolving import suit

from . import emoji_sets, plain_errors, retrieval

FLAGS = flags.FLAGS
HERE = pathlib.Path(__file__).resolve().parent.parent
CELL = 128  # pixels per picture on the contact sheet


def drawer(model, config, seed, batch, images=None, named=True, **fields):
    """A function from captions to pictures uint8 [N,H,W,3], drawn by the recipe's settings.

    images: {caption: uint8 [H,W,3]}, what each picture starts from; named: whether the caption is
    the prompt, too; fields: of every Request.
    """
    asked = jaxsd.Request(**{'seed': seed, 'weighting': 'plain', **recipe.fields(config)})

    def draw(captions):
        drawn = []
        for start in range(0, len(captions), batch):
            part = list(captions[start:start + batch])
            padded = part + part[:1] * (batch - len(part))  # one batch size: one compilation
            requests = [asked.replace(prompt=str(text) * named, **fields,
                                      image=images and images[str(text)]) for text in padded]
            drawn.append(np.asarray(jaxsd.generate(model, requests))[:len(part)])
            logging.info('%s: %d of %d pictures', sorted(fields) or 'as the recipe says',
                         start + len(part), len(captions))
        return np.concatenate(drawn)

    return draw


def measure(draw, captions, reference):
    """Draw captions and score the pictures: -> (scores and confusions, pictures uint8 [N,H,W,3]).

    draw: captions -> pictures; reference: see retrieval.read_reference.
    Raises ValueError for captions that the reference lacks.
    """
    if unknown := sorted(set(map(str, captions)) - set(reference['captions'].tolist())):
        raise ValueError(f'captions that are no emoji of the reference: {unknown}')
    images = draw(captions)
    return judge(images, captions, reference), images


def judge(images, captions, reference, cells=slice(None)):
    """Score pictures uint8 [N,H,W,3] against their captions; cells: the features that count.
    distance: from the right emoji, root mean square of the features' differences, of 255."""
    rows = {caption: row for row, caption in enumerate(reference['captions'])}
    targets = np.array([rows[caption] for caption in captions])
    features, known = retrieval.pool(images)[:, cells], reference['features'][:, cells]
    rank = retrieval.ranks(features, targets, known)
    found = reference['captions'][retrieval.nearest(features, known)]
    wrong = {str(captions[i]): str(found[i]) for i in np.flatnonzero(rank)}
    distance = np.sqrt(np.mean(np.square(features - known[targets])))
    return {**retrieval.score(rank), 'distance': float(distance), 'wrong': wrong}


def psnr(model, images, batch):
    """Mean PSNR in dB of the VAE's reconstructions of uint8 [N,S,S,3], each latent its mean."""
    @jax.jit
    def errors(params, x):
        x = x.astype('float32') / 127.5 - 1  # [B,S,S,3] in [-1,1]
        mean, _ = vae.encode(params, model.config.vae, x)
        y = vae.decode(params, model.config.vae, mean).astype('float32')
        return ((y.clip(-1, 1) - x) ** 2).mean((1, 2, 3)) / 4  # [B], of a range of 1

    mse = []
    for start in range(0, len(images), batch):
        part = images[start:start + batch]
        padded = np.pad(part, ((0, batch - len(part)), (0, 0), (0, 0), (0, 0)))
        mse.append(np.asarray(errors(model.params['vae'], padded))[:len(part)])
    return float(np.mean(-10 * np.log10(np.concatenate(mse) + 1e-10)))


def contact_sheet(images, captions, columns=8):
    """Pictures uint8 [N,S,S,3] with their captions below, as one picture uint8 [H,W,3]."""
    font, line, gap = ImageFont.load_default(12), 15, 8
    width, height = CELL + 2 * gap, CELL + 3 * line + 2 * gap
    rows = -(-len(images) // columns)
    sheet = Image.new('RGB', (columns * width, rows * height), 'white')
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * width + gap, i // columns * height + gap
        sheet.paste(Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
        for n, text in enumerate(wrap(caption, CELL, font.getlength)[:3]):
            left = x + (CELL - font.getlength(text)) / 2
            pen.text((left, y + CELL + n * line), text, fill='black', font=font)
    return np.asarray(sheet)


def wrap(text, width, length):
    """Break a text between words into lines whose `length(line)` is at most `width`."""
    lines = ['']
    for word in text.split():
        longer = f'{lines[-1]} {word}'.strip()
        if lines[-1] and length(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def table(results, vae_psnr):
    """The results as lines of text."""
    lines = [f'{"":38} {"captions":>8} {"nearest":>8} {"in top 5":>8} {"distance":>8}']
    lines += [f'{name:38} {r["n"]:8d} {r["top1"]:8.1%} {r["top5"]:8.1%} {r["distance"]:8.1f}'
              for name, r in results.items()]
    if vae_psnr is not None:
        lines.append(f'{"VAE alone, mean PSNR":38} {vae_psnr:.2f} dB')
    return '\n'.join(lines)


def run():
    config, lists = FLAGS.config, pathlib.Path(FLAGS.lists)
    for path in filter(None, (FLAGS.out, FLAGS.grid)):
        picture.check_folder(pathlib.Path(path).parent)
    reference = retrieval.read_reference(lists / 'emoji_reference.npz')
    if FLAGS.ink:
        colours = reference['features'].reshape(-1, 3)
        reference['features'] = emoji_sets.ink(colours).reshape(reference['features'].shape)
    fixed = (lists / 'emoji_eval.txt').read_text().splitlines()
    plain = fixed if FLAGS.captions == 'fixed' else reference['captions'][reference['plain']]
    model, _, _ = recipe.load(config, FLAGS.checkpoint)
    config.guidance = suit(recipe.fields(config), model.config)['guidance']
    if FLAGS.lora:
        model = jaxsd.merge(model, {jaxsd.load_adapter(FLAGS.lora, model): 1.0})

    def scored(captions, **how):
        return measure(drawer(model, config, FLAGS.seed, FLAGS.batch, **how), captions, reference)

    results = {}
    results[f'plain, guidance {config.guidance:g}'], images = scored(plain)
    if FLAGS.grid:
        picture.write_png(FLAGS.grid, contact_sheet(images[:64], plain[:64]))
    more = cost(model, plain) if FLAGS.plain else conditioned(
        model, plain, reference, scored, results)
    print(table(results, more.get('vae_psnr')))
    report = {'config': config.to_dict(), 'seed': FLAGS.seed, **more, **results}
    pathlib.Path(FLAGS.out).write_text(json.dumps(report, indent=2) + '\n')


def cost(model, plain):
    """Print and return the seconds of a picture, once all is compiled."""
    draw, start = drawer(model, FLAGS.config, FLAGS.seed, FLAGS.batch), time.perf_counter()
    draw(plain[:FLAGS.batch])
    seconds = (time.perf_counter() - start) / FLAGS.batch
    print(f'seconds per picture, {FLAGS.batch} at a time: {seconds:.3f}')
    return {'seconds per picture': seconds}


def conditioned(model, plain, reference, scored, results):
    """All other rows, into `results` -> {'vae_psnr': that, or None}."""
    config = FLAGS.config
    results['plain, guidance 1'], _ = scored(plain, guidance=1.0)
    results[f'held out, guidance {config.guidance:g}'], _ = scored(
        reference['captions'][reference['heldout']])
    sketches = {str(text): retrieval.sketch(feature, config.width) for text, feature
                in zip(reference['captions'], reference['features'])}
    results['plain, from a 16x16 sketch, strength 0.6'], _ = scored(plain, images=sketches,
                                                                    strength=0.6)
    data = pathlib.Path(FLAGS.data or f'data/emoji{config.width}.npz')
    if not data.exists():
        logging.warning('%s: no such file, so no inpainting and no PSNR; `python -m '
                        'launch.emoji_data --size=%d` builds it', data, config.width)
        return {'vae_psnr': None}
    with np.load(data) as file:
        whole = dict(zip(file['captions'].tolist(), file['images']))
    right = np.zeros((config.height, config.width), bool)
    right[:, config.width // 2:] = True
    for name, named in ('plain, right half inpainted', True), ('  without its name', False):
        results[name], halves = scored(plain, images=whole, named=named, mask=right)
        results[name + ', scored alone'] = judge(halves, plain, reference, retrieval.right_half())
    return {'vae_psnr': psnr(model, np.stack(list(whole.values())), FLAGS.batch)}


def define_flags():
    """In a function, so that one process can import several mains."""
    config_flags.DEFINE_config_file('config', str(HERE / 'configs' / 'emoji.py'))
    flags.DEFINE_string('checkpoint', None, 'Measure this model, not the recipe\'s.')
    flags.DEFINE_string('lora', None, 'The file of a LoRA that the model draws with.')
    flags.DEFINE_boolean('plain', False, 'Only the first row, and the seconds per picture.')
    flags.DEFINE_boolean('ink', False, 'Look the pictures up among all emoji in ink, see '
                         'launch.emoji_sets.')
    flags.DEFINE_enum('captions', 'fixed', ['fixed', 'all'],
                      'The 200 fixed plain captions, or all plain ones.')
    flags.DEFINE_string('lists', str(HERE / 'tests' / 'data'),
                        'The folder of emoji_eval.txt and emoji_reference.npz.')
    flags.DEFINE_string('data', None, 'The data set, for the VAE; data/emoji<width>.npz by '
                        'default, and no VAE measurement where that is missing.')
    flags.DEFINE_integer('seed', 0, 'The seed of every picture.')
    flags.DEFINE_integer('batch', 50, 'Pictures drawn at a time.', lower_bound=1)
    flags.DEFINE_string('out', 'outputs/emoji_eval.json', 'The file of results.')
    flags.DEFINE_string('grid', None, 'Also write the first 64 pictures with their captions.')


if __name__ == '__main__':
    define_flags()
    app.run(plain_errors(run))
