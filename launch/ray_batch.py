"""launch.batch on a Ray cluster: as many actors as there is room for, coming and going.

python -m launch.ray_batch --requests=prompts.jsonl --seeds=0-9 --out=runs/a --actors=1-8 --gpus=1

The same plans, folders and pictures. Each actor holds the model on its own devices; Ray Data hands
out some of the jobs at a time, holds them back where the folder cannot keep up, and repeats those
of actors that are lost. The driver alone writes, so that the hosts need no common file system for
pictures. Needs the `ray` extra.
"""

import logging
import re
import sys

from absl import app, flags

from . import batch, engine, generate

FLAGS = flags.FLAGS


def define_flags():
    """Not at import: other mains have flags of these names."""
    engine.define_flags()
    batch.define_plan()
    flags.DEFINE_string('actors', '1', 'How many actors, or the fewest and the most: 1-8.')
    flags.DEFINE_float('gpus', 0, 'GPUs of an actor.')
    flags.DEFINE_float('cpus', 1, 'CPUs of an actor.')
    flags.DEFINE_string('address', None, "The cluster's; a local one is started without it.")


class Maker:
    """An actor: makes some jobs at a time."""

    def __init__(self, how):
        self.engine, _, self.how = engine.build(how)

    def __call__(self, row):
        """One row of pickled jobs -> rows of pickled (job, encoded picture or error)."""
        import pickle

        from jaxsd.batch import runner
        begun = [(job, runner.begin(self.engine, job)) for job in pickle.loads(row['jobs'])]
        found = [(job, runner.outcome(future)) for job, future in begun]
        return [{'made': pickle.dumps((job, image if isinstance(image, Exception) else
                                       runner.encode(job, image, self.how)))}
                for job, image in found]


def survey(how, requests, done):
    """On a host like the actors': jobs in parts, the run's settings, what it came to."""
    from jaxsd.batch import runner
    from jaxsd.batch.identity import fingerprint
    maker, identity, how = engine.build(how, requests)
    jobs, size = runner.in_order(runner.jobs(maker, identity, requests, done)), 4 * maker.capacity
    parts = [jobs[i:i + size] for i in range(0, len(jobs), size)]
    return parts, identity.settings, how, fingerprint()


def run():
    """-> exit code."""
    try:
        import ray
    except ImportError:
        raise ImportError("launch.ray_batch needs Ray: pip install 'jaxsd[ray]'") from None
    import pickle

    from tqdm import tqdm

    from jaxsd.batch import gallery, runner
    requests, bad, axes = batch.plan()
    ends = re.fullmatch(r'(\d+)(?:-(\d+))?', FLAGS.actors)
    fewest, most = (int(end or ends[1]) for end in ends.groups()) if ends else (0, 0)
    if not 0 < fewest <= most:
        raise ValueError(f'--actors={FLAGS.actors}: expected a number, or the fewest and the most '
                         'of them: 1-8')
    ray.init(FLAGS.address, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger('ray.data').setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is ours
    done = batch.finished()
    resources = {'num_cpus': FLAGS.cpus, 'num_gpus': FLAGS.gpus}
    packed, settings, how, prints = ray.get(
        ray.remote(**resources)(survey).remote(engine.describe(), requests, done))
    here = batch.open_folder(settings, how, axes, prints)
    batch.keep_bad(here, bad)
    count = sum(map(len, packed))
    print(f'{len(requests)} requests: {len(done)} pictures are there, {count} to make',
          file=sys.stderr)
    failed = 0
    if packed:
        rows = ray.data.from_items([{'jobs': pickle.dumps(jobs)} for jobs in packed],
                                   override_num_blocks=len(packed))
        made = rows.flat_map(
            Maker, fn_constructor_kwargs={'how': how},
            compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most), **resources)
        with tqdm(total=count, unit='picture', smoothing=0.05) as bar:
            for row in made.iter_rows():
                job, result = pickle.loads(row['made'])
                if isinstance(result, Exception):
                    here.fail(job.id, result, runner.record(job))
                    failed += 1
                    bar.write(f'failed: {job.request.prompt!r}: {result}', file=sys.stderr)
                else:
                    here.add(job.id, result, runner.record(job))
                bar.update()
    here.close()
    print(gallery.write(FLAGS.out))
    return 3 * bool(failed or bad)


main = generate.guarded(run)

if __name__ == '__main__':
    define_flags()
    app.run(main, flags_parser=generate.parse)
