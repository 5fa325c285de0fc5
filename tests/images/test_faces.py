"""Faces cut out and pasted back, against facexlib's numbers (tests/goldens/make_faces.py)."""

import pathlib

import numpy as np
import pytest
from tiny_faces import person

from jaxsd.images import faces
from jaxsd.images.pose import Person

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'faces.npz')


def test_as_facexlib():
    """The matrices, the faces, and the picture with their negatives, which facexlib cuts off to
    whole numbers at its end."""
    picture = GOLDEN['picture']
    pasted = picture.astype(np.float64)
    for points, expected, face in zip(GOLDEN['points'], GOLDEN['ways'], GOLDEN['faces']):
        way = faces.alignment(points, 32)
        np.testing.assert_allclose(way, expected, rtol=1e-9, atol=1e-9)
        found = faces.cut(picture, way, 32)
        np.testing.assert_array_equal(found, face)
        pasted = faces.paste(pasted, 255 - found, way)
    below = pasted - GOLDEN['pasted']
    assert -1e-3 < below.min() and below.max() < 1 + 1e-3
    changed = (GOLDEN['pasted'] != picture).any(-1).mean()
    assert 0.1 < changed < 0.9
    same = pasted == picture
    assert same[GOLDEN['pasted'] == picture].mean() > 0.9  # what is far from faces stays


def test_five_points():
    """The rims' means; none of a face that lacks one, is small, or was not looked for."""
    points = GOLDEN['points'][0]
    whole = person(points, 120, 96)
    rim = whole.face.copy()
    rim[36:42] += np.array([[0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1], [0, 0], [np.nan, np.nan]])
    lacking = whole.face.copy()
    lacking[54] = np.nan
    small = person(points / 5, 120, 96)
    [first, second] = faces.five_points(
        [whole, small, whole._replace(face=lacking), Person(whole.body),
         whole._replace(face=rim)], 120, 96)
    np.testing.assert_allclose(first, points)
    np.testing.assert_allclose(second, points)
    assert np.hypot(*(points[1] - points[0])) / 5 < faces.APART


@pytest.mark.parametrize('points', [np.zeros((5, 2)), np.full((5, 2), 7.0)])
def test_points_that_say_nothing(points):
    assert faces.alignment(points, 32) is None
