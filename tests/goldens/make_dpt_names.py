"""Make tests/goldens/dpt_names.json: where transformers puts each tensor of a MiDaS file.

    python tests/goldens/make_dpt_names.py PATH_TO_SCRIPT

The script is src/transformers/models/dpt/convert_dpt_hybrid_to_pytorch.py of transformers 4.44.2
(https://github.com/huggingface/transformers), which later versions lack. Its own functions rename
the tensors of the released depth model's file, whose names stand in for the data; of what is fused,
each row says which third it is of. Needs torch and transformers. The golden is the hash of lines
'folder name <- name in the file', with the third where there is one; tests/weights/test_parts.py
makes the same lines from jaxsd's table.
"""

import gzip
import hashlib
import json
import pathlib
import runpy
import sys
import types

import numpy as np

HERE = pathlib.Path(__file__).parent
PREFIX = 'depth_model.model.'


def main(script):
    theirs = runpy.run_path(script)
    manifests = json.loads(gzip.decompress(
        (HERE.parent / 'data' / 'manifests' / 'singlefile.json.gz').read_bytes()))
    state = {}
    for name, shape in manifests['sd2_depth'].items():
        if name.startswith(PREFIX):
            rows = [f'{name} {third}' for third in 'qkv'] if '.qkv.' in name else [name]
            filled = np.repeat(rows, shape[0] // len(rows))
            state[name.removeprefix(PREFIX)] = filled.reshape(-1, *[1] * (len(shape) - 1))
    theirs['remove_ignore_keys_'](state)
    state = {theirs['rename_key'](name): rows for name, rows in state.items()}
    theirs['read_in_q_k_v'](state, types.SimpleNamespace(num_hidden_layers=12, hidden_size=768))
    lines = []
    for name, rows in sorted(state.items()):
        source, = np.unique(rows)  # all rows are of one tensor, or of one third of it
        lines.append(f'{name} <- {source}')
    digest = hashlib.sha256('\n'.join(lines).encode()).hexdigest()
    (HERE / 'dpt_names.json').write_text(
        json.dumps({'tensors': len(lines), 'sha256': digest}) + '\n')


if __name__ == '__main__':
    main(sys.argv[1])
