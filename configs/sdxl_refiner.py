"""Stable Diffusion XL 1.0 refiner, 1024 pixels, from noise; base ++ refiner is to come."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('stabilityai/stable-diffusion-xl-refiner-1.0', size=1024, steps=30, guidance=6.0)
