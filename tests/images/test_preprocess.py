"""Hints without a network, and their command line."""

import json
import sys

import numpy as np
import people
import pytest
import tiny_detectors
from absl import flags
from PIL import Image

import jaxsd
from jaxsd import images
from launch import preprocess


def square(inside, outside):
    picture = np.full((64, 64, 3), outside, np.uint8)
    picture[20:44, 20:44] = inside
    return picture


def test_canny():
    edges = images.canny(square(255, 0))
    assert edges.shape == (64, 64, 3) and edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    assert (edges == edges[..., :1]).all()
    rows, columns = np.nonzero(edges[..., 0])
    assert {rows.min(), columns.min()} <= {19, 20} and {rows.max(), columns.max()} <= {43, 44}
    assert not edges[24:40, 24:40].any()
    assert not images.canny(square(130, 110)).any()  # too faint
    assert images.canny(square(130, 110), 10, 20).any()


def test_scribble():
    picture = square((0, 0, 255), 255)  # blue on white counts as dark
    strokes = images.scribble(picture)
    assert strokes.shape == (64, 64, 3) and strokes.dtype == np.uint8
    np.testing.assert_array_equal(strokes, square(255, 0))
    np.testing.assert_array_equal(images.scribble(square(127, 126)), square(0, 255))
    np.testing.assert_array_equal(images.scribble(square(127, 126), 128), square(255, 255))


def test_tile():
    picture = np.random.default_rng(0).integers(0, 256, (60, 92, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images.tile(picture), picture)
    for factor in (2, 3.5, 60):
        coarse = images.tile(picture, factor)
        assert coarse.shape == picture.shape and coarse.dtype == np.uint8
        assert np.abs(coarse.mean((0, 1)) - picture.mean((0, 1))).max() < 5
        assert coarse.std() < 0.6 * picture.std()
    # A ramp survives: the picture is not shifted.
    ramp = np.repeat(np.arange(0, 240, 2, np.uint8)[None, :, None], 64, 0).repeat(3, -1)
    inner = np.s_[:, 8:-8]
    np.testing.assert_allclose(images.tile(ramp, 4).astype(int)[inner], ramp[inner], atol=1)


def test_depth():
    near = images.depth(np.array([[-2.0, 0.0, 8.0]], np.float32))
    assert near.dtype == np.uint8
    np.testing.assert_array_equal(near, [[[0] * 3, [51] * 3, [255] * 3]])
    with pytest.raises(ValueError, match='the depth map is 3 everywhere'):
        images.depth(np.full((4, 4), 3.0))
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match='not finite'):
            images.depth(np.array([[0, value]]))


@pytest.mark.parametrize('name, options, message', [
    ('canny', dict(low=200, high=100), 'canny low=200, high=100: expected low < high'),
    ('canny', dict(low=100, high=100), 'expected low < high'),
    ('canny', dict(low=-1), 'low=-1: expected 0 or more'),
    ('canny', dict(high=float('nan')), 'high=nan: expected 0 or more'),
    ('canny', dict(high='200'), "high='200': expected 0 or more"),
    ('scribble', dict(threshold=0), 'threshold=0: expected 1 to 255'),
    ('scribble', dict(threshold=256), 'threshold=256: expected 1 to 255'),
    ('tile', dict(factor=0.5), 'factor=0.5: expected 1 to 64'),
    ('tile', dict(factor=100), 'factor=100: expected 1 to 64'),
])
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        images.PREPROCESSORS[name](square(255, 0), **options)


