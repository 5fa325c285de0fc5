"""diffusers' schedulers: the noise levels and timesteps of a scheduler_config.json, and the sampler
that steps as its class does. numpy, with the roundings of diffusers' float32 tables."""

import functools
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np

from jaxsd.config import BETAS, ScheduleConfig
from jaxsd.config_files import read_json, schedule_config
from jaxsd.typing import Path

from .choice import flag, number, one_of
from .levels import betas, model_sigmas
from .schedules import SCHEDULES, beta, exponential, karras

PREFIX, FILE = 'diffusers:', 'scheduler_config.json'  # of a schedule's name, before a path


class Kind(NamedTuple):
    """How a class of diffusers spaces and steps.

    sampler: ours. spacing: its own timestep_spacing. unit: x has unit variance all the way (the
    training convention), so that noise to start from is not x0 + sigma noise, but only noise. over:
    it leaves out the last of steps + 1 timesteps. whole: its timesteps are whole numbers. edm: for
    EDM models, whose levels have two ends and no timesteps.
    """

    sampler: str
    spacing: str = 'linspace'
    unit: bool = False
    over: bool = False
    whole: bool = False
    edm: bool = False


_DPM = functools.partial(Kind, unit=True, over=True, whole=True)
KINDS = {
    'EulerDiscrete': Kind('euler'), 'EulerAncestralDiscrete': Kind('euler_ancestral'),
    'HeunDiscrete': Kind('heun'), 'LMSDiscrete': Kind('lms'), 'KDPM2Discrete': Kind('dpm_2'),
    'KDPM2AncestralDiscrete': Kind('dpm_2_ancestral'),
    'DDIM': Kind('ddim', 'leading', unit=True, whole=True),
    'DDPM': Kind('ddpm', 'leading', unit=True, whole=True),
    'PNDM': Kind('plms', 'leading', unit=True, whole=True),
    'DPMSolverMultistep': _DPM('dpm_solver_multistep'),
    'DPMSolverSinglestep': _DPM('dpm_solver_singlestep'),
    'UniPCMultistep': _DPM('unipc'), 'DEISMultistep': _DPM('deis'),
    'SASolver': _DPM('sa_solver'), 'DPMSolverSDE': Kind('dpmpp_sde'),
    'LCM': Kind('lcm', unit=True, whole=True), 'TCD': Kind('tcd', unit=True, whole=True),
    'EDMEuler': Kind('euler', edm=True),
    'EDMDPMSolverMultistep': Kind('dpm_solver_multistep', edm=True),
}
SPACINGS = ('linspace', 'leading', 'trailing')
ENDS, EDM = ('sigma_min', 'sigma_max'), ('sigma_schedule', 'rho')  # EDM: options of theirs alone
CURVES: dict[str, Callable[..., np.ndarray]] = {
    'use_karras_sigmas': karras, 'use_lu_lambdas': exponential,
    'use_exponential_sigmas': exponential,
    'use_beta_sigmas': functools.partial(beta, space='sigma')}
# Settings of a scheduler_config.json that change its steps, and the values that are implemented;
# the first is diffusers' default. TAKEN: where it is an option of the sampler.
FIXED = {'thresholding': (False,), 'use_flow_sigmas': (False,), 'timestep_type': ('discrete',),
         'lower_order_final': (True,), 'euler_at_final': (False,), 'predict_x0': (True,),
         'disable_corrector': ([],), 'solver_p': (None,), 'interpolation_type': ('linear',),
         'use_dynamic_shifting': (False,), 'shift_terminal': (None,), 'tau_func': (None,),
         'noise_sampler_seed': (None,)}
TAKEN = {'lower_order_final': ('DPMSolverMultistep', 'DEISMultistep', 'EDMDPMSolverMultistep',
                               'SASolver', 'DPMSolverSinglestep'),  # which sets it itself
         'euler_at_final': ('DPMSolverMultistep', 'EDMDPMSolverMultistep')}


