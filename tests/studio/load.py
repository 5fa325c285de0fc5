"""A load test: several browsers at one studio at once, each of which must see its own pictures.

python tests/studio/load.py --browsers=8 --seconds=180

It starts `launch.studio` with the shipped model and as many Chromium processes. Each draws one or
two pictures after the other, of words, seeds, samplers and steps that no other has, and every
picture's record is compared with what was asked for. All pictures are made again here at the end.

python tests/studio/load.py --starts=6

It starts the studio so often instead, the first time with nothing compiled, and prints the seconds
to its page and to a picture that is asked for as soon as that is there.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import io
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import httpx
import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from browser import chromium, find, wait  # noqa: E402
from mains import environment, free_port, serving  # noqa: E402

import jaxsd  # noqa: E402
from jaxsd.run import infotext  # noqa: E402

WORDS = 'red apple', 'rocket', 'rooster', 'alien', 'red heart', 'musical note', 'four leaf clover'


def use(number, url, until):
    """One person -> [(settings that were asked for, those in the picture, its pixels)]."""
    rng, found = random.Random(number), []
    with chromium() as driver:
        driver.get(url)
        wait(lambda: 'is ready' in find(driver, '#model').text, 120)
        while time.monotonic() < until:
            asked = {'prompt': f'{rng.choice(WORDS)} {number}', 'steps': rng.randint(4, 20),
                     'sampler': rng.choice(['euler', 'dpmpp_2m', 'heun']),
                     'seed': 1000 * number + len(found), 'count': rng.randint(1, 2)}
            before = driver.execute_script('return items.length')
            for name, value in asked.items():
                driver.execute_script('document.getElementById(arguments[0]).value = arguments[1]',
                                      name, str(value))
            find(driver, '#draw').click()
            count = asked.pop('count')
            wait(lambda want=before + count: find(driver, '#wrong').text or driver.execute_script(
                'return !running && items.length') == want, 120)
            assert not (wrong := find(driver, '#wrong').text), wrong
            for i in range(count):
                data = driver.execute_async_script(
                    'const [number, done] = arguments;'
                    'read(items[number].blob).then(url => done(url.split(",")[1]));', before + i)
                file = Image.open(io.BytesIO(base64.b64decode(data)))
                told = infotext.from_texts('', file.text).fields
                found.append((asked | {'seed': asked['seed'] + i}, told, np.asarray(file)))
        severe = [entry for entry in driver.get_log('browser') if entry['level'] == 'SEVERE']
    return found, severe


def start(cache):
    """Seconds from the start of a studio to its page and to a first picture."""
    url, began = f'http://127.0.0.1:{(port := free_port())}', time.monotonic()
    with subprocess.Popen([sys.executable, '-m', 'launch.studio', '--nobrowser', f'--port={port}'],
                          cwd=ROOT, env=environment(XDG_CACHE_HOME=cache)) as studio:
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(url).raise_for_status()
                    break
                time.sleep(0.02)
            page = time.monotonic() - began
            while (answer := httpx.post(f'{url}/sdapi/v1/txt2img', json={
                    'prompt': 'red apple', 'seed': 7}, timeout=120)).status_code == 503:
                time.sleep(0.05)
            answer.raise_for_status()
            return page, time.monotonic() - began
        finally:
            studio.kill()


def run(browsers, seconds):
    """Print what came of it -> whether all was well."""
    with contextlib.ExitStack() as stack:
        url, _ = stack.enter_context(serving(
            '--nobrowser', '--config=emoji', command=(sys.executable, '-m', 'launch.studio')))
        until = time.monotonic() + seconds
        with concurrent.futures.ThreadPoolExecutor(browsers) as pool:
            results = list(pool.map(lambda i: use(i, url, until), range(browsers)))
    pictures = [one for found, _ in results for one in found]
    other = sum(any(told[name] != value for name, value in asked.items())
                for asked, told, _ in pictures)
    requests = [jaxsd.Request(width=64, height=64, schedule='karras', **asked)
                for asked, _, _ in pictures]
    again = jaxsd.generate(jaxsd.load('emoji', dtype='float32'), requests)
    worst = max(int(np.abs(image.astype(int) - made).max())
                for (_, _, image), made in zip(pictures, again))
    errors = sum(len(severe) for _, severe in results)
    print(f'{browsers} browsers, {seconds} s: {len(pictures)} pictures, '
          f'{min(len(found) for found, _ in results)} to '
          f'{max(len(found) for found, _ in results)} each; of another: {other}; '
          f'furthest from the same made here: {worst} of 255; errors of the page: {errors}')
    return not other and not errors and worst <= 1


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--browsers', type=int, default=8)
    parser.add_argument('--seconds', type=int, default=180)
    parser.add_argument('--starts', type=int, default=0)
    given = parser.parse_args()
    if given.starts:
        with tempfile.TemporaryDirectory() as cache:
            for _ in range(given.starts):
                print('page {:.2f} s, picture {:.2f} s'.format(*start(cache)), flush=True)
    else:
        sys.exit(not run(given.browsers, given.seconds))
