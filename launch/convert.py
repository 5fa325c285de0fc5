"""What is in a file of weights, models in another layout or dtype, models and LoRAs merged.

python -m launch.convert inspect model.ckpt
python -m launch.convert convert model.ckpt model --dtype=float16
python -m launch.convert merge model.safetensors new.safetensors --lora="path=a.pt, weight=0.8"
python -m launch.convert merge a.safetensors new.safetensors --model_b=b.safetensors --weight=0.3

A path that ends in .safetensors is written as a single file, any other as a diffusers folder.
Weights go from file to file, a tensor at a time.
Nothing that stands in a file is run, also of .ckpt and .pt.
"""

import collections
import functools
import hashlib
import json
import math
import os
import pathlib
import sys

from absl import app, flags

from jaxsd.recipe import words

from . import plain_errors, printable

FLAGS = flags.FLAGS
COMMANDS = {'inspect': ('FILE',), 'convert': ('SOURCE', 'OUT'), 'merge': ('SOURCE', 'OUT')}
MERGING = ('lora', 'model_b', 'model_c', 'method', 'weight', 'blocks', 'vae')  # flags of merge


def define_flags():
    """Not at import: other mains have flags of these names."""
    flags.DEFINE_enum('layout', None, ['diffusers', 'single-file'],
                      'single-file for an OUT that ends in .safetensors, if left out.')
    flags.DEFINE_enum('dtype', None, ['float32', 'float16', 'bfloat16'],
                      "Of all weights; each tensor's own if left out.")
    flags.DEFINE_string('prediction', None, 'epsilon or v_prediction, whatever the file says.')
    flags.DEFINE_string('base', None, 'A model that gives the VAE or text encoders that are '
                        'missing (folder, file or Hub id).')
    flags.DEFINE_bool('ema', False, 'The averaged weights of a file that holds both.')
    flags.DEFINE_bool('strays', False, 'Leave out tensors, and layers of LoRAs, that are no part '
                      'of the model.')
    flags.DEFINE_multi_string('lora', None, 'merge: "path=PATH, weight=0.8", or "path=PATH, '
                              'unet=0.8, text=0.5"; repeat for several.')
    flags.DEFINE_string('model_b', None, 'merge: the model to mix into SOURCE, model A.')
    flags.DEFINE_string('model_c', None, 'merge: what is subtracted from model B.')
    flags.DEFINE_string('method', None, 'merge: weighted_sum, slerp, add_difference, '
                        'train_difference; by whether there is a model C, if left out.')
    flags.DEFINE_float('weight', None, 'merge: of model B, 0.5 if left out; with a model C, 1.')
    flags.DEFINE_string('blocks', None, 'merge: other weights of blocks, "BASE=0, IN00=0.3, '
                        'M00=1", or all of them, BASE, IN00 ... M00, OUT00 ...: "0,0.1,0.3 ..."')
    flags.DEFINE_string('vae', None, 'merge: a VAE that replaces the one of SOURCE.')


def main(argv):
    """Entry point: the first argument is the command."""
    plain_errors(functools.partial(run, argv[1:]))(argv[:1])


