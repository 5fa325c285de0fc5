"""Files of torch.save, read without torch, against torch.load; and what it refuses."""

import io

import numpy as np
import pytest
import torch

from jaxsd.weights.files import open_tensors

pytestmark = pytest.mark.parity

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
          torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.uint16, torch.uint32, torch.uint64, torch.bool)


NEW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)


def tensors(seed, dtypes):
    """Tensors of all types in views of all sorts, some of which share a storage."""
    rng = np.random.default_rng(seed)
    found = {}
    for dtype in dtypes:
        base = torch.from_numpy(rng.uniform(0, 100, (6, 5, 4))).to(dtype)
        views = {'whole': base, 'turned': base.permute(2, 0, 1), 'part': base[1:, ::2, 1:3],
                 'row': base[3, 2], 'one': base[5, 4, 3], 'none': base[:0]}
        found |= {f'{str(dtype)}.{name}': view for name, view in views.items()}
    found['image'] = torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last)
    found['parameter'] = torch.nn.Parameter(torch.randn(3, 2))
    return found


@pytest.mark.parametrize('new', [True, False])
@pytest.mark.parametrize('seed', range(3))
def test_equal_to_torch_load(new, seed, tmp_path):
    path = tmp_path / 'a.ckpt'
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4))
    # torch.load itself reads these types only in the newer format.
    dtypes = [dtype for dtype in DTYPES if new or dtype not in NEW]
    content = {'step': 3, 'state_dict': tensors(seed, dtypes) | layer.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    expected = torch.load(path, weights_only=True)['state_dict']
    file = open_tensors(path)
    assert file.metadata == {'step': '3'} and file.shapes.keys() == expected.keys()
    for name, tensor in expected.items():
        found, flat = file.read(name), tensor.detach().contiguous().view(-1)
        assert found.shape == tuple(tensor.shape), name
        assert str(found.dtype) == str(tensor.dtype).split('.')[1], name
        bits = flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)
        np.testing.assert_array_equal(found.reshape(-1).view(np.uint8), bits, name)
        if tensor.ndim and len(tensor) > 3:
            np.testing.assert_array_equal(file.read(name, rows=(1, 2)).view(np.uint8),
                                          found[2:4].view(np.uint8))


def test_modules_are_refused(tmp_path):
    """A whole module is code: its class is named, not made."""
    buffer = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), buffer)
    (tmp_path / 'a.pt').write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="asks for 'torch.nn.modules.linear.Linear'"):
        open_tensors(tmp_path / 'a.pt')
