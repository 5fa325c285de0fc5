"""Sweeps: what is packed together, what converges to what, and the numbers made of it."""

import numpy as np
import pytest

import jaxsd
from jaxsd import sampling
from jaxsd.lab import sweep

SIGMAS = np.append(np.geomspace(10, 0.1, 6), 0)
SIZE = {'width': 64, 'height': 64}


@pytest.mark.parametrize('name, options, kind', [
    ('dpmpp_2m', {}, 'ode'), ('ddim', {}, 'ode'), ('euler_ancestral', {'eta': 0}, 'ode'),
    ('euler_ancestral', {}, 'own'), ('ddim', {'eta': 0.5}, 'own'), ('dpmpp_2m_sde', {}, 'own'),
    ('heun', {'s_churn': 5}, 'none'), ('lcm', {}, 'none'), ('euler_cfg_pp', {}, 'none'),
    ('dpm_adaptive', {}, 'ode'), ('dpm_adaptive', {'eta': 1}, 'none')])
def test_what_a_table_converges_to(name, options, kind):
    assert sweep.kind(sampling.plan(name, SIGMAS, **options)) == kind


def test_the_reference_of_a_request():
    request = jaxsd.Request('cat', seed=3, sampler='ddim', sampler_options={'eta': 0.5}, steps=5,
                            schedule='normal', guidance=2.0)
    same = request.replace(schedule='karras', steps=90)
    assert sweep.target(request, 'own', 90) == same
    assert sweep.target(request, 'ode', 90) == same.replace(sampler='dpmpp_2m', sampler_options={})
    assert sweep.target(request, 'none', 90) is None


def test_order_is_the_slope_of_the_last_points_above_the_floor():
    calls = np.array([5, 10, 20, 40, 80])
    errors = 7 * calls**-2.0
    assert sweep.order(calls, errors) == pytest.approx(2, abs=1e-9)
    bent = errors.copy()
    bent[0], bent[-1] = 100, 2 * errors[-1]  # not yet asymptotic; near the reference's own error
    assert sweep.order(calls, bent, floor=errors[-1]) == pytest.approx(2, abs=1e-9)
    assert sweep.order(calls, bent) < 1.8
    assert np.isnan(sweep.order(calls, errors, floor=errors[0]))
    assert np.isnan(sweep.order([5, 10, 20], [1, np.nan, 0.1]))
    assert np.isnan(sweep.order([39, 39, 39], [1, 1, 1]))  # adaptive steps


def test_needed_is_the_first_of_calls_that_all_stay_within():
    assert sweep.needed([5, 10, 20, 40], [0.05, 0.2, 0.1, 0.01], 0.1) == 20
    assert sweep.needed([5, 10], [0.05, 0.2], 0.1) == np.inf
    assert sweep.needed([5, 10], [np.nan, np.nan], 0.1) == np.inf


def test_lines_gather_prompts_and_seeds():
    base = {'sampler': 'a', 'schedule': 'k', 'guidance': 1.0, 'calls': 5, 'seconds': 1.0}
    results = [{**base, 'steps': 5, 'error': e, 'rank': r} for e, r in ((0.1, 0), (0.4, 3))]
    results.append({**base, 'steps': 3, 'error': 1.0, 'rank': 0, 'calls': 3})
    line, = sweep.lines(results, 0.0, 0.3)
    assert line.steps == (3, 5) and line.calls == (3, 5)
    np.testing.assert_allclose(line.errors, (1.0, 0.2))
    assert line.top1 == (1, 0.5) and line.needed == 5


@pytest.fixture(scope='module')
def packed(tiny_model):
    """A sweep of more pictures than a microbatch holds -> model, requests, microbatches, steps."""
    model, heard = tiny_model('sd2'), []
    requests = sweep.expand(
        [('euler', {}), ('heun', {}), ('dpmpp_2m_sde', {}), ('unipc', {'order': 3}), ('lcm', {})],
        [('karras', {}), ('normal', {})], [2, 4], [1.0, 3.0], ['red apple'], [7], **SIZE)
    parts = list(sweep.sweep(model, requests, batch_size=6, reference_steps=40,
                             on_step=lambda *now: heard.append(now)))
    return model, requests, parts, heard


@pytest.mark.slow
def test_pictures_are_those_of_generate(packed):
    model, requests, parts, _ = packed
    shots = {shot.index: shot for part in parts for shot in part}
    assert sorted(shots) == list(range(len(requests)))
    paint = sweep.painter(model, 6)
    ours = paint([shots[i].latent for i in range(len(requests))]).astype(int)
    alone = jaxsd.generate(model, requests).astype(int)
    assert abs(ours - alone).max() <= 1  # rounding to uint8: another batch size, other sums


def test_microbatches_mix_and_are_full(packed):
    _, requests, parts, heard = packed
    assert [len(part) for part in parts] == [6] * 6 + [4]
    assert any(len({requests[shot.index].sampler for shot in part}) > 1 for part in parts)
    calls = [[shot.calls for shot in part] for part in parts]
    assert sum(calls, []) == sorted(sum(calls, []), reverse=True)
    # 6 references: one of the ODE and one of the SDE for each guidance, 40 calls each
    assert heard[-1] == (40 + sum(map(max, calls)),) * 2
    assert [done for done, _ in heard] == np.cumsum([40, *map(max, calls)]).tolist()


def test_errors_fall_and_unlimited_samplers_have_none(packed):
    _, requests, parts, _ = packed
    for shot in (shot for part in parts for shot in part):
        request = requests[shot.index]
        if request.sampler == 'lcm':
            assert np.isnan(shot.error) and shot.target is None
        else:
            assert shot.error == pytest.approx(
                np.sqrt(np.mean((shot.latent - shot.target) ** 2)), rel=1e-5)
    errors = {(requests[s.index].sampler, requests[s.index].schedule, requests[s.index].guidance,
               requests[s.index].steps): s.error for part in parts for s in part}
    for guidance in (1.0, 3.0):
        assert errors['heun', 'karras', guidance, 4] < errors['heun', 'karras', guidance, 2]


@pytest.mark.slow
def test_a_thousand_steps_fit(tiny_model):
    request = jaxsd.Request('cat', seed=1, sampler='euler', steps=1000, **SIZE)
    shot, = next(sweep.sweep(tiny_model('sd1'), [request], batch_size=1, reference_steps=1000))
    assert shot.calls == 1000 and 0 < shot.error < 0.05
