"""Measures the emoji model: does a caption bring its picture, and how sharp is the VAE?

    python -m launch.evaluate --config=configs/emoji.py --grid=docs/emoji_grid.png

Each caption is drawn once, all with one seed, and looked up among all emoji (launch/retrieval.py).
Reported are the rates at which the right emoji is the nearest and among the five nearest: for plain
captions with the recipe's guidance, also by Unicode's groups, and with guidance 1, and for the skin
tones that training never saw; for plain captions beside a sketch of 16x16 pixels (image to image,
strength 0.6), and beside the left half of the picture (inpainting); the PSNR of the VAE over the
whole data set; and the errors of the U-Net's predictions at five noise levels. The last three need
that to have been built. --plain measures the first row alone, and the seconds per picture:

    python -m launch.evaluate --plain --lora=runs/emoji_lcm/lcm.safetensors \
        --config.sampler=lcm --config.steps=4 --config.guidance=1
"""

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from PIL import Image, ImageDraw, ImageFont

import jaxsd
from jaxsd import recipe, sampling
from jaxsd.models import vae
from jaxsd.prompt import blocks
from jaxsd.run import picture
from jaxsd.run.resolving import suit
from jaxsd.train import losses

from . import emoji_data, emoji_sets, plain_errors, retrieval

FLAGS = flags.FLAGS
HERE = pathlib.Path(__file__).resolve().parent.parent
CELL = 128  # pixels per picture on the contact sheet
# What is drawn with a ControlNet of edges: the prompt, the control's scale, guidance.
EDGES = (('own caption', 0, 2), ('own caption', 1, 2), ('own caption', 1, 4), ('no caption', 0, 1),
         ('no caption', 1, 1), ('no caption', 1.5, 1), ("another's", 0, 2), ("another's", 1, 2),
         ("another's", 2, 2), ("another's", 1.5, 1))
COLUMNS = (('captions', 'n', '8d'), ('nearest', 'top1', '8.1%'), ('in top 5', 'top5', '8.1%'),
           ('distance', 'distance', '8.1f'), ('found', 'found', '8.2f'), ('drawn', 'drawn', '8.2f'))
SIGMAS = 0.1, 0.5, 1.5, 5.0, 14.0  # noise levels at which the prediction is measured


