"""Stable Diffusion 1.4 (CompVis), 512 pixels."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('CompVis/stable-diffusion-v1-4', size=512)
