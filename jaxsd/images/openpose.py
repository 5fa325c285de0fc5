"""People from what OpenPose's networks see: peaks of points, joined along part affinity fields.

Cao et al. 2018 (https://arxiv.org/abs/1812.08008), with the numbers of pytorch-openpose, which
lllyasviel/ControlNet and controlnet_aux have. A network is a function of a picture, uint8 [H,W,3]
with sides that are multiples of 8, to its maps, float32 [H/8,W/8,C], see models/detector.py.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32

from jaxsd.images.opencv import opencv
from jaxsd.images.pose import LIMBS, Person
from jaxsd.images.reading import Picture

See = Callable[[Picture], Float32[np.ndarray, 'h w C']]

SIZE = 368  # pixels of the pictures that the networks were trained on; bodies are seen at half
# Beside the limbs that are drawn, from the shoulders to the ears; and where the field of each, a
# way (x, y), stands among the 38 maps.
JOINTS = [*LIMBS, (2, 16), (5, 17)]
FIELDS = [12, 20, 14, 16, 22, 24, 0, 2, 4, 6, 8, 10, 28, 30, 34, 32, 36, 18, 26]
POINT, FIELD = 0.1, 0.05  # the least peak, and the least field along a limb
PARTS, SCORE = 4, 0.4  # the fewest points of a person, and the least mean of their scores


def people(image: Picture, body: See, hand: See | None = None,
           face: See | None = None) -> list[Person]:
    """The people of a picture, with hands and faces where there is a network for them."""
    height, width = image.shape[:2]
    maps = seen_at_half(image, body)
    found = []
    for points in assemble(maps[..., 38:56], maps[..., :38]):
        parts = {}
        if hand is not None:
            for side, box in hand_boxes(points, width, height).items():
                parts[side] = _in_picture(hand_points(_cut(image, *box), hand), box, width, height)
        if face is not None and (box := face_box(points, width, height)):
            parts['face'] = _in_picture(face_points(_cut(image, *box), face), box, width, height)
        found.append(Person(points / [width, height], **parts))
    return found


def seen_at_half(image: Picture, body: See) -> Float[np.ndarray, 'H W 57']:
    """The body network's maps at the size of the picture, which it sees 184 pixels high."""
    height, width = image.shape[:2]
    scale = 0.5 * SIZE / height
    small = _resize(image, int(width * scale), int(height * scale))
    rows, columns = small.shape[:2]
    padded = np.pad(small, ((0, -rows % 8), (0, -columns % 8), (0, 0)), constant_values=128)
    maps = body(padded)
    maps = _resize(maps, 8 * maps.shape[1], 8 * maps.shape[0])[:rows, :columns]
    return _resize(maps, width, height).astype(np.float64)


def assemble(points: Float[np.ndarray, 'H W 18'],
             fields: Float[np.ndarray, 'H W 38']) -> list[np.ndarray]:
    """Maps of points and of fields -> each person's points [18,2] in pixels, NaN where there is
    none."""
    peaks = [_peaks(points[..., part]) for part in range(18)]  # each [N,3]: x, y, value
    bodies: list[_Body] = []
    for joint, ((a, b), field) in enumerate(zip(JOINTS, FIELDS)):
        for i, j, score in _limbs(peaks[a], peaks[b], fields[..., field:field + 2]):
            having = [body for body in bodies if body.peaks.get(a) == i or body.peaks.get(b) == j]
            value = peaks[b][j, 2] + score
            if len(having) > 1 and not having[0].peaks.keys() & having[1].peaks.keys():
                having[0].join(having[1], score)
                bodies.remove(having[1])
            elif len(having) > 1 or having and having[0].peaks.get(b) != j:
                having[0].add(b, j, value)
            elif not having and joint < len(LIMBS):
                bodies.append(_Body({a: i, b: j}, peaks[a][i, 2] + value, 2))
    found = []
    for body in bodies:
        if body.parts >= PARTS and body.score / body.parts >= SCORE:
            person = np.full((18, 2), np.nan)
            for part, i in body.peaks.items():
                person[part] = peaks[part][i, :2]
            found.append(person)
    return found


class _Body:
    """Peaks by their parts, the sum of their scores and of their limbs', and how many were added:
    of a part that was replaced too."""

    def __init__(self, peaks, score, parts):
        self.peaks, self.score, self.parts = peaks, score, parts

    def add(self, part, peak, score):
        self.peaks[part] = peak
        self.score, self.parts = self.score + score, self.parts + 1

    def join(self, other, score):
        self.peaks |= other.peaks
        self.score, self.parts = self.score + other.score + score, self.parts + other.parts


def _peaks(heat):
    """The pixels that no neighbour exceeds once they are blurred, [N,3]: x, y and value."""
    from scipy import ndimage
    blurred = ndimage.gaussian_filter(heat, 3)
    around = np.pad(blurred, 1)
    top = (blurred > POINT) & np.all([blurred >= other for other in (
        around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])], 0)
    y, x = np.nonzero(top)
    return np.stack([x, y, heat[y, x]], -1)


