"""Files as torch.save writes them, in both of its formats, for tests that have no torch.

python tests/goldens/make_pickles.py    (torch 2.13; writes pickles.npz beside itself)

zip, old: the files' bytes; every other entry: a tensor by the name that jaxsd gives it, in float32.
The class in `callbacks` and the ParameterDict stand in released checkpoints of 1.x.
"""

import collections
import io
import pathlib
import sys
import types

import numpy as np
import torch


def checkpoint():
    """Every kind of tensor and of company that checkpoints of the field have."""
    path = ['pytorch_lightning', 'callbacks', 'model_checkpoint']
    for i in range(len(path)):
        name = '.'.join(path[:i + 1])
        module = sys.modules[name] = types.ModuleType(name)
    module.ModelCheckpoint = type('ModelCheckpoint', (), {'__module__': name})
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    tensors = collections.OrderedDict({
        'plain': base, 'transposed': base.T, 'part': base[1:5:2, 1:4], 'row': base[2],
        'scalar': torch.tensor(3.5), 'empty': torch.zeros(0, 4),
        'flags': torch.tensor([True, False]),
        'parameter': torch.nn.Parameter(torch.randn(3)),
        'nested': torch.nn.ParameterDict({'*': torch.randn(2, 3)}),
        'kernel': torch.randn(2, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        **{str(dtype).split('.')[1]: (20 * torch.rand(4)).to(dtype) for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
            torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16)}})
    return {'epoch': 0, 'global_step': np.float64(470000.0), 'pytorch-lightning_version': '1.4.2',
            'callbacks': {module.ModelCheckpoint: {'best': None, 'period': 2.5}},
            'lr_schedulers': [{'seen': {1, 2}}], 'state_dict': tensors}


def named(tensors):
    """The same by the names that jaxsd gives them."""
    return {f'{name}{inner}': tensor for name, entry in tensors.items() for inner, tensor in
            ({f'.{k}': t for k, t in entry.items()} if isinstance(entry, torch.nn.ParameterDict)
             else {'': entry}).items()}


def main():
    content = checkpoint()
    files = {}
    for name, new in (('zip', True), ('old', False)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=new)
        files[name] = np.frombuffer(buffer.getvalue(), np.uint8)
    arrays = {n: t.detach().float().numpy() for n, t in named(content['state_dict']).items()}
    np.savez_compressed(pathlib.Path(__file__).with_name('pickles.npz'), **files, **arrays)


if __name__ == '__main__':
    main()
