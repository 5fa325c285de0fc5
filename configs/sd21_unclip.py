"""unCLIP of Stable Diffusion 2.1, 768 pixels: variations of --image, with a prompt or without."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('sd2-community/stable-diffusion-2-1-unclip', size=768, guidance=10.0)
