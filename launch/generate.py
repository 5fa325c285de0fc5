"""Pictures from prompts, and from other pictures.

python -m launch.generate --config=configs/emoji.py --prompt="red apple" --seed=7 --config.steps=20

Several --prompt, --image and --num_images make one batch, written as PNG files and a grid picture.
--from=image.png repeats a picture as its file says; flags beside it change what they name.
"""

import os
import pathlib
import re
import sys
import time
import warnings

from absl import app, flags
from ml_collections import config_flags

from jaxsd import recipe
from jaxsd.recipe import FIELDS, complete, fields, files, load, words

from . import define_plugin_flag, keep_programs, load_plugins, printable

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'

FLAGS = flags.FLAGS
# What a picture's record holds beside its request, under the names of the recipe and the flags.
RECIPE = ('checkpoint', 'base', 'ema', 'dtype', 'quantize', 'offload', 'prediction', 'tile')
GIVEN = ('vae', 'refiner', 'control', 'lora', 'embeddings', 'upscalers', 'ip_adapter',
         'image_encoder', 'detectors', 'strays')
OF_RECIPE = 'Of the recipe'  # so the help of its fields begins
ASKED = ('negative_prompt', 'prompt_2', 'negative_prompt_2', 'strength', 'mask', 'depth',
         'wildcards')


def define_flags():
    """Not at import: other mains have flags of these names."""
    define_model_flags()
    flags.DEFINE_string('from', None, 'A picture to make again from what its file says, written '
                        'here or by stable-diffusion-webui, ComfyUI or InvokeAI; other flags '
                        'change what they name.')
    flags.DEFINE_boolean('trust', False, 'The picture of --from may name files, folders and Hub '
                         'models; else those stand in flags.')
    flags.DEFINE_multi_string('prompt', None, 'What to draw; repeat for several pictures.')
    flags.DEFINE_string('negative_prompt', '', 'What to keep out of the pictures.')
    flags.DEFINE_string('prompt_2', None, "SDXL: another prompt for its second text encoder.")
    flags.DEFINE_string('negative_prompt_2', None, 'The same for the negative prompt.')
    flags.DEFINE_multi_string('image', None, 'A picture to start from, to paint on, to take the '
                              'depth of, or to enlarge, as the model can; repeat for several.')
    flags.DEFINE_float('strength', None, '0 leaves the image as it is, 1 paints all anew; 1 with '
                       '--mask or --outpaint, else 0.75 by default.', 0, 1)
    flags.DEFINE_string('mask', None, 'A picture of the size of --image: white is painted anew.')
    flags.DEFINE_list('outpaint', None, 'Pixels to add to --image: left,top,right,bottom.')
    flags.DEFINE_string('depth', None, 'A depth map, near is white, for depth models.')
    flags.DEFINE_multi_string(
        'control', None, 'A ControlNet and its hint, "net=PATH, image=PATH", with perhaps scale=1, '
        'start=0, end=1, guess=original (or diffusers, soft), mode=depth (what the hint is, for a '
        'ControlNet-Union), preprocess=canny (with its low=100, high=200; scribble, tile, pose '
        'from JSON, or what --detectors find); '
        'repeat for several.')
    flags.DEFINE_multi_string(
        'detectors', None, 'A network that finds hints, for preprocess=openpose and the like '
        '(OpenPose, HED, lineart, M-LSD, NormalBae, MiDaS, Depth Anything), "[name=]PATH", or a '
        'folder of them; repeat for several.')
    flags.DEFINE_multi_string(
        'image_prompt', None, 'A picture as a prompt, "net=NAME, image=PATH" by a name of '
        '--ip_adapter, with perhaps weight=1, start=0, end=1, mask=PATH, blocks=style (SDXL), or '
        'embeds=PATH.npy; repeat for several.')
    flags.DEFINE_string(
        'reference', None, 'A picture whose style and things to follow without a network for it, '
        '"image=PATH", with perhaps weight=1, start=0, end=1, fidelity=0.5.')
    flags.DEFINE_boolean('warm', False, 'Compile what these flags need, for later starts, and draw '
                         'nothing.')
    flags.DEFINE_string('wildcards', None, 'A folder of NAME.txt, for __NAME__ in prompts.')
    flags.DEFINE_string('preview', None, 'A small VAE (TAESD: folder, files or Hub id) that shows '
                        'the pictures come, in preview.png in the folder.')
    flags.DEFINE_integer('num_images', 1, 'Pictures per prompt; their seeds count up.',
                         lower_bound=1)
    flags.DEFINE_integer('seed', -1, '0 to 2^64 - 1; -1 picks one at random.')
    flags.DEFINE_string('out', 'outputs', 'Folder for the pictures.')


