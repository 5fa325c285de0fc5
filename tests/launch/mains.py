"""Mains run as a user runs them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_main(*arguments):
    """-> exit code, stdout, stderr of python with these arguments, on CPU."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, text=True, capture_output=True,
        timeout=600, env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'})
    return done.returncode, done.stdout, done.stderr
