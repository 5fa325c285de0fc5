"""The documentation's programs run as they stand."""

import re

from mains import ROOT, run_code


def test_jax_page():
    blocks = re.findall('```python\n(.*?)```', (ROOT / 'docs' / 'jax.md').read_text(), re.DOTALL)
    assert len(blocks) == 7
    run_code('\n'.join(blocks))
