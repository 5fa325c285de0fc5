"""Pictures by the thousand: requests from files, times seeds, times a grid, on all devices.

python -m launch.batch --requests=prompts.jsonl --seeds=0-9 --grid=guidance=4,7 --out=runs/a

The same command again makes what is missing. Exit codes: 0 all pictures are there, 1 stopped by an
error, 2 wrong flags, 3 some requests failed, 130 or 143 interrupted by a signal.
"""

import os
import shlex
import signal
import sys
import threading
import time

from absl import app, flags

from jaxsd.recipe import fields

from . import define_processes, engine, generate, join_processes

FLAGS = flags.FLAGS
GALLERY_EVERY = 60  # seconds


def define_flags():
    """Not at import: other mains have flags of these names."""
    engine.define_flags()
    define_plan()
    define_processes()


def define_plan():
    """The flags that say what to make, and where."""
    flags.DEFINE_multi_string('requests', [], 'A file of requests: .jsonl (fields of '
                              'jaxsd.Request), .csv (with a head) or .txt (prompts); repeat.')
    flags.DEFINE_multi_string('prompt', [], 'A prompt, beside or instead of files; repeat.')
    flags.DEFINE_string('negative_prompt', '', 'For requests that have none.')
    flags.DEFINE_multi_string('image_prompt', None, 'Of requests that name none: "net=NAME, '
                              'image=PATH", as of launch.generate; repeat for several.')
    flags.DEFINE_string('wildcards', None, 'A folder of NAME.txt, for __NAME__ in prompts.')
    flags.DEFINE_string('seeds', '0', 'Of requests that name none: 7, 0-99 or 1,5,10-12.')
    flags.DEFINE_multi_string('grid', [], "A field of Request and its values, 'guidance=4,7'; "
                              'repeat for further axes: all combinations are made.')
    flags.DEFINE_string('out', None, "The run's folder; a run that is there goes on.")
    flags.DEFINE_boolean('dry_run', False, 'Print the plan, its cost and memory; make nothing.')
    flags.DEFINE_boolean('skip_bad', False, 'Leave out entries that cannot be read, and record '
                         'them, instead of not starting.')


def run():
    """-> exit code."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's chatter
    requests, bad, axes = plan()
    process, processes = join_processes()
    from jaxsd.batch import runner
    from jaxsd.batch.identity import fingerprint
    maker, identity, how = engine.build(engine.describe(), requests)
    if FLAGS.dry_run:
        return _dry_run(maker, identity, requests, bad)
    folder = open_folder(identity.settings, how, axes, fingerprint(), process)
    keep_bad(folder, bad if process == 0 else ())
    _barrier('config')  # process 0 has cleaned up
    done = finished(told=process == 0)
    _barrier('plan')  # nobody writes before all have read
    jobs = runner.jobs(maker, identity, requests, done)
    mine = runner.in_order(jobs)[process::processes]
    print(f'{len(requests)} requests: {len(done)} pictures are there, {len(jobs)} to make'
          + (f', {len(mine)} of them here' if processes > 1 else ''), file=sys.stderr)
    code = _make(maker, folder, how, mine, process)
    _barrier('end')
    if process == 0:
        from jaxsd.batch import gallery
        print(gallery.write(FLAGS.out))
    return code or 3 * bool(bad)


def plan():
    """What the flags ask for -> requests, entries that cannot be read, the grid's axes."""
    from jaxsd.batch import folder, plan
    defaults = {**fields(FLAGS.config), 'negative_prompt': FLAGS.negative_prompt,
                'wildcards': FLAGS.wildcards,
                'image_prompts': [*map(generate.image_prompt, FLAGS.image_prompt or ())]}
    seeds, axes = plan.seeds(FLAGS.seeds), plan.grid(FLAGS.grid)
    items = [plan.Item({**defaults, 'prompt': text}, '--prompt') for text in FLAGS.prompt]
    bad = []
    for path in FLAGS.requests:
        found = plan.read(path, defaults)
        items, bad = items + found[0], bad + found[1]
    if bad and not FLAGS.skip_bad:
        first = '; '.join(f'{source}: {error}' for source, error in bad[:5])
        raise ValueError(f'{first}{f"; and {len(bad) - 5} more" if len(bad) > 5 else ""}. Nothing '
                         'was started; mend this, or leave it out with --skip_bad')
    if not items:
        raise ValueError('no requests: expected --requests=FILE or --prompt="red apple"')
    if not FLAGS.out and not FLAGS.dry_run:
        raise ValueError("--out is missing: expected the run's folder, such as --out=runs/a")
    if FLAGS.out:
        folder.check(FLAGS.out)
    return plan.expand(items, seeds, axes), bad, axes


