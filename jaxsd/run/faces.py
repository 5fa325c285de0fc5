"""Faces of a picture restored by a network, as A1111 does after drawing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import images
from jaxsd.config import CodeFormerConfig, GFPGANConfig
from jaxsd.images import faces
from jaxsd.images.opencv import opencv
from jaxsd.images.reading import Picture
from jaxsd.models import codeformer, gfpgan
from jaxsd.run.detectors import Networks, chosen, people
from jaxsd.sampling.choice import check_number
from jaxsd.typing import ImageLike
from jaxsd.weights.model import Network

FINDS = 'openpose_face'  # the kind of run/detectors.py by which faces are found
WEIGHT = 0.5  # CodeFormer's, as its authors have it


def restore_faces(network: Network, image: ImageLike, detectors: Networks,
                  visibility: float = 1.0, fidelity_weight: float | None = None) -> Picture:
    """A picture whose faces are restored -> uint8 [H,W,3] of its size.

    network: of `load_face_restorer`. image: a path, a PIL image or an array. detectors: of
    `load_detector`, by any names or without; OpenPose's body (body_pose_model.pth) and face network
    (facenet.pth) among them. visibility: how much of what is restored shows, 0 to 1.
    fidelity_weight: of CodeFormer, from 0, a face drawn anew, to 1, close to the one there; 0.5
    where it is None; GFPGAN takes none. A face counts whose eyes, nose and corners of the mouth are
    found, 5 pixels between the eyes and more; a picture without any is returned as it is. Each is
    turned upright and brought to the size that the network sees, 512 pixels, and what comes out is
    put in its place. Raises ValueError for other networks or where one is missing, ImportError
    without OpenCV.
    """
    check(network, detectors, visibility, fidelity_weight)
    image = images.read(image)
    height, width = image.shape[:2]
    size, found = network.config.size, image.astype(np.float64)
    weight = float(WEIGHT if fidelity_weight is None else fidelity_weight)
    for points in faces.five_points(people(FINDS, image, detectors), width, height):
        if (way := faces.alignment(points, size)) is not None:
            face = _program(network.params, network.config, faces.cut(image, way, size)[None],
                            weight)
            found = faces.paste(found, np.asarray(face)[0], way)
    return np.round(image + visibility * (found - image)).astype(np.uint8)


def check(network: Network, detectors: Networks, visibility: float = 1.0,
          fidelity_weight: float | None = None) -> None:
    """Raise what `restore_faces` would, before a picture is there."""
    config = getattr(network, 'config', None)
    if not isinstance(config, (GFPGANConfig, CodeFormerConfig)):
        raise ValueError(f'expected a network of load_face_restorer, found {network!r}')
    check_number('visibility', visibility, 0, 1)
    if fidelity_weight is not None:
        check_number('fidelity_weight', fidelity_weight, 0, 1)
        if not isinstance(config, CodeFormerConfig):
            raise ValueError(f'fidelity_weight={fidelity_weight} is for CodeFormer, and this is '
                             'GFPGAN: leave it out')
    chosen(FINDS, detectors)
    opencv('restoring faces')


@functools.partial(jax.jit, static_argnums=1)
def _program(params, config, face, weight):
    """uint8 [1,S,S,3] -> uint8, as the network restores it."""
    x = jnp.asarray(face, jnp.float32) / 127.5 - 1
    found = (codeformer.apply(params, config, x, weight) if isinstance(config, CodeFormerConfig)
             else gfpgan.apply(params, config, x))
    return jnp.round(jnp.clip((found + 1) * 127.5, 0, 255)).astype(jnp.uint8)
