"""Sizes, sides, edges: what is kept to the bit, and that masks go where their pictures go."""

import math

import numpy as np
import pytest

from jaxsd import images

HOW = ('crop', 'pad', 'stretch')


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def disc(height, width, x, y, radius):
    rows, columns = np.mgrid[:height, :width]
    return (np.hypot(columns - x, rows - y) <= radius).astype(np.float32)


def square(size, start, end):
    mask = np.zeros((size, size), np.float32)
    mask[start:end, start:end] = 1
    return mask


@pytest.mark.parametrize('how', HOW)
def test_fit(how):
    for height, width in ((48, 64), (64, 48), (7, 200), (200, 1), (64, 64)):
        for w, h in ((64, 64), (32, 80), (1, 1)):
            fitted = images.fit(picture(height, width), w, h, how)
            assert fitted.shape == (h, w, 3) and fitted.dtype == np.uint8
            mask = images.fit(np.ones((height, width), np.float32), w, h, how)
            assert mask.shape == (h, w) and mask.dtype == np.float32
            assert (mask == 1).all()  # a full mask stays full: no dark rim
    array = picture(40, 56)
    assert images.fit(array, 56, 40, how) is array
    flat = np.full((30, 50, 3), 77, np.uint8)
    assert (images.fit(flat, 64, 64, how) == 77).all()


def test_a_mere_crop_or_pad_keeps_the_pixels():
    array = picture(41, 60)
    np.testing.assert_array_equal(images.fit(array, 41, 41), array[:, 9:50])
    padded = images.fit(array, 60, 64, 'pad')
    np.testing.assert_array_equal(padded[11:52], array)
    np.testing.assert_array_equal(padded[:11], np.repeat(array[:1], 11, 0))
    np.testing.assert_array_equal(padded[52:], np.repeat(array[-1:], 12, 0))


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('height, width', [(100, 160), (160, 100)])
def test_a_mask_goes_where_its_picture_goes(how, height, width):
    mask = disc(height, width, 60, 45, 20)
    shown = np.repeat((255 * mask).astype(np.uint8)[..., None], 3, -1)
    for w, h in ((64, 64), (128, 96), (200, 300)):
        both = images.fit(shown, w, h, how)[..., 0] / 255, images.fit(mask, w, h, how)
        rows, columns = np.mgrid[:h, :w]
        # The filters differ, their centres do not: half a pixel off would be a wrong crop.
        for axis in (rows, columns):
            centres = [(a * axis).sum() / a.sum() for a in both]
            np.testing.assert_allclose(*centres, atol=0.1)


def test_crop_cuts_the_middle_out():
    array = np.zeros((32, 96, 3), np.uint8)
    array[:, 32:64] = 200
    assert (images.fit(array, 32, 32) == 200).all()
    small = images.fit(array.swapaxes(0, 1), 16, 16)
    assert (small[3:-3] == 200).all()  # Lanczos sees 3 pixels farther


def test_bad_fits():
    with pytest.raises(ValueError, match="how='zoom': expected crop, pad or stretch"):
        images.fit(picture(4, 4), 8, 8, 'zoom')
    with pytest.raises(ValueError, match='to 0x8'):
        images.fit(picture(4, 4), 0, 8)


@pytest.mark.parametrize('fill', ['edge', 'noise', 'white'])
def test_pad(fill):
    array = picture(20, 30) // 2 + 10
    big, mask = images.pad(array, 3, 0, 7, 5, fill, seed=4)
    assert big.shape == (25, 40, 3) and big.dtype == np.uint8
    assert mask.shape == (25, 40) and mask.dtype == np.float32
    np.testing.assert_array_equal(big[:20, 3:33], array)
    assert (mask[:20, 3:33] == 0).all() and mask.sum() == 25 * 40 - 20 * 30
    same, nothing = images.pad(array, 0, 0, 0, 0, fill)
    np.testing.assert_array_equal(same, array)
    assert not nothing.any()


def test_fills():
    array = np.clip(np.random.default_rng(0).normal((60, 120, 180), 15, (50, 50, 3)), 0, 255)
    array = array.astype(np.uint8)
    edge, _ = images.pad(array, 2, 3, 4, 5)
    assert (edge[:3, :2] == array[0, 0]).all() and (edge[-5:, -4:] == array[-1, -1]).all()
    white, _ = images.pad(array, 2, 3, 4, 5, 'white')
    assert (white[:3] == 255).all() and (white[:, -4:] == 255).all()
    noise, mask = images.pad(array, 100, 0, 0, 0, 'noise', seed=1)
    # 5000 draws of deviation 15: the mean is off by 0.2, the deviation by less.
    np.testing.assert_allclose(noise[mask > 0].mean(0), array.mean((0, 1)), atol=1)
    np.testing.assert_allclose(noise[mask > 0].std(0), array.std((0, 1)), atol=1)
    np.testing.assert_array_equal(noise, images.pad(array, 100, 0, 0, 0, 'noise', seed=1)[0])
    assert (noise != images.pad(array, 100, 0, 0, 0, 'noise', seed=2)[0]).any()


def test_bad_pads():
    with pytest.raises(ValueError, match="fill='black': expected edge, noise, white"):
        images.pad(picture(4, 4), 1, 1, 1, 1, 'black')
    with pytest.raises(ValueError, match='found 1, -2, 1, 1'):
        images.pad(picture(4, 4), 1, -2, 1, 1)


