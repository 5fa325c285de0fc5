"""SD-Turbo, 512 pixels in 1 to 4 steps, without guidance; its folder says how it is sampled."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('stabilityai/sd-turbo', size=512, steps=1, guidance=1.0)