def define_model_flags():
    """The flags that say which model makes the pictures, and what of one's own it is used with."""
    define_plugin_flag()
    config_flags.DEFINE_config_file(
        'config', None, 'Recipe: a file, or the name of one in configs/, emoji if left out. Its '
        'fields are flags, --steps=30; written as --config.steps=30 they are the same.')
    for name, (default, text) in FIELDS.items():
        kind = default if isinstance(default, type) else type(default)
        most = '' if isinstance(default, type) or default == '' else f' (most recipes: {default})'
        flags.DEFINE_string(name, None, f'{OF_RECIPE}: {text}{most}; {kind.__name__}.')
    flags.DEFINE_string('checkpoint', None,
                        "A folder, a .safetensors file or a Hub id, instead of the recipe's.")
    flags.DEFINE_string('vae', None, 'A VAE (folder, file or Hub id) instead of the model\'s.')
    flags.DEFINE_string('refiner', None, 'An SDXL refiner; --config.request="switch=0.8" says when '
                        'it takes over.')
    flags.DEFINE_multi_string(
        'lora', None, 'A LoRA for <lora:name:0.8> in prompts, "[name=]PATH", or a folder of them; '
        'repeat for several.')
    flags.DEFINE_multi_string(
        'ip_adapter', None, 'An IP-Adapter for image prompts, "[name=]PATH", or a folder of them; '
        'repeat for several.')
    flags.DEFINE_multi_string(
        'image_encoder', None, 'The CLIP that IP-Adapters see pictures with (folder or file); '
        'repeat where they differ.')
    flags.DEFINE_boolean('strays', False, 'Leave out tensors of the checkpoint, and layers of '
                         'LoRAs, that are not the model\'s, with a warning.')
    flags.DEFINE_string('compilation_cache', None, 'A folder for compiled programs, so that the '
                        'next start has them; jaxsd/programs in the user\'s cache folder if left '
                        'out, "" for none.')
    flags.DEFINE_multi_string('embeddings', None, 'A textual inversion, "[name=]PATH", or a folder '
                              'of them, for their names in prompts; repeat for several.')
    flags.DEFINE_multi_string('upscalers', None, 'A network that enlarges pictures (ESRGAN, '
                              'Real-ESRGAN, SwinIR) for --hires="upscaler=NAME", "[name=]PATH", or '
                              'a folder of them; repeat for several.')


def guarded(run):
    """`run` as an absl main: one clear line and exit code 1 or 2 for whatever the user can get
    wrong; else what it returns is the exit code."""
    def main(argv):
        warnings.showwarning = warn
        sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be no text
        try:
            if len(argv) > 1:
                fail(f'unexpected argument {argv[1]!r}: give prompts as --prompt="{argv[1]}"', 2)
            keep_programs(FLAGS.compilation_cache if 'compilation_cache' in FLAGS else None)
            load_plugins()
            return run()
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            fail(error)
        except (RuntimeError, MemoryError) as error:  # XLA's: most often memory
            fail((str(error).strip() or 'out of memory').splitlines()[0])
        except KeyboardInterrupt:
            fail('interrupted', 130)

    return main


