"""--plugin: the examples of docs/plugins.md on the shipped model, by the mains that draw."""

import json
import re

import httpx
import plugin_page
import pytest
from mains import ROOT, run_code, run_main, serving

from jaxsd.batch import folder

REQUESTS = [
    dict(sampler='ghvb', schedule='shifted_cosine', guidance_options={'tcfg': {}}, steps=5),
    dict(sampler='predictor_corrector', steps=2),
    dict(sampler='gotta_go_fast', sampler_options=dict(rtol=1, atol=0.5, max_calls=12))]


@pytest.fixture
def flags(tmp_path):
    return [f'--plugin={path}' for path in plugin_page.write(tmp_path)]


@pytest.fixture
def batch(tmp_path, flags):
    """batch() -> how many pictures were to make, of REQUESTS; raises where it fails."""
    plan = tmp_path / 'plan.jsonl'
    plan.write_text(''.join(json.dumps({'prompt': 'red apple', 'seed': 7, 'guidance': 4, **request})
                            + '\n' for request in REQUESTS))

    def run():
        status, _, error = run_main('-m', 'launch.batch', f'--requests={plan}', '--slots=1',
                                    f'--out={tmp_path / "run"}', *flags)
        assert status == 0, error
        return int(re.search(r'(\d+) to make', error)[1])

    return run


IN_PYTHON = """
import json, sys
import jaxsd
from jaxsd.batch import folder
sys.path.insert(0, sys.argv[1])
import ghvb, gotta_go_fast, predictor_corrector, shifted_cosine, tcfg
with jaxsd.Engine(jaxsd.load('emoji', 'float32'), slots=1) as engine:
    requests = engine.resolve([jaxsd.Request('red apple', seed=7, guidance=4, **fields)
                               for fields in json.loads(sys.argv[2])])
    print(*map(folder.pixels, engine.make(requests)))
"""


@pytest.mark.slow
def test_batch_and_verify(tmp_path, batch, flags):
    """The pictures of the command line are those of Python; what was made by other code of the same
    name is made again, and is never run because a folder names it."""
    def verify(*plugins):
        status, out, error = run_main('-m', 'launch.verify', tmp_path / 'run', '--sample=all',
                                      *plugins)
        return status, out, error

    assert batch() == 3 and batch() == 0
    records = sorted(folder.read(tmp_path / 'run').values(), key=lambda record: record['index'])
    out = run_code(IN_PYTHON, tmp_path, json.dumps(REQUESTS))
    assert out.split() == [record['pixels'] for record in records]
    assert verify(*flags)[:2] == (0, '3 of 3 pictures are equal to the bit\n')
    status, out, _ = verify()
    assert status == 1 and '0 of 3 pictures are equal' in out
    assert "sampler 'gotta_go_fast' is of a file of somebody's own: give it as --plugin=FILE" in out

    changed = tmp_path / 'ghvb.py'
    changed.write_text(changed.read_text().replace('"""Generalized', '"""What stands here: g'))
    assert batch() == 0
    changed.write_text(changed.read_text().replace('beta=0.8', 'beta=0.5'))
    status, out, error = verify(*flags)
    assert status == 1 and '2 of 3 pictures are equal' in out
    assert 'note: made with other code of sampler ghvb: the picture may differ' in error
    assert batch() == 1 and len(folder.read(tmp_path / 'run')) == 4

    path = tmp_path / 'run' / records[0]['file']
    status, _, error = run_main('-m', 'launch.generate', f'--from={path}', f'--out={tmp_path}')
    assert (status, error.count('\n')) == (1, 1)
    assert "guidance 'tcfg'" in error or "sampler 'ghvb'" in error
    status, _, error = run_main('-m', 'launch.generate', f'--from={path}', f'--out={tmp_path}',
                                '--trust', *flags)
    assert status == 0 and 'warning: made with other code of sampler ghvb' in error


