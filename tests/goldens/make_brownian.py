"""brownian.npz: noise of k-diffusion's BrownianTreeNoiseSampler, by torchsde.

    pip install torch torchsde
    python tests/goldens/make_brownian.py

Made with torchsde 0.2.6 and torch 2.13 on a CPU. k_diffusion/sampling.py: a tree between the least
and the largest level, from which the increment between two levels is divided by the square root of
their distance; it is negative where the levels go down.
"""

import pathlib

import numpy as np
import torch
import torchsde

SEEDS = (0, 7, 2**40 + 3)
SHAPES = ((4, 6, 5), (1, 2, 3), (4, 4, 4))  # the second of fewer than 16 numbers
LEVELS = (14.6146, 9.7, 4.25, 1.5, 0.6, 0.0292)
SPANS = [(14.6146, 9.7), (9.7, 4.25), (4.25, 1.5), (14.6146, 1.5), (1.5, 0.6), (0.6, 0.0292),
         (4.25, 4.25 - 3e-6)]


def main():
    low, high = (torch.tensor(x) for x in (LEVELS[-1], LEVELS[0]))
    found = {}
    for seed in SEEDS:
        for shape in SHAPES:
            tree = torchsde.BrownianTree(low, torch.zeros(shape), high, entropy=seed)
            noises = []
            for a, b in torch.tensor(SPANS):
                noises.append(-tree(b, a) / (b - a).abs().sqrt())
            found[f'{seed} {shape}'] = torch.stack(noises).numpy()
        both = torchsde.BrownianTree(low, torch.zeros(2, 4, 6, 5), high, entropy=seed)
        a, b = torch.tensor(SPANS[1])
        found[f'{seed} of two'] = (-both(b, a) / (b - a).abs().sqrt()).numpy()
    np.savez_compressed(pathlib.Path(__file__).parent / 'brownian.npz', **found)


if __name__ == '__main__':
    main()