class Spaced(NamedTuple):
    """A scheduler's steps. sigmas [steps + 1]: noise levels; timesteps [steps]: at which the model
    is called. start: what noise is multiplied with to begin from it alone; None: with the level
    that it begins at. unit: as of Kind, so that what it ends with is the last point divided by
    sqrt(1 + sigma^2)."""

    sigmas: np.ndarray
    timesteps: np.ndarray
    start: float | None
    unit: bool


def diffusers(steps: int, config: ScheduleConfig, scheduler: str = 'DPMSolverMultistep',
              timestep_spacing: str | None = None, steps_offset: int = 0,
              use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False,
              use_beta_sigmas: bool = False, use_lu_lambdas: bool = False,
              final_sigmas_type: str = 'zero', set_alpha_to_one: bool | None = None,
              lambda_min_clipped: float = -np.inf, original_inference_steps: int = 50,
              sigma_min: float | None = None, sigma_max: float | None = None,
              sigma_schedule: str = 'karras', rho: float = 7.0) -> np.ndarray:
    """The noise levels of a scheduler of diffusers, the last one with them -> [steps + 1].

    scheduler: its class, such as 'DDIM' or 'DDIMScheduler'; the others as in a
    scheduler_config.json, the last two of EDM's classes alone, whose sigma_min and sigma_max are
    the model's where they are None. The model is called at the scheduler's timesteps, which are
    whole where diffusers rounds them.
    """
    return spaced(**locals()).sigmas


def from_file(path: Path, steps: int, config: ScheduleConfig) -> np.ndarray:
    """`diffusers` with the settings of a file, see `read_scheduler`."""
    return spaced(steps, config, **level_options(read_scheduler(path, config))).sigmas


def spaced(steps: int, config: ScheduleConfig, scheduler: str = 'DPMSolverMultistep',
           **options: Any) -> Spaced:
    """Arguments of `diffusers` -> Spaced. Raises ValueError for what diffusers cannot do either,
    and for options of other schedulers."""
    name = _class(scheduler)
    kind = KINDS[name]
    if config.edm != kind.edm:
        fit = [other for other, its in KINDS.items() if its.edm == config.edm]
        this = 'an EDM model, without betas' if config.edm else 'a model with betas, not of EDM'
        raise ValueError(f"schedule 'diffusers': this is {this}: expected the scheduler "
                         f'{" or ".join(fit) if config.edm else ", ".join(fit)}, found {name}')
    given = {key: value for key, value in options.items() if value != _defaults()[key]}
    own = ('final_sigmas_type', *ENDS, *EDM)
    if others := [key for key in given if (key not in own if kind.edm else key in EDM)]:
        raise ValueError(f'{name}Scheduler has no option {", ".join(others)}')
    return (_by_levels if kind.edm else _by_timesteps)(name, kind, steps, config, **given)


def _by_levels(name, kind, steps, config, final_sigmas_type='zero', sigma_min=None, sigma_max=None,
               sigma_schedule='karras', rho=7.0):
    """Of an EDM model: `_compute_karras_sigmas` and `_compute_exponential_sigmas`."""
    low = config.sigma_min if sigma_min is None else sigma_min
    high = config.sigma_max if sigma_max is None else sigma_max
    one_of('final_sigmas_type', final_sigmas_type, ('zero', 'sigma_min'))
    if one_of('sigma_schedule', sigma_schedule, ('karras', 'exponential')) == 'karras':
        sigmas = karras(steps, config, low, high, number('rho', rho))
    else:  # it has them from below, so that the only level of one step is the lowest
        sigmas = exponential(steps, config, low, low if steps == 1 else high)
    least = sigmas[-1] if name == 'EDMEuler' else low
    sigmas = _closed(sigmas, least if final_sigmas_type == 'sigma_min' else 0.0)
    return Spaced(sigmas, np.log(sigmas[:-1]) / 4, np.hypot(high, 1), kind.unit)


