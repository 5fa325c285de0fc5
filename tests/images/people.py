"""Somebody standing, with hands and a face, in OpenPose's JSON."""

import math

import numpy as np

BODY = [(256, 90), (256, 150), (205, 152), (180, 215), (160, 275), (307, 152), (335, 212),
        (362, 268), (226, 285), (222, 375), (218, 465), (286, 285), (292, 375), (298, 465),
        (247, 80), (265, 80), (234, 87), (278, 87)]


def hand(x, y, side):
    """A wrist and five fingers of four points that fan out downwards."""
    points = [(x, y)]
    for finger in range(5):
        angle = math.radians(90 + side * (50 - 22 * finger))
        points += [(x + r * math.cos(angle), y + r * math.sin(angle)) for r in (12, 22, 29, 35)]
    return points


def face(x, y):
    """70 points: the jaw, and rings for what is in the face."""
    jaw = [(x + 24 * math.cos(a), y + 30 * math.sin(a)) for a in np.linspace(0, math.pi, 17)]
    rings = [(x + dx + r * math.cos(a), y + dy + r * math.sin(a))
             for dx, dy, r, n in ((-10, -10, 5, 12), (10, -10, 5, 12), (0, 3, 4, 9), (0, 16, 8, 20))
             for a in np.linspace(0, 2 * math.pi, n, endpoint=False)]
    return jaw + rings


def flat(points, missing=()):
    return [v for i, (x, y) in enumerate(points)
            for v in ((0, 0, 0) if i in missing else (float(x), float(y), 0.9))]


def person(missing=()):
    return {'pose_keypoints_2d': flat(BODY, missing),
            'face_keypoints_2d': flat(face(256, 92)),
            'hand_left_keypoints_2d': flat(hand(362, 268, 1)),
            'hand_right_keypoints_2d': flat(hand(160, 275, -1))}


def standing():
    return {'people': [person()], 'canvas_width': 512, 'canvas_height': 512}
