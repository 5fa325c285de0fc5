"""The emoji model of this repository: shipped, no download."""

import pathlib

from jaxsd.recipe import recipe

CHECKPOINT = pathlib.Path(__file__).resolve().parent.parent / 'checkpoints' / 'emoji'


def get_config():
    """The recipe."""
    return recipe(CHECKPOINT, size=64, dtype='float32', steps=20, guidance=2.0)
