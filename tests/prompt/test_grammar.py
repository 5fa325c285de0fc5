"""The prompt grammar: A1111's and ComfyUI's own readings, round trips, time, hand-made cases."""

import gzip
import json
import pathlib
import warnings

import pytest
from conftest import at_most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsd.prompt import emphasis, grammar
from jaxsd.prompt.emphasis import BREAK, Segment
from jaxsd.prompt.grammar import Alternate, Prompt, Switch, Term

TESTS = pathlib.Path(__file__).parents[1]
GOLDEN = json.loads(gzip.decompress((TESTS / 'goldens' / 'prompts.json.gz').read_bytes()))
STEPS = GOLDEN['steps']
TEXTS = [line.replace('\\n', '\n') for line
         in (TESTS / 'data' / 'prompts.txt').read_text('utf-8').split('\n')[:-1]]

pytestmark = pytest.mark.filterwarnings('ignore:prompt. left out the tags')


def _listed(parts):
    return [[part.weight, [[end, [list(segment) for segment in segments]]
                           for end, segments in part.schedule]] for part in parts]


def _segments(text, weighting='a1111', steps=STEPS):
    part, = grammar.plan(text, steps, weighting).parts
    (_, segments), = part.schedule
    return segments


def _texts(text, steps=STEPS, **options):
    """The text at each end of a schedule."""
    part, = grammar.plan(text, steps, 'none', **options).parts
    return [(end, ''.join(segment.text for segment in segments))
            for end, segments in part.schedule]


def test_prompts_of_real_shape_are_read_as_a1111_reads_them():
    """Exactly: every weight, step, text and tag."""
    assert len(TEXTS) == len(GOLDEN['prompts']) >= 200
    for text, (tags, parts, _) in zip(TEXTS, GOLDEN['prompts']):
        found = grammar.parse(text)
        assert sorted([kind, *arguments.split(':')] for _, kind, arguments in found.tags
                      ) == sorted(tags), text
        assert _listed(grammar.plan(text, STEPS).parts) == parts, text


def test_random_prompts_are_read_as_a1111_reads_them():
    for text, _, parts, _ in GOLDEN['fuzz']:
        assert _listed(grammar.plan(text, STEPS).parts) == parts, text


def test_the_dialect_of_comfyui():
    """ComfyUI has neither BREAK nor schedules nor AND: without them, exactly its weights."""
    compared = 0
    rows = [*zip(TEXTS, GOLDEN['prompts']), *((text, row) for text, *row in GOLDEN['fuzz'])]
    for text, row in rows:
        (nodes, weight), *others = grammar.parse(text).terms
        plain = not weight and not others and all(isinstance(node, str) for node in nodes)
        if plain and 'BREAK' not in text:
            assert [list(s) for s in _segments(text, 'comfy')] == (row[2] or [['', 1.0]]), text
            compared += 1
    assert compared > 600


def test_comfyui_keeps_inner_weights_and_our_breaks():
    assert _segments('((a:1.2) b:1.5)', 'comfy') == (('a', 1.2), (' b', 1.5))
    assert _segments('[a] \\(b\\)', 'comfy') == (('[a] (b)', 1.0),)
    assert _segments('(a BREAK b:1.5)', 'comfy') == (('a', 1.5), BREAK, ('b', 1.5))
    assert _texts('x [a:b:0.5]', 4) == [(2, 'x a'), (4, 'x b')]
    assert _segments('(a:inf)', 'comfy') == (('a:inf', 1.1),)


def test_brackets_are_letters_without_weighting():
    assert _segments('(a:1.3) [b] \\( BREAK c', 'none') == (
        Segment('(a:1.3) [b] \\(', 1.0), BREAK, Segment('c', 1.0))


def test_breaks_in_brackets_are_words_as_in_a1111():
    assert BREAK in _segments('a BREAK b') and BREAK not in _segments('(a BREAK b:1.3)')
    assert _segments('(a BREAK b:1.3)')[1] == ('BREAK', -1.3)


def test_what_a1111_fails_on_has_a_reading():
    assert _segments('(a:1.2.3)') == (('a:1.2.3', 1.1),)
    assert _texts('[a:b:1e999]') == [(STEPS, 'a')]
    assert _texts('[a:b:-1e999]') == [(STEPS, 'b')]


def test_schedules_next_to_stray_brackets_count():
    assert _texts('[x [a:b:4]', 8) == [(4, '[x a'), (8, '[x b')]
    assert _texts('[a:b:4]] c', 8) == [(4, 'a] c'), (8, 'b] c')]


def test_a_negative_prompt_has_schedules_only():
    assert _texts('a AND [b:2] <lora:x:1> :2', 4, negative=True) == [
        (2, 'a AND  <lora:x:1> :2'), (4, 'a AND b <lora:x:1> :2')]
    assert grammar.plan('<lora:x>', 4, negative=True).adapters == ()


@pytest.mark.parametrize('tag, adapter', [
    ('<lora:a>', ('a', 1, 1)), ('<lora:a:0.8>', ('a', 0.8, 0.8)), ('<lyco:b:-.5>', ('b', -.5, -.5)),
    ('<lora:a:0.8:0.5>', ('a', 0.5, 0.8)), ('<lora:a:te=0.3:unet=0.7>', ('a', 0.7, 0.3)),
    ('<lora:a:unet=0.7>', ('a', 0.7, 1)), ('<lora:a:0.2:unet=1>', ('a', 1, 0.2))])
def test_tags_name_adapters(tag, adapter):
    found = grammar.plan(f'cat{tag}, dog{tag}', 4)
    assert found.adapters == (adapter, adapter)
    assert found.parts[0].schedule == ((4, (Segment('cat, dog', 1.0),)),)


