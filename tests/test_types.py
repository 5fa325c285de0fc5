"""The annotations: mypy has nothing to say about jaxsd and about the programs of the documentation,
and refuses calls that are wrong."""

import ast
import importlib
import re

import pytest
from mains import ROOT, run_code
from mypy import api

import jaxsd

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

# A program whose functions check their arrays as they are called; nothing compiles.
SHAPES = '''
import functools

import jax
from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook(['jaxsd.models', 'jaxsd.prompt.conditioning', 'jaxsd.run.pipeline'],
                         'beartype.beartype'):
    import jaxsd
    from jaxsd.run import inputs, networks, pipeline, resolve

model = jaxsd.load('emoji')
model = model.replace(controlnets={'edges': jaxsd.load_controlnet('emoji_edges')})
image = 'docs/examples/apple.png'
for request in resolve([
        jaxsd.Request('red apple AND rocket', guidance_options={'pag': 1, 'freeu': (1, 1, 1, 1)}),
        jaxsd.Request('rocket', image=image, outpaint=(0, 0, 32, 0)),
        jaxsd.Request('rocket', controls=[jaxsd.Control('edges', image)])], model.config):
    data = inputs(model, [request])
    params, config = networks(model, data)
    jax.eval_shape(functools.partial(pipeline, config=config, height=request.height,
                                     width=request.width), params, data)
try:
    jaxsd.models.vae.decode(model.params['vae'], model.config.vae, jax.numpy.zeros((8, 8, 4)))
except TypeCheckError:
    print('refused')
'''


def programs(page):
    """The Python of a page, one program."""
    return '\n'.join(re.findall('```python\n(.*?)```', (ROOT / page).read_text(), re.DOTALL))


@pytest.mark.slow
def test_mypy(tmp_path):
    pages = {'right_readme.py': programs('README.md'),
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


@pytest.mark.slow
def test_shapes_are_those_that_signatures_say():
    assert run_code(SHAPES, fresh=True) == 'refused\n'


def test_names_of_the_package_are_what_editors_take_them_for():
    imported_names = [(imported.module, name.name) for node in ast.walk(ast.parse(
        (ROOT / 'jaxsd' / '__init__.py').read_text())) if isinstance(node, ast.If)
        for imported in node.body if isinstance(imported, ast.ImportFrom)
        for name in imported.names]
    assert sorted(name for _, name in imported_names) == sorted(jaxsd.__all__)
    for module, name in imported_names:
        assert getattr(jaxsd, name) is getattr(importlib.import_module(module), name)