def run(arguments):
    """Take the command apart before anything heavy is imported."""
    command, *paths = arguments or ['']
    if command not in COMMANDS or len(paths) != len(COMMANDS[command]):
        usage = ' | '.join(' '.join((name, *paths)) for name, paths in COMMANDS.items())
        raise ValueError(f'expected {usage}; found {" ".join(arguments) or "nothing"}')
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # nothing here computes
    if command == 'inspect':
        for label, text in describe(pathlib.Path(paths[0]).expanduser()):
            print(printable(f'{label}: {text}'))
        return
    given = [name for name in MERGING if getattr(FLAGS, name) not in (None, [])]
    if command == 'convert' and given:
        raise ValueError(f'--{given[0]} goes with merge')
    if command == 'merge' and not {'lora', 'model_b', 'vae'} & set(given):
        raise ValueError('merge: expected --model_b=PATH, --lora="path=PATH, weight=0.8" or '
                         '--vae=PATH')
    if FLAGS.model_b is None and (alone := {*given} - {'lora', 'vae'}):
        raise ValueError(f'--{min(alone)} goes with --model_b')
    loras, blocks = [_lora(text) for text in FLAGS.lora or ()], _blocks(FLAGS.blocks)
    import jaxsd

    def load(path):
        return jaxsd.load(path, dtype=FLAGS.dtype, prediction_type=FLAGS.prediction, ema=FLAGS.ema,
                          base=FLAGS.base, strays=FLAGS.strays, lazy=True)

    source, out = paths
    model = load(source)
    if FLAGS.model_b:
        others = [load(path) for path in (FLAGS.model_b, FLAGS.model_c) if path]
        method = FLAGS.method or ('weighted_sum', 'add_difference')[len(others) - 1]
        weight = (0.5, 1.0)[len(others) - 1] if FLAGS.weight is None else FLAGS.weight
        model = jaxsd.merge_models([model, *others], method, weight, blocks)
    if FLAGS.vae:
        model = model.with_vae(jaxsd.load_vae(FLAGS.vae, dtype=FLAGS.dtype))
    if loras:
        model = jaxsd.merge(model, [(jaxsd.load_adapter(path, model, strays=FLAGS.strays), weight)
                                    for path, weight in loras])
        if model.embeddings:
            print(f'note: a checkpoint cannot hold the embeddings in the LoRAs: '
                  f'{", ".join(model.embeddings)}', file=sys.stderr)
    single = out.endswith('.safetensors')
    jaxsd.save(model, out, FLAGS.layout or ('single-file' if single else 'diffusers'))
    print(out)


def _blocks(text):
    """'BASE=0, IN00=0.3' or '0, 0.1, ...' -> what merge_models takes."""
    if text is None or '=' in text:
        return text and words('--blocks', text)
    try:
        return [float(value) for value in text.split(',')]
    except ValueError:
        raise ValueError(f'--blocks="{text}": expected "BASE=0, IN00=0.3, ..." or numbers with '
                         'commas between them') from None


def _lora(text):
    """'path=a, weight=0.8' -> (path, weight or a pair of weights)."""
    given = words('--lora', text)
    pair = given.get('unet', 1), given.get('text', 1)
    weight = given.get('weight', pair)
    known = {'path', 'weight'} if 'weight' in given else {'path', 'unet', 'text'}
    numbers = [value for name, value in given.items() if name != 'path']
    if 'path' not in given or given.keys() - known or not all(
            isinstance(value, int | float) for value in numbers):
        raise ValueError(f'--lora="{text}": expected path= and the number weight=, or unet= and '
                         'text=')
    return str(given['path']), weight


def describe(path):
    """What `inspect` prints: (label, text), from the headers alone; and the file's hashes."""
    from jaxsd.weights import names, reading
    from jaxsd.weights.files import open_tensors
    from jaxsd.weights.gguf_file import GGUFFile
    from jaxsd.weights.pickles import PickleFile
    if path.is_dir():
        yield from _model(reading.open_source(path))
        return
    file = open_tensors(path)
    what, reader, _ = names.kind(file.shapes)
    yield 'is', what
    yield 'format', {PickleFile: 'a pickle of torch.save', GGUFFile: 'GGUF'}.get(
        type(file), 'safetensors')
    if reader == 'load':
        yield from _whole(path, file)
    else:
        yield 'dtypes', _counts(map(str, file.dtypes.values()))
        yield 'parameters', f'{sum(map(math.prod, file.shapes.values())):,}'
    if reader == 'load_adapter':
        yield from _adapter(file)
    if reader == 'load_embedding':
        yield from (('vectors', f'{name}: {list(shape)}') for name, shape in file.shapes.items())
    with open(path, 'rb') as opened:
        digest = hashlib.file_digest(opened, 'sha256').hexdigest()
    yield 'sha256', digest
    yield 'short hash (A1111)', digest[:10]
    yield from _metadata(file.metadata)


# What the names of a single file's tensors start with, whatever their sizes.
PARTS = {'unet': 'model.diffusion_model.', 'averaged U-Net (model_ema)': 'model_ema.',
         'vae': 'first_stage_model.', 'text encoders': ('cond_stage_model.', 'conditioner.'),
         'other tensors': ''}


