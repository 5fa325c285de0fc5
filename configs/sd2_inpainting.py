"""Stable Diffusion 2 inpainting, 512 pixels; a mirror of the withdrawn release."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('sd2-community/stable-diffusion-2-inpainting', size=512)
