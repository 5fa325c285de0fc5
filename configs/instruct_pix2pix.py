"""InstructPix2Pix of 1.5: --image, and a prompt that says what shall become of it."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('timbrooks/instruct-pix2pix', size=512, guidance=7.5, image_guidance=1.5)
