"""Schedules that are lists of noise levels: published tables, and schedule files."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxsd.config import ScheduleConfig
from jaxsd.typing import Path

# https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html
AYS = {
    'sd15': (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    'sdxl': (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}

# For each step count, which of the 101 timesteps from the last (0) to the first (100) it stops at:
# what ComfyUI's comfy_extras/nodes_gits.py gives as sigmas for the coefficient 1.20.
GITS = {len(stops) + 1: (0, *stops, 100) for stops in (
    (71,),
    (51, 82),
    (39, 67, 89),
    (34, 58, 79, 94),
    (17, 43, 66, 85, 97),
    (17, 38, 58, 77, 92, 99),
    (17, 38, 55, 71, 85, 94, 99),
    (17, 34, 50, 66, 79, 89, 96, 99),
    (17, 34, 49, 62, 73, 83, 91, 96, 99),
    (17, 33, 46, 58, 70, 79, 87, 93, 97, 99),
    (17, 32, 44, 55, 66, 75, 83, 89, 94, 97, 99),
    (14, 29, 39, 51, 62, 71, 79, 85, 90, 94, 97, 99),
    (14, 29, 38, 50, 60, 69, 77, 83, 88, 92, 95, 97, 99),
    (12, 22, 32, 42, 52, 62, 70, 77, 83, 88, 92, 95, 97, 99),
    (12, 22, 32, 42, 52, 62, 70, 77, 83, 87, 91, 94, 96, 98, 99),
    (12, 22, 32, 42, 52, 62, 70, 77, 83, 87, 90, 93, 95, 97, 98, 99),
    (12, 22, 32, 41, 50, 59, 67, 74, 80, 85, 89, 92, 94, 96, 97, 98, 99),
    (12, 22, 32, 41, 50, 58, 66, 73, 79, 84, 88, 91, 93, 95, 96, 97, 98, 99),
    (12, 22, 32, 41, 50, 58, 66, 73, 79, 83, 87, 90, 92, 94, 95, 96, 97, 98, 99),
)}

FORMAT, VERSION = 'jaxsd-schedule', 1
# What files of before these fields of ScheduleConfig are for.
NOT_EDM = {'edm': False, 'sigma_min': 0.002, 'sigma_max': 80.0, 'sigma_data': 0.5}


T = TypeVar('T')


def nearest(lists: Mapping[int, T], steps: int) -> T:
    """Of lists by step count the nearest with at least `steps`, else the longest."""
    return lists[min((n for n in lists if n >= steps), default=max(lists))]


def resample(levels: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    """Descending levels -> `count` of them with the same ends, log-linear between the given."""
    if count == len(levels):
        return np.array(levels)
    at = np.linspace(0, len(levels) - 1, count)
    return np.exp(np.interp(at, np.arange(len(levels)), np.log(levels)))


def tabled(lists: Mapping[int, np.ndarray], steps: int) -> np.ndarray:
    """Lists by step count -> levels for `steps`: [steps], or [steps + 1] if the list ends above 0.

    Where there is none for `steps`, the nearest longer one (else the longest) is resampled,
    between its ends that are above 0.
    """
    levels = nearest(lists, steps)
    if levels[-1] == 0:
        return resample(levels[:-1], steps)
    return resample(levels, steps + 1)


def check_levels(what: str, levels: Any) -> np.ndarray:
    """Levels as float64 [steps + 1], or a ValueError in `what`'s name; text is split at commas."""
    levels = levels.split(',') if isinstance(levels, str) else levels
    try:
        levels = np.asarray(levels, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f'{what}: expected sigmas, a list of numbers or text with commas '
                         "between, such as '14.6,7.3,1,0'") from None
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f'{what}: expected at least two sigmas, the last one usually 0')
    if not np.isfinite(levels).all() or np.any(np.diff(levels) >= 0) or levels[-1] < 0:
        raise ValueError(f'{what}: the sigmas must be finite and strictly decrease, none below 0')
    return levels


def write_schedule(path: Path, sigmas_by_steps: Mapping[int, Any], config: ScheduleConfig,
                   label: str = '') -> None:
    """Write a schedule file, for `schedule(path, steps, config)` to read; whole or not at all.

    path: ends in .json. sigmas_by_steps: {steps: [steps + 1] sigmas, as `schedule` returns them}.
    config: the ScheduleConfig that they are for. label: which checkpoint, for people.
    Raises ValueError for another ending, and for sigmas that do not strictly decrease.
    """
    path = pathlib.Path(path)
    if path.suffix != '.json':
        raise ValueError(f'schedule file {path}: expected a name that ends in .json')
    lists = _check_lists(path, sigmas_by_steps)
    text = json.dumps({
        'format': FORMAT, 'version': VERSION, 'label': label,
        'config': dataclasses.asdict(config),
        'sigmas': {steps: levels.tolist() for steps, levels in sorted(lists.items())}}, indent=1)
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        part.write_text(text + '\n', 'utf-8')
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_schedule(path: Path, config: ScheduleConfig) -> dict[int, np.ndarray]:
    """The lists of a schedule file -> {steps: float64 [steps + 1]}.

    Raises ValueError if it cannot be read, is not a schedule file, holds sigmas that do not
    strictly decrease, or was made for another ScheduleConfig than `config`.
    """
    try:
        file = json.loads(pathlib.Path(path).read_text('utf-8'))
    except OSError as error:
        raise ValueError(f'schedule file {path}: {error.strerror}') from None
    except ValueError as error:
        raise ValueError(f'schedule file {path}: not valid JSON ({error})') from None
    if (not isinstance(file, dict) or not isinstance(file.get('config'), dict)
            or (file.get('format'), file.get('version')) != (FORMAT, VERSION)):
        raise ValueError(f'schedule file {path}: expected JSON with "format": "{FORMAT}" and '
                         f'"version": {VERSION}, as write_schedule makes it')
    made_for = NOT_EDM | file['config']
    for field, value in json.loads(json.dumps(dataclasses.asdict(config))).items():
        if made_for.get(field) != value:
            raise ValueError(
                f'schedule file {path} (label {file.get("label")!r}) was made for '
                f'{field}={made_for.get(field)!r}, and this model has {value!r}; '
                'use a schedule made for this model')
    return _check_lists(path, file.get('sigmas'))


def _check_lists(path, lists):
    """Lists by step count, as numbers, or a ValueError that says what is wrong with which."""
    what = f'schedule file {path}'
    if not isinstance(lists, dict) or not lists:
        raise ValueError(f'{what}: expected sigmas by step count, such as {{2: [14.6, 1, 0]}}')
    checked = {}
    for steps, levels in lists.items():
        levels = check_levels(f'{what}, sigmas of {steps} steps', levels)
        if str(steps) != str(len(levels) - 1):
            raise ValueError(f'{what}, sigmas of {steps} steps: found {len(levels)} numbers; '
                             'expected one more than steps')
        checked[len(levels) - 1] = levels
    return checked
