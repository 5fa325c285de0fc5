"""The site builds without a warning, loads nothing from elsewhere, and holds all public names."""

import re
import subprocess
import sys

import pytest
from mains import ROOT

import jaxsd
from jaxsd.sampling import names

pytest.importorskip('mkdocs')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The folder of the built site; a link that leads nowhere is an error."""
    folder = tmp_path_factory.mktemp('site')
    done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', folder],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    pages = [*site.rglob('*.html')]
    assert len(pages) > 25
    for page in pages:
        text = page.read_text('utf-8')
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?(\w+:)?//', text)
        loaded += re.findall(r'<link[^>]* rel="?(?:stylesheet|icon)[^>]* href="?(\w+:)?//', text)
        loaded += re.findall(r'(?:@import|url\()\s*["\']?https?:', text)
        assert not loaded, f'{page.name}: {loaded}'


def test_the_reference_is_complete(site):
    text = (site / 'api.html').read_text('utf-8')
    for name in jaxsd.__all__:
        assert re.search(rf'id="jaxsd\.[\w.]+\.{name}"', text), name
        # and with its docstring: what an argument is, as an item
    assert text.count('<li><p><strong>') + text.count('<li><strong>') > 50


def test_names_of_other_programs():
    """Each row of from_webui.md: what A1111 and ComfyUI call it is what the table says."""
    text = (ROOT / 'docs' / 'from_webui.md').read_text('utf-8')
    samplers, schedules = text[text.index('## Names of samplers'):].split('| A1111 |')[1:]
    seen = set()
    for shown, comfy, ours in re.findall(r'^\| (.*?) \| (.*?) \| (.*?) \|$', samplers, re.M):
        if shown.startswith('--'):
            continue
        for name in filter(None, [shown.strip(), *re.findall('`(.+?)`', comfy)]):
            target = name if ours == 'the same' else re.search('`(.+?)`', ours)[1]
            found, _, options = names.find_sampler(name)
            assert found == target, name
            assert all(f'`{k}={v}`' in ours for k, v in options.items()
                       if (k, v) != ('variant', 'bh2')), name
            seen.add(found)
    assert seen >= names.A1111_SAMPLERS.keys()
    rows = re.findall(r'^\| (.*?) \| .*? \| `(.*?)` \|$', schedules, re.M)
    assert {ours: shown for shown, ours in rows} == names.A1111_SCHEDULES
