"""LCM Dreamshaper v7, 768 pixels in 1 to 8 steps; the guidance scale is an input of its U-Net."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('SimianLuo/LCM_Dreamshaper_v7', size=768, steps=4, guidance=8.0)