def _whole(path, file):
    from jaxsd.weights import names, reading
    try:
        source = reading.open_single(path, None, False, None)
    except ValueError:
        yield 'version', 'none that jaxsd knows; of other sizes, it needs config='
        yield 'dtypes', _counts(map(str, file.dtypes.values()))
        found = collections.defaultdict(list)
        for name, shape in file.shapes.items():
            part = next(part for part, start in PARTS.items()
                        if names.in_single(name).startswith(start))
            found[part].append(math.prod(shape))
        for part in PARTS:
            yield part, (f'{sum(found[part]):,} parameters in {len(found[part])} tensors'
                         if part in found else 'absent')
    else:
        yield from _model(source)


def _model(source):
    from jaxsd.models.spec import count
    from jaxsd.weights import names
    yield 'version', source.config.version
    yield 'prediction type', ('not said, its output tells when it is loaded' if source.untold
                              else source.config.schedule.prediction_type)
    yield 'dtypes', _counts(str(file.dtypes[inner]) for file, inner in source.tensors.values())
    absent = source.absent()
    for part, shapes in source.shapes.items():
        yield part, 'absent' if part in absent else f'{count(shapes):,} parameters'
    files = {id(file): file for file, _ in source.tensors.values()}.values()
    averaged = sum(names.is_ema(name) for file in files for name in file.shapes)
    if averaged:
        yield 'averaged U-Net (model_ema)', f'{averaged} tensors'
    for kind, found in source.mismatches().items():
        whole = {place.name for part in absent for place in source.places[part].values()}
        listed = [name for name in found if name not in whole]
        if listed:
            yield kind, f'{len(listed)} tensors: {", ".join(listed[:20])}'


# The kinds of adapters, by a part that only they have.
KINDS = {'dora_scale': 'DoRA', 'magnitude': 'DoRA', 'hada_w1_a': 'LoHa', 'lokr_w1': 'LoKr',
         'lokr_w1_a': 'LoKr', 'a1': 'GLoRA', 'oft_blocks': 'OFT', 'on_input': 'IA3',
         'diff': 'full weights', 'down': 'LoRA'}
RANKS = {'down': 0, 'hada_w1_b': 0, 'lokr_w1_b': 0, 'lokr_w2_b': 0, 'a2': 0}  # part: axis


def _adapter(file):
    from jaxsd.weights import adapters
    what = adapters.describe(file)
    kinds, ranks, alphas, parts = (collections.Counter() for _ in range(4))
    for layer, found in what.layers.items():
        kinds.update(name for part, name in KINDS.items() if part in found)
        if 'down' in found and math.prod(file.shapes[found['down']][2:]) > 1:
            kinds['LoRA of larger convolutions'] += 1  # LoCon
        ranks.update(file.shapes[key][RANKS[part]] for part, key in found.items() if part in RANKS)
        if 'alpha' in found:
            alphas[float(file.read(found['alpha']).reshape(-1)[0])] += 1
        parts[what.targets.get(layer, ['of no known layer'])[0]] += 1
    yield 'for', what.family or 'no version that jaxsd knows'
    if what.lacks:
        layer, part = next(iter(what.lacks.items()))
        yield 'incomplete', f'{len(what.lacks)} layers, such as {layer}, which has no {part}'
    yield 'kind', _counts(kinds.elements())
    yield 'layers', _counts(parts.elements())
    yield 'rank', _counts(ranks.elements())
    yield 'alpha', _counts(alphas.elements()) or 'none'
    if what.embeddings:
        yield 'embeddings', ', '.join(what.embeddings)


def _counts(values):
    """'float16 (1130), int64 (1)', the most frequent first."""
    found = collections.Counter(values)
    if len(found) == 1:
        return str(next(iter(found)))
    return ', '.join(f'{value} ({n})' for value, n in found.most_common())


def _metadata(metadata, longest=200):
    """What training wrote down; captions' tags by how frequent they are."""
    for name, value in sorted(metadata.items()):
        if name == 'ss_tag_frequency':
            try:
                tags = collections.Counter()
                for found in json.loads(value).values():
                    tags.update(found)
                value = ', '.join(f'{tag.strip()} ({n})' for tag, n in tags.most_common(20))
            except (ValueError, TypeError, AttributeError):
                pass  # printed as it is
        yield name, value if len(value) <= longest else f'{value[:longest]} ...'


if __name__ == '__main__':
    define_flags()
    app.run(main)