def run():
    """Load, sample, write."""
    recipe = FLAGS.config
    start = time.perf_counter()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's chatter
    from jaxsd.run import hashes, infotext, picture  # heavy imports: only once the flags are right
    past = _past(recipe)
    requests = _requests(recipe, past)
    hint_size = _hint_size(requests[0], past)
    if FLAGS.control:
        controls = _controls(*hint_size or (None, None), past)
        requests = [request.replace(controls=controls) for request in requests]
    adapters, embeddings, upscalers, ip_adapters = (
        files(f'--{name}', FLAGS[name].value or ())
        for name in ('lora', 'embeddings', 'upscalers', 'ip_adapter'))
    if FLAGS.image_prompt:
        prompts = [image_prompt(text) for text in FLAGS.image_prompt]
        requests = [request.replace(image_prompts=prompts) for request in requests]
    if FLAGS.reference:
        requests = [request.replace(reference=reference(FLAGS.reference)) for request in requests]
    _check_ip_adapters(requests, ip_adapters)
    out = picture.check_folder(FLAGS.out)
    weights = {'checkpoint': FLAGS.checkpoint or recipe.checkpoint, 'vae': FLAGS.vae,
               'lora': [f'{name}={path}' for name, path in adapters.items()]}
    for path in sorted({path for request in requests for path in picture.files(request)}):
        if not os.path.exists(path):
            raise FileNotFoundError(f'{path}: no such file')

    hashes.begin(weights)  # while weights are read and pictures are drawn
    import jax

    import jaxsd
    from jaxsd.run import Engine, resolve
    from jaxsd.run.generate import slots_for_requests
    slots = (past and past.run.get('slots')) or slots_for_requests(len(requests))
    model, name, dtype = load(recipe, FLAGS.checkpoint, strays=FLAGS.strays)
    if FLAGS.vae:
        model = model.with_vae(jaxsd.load_vae(FLAGS.vae, dtype))
    refiner = load(recipe, FLAGS.refiner, strays=FLAGS.strays)[0] if FLAGS.refiner else None
    preview = _preview(picture, out, jaxsd.load_vae(FLAGS.preview, dtype)
                       ) if FLAGS.preview else None
    if past and 'versions' in past.run:
        _note([infotext.differences(past.run)], 'warning')
    elif past:
        requests, notes = infotext.fit(requests, model.config)
        _note(notes)
    requests = resolve(requests, model.config)
    if past:
        _note(hashes.differences(past.hashes, weights), 'warning')
    _check_adapters(requests, adapters)
    model, named = complete(model, requests, dtype, adapters, embeddings, strays=FLAGS.strays,
                            upscalers=upscalers, ip_adapters=ip_adapters,
                            image_encoders=FLAGS.image_encoder or ())
    print(f'{printable(name)}: {model.config.version}, {dtype}, on {jax.local_device_count()} '
          f'{jax.default_backend()} device(s), loaded in {time.perf_counter() - start:.1f} s')

    start = time.perf_counter()
    if FLAGS.warm:
        with Engine(model, refiner, slots, recipe.tile or None) as engine:
            engine.warm(requests)
        print(f'the programs are ready in {time.perf_counter() - start:.1f} s')
        return
    with Bar() as bar:
        images = jaxsd.generate(model, requests, on_step=bar, tile=recipe.tile or None,
                                refiner=refiner, preview=preview, slots=slots)
    took = time.perf_counter() - start
    sizes = sorted({f'{image.shape[1]}x{image.shape[0]}' for image in images})
    print(f'{len(images)} picture(s) of {", ".join(sizes)} in {took:.1f} s{bar.parts()}')

    made = {**{name: recipe[name] for name in RECIPE},
            **{name: FLAGS[name].value for name in GIVEN if FLAGS[name].value}, **named,
            'checkpoint': FLAGS.checkpoint or recipe.checkpoint, 'dtype': dtype, 'model': name,
            'slots': slots}
    made['hashes'] = hashes.of_files(made)
    if FLAGS.control:
        made['hint_size'] = hint_size
    for path in _write(picture, out, images, requests, made):
        print(path)


def _past(recipe):
    """What --from's picture says, infotext.Metadata, or None. What the command line leaves open
    of its run becomes as it was."""
    path = FLAGS['from'].value
    if path is None:
        return None
    from jaxsd.run import infotext
    past = infotext.read(path, files('--upscalers', FLAGS.upscalers or ()))
    _note(past.notes)
    _check_names(past, recipe)
    if 'versions' not in past.run and not FLAGS.checkpoint and (
            config_flags.get_config_filename(FLAGS['config']) == str(CONFIGS / 'emoji.py')):
        raise ValueError(f'{path} was made with {past.run.get("model", "a model")!r}, and does not '
                         'say where that is: give it as --checkpoint=PATH')
    said = config_flags.get_override_values(FLAGS['config'])
    for name, value in past.run.items():
        if name in RECIPE and name not in said:
            recipe[name] = value
        elif name in GIVEN and not FLAGS[name].present:
            FLAGS[name].value = value
    return past


