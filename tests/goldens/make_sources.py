"""Write sources.npz: what torch.randn gives. python tests/goldens/make_sources.py"""

import pathlib

import numpy as np
import torch

CASES = [(0, (1, 4, 8, 8), 3), (7, (3, 4, 3, 3), 2), (2**32 + 5, (1, 1, 3, 3), 3),
         (2**64 - 1, (2, 1, 1, 3), 3)]  # seed, [n,C,h,w], draws

if __name__ == '__main__':
    found = {}
    for seed, shape, draws in CASES:
        generator = torch.Generator().manual_seed(seed)
        found[f'{seed}'] = np.stack([torch.randn(shape, generator=generator).numpy()
                                     for _ in range(draws)])
    np.savez_compressed(pathlib.Path(__file__).with_name('sources.npz'), **found)