def _limbs(starts, ends, field):
    """Pairs of peaks (i, j, score) that a field leads from one to the other, the best first, none
    twice."""
    height, width, _ = field.shape
    found = []
    for i, start in enumerate(starts):
        for j, end in enumerate(ends):
            way = end[:2] - start[:2]
            length = max(0.001, math.hypot(*way))
            x, y = np.rint(np.linspace(start[:2], end[:2], 10)).astype(int).T
            along = field[y, x] @ (way / length)
            score = along.mean() + min(0.5 * height / length - 1, 0)
            if (along > FIELD).sum() > 8 and score > 0:
                found.append((i, j, score))
    taken: list[tuple] = []
    for i, j, score in sorted(found, key=lambda pair: pair[2], reverse=True):
        if not any(i == other[0] or j == other[1] for other in taken):
            taken.append((i, j, score))
    return taken


def hand_boxes(points: Float[np.ndarray, '18 2'], width: int,
               height: int) -> dict[str, tuple[int, int, int]]:
    """Squares (left, top, side) in which hands are to be looked for, by the names of Person."""
    boxes = {}
    for side, (shoulder, elbow, wrist) in (('left_hand', points[5:8]), ('right_hand', points[2:5])):
        if np.isnan([shoulder, elbow, wrist]).any():
            continue
        middle = wrist + 0.33 * (wrist - elbow)
        size = 1.5 * max(math.hypot(*(wrist - elbow)), 0.9 * math.hypot(*(elbow - shoulder)))
        boxes[side] = _square(middle - size / 2, size, width, height)
    return {side: box for side, box in boxes.items() if box}


def face_box(points: Float[np.ndarray, '18 2'], width: int,
             height: int) -> tuple[int, int, int] | None:
    """The square in which the face is to be looked for, by eyes and ears about the nose."""
    away = np.abs(points[14:18] - points[0]).max(1) * [3, 3, 1.5, 1.5]
    if np.isnan(away).all():
        return None
    size = np.nanmax(away)
    return _square(points[0] - size, 2 * size, width, height, size)


def _square(corner, side, width, height, beyond=None):
    """Within the picture, at least 20 pixels large, or None. beyond: what may not pass the border
    before the square is cut; None: its side."""
    (x, y), over = np.maximum(corner, 0), side if beyond is None else beyond
    side = min(width - x if x + over > width else side, height - y if y + over > height else side)
    return (int(x), int(y), int(side)) if side >= 20 else None


def hand_points(image: Picture, hand: See) -> Float[np.ndarray, '21 2']:
    """A hand's points in pixels of its picture, [0,0] for those not found: the mean of four sizes.
    """
    from scipy import ndimage
    cv2, size = opencv('pose'), 128
    height, width = image.shape[:2]
    blurred, heat = cv2.GaussianBlur(image, (0, 0), 0.8), np.zeros((size, size, 22))
    for scale in (0.5, 1, 1.5, 2):
        maps = hand(_resize(blurred, int(scale * SIZE), int(scale * SIZE)))
        heat += _resize(_resize(maps, 8 * maps.shape[1], 8 * maps.shape[0]), size, size) / 4
    found = np.zeros((21, 2))
    for part in range(21):
        spots, count = ndimage.label(ndimage.gaussian_filter(heat[..., part], 3) > 0.05,
                                     np.ones((3, 3)))
        if count:
            best = 1 + np.argmax(ndimage.sum(heat[..., part], spots, range(1, count + 1)))
            y, x = np.unravel_index(np.argmax(heat[..., part] * (spots == best)), (size, size))
            found[part] = int(x * width / size), int(y * height / size)
    return found


def face_points(image: Picture, face: See) -> Float[np.ndarray, '71 2']:
    """A face's points in pixels of its picture, [0,0] for those not found."""
    height, width = image.shape[:2]
    maps = face(_resize(image, 384, 384))
    down, across = (_corner_weights(n, m) for n, m in zip(maps.shape, (height, width)))
    heat = np.einsum('yh,hwc,xw->cyx', down, maps, across, optimize=True)
    found = np.zeros((len(heat), 2))
    for part, one in enumerate(heat):
        y, x = np.unravel_index(one.argmax(), one.shape)
        if one[y, x] > 0.05:
            found[part] = x, y
    return found


def _corner_weights(n, m):
    """The matrix [m,n] of linear interpolation in which the ends stay the ends."""
    at = np.linspace(0, n - 1, m, dtype=np.float32)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(n, dtype=np.float32)))


def _cut(image, x, y, side):
    return image[y:y + side, x:x + side]


def _in_picture(points, box, width, height):
    """Points of a square as fractions of the picture; NaN where one stands in its first row or
    column."""
    inside = np.where((points < 1e-6).any(1, keepdims=True), np.nan, points + box[:2])
    return inside / [width, height]


def _resize(maps, width, height):
    """OpenPose's: by areas where it gets smaller, else by Lanczos' filter."""
    cv2 = opencv('pose')
    smaller = height + width < sum(maps.shape[:2])
    how = cv2.INTER_AREA if smaller else cv2.INTER_LANCZOS4
    return np.stack([cv2.resize(np.ascontiguousarray(maps[..., i]), (width, height),
                                interpolation=how) for i in range(maps.shape[-1])], -1)
