"""unCLIP: an image as a vector that the U-Net takes, its embedding by CLIP with some noise."""

import weakref
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from jaxsd import images, sampling
from jaxsd.models.layers import timestep_embedding
from jaxsd.run.image_prompts import look_at
from jaxsd.run.request import Request
from jaxsd.weights import Model, Network

NOISE = np.uint32(2**31)  # the call number of the embedding's noise, where no other is
_encoders = weakref.WeakKeyDictionary()  # {Model: its image encoder}, whose features are kept


def labels(model: Model, requests: Sequence[Request],
           prompts: np.ndarray) -> Float32[np.ndarray, 'B P E']:
    """What the U-Net is given for each text of the pictures: of prompts the image's embedding,
    normalised, noised to the timestep `class_label` and back, and sinusoids of that; of others
    zeros. As diffusers' StableUnCLIPImg2ImgPipeline. prompts: bool [P].

    Raises ValueError for a noise level that there is not.
    """
    config, params = model.config, model.params
    steps = config.image_noise.num_train_timesteps
    if (encoder := _encoders.get(model)) is None:
        encoder = _encoders[model] = Network(config.image_encoder, params['image_encoder'])
    mean, std = (np.asarray(params['image_normalizer'][name], np.float32)[0]
                 for name in ('mean', 'std'))
    abar, rows = sampling.alphas_cumprod(config.image_noise), []
    for r in requests:
        if r.negative_class_label is not None:
            raise ValueError('negative_class_label: this model has no classes; expected None')
        level = r.class_label or 0
        if level >= steps:
            raise ValueError(f'class_label={level}: expected a noise level of the image, 0 to '
                             f'{steps - 1}')
        embedding = look_at(encoder, images.read(r.image)).embeds
        noise = np.asarray(sampling.draw(sampling.keys([r.seed]), NOISE, embedding.shape))[0]
        signal, sigma = np.sqrt(abar[level]), np.sqrt(1 - abar[level])
        noised = (signal * (embedding - mean) / std + sigma * noise) * std + mean
        row = np.concatenate([noised, np.asarray(timestep_embedding(level, len(noised)))])
        rows.append(np.where(prompts[:, None], row, 0))
    return np.array(rows, np.float32)
