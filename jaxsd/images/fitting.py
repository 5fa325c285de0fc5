"""Pictures and masks brought to a size, padded, cut out and put back.

A picture is uint8 [H,W,3], a mask float32 [H,W] in [0,1] with 1 where something new is to be drawn.
"""

import numpy as np
from jaxtyping import Float32, Float64

from jaxsd.images.opencv import opencv
from jaxsd.images.reading import Mask, Picture


def fit(image: np.ndarray, width: int, height: int, how: str = 'crop') -> np.ndarray:
    """A picture or a mask at width x height, in pixels; one that has the size comes back as it is.

    'crop' covers the size and cuts off equally at both sides, 'pad' fits inside it and repeats the
    pixels of the edge, 'stretch' changes the proportions. The same part of a picture and of its
    mask is kept. Pictures are filtered with Lanczos, masks bilinearly, which does not ring.
    """
    if how not in ('crop', 'pad', 'stretch'):
        raise ValueError(f'how={how!r}: expected crop, pad or stretch')
    if width < 1 or height < 1:
        raise ValueError(f'cannot fit a picture to {width}x{height}')
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        return image
    if how == 'stretch':
        return _resize(image, width, height)
    if how == 'crop':
        scale = max(width / columns, height / rows)
        w, h = width / scale, height / scale
        left, top = (columns - w) // 2, (rows - h) // 2  # whole: a mere crop keeps its pixels
        return _resize(image, width, height, (left, top, left + w, top + h))
    scale = min(width / columns, height / rows)
    w, h = max(1, round(columns * scale)), max(1, round(rows * scale))
    left, top = (width - w) // 2, (height - h) // 2
    return _extend(_resize(image, w, h), left, top, width - w - left, height - h - top)


def _resize(image, width, height, box=None):
    from PIL import Image
    size, filters = (width, height), Image.Resampling
    if image.ndim == 3:
        return np.asarray(Image.fromarray(image).resize(size, filters.LANCZOS, box))
    mask = Image.fromarray(image.astype(np.float32)).resize(size, filters.BILINEAR, box)
    return np.clip(mask, 0, 1)  # weights add up to 1 only to rounding


def _extend(image, left, top, right, bottom):
    sides = [(top, bottom), (left, right)] + [(0, 0)] * (image.ndim - 2)
    return np.pad(image, sides, mode='edge')


def pad(image: Picture, left: int, top: int, right: int, bottom: int, fill: str = 'edge',
        seed: int = 0) -> tuple[Picture, Mask]:
    """The picture with so many pixels more at each side, and the mask of what is new.

    fill: 'edge' repeats the pixels of the edge, 'noise' draws from the uniform distribution with
    the mean and deviation of each of the picture's channels, 'white'.
    """
    fills = {'edge': lambda big: big, 'noise': lambda big: _noise(image, big.shape, seed),
             'white': lambda big: np.full_like(big, 255)}
    if fill not in fills:
        raise ValueError(f'fill={fill!r}: expected {", ".join(fills)}')
    if min(left, top, right, bottom) < 0:
        raise ValueError('expected to pad by 0 pixels or more at each side, found '
                         f'{left}, {top}, {right}, {bottom} (left, top, right, bottom)')
    rows, columns = image.shape[:2]
    big = fills[fill](_extend(image, left, top, right, bottom))
    mask = np.ones(big.shape[:2], np.float32)
    known = np.s_[top:top + rows, left:left + columns]
    big[known], mask[known] = image, 0
    return big, mask


def _noise(image, shape, seed):
    mean, deviation = image.mean((0, 1)), image.std((0, 1))
    uniform = np.random.default_rng(seed).uniform(-np.sqrt(3), np.sqrt(3), shape)
    return np.rint(np.clip(mean + deviation * uniform, 0, 255)).astype(np.uint8)


def cover(image: Picture, mask: Mask, fill: str, seed: int = 0) -> Picture:
    """The picture with what the mask hides painted over.

    fill: 'edge' goes on from the edge of the mask inwards (Telea 2004), 'noise' as for `pad`.
    """
    if fill == 'noise':
        new = _noise(image, image.shape, seed)
    else:
        cv2 = opencv("fill='edge'")
        new = cv2.inpaint(image, (mask > 0).astype(np.uint8), 3, cv2.INPAINT_TELEA)
    known = image.astype(np.float32)
    return np.rint(known + (new - known) * mask[..., None]).astype(np.uint8)


