"""Skeletons: what is read from OpenPose's JSON, and where it is drawn."""

import colorsys
import json

import numpy as np
import people
import pytest

from jaxsd import images


def body_25(points):
    """COCO's points as BODY_25's, with the middle of the hips and feet that COCO lacks."""
    middle = [(256, 285)]
    return points[:8] + middle + points[8:14] + points[14:] + [(10, 10)] * 6


def draw(data, width=512, height=512):
    return images.draw_pose(images.read_pose(data).people, width, height)


def one(**fields):
    return {'people': [{**people.person(), **fields}], 'canvas_width': 512, 'canvas_height': 512}


def wheel(degrees, value=1.0):
    """Full colours around the wheel, in whole numbers."""
    return tuple(int(255 * c * value + 1e-6) for c in colorsys.hsv_to_rgb(degrees / 360, 1, 1))


def test_joints_and_limbs_have_their_colours():
    points = [(x, y if y > 100 else y - 60) for x, y in people.BODY]  # a long neck
    points[14:] = [(236, 10), (276, 10), (200, 40), (312, 40)]
    picture = draw(one(pose_keypoints_2d=people.flat(points), face_keypoints_2d=[],
                       hand_left_keypoints_2d=None, hand_right_keypoints_2d=[]))
    assert picture.shape == (512, 512, 3) and picture.dtype == np.uint8
    assert not picture[-1].any() and not picture[:, [0, -1]].any()
    for i, (x, y) in enumerate(points):
        assert (picture[y, x - 4:x + 5] == wheel(20 * i)).all()  # dots of radius 4
        assert tuple(picture[y, x - 5]) != wheel(20 * i) != tuple(picture[y, x + 5])
    arms, legs = [(1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)], [(1, 8), (8, 9), (9, 10),
                                                                    (1, 11), (11, 12), (12, 13)]
    head = [(1, 0), (0, 14), (14, 16), (0, 15), (15, 17)]
    for i, (a, b) in enumerate(arms + legs + head):
        (x0, y0), (x1, y1) = points[a], points[b]
        assert tuple(picture[(y0 + y1) // 2, (x0 + x1) // 2]) == wheel(20 * i, 0.6), (a, b)


def test_fingers_have_their_colours():
    hand = [(40, 450)] + [(100 + 100 * j, 400 - 80 * finger)
                          for finger in range(5) for j in range(4)]
    picture = draw({'people': [{'hand_left_keypoints_2d': people.flat(hand)}],
                    'canvas_width': 512, 'canvas_height': 512})
    for i in range(20):
        (x0, y0), (x1, y1) = hand[i if i % 4 else 0], hand[i + 1]
        assert tuple(picture[(y0 + y1) // 2, (x0 + x1) // 2]) == tuple(
            np.rint(255 * np.array(colorsys.hsv_to_rgb(i / 20, 1, 1)))), i


@pytest.mark.parametrize('key', ['hand_right_keypoints_2d', 'face_keypoints_2d'])
def test_the_first_row_and_column_are_nowhere_for_hands_and_faces(key):
    points = [(0.5, 30), (30, 0.5), (60, 60)] + [(0.0, 0.0)] * (18 if 'hand' in key else 67)
    picture = draw({'people': [{key: people.flat(points)}], 'canvas_width': 99,
                    'canvas_height': 99}, 99, 99)
    rows, columns, _ = np.nonzero(picture)
    assert rows.min() > 50 and columns.min() > 50


def test_hands_and_face_lie_over_the_body():
    body = draw(one(face_keypoints_2d=[], hand_left_keypoints_2d=[], hand_right_keypoints_2d=[]))
    whole = draw(people.standing())
    for x, y in people.hand(362, 268, 1) + people.hand(160, 275, -1):
        assert tuple(whole[int(y), int(x)]) == (0, 0, 255)
    for x, y in people.face(256, 92):
        assert tuple(whole[int(y), int(x)]) == (255, 255, 255)
    rows, columns, _ = np.nonzero(whole != body)
    assert 60 < rows.min() and rows.max() < 320  # the legs are as they were


def test_a_missing_joint_takes_its_limbs_along():
    picture = draw(one(pose_keypoints_2d=people.flat(people.BODY, missing=(9,))))
    assert not picture[300:450, 200:240].any()  # right knee, with thigh and shin
    assert picture[300:450, 280:305].any()  # the left leg
    x, y = people.BODY[10]
    assert tuple(picture[y, x]) == (0, 170, 255)  # the ankle stays


def test_three_ways_to_say_the_same():
    expected = draw(people.standing())
    pixels = people.flat(body_25(people.BODY))
    np.testing.assert_array_equal(draw(one(pose_keypoints_2d=pixels)), expected)
    fractions = people.standing()
    for key, values in fractions['people'][0].items():
        fractions['people'][0][key] = [
            v / 512 if i % 3 < 2 else v for i, v in enumerate(values)]
    np.testing.assert_array_equal(draw(fractions), expected)
    bare = {'people': people.standing()['people']}  # OpenPose itself names no canvas
    pose = images.read_pose(bare, 512, 512)
    np.testing.assert_array_equal(images.draw_pose(pose.people, pose.width, pose.height), expected)


def test_several_people_stand_in_their_order():
    near, far = people.person(), people.person()
    far['pose_keypoints_2d'] = people.flat([(x * 0.5 + 10, y * 0.5) for x, y in people.BODY])
    data = {'people': [far, near], 'canvas_width': 512, 'canvas_height': 512}
    both = draw(data)
    alone = draw({**data, 'people': [near]})
    drawn = alone.any(-1)
    np.testing.assert_array_equal(both[drawn], alone[drawn])
    assert both.any(-1).sum() > drawn.sum()


def test_another_size():
    picture = draw(people.standing(), 256, 1024)
    x, y = people.BODY[10]
    assert tuple(picture[2 * y, x // 2]) == (0, 170, 255)


def test_a_file(tmp_path):
    path = tmp_path / 'pose.json'
    path.write_text(json.dumps(people.standing()))
    pose = images.read_pose(path)
    assert (pose.width, pose.height) == (512, 512)
    np.testing.assert_array_equal(images.draw_pose(pose.people, 512, 512), draw(people.standing()))


AT_900 = people.flat([(900, 20) if i == 4 else p for i, p in enumerate(people.BODY)])
OVER_1 = people.flat([(1.5 if i == 2 else 0.5, 0.5) for i in range(18)])


@pytest.mark.parametrize('data, message', [
    (one(pose_keypoints_2d=AT_900),
     r'keypoint 4 of person 0 at \(900, 20\) lies outside the picture of 512x512'),
    (one(hand_left_keypoints_2d=people.flat([(-3, 5)] * 21)),
     r'keypoint 0 of the left hand of person 0 at \(-3, 5\) lies outside'),
    ({'people': [{'pose_keypoints_2d': OVER_1}]}, r'at \(1.5, 0.5\) lies outside the picture of 1'),
    (one(pose_keypoints_2d=[1, 2, 1] * 17), 'has 51 values: expected 54 or 75'),
    (one(face_keypoints_2d=[1, 2]), 'face_keypoints_2d of person 0 has 2 values'),
    (one(pose_keypoints_2d=['a'] * 54), 'expected numbers'),
    (one(pose_keypoints_2d=[1e999] * 54), 'expected finite numbers'),
    (one(pose_keypoints_2d=7), 'pose_keypoints_2d of person 0: expected a list'),
    ({'people': []}, 'no people'),
    ({'people': [{'pose_keypoints_2d': [0] * 54}]}, 'no people'),
    ({'people': [7]}, 'person 0 is no object'),
    ({'people': people.standing()['people']}, 'expected canvas_width'),
    ({**people.standing(), 'canvas_width': 'wide'}, 'canvas of widex512'),
    ({'animals': []}, "a list 'people'"),
    (7, 'expected a path or a dict'),
])
def test_bad_poses(data, message):
    with pytest.raises(ValueError, match=message) as error:
        images.read_pose(data)
    assert '\n' not in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file'):
        images.read_pose(tmp_path / 'none.json')
    path = tmp_path / 'pose.json'
    for content in (b'{"people": [', b'\xff\xd8\xff\xe0 a picture'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='is not JSON'):
            images.read_pose(path)
    path.write_text('[]')
    with pytest.raises(ValueError, match="a list 'people'"):
        images.read_pose(str(path))
