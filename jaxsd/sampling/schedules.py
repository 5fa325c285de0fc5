"""Schedules by name: functions `(steps, config, **options) -> [steps] sigmas`. numpy in float64.

The sigmas descend, and the final 0 is left out. All take sigma_min and sigma_max: a curve between
two ends uses them as its ends, and one that is made of given numbers is stretched to them by `fit`.
A new schedule is one such function and one entry in SCHEDULES.
"""

import numpy as np

from jaxsd.config import ScheduleConfig

from .choice import choose, number, unknown
from .levels import model_sigmas, sigma_to_t, t_to_sigma
from .schedule_tables import AYS, GITS, nearest, resample

# Curves between two noise levels.


def karras(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
           sigma_max: float | None = None, rho: float = 7.0) -> np.ndarray:
    """Evenly spaced in sigma^(1/rho): Karras et al. 2022, eq. 5; k-diffusion get_sigmas_karras."""
    _positive(rho=rho)
    first, last = _ends(model_sigmas(config), sigma_min, sigma_max)
    return np.linspace(first ** (1 / rho), last ** (1 / rho), steps) ** rho


def exponential(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
                sigma_max: float | None = None) -> np.ndarray:
    """Evenly spaced in log sigma: k-diffusion get_sigmas_exponential.

    Also called uniform in lambda = -log sigma, half the log signal-to-noise ratio
    (https://arxiv.org/abs/2206.00927; diffusers' use_lu_lambdas).
    """
    return polyexponential(steps, config, sigma_min, sigma_max, rho=1.0)


def polyexponential(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
                    sigma_max: float | None = None, rho: float = 1.0) -> np.ndarray:
    """A power of the step in log sigma: k-diffusion get_sigmas_polyexponential."""
    _positive(rho=rho)
    first, last = np.log(_ends(model_sigmas(config), sigma_min, sigma_max))
    return np.exp(last + (first - last) * np.linspace(1, 0, steps) ** rho)


def kl_optimal(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
               sigma_max: float | None = None) -> np.ndarray:
    """Evenly spaced in arctan sigma: the KL-optimal schedule of Align Your Steps, theorem 3.1.

    https://arxiv.org/abs/2404.14507; ComfyUI 'kl_optimal'. A1111's spreads the same curve over
    one step more and ends in sigma_min, not in 0.
    """
    first, last = _ends(model_sigmas(config), sigma_min, sigma_max)
    return np.tan(np.linspace(np.arctan(first), np.arctan(last), steps))


def laplace(steps: int, config: ScheduleConfig, mu: float = 0.0, beta: float = 0.5,
            sigma_min: float | None = None, sigma_max: float | None = None) -> np.ndarray:
    """Quantiles of a Laplace distribution of log sigma: https://arxiv.org/abs/2407.03297, ComfyUI.

    ComfyUI clamps the tails to sigma_min and sigma_max; where several levels would be one, here
    only the outermost is clamped, and the others lie between it and the first level within.
    ComfyUI's node ends in sigma_min and not in 0: final='sigma_min' with one step less.
    """
    _positive(beta=beta)
    first, last = np.log(_ends(model_sigmas(config), sigma_min, sigma_max))
    x = 0.5 - np.linspace(0, 1, steps)
    logs = mu - beta * np.sign(x) * np.log(1 - 2 * np.abs(x) + 1e-5)
    within = (last < logs) & (logs < first)
    within[[0, -1]] = True
    at = np.arange(steps)
    return np.exp(np.interp(at, at[within], np.clip(logs, last, first)[within]))


