"""A second pass at a larger size: the first one's picture enlarged, and drawn over ("hires fix").

The second pass is image to image of its own, with the first pass's picture; engine.py runs both as
stages of one picture.
"""

import numpy as np
from PIL import Image

from jaxsd import images
from jaxsd.models import resample
from jaxsd.run.inputs import Inputs
from jaxsd.run.request import UPSCALERS, Hires, Request
from jaxsd.run.upscale import to_size
from jaxsd.sampling.choice import unknown
from jaxsd.weights.model import Model, Network


def passes(request: Request) -> list[Request]:
    """A resolved request -> those of its passes: itself, or with `hires` two without. The second
    one's image stands for what the first one comes to, black until then."""
    hires = request.hires
    if hires is None:
        return [request]
    width, height = request.final_size
    assert isinstance(hires, Hires)
    own = {name: getattr(hires, name) for name in (
        'steps', 'sampler', 'schedule', 'guidance', 'prompt', 'negative_prompt')}
    first = request.replace(hires=None)
    if own['sampler'] is not None and own['sampler'] != request.sampler:
        first = first.replace(eta=None)  # which the other sampler may not have
        own['sampler_options'] = {}
    if own['schedule'] is not None and own['schedule'] != request.schedule:
        own['schedule_options'] = {name: value for name, value in request.schedule_options.items()
                                   if name == 'convention'}
    return [request.replace(hires=None), first.replace(
        **{name: value for name, value in own.items() if value is not None}, aspect=None,
        width=width, height=height, image=np.zeros((height, width, 3), np.uint8),
        strength=hires.strength)]


def network(upscaler: str, model: Model) -> Network | None:
    """The network that an upscaler is; None for UPSCALERS. Raises ValueError for one that the model
    does not have."""
    if upscaler in UPSCALERS:
        return None
    if upscaler not in model.upscalers:
        raise ValueError(f'{unknown("upscaler", upscaler, [*UPSCALERS, *model.upscalers])}; a '
                         'network is given as model.replace(upscalers={name: '
                         'jaxsd.load_upscaler(path)}), --upscalers=NAME=PATH')
    return model.upscalers[upscaler]


def in_latents(upscaler: str) -> bool:
    """Whether an upscaler enlarges latents; others enlarge pixels."""
    return upscaler in UPSCALERS and upscaler.startswith('latent')


def second(inputs: Inputs, upscaler: str, found: np.ndarray,
           net: Network | None = None) -> Inputs:
    """Inputs of the second of `passes` -> those that start from `found`: the first pass's latents
    [1,h,w,L], or its picture uint8 [H,W,3], as the upscaler needs. net: of `network`."""
    if in_latents(upscaler):
        _, rows, columns, _ = inputs.init_weight.shape
        return inputs._replace(init_image=None, init_latents=enlarge(
            np.asarray(found[0], np.float32), columns, rows, upscaler)[None])
    _, height, width, _ = inputs.init_image.shape
    image = enlarge(found, width, height, upscaler) if net is None else (
        to_size(net, found, width, height))
    return inputs._replace(init_image=image[None])


def enlarge(image: np.ndarray, width: int, height: int, upscaler: str) -> np.ndarray:
    """A picture uint8 or latents float32 [h,w,C], at width x height; what is too much at two sides
    is cut off. upscaler: of request.UPSCALERS; those of latents are torch's interpolation."""
    if upscaler == 'lanczos':
        return images.fit(image, width, height, 'crop')
    rows, columns = image.shape[:2]
    scale = max(width / columns, height / rows)
    if upscaler == 'nearest':
        left, top = (columns - width / scale) / 2, (rows - height / scale) / 2
        return np.asarray(Image.fromarray(image).resize(
            (width, height), Image.Resampling.NEAREST, (left, top, columns - left, rows - top)))
    kind = upscaler.removeprefix('latent').removeprefix('_') or 'bilinear'
    down, across = (resample.weights(kind, old, new, new / scale)
                    for old, new in ((rows, height), (columns, width)))
    return np.einsum('yh,xw,hwc->yxc', down, across, image, optimize=True).astype(np.float32)
