"""What the files in configs/ have in common. No heavy imports: `--help` must be quick."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def recipe(checkpoint, size, **changes):
    """A generation recipe as a locked ConfigDict; every field is a flag, `--config.steps=30`.

    checkpoint: a folder, a .safetensors file or a Hugging Face Hub id; size: pixels per side.
    """
    config = ConfigDict(dict(
        checkpoint=str(checkpoint),
        dtype='auto',  # float32 on CPU, bfloat16 on accelerators
        prediction=placeholder(str),  # epsilon or v_prediction, where the file cannot tell
        width=size,
        height=size,
        sampler='dpmpp_2m',
        schedule='karras',
        steps=25,
        guidance=7.0,
        eta=placeholder(float),  # noise of ddim and the ancestral samplers
        tile=0,  # decode in tiles of this many pixels per side: less memory; 0: in one piece
    ))
    config.update(changes)
    return config.lock()