def linear_quadratic(steps: int, config: ScheduleConfig, threshold_noise: float = 0.025,
                     linear_steps: int | None = None, sigma_min: float | None = None,
                     sigma_max: float | None = None) -> np.ndarray:
    """Linear in sigma down to 1 - threshold_noise, then a parabola to 0; Mochi, ComfyUI.

    linear_steps: how many steps are linear; None: half. sigma_max scales it, sigma_min stretches.
    """
    first, _ = _ends(model_sigmas(config), None, sigma_max)
    linear = steps // 2 if linear_steps is None else linear_steps
    if steps == 1:
        return np.array([first])
    if linear not in range(1, steps):
        raise ValueError(f'linear_steps={linear}: expected a whole number from 1 to {steps - 1}')
    slope, rest = threshold_noise / linear, np.arange(steps - linear)
    bend = (1 - threshold_noise - slope * len(rest)) / len(rest) ** 2
    done = np.append(slope * np.arange(linear), threshold_noise + slope * rest + bend * rest**2)
    return fit(first * (1 - done), sigma_min, None)


def vp(steps: int, config: ScheduleConfig, beta_d: float = 19.9, beta_min: float = 0.1,
       eps_s: float = 1e-3, sigma_min: float | None = None,
       sigma_max: float | None = None) -> np.ndarray:
    """Evenly spaced in the time of a continuous VP process; k-diffusion get_sigmas_vp.

    It starts at sigma 152 by default, whatever the model; sigma_max brings it to another start.
    """
    t = np.linspace(1, eps_s, steps)
    return fit(np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t)), sigma_min, sigma_max)


# Spaced in the timesteps of training.


def normal(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
           sigma_max: float | None = None) -> np.ndarray:
    """Timesteps evenly spaced, both ends included, log sigma linear between whole timesteps.

    k-diffusion DiscreteSchedule.get_sigmas; ComfyUI 'normal'.
    """
    first, last = sigma_to_t(_ends(model_sigmas(config), sigma_min, sigma_max), config)
    return t_to_sigma(np.linspace(first, last, steps), config)


def linspace(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
             sigma_max: float | None = None) -> np.ndarray:
    """As `normal`, but sigma is linear between whole timesteps, not log sigma.

    diffusers' Euler with timestep_spacing='linspace'. The two differ by 1 part in 10,000 at
    most up to 100 steps, and not at all at whole timesteps.
    """
    table = model_sigmas(config)
    t = np.arange(len(table))
    first, last = np.interp(_ends(table, sigma_min, sigma_max), table, t)
    return np.interp(np.linspace(first, last, steps), t, table)


def sgm_uniform(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
                sigma_max: float | None = None) -> np.ndarray:
    """Timesteps evenly spaced, the last one left out: sgm's and ComfyUI's 'sgm_uniform'.

    Rounded to whole timesteps it is diffusers DPMSolverMultistep with 'linspace'.
    """
    first, last = sigma_to_t(_ends(model_sigmas(config), sigma_min, sigma_max), config)
    return t_to_sigma(np.linspace(first, last, steps + 1)[:-1], config)


def simple(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
           sigma_max: float | None = None) -> np.ndarray:
    """Every (T/steps)-th training timestep from the noisy end: ComfyUI 'simple'.

    Equals diffusers' timestep_spacing='trailing' when steps divides T.
    """
    table = model_sigmas(config)
    back = (np.arange(steps) * (len(table) / steps)).astype(int)
    return fit(table[len(table) - 1 - back], sigma_min, sigma_max)


