"""GGUF files: every kind of blocks, shapes that were rearranged, damaged files."""

import sys

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import flat, random_params, same, small_config

import jaxsd
from jaxsd.models.spec import spec
from jaxsd.weights.files import open_tensors
from jaxsd.weights.gguf_file import GGUFFile

KINDS = gguf.GGMLQuantizationType


def write(path, tensors, kind=KINDS.F32, rearranged=()):
    """As ComfyUI-GGUF's converter: biases and norms in float32, weights in blocks where they fit,
    some as rows of 256."""
    writer = gguf.GGUFWriter(path, 'sd1')
    writer.add_string('general.name', 'small')
    for name, array in tensors.items():
        if name in rearranged:
            writer.add_array(f'comfy.gguf.orig_shape.{name}', [int(n) for n in array.shape])
            array = array.reshape(-1, 256)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        own = kind if array.ndim > 1 and array.shape[-1] % block == 0 else KINDS.F32
        writer.add_tensor(name, gguf.quants.quantize(array, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize('name, error', [
    ('F32', 0), ('F16', 1e-3), ('BF16', 1e-2), ('Q8_0', 0.02), ('Q5_1', 0.1), ('Q5_0', 0.1),
    ('Q4_1', 0.2), ('Q4_0', 0.3)])
def test_kinds(name, error, tmp_path):
    """What comes out is gguf's own, and near what went in."""
    rng = np.random.default_rng(0)
    tensors = {'a.weight': rng.standard_normal((6, 64), np.float32),
               'b.weight': rng.standard_normal((8, 4, 4, 4), np.float32),
               'a.bias': rng.standard_normal(7, np.float32)}
    write(tmp_path / 'a.gguf', tensors, KINDS[name], rearranged=['b.weight'])
    file = open_tensors(tmp_path / 'a.gguf')
    assert isinstance(file, GGUFFile) and file.metadata['general.name'] == 'small'
    assert file.shapes == {name: array.shape for name, array in tensors.items()}
    for key, array in tensors.items():
        found = file.read(key)
        assert found.shape == array.shape and found.dtype == file.dtypes[key]
        worst = np.abs(found.astype('f4') - array).max()
        assert worst <= error * np.abs(array).max() and (not error or key == 'a.bias' or worst > 0)
        np.testing.assert_array_equal(file.read(key, rows=(1, 2)), found[2:4])


@pytest.mark.slow
def test_models(tmp_path):
    """A whole one, and a U-Net alone without the names' first part; converted, lazily too."""
    config, rng = small_config('sd15'), np.random.default_rng(0)
    model = jaxsd.Model(config, {part: random_params(rng, shapes)
                                 for part, shapes in spec(config).items()})
    jaxsd.save(model, tmp_path / 'a.safetensors', 'single-file')
    tensors = load_file(tmp_path / 'a.safetensors')
    write(tmp_path / 'a.gguf', tensors)
    found = jaxsd.load(tmp_path / 'a.gguf', config=config)
    assert same(flat(found.params), flat(model.params))
    prefix = 'model.diffusion_model.'
    alone = {name.removeprefix(prefix): array for name, array in tensors.items()
             if name.startswith(prefix)}
    write(tmp_path / 'unet.gguf', alone, KINDS.Q8_0)
    with pytest.raises(ValueError, match='unet.gguf: has no vae, text_encoder; give base='):
        jaxsd.load(tmp_path / 'unet.gguf', config=config)
    for lazy in (False, True):
        found = jaxsd.load(tmp_path / 'unet.gguf', 'float16', config=config, lazy=lazy,
                           base=tmp_path / 'a.safetensors')
        assert same(flat(found.params['vae']), flat(jaxsd.load(
            tmp_path / 'a.safetensors', 'float16').params['vae']))
        for name, array in flat(found.params['unet']).items():
            expected = flat(model.params['unet'])[name]
            assert array.dtype == 'float16'
            np.testing.assert_allclose(array, expected, atol=0.02 * np.abs(expected).max())


def test_damaged_files(tmp_path):
    """Cut anywhere and with bytes changed: one line, whatever it says."""
    rng = np.random.default_rng(0)
    write(tmp_path / 'a.gguf', {'a.weight': rng.standard_normal((6, 64), np.float32)}, KINDS.Q8_0)
    data = (tmp_path / 'a.gguf').read_bytes()
    path, failed = tmp_path / 'b.gguf', 0
    changed = [data[:n] for n in range(4, len(data), 7)]
    for _ in range(200):
        at = rng.integers(4, 300)
        changed.append(data[:at] + bytes(rng.integers(0, 256, 1, np.uint8)) + data[at + 1:])
    for content in changed:
        path.write_bytes(content)
        try:
            file = open_tensors(path)
            for name in file.shapes:
                file.read(name)
        except ValueError as error:
            failed += 1
            assert '\n' not in str(error) and 'b.gguf' in str(error)
    assert failed > len(changed) / 3


def test_kinds_that_nobody_reads(tmp_path):
    """A file says a type that its library cannot dequantise."""
    write(tmp_path / 'a.gguf', {'a.weight': np.ones((6, 64), np.float32)}, KINDS.Q8_0)
    data = (tmp_path / 'a.gguf').read_bytes()
    old, new = (int(kind).to_bytes(4, 'little') for kind in (KINDS.Q8_0, KINDS.Q8_1))
    shape = (64).to_bytes(8, 'little') + (6).to_bytes(8, 'little')
    (tmp_path / 'a.gguf').write_bytes(data.replace(shape + old, shape + new) + bytes(500))
    with pytest.raises(ValueError, match='tensors of type Q8_1, which the gguf package cannot'):
        open_tensors(tmp_path / 'a.gguf')


def test_without_the_package(tmp_path, monkeypatch):
    (tmp_path / 'a.gguf').write_bytes(b'GGUF' + bytes(20))
    monkeypatch.setitem(sys.modules, 'gguf', None)
    with pytest.raises(ImportError, match=r"pip install 'jaxsd\[gguf\]'"):
        open_tensors(tmp_path / 'a.gguf')
