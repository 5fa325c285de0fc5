"""InstructPix2Pix of SDXL, 768 pixels: --image, and a prompt that says what shall become of it."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('diffusers/sdxl-instructpix2pix-768', size=768, guidance=3.0, image_guidance=1.5)