def finished(told=True):
    """The ids of the pictures that are there; what is damaged is told, and made again."""
    from jaxsd.batch import folder
    troubles = []
    done = folder.finished(FLAGS.out, troubles)
    for trouble in troubles[:5] if told else ():
        print(trouble, file=sys.stderr)
    if troubles and told:
        print(f'{len(troubles)} damaged pictures and lines: what is missing is made again; '
              f'python -m launch.verify {shlex.quote(FLAGS.out)} --repair forgets them',
              file=sys.stderr)
    return done


def open_folder(settings, how, axes, fingerprint, process=0):
    """The run's Folder, with what its pictures have in common in config.json."""
    from jaxsd.batch.folder import Folder
    return Folder(FLAGS.out, {
        'settings': settings, 'grid': axes, 'how': how, 'model': how['model'],
        'command': shlex.join(sys.orig_argv), 'fingerprint': fingerprint}, process)


def keep_bad(folder, bad):
    """Record the entries that were left out."""
    for source, error in bad:
        print(f'left out: {source}: {error}', file=sys.stderr)
        folder.fail(f'{source}', error, {'request': {}})


def _make(maker, folder, how, jobs, process):
    """Make the pictures, with a bar, and a gallery now and then -> exit code."""
    from tqdm import tqdm

    from jaxsd.batch import gallery
    from jaxsd.batch.runner import Runner
    lock, caught, shown = threading.Lock(), [], time.monotonic()

    def on_done(job, error):
        nonlocal shown
        with lock:
            if process == 0 and time.monotonic() > shown + GALLERY_EVERY:
                gallery.write(folder.path)
                shown = time.monotonic()
            if error is not None:
                bar.write(f'failed: {job.request.prompt!r}, seed {job.request.seed}: {error}',
                          file=sys.stderr)
                bar.set_postfix(failed=runner.failed, refresh=False)
            bar.update()

    def stop(number, frame):
        if caught:
            os._exit(128 + number)
        caught.append(number)
        runner.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    runner = Runner(maker, folder, how, on_done)
    try:
        with tqdm(total=len(jobs), unit='picture', smoothing=0.05) as bar:
            made, failed = runner.run(jobs)
    except OSError as error:
        raise OSError(f'{error}: {runner.made} pictures made by now are safe; when the folder can '
                      'be written again, the same command makes the rest') from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        folder.close()
    print(f'{made} pictures made, {failed} failed', file=sys.stderr)
    return 128 + caught[0] if caught else 3 * bool(failed)


def _barrier(name):
    """Wait for the other processes."""
    import jax
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        multihost_utils.sync_global_devices(name)


def _dry_run(maker, identity, requests, bad):
    """Print what there is to do, and what it takes -> exit code."""
    from jaxsd.batch import cost, runner
    done = finished() if FLAGS.out else set()
    jobs = runner.jobs(maker, identity, requests, done)
    failing = [job for job in jobs if job.error is not None]
    print(f'{len(requests)} requests, {len(done)} pictures are there, {len(jobs)} to make'
          f'{f", {len(failing)} of which cannot be made" if failing else ""}')
    for job in failing[:5]:
        print(f'  {job.request.prompt!r}, seed {job.request.seed}: {job.error}')
    for source, error in bad:
        print(f'left out: {source}: {error}')
    for kinds in sorted({job.kinds for job in jobs if job.error is None}):
        some = [job for job in jobs if job.kinds == kinds]
        before, call, memory = cost.of(maker, some[0].request)
        calls = sum(job.calls for job in some)
        work = (len(some) * before + calls * call) / 1e12
        at_once = maker.replicas[0].width(kinds[0].slots) * len(maker.lanes)
        print(f'{kinds[0].width}x{kinds[0].height}, program '
              f'{"+".join(kind.shapes for kind in kinds)}: {len(some)} pictures, {at_once} '
              f'at a time; {calls} model calls, {work:.4g} TFLOP; {memory / 2**30:.2f} GiB on each '
              'device')
    return 3 * bool(bad or failing)


main = generate.guarded(run)

if __name__ == '__main__':
    define_flags()
    app.run(main, flags_parser=generate.parse)