def _check_names(past, recipe):
    """What the picture of --from names of files and models is there as it was, and no surprise: it
    stands in a flag or in the recipe, or --trust is given. Raises ValueError, OSError."""
    said = config_flags.get_override_values(FLAGS['config'])
    given = {name for name in (*GIVEN, *ASKED, 'image', 'checkpoint') if FLAGS[name].present} | {
        *said, *fields(recipe, said)} | {field for field, flag in (
            ('controls', 'control'), ('image_prompts', 'image_prompt'), ('reference', 'reference'))
                if FLAGS[flag].present}
    named = {name: value for name, value in past.named().items() if name not in given}
    from jaxsd.run.infotext import brief
    strange = [name for name, value in named.items() if recipe.get(name) != value]
    if strange and not FLAGS.trust:
        raise ValueError(
            f'{FLAGS["from"].value} names {", ".join(f"{n}={brief(named[n])}" for n in strange)}: '
            f'give {"them as flags" if len(strange) > 1 else "it as a flag"}, or --trust where you '
            'know who made the picture')
    past.check_files(named)


MOST_NOTES = 20


def _note(lines, kind='note'):
    lines = [line for line in lines if line]
    more = [f'and {len(lines) - MOST_NOTES} more'] if len(lines) > MOST_NOTES else []
    for line in [*lines[:MOST_NOTES], *more]:
        print(f'{kind}: {printable(line)}', file=sys.stderr)


def _check_adapters(requests, loras):
    from jaxsd.run.text_conditioning import parse_prompts
    from jaxsd.sampling.choice import choose
    for name in sorted({name for request in requests for name in parse_prompts(request).adapters}):
        if not loras:
            raise ValueError(f'adapter {name!r}: expected its file as --lora=PATH')
        choose('adapter', name, loras)


def image_prompt(text):
    """An --image_prompt flag -> ImagePrompt."""
    from jaxsd.run.request import ImagePrompt
    from jaxsd.sampling.choice import one_of
    given = words('--image_prompt', text, '"net=NAME, image=PATH, weight=0.6"')
    for name in given:
        one_of('field of --image_prompt', name, ImagePrompt.__dataclass_fields__)
    if 'net' not in given:
        raise ValueError(f'--image_prompt="{text}": expected net=NAME in it, of --ip_adapter')
    return ImagePrompt(**given)


def reference(text):
    """A --reference flag -> Reference."""
    from jaxsd.run.request import Reference
    from jaxsd.sampling.choice import one_of
    given = words('--reference', text, '"image=PATH, weight=0.8"')
    for name in given:
        one_of('field of --reference', name, Reference.__dataclass_fields__)
    if 'image' not in given:
        raise ValueError(f'--reference="{text}": expected image=PATH in it')
    return Reference(**given)


def _check_ip_adapters(requests, ip_adapters):
    from jaxsd.sampling.choice import choose
    for name in sorted({prompt.net for request in requests for prompt in request.image_prompts}):
        if not ip_adapters:
            raise ValueError(f'image prompt net={name!r}: expected its file as '
                             f'--ip_adapter={name}=PATH, and --image_encoder=PATH')
        choose('IP-Adapter', name, ip_adapters)


def _hint_size(request, past):
    """The (width, height) to which a hint is brought before it is looked at; None: as it is."""
    asked = {name: getattr(request, name) for name in ('width', 'height', 'aspect', 'outpaint')}
    if past and 'hint_size' in past.run and asked.items() <= past.fields.items():
        return past.run['hint_size']
    return None if request.outpaint or request.aspect else (request.width, request.height)


