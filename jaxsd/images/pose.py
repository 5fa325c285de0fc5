"""Skeleton pictures for the pose ControlNets, from the keypoints that OpenPose writes as JSON.

The drawing is that of controlnet_aux (open_pose), after lllyasviel/ControlNet, to the pixel: the
picture that the networks were trained on.
"""

import colorsys
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxsd.images.opencv import opencv
from jaxsd.images.reading import Picture
from jaxsd.typing import Path

# Pairs of COCO's 18 points (nose, neck, right arm, left arm, right leg, left leg, eyes, ears).
LIMBS = [(1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11),
         (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)]
FINGERS = [(i if i % 4 else 0, i + 1) for i in range(20)]  # wrist 0, then four points a finger
# Around the wheel in steps of 20 degrees, in integers, as OpenPose has them.
COLOURS = [(255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
           (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
           (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)]
RADIUS = 4  # of points and of limbs, in pixels, whatever the size of the picture
BODY_25 = [*range(8), *range(9, 19)]  # COCO's points among BODY_25's, which has hips and feet too

# Person's field: its key in the JSON, and how many points it may have (DWPose finds 68 of a face).
PARTS = {'body': ('pose_keypoints_2d', (18, 25)), 'left_hand': ('hand_left_keypoints_2d', (21,)),
         'right_hand': ('hand_right_keypoints_2d', (21,)),
         'face': ('face_keypoints_2d', (70, 68))}


class Person(NamedTuple):
    """Points [N,2] as fractions of the width and the height, NaN where one was not found."""

    body: Any  # [18,2], COCO's order
    left_hand: Any = np.zeros((0, 2))  # [21,2], or [0,2] for none
    right_hand: Any = np.zeros((0, 2))
    face: Any = np.zeros((0, 2))  # [70,2] or [68,2]


class Pose(NamedTuple):
    """People, and the size in pixels of the picture they stand in, None where nobody said."""

    people: tuple
    width: int | None
    height: int | None


def read_pose(source: Path | dict, width: int | None = None, height: int | None = None) -> Pose:
    """The Pose in OpenPose's JSON: a path, or the dict itself.

    {'people': [{'pose_keypoints_2d': [x, y, confidence, ...], 'face_keypoints_2d',
    'hand_left_keypoints_2d', 'hand_right_keypoints_2d'}], 'canvas_width', 'canvas_height'}, as
    OpenPose, sd-webui-controlnet's editors and DWPose write it; bodies of 18 points (COCO) or 25
    (BODY_25). Confidence 0: not found. Coordinates are pixels of the canvas, or, if none exceeds 1,
    fractions. width, height: the canvas of a file that does not name it, as OpenPose's own.
    Raises FileNotFoundError, and ValueError for anything else that is not so.
    """
    name, data = _json(source)
    if not isinstance(data, dict) or not isinstance(data.get('people'), list):
        raise ValueError(f"{name} holds no pose: expected an object with a list 'people'")
    width, height = data.get('canvas_width', width), data.get('canvas_height', height)
    for side in (width, height):
        if side is not None and not (isinstance(side, int) and side > 0):
            raise ValueError(f'{name}: a canvas of {width}x{height}: expected whole pixels')
    people = [{part: _points(name, i, person, *PARTS[part]) for part in PARTS}
              for i, person in enumerate(data['people'])]
    coordinates = [points for person in people for points in person.values()]
    if np.isnan(np.concatenate(coordinates or [np.zeros((0, 2))])).all():
        raise ValueError(f'{name} holds no people: expected at least one keypoint')
    # No skeleton is two pixels large: a little more than 1 is a fraction out of range.
    fractions = max(np.nanmax(points, initial=0) for points in coordinates) <= 2
    if width is None or height is None:
        width = height = None
        if not fractions:
            raise ValueError(f'{name} counts pixels and does not say of what picture: expected '
                             'canvas_width and canvas_height in it, or width and height')
    size = np.array([1, 1] if fractions else [width, height])
    for i, person in enumerate(people):
        _check_inside(name, i, person, size)
    return Pose(tuple(Person(**{part: points / size for part, points in person.items()})
                      for person in people), width, height)


def _json(source):
    """What to call the source in errors, and what it holds."""
    if isinstance(source, dict):
        return 'the pose', source
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f'expected a path or a dict, found {type(source).__name__}')
    try:
        return source, json.loads(pathlib.Path(source).read_text('utf-8'))
    except FileNotFoundError:
        raise FileNotFoundError(f'no such file: {source}') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{source} is not JSON: {error}') from None


def _points(name, number, person, key, counts):
    """[N,2] with NaN for what was not found; of a part that is left out [0,2], of a body [18,2]."""
    if not isinstance(person, dict):
        raise ValueError(f'{name}: person {number} is no object with {key}')
    where, values = f'{name}: {key} of person {number}', person.get(key) or []
    if not isinstance(values, list):
        raise ValueError(f'{where}: expected a list')
    if not values:
        return np.full((18 if 18 in counts else 0, 2), np.nan)
    if len(values) not in [3 * n for n in counts]:
        raise ValueError(f'{where} has {len(values)} values: expected '
                         f'{" or ".join(str(3 * n) for n in counts)} (x, y, confidence)')
    try:
        points = np.array(values, float).reshape(-1, 3)
    except (TypeError, ValueError):
        raise ValueError(f'{where}: expected numbers') from None
    points[~(points[:, 2] > 0), :2] = np.nan
    if np.isinf(points).any():
        raise ValueError(f'{where}: expected finite numbers')
    return points[BODY_25 if len(points) == 25 else slice(None), :2]


def _check_inside(name, number, person, size):
    for part, points in person.items():
        outside = ((points < 0) | (points > size)).any(1)  # NaN is not
        for i in np.flatnonzero(outside):
            (x, y), (w, h) = points[i], size
            where = '' if part == 'body' else f' of the {part.replace("_", " ")}'
            raise ValueError(f'{name}: keypoint {i}{where} of person {number} at ({x:g}, {y:g}) '
                             f'lies outside the picture of {w}x{h}')


def draw_pose(people: Iterable[Person], width: int, height: int) -> Picture:
    """The skeletons of Persons on black, uint8 [height,width,3]."""
    canvas = np.zeros((height, width, 3), np.uint8)
    for person in people:
        body, left, right, face = (points * [width, height] for points in person)
        _body(canvas, body)
        _hand(canvas, left)
        _hand(canvas, right)
        _dots(canvas, _inner(face), 3, [(255, 255, 255)] * len(face))
    return canvas


def _body(canvas, points):
    """Limbs as ellipses at 0.6 of their colour, points over them."""
    cv2 = opencv('pose')
    for (a, b), colour in zip(LIMBS, COLOURS):
        (x0, y0), (x1, y1) = points[a], points[b]
        if np.isnan([x0, x1]).any():
            continue
        centre = int((x0 + x1) / 2), int((y0 + y1) / 2)
        axes = int(((x0 - x1) ** 2 + (y0 - y1) ** 2) ** 0.5 / 2), RADIUS
        angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
        ellipse = cv2.ellipse2Poly(centre, axes, angle, 0, 360, 1)
        cv2.fillConvexPoly(canvas, ellipse, [int(c * 0.6) for c in colour])
    _dots(canvas, points, RADIUS, COLOURS)


def _hand(canvas, points):
    cv2, points = opencv('pose'), _inner(points)
    if len(points):
        for i, (a, b) in enumerate(FINGERS):
            if not np.isnan(points[[a, b]]).any():
                colour = 255 * np.array(colorsys.hsv_to_rgb(i / len(FINGERS), 1, 1))
                cv2.line(canvas, *points[[a, b]].astype(int).tolist(), colour, thickness=2)
    _dots(canvas, points, RADIUS, [(0, 0, 255)] * len(points))


def _inner(points):
    """Hands and faces: what lies in the first row or column counts as not found."""
    return np.where((points < 1).any(1, keepdims=True), np.nan, points)


def _dots(canvas, points, radius, colours):
    cv2 = opencv('pose')
    for point, colour in zip(points, colours):
        if not np.isnan(point).any():
            cv2.circle(canvas, point.astype(int).tolist(), radius, colour, thickness=-1)
