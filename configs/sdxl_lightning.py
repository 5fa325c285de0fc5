"""SDXL-Lightning, 1024 pixels in 2, 4 or 8 steps: --config=sdxl_lightning --checkpoint=FILE, its
steps as --steps=4. The file of one step predicts the picture: --steps=1 --prediction=sample."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('', 1024, steps=4, guidance=1.0, schedule='diffusers',
                  schedule_options='scheduler=EulerDiscrete, timestep_spacing=trailing')