def ddim_uniform(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
                 sigma_max: float | None = None) -> np.ndarray:
    """Timesteps 1, 1 + T//steps, ...: diffusers' 'leading' with steps_offset=1.

    ComfyUI and A1111 take the same timesteps up to T, which is more than `steps` of them when
    `steps` does not divide T; this keeps exactly `steps`, as diffusers does.
    """
    table = model_sigmas(config)
    t = 1 + np.arange(steps)[::-1] * (len(table) // steps)
    return fit(table[np.minimum(t, len(table) - 1)], sigma_min, sigma_max)


def smoothstep(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
               sigma_max: float | None = None) -> np.ndarray:
    """Timesteps along u^2 (3 - 2 u), u falling from 1 to 1 / steps: stable-diffusion.cpp."""
    u = 1 - np.arange(steps) / steps
    t = _whole((config.num_train_timesteps - 1) * u**2 * (3 - 2 * u))
    return fit(t_to_sigma(t, config), sigma_min, sigma_max)


def beta(steps: int, config: ScheduleConfig, alpha: float = 0.6, beta: float = 0.6,
         space: str = 'timestep', sigma_min: float | None = None,
         sigma_max: float | None = None) -> np.ndarray:
    """Quantiles of a Beta(alpha, beta) distribution: https://arxiv.org/abs/2407.12173.

    space: 'timestep', of whole timesteps, 0 left out (the paper; ComfyUI 'beta', which makes fewer
    steps where two would be one); or 'sigma', of sigma from sigma_max to sigma_min (diffusers'
    use_beta_sigmas, A1111).
    """
    for option, value in (('alpha', alpha), ('beta', beta)):
        if not 0 < value <= 100:
            raise ValueError(f'{option}={value}: expected a number above 0, at most 100')
    if space not in ('timestep', 'sigma'):
        raise unknown('space', space, ('timestep', 'sigma'))
    if space == 'sigma':
        first, last = _ends(model_sigmas(config), sigma_min, sigma_max)
        return last + (first - last) * beta_quantile(np.linspace(1, 0, steps), alpha, beta)
    share = beta_quantile(1 - np.arange(steps) / steps, alpha, beta)
    t = _whole((config.num_train_timesteps - 1) * share)
    return fit(t_to_sigma(t, config), sigma_min, sigma_max)


# For distilled models: a choice of the timesteps that these were distilled at.


def lcm(steps: int, config: ScheduleConfig, original_inference_steps: int = 50,
        sigma_min: float | None = None, sigma_max: float | None = None) -> np.ndarray:
    """Evenly from the original_inference_steps timesteps of distillation; diffusers LCMScheduler.

    TCDScheduler's timesteps are the same; when it is given original_inference_steps, whichever,
    they are those of original_inference_steps=1000 here.
    """
    original, count = original_inference_steps, config.num_train_timesteps
    if original not in range(1, count + 1) or steps > original:
        raise ValueError(f'original_inference_steps={original}: expected a whole number from '
                         f'steps={steps} to {count}; use fewer steps or raise it')
    taken = original - np.floor(np.linspace(0, original, steps, endpoint=False))
    return fit(t_to_sigma(taken * (count // original) - 1, config), sigma_min, sigma_max)


def turbo(steps: int, config: ScheduleConfig, start: int = 0, sigma_min: float | None = None,
          sigma_max: float | None = None) -> np.ndarray:
    """The noisiest of SD-Turbo's ten timesteps, one after the other; ComfyUI SDTurboScheduler.

    start: how many of the ten to leave out first; that node's denoise is start = 10 - 10 denoise.
    """
    if start not in range(10) or steps > 10 - start:
        raise ValueError(f'turbo has 10 timesteps: expected steps + start up to 10, found '
                         f'steps={steps}, start={start}')
    t = np.arange(10, 0, -1) * config.num_train_timesteps // 10 - 1
    return fit(t_to_sigma(t[start:start + steps], config), sigma_min, sigma_max)


# Found by optimisation.


def ays(steps: int, config: ScheduleConfig, table: str = 'sd15', sigma_min: float | None = None,
        sigma_max: float | None = None) -> np.ndarray:
    """Align Your Steps (https://arxiv.org/abs/2404.14507): levels for 10 steps, 'sd15' or 'sdxl'.

    Other step counts by log-linear interpolation; the last of the eleven levels gives way to 0,
    as in ComfyUI. A1111 keeps it, and spreads the eleven over one step less.
    """
    levels = choose('table', table, AYS)
    return fit(resample(levels, steps + 1)[:-1], sigma_min, sigma_max)


def gits(steps: int, config: ScheduleConfig, sigma_min: float | None = None,
         sigma_max: float | None = None) -> np.ndarray:
    """GITS (https://arxiv.org/abs/2405.11326) with ComfyUI's default coefficient, 1.20.

    Timesteps for 2 to 20 steps, found for Stable Diffusion 1.5; other step counts by log-linear
    interpolation. Within 3e-5 of ComfyUI's sigmas, which were made in float32.
    """
    t = (config.num_train_timesteps - 1) * (1 - np.array(nearest(GITS, steps)) / 100)
    levels = t_to_sigma(t, config)
    return fit(resample(levels, steps + 1)[:-1], sigma_min, sigma_max)


SCHEDULES = {f.__name__: f for f in (
    normal, karras, exponential, sgm_uniform, simple, ddim_uniform, polyexponential, linspace, beta,
    kl_optimal, linear_quadratic, laplace, vp, smoothstep, ays, gits, turbo, lcm)}
SCHEDULES['lambda_uniform'] = exponential


def _ends(table, sigma_min, sigma_max):
    """The first and last sigma: the options where given, else those of an ascending table."""
    first = table[-1] if sigma_max is None else number('sigma_max', sigma_max)
    last = table[0] if sigma_min is None else number('sigma_min', sigma_min)
    if not 0 < last <= first < np.inf:
        raise ValueError(f'sigma_min={last}, sigma_max={first}: expected 0 < sigma_min <= '
                         'sigma_max, both finite')
    return np.array([first, last])


def fit(levels: np.ndarray, sigma_min: float | None, sigma_max: float | None) -> np.ndarray:
    """Stretch descending levels linearly in log sigma, to begin in sigma_max, end in sigma_min.

    An end that is None stays. A single level is the beginning.
    """
    if len(levels) == 1:
        sigma_min = sigma_max
    if sigma_min is None and sigma_max is None:
        return levels
    first, last = np.log(_ends(levels[::-1], sigma_min, sigma_max))
    logs = np.log(levels)
    return np.exp(np.interp(logs, [logs[-1], logs[0]], [last, first]))


def _whole(t):
    """Timesteps rounded, as whole ones were trained on; unrounded if two would become one."""
    whole = np.floor(t + 0.5 + 1e-9)  # a half goes up, whatever its last digit
    return whole if np.all(np.diff(whole) < 0) else t


def _positive(**options):
    for option, value in options.items():
        if not 0 < value < np.inf:
            raise ValueError(f'{option}={value}: expected a finite number above 0')


def beta_quantile(share: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """The inverse of the regularised incomplete beta function, I_x(alpha, beta) = share.

    share: [n] in [0, 1] -> x [n], within 1e-13 but for the far tails (shares within 1e-3 of 0 or
    1: 1e-5 at worst, if alpha or beta is 50). Bisection on the series of positive terms
    B_x(a, b) = x^a (1 - x)^b / a sum_n (a + b)_n / (a + 1)_n x^n (https://dlmf.nist.gov/8.17.E8),
    which is used up to x = 1/2, and beyond it from the other end.
    """
    n = np.arange(60 + 4 * round(alpha + beta))

    def part(x, a, b):
        ratios = x[:, None] * (alpha + beta + n) / (np.reshape(a, (-1, 1)) + 1 + n)
        return x**a * (1 - x) ** b / a * (1 + np.cumprod(ratios, axis=1).sum(1))

    def below(x):
        far = x > 0.5
        near = part(np.where(far, 1 - x, x), *np.where(far, [[beta], [alpha]], [[alpha], [beta]]))
        return np.where(far, whole - near, near)

    half = np.array([0.5])
    whole = part(half, alpha, beta) + part(half, beta, alpha)
    low, high = np.zeros_like(share), np.ones_like(share)
    for _ in range(60):
        middle = (low + high) / 2
        under = below(middle) < share * whole
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return np.where(share < 1, (low + high) / 2, 1.0)
