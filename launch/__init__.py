"""Command lines: absl mains over jaxsd, each run with `python -m launch.<name>`."""

import logging

# absl prints INFO to stderr, where jax reports every backend that this machine does not have.
logging.getLogger('jax').setLevel(logging.WARNING)
