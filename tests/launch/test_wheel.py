"""The wheel, installed in an environment of its own, outside of the checkout."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib

import httpx
import numpy as np
import pytest
from mains import ROOT, environment, opened, serving
from PIL import Image

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())


def run(*command, cwd, **env):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True,
                          env=environment(**{'PYTHONPATH': '', **env}))
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder, tree = tmp_path_factory.mktemp('wheel'), tmp_path_factory.mktemp('tree')
    for name in ('jaxsd', 'launch', 'configs', 'checkpoints'):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tree / name)
    code, _, stderr = run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '-w',
                          folder, tree, cwd=folder)
    assert code == 0, stderr
    found, = folder.glob('*.whl')
    return found


@pytest.fixture(scope='module')
def home(wheel, tmp_path_factory):
    """An empty folder, and the `bin` of an environment with the wheel. Its dependencies are those
    of this one, unless JAXSD_WHEEL=full asks for an installation of all."""
    folder = tmp_path_factory.mktemp('home')
    code, _, stderr = run(sys.executable, '-m', 'venv', folder / 'env', cwd=folder)
    assert code == 0, stderr
    full = os.environ.get('JAXSD_WHEEL') == 'full'
    binaries = folder / 'env' / ('Scripts' if os.name == 'nt' else 'bin')
    if not full:
        site, = (folder / 'env' / 'lib').glob('python*/site-packages')
        (site / 'these.pth').write_text(sysconfig.get_path('purelib'))
    code, _, stderr = run(binaries / 'python', '-m', 'pip', 'install', '--quiet',
                          *[f'{wheel}[serve]'] if full else ['--no-deps', wheel], cwd=folder)
    assert code == 0, stderr
    (folder / 'work').mkdir()
    return folder / 'work', binaries


def test_it_lies_in_one_package(home):
    code, stdout, stderr = run(home[1] / 'python', '-c', 'import jaxsd; print(jaxsd.__file__)',
                               cwd=home[0])
    assert code == 0 and pathlib.Path(stdout.strip()).is_relative_to(home[0].parent), stderr
    listed = run(home[1] / 'python', '-m', 'pip', 'show', '-f', 'jaxsd', cwd=home[0])[1]
    tops = {line.strip().split('/')[0] for line in listed.partition('Files:')[2].splitlines()
            if line.strip() and not line.strip().startswith('..')}
    assert {re.sub(r'-.*', '', top) for top in tops} == {'jaxsd'}


def test_every_package_is_in_it():
    packages = {'.'.join(path.parent.relative_to(ROOT).parts)
                for path in (ROOT / 'jaxsd').rglob('__init__.py')}
    listed = set(PROJECT['tool']['setuptools']['packages'])
    assert listed == packages | {'jaxsd.launch', 'jaxsd.configs', 'jaxsd.checkpoints'}


def test_generate(home):
    code, stdout, stderr = run(home[1] / 'jaxsd', 'generate', '--prompt=red apple', '--seed=7',
                               '--steps=3', cwd=home[0])
    assert code == 0, stderr
    picture, = (home[0] / 'outputs').glob('*.png')
    (home[0] / 'script.py').write_text(
        "import jaxsd\nmodel = jaxsd.load('emoji')\n"
        "request = jaxsd.Request('red apple', seed=7, steps=3, guidance=4.0)\n"
        "import numpy as np\nnp.save('picture.npy', jaxsd.generate(model, request))\n")
    code, _, stderr = run(home[1] / 'python', 'script.py', cwd=home[0])
    assert code == 0, stderr
    np.testing.assert_array_equal(np.load(home[0] / 'picture.npy')[0], Image.open(picture))


def test_batch_and_verify(home):
    (home[0] / 'prompts.txt').write_text('red apple\nrocket\n')
    code, _, stderr = run(home[1] / 'jaxsd', 'batch', '--requests=prompts.txt', '--out=run',
                          '--config=emoji', '--config.steps=2', cwd=home[0])
    assert code == 0, stderr
    assert len([*(home[0] / 'run').rglob('*.png')]) == 2
    code, stdout, stderr = run(home[1] / 'jaxsd', 'verify', 'run', cwd=home[0])
    assert code == 0, stdout + stderr


def test_serve(home):
    """A picture of `jaxsd serve` is the one that `jaxsd generate` makes."""
    with serving('--config=emoji', command=(home[1] / 'jaxsd', 'serve'), cwd=home[0],
                 PYTHONPATH='') as (url, server):
        answer = httpx.post(f'{url}/sdapi/v1/txt2img', timeout=120, json={
            'prompt': 'rocket', 'seed': 3, 'steps': 3, 'cfg_scale': 4.0})
        assert answer.status_code == 200, answer.text
        server.terminate()
        assert server.wait(60) == 0
    code, _, stderr = run(home[1] / 'jaxsd', 'generate', '--prompt=rocket', '--seed=3', '--steps=3',
                          '--guidance=4', '--out=as_served', cwd=home[0])
    assert code == 0, stderr
    picture, = (home[0] / 'as_served').glob('*.png')
    np.testing.assert_array_equal(Image.open(picture), opened(answer.json()['images'][0]))


def test_commands(home):
    code, stdout, _ = run(home[1] / 'jaxsd', cwd=home[0])
    assert code == 0 and 'generate' in stdout and 'emoji_data' not in stdout
    code, stdout, stderr = run(home[1] / 'jaxsd', 'doctor', cwd=home[0])
    assert code == 0 and 'self-check: passed' in stdout, stderr
    code, _, stderr = run(home[1] / 'jaxsd', 'generat', cwd=home[0])
    assert code == 2 and "did you mean 'generate'" in stderr
    code, _, stderr = run(home[1] / 'jaxsd', 'generate', '--config=sd155', cwd=home[0])
    assert code == 2 and "unknown recipe 'sd155': did you mean 'sd15'?" in stderr


