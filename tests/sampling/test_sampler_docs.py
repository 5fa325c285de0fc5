"""What docs/samplers.md says about samplers."""

import ast
import inspect
import pathlib
import re

import numpy as np

from jaxsd import sampling
from jaxsd.config import ScheduleConfig
from jaxsd.sampling import tables

ROOT = pathlib.Path(__file__).parents[2]
DOCS = (ROOT / 'docs' / 'samplers.md').read_text('utf-8')


def test_the_sampler_on_the_page_is_one():
    code = re.search(r'```python\n(@table\ndef dpmpp_2m.*?)```', DOCS, re.S)[1]
    found = {**vars(tables), 'np': np}
    exec(code, found)
    sigmas = sampling.schedule('karras', 12, ScheduleConfig())
    for ours, shown in zip(sampling.plan('dpmpp_2m', sigmas), found['dpmpp_2m'](sigmas)):
        np.testing.assert_allclose(shown, ours, rtol=1e-13, atol=1e-15)


def test_no_sampler_takes_more_than_twenty_lines():
    """Of code: without its docstring, its signature counted as one."""
    for name, sampler in sampling.SAMPLERS.items():
        source = inspect.getsource(inspect.unwrap(sampler))
        first = ast.parse(source).body[0].body[1].lineno
        code = [line for line in source.splitlines()[first - 1:] if line.strip()]
        assert len(code) + 1 <= 20, (name, len(code) + 1)


def test_the_tables_list_what_there_is():
    rows = re.findall(r'^\| ([\w, ]+) \|', DOCS, re.M)
    names = {name for row in rows for name in row.split(', ')}
    assert names >= {*sampling.SAMPLERS, *sampling.SCHEDULES}
    assert 'forty-one samplers, twenty schedules' in DOCS
    assert (len(sampling.SAMPLERS), len(sampling.SCHEDULES)) == (41, 20)
