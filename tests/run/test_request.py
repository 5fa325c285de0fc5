"""Request: what it refuses, and what `resolve` fills in."""

import runpy
import warnings

import numpy as np
import pytest
from conftest import TINY
from mains import ROOT

import jaxsd
from jaxsd.run.request import MAX_SEED, Request
from jaxsd.run.resolving import resolve


@pytest.mark.parametrize('fields, message', [
    (dict(steps=0), 'steps=0: expected a whole number between 1 and 10000'),
    (dict(steps=2.5), 'steps=2.5: expected a whole number'),
    (dict(seed=2**64), 'seed=18446744073709551616: .* between -1 and 18446744073709551615'),
    (dict(seed=-2), 'seed=-2'),
    (dict(guidance=float('nan')), 'guidance=nan: expected a finite number'),
    (dict(guidance='7'), "guidance='7': expected a finite number"),
    (dict(width=0), 'width=0'),
    (dict(prompt=None), 'prompt=None: expected a string'),
    (dict(steps=10**9), 'steps=1000000000: expected a whole number between 1 and 10000'),
    (dict(width=2**70), 'width=.* between 1 and 65536'),
    (dict(width=65536, height=65536), '65536x65536: expected at most 67108864 pixels'),
    (dict(width=8192, height=8200), '8192x8200: expected at most'),
    (dict(noise='torch', noise_batch=(0, 10**10)), 'noise_batch: expected at most 4294967296'),
    (dict(noise='torch', noise_batch=(0, 10**6), width=64, height=64), '64x64 pixels times 25 ste'),
    (dict(noise='philox', width=8192, height=8192, steps=100), "noise='philox': 8192x8192"),
    (dict(schedule=[20000.0 - i for i in range(10002)]), 'schedule: 10002 levels, expected at mo'),
    (dict(clip_skip=2**70), 'clip_skip=.* between 1 and 100'),
    (dict(mask_blur=1e30), 'mask_blur=1e.30: expected a number from 0 to 1024'),
    (dict(only_masked=2**70), 'only_masked=.* between 0 and 65536'),
    (dict(outpaint=(0, 0, 2**70, 0)), 'outpaint=.* between 0 and 65536'),
    (dict(negative_prompt='a \ud800'), r"negative_prompt: expected text, found '\\ud800' at 2"),
    (dict(crop=(1, 2, 3)), 'crop=.*: expected two numbers'),
    (dict(sampler='dpmpp2m'), "unknown sampler 'dpmpp2m': did you mean 'dpmpp_2m'.*euler"),
    (dict(sampler_options='order=3'), "sampler_options='order=3': expected a mapping"),
    (dict(schedule='karas'), "unknown schedule 'karas': did you mean 'karras'.*normal"),
])
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**fields)


def test_large_requests_that_have_room():
    Request(width=8192, height=8192)
    Request(width=65536, height=1024)
    Request(width=512, height=512, steps=10_000, noise='torch')
    Request(width=1024, height=1024, noise='torch', noise_batch=(3, 64))
    Request(width=1024, height=1024, noise_batch=(3, 10**6))  # threefry draws one


def test_resolve_fills_in_size_and_seed():
    first, second, third = resolve(
        [Request(), Request(), Request(seed=MAX_SEED, width=72)], TINY['sd1'])
    assert (first.width, first.height, third.width, third.height) == (64, 64, 72, 64)
    assert 0 <= first.seed < 2**32 and first.seed != second.seed
    assert third.seed == MAX_SEED


def test_resolve_refuses_sizes_between_latents():
    with pytest.raises(ValueError, match='height=100: expected a multiple of 8.*96 or 104'):
        resolve([Request(height=100)], TINY['sd1'])
    with pytest.raises(ValueError, match='64x64 pixels times 25 steps times 1000000'):
        resolve([Request(noise='torch', noise_batch=(0, 10**6))], TINY['sd1'])
    with pytest.raises(ValueError, match='expected a list'):
        resolve(Request(), TINY['sd1'])


def test_sizes_far_from_the_native_one():
    """TINY's is 64x64: to a quarter of its pixels is quiet, less is said, under 1/16 refused."""
    config = TINY['sd1']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        resolve([Request(width=32, height=32), Request(width=128, height=128)], config)
    for width, height in ((16, 16), (256, 256), (40, 24)):
        with pytest.warns(UserWarning, match=f'{width}x{height}: this model is made for 64x64'):
            resolve([Request(width=width, height=height)], config)
    for width, height in ((8, 24), (264, 256)):
        request = Request(width=width, height=height)
        with pytest.raises(ValueError, match=f'{width}x{height}: .* made for 64x64.*force_size'):
            resolve([request], config)
        with pytest.warns(UserWarning, match='expect poor pictures'):
            assert resolve([request.replace(force_size=True)], config)[0].width == width


@pytest.mark.parametrize('version, scale', [('sd15', 7), ('sdxl', 6), ('sdxl_refiner', 6),
                                            ('x4_upscaler', 9)])
def test_guidance_that_suits_the_version(version, scale):
    """The scale of the version's recipe; one that is asked for stays."""
    config = jaxsd.read_config(version)
    image = np.zeros((8, 8, 3), np.uint8) if version == 'x4_upscaler' else None
    found = resolve([Request(image=image), Request(image=image, guidance=2)], config)
    assert [request.guidance for request in found] == [scale, 2]
    recipe = runpy.run_path(ROOT / 'configs' / f'{version}.py')['get_config']()
    assert recipe.guidance in (None, scale)


@pytest.mark.parametrize('sampler, schedule, expected', [
    ('DPM++ 2M Karras', 'normal', ('dpmpp_2m', 'karras', {})),
    ('Euler a', 'SGM Uniform', ('euler_ancestral', 'sgm_uniform', {})),
    ('DPM++ 2M SDE Heun Exponential', 'karras', (
        'dpmpp_2m_sde', 'exponential', {'solver_type': 'heun'})),
    ('k_dpmpp_2s_a_ka', 'normal', ('dpmpp_2s_ancestral', 'karras', {})),
    ('EulerAncestralDiscreteScheduler', 'Karras', ('euler_ancestral', 'karras', {})),
    ('dpmpp_2m_sde_gpu', 'beta', ('dpmpp_2m_sde', 'beta', {})),
    ('uni_pc', 'simple', ('unipc', 'simple', {'variant': 'bh1'})),
    ('dpmpp_2m', '14.6,7.3,1,0', ('dpmpp_2m', '14.6,7.3,1,0', {}))])
def test_names_of_other_programs(sampler, schedule, expected):
    request = Request(sampler=sampler, schedule=schedule)
    assert (request.sampler, request.schedule, dict(request.sampler_options)) == expected


def test_an_option_of_ones_own_wins_over_a_names():
    request = Request(sampler='uni_pc', sampler_options={'variant': 'bh2', 'order': 3})
    assert request.sampler_options == {'variant': 'bh2', 'order': 3}
    with pytest.raises(ValueError, match="unknown sampler 'Eulr': did you mean"):
        Request(sampler='Eulr')
