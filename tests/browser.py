"""A headless Chromium for tests of pages; it has no network."""

import contextlib
import importlib.util
import json
import os
import tempfile
import time

import pytest

CHROMIUM, DRIVER = '/usr/bin/chromium', '/usr/bin/chromedriver'
FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--disable-dev-shm-usage', '--lang=en')


def need():
    """Skip where the browser or selenium is missing, or fail if JAXSD_REQUIRE_BROWSER=1."""
    missing = [path for path in (CHROMIUM, DRIVER) if not os.path.exists(path)]
    if importlib.util.find_spec('selenium') is None:
        missing.append('selenium')
    if missing:
        words = (f'{", ".join(missing)} missing: apt-get install chromium chromium-driver, '
                 'pip install selenium')
        (pytest.fail if os.environ.get('JAXSD_REQUIRE_BROWSER') == '1' else pytest.skip)(words)


@contextlib.contextmanager
def chromium(width=1280, height=900):
    """A selenium driver of a window of that size, with a profile of its own; quits at the end."""
    need()
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f'--user-data-dir={profile}', f'--window-size={width},{height}'):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        try:
            resize(driver, width, height)
            yield driver
        finally:
            driver.quit()


def resize(driver, width, height):
    """The size of the page itself, which may be narrower than windows can be."""
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
        'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': False})


def scheme(driver, name):
    """'light' or 'dark', as the reader's system would say."""
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {
        'features': [{'name': 'prefers-color-scheme', 'value': name}]})


def requests(driver, part):
    """How many files whose address holds `part` pages have asked for since this was last asked."""
    messages = [json.loads(entry['message'])['message'] for entry in driver.get_log('performance')]
    return sum(part in message['params']['request']['url'] for message in messages
               if message['method'] == 'Network.requestWillBeSent')


def wait(test, seconds=5):
    """What a function says, as soon as it says anything."""
    end = time.monotonic() + seconds
    while not (found := test()) and time.monotonic() < end:
        time.sleep(0.02)
    assert found
    return found


def find(driver, selector):
    return driver.find_element('css selector', selector)


def find_all(driver, selector):
    return driver.find_elements('css selector', selector)


def texts(driver, selector):
    """Text as it stands in the document, also where it is out of sight."""
    return driver.execute_script('return [...document.querySelectorAll(arguments[0])]'
                                 '.map(node => node.textContent)', selector)


def unfold(driver):
    driver.execute_script('document.querySelectorAll("details").forEach(n => { n.open = true; })')


def press(driver, *keys):
    from selenium.webdriver.common.keys import Keys
    for key in keys:
        driver.switch_to.active_element.send_keys(getattr(Keys, key, key))


def focused(driver):
    """The record whose picture has the keyboard."""
    return driver.execute_script('return Number(document.activeElement.dataset.record ?? -1)')
