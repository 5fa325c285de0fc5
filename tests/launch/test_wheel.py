"""The wheel, installed in environments of its own, outside of the checkout.

JAXSD_WHEEL=full installs all that it requires too, from an index: once plainly, in the newest
versions, and once with the extra `serve` in the oldest that pyproject.toml allows. Else what it
requires is that of this environment.
"""

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
from packaging.version import Version
from PIL import Image

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
FULL = os.environ.get('JAXSD_WHEEL') == 'full'
FLAGS = {'XLA_FLAGS': None} if FULL else {}  # other versions of XLA may not know them
OLDEST = [f'{name}=={version}' for lines in (
    PROJECT['project']['dependencies'], *PROJECT['project']['optional-dependencies'].values())
    for line in lines for name, version in re.findall(r'^([\w-]+)>=([\w.]+)', line)]


def run(*command, cwd):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True,
                          env=environment(PYTHONPATH='', **FLAGS))
    return done.returncode, done.stdout, done.stderr


def pip(binaries, *arguments):
    """pip of this environment, in that one."""
    return run(sys.executable, '-m', 'pip', '--python', binaries / 'python', *arguments,
               cwd=binaries)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder, tree = tmp_path_factory.mktemp('wheel'), tmp_path_factory.mktemp('tree')
    for name in re.findall(r'^!(.+)$', (ROOT / '.dockerignore').read_text(), re.MULTILINE):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(ROOT / name, tree / name)
    code, _, stderr = run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '-w',
                          folder, tree, cwd=folder)
    assert code == 0, stderr
    found, = folder.glob('*.whl')
    return found


def install(folder, *requirements):
    """-> an empty folder, and the `bin` of a new environment with the requirements."""
    code, _, stderr = run(sys.executable, '-m', 'venv', '--without-pip', folder / 'env', cwd=folder)
    assert code == 0, stderr
    binaries = folder / 'env' / ('Scripts' if os.name == 'nt' else 'bin')
    if not FULL:
        site, = (folder / 'env' / 'lib').glob('python*/site-packages')
        (site / 'these.pth').write_text(sysconfig.get_path('purelib'))
        requirements = ['--no-deps', *requirements]
    code, _, stderr = pip(binaries, 'install', '--quiet', *requirements)
    assert code == 0, stderr
    (folder / 'work').mkdir()
    return folder / 'work', binaries


@pytest.fixture(scope='module')
def home(wheel, tmp_path_factory):
    """A plain installation."""
    return install(tmp_path_factory.mktemp('home'), wheel)


@pytest.fixture(scope='module')
def oldest(wheel, tmp_path_factory):
    """With the extra `serve`, all as old as it may be."""
    if sys.version_info >= (3, 13):
        pytest.skip('versions of their time have no wheels for this Python')
    folder = tmp_path_factory.mktemp('oldest')
    (folder / 'oldest.txt').write_text('\n'.join(OLDEST))
    return install(folder, f'{wheel}[serve]', '-c', folder / 'oldest.txt')


@pytest.mark.slow
def test_it_lies_in_one_package(home):
    code, stdout, stderr = run(home[1] / 'python', '-c', 'import jaxsd; print(jaxsd.__file__)',
                               cwd=home[0])
    assert code == 0 and pathlib.Path(stdout.strip()).is_relative_to(home[0].parent), stderr
    listed = pip(home[1], 'show', '-f', 'jaxsd')[1]
    tops = {line.strip().split('/')[0] for line in listed.partition('Files:')[2].splitlines()
            if line.strip() and not line.strip().startswith('..')}
    assert {re.sub(r'-.*', '', top) for top in tops} == {'jaxsd'}


def test_every_package_is_in_it():
    packages = {'.'.join(path.parent.relative_to(ROOT).parts)
                for path in (ROOT / 'jaxsd').rglob('__init__.py')}
    listed = set(PROJECT['tool']['setuptools']['packages'])
    assert listed == packages | {'jaxsd.launch', 'jaxsd.configs', 'jaxsd.checkpoints'}


@pytest.mark.slow
def test_generate(home):
    code, stdout, stderr = run(home[1] / 'jaxsd', 'generate', '--prompt=red apple', '--seed=7',
                               '--steps=3', cwd=home[0])
    assert code == 0, stderr
    picture, = (home[0] / 'outputs').glob('*.png')
    (home[0] / 'script.py').write_text(
        "import jaxsd\nmodel = jaxsd.load('emoji')\n"
        "request = jaxsd.Request('red apple', seed=7, steps=3)\n"
        "import numpy as np\nnp.save('picture.npy', jaxsd.generate(model, request))\n")
    code, _, stderr = run(home[1] / 'python', 'script.py', cwd=home[0])
    assert code == 0, stderr
    np.testing.assert_array_equal(np.load(home[0] / 'picture.npy')[0], Image.open(picture))


