"""Experiments on samplers and schedules.

python -m launch.lab sweep --samplers=euler,dpmpp_2m --schedules=karras,normal --steps=5,10,20
python -m launch.lab trace --prompt="red apple" --config.steps=20
python -m launch.lab schedule --steps=5,6,8,10 --out=outputs/gits.json

sweep: errors against converged references, as a grid picture, CSV and HTML. trace: one picture from
noise to the end. schedule: noise levels made for a model, for --config.schedule=outputs/gits.json.
All take --config, --checkpoint and the recipe's fields; `python -m launch.lab sweep --help`.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import platform
import re
import shlex
import sys

from absl import app, flags
from ml_collections import config_flags

from jaxsd.recipe import check_length, fields, load, options, shorten

from . import define_plugin_flag, generate, plain_errors

FLAGS = flags.FLAGS
DATA = pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'data'
ARGV = sys.argv[1:]  # as typed: parsing changes it
PROMPTS = ['red apple', 'rooster']


class Numbers(flags.ArgumentParser):
    """A list of numbers: '5,10' -> [5, 10]."""

    def __init__(self, kind):
        self.kind = kind

    def parse(self, argument):
        """Raises ValueError for what is no list of numbers."""
        if isinstance(argument, list):
            return argument
        try:
            return [self.kind(word) for word in argument.split(',')]
        except ValueError:
            name = {int: 'whole numbers', float: 'numbers'}[self.kind]
            raise ValueError(f'expected {name} with commas between, such as 5,10') from None


def define_numbers(name, kind, default, text):
    """A flag of Numbers."""
    flags.DEFINE(Numbers(kind), name, default, text)


def define_flags(command):
    """The flags of one command; not at import: other mains have flags of these names."""
    config_flags.DEFINE_config_file('config', None, 'Recipe (configs/emoji.py if left out); its '
                                    'fields are flags too, as in launch.generate.')
    flags.DEFINE_string('checkpoint', None,
                        "A folder, a .safetensors file or a Hub id, instead of the recipe's.")
    define_plugin_flag()
    if command == 'trace':
        flags.DEFINE_string('prompt', None, 'What to draw.')
        flags.DEFINE_integer('seed', 0, '0 to 2^64 - 1.')
        flags.DEFINE_integer('columns', 7, 'Model calls to show.', lower_bound=2)
        flags.DEFINE_string('out', 'outputs/trace.png', 'The picture; its numbers go beside it.')
        return
    flags.DEFINE_multi_string('prompt', PROMPTS, 'What to draw; repeat for several.')
    define_numbers('seeds', int, [0, 1], 'Seeds, each with each prompt.')
    if command == 'schedule':
        define_numbers('steps', int, [5, 6, 8, 10, 15, 20], 'Numbers of steps.')
        flags.DEFINE_string('method', 'gits', "'gits' or 'learn', see jaxsd/lab/search.py.")
        flags.DEFINE_string('options', '', 'Of the method, such as "levels=100, coeff=1.2".')
        flags.DEFINE_string('out', 'outputs/schedule.json', 'The schedule file.')
        return
    flags.DEFINE_string('samplers', 'euler,heun,dpmpp_2m,unipc,dpmpp_2m_sde',
                        'Names with options, such as "euler, unipc(order=3)", or all.')
    flags.DEFINE_string('schedules', 'karras,normal',
                        'Names or files with options, such as "karras(rho=5), my.json", or all.')
    define_numbers('steps', int, [5, 10, 20, 40], 'Numbers of steps.')
    define_numbers('guidance', float, None, "Scales (1 and the recipe's if left out).")
    flags.DEFINE_integer('batch_size', 16, 'Pictures in a microbatch.', lower_bound=1)
    flags.DEFINE_integer('reference_steps', 1000, 'Steps of the references.', lower_bound=2)
    flags.DEFINE_float('tolerance', 0.1, 'Error that counts as having reached the reference.',
                       lower_bound=0)
    flags.DEFINE_bool('retrieval', False, 'Also look the pictures up among all emoji; the prompts '
                                          'must be captions.')
    flags.DEFINE_string('reference', str(DATA / 'emoji_reference.npz'), 'For --retrieval.')
    flags.DEFINE_integer('cell', 64, 'Pixels of a picture in the grid.', lower_bound=8)
    flags.DEFINE_integer('grid_prompts', 2, 'How many prompts the grid shows, the first seed of '
                                            'each.', lower_bound=1)
    flags.DEFINE_string('out', 'outputs/sweep', 'Folder for results.csv, grid.png, report.html.')


def settings(text, known):
    """'euler, unipc(order=3)' or 'all' -> [(name, options)]."""
    if text.strip() == 'all':
        return [(name, {}) for name in known]
    check_length(text)
    commas, depth = [-1], 0
    for mark in re.finditer(r'[(),]', text):
        depth += (mark[0] == '(') - (mark[0] == ')')
        if mark[0] == ',' and depth == 0:
            commas.append(mark.start())
    found = []
    for start, end in itertools.pairwise([*commas, len(text)]):
        word = text[start + 1:end].strip()
        name, bracket, inner = word.partition('(')
        if not name.strip() or ')' in name or bracket and not inner.endswith(')'):
            raise ValueError(f'{shorten(word)} in {shorten(text)}: expected a name, or a name with '
                             'options such as "unipc(order=3)"')
        found.append((name.strip(), options(inner.removesuffix(')'))))
    return found


def sweep():
    """Draw, measure, write three files."""
    from jaxsd.lab import report  # before all work: it needs matplotlib, which may be missing
    from jaxsd.lab import sweep as lab
    from jaxsd.run import picture
    requests, half = plan(lab)
    ranks = ranker(requests) if FLAGS.retrieval else lambda indices, images: [None] * len(indices)
    out = picture.check_folder(FLAGS.out)
    model, name, dtype = load(FLAGS.config, FLAGS.checkpoint)

    shown = {r.prompt: r.seed for r in reversed(requests)}  # each prompt's first seed
    prompts = FLAGS.prompt[:FLAGS.grid_prompts]
    paint, latents = lab.painter(model, FLAGS.batch_size), {}
    results, errors = [None] * len(requests), []
    with generate.Bar() as bar:
        for shots in lab.sweep(model, requests + half, FLAGS.batch_size, FLAGS.reference_steps,
                               bar):
            errors += [shot.error for shot in shots if shot.index >= len(requests)]
            shots = [shot for shot in shots if shot.index < len(requests)]
            ranked = ranks([shot.index for shot in shots],
                           lambda: paint([shot.latent for shot in shots]))  # noqa: B023
            for shot, rank in zip(shots, ranked):
                request = requests[shot.index]
                results[shot.index] = lab.record(request, shot, rank)
                if request.prompt in prompts and request.seed == shown[request.prompt]:
                    latents[shot.index] = shot.latent, shot.target

    floor = lab.mean_error(errors)
    lines = lab.lines(results, floor, FLAGS.tolerance)
    grid = report.grid(cells(results, latents, paint), FLAGS.cell)
    page = report.page(lines, grid, **words(lines, results, name, dtype, floor))
    for file, data in (('results.csv', report.table(results)),
                       ('grid.png', report.encode(grid, optimize=True)), ('report.html', page)):
        report.write(out / file, data)
        print(out / file)


def plan(lab):
    """The requests of the flags, and those that measure the reference's own error."""
    from jaxsd import sampling
    from jaxsd.run.resolving import GUIDANCE
    recipe = FLAGS.config
    scale = recipe.guidance or GUIDANCE['']  # of a checkpoint without a recipe
    rest = FLAGS.guidance or sorted({1.0, scale}), FLAGS.prompt, FLAGS.seeds
    more = {'width': recipe.width, 'height': recipe.height,
            'guidance_options': options(recipe.guidance_options)}
    requests = lab.expand(
        settings(FLAGS.samplers, sampling.SAMPLERS), settings(FLAGS.schedules, sampling.SCHEDULES),
        FLAGS.steps, *rest, **more)
    half = lab.expand([(lab.REFERENCE['sampler'], {})], [(lab.GRID['schedule'], {})],
                      [FLAGS.reference_steps // 2], *rest, **more)
    return requests, half


def ranker(requests):
    """A function from indices of requests and their pictures (made when called) to ranks."""
    from . import retrieval
    reference = retrieval.read_reference(FLAGS.reference)
    rows = {caption: row for row, caption in enumerate(reference['captions'])}
    if unknown := [prompt for prompt in FLAGS.prompt if prompt not in rows]:
        raise ValueError(f'--retrieval: prompts that are no captions of emoji: {unknown}')

    def ranks(indices, images):
        if not indices:
            return []
        found = retrieval.ranks(retrieval.pool(images()),
                                [rows[requests[i].prompt] for i in indices], reference['features'])
        return found.tolist()

    return ranks


def cells(results, latents, paint):
    """The pictures of the grid: {(title, schedule, sampler, column): uint8 [h,w,3]}."""
    found = {}
    for i in sorted(latents):
        result, (latent, target) = results[i], latents[i]
        place = (f'{result["prompt"]}, guidance {result["guidance"]:g}, seed {result["seed"]}',
                 result['schedule'], result['sampler'])
        found[*place, f'{result["steps"]}'] = latent
        if target is not None:
            found[*place, 'reference'] = target
    columns = [*map(str, FLAGS.steps), 'reference']
    found = dict(sorted(found.items(), key=lambda item: columns.index(item[0][3])))
    return dict(zip(found, paint([*found.values()])))


def words(lines, results, name, dtype, floor):
    """What the page says beside its numbers."""
    import jax
    import matplotlib
    import numpy as np

    import jaxsd
    counts = ' x '.join(f'{len({r[field] for r in results})} {name}' for field, name in (
        ('sampler', 'samplers'), ('schedule', 'schedules'), ('steps', 'numbers of steps'),
        ('guidance', 'guidance scales'), ('prompt', 'prompts'), ('seed', 'seeds')))
    device = jax.devices()[0]
    n = FLAGS.reference_steps
    return dict(
        title=f'Samplers and schedules on {name}',
        summary=f'{len(results)} pictures: {counts}. ' + ' '.join(
            leader(lines, guidance) for guidance in dict.fromkeys(r['guidance'] for r in results)),
        alt=f'Grid of pictures: a row for each sampler, blocks of columns for each schedule, '
            f'numbers of steps across, the reference of {n} steps at the right of each block; '
            f'prompts and guidance down. White: no picture.',
        method=(
            f'Error: root mean square of final latent less reference, of the same seed, prompt and '
            f'guidance, in latents of about unit scale. For samplers of the probability-flow ODE '
            f'the reference is dpmpp_2m in {n} steps of karras; its own error is about {floor:.1g} '
            f'(its difference from {n // 2} steps). For samplers that follow a Brownian path, '
            f'one for each seed whatever the steps, it is the same sampler in {n} steps of karras. '
            f'Samplers that draw independent noise have none, nor have CFG++ samplers, which guide '
            f'more the more steps they make.',
            'Order: minus the slope of log error against log model calls, least squares over the '
            'last three numbers of steps whose error is above three times the reference\'s own. A '
            'guided call, with and without prompt, counts as one.',
            f'Time: the time of a microbatch of {FLAGS.batch_size} pictures, compilation '
            f'and decoding left out, shared among its pictures in proportion to their model calls. '
            f'Samplers mix in a microbatch, which takes as long as its longest picture.'),
        command=shlex.join(['python', '-m', 'launch.lab', *ARGV]),
        versions=f'jaxsd {jaxsd.__version__}, jax {jax.__version__}, numpy {np.__version__}, '
                 f'matplotlib {matplotlib.__version__}, Python {platform.python_version()}; '
                 f'{dtype} on {device.device_kind} ({device.platform}, {platform.machine()}).',
        floor=floor, tolerance=FLAGS.tolerance)


def leader(lines, guidance):
    """A sentence: who is first at this guidance."""
    from jaxsd.lab.sweep import placing
    best = min((line for line in lines if line.guidance == guidance), key=placing)
    if best.needed == float('inf'):
        return f'Guidance {guidance:g}: none stays within an error of {FLAGS.tolerance:g}.'
    return (f'Guidance {guidance:g}: {best.sampler} on {best.schedule} comes within an error of '
            f'{FLAGS.tolerance:g} at the fewest model calls, {best.needed:g}.')


def trace():
    """Draw the picture, and its numbers beside it."""
    from jaxsd.lab import report
    from jaxsd.lab import trace as lab
    from jaxsd.run import Request, picture, resolve
    recipe, path = FLAGS.config, pathlib.Path(FLAGS.out)
    if FLAGS.prompt is None:
        raise ValueError('--prompt is missing: say what to draw, for example --prompt="red apple"')
    if path.suffix != '.png':
        raise ValueError(f'--out={path}: expected a name that ends in .png')
    request = Request(prompt=FLAGS.prompt, seed=FLAGS.seed, **fields(recipe))
    picture.check_folder(path.parent)
    model, name, _ = load(recipe, FLAGS.checkpoint)
    request, = resolve([request], model.config)
    found = lab.trace(model, request)
    numbers = {'model': name, 'request': dataclasses.asdict(request), 'calls': [
        {'call': int(c), 'step': int(n), 'sigma': float(s), 'timestep': float(t)}
        for c, n, s, t in zip(found.call, found.step, found.sigma, found.timestep)]}
    report.write(path, lab.picture(found, request, FLAGS.columns))
    report.write(path.with_suffix('.json'), (json.dumps(numbers, indent=1) + '\n').encode())
    print(path, path.with_suffix('.json'), sep='\n')


def schedule():
    """Search, and write a schedule file."""
    from jaxsd import sampling
    from jaxsd.lab import search
    from jaxsd.run import Request, picture
    from jaxsd.run.resolving import GUIDANCE
    recipe, path = FLAGS.config, pathlib.Path(FLAGS.out)
    if path.suffix != '.json':
        raise ValueError(f'--out={path}: expected a name that ends in .json')
    more, scale = options(FLAGS.options), recipe.guidance or GUIDANCE['']
    requests = [Request(prompt=prompt, seed=seed, guidance=scale, width=recipe.width,
                        height=recipe.height, guidance_options=options(recipe.guidance_options))
                for prompt in FLAGS.prompt for seed in FLAGS.seeds]
    picture.check_folder(path.parent)
    model, name, _ = load(recipe, FLAGS.checkpoint)
    found = search.search(model, requests, FLAGS.steps, FLAGS.method, **more)
    sampling.write_schedule(path, found, model.config.schedule,
                            f'{FLAGS.method} for {name}, guidance {scale:g}')
    for steps, sigmas in found.items():
        print(f'{steps} steps:', ', '.join(f'{sigma:.4g}' for sigma in sigmas))
    print(path)


def run():
    """The command that was typed."""
    try:
        COMMANDS[ARGV[0]]()
    except RuntimeError as error:  # XLA's: most often memory
        raise ValueError(str(error).strip().splitlines()[0]) from error
    except KeyboardInterrupt:
        print('error: interrupted', file=sys.stderr, flush=True)
        os._exit(130)  # the interpreter's own exit would wait for the loop under way


def parse(argv):
    """Take the command off, then parse like launch.generate."""
    command, rest = next(iter(argv[1:]), None), argv[2:]
    if command not in COMMANDS:
        if command in ('-h', '--help', '-help'):
            return FLAGS(argv)
        generate.fail(f'expected a command, {", ".join(COMMANDS)}; found {command!r}', 2)
    define_flags(command)
    return generate.parse([argv[0], *rest])


COMMANDS = {'sweep': sweep, 'trace': trace, 'schedule': schedule}

if __name__ == '__main__':
    app.run(plain_errors(run), flags_parser=parse)