@pytest.mark.parametrize('text, flag, match', [
    ('import jaxsd\n\nprint(nothing)\n', '--steps=3',
     r"error: \S+/mine.py:3: NameError: name 'nothing' is not defined\n"),
    ('import jaxsd\n\n@jaxsd.sampler\ndef euler(sigmas):\n    return 3\n', '--steps=3',
     r"error: \S+/mine.py:3: sampler 'euler': there is one of this name; give it another, name=\n"),
    (plugin_page.EXAMPLES['ghvb'], '--sampler=ghvbb',
     r"error: unknown sampler 'ghvbb': did you mean 'ghvb'\? Known: .*\n"),
    (plugin_page.EXAMPLES['ghvb'], '--config.sampler_options=betta=1',
     r"error: sampler 'ghvb' has no option 'betta'; it takes: beta\n")])
def test_mistakes_are_told_in_a_line(tmp_path, text, flag, match):
    path = tmp_path / 'mine.py'
    path.write_text(text)
    status, out, error = run_main('-m', 'launch.generate', '--prompt=a', f'--out={tmp_path}',
                                  '--sampler=' + ('ghvb' if 'ghvb' in text else 'euler'),
                                  f'--plugin={path}', flag)
    assert status == 1 and re.fullmatch(f'(emoji.*\n)?{match}', error), error


@pytest.mark.slow
def test_lab(tmp_path, flags):
    status, _, error = run_main(
        '-m', 'launch.lab', 'sweep', '--samplers=predictor_corrector(snr=0.1), ghvb, gotta_go_fast('
        'max_calls=4)', '--schedules=shifted_cosine', '--steps=2', '--guidance=4', '--batch_size=1',
        '--prompt=red apple', '--seeds=0', '--reference_steps=4', f'--out={tmp_path / "out"}',
        *flags)
    assert status == 0, error
    lines = (tmp_path / 'out' / 'results.csv').read_text().splitlines()
    calls = {line.split(',')[0]: line for line in lines}
    assert {'predictor_corrector(snr=0.1)', 'ghvb', 'gotta_go_fast(max_calls=4)'} <= set(calls)


@pytest.mark.slow
def test_server(flags):
    with serving('--slots=1', *flags) as (url, _):
        names = [found['name'] for found in httpx.get(f'{url}/sdapi/v1/samplers').json()]
        assert {'ghvb', 'predictor_corrector', 'gotta_go_fast'} <= set(names)
        answer = httpx.post(f'{url}/sdapi/v1/txt2img', timeout=180, json={
            'prompt': 'red apple', 'steps': 2, 'seed': 1, 'sampler_name': 'ghvb',
            'scheduler': 'shifted_cosine'})
        assert answer.status_code == 200, answer.text
        info = json.loads(answer.json()['info'])['infotexts'][0]
        assert 'Sampler: ghvb' in info and 'Schedule type: shifted_cosine' in info


@pytest.mark.slow
def test_ray(tmp_path, batch, flags):
    """Its actors load the same files."""
    pytest.importorskip('ray')
    batch()
    status, _, error = run_main(
        '-m', 'launch.ray_batch', f'--requests={tmp_path / "plan.jsonl"}', '--slots=1',
        f'--out={tmp_path / "ray"}', *flags)
    assert status == 0, error
    pixels = [{key: record['pixels'] for key, record in folder.read(tmp_path / name).items()}
              for name in ('run', 'ray')]
    assert pixels[0] == pixels[1] and len(pixels[0]) == 3


def test_what_packages_offer(tmp_path):
    """By entry points: a package that is installed needs no flag."""
    (tmp_path / 'packaged.py').write_text(plugin_page.EXAMPLES['ghvb'].replace('ghvb', 'packaged'))
    info = tmp_path / 'packaged-1.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: packaged\nVersion: 1\n')
    (info / 'entry_points.txt').write_text('[jaxsd.plugins]\nmine = packaged\n')
    path = {'PYTHONPATH': f'{ROOT}:{tmp_path}'}
    command = ('-m', 'launch.generate', '--prompt=a', f'--out={tmp_path}', '--sampler=packagedd')
    status, _, error = run_main(*command, **path)
    assert status == 1 and "did you mean 'packaged'?" in error
    (tmp_path / 'packaged.py').write_text('1 / 0\n')
    status, _, error = run_main(*command, **path)
    assert (status, error) == (
        1, 'error: plugin mine = packaged: ZeroDivisionError: division by zero\n')
