"""Depth maps of pictures, by MiDaS.

python -m launch.depth --checkpoint=stabilityai/stable-diffusion-2-depth --out=outputs a.png b.jpg

Writes a-depth.png and b-depth.png: 16-bit gray of the pictures' own sizes, near is white.
"""

import functools

from absl import app, flags

from . import plain_errors, read_pictures

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
    pictures, out = read_pictures(paths, FLAGS.out)
    from jaxsd.run import depth, picture
    from jaxsd.weights import load_depth_estimator
    network = load_depth_estimator(FLAGS.checkpoint)
    for stem, image in pictures:
        path = out / f'{stem}-depth.png'
        picture.write_png(path, depth.gray16(depth.estimate(network, image[None]),
                                             *image.shape[:2])[0])
        print(path)


if __name__ == '__main__':
    define_flags()
    app.run(main)
