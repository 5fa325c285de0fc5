"""Depth maps of pictures, by MiDaS.

python -m launch.depth --checkpoint=stabilityai/stable-diffusion-2-depth --out=outputs a.png b.jpg

Writes a-depth.png and b-depth.png: 16-bit gray of the pictures' own sizes, near is white.
"""

import functools
import pathlib

from absl import app, flags

from . import plain_errors

FLAGS = flags.FLAGS


def define_flags():
    """Not at import: other mains have flags of these names."""
    flags.DEFINE_string('checkpoint', None, 'A 2.x depth model (folder, .safetensors file or Hub '
                        'id), or a DPT-hybrid alone, as Intel/dpt-hybrid-midas.', required=True)
    flags.DEFINE_string('out', 'outputs', 'Folder for the depth maps.')


def main(argv):
    """Entry point: everything that is no flag is a picture."""
    plain_errors(functools.partial(run, argv[1:]))(argv[:1])


def run(paths):
    """Read, estimate, write."""
    stems = [pathlib.Path(path).stem for path in paths]
    if not paths or len(set(stems)) < len(stems):
        raise ValueError(f'pictures: expected at least one, of different names; found '
                         f'{", ".join(paths) or "none"}')
    from jaxsd import images  # heavy imports: only once the flags are known to be right
    from jaxsd.run import depth, picture
    from jaxsd.weights import load_depth_estimator
    pictures = [images.read(path) for path in paths]
    out = picture.check_folder(FLAGS.out)
    network = load_depth_estimator(FLAGS.checkpoint)
    for stem, image in zip(stems, pictures):
        path = out / f'{stem}-depth.png'
        picture.write_png(path, depth.gray16(depth.estimate(network, image[None]),
                                             *image.shape[:2])[0])
        print(path)


if __name__ == '__main__':
    define_flags()
    app.run(main)