@pytest.mark.parametrize('tag, message', [
    ('<lora::0.5>', 'names no adapter'), ('<lora:te=1>', 'names no adapter'),
    ('<lora:a:much>', "expected <lora:name:weight> with a number such as 0.8, found 'much'"),
    ('<lyco:a:nan>', "found 'nan'"), ('<lora:a:unet=>', "found ''")])
def test_bad_tags_are_named(tag, message):
    with pytest.raises(ValueError, match=message) as caught:
        grammar.plan(f'a {tag}', 4)
    assert tag in str(caught.value) and '\n' not in str(caught.value)


def test_other_tags_warn():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert _texts('a<hypernet:h:1>') == [(STEPS, 'a')]
    assert 'left out the tags of kind hypernet' in str(caught[0].message)


def test_the_tree():
    assert grammar.parse('(a) <lora:x>[[b|c]::3] AND d : 2') == Prompt(
        ((4, 'lora', 'x'),),
        (Term(('(a) ', Switch((Alternate((('b',), ('c',))),), (), '3')), ' '),
         Term((' d',), ' : 2')))


PIECES = [*'[[]](())::||\\<> \n', 'a', 'cat, ', '0.5', ':1.2)', ':4]', ':.5]', '|b]', '[c:d:',
          ' BREAK ', ' AND ', '<lora:a:0.5>', '<lora:', '🐱', '👩‍🚀', 'é', '山', '\0']
CHARACTERS = st.characters(exclude_categories=['Cs'])
PROMPTS = st.lists(st.one_of(st.sampled_from(PIECES), CHARACTERS), max_size=20).map(''.join)


# 1,000 examples of ten prompts each: hypothesis' own time is by the example.
@pytest.mark.slow
@settings(max_examples=1000, deadline=None, database=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
@given(st.lists(PROMPTS, min_size=10, max_size=10))
def test_any_text_is_a_prompt_and_its_tree_goes_round(texts):
    for text in texts:
        tree = grammar.parse(text)
        assert grammar.write(tree) == text and grammar.parse(grammar.write(tree)) == tree
        try:
            found = grammar.plan(text, 3, ('a1111', 'comfy')[len(text) % 2])
        except ValueError as error:
            assert '<l' in str(error)  # an adapter's tag
            continue
        for part in found.parts:
            ends = [end for end, _ in part.schedule]
            assert ends == sorted(set(ends)) and ends[-1] == 3
            assert all(segments for _, segments in part.schedule)


N = grammar.LONGEST - 10
LONG = {
    'round': '(' * N, 'closing': ')' * N, 'nested': '(' * (N // 2) + ')' * (N // 2),
    'weights': '(a' * (N // 7) + ':1.1)' * (N // 7), 'mixed': '[|:' * (N // 3),
    'sorted': '[' * (N // 3) + '|' * (N // 3) + ':' * (N // 3), 'crossing': '([)]' * (N // 4),
    'alternates': '[a|' * (N // 4) + ']' * (N // 4), 'deep': '[' * (N // 4) + ':1]' * (N // 4),
    'schedules': '[a:b:0.5]' * (N // 9), 'digits': '[:' + '1' * N, 'spaces': 'a:' + ' ' * N + 'b',
    'breaks': (' ' * 30 + 'BREAK') * (N // 35), 'tags': '<a:' * (N // 3), 'escapes': '\\' * N,
    'letters': 'a' * N, 'only spaces': ' ' * N,
    'commas': ',' * N, 'and': 'AND ' * (N // 4), 'break': 'BREAK ' * (N // 6),
    'weight of a tag': f'<lora:a:{"1" * (N - 9)}>'}


@pytest.mark.slow
@pytest.mark.parametrize('text', LONG.values(), ids=LONG)
@pytest.mark.parametrize('weighting', ['a1111', 'comfy'])
def test_no_prompt_takes_long(text, weighting):
    """The bound is 20 times what one slow core was measured to take: Earley's algorithm, or one
    quadratic step in Python, takes longer."""
    with at_most(6):
        assert grammar.write(grammar.parse(text)) == text
        grammar.plan(text, 20, weighting)


@pytest.mark.parametrize('piece', ['a', ' ', '(', '[|', ']', 'AND ', '<lora:a:1>', ':1'])
@pytest.mark.parametrize('how', [*emphasis.READERS, 'plain'])
def test_a_prompt_has_a_greatest_length(piece, how):
    for negative in (True, False):
        with pytest.raises(ValueError, match='prompt: 1000000 characters: expected at most 32768'):
            grammar.plan((piece * 10**6)[:10**6], 20, how, negative)


def test_a_long_prompt_changes_at_few_steps():
    grammar.plan('[a|b]' * 1000, 200)
    for text in ('[a|b]' * 5000, ' AND '.join(['[a|b] [c|d]'] * 2000)):
        with at_most(5), pytest.raises(ValueError, match='change at 10000 steps: expected a'):
            grammar.plan(text, 10_000)


def test_schedules_nest_to_a_limit():
    def nested(n):
        return '[' * n + 'a' + ':1]' * n

    assert _texts(nested(grammar.DEEPEST), 2)[1] == (2, 'a')
    assert _texts(nested(grammar.DEEPEST + 1), 2)[1] == (2, '[a:1]')


def test_plain_text_has_no_meaning():
    text = '[a:b:2] (c:1.2) AND <lora:d:1> BREAK keycap: 0'
    (part,), adapters = grammar.plan(text, 5, 'plain')
    assert part == (1.0, ((5, (Segment(text, 1.0),)),)) and not adapters
    assert grammar.plan('keycap: 0', 5).parts[0].weight == 0
