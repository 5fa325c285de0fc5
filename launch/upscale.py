"""Pictures enlarged by a network: ESRGAN, Real-ESRGAN, Compact, SwinIR.

python -m launch.upscale --model=RealESRGAN_x4plus.pth --out=outputs photo.png more.jpg

Writes photo-upscaled.png and more-upscaled.png. Nothing in a .pth is run.
"""

import functools

from absl import app, flags

from . import plain_errors, read_pictures

FLAGS = flags.FLAGS


def define_flags():
    """Not at import: other mains have flags of these names."""
    flags.DEFINE_string('model', None, "The network's file, .safetensors or .pth.", required=True)
    flags.DEFINE_float('scale', None, "Times the sides; the network's own if left out.", 0.01, 64)
    flags.DEFINE_integer('tile', 256, 'Pixels along the sides of what is seen at once; fewer take '
                         'less memory.', 16)
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'Of the weights.')
    flags.DEFINE_string('out', 'outputs', 'Folder for the pictures.')


def main(argv):
    """Entry point: everything that is no flag is a picture."""
    plain_errors(functools.partial(run, argv[1:]))(argv[:1])


def run(paths):
    """Read, enlarge, write."""
    pictures, out = read_pictures(paths, FLAGS.out)
    import jaxsd
    from jaxsd.run import picture
    network = jaxsd.load_upscaler(FLAGS.model, FLAGS.dtype)
    for stem, image in pictures:
        path = out / f'{stem}-upscaled.png'
        picture.write_png(path, jaxsd.upscale(network, image, FLAGS.scale, FLAGS.tile))
        print(path)


if __name__ == '__main__':
    define_flags()
    app.run(main)