@pytest.mark.skipif(not FULL, reason='both are this environment')
def test_the_oldest_versions_draw_what_the_newest_draw(home, oldest):
    pictures = []
    for folder, binaries in (home, oldest):
        code, _, stderr = run(binaries / 'jaxsd', 'generate', '--prompt=red apple', '--seed=7',
                              '--steps=3', '--out=versions', cwd=folder)
        assert code == 0, stderr
        file, = (folder / 'versions').glob('*.png')
        pictures.append(np.asarray(Image.open(file), int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 2  # compilers differ in roundings
    code, _, stderr = run(oldest[1] / 'python', '-c', 'import numpy; from jaxsd import images; '
                          'images.canny(numpy.zeros((8, 8, 3), numpy.uint8))', cwd=oldest[0])
    assert code == 0, stderr
    listed = pip(oldest[1], 'list', '--format=freeze')[1]
    listed = {name.lower().replace('-', '_'): version
              for name, _, version in (line.partition('==') for line in listed.splitlines())}
    for name, _, version in (line.partition('==') for line in OLDEST):
        found = listed.get(name.lower().replace('-', '_'), version)
        assert Version(found) == Version(version), name


@pytest.mark.slow
def test_without_opencv(home):
    """A picture, a mask and a hint need no extra; what does says which one."""
    (home[0] / 'plain.py').write_text(f"""
import importlib.util, sys
if {FULL}:
    assert importlib.util.find_spec('cv2') is None
sys.modules['cv2'] = None  # as if it were not installed
import numpy as np
import jaxsd
from jaxsd import images
picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
mask = np.zeros((64, 64), np.float32)
mask[16:48, 16:48] = 1
model = jaxsd.load('emoji')
model = model.replace(controlnets={{'edges': jaxsd.load_controlnet('emoji_edges')}})
asked = jaxsd.Request('red apple', seed=1, steps=4, image=picture, mask=mask, mask_blur=4,
                      fill='noise', strength=0.8, controls=[
                          jaxsd.Control('edges', images.scribble(picture))])
assert jaxsd.generate(model, asked)[0].std() > 10
for call in (lambda: images.canny(picture), lambda: images.tile(picture, 2),
             lambda: images.draw_pose([images.Person(np.zeros((18, 2)))], 8, 8),
             lambda: images.cover(picture, mask, 'edge')):
    try:
        call()
    except ImportError as error:
        print(error)
""")
    code, stdout, stderr = run(home[1] / 'python', 'plain.py', cwd=home[0])
    assert code == 0, stderr
    assert stdout.splitlines() == [f"{name} needs OpenCV: pip install 'jaxsd[hints]'"
                                   for name in ('canny', 'tile', 'pose', "fill='edge'")]


@pytest.mark.slow
def test_batch_and_verify(home):
    (home[0] / 'prompts.txt').write_text('red apple\nrocket\n')
    code, _, stderr = run(home[1] / 'jaxsd', 'batch', '--requests=prompts.txt', '--out=run',
                          '--config=emoji', '--config.steps=2', cwd=home[0])
    assert code == 0, stderr
    assert len([*(home[0] / 'run').rglob('*.png')]) == 2
    code, stdout, stderr = run(home[1] / 'jaxsd', 'verify', 'run', cwd=home[0])
    assert code == 0, stdout + stderr


@pytest.mark.slow
def test_serve(request):
    """A picture of `jaxsd serve` is the one that `jaxsd generate` makes."""
    home = request.getfixturevalue('oldest' if FULL else 'home')
    with serving('--config=emoji', command=(home[1] / 'jaxsd', 'serve'), cwd=home[0],
                 PYTHONPATH='', **FLAGS) as (url, server):
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


@pytest.mark.slow
def test_commands(home):
    code, stdout, _ = run(home[1] / 'jaxsd', cwd=home[0])
    assert code == 0 and 'generate' in stdout and 'emoji_data' not in stdout
    code, stdout, stderr = run(home[1] / 'jaxsd', 'doctor', cwd=home[0])
    assert code == 0 and 'self-check: passed' in stdout, stderr
    if FULL:
        for extra in ('hints', 'serve'):
            assert f'extra {extra}: missing opencv-python-headless' in stdout
    code, _, stderr = run(home[1] / 'jaxsd', 'generat', cwd=home[0])
    assert code == 2 and "did you mean 'generate'" in stderr
    code, _, stderr = run(home[1] / 'jaxsd', 'generate', '--config=sd155', cwd=home[0])
    assert code == 2 and "unknown recipe 'sd155': did you mean 'sd15'?" in stderr


