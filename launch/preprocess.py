"""Hints for ControlNets from pictures, or from OpenPose's keypoints.

python -m launch.preprocess --kind=canny --low=100 --high=200 --out=outputs photo.jpg more.png
python -m launch.preprocess --kind=pose --width=512 --height=768 keypoints.json
python -m launch.preprocess --kind=openpose --detectors=body_pose_model.pth photo.jpg

Writes <name>-<kind>.png for each file.
"""

import pathlib

from absl import app, flags

from jaxsd import recipe

from . import plain_errors

KINDS = {'canny': ('low', 'high'), 'scribble': ('threshold',), 'tile': ('factor',),
         'pose': ('width', 'height'), 'mlsd': ('score', 'distance')}  # and their flags

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string('kind', None, 'What the ControlNet was trained on: canny, scribble, tile, '
                        'pose (from JSON), or by --detectors openpose, openpose_full, '
                        'softedge_hed, scribble_hed, lineart_realistic, lineart_anime, mlsd, '
                        'normal_bae, depth_midas, depth_anything_v2 ...', required=True)
    flags.DEFINE_multi_string('detectors', [], 'A network that finds the hint, "[name=]PATH", or a '
                              'folder of them; repeat for several.')
    flags.DEFINE_string('out', 'outputs', 'Folder for the pictures.')
    flags.DEFINE_float('low', None, 'canny: gradient that goes on with an edge; 100 if left out.')
    flags.DEFINE_float('high', None, 'canny: gradient that starts an edge; 200 if left out.')
    flags.DEFINE_integer('threshold', None, 'scribble: strokes are darker; 127 if left out.')
    flags.DEFINE_float('factor', None, 'tile: times smaller; 1 if left out.')
    flags.DEFINE_float('score', None, 'mlsd: least score of a line; 0.1 if left out.')
    flags.DEFINE_float('distance', None, 'mlsd: least length of a line; 0.1 if left out.')
    flags.DEFINE_integer('width', None, "pose: pixels; the file's canvas if left out.")
    flags.DEFINE_integer('height', None, "pose: pixels; the file's canvas if left out.")


def run(files):
    """Every hint is there before the first is written."""
    import jaxsd
    from jaxsd import images
    from jaxsd.run import detectors, picture
    from jaxsd.sampling.choice import one_of
    one_of('--kind', FLAGS.kind, [*images.PREPROCESSORS, 'pose', *detectors.DETECTORS])
    takes = KINDS.get(FLAGS.kind, ())
    options = {name: FLAGS[name].value for names in KINDS.values() for name in names
               if FLAGS[name].value is not None}
    for name in options:
        if name not in takes:
            raise ValueError(f'--{name} is not for --kind={FLAGS.kind}, which takes: '
                             f'{", ".join(takes) or "nothing more"}')
    if not files:
        raise ValueError('expected the files to read, for example photo.jpg')
    names = [f'{pathlib.Path(file).stem}-{FLAGS.kind}.png' for file in files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'two of the files would be written as {name}')
    networks = {name: jaxsd.load_detector(path) for name, path in recipe.files(
        '--detectors', FLAGS.detectors if FLAGS.kind in detectors.DETECTORS else ()).items()}
    hints = [detectors.hint(FLAGS.kind, file, networks=networks, **options) for file in files]
    out = picture.check_folder(FLAGS.out)
    for name, hint in zip(names, hints):
        picture.write_png(out / name, hint)
        print(out / name)


def main(argv):
    plain_errors(lambda: run(argv[1:]))(argv[:1])


if __name__ == '__main__':
    define_flags()
    app.run(main)
