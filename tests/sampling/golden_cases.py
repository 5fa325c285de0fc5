"""What tests/goldens/make_sampling.py and test_goldens.py both run."""

import numpy as np

CASES = {  # case: (sampler, options)
    'euler': ('euler', {}),
    'euler_churn': ('euler', {'s_churn': 4.0, 's_noise': 1.003}),
    'euler_churn_early': ('euler', {'s_churn': 100.0, 's_tmin': 1.0}),
    'euler_ancestral': ('euler_ancestral', {}),
    'euler_ancestral_half': ('euler_ancestral', {'eta': 0.5, 's_noise': 0.9}),
    'heun': ('heun', {}),
    'heun_churn': ('heun', {'s_churn': 4.0}),
    'dpm_2': ('dpm_2', {}),
    'dpm_2_churn': ('dpm_2', {'s_churn': 4.0}),
    'dpm_2_ancestral': ('dpm_2_ancestral', {}),
    'dpm_2_ancestral_eta0': ('dpm_2_ancestral', {'eta': 0.0}),
    'lms': ('lms', {}),
    'lms_2': ('lms', {'order': 2}),
    'dpmpp_2m': ('dpmpp_2m', {}),
    'dpmpp_2m_sde': ('dpmpp_2m_sde', {}),
    'dpmpp_2m_sde_heun': ('dpmpp_2m_sde', {'solver_type': 'heun', 'eta': 0.7}),
    'dpmpp_2m_sde_eta0': ('dpmpp_2m_sde', {'eta': 0.0}),
    'dpmpp_3m_sde': ('dpmpp_3m_sde', {}),
    'dpmpp_3m_sde_eta0': ('dpmpp_3m_sde', {'eta': 0.0}),
    'dpmpp_2s_ancestral': ('dpmpp_2s_ancestral', {}),
    'dpmpp_2s_ancestral_eta0': ('dpmpp_2s_ancestral', {'eta': 0.0}),
    'dpmpp_sde': ('dpmpp_sde', {}),
    'dpmpp_sde_r': ('dpmpp_sde', {'r': 0.7, 'eta': 0.5, 's_noise': 1.1}),
    'dpm_fast': ('dpm_fast', {}),
    'dpm_fast_eta': ('dpm_fast', {'eta': 0.6, 's_noise': 1.1}),
}


def denoise(x, sigma, lib):
    """The posterior mean of x0 in {-0.8, 0.8} + 0.3 N(0, 1), seen as x = x0 + sigma N(0, 1)."""
    total = sigma**2 + 0.3**2
    return (0.3**2 * x + sigma**2 * 0.8 * lib.tanh(0.8 * x / total)) / total


def start():
    """The initial noise [2,8] and a pool of noises [96,2,8] that samplers draw from in order."""
    random = np.random.default_rng(7)
    return random.standard_normal((2, 8)), random.standard_normal((96, 2, 8))
