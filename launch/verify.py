"""Make some pictures of a run again, and compare them to the bit.

python -m launch.verify runs/a --sample=16

Prints a line for each picture that is not as its run's manifest says: its file, or what this
machine makes of it; and for each damaged line of the manifest. Exit codes: 0 all are equal, 1 some
are not.

python -m launch.verify runs/a --repair

Reads all pictures instead, makes none, and forgets those that are not as they were written, and
damaged lines; the command of the run makes them again.
"""

import os
import pathlib
import random
import sys

from absl import app, flags

from . import define_plugin_flag, engine, generate

FLAGS = flags.FLAGS


def define_flags():
    """Not at import: other mains have flags of these names."""
    define_plugin_flag()
    flags.DEFINE_string('sample', '16', 'How many pictures to make again, or all.')
    flags.DEFINE_integer('seed', 0, 'Which ones: other seeds take others.')
    flags.DEFINE_boolean('repair', False, 'Forget damaged pictures and lines, and make none.')


def run(path):
    """-> exit code."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's chatter
    from jaxsd.batch import folder, runner
    from jaxsd.run import Request, infotext
    config, path = folder.read_config(path), pathlib.Path(path)
    if FLAGS.repair:
        return _repair(path, config)
    lines = []
    records = sorted((r for r in folder.read(path, lines).values() if 'file' in r),
                     key=lambda r: r['id'])
    if FLAGS.sample != 'all':
        if not FLAGS.sample.isdigit():
            raise ValueError(f'--sample={FLAGS.sample}: expected a whole number, or all')
        records = random.Random(FLAGS.seed).sample(records, min(int(FLAGS.sample), len(records)))
    if 'how' not in config:
        raise ValueError(f'{path}: its config.json does not say how the model was loaded, as '
                         'launch.batch writes it')
    if not records:
        raise ValueError(f'{path}: no picture is there yet')
    wrong, requests, kept, changes = [], [], [], set()
    for record in records:
        if damage := folder.damage(path, record, whole=True):
            wrong.append(damage)
            continue
        try:
            past = infotext.read(path / record['file'])
            past.check_files()
            requests.append(Request(**past.fields))
            kept.append(record)
            changes.add(infotext.differences(past.run))
        except (ValueError, OSError) as error:
            wrong.append(f'{record["file"]}: {error}')
    # The files of --plugin alone are run, and not those that the folder names.
    maker, identity, _ = engine.build({**config['how'], 'plugin': []}, requests)
    for changed in sorted(changes - {''}):
        print(f'note: {changed}', file=sys.stderr)
    for name, value in identity.settings.items():
        if value != config['settings'].get(name):
            print(f'note: {name} was {config["settings"].get(name)}, is {value}', file=sys.stderr)
    jobs = runner.in_order(runner.jobs(maker, identity, requests))
    size = 4 * maker.capacity  # so that not all pictures are in memory
    for part in (jobs[i:i + size] for i in range(0, len(jobs), size)):
        for job, future in [(job, runner.begin(maker, job)) for job in part]:
            image, record = runner.outcome(future), kept[job.number]
            if isinstance(image, Exception):
                wrong.append(f'{record["file"]}: {image}')
            elif folder.pixels(image) != record['pixels']:
                wrong.append(f'{record["file"]}: made again it is another picture')
    for line in lines + wrong:
        print(line)
    print(f'{len(records) - len(wrong)} of {len(records)} pictures are equal to the bit')
    return 1 if lines or wrong else 0


def _repair(path, config):
    from jaxsd.batch import folder, gallery
    damaged = folder.repair(path)
    for line in damaged:
        print(line)
    gallery.write(path)
    print(f'{len(damaged)} damaged pictures and lines are forgotten'
          + (f'; this makes them again: {config.get("command")}' if damaged else ''))
    return 0


def main(argv):
    """Entry point."""
    if len(argv) != 2:
        generate.fail("expected a run's folder: python -m launch.verify runs/a", 2)
    return generate.guarded(lambda: run(argv[1]))(argv[:1])


if __name__ == '__main__':
    define_flags()
    app.run(main)