def _controls(width, height, past):
    """The --control flags -> a list of Control. Raises ValueError for hints that have changed since
    the picture to repeat was made."""
    import jaxsd
    from jaxsd.run import detectors, picture
    from jaxsd.run.request import Control
    asked, controls = [words('--control', text) for text in FLAGS.control], []
    networks = {name: jaxsd.load_detector(path) for name, path in files(
        '--detectors', FLAGS.detectors or ()).items()
        if any(given.get('preprocess') in detectors.DETECTORS for given in asked)}
    for text, given in zip(FLAGS.control, asked):
        for name in ('net', 'image'):
            if name not in given:
                raise ValueError(f'--control="{text}": expected {name}=PATH in it')
        kind, path = given.pop('preprocess', 'none'), given.pop('image')
        options = {name: given.pop(name) for name in list(given)
                   if name not in Control.__dataclass_fields__}
        try:
            image = detectors.hint(kind, path, width, height, networks, **options)
        except TypeError:
            raise ValueError(f'--control="{text}": preprocess={kind} takes no '
                             f'{", ".join(options)}') from None
        if past and not FLAGS['control'].present and (
                picture.describe(image) != past.run['hints'][len(controls)]):
            raise ValueError(f'{path} has changed since {FLAGS["from"].value} was made from it')
        controls.append(Control(image=image, **given))
    return controls


def _preview(picture, out, vae):
    from jaxsd.run import Preview

    def show(done, total, images):
        picture.write_png(out / 'preview.png', picture.grid(images))

    return Preview(vae, show)


def _requests(recipe, past):
    """What the flags ask for, beside what the picture to repeat says -> a list of Request."""
    from jaxsd.run.request import Request
    from jaxsd.run.resolving import random_seed
    before, said = ({}, None) if past is None else (
        past.fields, config_flags.get_override_values(FLAGS['config']))
    given = {**before, **fields(recipe, said),
             **{name: FLAGS[name].value for name in ASKED if FLAGS[name].present}}
    if FLAGS.outpaint:
        given['outpaint'] = _whole('--outpaint', FLAGS.outpaint)
    if FLAGS.outpaint or (said and 'aspect' in said):  # they make the size
        given |= {'width': None, 'height': None}
    prompts = FLAGS.prompt if past is None else FLAGS.prompt or [before['prompt']]
    if prompts is None:
        raise ValueError('--prompt is missing: say what to draw, for example --prompt="red apple" '
                         '(--prompt="" draws without a prompt)')
    pictures = FLAGS.image or [before.get('image')]
    if pictures == [None] and not FLAGS['strength'].present:
        given.pop('strength', None)  # of a picture that the file does not hold
    seed = FLAGS.seed if FLAGS['seed'].present or past is None else before.get('seed', -1)
    seed = random_seed() if seed == -1 else seed
    first = Request(**{**given, 'image': pictures[0], 'seed': seed})
    return [first.replace(prompt=prompt, image=image).numbered(i)
            for prompt in prompts for image in pictures for i in range(FLAGS.num_images)]


def _whole(flag, values):
    try:
        return [int(value) for value in values]
    except ValueError:
        raise ValueError(f'{flag}={",".join(values)}: expected whole numbers') from None


def _write(picture, out, images, requests, made):
    """Write the pictures, and a grid if there are several; yields the paths."""
    import numpy as np
    used = [int(m[1]) for m in (re.match(r'(\d+)-.*\.png$', p.name) for p in out.iterdir()) if m]
    number = max(used, default=-1) + 1
    names = {name: pathlib.Path(made.get(name, '')).stem for name in ('vae', 'refiner')}
    texts = [{'parameters': picture.parameters(request, made['model'], **names,
                                                hashes=made['hashes']),
              'jaxsd': picture.record(request, **made)} for request in requests]
    for i, (image, request, text) in enumerate(zip(images, requests, texts)):
        slug = re.sub(r'[^a-z0-9]+', '-', request.prompt.lower())[:40].strip('-') or 'no-prompt'
        path = out / f'{number + i:05d}-{request.seed}-{slug}.png'
        picture.write_png(path, image, text)
        yield path
    if len(images) > 1 and len({image.shape for image in images}) == 1:
        columns = FLAGS.num_images if len(FLAGS.prompt or ()) > 1 < FLAGS.num_images else None
        path = out / f'{number + len(images):05d}-grid.png'
        picture.write_png(path, picture.grid(np.stack(images), columns), texts[0])
        yield path


