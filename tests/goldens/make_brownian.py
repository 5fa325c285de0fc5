"""brownian.npz: noise of k-diffusion's BrownianTreeNoiseSampler, by torchsde.

    pip install torch torchsde
    python tests/goldens/make_brownian.py PATH_TO_K_DIFFUSION

Made with torchsde 0.2.6 and torch 2.13 on a CPU. k_diffusion/sampling.py: a tree between the least
and the largest level, from which the increment between two levels is divided by the square root of
their distance; it is negative where the levels go down. And what k-diffusion's SDE samplers come to
with it, on the denoiser of golden_cases.py and torch's noise of seed 7.
"""

import pathlib
import sys

import numpy as np
import torch
import torchsde

sys.path[:0] = [str(pathlib.Path(__file__).parents[1] / 'sampling')]
from golden_cases import denoise  # noqa: E402
from make_sampling import k_diffusion  # noqa: E402

SAMPLERS = ('dpmpp_sde', 'dpmpp_2m_sde', 'dpmpp_3m_sde')
SEEDS = (0, 7, 2**40 + 3)
SHAPES = ((4, 6, 5), (1, 2, 3), (4, 4, 4))  # the second of fewer than 16 numbers
LEVELS = (14.6146, 9.7, 4.25, 1.5, 0.6, 0.0292)
SPANS = [(14.6146, 9.7), (9.7, 4.25), (4.25, 1.5), (14.6146, 1.5), (1.5, 0.6), (0.6, 0.0292),
         (4.25, 4.25 - 3e-6)]


def main(folder):
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
    reference = k_diffusion(folder)
    reference.torchsde = torchsde  # that file is loaded without it
    noise = torch.randn(1, 4, 4, 4, generator=torch.manual_seed(7))
    for name in SAMPLERS:
        found[f'7 {name}'] = getattr(reference, f'sample_{name}')(
            lambda x, sigma: denoise(x, sigma[:, None, None, None], torch), noise * high,
            torch.tensor((*LEVELS, 0.0)), disable=True,
            noise_sampler=reference.BrownianTreeNoiseSampler(noise, low, high, seed=7)).numpy()
    np.savez_compressed(pathlib.Path(__file__).parent / 'brownian.npz', **found)


if __name__ == '__main__':
    main(sys.argv[1])
