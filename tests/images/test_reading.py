"""Any mode, size and type that Pillow reads, and one clear error for what is no picture."""

import io
import warnings

import numpy as np
import pytest
from conftest import at_most
from PIL import Image

from jaxsd import images

RED, HALF = (255, 0, 0), (255, 127, 127)


def pixels(seed=0, shape=(5, 7, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(tmp_path, image, name='a.png', **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize('name', ['a.png', 'a.bmp', 'a.tiff', 'a.webp', 'a.ppm'])
def test_lossless_files_and_their_ways_in(tmp_path, name):
    array = pixels()
    path = saved(tmp_path, Image.fromarray(array), name,
                 **({'lossless': True} if name.endswith('webp') else {}))
    for source in (path, str(path), Image.open(path), array, Image.fromarray(array),
                   array.astype(np.float32) / 255, array.astype(np.float64) / 255,
                   array.astype(np.uint16) * 257):
        found = images.read(source)
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize('shape', [(1, 1, 3), (1, 9, 3), (300, 2, 3)])
def test_any_size(tmp_path, shape):
    array = pixels(1, shape)
    np.testing.assert_array_equal(images.read(saved(tmp_path, Image.fromarray(array))), array)


def test_gray_arrays():
    gray = pixels(2, (4, 6))
    expected = np.repeat(gray[..., None], 3, -1)
    np.testing.assert_array_equal(images.read(gray), expected)
    np.testing.assert_array_equal(images.read(gray[..., None]), expected)
    np.testing.assert_array_equal(images.read(gray > 99), np.where(expected > 99, 255, 0))
    np.testing.assert_array_equal(images.read_gray(gray > 99), (gray > 99).astype(np.float32))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA', 'RGBa', 'La'])
def test_transparency_lies_over_white(mode):
    colour = (255, 0, 0) if mode.startswith(('RGB', 'P')) else (0, 0, 0)
    layer = Image.new('RGBA', (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        layer.putpixel((x, 0), (*colour, alpha))
    if mode == 'PA':
        image = Image.new('PA', (3, 1))
        image.putpalette([0, 0, 0, 255, 0, 0])
        for x, alpha in enumerate((0, 128, 255)):
            image.putpixel((x, 0), (1, alpha))
    else:
        image = layer.convert('LA').convert(mode) if mode[0] == 'L' else layer.convert(mode)
    over_white = [[255 - (255 - c) * a / 255 for c in colour] for a in (0, 128, 255)]
    # Multiplied alpha is rounded by whoever saved it.
    np.testing.assert_allclose(images.read(image)[0], np.rint(over_white), atol=mode[-1] == 'a')


def test_transparent_palettes_and_keys(tmp_path):
    palette = Image.new('P', (2, 1))
    palette.putpalette([0, 255, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    expected = [[(0, 255, 0), RED]]
    np.testing.assert_array_equal(images.read(palette), expected)
    through = saved(tmp_path, palette, transparency=0)
    np.testing.assert_array_equal(images.read(through), [[(255, 255, 255), RED]])
    some = saved(tmp_path, palette, 'b.png', transparency=bytes([255, 128]))
    np.testing.assert_array_equal(images.read(some), [[(0, 255, 0), HALF]])
    key = Image.fromarray(np.array([[(1, 2, 3), RED]], np.uint8))
    key = saved(tmp_path, key, 'c.png', transparency=(1, 2, 3))
    np.testing.assert_array_equal(images.read(key), [[(255, 255, 255), RED]])


def test_other_modes():
    bit = Image.new('1', (2, 1))
    bit.putpixel((1, 0), 1)
    np.testing.assert_array_equal(images.read(bit)[0], [(0, 0, 0), (255, 255, 255)])
    np.testing.assert_array_equal(images.read(Image.new('CMYK', (1, 1), (0, 255, 255, 0))),
                                  [[RED]])
    np.testing.assert_array_equal(images.read(Image.new('RGBX', (1, 1), (255, 0, 0, 9))), [[RED]])
    reds = {'HSV': (0, 255, 255), 'YCbCr': (76, 85, 255), 'LAB': (138, 209, 198)}
    for mode, colour in reds.items():
        # Rounded to 8 bits; one step of Lab is up to 5 of sRGB here.
        np.testing.assert_allclose(images.read(Image.new(mode, (1, 1), colour)), [[RED]], atol=5)


def test_deep_gray_is_scaled(tmp_path):
    deep = np.array([[0, 257, 30000, 65535]], np.uint16)
    expected = [0, 1, round(30000 / 257), 255]
    image = Image.fromarray(deep)
    for source in (image, saved(tmp_path, image), saved(tmp_path, image, 'a.tiff'),
                   saved(tmp_path, image, 'a.pgm'), deep, Image.fromarray(deep.astype(np.int32))):
        np.testing.assert_array_equal(images.read(source)[0, :, 0], expected)
        gray = images.read_gray(source)  # 16 bits stay apart
        assert gray.dtype == np.float32
        np.testing.assert_allclose(gray, deep / 65535, rtol=1e-7)


@pytest.mark.parametrize('values, expected', [
    ([0.0, 0.25, 1.0], [0, 0.25, 1]),
    ([0.0, 51.0, 200.5], [0, 0.2, 200.5 / 255]),
    ([0.0, 65535.0, 13107.0], [0, 1, 0.2]),
    ([-1.0, 0.0, 3.0], [0, 0.25, 1]),
    ([1e6, 2e6, 5e6], [0, 0.25, 1]),
    ([-2.0, -2.0, -2.0], [0, 0, 0]),
])
def test_floats_of_any_range(tmp_path, values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    np.testing.assert_allclose(images.read_gray(saved(tmp_path, image, 'a.tiff'))[0], expected,
                               rtol=1e-6)


def test_luminance():
    colours = np.array([[RED, (0, 255, 0), (0, 0, 255), (255, 255, 255), (77, 77, 77)]], np.uint8)
    gray = images.read_gray(colours)
    assert gray.shape == (1, 5) and gray.dtype == np.float32
    np.testing.assert_allclose(gray[0, :3], [0.299, 0.587, 0.114], atol=1e-5)
    assert gray[0, 3] == 1
    np.testing.assert_allclose(gray[0, 4], 77 / 255, rtol=1e-6)


def test_a_mask_on_a_transparent_layer():
    layer = np.zeros((1, 3, 4), np.uint8)
    layer[0, 1:] = (255, 255, 255, 255), (255, 255, 255, 51)
    layer[0, 0, :3] = 255  # white, and invisible
    np.testing.assert_allclose(images.read_gray(layer), [[0, 1, 0.2]], rtol=1e-6)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # the top left corner
    turned = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
              5: lambda a: a.swapaxes(0, 1), 6: np.rot90,
              7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
              8: lambda a: np.rot90(a, -1)}[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(turned)), exif=exif)
    np.testing.assert_array_equal(images.read(path), upright)
    np.testing.assert_array_equal(images.read_gray(path), upright[..., 0] / np.float32(255))


@pytest.mark.parametrize('name', ['a.gif', 'a.png', 'a.webp'])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new('RGB', (4, 4), colour) for colour in (RED, (0, 255, 0))]
    options = {'lossless': True} if name == 'a.webp' else {}
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 2
    np.testing.assert_array_equal(images.read(path), np.full((4, 4, 3), RED))


def fails(message, source, error=ValueError):
    for read in (images.read, images.read_gray):
        with pytest.raises(error, match=message) as found:
            read(source)
        assert '\n' not in str(found.value)


def test_no_file(tmp_path):
    fails('no such file: .*none.png', tmp_path / 'none.png', FileNotFoundError)
    fails('is a folder', tmp_path)


@pytest.mark.parametrize('content', [b'', b'a text', b'{"a": 1}', b'\0' * 1000])
def test_no_image(tmp_path, content):
    (tmp_path / 'a.png').write_bytes(content)
    fails('a.png is not an image', tmp_path / 'a.png')


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.bmp', 'a.tiff', 'a.webp', 'a.gif'])
def test_damaged_files(tmp_path, name):
    path = saved(tmp_path, Image.fromarray(pixels(3, (64, 64, 3))), name)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(whole[:int(len(whole) * share)])
        fails(f'{name} is (damaged or cut off|not an image)', path)


def test_a_flipped_byte_of_a_png(tmp_path):
    path = saved(tmp_path, Image.fromarray(pixels(4, (64, 64, 3))))
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)
    fails('a.png is damaged or cut off', path)


@pytest.mark.parametrize('side', [300, 3000])  # Pillow warns of the one and refuses the other
def test_decompression_bombs(tmp_path, monkeypatch, side):
    path = saved(tmp_path, Image.new('L', (side, side)))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 80_000)
    message = f'{side * side} pixels, more than the limit of 80000'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        monkeypatch.setattr(Image.Image, 'load', lambda self: pytest.fail('decoded'))
        monkeypatch.setattr('PIL.ImageFile.ImageFile.load', lambda self: pytest.fail('decoded'))
        fails(message, path)
        if side == 300:
            warnings.simplefilter('ignore')
            with Image.open(path) as image:
                fails(message, image)


def test_bombs_without_a_limit(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new('L', (300, 300)))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert images.read(path).shape == (300, 300, 3)


@pytest.mark.parametrize('source, message', [
    (np.zeros((0, 5, 3), np.uint8), r'empty: its shape is \[0, 5, 3\]'),
    (np.zeros((5, 0)), 'empty'),
    (Image.new('RGB', (0, 0)), 'empty'),
    (Image.new('F', (0, 3)), 'empty'),
    (np.zeros((5, 5, 2), np.uint8), r'expected a picture of shape .* found \[5, 5, 2\]'),
    (np.zeros((1, 5, 5, 3), np.uint8), r'found \[1, 5, 5, 3\]'),
    (np.zeros(5), r'found \[5\]'),
    (np.zeros((5, 5), np.int64), 'found int64'),
    (np.zeros((5, 5), complex), 'found complex128'),
    (np.array([['a']]), 'found <U1'),
    (np.full((5, 5), np.nan), 'found values from nan to nan'),
    (np.array([[0.5, np.inf]]), 'found values from 0.5 to inf'),
    (np.array([[-1.0, 1.0]]), 'found values from -1 to 1'),
    (np.array([[0.0, 255.0]]), 'found values from 0 to 255'),
    (Image.fromarray(np.array([[0.5, np.nan]], np.float32)), 'not finite'),
    (None, 'found NoneType'),
    (b'bytes', 'found bytes'),
    (io.BytesIO(), 'found BytesIO'),
])
def test_bad_sources(source, message):
    fails(message, source)


def test_a_jpeg_of_thousands_of_scans_is_not_decoded(many_scans, tmp_path):
    (tmp_path / 'a.jpg').write_bytes(many_scans)
    for read in (lambda: images.read(tmp_path / 'a.jpg'),
                 lambda: images.read(Image.open(io.BytesIO(many_scans))),
                 lambda: images.read_bytes(many_scans, 'it', 2**20),
                 lambda: images.read_texts(many_scans, 'it', 2**20)):
        # Decoded it takes 15 s and more, each time.
        with at_most(1), pytest.raises(ValueError, match='has 40.. scans, expected at most 200'):
            read()
    file = io.BytesIO()
    Image.fromarray(pixels(shape=(64, 64, 3))).save(file, 'JPEG', progressive=True)
    assert images.read_bytes(file.getvalue(), 'it', 2**20).shape == (64, 64, 3)


@pytest.mark.parametrize('one, dtype', [(1, np.uint8), (1, np.uint16), (255, np.uint8)])
def test_masks_of_zeros_and_ones(one, dtype):
    """numpy masks are often 0 and 1 where pictures are 0 and 255."""
    mask = np.zeros((4, 6), dtype)
    mask[:, 3:] = one
    expected = np.float32(mask > 0)
    np.testing.assert_array_equal(images.read_gray(mask), expected)
    if dtype == np.uint8:
        np.testing.assert_array_equal(images.read_gray(Image.fromarray(mask)), expected)
    dark = np.array([[0, 1, 2]], np.uint8)  # not a mask of two values
    np.testing.assert_allclose(images.read_gray(dark), dark / np.float32(255))
