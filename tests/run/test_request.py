"""Request: what it refuses, and what `resolve` fills in."""

import pytest
from conftest import TINY

from jaxsd.run.request import MAX_SEED, Request, resolve


@pytest.mark.parametrize('fields, message', [
    (dict(steps=0), 'steps=0: expected a whole number at least 1'),
    (dict(steps=2.5), 'steps=2.5: expected a whole number'),
    (dict(seed=2**64), 'seed=18446744073709551616: .* between -1 and 18446744073709551615'),
    (dict(seed=-2), 'seed=-2'),
    (dict(guidance=float('nan')), 'guidance=nan: expected a finite number'),
    (dict(guidance='7'), "guidance='7': expected a finite number"),
    (dict(width=0), 'width=0'),
    (dict(prompt=None), 'prompt=None: expected a string'),
    (dict(negative_prompt='a \ud800'), r"negative_prompt: expected text, found '\\ud800' at 2"),
    (dict(crop=(1, 2, 3)), 'crop=.*: expected two numbers'),
    (dict(sampler='dpmpp2m'), "unknown sampler 'dpmpp2m': did you mean 'dpmpp_2m'.*euler"),
    (dict(sampler_options='order=3'), "sampler_options='order=3': expected a mapping"),
    (dict(schedule='karas'), "unknown schedule 'karas': did you mean 'karras'.*normal"),
])
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**fields)


def test_resolve_fills_in_size_and_seed():
    first, second, third = resolve(
        [Request(), Request(), Request(seed=MAX_SEED, width=72)], TINY['sd1'])
    assert (first.width, first.height, third.width, third.height) == (64, 64, 72, 64)
    assert 0 <= first.seed < 2**32 and first.seed != second.seed
    assert third.seed == MAX_SEED


def test_resolve_refuses_sizes_between_latents():
    with pytest.raises(ValueError, match='height=100: expected a multiple of 8.*96 or 104'):
        resolve([Request(height=100)], TINY['sd1'])
    with pytest.raises(ValueError, match='expected a list'):
        resolve(Request(), TINY['sd1'])
