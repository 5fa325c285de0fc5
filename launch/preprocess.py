"""Hints for ControlNets from pictures, or from OpenPose's keypoints.

python -m launch.preprocess --kind=canny --low=100 --high=200 --out=outputs photo.jpg more.png
python -m launch.preprocess --kind=pose --width=512 --height=768 keypoints.json

Writes <name>-<kind>.png for each file.
"""

import pathlib

from absl import app, flags

from . import plain_errors

KINDS = {'canny': ('low', 'high'), 'scribble': ('threshold',), 'tile': ('factor',),
         'pose': ('width', 'height')}  # and their flags

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_enum('kind', None, list(KINDS), 'What the ControlNet was trained on.',
                      required=True)
    flags.DEFINE_string('out', 'outputs', 'Folder for the pictures.')
    flags.DEFINE_float('low', None, 'canny: gradient that goes on with an edge; 100 if left out.')
    flags.DEFINE_float('high', None, 'canny: gradient that starts an edge; 200 if left out.')
    flags.DEFINE_integer('threshold', None, 'scribble: strokes are darker; 127 if left out.')
    flags.DEFINE_float('factor', None, 'tile: times smaller; 1 if left out.')
    flags.DEFINE_integer('width', None, "pose: pixels; the file's canvas if left out.")
    flags.DEFINE_integer('height', None, "pose: pixels; the file's canvas if left out.")


def run(files):
    """Every hint is there before the first is written."""
    from jaxsd import images
    from jaxsd.run import picture
    options = {name: FLAGS[name].value for names in KINDS.values() for name in names
               if FLAGS[name].value is not None}
    for name in options:
        if name not in KINDS[FLAGS.kind]:
            raise ValueError(f'--{name} is not for --kind={FLAGS.kind}, which takes: '
                             f'{", ".join(KINDS[FLAGS.kind])}')
    if not files:
        raise ValueError('expected the files to read, for example photo.jpg')
    names = [f'{pathlib.Path(file).stem}-{FLAGS.kind}.png' for file in files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'two of the files would be written as {name}')
    hints = [images.hint(FLAGS.kind, file, **options) for file in files]
    out = picture.check_folder(FLAGS.out)
    for name, hint in zip(names, hints):
        picture.write_png(out / name, hint)
        print(out / name)


def main(argv):
    plain_errors(lambda: run(argv[1:]))(argv[:1])


if __name__ == '__main__':
    define_flags()
    app.run(main)
