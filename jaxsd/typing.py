"""Types that many signatures share. Shapes of arrays are jaxtyping's: Float[Array, 'B H W C']."""

import os
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # a signature shall not make an import slow
    import jax
    import numpy as np
    from PIL import Image

Path = str | os.PathLike[str]
Params = dict[str, Any]  # arrays, nested by the parts of their names: p['conv_in']['weight']
Shapes = dict[str, tuple[int, ...]]  # {dotted name: shape}, torch's order of axes
ImageLike: TypeAlias = 'Path | Image.Image | np.ndarray | jax.Array'  # see images.read
Device: TypeAlias = 'jax.Device | jax.sharding.Sharding'