def _by_timesteps(name, kind, steps, config, timestep_spacing=None, steps_offset=0,
                  final_sigmas_type='zero', set_alpha_to_one=None, lambda_min_clipped=-np.inf,
                  original_inference_steps=50, sigma_min=None, sigma_max=None, **curves):
    """Of a model with betas."""
    spacing = one_of('timestep_spacing', kind.spacing if timestep_spacing is None else
                     timestep_spacing, SPACINGS)
    curve = [key for key, on in curves.items() if flag(key, on)]
    if len(curve) > 1:
        raise ValueError(f'{" and ".join(curve)}: expected one of them')
    if isinstance(steps_offset, bool) or not isinstance(steps_offset, int):
        raise ValueError(f'steps_offset={steps_offset!r}: expected a whole number')
    if set_alpha_to_one is not None:
        flag('set_alpha_to_one', set_alpha_to_one)
    if not curve and not sigma_min is sigma_max is None:
        raise ValueError(f'sigma_min={sigma_min}, sigma_max={sigma_max}: expected neither beside a '
                         f'{name}Scheduler without one of {", ".join(CURVES)}')
    table, total = float32_sigmas(config), config.num_train_timesteps
    last = total
    if name in ('DPMSolverMultistep', 'DPMSolverSinglestep', 'SASolver'):
        last -= int((-np.log(table) < number('lambda_min_clipped', lambda_min_clipped)).sum())
    if name in ('LCM', 'TCD'):
        t = _distilled(steps, total, original_inference_steps)
    else:
        t = _timesteps('linspace' if name == 'DPMSolverSinglestep' else spacing,  # its only one
                       steps, total, last, steps_offset, kind)
    if len(t) < steps or t[0] >= total or t[-1] < 0:
        raise ValueError(f"schedule 'diffusers': {name} cannot make {steps} steps, from timestep "
                         f'{t[0]:g} to {t[-1]:g} of {total}; use other steps or another '
                         'steps_offset')
    if name == 'PNDM' and np.any(np.diff(t) != -(total // steps)):
        raise ValueError(f"schedule 'diffusers': PNDM goes {total // steps} timesteps down in each "
                         f'of {steps} steps, which timestep_spacing={spacing!r} does not; use '
                         f'steps that divide {total}')
    sigmas = np.interp(t, np.arange(total), table)
    if curve:
        ends = (table[0], table[-1]) if kind.over else (sigmas[-1], sigmas[0])
        low, high = (end if given is None else given
                     for end, given in zip(ends, (sigma_min, sigma_max)))
        sigmas = CURVES[curve[0]](steps, config, sigma_min=low, sigma_max=high)
        t = _called(name, kind, curve[0], _sigma_to_t(sigmas, table), config)
    final = _final(name, final_sigmas_type, set_alpha_to_one, table[0], sigmas[-1], bool(curve))
    wide = kind.unit or spacing == 'leading'
    sigmas = _closed(sigmas, final)
    return Spaced(sigmas, t, np.hypot(sigmas[0], 1) if wide else sigmas[0], kind.unit)


def _closed(sigmas, final):
    """Levels and the one at which they end, of float32."""
    sigmas = np.append(sigmas, final).astype(np.float32).astype(np.float64)
    if sigmas[-1] >= sigmas[-2]:  # a last call that changes nothing, which counts for the orders
        sigmas[-1] = sigmas[-2] * (1 - 1e-7)
    return sigmas


@functools.cache
def _defaults():
    """{option of `diffusers`: its default}."""
    return {name: found.default for name, found in inspect.signature(diffusers).parameters.items()}


@functools.lru_cache(maxsize=16)
def float32_sigmas(config: ScheduleConfig) -> np.ndarray:
    """`model_sigmas` with the roundings of diffusers' float32 tensors, but for the last digit of
    torch's square roots -> float64 [T] (read-only)."""
    if config.rescale_betas_zero_snr:  # ratios of such roundings there
        return model_sigmas(config)
    beta = betas(config).astype(np.float32)
    if config.trained_betas is None and config.beta_schedule != 'squaredcos_cap_v2':
        root = 0.5 if config.beta_schedule == 'scaled_linear' else 1
        first, last = (np.float32(b**root) for b in (config.beta_start, config.beta_end))
        i, n = np.arange(len(beta)), len(beta)
        step = np.float64((last - first) / np.float32(n - 1))  # torch.linspace goes from both ends
        even = np.where(i < n // 2, first + step * i, last - step * (n - 1 - i))
        beta = even.astype(np.float32) ** (1 if root == 1 else 2)
    abar = np.cumprod((np.float32(1) - beta).astype(np.float64)).astype(np.float32)
    sigmas = np.sqrt((np.float32(1) - abar) / abar).astype(np.float64)
    sigmas.flags.writeable = False
    return sigmas


def _sigma_to_t(sigmas, table):
    """Timesteps as `_sigma_to_t` of diffusers' schedulers has them, with its roundings."""
    logs, log = np.log(np.float32(table)), np.log(sigmas)
    low = np.clip((logs <= log[:, None]).sum(1) - 1, 0, len(logs) - 2)
    share = np.clip((logs[low] - log) / (logs[low] - logs[low + 1]), 0, 1)
    return (1 - share) * low + share * (low + 1)


def _timesteps(spacing, steps, total, last, offset, kind):
    """Timesteps at even distances, as `set_timesteps` has them, descending -> [steps]."""
    count = steps + kind.over
    if spacing == 'linspace':
        t = np.linspace(0, last - 1, count)
        t = (np.round(t) if kind.whole else np.float32(t))[::-1]
    elif spacing == 'leading':
        t = np.arange(count)[::-1] * (last // count) + offset
    else:
        t = np.round(np.arange(last, 0, -total / steps)) - 1
    return np.asarray(t, np.float64)[:steps]


def _distilled(steps, total, original):
    """LCM's: every (total // original)-th timestep, and of those evenly `steps`."""
    if original not in range(1, total + 1) or steps > original:
        raise ValueError(f'original_inference_steps={original}: expected a whole number from '
                         f'steps={steps} to {total}; use fewer steps or raise it')
    taken = np.floor(np.linspace(0, original, steps, endpoint=False))
    return (original - taken) * (total // original) - 1


def _called(name, kind, curve, t, config):
    """The timesteps at which a model is called for the levels of a curve, rounded as there."""
    rounds = curve in ('use_karras_sigmas', 'use_lu_lambdas') and not (
        name == 'DPMSolverMultistep' and config.beta_schedule == 'squaredcos_cap_v2')
    if rounds and (kind.whole or kind.sampler.startswith('dpm_2')):
        t = np.round(t)
    return np.trunc(t) if kind.whole else t


def _final(name, kind, set_alpha_to_one, least, last, curve):
    """The level at which the last step ends."""
    one_of('final_sigmas_type', kind, ('zero', 'sigma_min'))
    if name in ('DDIM', 'PNDM'):
        one = name == 'DDIM' if set_alpha_to_one is None else set_alpha_to_one
        return 0.0 if one else least
    if name == 'DEISMultistep':
        return last if curve else least
    if name == 'SASolver':
        return last if curve else least
    if name == 'TCD' or kind == 'sigma_min' and name == 'UniPCMultistep' and not curve:
        return least
    if kind == 'sigma_min' and name == 'UniPCMultistep':
        return last
    return least if kind == 'sigma_min' and name in (
        'EulerDiscrete', 'DPMSolverMultistep', 'DPMSolverSinglestep') else 0.0


def _class(name):
    name = str(name).removesuffix('Scheduler')
    if name in ('DDIMParallel', 'DDPMParallel'):  # the same, of which many steps may be one batch
        name = name.removesuffix('Parallel')
    return one_of('scheduler of diffusers', name, KINDS)


def read_scheduler(path: Path, config: ScheduleConfig | None = None) -> dict[str, Any]:
    """The settings in a scheduler_config.json, given as the file, its folder or a model's.

    Raises ValueError if it cannot be read, and where its betas, or sigma_data of an EDM model, are
    not those of `config`.
    """
    file = scheduler_file(path)
    settings = read_json(file, dict)
    trained = read_json(file, schedule_config)
    config = config or trained
    for field in ('sigma_data',) if trained.edm else ('num_train_timesteps', *BETAS):
        ours, theirs = getattr(config, field), getattr(trained, field)
        if ours != theirs and config.edm == trained.edm:  # `spaced` names models of another kind
            raise ValueError(f'{file}: is for {field}={theirs!r:.80}, and this model has '
                             f'{ours!r:.80}; use a scheduler made for this model')
    return settings


def scheduler_file(path: Path) -> pathlib.Path:
    """The file that `read_scheduler` reads."""
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        inside = path / 'scheduler' / FILE
        path = inside if inside.exists() else path / FILE
    return path


def level_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json's settings -> options of the schedule 'diffusers'."""
    name = _class(settings.get('_class_name'))
    known = [key for key in _defaults() if key not in ('steps', 'config', 'scheduler')]
    if KINDS[name].edm:  # with the defaults of its class, whatever the model has
        known, settings = ['final_sigmas_type', *ENDS, *EDM], {
            'sigma_min': 0.002, 'sigma_max': 80.0, **settings}
    else:
        curved = any(settings.get(curve) for curve in CURVES)
        known = [key for key in known if key not in (EDM if curved else (*EDM, *ENDS))]
    return {'scheduler': name} | {
        key: settings[key] for key in known if settings.get(key) is not None}


def sampler_of(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A scheduler_config.json's settings -> the sampler that steps as its class does, and its
    options. Raises ValueError for settings that are not implemented."""
    name = _class(settings.get('_class_name'))
    found, get = KINDS[name].sampler, settings.get
    for key, values in FIXED.items():
        if (value := get(key, values[0])) not in values and name not in TAKEN.get(key, ()):
            raise ValueError(f'{key}={value!r:.80} of a {name}Scheduler is not implemented; '
                             f'expected {values[0]!r}')
    if get('clip_sample', name in ('DDIM', 'DDPM')):
        raise ValueError(f'clip_sample=true of a {name}Scheduler is not implemented; expected '
                         'false, as latents have no limits')
    if name == 'PNDM' and not get('skip_prk_steps', False):
        return 'pndm', {'ratio': True}
    ends = {key: settings[key] for key, names in TAKEN.items()
            if name in names and get(key, FIXED[key][0]) not in FIXED[key]}
    order = {'order': get('solver_order', 2)}
    algorithm = {'algorithm': get('algorithm_type', 'dpmsolver++')}
    # Of whole timesteps, 200 to 800: rounded, and truncated from these curves.
    cut = get('use_exponential_sigmas') or get('use_beta_sigmas')
    noisy = (200.0, 801.0) if cut else (199.5, 800.5)
    spacing = get('timestep_spacing', KINDS[name].spacing)
    options: dict[str, dict[str, Any]] = {
        'ddim': {} if spacing == 'leading' else {'ratio': True},
        'ddpm': {'variance': get('variance_type') or 'fixed_small'},
        'lcm': {'timestep_scaling': get('timestep_scaling', 10.0)},
        'dpm_solver_multistep': {**order, **algorithm,
                                 'solver_type': get('solver_type', 'midpoint'), **ends},
        'dpm_solver_singlestep': {**order, **algorithm},
        'sa_solver': {
            'predictor_order': get('predictor_order', 2), 'simple_order_2': True,
            'corrector_order': get('corrector_order', 2),
            'lower_order_final': get('lower_order_final', True),
            'algorithm': get('algorithm_type', 'data_prediction'), 'tau_timesteps': noisy},
        'unipc': {**order, 'variant': get('solver_type', 'bh2')}, 'deis': {**order, **ends}}
    return found, options.get(found, {})


def of_schedule(name: Any, config: ScheduleConfig | None = None) -> dict[str, Any] | None:
    """What a schedule's name says of a scheduler, as in a scheduler_config.json; None for those
    that are none of diffusers'."""
    if isinstance(name, str) and name.startswith(PREFIX):
        return read_scheduler(name.removeprefix(PREFIX), config)
    return {} if name == 'diffusers' else None


cast(dict[str, Any], SCHEDULES)['diffusers'] = diffusers
