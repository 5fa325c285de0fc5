"""A model with a Hyper-SD LoRA of 2, 4 or 8 steps: --config=hyper_sd --checkpoint=FILE
--lora=NAME=FILE, <lora:NAME:1> in the prompt, its steps as --steps=4. The unified one of 1 to 8
steps: --sampler=tcd --schedule_options="scheduler=TCD" --sampler_options="gamma=1.0"."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('', None, steps=4, guidance=1.0, schedule='diffusers',
                  schedule_options='scheduler=DDIM, timestep_spacing=trailing')
