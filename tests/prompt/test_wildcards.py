"""Dynamic prompts: syntax, odds, the same choice for a seed, files, errors."""

import itertools
import random
from collections import Counter

import pytest
from conftest import at_most

from jaxsd.prompt import grammar, wildcards
from jaxsd.prompt.wildcards import expand

LISTS = {'animal': ['cat', 'dog', '3::{big|small} horse'], 'colours/warm': ['red', 'orange'],
         'colours/cold': ['blue'], 'loop': ['a __loop__'], 'empty': []}
DRAWS = 2000


def _counts(text, draws=DRAWS, lists=LISTS):
    return Counter(expand(text, seed, lists) for seed in range(draws))


def _near(count, share):
    """Within 5 standard deviations of a binomial."""
    return abs(count - DRAWS * share) <= 5 * (DRAWS * share * (1 - share)) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize('text, shares', [
    ('{a|b}', {'a': 1 / 2, 'b': 1 / 2}),
    ('{2::a|3::b}', {'a': 2 / 5, 'b': 3 / 5}),
    ('{a| .5 ::b|}', {'a': 1 / 2.5, 'b': .5 / 2.5, '': 1 / 2.5}),
    ('{a|{b|c}}', {'a': 1 / 2, 'b': 1 / 4, 'c': 1 / 4}),
    ('x {a|0::b} y', {'x a y': 1}),
    ('{2$$a|b|c}', dict.fromkeys(map(', '.join, itertools.permutations('abc', 2)), 1 / 6)),
    ('{2$$ and $$2::a|1::b}', {'a and b': 2 / 3, 'b and a': 1 / 3}),
    ('{1-2$$+$$a|b}', {'a': 1 / 4, 'b': 1 / 4, 'a+b': 1 / 4, 'b+a': 1 / 4}),
    ('{-1$$a|b}', {'a': 1 / 2, 'b': 1 / 2}), ('{2-$$$$a|b}', {'ab': 1 / 2, 'ba': 1 / 2}),
    ('{9$$a}', {'a': 1}),
    ('__animal__', {'cat': .2, 'dog': .2, 'big horse': .3, 'small horse': .3}),
    ('__colours/*__', {'red': 1 / 3, 'orange': 1 / 3, 'blue': 1 / 3}),
    ('a{__colours/cold__|__c*/warm__}', {'ablue': 1 / 2, 'ared': 1 / 4, 'aorange': 1 / 4}),
    ('{2$$-$$__colours/warm__}', {'red-orange': 1 / 2, 'orange-red': 1 / 2}),
    ('{2$$-$$__colours/cold__|3::x}', {'blue-x': 1 / 4, 'x-blue': 3 / 4}),
    ('{1$$4::__colours/warm__|2::x}', {'red': .4, 'orange': .4, 'x': .2})])
def test_odds(text, shares):
    counts = _counts(text)
    assert set(counts) == set(shares)
    assert all(_near(counts[option], share) for option, share in shares.items()), counts


@pytest.mark.parametrize('text', [
    'a photo, (b:1.2) [c|d]', '', 'snake_case_word', '{one}', '{{masterpiece}}', '{a', 'a}', 'a|b',
    '}{', r'\{a|b\}', r'{a\|b}', r'\__animal__', '{[a|b]}', '{a [x|y] b}', '____', '{$$a}'])
def test_letters(text):
    assert expand(text, 1, LISTS) == text


def test_brackets_within_choices():
    assert set(_counts('{[a|b]:c|d}', 50)) == {'[a|b]:c', 'd'}
    assert set(_counts('{[a|b}', 50)) == {'[a', 'b'}
    assert set(_counts('{a|{b}c} {d', 50)) == {'a {d', '{b}c {d'}


def test_a_seed_fixes_every_choice_and_expanding_twice_changes_nothing():
    text = r'{a|b} __animal__, {2$$x|y|z} \{c|d\} {2::[e|f]|g}'
    for seed in (0, 7, 2**64 - 1):
        once = expand(text, seed, LISTS)
        assert expand(text, seed, LISTS) == once == expand(once, seed + 1, LISTS)
    assert expand('{1-3$$a|b|c|d} {e|f|g}', 1234) == 'b, a, d f'  # of any Python version
    assert len(_counts(text, 200)) > 60  # of 96


def test_a_folder(tmp_path):
    (tmp_path / 'wild' / 'deep').mkdir(parents=True)
    (tmp_path / 'secret.txt').write_text('secret')
    (tmp_path / 'wild' / 'link.txt').symlink_to(tmp_path / 'secret.txt')
    (tmp_path / 'wild' / 'a.txt').write_bytes(
        '\ufeff# comment\r\n\r\n  café \r\n2::__deep/b__'.encode())
    (tmp_path / 'wild' / 'deep' / 'b.txt').write_text('one\ntwo\n')
    counts = _counts('__a__', 300, tmp_path / 'wild')
    assert set(counts) == {'café', 'one', 'two'} and counts['café'] < 150
    assert set(_counts('__*b__', 50, str(tmp_path / 'wild'))) == {'one', 'two'}
    for name in ('../secret', 'link', 'deep/../../secret', '../*', str(tmp_path / 'secret')):
        with pytest.raises(ValueError, match='unknown wildcard'):
            expand(f'__{name}__', 0, tmp_path / 'wild')
    (tmp_path / 'wild' / 'bad.txt').write_bytes(b'\xff\xfe')
    with pytest.raises(ValueError, match=r'bad\.txt: expected text in UTF-8'):
        expand('__bad__', 0, tmp_path / 'wild')
    with pytest.raises(FileNotFoundError, match='no such folder'):
        expand('__a__', 0, tmp_path / 'none')


