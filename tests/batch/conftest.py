"""A gallery of 2,000 records, open in a browser."""

import browser
import pytest
from galleries import GUIDANCE, SAMPLERS, make_run, planned

from jaxsd.batch import gallery


@pytest.fixture(scope='module')
def window():
    with browser.chromium() as driver:
        driver.set_script_timeout(20)
        driver.execute_cdp_cmd('Browser.grantPermissions', {
            'permissions': ['clipboardReadWrite', 'clipboardSanitizedWrite']})
        yield driver


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """2,000 records in a folder that a shell must have quoted."""
    axes = {'sampler': list(SAMPLERS), 'guidance': list(GUIDANCE)}
    where = make_run(tmp_path_factory.mktemp('gallery') / "it's a run", planned(2000), axes)
    return gallery.write(where)


@pytest.fixture
def visit(window, run):
    """visit(hash, page): open the page -> the driver. The console must stay without errors."""
    browser.resize(window, 1280, 900)
    browser.scheme(window, 'light')

    def visit(state='', page=run):
        window.get('about:blank')
        window.get(page.as_uri() + state)
        return window

    window.get_log('browser')
    yield visit
    errors = [entry for entry in window.get_log('browser') if entry['level'] == 'SEVERE']
    assert not errors
