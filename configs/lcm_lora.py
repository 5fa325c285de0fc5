"""A model with an LCM-LoRA, 2 to 8 steps: --config=lcm_lora --checkpoint=FILE --lora=NAME=FILE, and
<lora:NAME:1> in the prompt. A little guidance, up to 2, is possible."""

from jaxsd.recipe import recipe


def get_config():
    """The recipe."""
    return recipe('', None, steps=4, guidance=1.0, schedule='diffusers',
                  schedule_options='scheduler=LCM')