class Bar:
    """A progress bar over model calls, and what the parts of the run took.

    The bar starts when the first call is done, so that compilation does not spoil its rate.
    """

    def __init__(self):
        self.bar, self.start, self.first, self.last, self.calls = None, time.perf_counter(), 0, 0, 0

    def __call__(self, done, total):
        from tqdm import tqdm
        self.last, self.calls = time.perf_counter(), done
        if self.bar is None:
            self.first = self.last
            self.bar = tqdm(total=total, initial=done, unit='it', desc='sampling', smoothing=0.1)
        self.bar.update(done - self.bar.n)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end = time.perf_counter()
        if self.bar is not None:
            self.bar.close()

    def parts(self):
        """' (compilation ... s, ...)'; '' where no call was reported, so that nothing is known."""
        if not self.calls:
            return ''
        took = self.last - self.first
        rate = f': {(self.calls - 1) / took:.2f} steps/s' if took else ''
        return (f' (compilation {self.first - self.start:.1f} s, sampling {took:.1f} s{rate}, '
                f'decoding {self.end - self.last:.1f} s)')


def parse(argv, training=False):
    """absl's flags, with a recipe by default: the emoji model's, or the one of the checkpoint's
    file; of training, where fields have no flags of their own, train_lora."""
    # First, because absl refuses --config.field before it; and not as the flag's default, because
    # absl would apply --config.field to that even beside another --config.
    if '--config' in argv[:-1]:
        at = argv.index('--config')
        argv = [*argv[:at], f'--config={argv[at + 1]}', *argv[at + 2:]]
    if not training:
        argv = [argv[0], *map(_of_recipe, argv[1:])]
    recipes = [flag for flag in argv if re.match(r'--?config=', flag)]
    rest = [flag for flag in argv[1:] if flag not in recipes]
    try:
        if not recipes:
            own = any(re.match(r'--?checkpoints?(=|$)', flag) for flag in argv)
            name = 'train_lora' if training else 'emoji'
            recipes = [f'--config={recipe.__file__ if own else name}']
        recipes = [f'--config={_recipe(flag.partition("=")[2], training)}' for flag in recipes]
        argv = sys.argv[:] = [argv[0], *recipes, *rest]  # ml_collections looks at sys.argv
        return flags.FLAGS(argv)
    except AttributeError as error:
        text = ' '.join(re.sub(r"\\n|[\"'\\]", ' ', str(error)).split())
        fail(f'the recipe has no such field: {text}', 2)
    except (flags.Error, KeyError, TypeError, ValueError, OSError) as error:
        fail(error, 2)


def _of_recipe(flag):
    """--steps=30 -> --config.steps=30, for the fields of a recipe; but not where a main has a flag
    of its own of that name, as launch.lab has --steps."""
    found = re.match(r'--?(no)?(\w+)(=.*)?$', flag, re.DOTALL)
    name = found and found[2]
    if name not in FIELDS or name in FLAGS and not FLAGS[name].help.startswith(OF_RECIPE):
        return flag
    return f'--{found[1] or ""}config.{found[2]}{found[3] or ""}'


def _recipe(name, training):
    """The file of a recipe: a path, or the name of one in configs/ of this kind."""
    if not re.fullmatch(r'\w+', name):
        if not re.search(r'\.py(:|$)', name):
            raise ValueError(f'--config={name}: expected a recipe, a .py file or its name; a model '
                             'is given as --checkpoint')
        return name
    known = {path.stem: path for path in sorted(CONFIGS.glob('*.py'))
             if path.stem.startswith('train_') == training}
    if name not in known:
        from jaxsd.sampling.choice import unknown
        raise unknown('recipe', name, known)
    return known[name]


def warn(message, category, filename, lineno, file=None, line=None):
    print(f'warning: {printable(message)}', file=sys.stderr)


def fail(message, code=1):
    """End with one line."""
    print('error:', printable(message), file=sys.stderr)
    sys.exit(code)


main = guarded(run)

if __name__ == '__main__':
    define_flags()
    app.run(main, flags_parser=parse)
