"""Make tests/goldens/embedding_pictures.npz: PNG files of a textual inversion, as A1111 writes it.

    python tests/goldens/make_embedding_pictures.py IMAGE_EMBEDDING

IMAGE_EMBEDDING is modules/textual_inversion/image_embedding.py of AUTOMATIC1111's
stable-diffusion-webui 1.10; needs torch. `text` has the vectors in its text and its pixels,
`pixels` in its pixels alone; `vectors` float32 [2,768] and `name` are what its own reader finds in
both.
"""

import io
import pathlib
import runpy
import sys
import types

import numpy as np
import torch
from PIL import Image, PngImagePlugin

sys.modules['modules'] = types.ModuleType('modules')
sys.modules['modules.shared'] = types.SimpleNamespace(opts=None)
a1111 = runpy.run_path(sys.argv[1])
rng = np.random.default_rng(0)
vectors = torch.from_numpy(rng.integers(-99, 99, (2, 768)).astype(np.float32) / 128)
data = {'string_to_token': {'*': 265}, 'string_to_param': {'*': vectors}, 'name': 'my style-9',
        'step': 9, 'sd_checkpoint': None, 'sd_checkpoint_name': None}
picture = Image.fromarray(rng.integers(0, 256, (64, 2, 3), np.uint8))
made, files = a1111['insert_image_data_embed'](picture, data), {}
for kind in ('text', 'pixels'):
    info = PngImagePlugin.PngInfo()
    if kind == 'text':
        info.add_text('sd-ti-embedding', a1111['embedding_to_b64'](data))
    buffer = io.BytesIO()
    made.save(buffer, 'PNG', pnginfo=info)
    files[kind] = np.frombuffer(buffer.getvalue(), np.uint8)
    opened = Image.open(buffer)
    found = (a1111['embedding_from_b64'](opened.text['sd-ti-embedding']) if kind == 'text'
             else a1111['extract_image_data_embed'](opened))
    assert found['name'] == data['name'] and (found['string_to_param']['*'] == vectors).all()
np.savez_compressed(pathlib.Path(__file__).with_name('embedding_pictures.npz'), **files,
                    vectors=vectors.numpy(), name=data['name'])
