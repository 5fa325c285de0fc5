"""Stable Diffusion 2 depth to image, 512 pixels; a mirror of the withdrawn release."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('sd2-community/stable-diffusion-2-depth', size=512)
