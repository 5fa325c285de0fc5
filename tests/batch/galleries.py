"""Made-up runs for galleries, with all that may be hard about one."""

import hashlib
import itertools
import json
import os

import numpy as np

from jaxsd.run import picture

HOSTILE = ('</script><script>hacked = 1</script><img src=x onerror="hacked = 1"><!-- <script> -->'
           '\u2028\u202e$& \\u003c @data@ &lt; "\'` \x00')
PROMPTS = ('red apple', HOSTILE, 'Ωmega \N{ROCKET} 漢字 עברית', '',
           *(f'thing number {i}' for i in range(16)))
SAMPLERS, GUIDANCE = ('euler', 'dpmpp_2m', 'heun', 'lcm'), (4, 7.5, 1, 10, [4.0, 7.0])
SEEDS = (2**64 - 1, 2**64 - 2, 0, 1, 2**53 + 1)


def identity(index):
    return hashlib.sha256(f'{index}'.encode()).hexdigest()[:32]


def make_record(index, prompt='red apple', seed=7, **request):
    key = identity(index)
    fields = {'prompt': prompt, 'seed': seed, 'sampler': 'euler', 'schedule': 'karras', 'steps': 20,
              'guidance': 4, 'width': 64, 'height': 64, **request}
    return {'id': key, 'index': index, 'request': fields, 'time': f'2026-01-01T00:{index % 60:02}',
            'seconds': round(0.5 + (index * 7919 % 1000) / 999, 4),
            'file': f'pictures/{key[:2]}/{key}.png', 'pixels': key * 2, 'width': 64, 'height': 64}


def failed(record, error):
    return {name: record[name] for name in ('id', 'index', 'request')} | {'error': error}


def planned(count):
    """Records of a run, every hundredth failed: prompts, times a grid, times seeds, again."""
    points = itertools.cycle(itertools.product(PROMPTS, SAMPLERS, GUIDANCE, SEEDS))
    for index, (prompt, sampler, guidance, seed) in enumerate(itertools.islice(points, count)):
        record = make_record(index, prompt, seed, sampler=sampler, guidance=guidance,
                             sampler_options={'order': index % 3 + 1})
        yield failed(record, 'ValueError: <b>no</b>') if index % 100 == 99 else record


def make_run(path, records, axes=None, manifest='manifest.jsonl', pictures=True):
    """A run's folder; its pictures are links to one file for each sampler and guidance."""
    path.mkdir(parents=True, exist_ok=True)
    (path / 'config.json').write_text(json.dumps({
        'model': 'emoji', 'grid': axes, 'command': 'python -m launch.batch --prompt="<b>"',
        'settings': {'weights': 'ab', 'tile': None}}))
    records, made = list(records), {}
    for record in records if pictures else ():
        if 'file' not in record:
            continue
        kind = str((record['request']['sampler'], record['request']['guidance']))
        file = path / record['file']
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind in made:
            os.link(made[kind], file)
        else:
            colour = np.frombuffer(hashlib.sha256(kind.encode()).digest()[:3], np.uint8)
            picture.write_png(file, np.broadcast_to(colour, (64, 64, 3)))
            made[kind] = file
    with open(path / manifest, 'a') as file:
        file.writelines(json.dumps(record) + '\n' for record in records)
    return path
