"""What ids are made of."""

import jax
import pytest

import jaxsd
from jaxsd.batch import identity
from jaxsd.sampling import plugins


@pytest.mark.parametrize('kept', [True, False])
def test_the_code_that_makes_pictures(tmp_path, monkeypatch, kept):
    """Comments and docstrings do not count; what was found is kept for the next start, where
    programs are, until a file changes."""
    monkeypatch.setattr(jaxsd, '__file__', str(tmp_path / 'jaxsd' / '__init__.py'))
    taken_apart, stripped = [], plugins.stripped
    monkeypatch.setattr(plugins, 'stripped',
                        lambda text: taken_apart.append(text) or stripped(text))
    (tmp_path / 'jaxsd' / 'models').mkdir(parents=True)
    files = [tmp_path / 'jaxsd' / name for name in ('config.py', 'models/unet.py')]
    monkeypatch.setattr(identity, 'ROOMS', ('config.py', 'models'))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'programs') if kept else None)
    try:
        def found(text):
            taken_apart.clear()
            for file in files:
                file.write_text(text)
            return identity.numerics.__wrapped__(), len(taken_apart)

        first, times = found('x = 1\n')
        assert times == 2 and len(first) == 16
        assert found('x = 1\n') == (first, 0 if kept else 2)
        assert found('"""A docstring."""\nx = 1  # and a comment\n') == (first, 2)
        other, times = found('x = 2\n')
        assert other != first and times == 2
        assert found('x = 1\n') == (first, 2)  # the newest alone is kept
        if kept:
            for nonsense in ('[1]', '{', '{"files": 1}', ''):
                (tmp_path / 'programs' / 'code.json').write_text(nonsense)
                assert found('x = 1\n') == (first, 2)
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
