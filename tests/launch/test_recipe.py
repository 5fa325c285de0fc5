"""Options on the command line."""

import pytest

from launch.recipe import options


def test_options_are_written_like_arguments():
    assert options('') == {}
    assert options('order=3, solver_type=heun') == {'order': 3, 'solver_type': 'heun'}
    assert options("interval=(0.2, 0.8), apg={'eta': 0.0}, s_churn=-1e2, table='a b'") == {
        'interval': (0.2, 0.8), 'apg': {'eta': 0.0}, 's_churn': -100.0, 'table': 'a b'}


@pytest.mark.parametrize('text', [
    'order', 'order=', '3', 'order=3 eta=1', 'a=__import__("os")', '**{}', 'a=1) + f(b=2',
    'a=1)(b=2', '*[1]', 'a=b.c', ')', 'a=1, a=2'])
def test_what_is_no_option(text):
    with pytest.raises(ValueError, match='expected names with values, for example') as error:
        options(text)
    assert '\n' not in str(error.value)
