"""Mains run as a user runs them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def environment(**more):
    """The environment of a main on CPU."""
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **more}


def run_main(*arguments, **more):
    """-> exit code, stdout, stderr of python with these arguments, on CPU; more: environment."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, text=True, capture_output=True,
        timeout=600, env=environment(**more))
    return done.returncode, done.stdout, done.stderr


def run_code(code, *arguments, **more):
    """-> stdout of a Python program, which must succeed."""
    status, out, error = run_main('-c', code, *arguments, **more)
    assert status == 0, error
    return out