@pytest.mark.parametrize('radius', [0.5, 1, 4, 7.5])
def test_feather(radius):
    mask = square(192, 60, 130)
    soft = images.feather(mask, radius)
    assert soft.dtype == np.float32 and soft.min() == 0 and soft.max() == 1
    assert (soft[mask == 1] == 1).all()
    rows, columns = np.mgrid[:192, :192]
    away = np.hypot(np.clip(60 - rows, 0, None) + np.clip(rows - 129, 0, None),
                    np.clip(60 - columns, 0, None) + np.clip(columns - 129, 0, None))
    assert (soft[away > 3 * radius] == 0).all()
    line = soft[95, 130:]
    assert (np.diff(line) <= 0).all()
    # Next to a straight edge twice the blur of a step, which lies half a pixel before the pixel.
    expected = [math.erfc((i + 0.5) / radius / math.sqrt(2)) for i in range(int(3 * radius))]
    # The kernel ends after 3 deviations (0.3 % of it) and samples what erfc integrates.
    np.testing.assert_allclose(line[:len(expected)], expected, atol=0.06 / radius + 0.004)


def test_feather_of_what_is_soft_or_nothing():
    mask = square(32, 10, 20)
    assert images.feather(mask, 0) is mask
    assert not images.feather(np.zeros((8, 8), np.float32), 4).any()
    assert (images.feather(np.ones((8, 8), np.float32), 4) == 1).all()
    assert (images.feather(0.3 * mask, 3) >= 0.3 * mask).all()
    side = np.zeros((32, 32), np.float32)
    side[:, 16:] = 1  # the border of the picture is no edge of the mask
    np.testing.assert_allclose(images.feather(side, 3), images.feather(side, 3)[:1].repeat(32, 0),
                               atol=1e-6)
    with pytest.raises(ValueError, match='radius of -1'):
        images.feather(mask, -1)


@pytest.mark.parametrize('padding, width, height, expected', [
    (0, 1, 1, (40, 40, 60, 60)),
    (5, 1, 1, (35, 35, 65, 65)),
    (0, 2, 1, (30, 40, 70, 60)),
    (0, 1, 2, (40, 30, 60, 70)),
    (1000, 3, 1, (0, 0, 100, 100)),
    (0, 10, 1, (0, 40, 100, 60)),
])
def test_box(padding, width, height, expected):
    found = images.box(square(100, 40, 60), padding, width, height)
    assert found == expected and all(type(n) is int for n in found)


def test_a_box_at_the_border_moves_inside():
    mask = np.zeros((100, 100), np.float32)
    mask[10:50, 95:] = 0.1  # any mask above 0 counts
    assert images.box(mask, 0, 1, 1) == (60, 10, 100, 50)
    mask = np.zeros((100, 100), np.float32)
    mask[0, 0] = 1
    assert images.box(mask, 2, 512, 512) == (0, 0, 3, 3)


def test_an_empty_mask_has_no_box():
    with pytest.raises(ValueError, match='the mask is black everywhere'):
        images.box(np.zeros((8, 8), np.float32), 4, 1, 1)


def test_paste_leaves_the_rest_untouched():
    whole, patch = picture(80, 90), picture(64, 64, 1)
    mask = images.feather(disc(80, 90, 45, 40, 10), 3)
    box = images.box(mask, 4, 64, 64)
    before = whole.copy()
    done = images.paste(whole, patch, box, mask)
    np.testing.assert_array_equal(whole, before)
    np.testing.assert_array_equal(done[mask == 0], whole[mask == 0])
    left, top, right, bottom = box
    inside = np.zeros(mask.shape, bool)
    inside[top:bottom, left:right] = True
    small = np.zeros_like(whole)
    small[inside] = images.fit(patch, right - left, bottom - top, 'stretch').reshape(-1, 3)
    np.testing.assert_array_equal(done[mask == 1], small[mask == 1])
    exact = whole + (small - whole.astype(float)) * mask[..., None].astype(float)
    assert np.abs(done - exact)[inside].max() <= 0.5 + 1e-4  # to the nearest


def test_paste_of_equal_pictures_changes_nothing():
    whole = picture(32, 32)
    mask = np.random.default_rng(0).uniform(0, 1, (32, 32)).astype(np.float32)
    np.testing.assert_array_equal(images.paste(whole, whole[4:20, 8:30], (8, 4, 30, 20), mask),
                                  whole)


@pytest.mark.parametrize('fill', ['edge', 'noise'])
def test_cover(fill):
    flat = np.full((32, 32, 3), (10, 100, 200), np.uint8)
    broken, mask = flat.copy(), square(32, 10, 20)
    broken[mask > 0] = (255, 0, 255)
    done = images.cover(broken, mask, fill, seed=3)
    np.testing.assert_array_equal(done[mask == 0], flat[mask == 0])
    hidden = done[mask > 0]
    if fill == 'edge':
        np.testing.assert_allclose(hidden, flat[mask > 0], atol=3)  # of a gap of 245
    assert (hidden != (255, 0, 255)).any(-1).all()


def test_sizes():
    images.check_sizes(picture(4, 6), np.zeros((4, 6)))
    with pytest.raises(ValueError, match='the image is 6x4 and the mask 4x6'):
        images.check_sizes(picture(4, 6), np.zeros((6, 4)))
    with pytest.raises(ValueError, match='6x4'):
        images.paste(picture(4, 6), picture(2, 2), (0, 0, 2, 2), np.zeros((6, 4)))


def test_downsample():
    mask = np.zeros((16, 24), np.float32)
    mask[7, 8], mask[8, 23], mask[15, 0] = 1, 0.25, 0.5
    np.testing.assert_array_equal(images.downsample(mask, 8), [[0, 1, 0], [0.5, 0, 0.25]])
    np.testing.assert_array_equal(images.downsample(mask, 1), mask)
    with pytest.raises(ValueError, match='a mask of 24x16: expected multiples of 5'):
        images.downsample(mask, 5)
