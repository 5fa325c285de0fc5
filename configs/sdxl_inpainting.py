"""Stable Diffusion XL inpainting 0.1, 1024 pixels."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('diffusers/stable-diffusion-xl-1.0-inpainting-0.1', size=1024, steps=30)
