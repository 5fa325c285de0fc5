"""Settings that an objective cannot have are named before anything is compiled."""

import numpy as np
import pytest
from PIL import Image

from jaxsd.train import finetune
from jaxsd.train.config import recipe


@pytest.mark.slow
@pytest.mark.parametrize('objective, cached', [
    ('consistency', 'cache_texts'), ('preference', 'cache_latents')])
def test_what_an_objective_computes_itself_is_not_cached(objective, cached, tmp_path):
    for name in ('pictures', 'hints'):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / name / 'red apple.png')
    c = recipe('lora', model='emoji', out=str(tmp_path / 'run'),
               export=str(tmp_path / 'a.safetensors'), loss={'objective': objective},
               data={'sets': {'a': {'path': str(tmp_path / 'pictures'), 'caption': 'red apple',
                                    'hints': str(tmp_path / 'hints')}},
                     'resolution': (64,), 'buckets': False, 'cache': str(tmp_path / 'cache'),
                     cached: True})
    with pytest.raises(ValueError, match=rf"data\.{cached}: loss\.objective='{objective}'"):
        finetune.fine_tune(c)
