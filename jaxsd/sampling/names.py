"""The names that other programs have for samplers and schedules."""

from typing import Any

from .plans import SAMPLERS
from .schedules import SCHEDULES

# What stable-diffusion-webui (A1111) shows, and its "PNG Info" reads.
A1111_SAMPLERS = {
    'euler': 'Euler', 'euler_ancestral': 'Euler a', 'heun': 'Heun', 'dpm_2': 'DPM2',
    'dpm_2_ancestral': 'DPM2 a', 'lms': 'LMS', 'ddim': 'DDIM', 'ddpm': 'DDPM',
    'dpmpp_2m': 'DPM++ 2M', 'dpmpp_2m_sde': 'DPM++ 2M SDE', 'dpmpp_sde': 'DPM++ SDE',
    'dpmpp_2s_ancestral': 'DPM++ 2S a', 'dpmpp_3m_sde': 'DPM++ 3M SDE', 'unipc': 'UniPC',
    'dpm_fast': 'DPM fast', 'dpm_adaptive': 'DPM adaptive', 'restart': 'Restart', 'lcm': 'LCM',
    'plms': 'PLMS',
}
A1111_SCHEDULES = {
    'normal': 'Normal', 'karras': 'Karras', 'exponential': 'Exponential',
    'sgm_uniform': 'SGM Uniform', 'simple': 'Simple', 'ddim_uniform': 'DDIM',
    'polyexponential': 'Polyexponential', 'kl_optimal': 'KL Optimal', 'ays': 'Align Your Steps',
    'beta': 'Beta',
}
DIFFUSERS = {
    'euler': 'EulerDiscrete', 'euler_ancestral': 'EulerAncestralDiscrete', 'heun': 'HeunDiscrete',
    'dpm_2': 'KDPM2Discrete', 'dpm_2_ancestral': 'KDPM2AncestralDiscrete', 'lms': 'LMSDiscrete',
    'ddim': 'DDIM', 'ddpm': 'DDPM', 'dpmpp_2m': 'DPMSolverMultistep', 'unipc': 'UniPCMultistep',
    'dpm_solver_singlestep': 'DPMSolverSinglestep', 'deis': 'DEISMultistep', 'plms': 'PNDM',
    'dpmpp_sde': 'DPMSolverSDE', 'sa_solver': 'SASolver', 'lcm': 'LCM', 'tcd': 'TCD',
}
SAMPLER_NAMES = {name.lower(): ours for ours, name in A1111_SAMPLERS.items()} | {
    f'{name.lower()}scheduler': ours for ours, name in DIFFUSERS.items()} | {
    name: name for name in SAMPLERS} | {
    'edmeulerscheduler': 'euler', 'edmdpmsolvermultistepscheduler': 'dpmpp_2m',
    'dpm++ 2m sde heun': 'dpmpp_2m_sde', 'heunpp2': 'heunpp2', 'er sde': 'er_sde',
    'ddim cfg++': 'euler_cfg_pp', 'uni_pc': 'unipc', 'uni_pc_bh2': 'unipc', 'huen': 'heun'}
SCHEDULE_NAMES = {name.lower(): ours for ours, name in A1111_SCHEDULES.items()} | {
    name: name for name in SCHEDULES} | {
    'uniform': 'normal', 'ddim uniform': 'ddim_uniform', 'align your steps gits': 'gits',
    'turbo': 'turbo'}
# A1111's (modules/sd_samplers_kdiffusion.py, sd_samplers_timesteps.py), less their k_.
ALIASES = {'euler_a': 'euler_ancestral', 'dpm_2_a': 'dpm_2_ancestral', 'dpm_ad': 'dpm_adaptive',
           'dpmpp_2s_a': 'dpmpp_2s_ancestral', 'dpmpp_2m_sde_heun': 'dpm++ 2m sde heun',
           'ddim_cfgpp': 'ddim cfg++'}
# Options that a name stands for, ComfyUI's among them.
OPTIONS = {'dpm++ 2m sde heun': {'solver_type': 'heun'}, 'uni_pc': {'variant': 'bh1'},
           'uni_pc_bh2': {'variant': 'bh2'}}


def find_sampler(name: str) -> tuple[str | None, str | None, dict[str, Any] | None]:
    """'DPM++ 2M Karras', 'k_dpmpp_2m_ka', 'dpmpp_2m_sde_gpu_karras', 'EulerDiscreteScheduler' ->
    our names of the sampler and, or None, of the schedule, and the options that the name stands
    for. All None for a name that is not known."""
    low = _unaliased(name.lower())
    for end in ('', *SCHEDULE_NAMES):
        plain = low.removesuffix(end)
        if end and (plain == low or plain[-1:] not in ('_', ' ')):
            continue
        plain = plain.rstrip('_ ').removesuffix('_gpu')
        if plain in SAMPLER_NAMES:
            return SAMPLER_NAMES[plain], SCHEDULE_NAMES.get(end), OPTIONS.get(plain, {})
    return None, None, None


def _unaliased(name):
    """A1111's aliases ('k_euler_a', 'k_dpmpp_2m_ka') -> names that are known."""
    if name in ALIASES:
        return ALIASES[name]
    base = name.removeprefix('k_')
    plain = base.removesuffix('_ka')
    if base == name or plain not in ALIASES and plain not in SAMPLERS:
        return name
    return f'{ALIASES.get(plain, plain)}{" karras" if plain != base else ""}'
