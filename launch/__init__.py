"""Command lines: absl mains over jaxsd, each run with `python -m launch.<name>`."""

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import re
import sys

from absl import flags

# absl prints INFO to stderr, where jax reports every backend that this machine does not have.
logging.getLogger('jax').setLevel(logging.WARNING)

# Python looks for garbage whenever 700 more objects are alive. Tracing makes millions that stay: an
# eighth of a start went there.
gc.set_threshold(50_000, 10, 10)

# glibc keeps what threads free apart for each of them, and JAX has many: 10,000 pictures of the
# emoji model came to 3.5 GB, with two such arenas to 0.7.
if sys.platform == 'linux':
    with contextlib.suppress(OSError, AttributeError):  # musl has none
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX


def printable(text):
    """Text for a terminal: on one line, with escapes for what a terminal would obey."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode()
                   for c in ' '.join(str(text).split()))


def keep_programs(folder=None):
    """Have JAX keep compiled programs in a folder, where it is not imported yet; '': do not.

    None: jaxsd/programs in the user's cache folder. At most 4 GiB, those used least go first. Apart
    for each kind of processor, for which XLA compiles; what JAX_COMPILATION_CACHE_DIR says wins.
    """
    if 'jax' in sys.modules or folder == '':
        return
    home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    try:
        text = pathlib.Path('/proc/cpuinfo').read_text()
        processor = re.search('^(flags|Features).*$', text, re.M)[0]
    except (OSError, TypeError):
        processor = platform.processor()
    kind = f'{platform.machine()}-{hashlib.sha256(processor.encode()).hexdigest()[:8]}'
    folder = pathlib.Path(folder or pathlib.Path(home) / 'jaxsd' / 'programs').expanduser() / kind
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(2**32))


def define_plugin_flag():
    """Of the mains that draw pictures, or measure how they are drawn."""
    flags.DEFINE_multi_string('plugin', [], 'A Python file with samplers, schedules or guidance of '
                              'your own, which is run: see docs/plugins.md; repeat for several.')


def load_plugins():
    """What --plugin names, where a main has it, and what installed packages offer."""
    paths = flags.FLAGS['plugin'].value if 'plugin' in flags.FLAGS else None
    if paths is not None and (paths or importlib.metadata.entry_points(group='jaxsd.plugins')):
        from jaxsd.sampling import plugins  # JAX: only where it is needed
        plugins.load_plugins(paths)


def define_processes():
    """Of the mains that run as several processes."""
    flags.DEFINE_boolean('distributed', False, 'One of several processes, found by JAX: Slurm, '
                         'Open MPI, Kubernetes, TPU pods; elsewhere give the next three too.')
    flags.DEFINE_string('coordinator_address', None, "Process 0's host:port.")
    flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
    flags.DEFINE_integer('process_id', None, 'Which one this is, from 0.')


def join_processes():
    """Become one of several processes, where that was asked for -> which, of how many."""
    import jax
    c = flags.FLAGS
    if not c.distributed and c.num_processes is None:
        return 0, 1
    jax.distributed.initialize(c.coordinator_address, c.num_processes, c.process_id)
    return jax.process_index(), jax.process_count()


def read_pictures(paths, out):
    """The files that a command line names -> [(name without its ending, uint8 [H,W,3])], and the
    folder `out` for what is made of them, in which their names tell them apart."""
    stems = [pathlib.Path(path).stem for path in paths]
    if not paths or len(set(stems)) < len(stems):
        raise ValueError(f'pictures: expected at least one, of different names; found '
                         f'{", ".join(paths) or "none"}')
    from jaxsd import images
    from jaxsd.run import picture
    return list(zip(stems, [images.read(path) for path in paths])), picture.check_folder(out)


def plain_errors(run):
    """`run` as an absl main: one clear line and exit code 1 for whatever the user can get wrong."""
    def main(argv):
        try:
            if len(argv) > 1:
                raise ValueError(f'unexpected argument {argv[1]!r}')
            keep_programs()
            load_plugins()
            run()
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            sys.exit(f'error: {printable(error)}')

    return main
