"""Stable Diffusion 1.5, 512 pixels; the mirror of the release that runwayml withdrew."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('stable-diffusion-v1-5/stable-diffusion-v1-5', size=512)
