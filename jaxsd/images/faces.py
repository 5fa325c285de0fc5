"""Faces cut out of a picture upright, 512 pixels large as FFHQ has them, and pasted back.

Points, colours and the width of the seam are those of facexlib's FaceRestoreHelper, which GFPGAN's
own program and A1111 use.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from jaxsd.images.opencv import opencv
from jaxsd.images.pose import Person
from jaxsd.images.reading import Picture

# Where FFHQ's faces, of 512 pixels, have their eyes, the tip of the nose and the mouth's corners,
# each pair from left to right in the picture.
TEMPLATE = np.array([[192.98138, 239.94708], [318.90277, 240.1936], [256.63416, 314.01935],
                     [201.26117, 371.41043], [313.08905, 371.15118]])
# The same among the points of a Person's face: a mean of those of each eye's rim.
POINTS = (slice(36, 42), slice(42, 48), slice(30, 31), slice(48, 49), slice(54, 55))
BEYOND = (132, 133, 135)  # the colour of what lies outside of the picture
APART = 5  # pixels between the eyes of the smallest face that is restored

Affine = Float[np.ndarray, '2 3']


def five_points(people: Iterable[Person], width: int,
                height: int) -> list[Float[np.ndarray, '5 2']]:
    """Eyes, nose and mouth's corners in pixels, of the people whose faces have all of them and are
    not too small or turned away."""
    found = []
    for person in people:
        face = np.asarray(person.face)
        if len(face) < POINTS[-1].stop:
            continue
        rims = [face[part][~np.isnan(face[part]).any(1)] for part in POINTS]
        if all(len(rim) for rim in rims):
            points = np.array([rim.mean(0) for rim in rims]) * [width, height]
            if np.hypot(*(points[1] - points[0])) >= APART:
                found.append(points)
    return found


def alignment(points: Float[np.ndarray, '5 2'], size: int) -> Affine | None:
    """The rotation, scale and move that bring five points to FFHQ's in a face of `size` pixels;
    least median of squares: one of them may be wrong. None for points that say none."""
    cv2 = opencv('restoring faces')
    return cv2.estimateAffinePartial2D(np.asarray(points, np.float64), TEMPLATE * (size / 512),
                                       method=cv2.LMEDS)[0]


def cut(image: Picture, way: Affine, size: int) -> Picture:
    """The face that `alignment` leads to, uint8 [size,size,3]."""
    cv2 = opencv('restoring faces')
    return cv2.warpAffine(image, way, (size, size), borderMode=cv2.BORDER_CONSTANT,
                          borderValue=BEYOND)


def paste(image: Float[np.ndarray, 'H W 3'], face: Picture,
          way: Affine) -> Float[np.ndarray, 'H W 3']:
    """A picture with a face of `cut` put back: its seam is a tenth of its side from its edge and
    blurred over as much."""
    cv2 = opencv('restoring faces')
    size, back = image.shape[1::-1], cv2.invertAffineTransform(way)
    there = cv2.warpAffine(np.ones(face.shape[:2], np.float32), back, size)
    there = cv2.erode(there, np.ones((2, 2), np.uint8))
    edge = 2 * max(1, int(there.sum() ** 0.5) // 20)
    mask = cv2.erode(there, np.ones((edge, edge), np.uint8))
    mask = cv2.GaussianBlur(mask, (edge + 1, edge + 1), 0)[..., None]
    return mask * (there[..., None] * cv2.warpAffine(face, back, size)) + (1 - mask) * image
