"""Every Python block of the pages runs, those of a page one after the other as one program."""

import re

import pages
import pytest
import substitutes
import weights
from mains import ROOT, run_code

BLOCKS = {name: found for name, path in zip(pages.NAMES, pages.PAGES)
          if (found := pages.programs(path))}


def program(page):
    """The page's blocks, with what comes before them and what is changed."""
    text = '\n'.join(piece.text for piece in BLOCKS[page])
    for old, new in substitutes.PROGRAMS.get(page, {}).items():
        assert old in text, f'{page}: {old!r} stands there no more'
        text = text.replace(old, new)
    return f'{substitutes.BEFORE.get(page, "")}\n{text}'


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A folder with the weights and pictures that the blocks read."""
    found = tmp_path_factory.mktemp('python')
    weights.write(found)
    for name in ('checkpoints', 'docs', 'configs', 'tests'):
        (found / 'files' / name).symlink_to(ROOT / name)
    return found / 'files'


def test_only_what_is_there_is_changed():
    assert BLOCKS.keys() >= substitutes.PROGRAMS.keys() | substitutes.BEFORE.keys()


@pytest.mark.slow
@pytest.mark.parametrize('page', [
    pytest.param(name, marks=[pytest.mark.slow] if name.startswith('docs/') else [])
    for name in BLOCKS])
def test_page(page, folder):
    code = program(page)
    for number, line in enumerate(code.splitlines(), 1):
        assert not re.match(r'\s*\.\.\.$', line), f'{page}: line {number} is left out'
    run_code(code, cwd=folder)
