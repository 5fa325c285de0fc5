"""Stable Diffusion XL 1.0 base, 1024 pixels."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('stabilityai/stable-diffusion-xl-base-1.0', size=1024, steps=30, guidance=6.0)