@pytest.mark.parametrize('text, lists, message', [
    ('__anmal__', LISTS, "unknown wildcard 'anmal': did you mean 'animal'"),
    ('__animal__', {}, "unknown wildcard 'animal': there are none"),
    ('__animal__', ['cat'], 'expected a folder or a mapping'),
    ('__animal__', {'animal': 'cat'}, 'expected a list of strings'),
    ('__empty__', LISTS, 'found none in empty'), ('__loop__', LISTS, 'more than 10000 choices'),
    ('{0::a|0::b}', None, 'odds are all 0')])
def test_errors_are_one_clear_line(text, lists, message):
    with pytest.raises(ValueError, match=message) as caught:
        expand(text, 0, lists)
    assert '\n' not in str(caught.value)


def test_two_lines_are_letters_in_tags_and_without_wildcards():
    """Names of LoRA files have them (`my__style__v2`); A1111 without an extension has no other."""
    tag = '<lora:my__animal__v2:0.8>'
    assert expand(f'{tag} a __colours/cold__', 0, LISTS) == f'{tag} a blue'
    assert set(_counts(f'{{{tag}|__colours/cold__}}', 50)) == {tag, 'blue'}
    assert set(_counts('<lora:a__b__c:{0.5|1}>', 50)) == {'<lora:a__b__c:0.5>', '<lora:a__b__c:1>'}
    assert expand('a < b __colours/cold__ > c', 0, LISTS) == 'a < b blue > c'
    with pytest.warns(UserWarning, match='no wildcards are given'):
        assert expand('a __dunder__ {b|b}', 0) == 'a __dunder__ b'
    with pytest.warns(UserWarning, match='no wildcards are given'):
        assert expand('{2$$ and $$__a__|__a__}', 0) == '__a__ and __a__'
    assert expand(f'{tag} a_b____', 0) == f'{tag} a_b____'  # without a warning


@pytest.mark.slow
@pytest.mark.parametrize('text, lists, message', [
    ('a' * 10**6, None, 'prompt: 1000000 characters: expected at most 32768'),
    ('__a__', {'a': ['a' * 10**6]}, 'prompt: 1000000 characters'),
    ('__a__' * 6000, {'a': ['a' * 30000]}, 'make more than 32768 characters'),
    ('{2$$__a__|__a__}' * 100, {'a': ['b'] * 10**5}, 'among more than 1000000 options'),
    ('{1-9999$$' + '__a__|' * 5000 + '}', {'a': ['b'] * 10**5}, 'among more than 1000000'),
    ('__a__' * 6000, {'a': ['b'] * 10**5}, 'among more than 1000000'),
    ('{9999$$__a__}', {'a': ['b'] * 10**5}, 'among more than 1000000')])
def test_what_would_fill_memory_or_take_long_is_refused(text, lists, message):
    with at_most(10), pytest.raises(ValueError, match=message):  # measured: 1
        expand(text, 0, lists)


def test_any_text_expands():
    rng = random.Random(0)
    pieces = [*'{{}}||[]\\_a ', '$$', '2$$', '1-2$$', '::', '3::', '__x__', '__', '🐱']
    for _ in range(5000):
        text = ''.join(rng.choices(pieces, k=rng.randint(1, 20)))
        try:
            expand(text, 0, {'x': ['y', '{z|__x__}']})
        except ValueError as error:
            assert 'unknown wildcard' in str(error) or 'odds are all 0' in str(error), text


@pytest.mark.parametrize('piece', ['{', '}', '{|', '[|', '{a|b}', '{[|}', '__', '_', '\\', '{1$$',
                                   '__a', '{9999$$a|', 'a', ' ', '__x__', '<a:', '<a:_>',
                                   '{1$$ $$', '{1$$' + ' ' * 15_000 + 'x$$2::a|b}'])
def test_no_text_takes_long(piece):
    with pytest.raises(ValueError, match='characters: expected at most'):
        wildcards.expand((piece * (10**6 // len(piece) + 1))[:10**6], 0, {'a': ['b']})
    text = piece * ((grammar.LONGEST - 100) // len(piece)) + '}' * 100
    with at_most(2):  # measured: 0.1
        try:
            wildcards.expand(text, 0, {'a': ['b']})
        except ValueError as error:
            assert 'unknown wildcard' in str(error) or 'choices' in str(error)
