"""Stable Diffusion's x4 upscaler: a picture of 128 pixels and a prompt give one of 512."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('stabilityai/stable-diffusion-x4-upscaler', size=None, guidance=9.0)