def feather(mask: Mask, radius: float) -> Mask:
    """The mask with an edge that fades outwards over a Gaussian of deviation `radius`, in pixels.

    What was masked stays so; next to a straight edge the value falls from 1 as erfc, and it is
    exactly 0 farther than 3 * radius from the mask.
    """
    from scipy import ndimage
    if radius < 0:
        raise ValueError(f'feather by a radius of {radius}: expected 0 or more')
    if radius == 0 or not mask.any():
        return mask
    soft = ndimage.gaussian_filter(mask, radius, mode='nearest', radius=int(3 * radius))
    far = ndimage.distance_transform_edt(mask == 0) > 3 * radius
    # The blur of a straight edge is 1/2 on the edge itself.
    return np.where(far, np.float32(0), np.maximum(mask, np.minimum(1, 2 * soft)))


def box(mask: Mask, padding: int, width: int, height: int) -> tuple[int, int, int, int]:
    """The part of a picture to draw anew: (left, top, right, bottom), in whole pixels.

    The bounding box of mask > 0 with `padding` pixels around it, grown to the proportions of
    width:height as far as the picture allows. Raises ValueError for a mask that is all 0.
    """
    if not (mask > 0).any():
        raise ValueError('the mask is black everywhere: nothing to draw; paint white what is to '
                         'be replaced')
    (top, bottom), (left, right) = [
        (max(0, there[0] - padding), min(line.size, there[-1] + 1 + padding))
        for line in ((mask > 0).any(1), (mask > 0).any(0)) for there in [np.flatnonzero(line)]]
    w, h = right - left, bottom - top
    left, right = _grow(left, right, round(h * width / height), mask.shape[1])
    top, bottom = _grow(top, bottom, round(w * height / width), mask.shape[0])
    return int(left), int(top), int(right), int(bottom)


def _grow(start, end, length, limit):
    """An interval grown about its middle to a length, moved to lie within 0..limit."""
    length = min(max(length, end - start), limit)
    start = min(max(0, start - (length - (end - start)) // 2), limit - length)
    return start, start + length


def paste(picture: Picture, patch: Picture, box: tuple[int, int, int, int], mask: Mask) -> Picture:
    """The picture with a patch, of any size, over its box (left, top, right, bottom) by the mask.

    mask: of the whole picture; where it is 0 the picture stays untouched to the bit.
    """
    check_sizes(picture, mask)
    left, top, right, bottom = box
    there = np.s_[top:bottom, left:right]
    known = picture[there].astype(np.float32)
    patch = fit(patch, right - left, bottom - top, 'stretch')
    out = picture.copy()
    out[there] = np.rint(known + (patch - known) * mask[there][..., None])
    return out


def check_sizes(image: np.ndarray, mask: np.ndarray) -> None:
    """ValueError unless the mask has as many rows and columns as the image."""
    if image.shape[:2] != mask.shape[:2]:
        (h, w), (mh, mw) = image.shape[:2], mask.shape[:2]
        raise ValueError(f'the image is {w}x{h} and the mask {mw}x{mh}: expected the same size')


def downsample(mask: Mask, factor: int) -> Float32[np.ndarray, 'h w']:
    """A mask [H,W] at the size of the latents, [H/factor,W/factor]: the maximum of each cell."""
    rows, columns = mask.shape
    if rows % factor or columns % factor:
        raise ValueError(f'a mask of {columns}x{rows}: expected multiples of {factor}')
    cells = mask.reshape(rows // factor, factor, columns // factor, factor)
    return cells.max((1, 3))


def cubic(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Maps [...,H,W] at height x width, float64, by cubic convolution without antialiasing, as
    torch.nn.functional.interpolate's bicubic."""
    return cubic_weights(maps.shape[-2], height) @ maps @ cubic_weights(maps.shape[-1], width).T


def cubic_weights(n: int, m: int) -> Float64[np.ndarray, 'm n']:
    """The matrix of cubic convolution from n to m samples, with A=-0.75 (Keys 1981)."""
    at = (np.arange(m)[:, None] + 0.5) * n / m - 0.5
    taps = np.floor(at) + np.arange(-1, 3)  # [m,4]
    d = abs(at - taps)
    weights = np.where(d <= 1, 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4))
    matrix = np.zeros((m, n))
    np.add.at(matrix, (np.arange(m)[:, None], np.clip(taps, 0, n - 1).astype(int)), weights)
    return matrix
