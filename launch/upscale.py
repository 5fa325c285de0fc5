"""Pictures enlarged by a network (ESRGAN, Real-ESRGAN, Compact, SwinIR), faces restored.

python -m launch.upscale --model=RealESRGAN_x4plus.pth --out=outputs photo.png more.jpg
python -m launch.upscale --restore_faces=GFPGANv1.4.pth --detectors=annotators photo.png

Writes photo-upscaled.png and more-upscaled.png; photo-restored.png without --model. Faces are
restored in the enlarged picture. Nothing in a .pth is run.
"""

import functools

from absl import app, flags

from jaxsd import recipe

from . import plain_errors, read_pictures

FLAGS = flags.FLAGS
# Flags that say nothing without another.
NEEDS = {'scale': 'model', 'tile': 'model'} | dict.fromkeys(
    ('detectors', 'visibility', 'fidelity_weight'), 'restore_faces')


def define_flags():
    """Not at import: other mains have flags of these names."""
    flags.DEFINE_string('model', None, "The enlarging network's file, .safetensors or .pth.")
    flags.DEFINE_string('restore_faces', None, 'A file of GFPGAN v1.2 to v1.4 or CodeFormer, '
                        'which restores faces; --detectors find them.')
    flags.DEFINE_multi_string('detectors', [], "Of --restore_faces: OpenPose's body_pose_model.pth "
                              'and facenet.pth, "[name=]PATH", or a folder of them.')
    flags.DEFINE_float('visibility', 1.0, 'How much of restored faces shows.', 0, 1)
    flags.DEFINE_float('fidelity_weight', None, "CodeFormer's: 0 draws faces anew, 1 stays close "
                       'to those there; 0.5 if left out.', 0, 1)
    flags.DEFINE_float('scale', None, "Times the sides; the network's own if left out.", 0.01, 64)
    flags.DEFINE_integer('tile', 256, 'Pixels along the sides of what is seen at once; fewer take '
                         'less memory.', 16)
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'Of the weights.')
    flags.DEFINE_string('out', 'outputs', 'Folder for the pictures.')


def main(argv):
    """Entry point: everything that is no flag is a picture."""
    plain_errors(functools.partial(run, argv[1:]))(argv[:1])


def run(paths):
    """Read, enlarge, restore faces, write."""
    c = FLAGS
    for flag, needs in NEEDS.items():
        if c[flag].present and not c[needs].value:
            raise ValueError(f'--{flag} is for --{needs}, which is not there: give --{needs}=PATH')
    if not c.model and not c.restore_faces:
        raise ValueError('expected --model=PATH, which enlarges pictures, or --restore_faces=PATH')
    pictures, out = read_pictures(paths, c.out)
    import jaxsd
    from jaxsd.run import faces, picture
    network = c.model and jaxsd.load_upscaler(c.model, c.dtype)
    if c.restore_faces:
        restorer = jaxsd.load_face_restorer(c.restore_faces, c.dtype)
        networks = {name: jaxsd.load_detector(path)
                    for name, path in recipe.files('--detectors', c.detectors).items()}
        faces.check(restorer, networks, c.visibility, c.fidelity_weight)
    for stem, image in pictures:
        if network:
            image = jaxsd.upscale(network, image, c.scale, c.tile)
        if c.restore_faces:
            image = jaxsd.restore_faces(restorer, image, networks, c.visibility,
                                        c.fidelity_weight)
        path = out / f'{stem}-{"upscaled" if network else "restored"}.png'
        picture.write_png(path, image)
        print(path)


if __name__ == '__main__':
    define_flags()
    app.run(main)
