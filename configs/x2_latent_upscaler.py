"""The x2 latent upscaler: --image twice as large, with the prompt that it was made of."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('stabilityai/sd-x2-latent-upscaler', size=None, guidance=1.0, steps=20)
