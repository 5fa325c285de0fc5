"""Command lines: absl mains over jaxsd, each run with `python -m launch.<name>`."""

import logging
import sys

# absl prints INFO to stderr, where jax reports every backend that this machine does not have.
logging.getLogger('jax').setLevel(logging.WARNING)


def printable(text):
    """Text for a terminal: on one line, with escapes for what a terminal would obey."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode()
                   for c in ' '.join(str(text).split()))


def plain_errors(run):
    """`run` as an absl main: one clear line and exit code 1 for whatever the user can get wrong."""
    def main(argv):
        try:
            if len(argv) > 1:
                raise ValueError(f'unexpected argument {argv[1]!r}')
            run()
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            sys.exit(f'error: {printable(error)}')

    return main
