"""The skeleton pictures, pixel by pixel, against controlnet_aux."""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest

from jaxsd import images

pytestmark = pytest.mark.parity

SPEC = importlib.util.find_spec('controlnet_aux')


@pytest.fixture(scope='module')
def reference():
    """controlnet_aux.open_pose.util without the package around it, which loads every annotator."""
    if SPEC is None:
        pytest.skip('controlnet_aux is not installed: make parity installs it')
    root = SPEC.submodule_search_locations[0]
    with pytest.MonkeyPatch.context() as patch:
        for name, path in (('controlnet_aux', root), ('controlnet_aux.open_pose',
                                                      f'{root}/open_pose')):
            package = types.ModuleType(name)
            package.__path__ = [path]
            patch.setitem(sys.modules, name, package)
        # The detector, which the drawing needs for the type of its points only.
        body = types.ModuleType('controlnet_aux.open_pose.body')
        body.BodyResult = None
        body.Keypoint = types.SimpleNamespace
        patch.setitem(sys.modules, body.__name__, body)
        yield importlib.import_module('controlnet_aux.open_pose.util')
        sys.modules.pop('controlnet_aux.open_pose.util')


def theirs(reference, people, width, height):
    """As controlnet_aux.open_pose.draw_poses."""
    def keypoint(point, missing):
        return missing if np.isnan(point).any() else types.SimpleNamespace(x=point[0], y=point[1])

    nowhere = types.SimpleNamespace(x=-1 / width, y=-1 / height)
    canvas = np.zeros((height, width, 3), np.uint8)
    for person in people:
        body, left, right, face = person
        canvas = reference.draw_bodypose(canvas, [keypoint(p, None) for p in body])
        for points in (left, right):
            canvas = reference.draw_handpose(canvas, [keypoint(p, nowhere) for p in points])
        canvas = reference.draw_facepose(canvas, [keypoint(p, nowhere) for p in face])
    return canvas


def crowd(rng, count, faces=70):
    """People with random points, a quarter of them not found, and some without hands or face."""
    def part(n):
        points = rng.uniform(0, 1, (n, 2))
        points[rng.uniform(size=n) < 0.25] = np.nan
        return points

    def may(n):
        return part(n) if rng.uniform() < 0.7 else np.zeros((0, 2))

    return [images.Person(part(18), may(21), may(21), may(faces)) for _ in range(count)]


@pytest.mark.parametrize('width, height', [(512, 512), (64, 64), (768, 320), (333, 517)])
def test_random_people(reference, width, height):
    rng = np.random.default_rng(0)
    for count in (1, 1, 2, 5):
        people = crowd(rng, count, 70 if count < 5 else 68)
        np.testing.assert_array_equal(images.draw_pose(people, width, height),
                                      theirs(reference, people, width, height))


def test_pixels_of_a_file(reference):
    """Whole pixels, where a truncated limb or angle shows, come through the division unharmed."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        points = rng.integers(1, 512, (18, 2))
        values = np.column_stack([points, np.ones(18)]).ravel().tolist()
        pose = images.read_pose({'people': [{'pose_keypoints_2d': values}],
                                 'canvas_width': 512, 'canvas_height': 512})
        np.testing.assert_array_equal(images.draw_pose(pose.people, 512, 512),
                                      theirs(reference, pose.people, 512, 512))
