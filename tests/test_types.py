"""The annotations: mypy has nothing to say about jaxsd and about the programs of the documentation,
and refuses calls that are wrong."""

import re

from mains import ROOT
from mypy import api

WRONG = '''
import jaxsd
from jaxsd.models import vae

model = jaxsd.load('emoji')
jaxsd.Request(seeds=7)
jaxsd.Request('red apple', seed='7')
jaxsd.Request(prompt=None)
jaxsd.generate(model, 7)
jaxsd.generate(model, ['red apple'], on_steps=print)
jaxsd.load(7)
jaxsd.load('emoji', dtype=32)
jaxsd.save('emoji', model)
jaxsd.Engine(slots=4)
jaxsd.read_config('sd15').unets
jaxsd.requests
model.with_vae(model)
vae.decode(model.config.vae, model.params['vae'], 0)
jaxsd.load_vae('a') + 1
'''


def programs(page):
    """The Python of a page, one program."""
    return '\n'.join(re.findall('```python\n(.*?)```', (ROOT / page).read_text(), re.DOTALL))


def test_mypy(tmp_path):
    pages = {'right_readme.py': programs('README.md').partition('@table')[0],
             'right_jax.py': programs('docs/jax.md')}
    for name, text in {'wrong.py': WRONG, **pages}.items():
        (tmp_path / name).write_text(text)
    files = sorted(map(str, tmp_path.iterdir()))
    out, error, _ = api.run(['--config-file', str(ROOT / 'pyproject.toml'), '--cache-dir',
                             str(ROOT / '.mypy_cache'), str(ROOT / 'jaxsd'), *files])
    found = [line for line in out.splitlines() if ': error: ' in line]
    refused = {int(line.split(':')[1]) for line in found if 'wrong.py' in line}
    assert not error and not [line for line in found if 'wrong.py' not in line]
    first = WRONG.splitlines().index("jaxsd.Request(seeds=7)") + 1
    assert refused == {*range(first, len(WRONG.splitlines()) + 1)}, out
