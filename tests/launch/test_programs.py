"""Programs: how many a day's work compiles, and that the next start compiles none."""

import re

import numpy as np
import pytest
from mains import ROOT, run_code, run_main
from PIL import Image

# A day of a user's: 40 pictures in 12 ways, as launch.generate makes them.
DAY = f"""
import numpy as np
import jaxsd
from jaxsd.run import replica
model = jaxsd.load({str(ROOT / 'checkpoints' / 'emoji')!r})
image, mask = np.full((64, 64, 3), 200, np.uint8), np.eye(64, dtype=np.float32)
vae = jaxsd.Network(model.config.vae, model.params['vae'])
looks = []
preview = jaxsd.Preview(vae, lambda *seen: looks.append(seen))
ways = [
    (1, {{}}), (2, {{'guidance': 1.0}}), (3, {{'steps': 1}}), (4, {{'steps': 60}}),
    (5, {{'sampler': 'euler_ancestral'}}), (5, {{'image': image, 'strength': 0.5}}),
    (4, {{'image': image, 'mask': mask}}), (2, {{'schedule': 'normal', 'guidance': 9.0}}),
    (1, {{'sampler': 'heun'}}), (4, {{'negative_prompt': 'blue', 'steps': 5}}),
    (5, {{'prompt': 'a (red:1.0) apple', 'seed': 2**63}}), (4, {{'steps': 3}})]
assert sum(count for count, _ in ways) == 40
for number, (count, fields) in enumerate(ways):
    fields = {{'prompt': 'red apple', 'seed': 1, 'steps': 4, **fields}}
    requests = [jaxsd.Request(**fields).replace(seed=(fields['seed'] + i)) for i in range(count)]
    images = jaxsd.generate(model, requests, on_step=lambda *at: None,
                            preview=preview if number == 11 else None)
    assert len(images) == count
assert looks
print(*replica.PROGRAMS.log)
"""


@pytest.mark.slow
def test_a_days_work_compiles_eight_programs_at_most():
    programs = run_code(DAY).split()
    assert len(programs) <= 8, programs
    assert sorted(programs) == ['_advance', '_advance', '_decode', '_decode', '_encode', '_encode',
                                '_encode', '_encode_text'], programs


@pytest.mark.slow
@pytest.mark.parametrize('more', [[], pytest.param(
    ['--image=docs/examples/apple.png', '--strength=0.5'], marks=pytest.mark.slow)])
def test_the_second_start_compiles_nothing(tmp_path, more):
    """The first one, --warm, draws nothing and leaves nothing to compile to the others."""
    found = []
    for warm in (['--warm'], [], []):
        code, stdout, stderr = run_main(
            '-m', 'launch.generate', '--prompt=red apple', '--seed=7', '--config.steps=3', *more,
            *warm, f'--out={tmp_path}/out', f'--compilation_cache={tmp_path}/programs', fresh=True,
            JAX_COMPILATION_CACHE_DIR=None, JAX_LOG_COMPILES='1', JAX_EXPLAIN_CACHE_MISSES='0',
            JAX_DEBUG_LOG_MODULES='jax._src.compiler,jax._src.compilation_cache')
        assert code == 0, stderr
        found.append((len(re.findall('PERSISTENT COMPILATION CACHE MISS', stderr)),
                      len(re.findall('[Pp]ersistent compilation cache hit', stderr))))
    (missed, _), (again, hits), last = found
    assert missed >= 5 and again == 0 and hits >= 5 and last == (again, hits), found
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / 'out').glob('*.png'))]
    np.testing.assert_array_equal(*pictures)
