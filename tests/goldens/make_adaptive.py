"""Make tests/goldens/adaptive.npz: k-diffusion's own dpm_adaptive on an analytic denoiser.

    python tests/goldens/make_adaptive.py PATH_TO_K_DIFFUSION

As make_sampling.py, in float64. One image is the whole batch, because k-diffusion takes the error
over the batch. Noise comes from the pool by the number of the model call that ends the step. The
file holds the options too, so that the test needs nothing from here.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from make_sampling import COMMIT, k_diffusion  # it makes the next one known

from golden_cases import denoise, start  # isort: skip

CASES = {  # case: (sigma_max, sigma_min, options)
    'default': (14.6, 0.03, {}),
    'order 2': (14.6, 0.03, {'order': 2}),
    'tight': (14.6, 0.03, {'rtol': 1e-3, 'atol': 1e-4}),
    'tight, order 2': (14.6, 0.03, {'order': 2, 'rtol': 1e-3, 'atol': 1e-4}),
    'loose, large first step': (14.6, 0.03, {'rtol': 0.2, 'h_init': 2.0}),
    'pid': (14.6, 0.03, {'pcoeff': 0.4, 'icoeff': 0.7, 'dcoeff': 0.2, 'rtol': 0.01}),
    'pid, order 2, strict': (80.0, 0.002, {
        'order': 2, 'pcoeff': 0.2, 'icoeff': 0.8, 'dcoeff': -0.1, 'accept_safety': 0.95}),
    'ancestral': (14.6, 0.03, {'eta': 1.0}),
    'ancestral, order 2': (14.6, 0.03, {'order': 2, 'eta': 0.5, 's_noise': 1.1, 'rtol': 0.1}),
}


def main(folder):
    torch.set_default_dtype(torch.float64)  # it makes tensors of the options
    reference = k_diffusion(folder)
    x, noises = start()
    out = {'commit': np.array(COMMIT)}
    for case, (first, last, options) in CASES.items():
        calls = 0

        def model(x, sigma):
            nonlocal calls
            calls += 1
            return denoise(x, sigma[:, None], torch)

        def fresh(*_):
            return torch.from_numpy(noises[(calls - 1) % len(noises)])  # noqa: B023

        result, info = reference.sample_dpm_adaptive(
            model, torch.from_numpy(x * first), last, first, disable=True, noise_sampler=fresh,
            return_info=True, **options)
        assert calls == info['nfe']
        out[f'{case}/plan'] = np.array(json.dumps([[first, last], options]))
        out[f'{case}/x'] = result.numpy()
        out[f'{case}/steps'] = np.array([calls, info['n_accept'], info['n_reject']])
    np.savez_compressed(pathlib.Path(__file__).with_name('adaptive.npz'), **out)


if __name__ == '__main__':
    main(sys.argv[1])
