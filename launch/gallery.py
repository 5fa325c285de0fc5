"""What the shipped emoji model can be conditioned on, in one picture: `python -m launch.gallery`.

Every row is one batch: what its pictures differ in is data.
"""

import pathlib

import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw

import jaxsd
from jaxsd import Control, Preview, Request, images
from jaxsd.run import picture

from . import plain_errors
from .emoji_data import THRESHOLDS
from .evaluate import contact_sheet

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = flags.FLAGS
COLUMNS = 7
BASE = Request(seed=7)


def drawing():
    """A child's apple: a disc, a stalk and a leaf, uint8 [64,64,3]."""
    sheet = Image.new('RGB', (64, 64), 'white')
    pen = ImageDraw.Draw(sheet)
    pen.ellipse((8, 16, 54, 60), fill=(214, 40, 40))
    pen.line((32, 18, 36, 6), fill=(90, 50, 20), width=4)
    pen.ellipse((38, 4, 56, 14), fill=(70, 150, 60))
    return np.asarray(sheet)


def halves(right=True):
    """A mask of the right half, bool [64,64]."""
    return np.tile(np.arange(64) >= 32, (64, 1)) == right


def image_to_image(model):
    """A drawing at rising strengths."""
    start, strengths = drawing(), (0.0, 0.4, 0.6, 0.8, 1.0)
    made = jaxsd.generate(model, [BASE.replace(prompt='red apple', image=start, strength=s)
                                  for s in strengths]
                          + [BASE.replace(prompt='tangerine', image=start, strength=0.6)])
    return [(start, 'a drawing')] + [
        (image, text) for image, text in zip(made, [
            *(f'red apple, strength {s:g}' for s in strengths), 'tangerine, strength 0.6'])]


def inpainting(model):
    """The right half of a picture painted anew, by hard, soft and graded masks."""
    whole, = jaxsd.generate(model, [BASE.replace(prompt='red apple')])
    mask, slope = halves(), np.tile(np.linspace(0, 1, 64), (64, 1))
    asked = BASE.replace(image=whole, mask=mask, seed=3)
    rows = [(asked.replace(prompt='red apple'), 'right half: red apple'),
            (asked.replace(prompt='tangerine'), 'right half: tangerine'),
            (asked.replace(prompt='tangerine', mask_blur=3), 'tangerine, softened by 3 pixels'),
            (asked.replace(prompt='tangerine', mask=slope, mask_mode='strength'),
             'tangerine, stronger to the right'),
            (asked.replace(prompt='tangerine', mask=slope), 'tangerine, mixed in to the right')]
    made = jaxsd.generate(model, [request for request, _ in rows])
    shown = np.repeat(255 * np.uint8(mask)[..., None], 3, -1)
    return [(whole, 'red apple'), (shown, 'the mask'),
            *((image, text) for image, (_, text) in zip(made, rows))]


def outpainting(model):
    """The left half of pictures, and what the model adds on their right."""
    names = ('red apple', 'alien', 'red heart')
    wholes = jaxsd.generate(model, [BASE.replace(prompt=name) for name in names])
    made = jaxsd.generate(model, [
        BASE.replace(prompt=name, image=whole[:, :32], outpaint=(0, 0, 32, 0), mask_blur=2, seed=1)
        for name, whole in zip(names, wholes)])
    row = []
    for name, whole, image in zip(names, wholes, made):
        left = np.full_like(whole, 235)
        left[:, :32] = whole[:, :32]
        row += [(left, 'a left half'), (image, f'32 pixels added: {name}')]
    return row


def only_masked(model):
    """One emoji of four, in a picture twice as large, painted at the model's own size."""
    four = jaxsd.generate(model, [BASE.replace(prompt=name) for name in (
        'red apple', 'rocket', 'musical note', 'red heart')])
    sheet = picture.grid(four, 2)
    mask = np.zeros(sheet.shape[:2], bool)
    mask[64:, :64] = True
    asked = BASE.replace(image=sheet, mask=mask, only_masked=0)
    names = ('four leaf clover', 'rooster', 'alien', 'sun')
    made = jaxsd.generate(model, [asked.replace(prompt=name) for name in names])
    return [(sheet, 'a picture of 128 pixels')] + [
        (image, f'only its lower left, at full size: {name}') for image, name in zip(made, names)]


def controlled(model):
    """The edges of a small apple as a hint: followed by several names, not at all, for a while."""
    whole, = jaxsd.generate(model, [BASE.replace(prompt='red apple')])
    small = np.full_like(whole, 255)
    small[20:60, 4:44] = images.fit(whole, 40, 40)
    edges = images.canny(small, *THRESHOLDS)
    rows = [('red apple', {}), ('tangerine', {}), ('tomato', {}), ('', {}),
            ('tangerine', {'end': 0.6}), ('tangerine', {'scale': 0.0})]
    made = jaxsd.generate(model, [
        BASE.replace(prompt=text, seed=5, controls=[Control('edges', edges, **how)])
        for text, how in rows])
    return [(edges, 'edges')] + [
        (image, ', '.join([text or 'no prompt', *(f'{k} {v:g}' for k, v in how.items())]))
        for image, (text, how) in zip(made, rows)]


def hints(model):
    """The preprocessors that need no network."""
    whole, = jaxsd.generate(model, [BASE.replace(prompt='rocket')])
    pose = images.read_pose(ROOT / 'docs' / 'pose.json')
    return [(whole, 'rocket'), (images.canny(whole, *THRESHOLDS), 'canny'),
            (images.scribble(whole), 'scribble'), (images.tile(whole, 8), 'tile'),
            (images.draw_pose(pose.people, 256, 256), 'pose, from OpenPose keypoints')]


def previews(model):
    """What the model takes the picture to be after 1, 4, 7 ... calls."""
    row = []
    vae = jaxsd.Network(model.config.vae, model.params['vae'])
    jaxsd.generate(model, [BASE.replace(prompt='rooster')], preview=Preview(
        vae, lambda done, total, now: row.append((now[0], f'after {done} of {total} calls')), 3))
    return row


def prompts(model):
    """What the language of prompts does: one text after another, in turns, several at once."""
    rows = ('red apple', '[red apple:green apple:0.2]', '[red apple:green apple:0.4]',
            '[red apple|green apple]', 'red apple AND green apple', 'red heart AND blue heart',
            '[red heart|blue heart|green heart]')
    return list(zip(jaxsd.generate(model, [BASE.replace(prompt=text) for text in rows]), rows))


ROWS = (prompts, image_to_image, inpainting, outpainting, only_masked, controlled, hints, previews)


def run():
    """Draw every row and write the sheet."""
    out = pathlib.Path(FLAGS.out)
    picture.check_folder(out.parent)
    model = jaxsd.load(ROOT / 'checkpoints' / 'emoji').replace(
        controlnets={'edges': jaxsd.load_controlnet(ROOT / 'checkpoints' / 'emoji_edges')})
    cells = []
    for row in ROWS:
        found = row(model)
        blank = (np.full((8, 8, 3), 255, np.uint8), '')
        cells += found + [blank] * (COLUMNS - len(found))
        print(f'{row.__name__}: {len(found)} pictures')
    picture.write_png(out, contact_sheet(*zip(*cells), columns=COLUMNS))
    print(out)


def define_flags():
    """Not at import: other mains have flags of these names."""
    flags.DEFINE_string('out', 'outputs/gallery.png', 'The picture to write.')


if __name__ == '__main__':
    define_flags()
    app.run(plain_errors(run))
