"""Make tests/goldens/sampling.npz: k-diffusion's own samplers on an analytic denoiser, in float64.

    python tests/goldens/make_sampling.py PATH_TO_K_DIFFUSION

From k_diffusion/sampling.py of https://github.com/crowsonkb/k-diffusion (commit given below).
Only that file is loaded; its imports that the samplers do not use (torchdiffeq, torchsde and the
package's own utilities, but for append_dims) are stubbed. Needs torch, scipy, tqdm. The cases and
the denoiser are those of tests/sampling/golden_cases.py, shared with the test, the noise levels
those of tests/sampling/reference.py.
"""

import importlib.util
import itertools
import pathlib
import sys
import types

import numpy as np
import torch

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'sampling')]
from golden_cases import CASES, denoise, start  # noqa: E402
from reference import SCHEDULES  # noqa: E402

COMMIT = '4601bf085320592473f681a62808ed873d17fad5'


def k_diffusion(folder):
    """k-diffusion's sampling module, its unused imports stubbed."""
    utils = types.ModuleType('k_diffusion.utils')
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    package = types.ModuleType('k_diffusion')
    package.utils = utils
    stubs = {'k_diffusion': package, 'k_diffusion.utils': utils}
    for name, member in (('torchdiffeq', 'odeint'), ('torchsde', 'BrownianTree')):
        stubs[name] = types.ModuleType(name)
        setattr(stubs[name], member, None)
    sys.modules.update(stubs)
    path = pathlib.Path(folder) / 'k_diffusion' / 'sampling.py'
    spec = importlib.util.spec_from_file_location('k_diffusion.sampling', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder):
    torch.set_default_dtype(torch.float64)  # dpm_fast makes its own levels
    reference = k_diffusion(folder)
    x, noises = start()
    out = {'commit': np.array(COMMIT)}
    for (case, (name, options)), ((schedule, steps), sigmas) in itertools.product(
            CASES.items(), SCHEDULES.items()):
        count = itertools.count()
        calls = 0

        def fresh(*_):
            return torch.from_numpy(noises[next(count)])  # noqa: B023

        def model(x, sigma):
            nonlocal calls
            calls += 1
            return denoise(x, sigma[:, None], torch)

        extra = {} if name in ('euler', 'heun', 'dpm_2', 'lms', 'dpmpp_2m') else {
            'noise_sampler': fresh}
        torch.randn_like = fresh  # euler, heun and dpm_2 draw with it, even without churn
        levels = (torch.from_numpy(sigmas),)
        if name == 'dpm_fast':  # sigma_min, sigma_max and the number of calls
            levels = (sigmas[-2], sigmas[0], len(sigmas) - 1)
        result = getattr(reference, f'sample_{name}')(
            model, torch.from_numpy(x * sigmas[0]), *levels, disable=True, **options, **extra)
        out[f'{case}/{schedule}/{steps}/x'] = result.numpy()
        out[f'{case}/{schedule}/{steps}/calls'] = np.array(calls)
    np.savez_compressed(pathlib.Path(__file__).with_name('sampling.npz'), **out)


if __name__ == '__main__':
    main(sys.argv[1])
