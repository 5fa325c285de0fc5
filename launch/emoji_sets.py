"""Small sets of pictures to fine-tune the emoji model on: `python -m launch.emoji_sets`.

    data/ink/        20 emoji as washes of blue ink, for a LoRA that learns the style
    data/star/       5 pictures of a thing that the model never saw, for DreamBooth and textual
                     inversion: a turquoise star with a face
    data/preferred/  with --pairs=300: that many captions drawn twice by the emoji model. Of each,
    data/others/     the picture that is nearer to the emoji, and the other, for Diffusion-DPO

Each is a folder of pictures. Those in ink and the preferred ones have captions beside them; recipes
say what the star is called. The same font gives the same files.
"""

import pathlib

import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw

from . import emoji_data, plain_errors

FLAGS = flags.FLAGS
INK = np.array([10, 30, 130])
INKED = ('birthday cake', 'blue book', 'broccoli', 'cactus', 'carrot', 'eggplant', 'fire engine',
         'frog', 'jeans', 'lemon', 'penguin', 'pig face', 'princess', 'rainbow', 'sos button',
         'sunflower', 'teddy bear', 'tomato', 'tropical fish', 'watermelon')
BODY, LINE = (50, 205, 190), (20, 60, 80)
# Where the star stands: centre and radius as parts of the picture's side, and its turn in degrees.
STARS = ((0.5, 0.52, 0.48, 0), (0.45, 0.5, 0.42, 12), (0.55, 0.55, 0.42, -14),
         (0.5, 0.45, 0.4, 6), (0.52, 0.54, 0.45, -6))


def ink(pixels):
    """Colours uint8 [...,3] as a wash of blue ink on paper, the darker the more, float32."""
    amount = 1 - np.mean(pixels, -1, keepdims=True, dtype=np.float32) / 255
    return 255 + (INK - 255) * amount


def star(x, y, radius, turn, size):
    """The star uint8 [size,size,3], see STARS."""
    side = 8 * size
    sheet = Image.new('RGB', (side, side), 'white')
    draw = ImageDraw.Draw(sheet)

    def at(angle, r):
        angle = np.radians(angle + turn)
        return (x + r * radius * np.sin(angle)) * side, (y - r * radius * np.cos(angle)) * side

    def dot(angle, r, width, height, colour):
        u, v = at(angle, r)
        w, h = width * radius * side, height * radius * side
        draw.ellipse((u - w, v - h, u + w, v + h), fill=colour)

    outline = [at(36 * i, 1 if i % 2 == 0 else 0.52) for i in range(10)]
    draw.polygon(outline, fill=BODY)
    draw.line([*outline, outline[0], outline[1]], fill=LINE, width=side // 40, joint='curve')
    for angle in (-55, 55):
        dot(angle, 0.22, 0.09, 0.12, LINE)
    mouth = [at(angle, 0.3) for angle in range(120, 241, 10)]
    draw.line(mouth, fill=LINE, width=side // 40, joint='curve')
    return np.asarray(sheet.resize((size, size), Image.Resampling.BOX))


def write(folder, pictures):
    """Write {file name: (picture, its caption, or None)}, kohya's layout without repeats."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, caption) in pictures.items():
        Image.fromarray(image).save(folder / f'{name}.png')
        if caption:
            (folder / f'{name}.txt').write_text(f'{caption}\n')
    print(f'{folder}: {len(pictures)} pictures')


def pairs(count):
    """Captions that launch.evaluate does not count, drawn from two seeds -> {caption: (the nearer
    picture to that emoji, the other)}, uint8 [H,W,3], by the colours that launch.retrieval sees."""
    from jaxsd.recipe import load, recipe

    from . import evaluate, retrieval
    lists = evaluate.HERE / 'tests' / 'data'
    reference = retrieval.read_reference(lists / 'emoji_reference.npz')
    plain, counted = reference['captions'][reference['plain']], set(
        (lists / 'emoji_eval.txt').read_text().splitlines())
    captions = [str(caption) for caption in plain if caption not in counted]
    captions = list(np.random.default_rng(0).permutation(captions)[:count])
    config = recipe('emoji', size=64, dtype='float32')
    model, _, _ = load(config)
    right = dict(zip(reference['captions'], reference['features'].astype(np.float32)))
    drawn = [evaluate.drawer(model, config, seed, min(count, 50))(captions) for seed in (1, 2)]
    found = {}
    for caption, *images in zip(captions, *drawn):
        distances = np.abs(retrieval.pool(np.stack(images)) - right[caption]).mean(1)
        found[caption] = tuple(images[i] for i in np.argsort(distances))
    return found


def run():
    out, size = pathlib.Path(FLAGS.out), FLAGS.size
    font = emoji_data.load_font(FLAGS.font)
    texts = {caption: text for text, caption, _ in emoji_data.read_names()}
    write(out / 'ink', {caption.replace(' ', '_'): (
        np.uint8(ink(emoji_data.render(font, texts[caption], size))), caption)
        for caption in INKED})
    write(out / 'star', {f'star{i}': (star(*place, size), None)
                         for i, place in enumerate(STARS)})
    if FLAGS.pairs:
        found = pairs(FLAGS.pairs).items()
        names = [f'{i:03}' for i in range(len(found))]
        write(out / 'preferred', {name: (better, caption) for name, (caption, (better, _))
                                  in zip(names, found)})
        write(out / 'others', {name: (worse, None) for name, (_, (_, worse)) in zip(names, found)})


def define_flags():
    """In a function, so that one process can import several mains."""
    flags.DEFINE_string('out', 'data', 'The folder to write into.')
    flags.DEFINE_integer('size', 64, 'Height and width of the pictures in pixels.', lower_bound=8)
    flags.DEFINE_integer('pairs', 0, 'Captions to draw twice, for preferences.', lower_bound=0)
    flags.DEFINE_string('font', emoji_data.FONT, 'The Noto Color Emoji font.')


if __name__ == '__main__':
    define_flags()
    app.run(plain_errors(run))
