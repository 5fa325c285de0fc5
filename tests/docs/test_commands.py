"""Every shell command of the pages runs as it stands, but for what substitutes.py changes.

One that stands on several pages is run on the first of them. Mains run in one process for each
page; those of the README, as all that needs a shell, in processes of their own.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pages
import pytest
import substitutes
import weights
from mains import ROOT, Session, environment, free_port, healthy, wait_for

from jaxsd import cli

START = "-c 'import sys; from jaxsd.cli import main; sys.exit(main())'"
PIECES = [piece for path in pages.PAGES for piece in pages.commands(path)]
FIRST = {piece.text: piece.page for piece in reversed(PIECES)}
MAIN = re.compile(r'(jaxsd|python -m launch\.)[^|&;<>$`]*')


def test_the_pages_are_read():
    """A block of each form, a table, a sentence, and a continued line."""
    texts = {(piece.page, piece.text) for piece in PIECES}
    assert ('docs/install.md', "pip install '.[tpu]'") in texts
    assert ('docs/lab.md', 'python -m launch.lab trace --prompt=rooster --config.steps=20 '
            '--out=docs/lab_trace.png') in texts
    assert any('--grid=guidance=2,5 --out=runs/a' in text for _, text in texts)
    assert pages.blocks('a\n\n    make x\n\n```sh\nsrun y\n```\n- b\n  ```\n  z\n  ```\n') == [
        ('', 3, 'make x\n'), ('sh', 6, 'srun y'), ('', 10, 'z')]


def reason(command):
    """Why a command is not run, or None."""
    return next((why for pattern, why in substitutes.NOT_RUN.items()
                 if re.fullmatch(pattern, command)), None)


def test_nothing_is_listed_in_vain():
    for pattern in substitutes.NOT_RUN:
        assert any(re.fullmatch(pattern, piece.text) for piece in PIECES), pattern
    for pattern in substitutes.COMMANDS:
        assert any(re.search(pattern, piece.text) for piece in PIECES), pattern


def test_extras_exist():
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    named = {name for piece in PIECES for names in re.findall(r'pip install .*\[(.*?)\]',
                                                              piece.text)
             for name in names.split(',')}
    assert named and named <= extras['optional-dependencies'].keys()


@pytest.fixture(scope='session')
def made(tmp_path_factory):
    """A folder with the weights that the pages name."""
    folder = tmp_path_factory.mktemp('weights')
    weights.write(folder)
    return folder


class Copy:
    """A working copy in a folder of its own, with an environment in .venv, for a page's commands.

    jaxsd/ has launch/, configs/ and checkpoints/ inside, too, as in a wheel.
    """

    def __init__(self, folder, made, page):
        self.path, self.port, self.server = folder / 'jaxsd', free_port(), None
        self.alone, self.session = page == 'README.md', None
        for name in subprocess.check_output(['git', 'ls-files'], cwd=ROOT, text=True).splitlines():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).exists():
                shutil.copy2(ROOT / name, self.path / name)
        for name in ('launch', 'configs', 'checkpoints'):
            (self.path / 'jaxsd' / name).symlink_to(self.path / name)
        shutil.copytree(made / 'files', self.path, dirs_exist_ok=True)
        for name, text in pages.named(ROOT / page).items():
            (self.path / name).write_text(text)
        programs = self.path / '.venv' / 'bin'
        programs.mkdir(parents=True)
        for name, arguments in (('python', ''), ('pip', '-m pip'), ('jaxsd', START)):
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
            (programs / name).chmod(0o755)
        for stamp in ('.demo', '.test'):  # for make: installed
            (self.path / '.venv' / stamp).touch()
        self.environment = environment(
            PATH=f'{programs}:{os.environ["PATH"]}', PYTHONPATH=str(self.path),
            HF_HUB_CACHE=str(made / 'hub'), HF_HUB_OFFLINE='1')

    def run(self, command, output=()):
        """Run a command to its end: it prints these lines, or ends well. A server goes on."""
        for pattern, text in substitutes.COMMANDS.items():
            command = re.sub(pattern, text, command)
        for pattern, flags in substitutes.SMALLER.items():
            if re.search(pattern, command) and not output:
                command += f' {flags}'
        command = command.replace('{port}', str(self.port))
        if re.search(r'(launch\.|jaxsd )serve\b', command) and not output:
            self.server = subprocess.Popen(['bash', '-c', f'exec {command}'], cwd=self.path,
                                           env=self.environment)
            wait_for(lambda: healthy(f'http://127.0.0.1:{self.port}', self.server), 180)
            return
        if MAIN.fullmatch(command) and '--plugin' not in command and not self.alone:
            code, out, error = self.main(command)
        else:
            done = subprocess.run(
                ['bash', '-c', f'set -eo pipefail; {command}'], cwd=self.path,
                env=self.environment, text=True, capture_output=True, timeout=600)
            code, out, error = done.returncode, done.stdout, done.stderr
        said = f'{command}\n{out[-2000:]}{error[-4000:]}'
        assert code <= ('--help' in command) or output, said  # absl's --help: 1
        for line in output:
            assert line in said, f'expected {line!r}, found {said}'

    def main(self, command):
        """Run `jaxsd ...` or `python -m launch. ...` in the page's process."""
        self.session = self.session or Session(self.path.parent, self.path, self.environment)
        program, *arguments = shlex.split(command)
        if program == 'jaxsd':
            arguments = [*shlex.split(START), *arguments]
        return self.session.run(*arguments)

    def stop(self):
        if self.session:
            self.session.stop()
        if self.server:
            self.server.kill()
            self.server.wait()


def check_named(piece):
    """That the program of a command which is not run is there, with these flags."""
    words = shlex.split(piece.text)
    if name := re.search(r'(?:-m launch\.|^jaxsd )(\w+)', piece.text):
        assert name[1] in cli.commands(), f'{piece.page}:{piece.line}: no command {name[1]}'
        source = ''.join(path.read_text() for path in (
            *(ROOT / 'launch').glob('*.py'), *(ROOT / 'configs').glob('*.py'),
            ROOT / 'jaxsd' / 'recipe.py'))
        for flag in re.findall(r' --(?:config\.)?(\w+)', piece.text):
            assert re.search(rf"'{flag}'|\bc\.{flag} = ", source), (
                f'{piece.page}:{piece.line}: no flag --{flag}')
    for word in words:
        if re.fullmatch(r'(tests|configs|docs)/[\w/.]+', word.rpartition('=')[2]):
            assert (ROOT / word.rpartition('=')[2]).exists(), f'{piece.page}:{piece.line}: {word}'


@pytest.mark.slow
@pytest.mark.parametrize('page', [
    pytest.param(name, marks=[pytest.mark.slow] if name != 'checkpoints/README.md' else [])
    for name in pages.NAMES if any(piece.page == name for piece in PIECES)])
def test_page(page, made, tmp_path):
    done, copy = set(), None
    try:
        for piece in (piece for piece in PIECES if FIRST[piece.text] == piece.page == page):
            if piece.text in done:
                continue
            done.add(piece.text)
            if reason(piece.text) or pages.NAMED.fullmatch(piece.text):
                check_named(piece)
                continue
            copy = copy or Copy(tmp_path, made, page)
            print(f'{piece.page}:{piece.line}: {piece.text}')
            try:
                copy.run(piece.text, piece.output)
            except AssertionError as error:
                raise AssertionError(f'{page}:{piece.line}: {error}') from None
    finally:
        if copy:
            copy.stop()