def drawer(model, config, seed, batch, given=None, **fields):
    """A function from captions to pictures uint8 [N,H,W,3], drawn by the recipe's settings.

    given: {field of Request: {caption: its value}}; fields: the same for all captions. The prompt
    is the caption unless one of them says another.
    """
    asked = jaxsd.Request(**{'seed': seed, 'weighting': 'plain', **recipe.fields(config)})
    given = given or {}

    def draw(captions):
        drawn = []
        for start in range(0, len(captions), batch):
            part = [str(text) for text in captions[start:start + batch]]
            padded = part + part[:1] * (batch - len(part))  # one batch size: one compilation
            requests = [asked.replace(**{'prompt': text, **fields, **{
                field: values[text] for field, values in given.items()}}) for text in padded]
            drawn.append(np.asarray(jaxsd.generate(model, requests))[:len(part)])
            logging.info('%s: %d of %d pictures', sorted({*given, *fields}) or 'as the recipe says',
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

    def scored(some):
        distance = np.sqrt(np.mean(np.square(features[some] - known[targets[some]])))
        return {**retrieval.score(rank[some]), 'distance': float(distance)}

    kinds = groups(captions)
    return {**scored(slice(None)), 'wrong': wrong,
            'groups': {str(kind): scored(kinds == kind) for kind in np.unique(kinds)}}


def groups(captions):
    """Unicode's group of each caption, str [N]."""
    known = {caption: group for _, caption, group in emoji_data.read_names()}
    return np.array([known.get(str(caption), '') for caption in captions])


def in_batches(function, size, *arrays):
    """function of arrays [size,...] -> [size,...], for [N,...]: the last ones are filled up."""
    found = []
    for start in range(0, len(arrays[0]), size):
        rows = np.arange(start, start + size) % len(arrays[0])
        found.append(np.asarray(function(*(a[rows] for a in arrays))))
    return np.concatenate(found)[:len(arrays[0])]


def psnr(model, images, batch):
    """Mean PSNR in dB of the VAE's reconstructions of uint8 [N,S,S,3], each latent its mean."""
    @jax.jit
    def errors(params, image):
        x = vae.unit(image)  # [B,S,S,3] in [-1,1]
        mean, _ = vae.encode(params, model.config.vae, x)
        y = vae.decode(params, model.config.vae, mean).astype('float32')
        return ((y.clip(-1, 1) - x) ** 2).mean((1, 2, 3)) / 4  # [B], of a range of 1

    mse = in_batches(functools.partial(errors, model.params['vae']), batch, images)
    return float(np.mean(-10 * np.log10(mse + 1e-10)))


def prediction_errors(model, images, captions, batch):
    """Squared errors of the clean latents that the U-Net predicts from noisy ones and the caption.

    images: uint8 [N,S,S,3] -> float [N,len(SIGMAS)], a mean over each picture's latents; these have
    a variance of 1. Each picture is seen with the same noise at all noise levels.
    """
    config = model.config

    @jax.jit
    def errors(params, sigma, image, tokens, noise):
        mean, _ = vae.encode(params['vae'], config.vae, vae.unit(image))
        x0 = vae.scale(config.vae, mean)
        text = losses.encode_text(params, config, {'tokens': {'text_encoder': tokens}})
        denoise = sampling.denoiser(
            lambda x, t, i: losses.predict(params, config, {}, x, t, text), config.schedule)
        return jnp.square(denoise(x0 + sigma * noise, sigma) - x0).mean((1, 2, 3))

    tokens = blocks.captions(model.tokenizers, list(map(str, captions)), 1)['text_encoder']
    size = images.shape[1] // config.vae.factor
    noise = np.random.default_rng(0).standard_normal(
        (len(images), size, size, config.vae.latent_channels), np.float32)
    return np.stack([in_batches(functools.partial(errors, model.params, sigma), batch, images,
                                tokens, noise) for sigma in SIGMAS], 1)


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


def table(results, more):
    """The results as lines of text."""
    lines = []
    if results:
        first = next(iter(results.values()))
        columns = [column for column in COLUMNS if column[1] in first]
        rows = {'': {}, **results, **{f'  {kind}': r for kind, r in first['groups'].items()}}
        lines = [f'{name:38}' + ''.join(
            f' {r[key]:{form}}' if key in r else f' {title if not r else "":>8}'
            for title, key, form in columns) for name, r in rows.items()]
    if 'vae_psnr' in more:
        lines.append(f'{"VAE alone, mean PSNR":38} {more["vae_psnr"]:.2f} dB')
        lines.append(f'{"errors of the predicted latents, sigma":38} '
                     + ' '.join(f'{sigma:8g}' for sigma in SIGMAS))
        lines += [f'{name:38} ' + ' '.join(f'{e:8.3f}' for e in errors)
                  for name, errors in more['prediction_errors'].items()]
    return '\n'.join(lines)


def run():
    config, lists = FLAGS.config, pathlib.Path(FLAGS.lists)
    for path in filter(None, (FLAGS.out, FLAGS.grid)):
        picture.check_folder(pathlib.Path(path).parent)
    if FLAGS.grid and (FLAGS.errors or FLAGS.edges):
        raise ValueError('--grid: expected neither --errors nor --edges, which draw other pictures')
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

    def scored(captions, model=model, **how):
        return measure(drawer(model, config, FLAGS.seed, FLAGS.batch, **how), captions, reference)

    whole = None if FLAGS.plain else data_set(config.width)
    heldout = reference['captions'][reference['heldout']]
    results, more = {}, {}
    if FLAGS.edges:
        results = kept_edges(jaxsd.load_controlnet(FLAGS.edges), model, plain[:100], whole, scored)
    elif not FLAGS.errors:
        results[f'plain, guidance {config.guidance:g}'], images = scored(plain)
        if FLAGS.grid:
            picture.write_png(FLAGS.grid, contact_sheet(images[:64], plain[:64]))
        if FLAGS.plain:
            more = cost(model, plain)
        else:
            conditioned(plain, heldout, reference, whole, scored, results)
    if whole and not FLAGS.edges:
        more = networks(model, whole, plain, heldout)
    print(table(results, more))
    report = {'config': config.to_dict(), 'seed': FLAGS.seed, **more, **results}
    pathlib.Path(FLAGS.out).write_text(json.dumps(report, indent=2) + '\n')


def cost(model, plain):
    """Print and return the seconds of a picture, once all is compiled."""
    draw, start = drawer(model, FLAGS.config, FLAGS.seed, FLAGS.batch), time.perf_counter()
    draw(plain[:FLAGS.batch])
    seconds = (time.perf_counter() - start) / FLAGS.batch
    print(f'seconds per picture, {FLAGS.batch} at a time: {seconds:.3f}')
    return {'seconds per picture': seconds}


def data_set(width):
    """-> {caption: picture}, or None and a warning where there is no data set."""
    data = pathlib.Path(FLAGS.data or f'data/emoji{width}.npz')
    if not data.exists():
        if FLAGS.errors or FLAGS.edges:
            raise FileNotFoundError(f'{data}: no such file. Build the data set first: '
                                    f'python -m launch.emoji_data --size={width}')
        logging.warning('%s: no such file, so no inpainting and no PSNR; `python -m '
                        'launch.emoji_data --size=%d` builds it', data, width)
        return None
    with np.load(data) as file:
        return dict(zip(file['captions'].tolist(), file['images']))


def conditioned(plain, heldout, reference, whole, scored, results):
    """The rows after the first, into `results`; whole: see `data_set`."""
    config = FLAGS.config
    results['plain, guidance 1'], _ = scored(plain, guidance=1.0)
    results[f'held out, guidance {config.guidance:g}'], _ = scored(heldout)
    sketches = {str(text): retrieval.sketch(feature, config.width) for text, feature
                in zip(reference['captions'], reference['features'])}
    results['plain, from a 16x16 sketch, strength 0.6'], _ = scored(
        plain, given={'image': sketches}, strength=0.6)
    if whole is None:
        return
    right = np.zeros((config.height, config.width), bool)
    right[:, config.width // 2:] = True
    for name, how in ('plain, right half inpainted', {}), ('  without its name', {'prompt': ''}):
        results[name], halves = scored(plain, given={'image': whole}, mask=right, **how)
        results[name + ', scored alone'] = judge(halves, plain, reference, retrieval.right_half())


def kept_edges(controlnet, model, captions, whole, scored):
    """The rows of EDGES -> {name: result}, each with `found` and `drawn` (see `kept`): the part of
    the hint's edges that the picture has, and of the picture's that the hint has.

    whole: see `data_set`.
    """
    model = model.replace(controlnets={'edges': controlnet})
    captions = [str(text) for text in captions]
    hints = {text: jaxsd.images.canny(whole[text], *emoji_data.THRESHOLDS) for text in captions}
    prompts = {'own caption': dict(zip(captions, captions)),
               'no caption': dict.fromkeys(captions, ''),
               "another's": dict(zip(captions, captions[1:] + captions[:1]))}
    asked = np.stack(list(hints.values())).max(-1) > 0
    results = {}
    for prompt, scale, guidance in EDGES:
        controls = {text: (jaxsd.Control('edges', hints[text], scale),) for text in captions}
        result, images = scored(captions, model, guidance=guidance,
                                given={'controls': controls, 'prompt': prompts[prompt]})
        drawn = np.stack([jaxsd.images.canny(image, *emoji_data.THRESHOLDS)
                          for image in images]).max(-1) > 0
        results[f'{prompt}, edges times {scale:g}, guidance {guidance:g}'] = result | {
            'found': kept(asked, drawn), 'drawn': kept(drawn, asked)}
    return results


def kept(edges, others):
    """The part of the edge pixels, bool [N,H,W], with one of the others' in the 5x5 around."""
    padded = np.pad(others, ((0, 0), (2, 2), (2, 2)))
    near = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (1, 2)).any((-1, -2))
    return float((edges & near).sum() / edges.sum())


def networks(model, whole, plain, heldout):
    """What VAE and U-Net do by themselves, without a picture drawn; whole: see `data_set`."""
    errors = {}
    for name, some in ('plain', plain), ('held out', heldout):
        found = prediction_errors(model, np.stack([whole[str(c)] for c in some]), some, FLAGS.batch)
        kinds = groups(some)
        errors[name] = found.mean(0).tolist()
        errors |= {f'  {kind}': found[kinds == kind].mean(0).tolist()
                   for kind in np.unique(kinds) if name == 'plain'}
    return {'vae_psnr': psnr(model, np.stack(list(whole.values())), FLAGS.batch), 'sigmas': SIGMAS,
            'prediction_errors': errors}


def define_flags():
    """In a function, so that one process can import several mains."""
    config_flags.DEFINE_config_file('config', str(HERE / 'configs' / 'emoji.py'))
    flags.DEFINE_string('checkpoint', None, 'Measure this model, not the recipe\'s.')
    flags.DEFINE_string('lora', None, 'The file of a LoRA that the model draws with.')
    flags.DEFINE_boolean('plain', None, 'Only the first row, and the seconds per picture.')
    flags.DEFINE_boolean('errors', None, 'Only what VAE and U-Net do by themselves: PSNR, and the '
                         'errors of the predicted latents.')
    flags.DEFINE_string('edges', None, 'Only how pictures keep to edges, with the ControlNet of '
                        'this folder: of the first 100 captions.')
    flags.mark_flags_as_mutual_exclusive(['plain', 'errors', 'edges'])
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
