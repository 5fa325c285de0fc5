"""A load test: many clients at once, and every picture compared with what it is alone.

python tests/serve/load.py --clients=64 --seconds=300

It starts `launch.serve` with the shipped model, on loopback, and asks for one random emoji a
request, with four samplers and 4 to 20 steps (`--steps`); no two requests are the same. Then one
client alone. Then the pictures are made again here, by Engine: `--solo` of them alone, the others
beside other neighbours than on the server.

python tests/serve/load.py --sizes=40 --requests=500

asks for pictures of so many sizes, four of a size after each other, round and round, and prints
what memory the server holds.

python tests/serve/load.py --lone=20

takes turns between a request to a server that has nothing else to do and `jaxsd.generate` here.
"""

import argparse
import concurrent.futures
import itertools
import json
import pathlib
import random
import sys
import time

import httpx
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from mains import opened, serving  # noqa: E402
from servers import DEFAULTS, pixels  # noqa: E402

import jaxsd  # noqa: E402
from jaxsd.run import Engine  # noqa: E402
from jaxsd.serve import a1111, schemas  # noqa: E402

SAMPLERS = ('Euler', 'Euler a', 'DPM++ 2M Karras', 'Heun')
NAMES = (ROOT / 'tests' / 'data' / 'emoji_eval.txt').read_text().splitlines()


def client(url, number, until, steps):
    """Ask until then -> a list of (body, seconds, hash of the pixels or None, slots of the
    program that made them)."""
    draw, found = random.Random(number), []
    with httpx.Client(timeout=600) as http:
        while time.monotonic() < until:
            body = {'prompt': draw.choice(NAMES), 'seed': draw.randrange(2**64), 'cfg_scale': 4,
                    'steps': draw.randint(*steps), 'sampler_name': draw.choice(SAMPLERS)}
            began = time.monotonic()
            while (answer := http.post(f'{url}/sdapi/v1/txt2img', json=body)).status_code == 429:
                time.sleep(int(answer.headers['retry-after']))
            images = answer.json().get('images', [])
            took, made, slots = time.monotonic() - began, None, 0
            if len(images) == 1:
                picture = opened(images[0])
                made, slots = pixels(picture), json.loads(picture.text['jaxsd'])['slots']
            found.append((body, took, made, slots))
    return found


def load(url, clients, seconds, steps, seed):
    """So many clients at once for so long -> all that they found."""
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        runs = [pool.submit(client, url, seed + n, began + seconds, steps) for n in range(clients)]
        found = [answer for run in runs for answer in run.result()]
    took = time.monotonic() - began
    p50, p95, p99 = np.percentile([t for _, t, *_ in found], [50, 95, 99])
    print(f'{clients} client(s): {len(found)} pictures in {took:.1f} s, {len(found) / took:.2f} '
          f'pictures/s; p50 {p50:.2f} s, p95 {p95:.2f} s, '
          f'p99 {p99:.2f} s', flush=True)
    return found


def again(bodies, slots, solo):
    """The hashes of the bodies' pictures, made by programs of so many slots: of the first `solo`
    alone, of the others together."""
    engine = Engine(jaxsd.load(ROOT / 'checkpoints' / 'emoji', 'float32'), slots=slots)
    requests = engine.resolve([
        a1111.requests(a1111.parse(schemas.Txt2Img, json.dumps(body).encode()), DEFAULTS,
                       a1111.Limits(), 'emoji')[0] for body in bodies])
    alone = [engine.make([request])[0] for request in requests[:solo]]
    return [*map(pixels, alone + engine.make(requests[solo:]))]


def lone(url, rounds):
    """Seconds of a picture of 20 steps from the server, and by `generate`, in turn."""
    model, times = jaxsd.load(ROOT / 'checkpoints' / 'emoji', 'float32'), []
    with httpx.Client(timeout=600) as http:
        for seed in range(rounds + 3):  # the first of either compile
            body = {'prompt': 'red apple', 'seed': seed, 'steps': 20, 'cfg_scale': 4}
            began = time.perf_counter()
            http.post(f'{url}/sdapi/v1/txt2img', json=body).raise_for_status()
            between = time.perf_counter()
            jaxsd.generate(model, jaxsd.Request('red apple', seed=seed, steps=20, guidance=4.0))
            times.append((between - began, time.perf_counter() - between))
    served, made = np.median(times[3:], axis=0)
    print(f'a lone request {served:.3f} s, generate {made:.3f} s: {served / made:.2f}')
    return 0


def grow(url, pid, sizes, requests):
    """Ask for pictures of 2 steps in so many sizes -> 0, or 1 where one is not of its size."""
    sides = itertools.product(range(32, 104, 8), repeat=2)
    sides = sorted(sides, key=lambda side: side[0] * side[1])[:sizes]
    with httpx.Client(timeout=600) as http:
        for i in range(requests):
            width, height = sides[i // 4 % sizes]
            body = {'prompt': 'red apple', 'seed': i, 'steps': 2, 'width': width, 'height': height}
            answer = http.post(f'{url}/sdapi/v1/txt2img', json=body).json()
            if opened(answer['images'][0]).size != (width, height):
                return 1
            if (i + 1) % (2 * sizes) == 0 or i + 1 == requests:
                status = pathlib.Path(f'/proc/{pid}/status').read_text()
                held = int(status.partition('VmRSS:')[2].split()[0]) // 1024
                print(f'{i + 1} requests of {sizes} sizes: {held} MiB', flush=True)
    return 0


def main():
    """Load, one client alone, comparison -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--clients', type=int, default=64)
    parser.add_argument('--seconds', type=float, default=300)
    parser.add_argument('--alone', type=float, default=30, help='seconds for one client alone')
    parser.add_argument('--slots', type=int, help='as of launch.serve')
    parser.add_argument('--steps', type=int, nargs=2, default=(4, 20), help='fewest and most')
    parser.add_argument('--solo', type=int, default=200, help='pictures made again alone')
    parser.add_argument('--lone', type=int, help='so many requests one by one instead, see above')
    parser.add_argument('--sizes', type=int, help='ask for so many sizes instead, see above')
    parser.add_argument('--requests', type=int, default=500, help='of --sizes, in all')
    flags = parser.parse_args()
    if flags.lone:
        with serving() as (url, _):
            return lone(url, flags.lone)
    if flags.sizes:
        with serving('--max_pixels=65536') as (url, server):
            return grow(url, server.pid, flags.sizes, flags.requests)
    slots = [f'--slots={flags.slots}'] if flags.slots else []
    with serving('--queue=512', *slots) as (url, _):
        found = load(url, flags.clients, flags.seconds, flags.steps, seed=0)
        found += load(url, 1, flags.alone, flags.steps, seed=10**6)
    random.Random(0).shuffle(found)
    hashes, expected = [], []
    for number in sorted({number for *_, number in found} - {0}):
        some = [(body, made) for body, _, made, slots in found if slots == number]
        print(f'{len(some)} in programs of {number} slot(s)')
        hashes += [made for _, made in some]
        expected += again([body for body, _ in some], number, flags.solo)
    lost = len(found) - len(hashes)
    wrong = sum(made != other for made, other in zip(hashes, expected))
    doubled = len(hashes) - len(set(hashes)) - (len(expected) - len(set(expected)))
    print(f'{len(found)} requests: {lost} lost, {wrong} wrong, {doubled} doubled; '
          f'of each {flags.solo} compared with pictures made alone, the others with '
          'pictures made beside others')
    return int(bool(lost or wrong or doubled))


if __name__ == '__main__':
    sys.exit(main())
