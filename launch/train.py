"""Train: `python -m launch.train --config=configs/train_lora.py --config.model=sd15.safetensors`.

What is trained, on which pictures and how is the recipe's: fine-tuning (jaxsd.train.finetune), or
with stages a small model from scratch (jaxsd.train.from_scratch). A training goes on where it was
from its folder, `out`; `export`, where the result goes, is never written over unless this run wrote
it or --overwrite says so. SIGTERM saves and ends with exit code 143.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from . import define_processes, generate, join_processes


def define_flags():
    """Not at import: other mains have flags of these names."""
    config_flags.DEFINE_config_file(
        'config', None, 'Training recipe, a file or a name such as train_lora; every field is a '
        'flag too, --config.train.steps=100. They are:\n' + fields())
    flags.DEFINE_boolean('overwrite', False, 'The export may be written over.')
    flags.DEFINE_boolean('strict', False, 'A bad picture or caption ends the training.')
    define_processes()
    flags.DEFINE_boolean('memory', False, 'Only say what memory a step needs on each device here; '
                         'weights are not read, and config.model may be a version, as sdxl.')


def fields():
    """The fields of recipes for fine-tuning, a line for each section: names with their defaults,
    and what else they may be."""
    from jaxsd.train.config import METHODS, SECTIONS, BaseConfig
    lines = []
    for section, cls in {'': BaseConfig, **METHODS, **SECTIONS}.items():
        shown = []
        for field in dataclasses.fields(cls):
            values = field.metadata.get('choices', (field.default,))
            values = dict.fromkeys(repr(v) if v != '' else "''" for v in (field.default, *values))
            shown.append(f'{field.name}={"|".join(values)}')
        lines.append(f'{section or "(the recipe itself)"}: {", ".join(shown)}')
    return '\n'.join(lines)


def check(c, overwrite=False):
    """Raise ValueError or ImportError for what would end a training later, before it begins."""
    for name in ('matplotlib', 'grain', 'tensorboardX'):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"training needs {name}: pip install 'jaxsd[train]'")
    if 'stages' not in c and 'method' not in c:
        raise ValueError('--config: expected a training recipe, such as configs/train_lora.py')
    if 'stages' in c:
        from jaxsd.train import from_scratch
        from jaxsd.train.finetune import check_export
        check_export(c, overwrite)
        for name, known in ('skip', c.stages), ('start_parts', from_scratch.START_PARTS):
            if unknown := set(c[name]) - set(known):
                raise ValueError(f'{name}: expected of {", ".join(known)}; found '
                                 + ', '.join(map(repr, sorted(unknown))))
        for name, stage in c.stages.items():
            if stage.optimizer.warmup >= stage.train.steps:
                raise ValueError(f'stages.{name}.optimizer.warmup={stage.optimizer.warmup}: '
                                 f'expected less than its {stage.train.steps} steps')


def print_memory(c):
    """What a step needs on each device, and whether that is there."""
    from jaxsd.train import config, memory
    if 'stages' in c:
        raise ValueError('--memory: expected a recipe for fine-tuning, found one with stages')
    found = memory.estimate(config.read(c))
    print(f'trained: {found.parameters:,} parameters')
    for name in ('trainable', 'optimizer', 'frozen', 'temporary', 'total'):
        print(f'{name:9} {getattr(found, name) / 2**30:7.2f} GiB')


def keep_freed_memory():
    """On Linux, leave freed memory with this process; to be called before JAX is imported.

    A step on CPU takes gigabytes and frees them. Given back, each of their pages is made anew in
    the next step: a quarter of the time, where all weights are trained.
    """
    if sys.platform == 'linux':
        with contextlib.suppress(OSError, AttributeError):  # musl has none
            # No mappings, which are given back; no trimming; and one arena, as others map.
            for option, value in ((-4, 0), (-1, -1), (-8, 1)):
                ctypes.CDLL(None).mallopt(option, value)


def run():
    """Train the recipe."""
    keep_freed_memory()
    c = flags.FLAGS.config
    check(c, flags.FLAGS.overwrite)
    logging.set_verbosity(logging.WARNING)  # orbax has twenty lines to say of each checkpoint
    join_processes()
    from jaxsd.train import finetune, from_scratch, loop
    try:
        if flags.FLAGS.memory:
            print_memory(c)
        elif 'stages' in c:
            finetune.export(from_scratch.train(c), c.export, dtype='float16')
            finetune.exported(c)
        else:
            finetune.fine_tune(c, flags.FLAGS.overwrite, flags.FLAGS.strict)
    except loop.Preempted as ended:
        print(ended, file=sys.stderr)
        return 143
    return 0


if __name__ == '__main__':
    define_flags()
    app.run(generate.guarded(run), flags_parser=functools.partial(generate.parse, training=True))
