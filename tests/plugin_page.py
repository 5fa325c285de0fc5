"""The examples of docs/plugins.md, as files; and registries that stay as they were."""

import contextlib
import re

from mains import ROOT

from jaxsd.sampling import guidance_options, names, plans, plugins, schedules

EXAMPLES = {re.match(r'# (\w+)\.py\n', block)[1]: block for block in re.findall(
    '```python\n(.*?)```', (ROOT / 'docs' / 'plugins.md').read_text('utf-8'), re.DOTALL)}
REGISTRIES = (plans.SAMPLERS, names.SAMPLER_NAMES, schedules.SCHEDULES, names.SCHEDULE_NAMES,
              guidance_options.CHECKS, guidance_options.FUNCTIONS, plugins.OWN)


def write(folder, *which):
    """Write examples (none named: all) -> their paths."""
    paths = [folder / f'{name}.py' for name in which or EXAMPLES]
    for path in paths:
        path.write_text(EXAMPLES[path.stem])
    return paths


@contextlib.contextmanager
def forgotten():
    """What is registered within is not known afterwards."""
    before = [dict(registry) for registry in REGISTRIES]
    try:
        yield
    finally:
        for registry, old in zip(REGISTRIES, before):
            registry.clear()
            registry.update(old)