def test_none():
    picture = square(1, 2)
    assert images.PREPROCESSORS['none'](picture) is picture


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main('--kind=canny', file) -> the error, or None; pictures go to tmp_path / 'out'."""
    def call(*arguments):
        values = flags.FlagValues()
        monkeypatch.setattr(preprocess, 'FLAGS', values)
        for name in ('string', 'multi_string', 'float', 'integer'):
            define = getattr(flags, f'DEFINE_{name}')
            monkeypatch.setattr(preprocess.flags, f'DEFINE_{name}',
                                lambda *a, define=define, **k: define(*a, flag_values=values, **k))
        preprocess.define_flags()
        monkeypatch.undo()
        monkeypatch.setattr(preprocess, 'FLAGS', values)
        rest = values([sys.argv[0], f'--out={tmp_path / "out"}', *map(str, arguments)])
        try:
            preprocess.main(rest)
        except SystemExit as error:
            return error.code
    return call


def test_main(main, tmp_path):
    for name in 'ab':
        Image.fromarray(square(0, 255)).save(tmp_path / f'{name}.png')
    (tmp_path / 'c.json').write_text(json.dumps(people.standing()))
    a, b, c, out = tmp_path / 'a.png', tmp_path / 'b.png', tmp_path / 'c.json', tmp_path / 'out'
    assert main('--kind=canny', '--high=150', a, b) is None
    assert main('--kind=scribble', a) is None
    assert main('--kind=tile', '--factor=8', a) is None
    assert main('--kind=pose', c) is None
    edges = images.canny(square(0, 255), high=150)
    skeleton = images.draw_pose(images.read_pose(c).people, 512, 512)
    for name, expected in {'a-canny': edges, 'b-canny': edges, 'a-scribble': square(255, 0),
                           'a-tile': images.tile(square(0, 255), 8), 'c-pose': skeleton}.items():
        np.testing.assert_array_equal(images.read(out / f'{name}.png'), expected)
    assert main('--kind=pose', '--width=256', '--height=384', c) is None
    assert images.read(out / 'c-pose.png').shape == (384, 256, 3)


def test_main_with_detectors(main, tmp_path):
    Image.fromarray(square(0, 255)).save(tmp_path / 'a.png')
    (tmp_path / 'nets').mkdir()
    net = tiny_detectors.write('ControlNetHED', tmp_path / 'nets')
    assert main('--kind=softedge_hed', f'--detectors={tmp_path}/nets', tmp_path / 'a.png') is None
    np.testing.assert_array_equal(
        images.read(tmp_path / 'out' / 'a-softedge_hed.png'),
        jaxsd.detect('softedge_hed', square(0, 255), [jaxsd.load_detector(net)]))
    assert 'give body_pose_model.pth' in main('--kind=openpose', f'--detectors={net}',
                                              tmp_path / 'a.png')
    assert 'ControlNetHED.pth' in main('--kind=softedge_hed', tmp_path / 'a.png')
    assert 'takes: score, distance' in main('--kind=mlsd', '--low=3', tmp_path / 'a.png')
    assert "unknown --kind 'softedge'" in main('--kind=softedge', tmp_path / 'a.png')


def test_main_writes_nothing_after_an_error(main, tmp_path):
    good, bad = tmp_path / 'a.png', tmp_path / 'b.png'
    Image.fromarray(square(0, 255)).save(good)
    bad.write_text('a text')
    assert 'b.png is not an image' in main('--kind=canny', good, bad)
    assert 'would be written as a-canny.png' in main('--kind=canny', good, good)
    assert '--low is not for --kind=tile' in main('--kind=tile', '--low=3', good)
    assert 'expected low < high' in main('--kind=canny', '--low=300', good)
    assert 'expected the files' in main('--kind=canny')
    assert 'a.png is not JSON' in main('--kind=pose', good)
    assert not (tmp_path / 'out').exists()
    pixels, fractions = people.standing(), {'people': [
        {'pose_keypoints_2d': people.flat([(x / 512, y / 512) for x, y in people.BODY])}]}
    del pixels['canvas_width']
    for data, message in ((pixels, 'expected canvas_width'), (fractions, 'names no canvas')):
        (tmp_path / 'c.json').write_text(json.dumps(data))
        assert message in main('--kind=pose', tmp_path / 'c.json')
