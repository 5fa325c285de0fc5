"""torch's files read as torch reads them, and attacks refused in one line with nothing run."""

import copyreg
import io
import pathlib
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from jaxsd.weights.files import open_tensors
from jaxsd.weights.pickles import PickleFile

HERE = pathlib.Path(__file__).parent
GOLDENS = np.load(HERE.parent / 'goldens' / 'pickles.npz')
FORMATS = ('zip', 'old')


@pytest.mark.parametrize('kind', FORMATS)
def test_equal_to_what_torch_wrote(kind, tmp_path):
    (tmp_path / 'a.ckpt').write_bytes(GOLDENS[kind].tobytes())
    file = open_tensors(tmp_path / 'a.ckpt')
    expected = {name: GOLDENS[name] for name in GOLDENS.files if name not in FORMATS}
    assert file.shapes == {name: a.shape for name, a in expected.items()}
    assert file.metadata == {'epoch': '0', 'pytorch-lightning_version': '1.4.2'}
    for name, array in expected.items():
        found = file.read(name)
        assert found.shape == array.shape and found.dtype == file.dtypes[name]
        np.testing.assert_array_equal(found.astype(np.float32), array)
        if len(array) if array.ndim else 0:
            np.testing.assert_array_equal(file.read(name, rows=(len(array) - 1, 1)), found[-1:])
    dtypes = {str(dtype) for dtype in file.dtypes.values()}
    assert {'float8_e4m3fn', 'float8_e5m2', 'bfloat16', 'float16', 'int64', 'bool'} < dtypes


STORAGE = b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu'


def packed(code, kind='zip', data=bytes(64), method=zipfile.ZIP_STORED, extra=()):
    """A file of torch.save around a pickle; its one storage has the key '0'."""
    if kind == 'plain':
        return code
    if kind == 'old':
        head = (0x1950a86a20f9469cfc6c, 1001, {'little_endian': True})
        numbers = struct.pack('<q', len(data) // 4)
        return b''.join(pickle.dumps(part, 2) for part in head) + code + pickle.dumps(
            ['0'], 2) + numbers + data
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', method) as archive:
        for name, content in {'a/data.pkl': code, 'a/byteorder': b'little', 'a/data/0': data,
                              **dict(extra)}.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tensor(size=16, offset=0, shape=(4, 4), strides=(4, 1), call=b'_rebuild_tensor_v2'):
    """The pickle of {'a': tensor}."""
    def numbers(values):
        return b'(' + b''.join(b'L%dL\n' % value for value in values) + b't'
    return (b'\x80\x02}X\x01\x00\x00\x00actorch._utils\n' + call + b'\n(' + STORAGE
            + b'L%dL\ntQ' % size + b'L%dL\n' % offset + numbers(shape) + numbers(strides)
            + b'\x89ccollections\nOrderedDict\n)RtRs.')


def refused(path, data, kind=ValueError):
    """The message, after checks that it was little work and that it is one line."""
    path.write_bytes(data)
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_REAL, 10)  # its default action ends the process
    try:
        with pytest.raises(kind) as caught:
            file = open_tensors(path)
            for name in file.shapes:
                file.read(name)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    message = str(caught.value)
    assert '\n' not in message and str(path) in message and len(message) < 3000
    assert peak < 2 * len(data) + 2_000_000
    return message


def call(name):
    """A pickle that calls `name` with the command that makes the canary."""
    module, _, attribute = name.rpartition('.')
    return f"c{module}\n{attribute}\n(S'touch CANARY'\ntR.".encode()


def hidden(name, argument=b"X\x0c\x00\x00\x00touch CANARY"):
    """The same by STACK_GLOBAL: both names are data, here from the memo."""
    module, _, attribute = name.rpartition('.')
    texts = [b'X' + struct.pack('<I', len(s)) + s.encode() for s in (attribute, module)]
    return (b'\x80\x04' + texts[0] + b'\x940' + texts[1] + b'h\x00\x93' + argument + b'\x85R.')


ATTACKS = {
    'reduce': (call('posix.system'), 'posix.system'),
    'set state': (b"ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb"
                  b"S'touch CANARY'\nb.", 'os.system'),
    'state of a class': (b"ctorch\nSize\n}X\x0c\x00\x00\x00__setstate__csubprocess\nPopen\nsb.",
                         'subprocess.Popen'),
    'inst': (b"(S'touch CANARY'\nios\nsystem\n.", 'INST (os.system)'),
    'obj': (b"(cos\nsystem\nS'touch CANARY'\no.", 'os.system'),
    'obj of what is allowed': (b"(ctorch\nSize\nS'touch CANARY'\no.", 'OBJ'),
    'newobj': (b"\x80\x02cos\npopen\nS'touch CANARY'\n\x85\x81.", 'os.popen'),
    'newobj_ex': (b"\x80\x04csubprocess\nPopen\n)}\x92.", 'subprocess.Popen'),
    'stack global': (hidden('os.system'), 'os.system'),
    'path through what is allowed': (
        hidden('torch._utils._rebuild_tensor_v2.__globals__'), '_rebuild_tensor_v2.__globals__'),
    'builtins by protocol 4': (hidden('builtins.eval'), 'builtins.eval'),
    **{name: (call(name), name) for name in (
        '__builtin__.eval', 'builtins.exec', 'builtins.getattr', '__builtin__.__import__',
        'builtins.compile', 'builtins.open', 'importlib.import_module', 'runpy._run_code',
        'torch.load', 'torch.serialization.load', 'torch.hub.load', 'torch.jit.load',
        'torch._utils._rebuild_qtensor', 'torch.storage._load_from_bytes', 'pickle.loads',
        'numpy.load', 'numpy.testing._private.utils.runstring', 'functools.partial',
        'operator.attrgetter', 'pytorch_lightning.utilities.load', 'webbrowser.open')},
    'object array': (b'cnumpy.core.multiarray\n_reconstruct\n'
                     b"(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\ntcnumpy\ndtype\n(S'O8'\nI0\nI1\ntRI00\n(lcos\nsystem\natb.",
                     'numpy.core.multiarray._reconstruct'),
    'nested in a persistent id': (b'\x80\x02S' + repr(call('os.system'))[1:].encode() + b'\nQ.',
                                  'persistent id'),
    'persistent id of text': (b'Pcos\nsystem\n.', 'PERSID'),
    'ext': (b'\x80\x02\x82\xf0(S\'touch CANARY\'\ntR.', 'EXT1'),
    'calls a string': (b"S'os.system'\n(S'touch CANARY'\ntR.", 'calls what is no function'),
    'calls a storage': (b"ctorch\nFloatStorage\n(S'touch CANARY'\ntR.", 'torch.FloatStorage'),
    'hash bomb': (b'}' + b')' + b'2\x86' * 100 + b'Ns.', 'a tuple as a key'),
    'memo bomb': (b'\x80\x02Nr\xff\xff\xff\x7f0j\xff\xff\xff\x7e.', 'corrupt'),
    'long string': (b'\x80\x04\x8d' + struct.pack('<Q', 1 << 50) + b'abc.', 'corrupt'),
    'long number': (b'\x80\x02\x8b\xff\xff\xff\x7fabc.', 'corrupt'),
    'digits': (b'L' + b'9' * 100_000 + b'L\n.', 'corrupt'),
    'empty stack': (b'R.', 'corrupt'), 'mark without its items': (b'(00000t.', 'corrupt'),
    'itself': (b'}q\x00X\x05\x00\x00\x00modelh\x00s.', 'no tensors'),
    'doubled': (b'\x80\x02' + b'}' * 1 + b'q\x00' + b''.join(
        b'}q%c(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cu' % (i, i - 1, i - 1)
        for i in range(1, 100)) + b'.', 'no tensors'),
    'nothing': (b'', 'corrupt'), 'no stop': (b'}', 'corrupt'), 'a list': (b'].', 'list'),
}


@pytest.mark.parametrize('kind', ['plain', 'zip', 'old'])
@pytest.mark.parametrize('name', ATTACKS)
def test_attacks(name, kind, tmp_path, monkeypatch):
    code, said = ATTACKS[name]
    canary = tmp_path / 'canary'
    command = str(canary).encode()
    code = code.replace(b'\x0c\x00\x00\x00touch CANARY',
                        struct.pack('<I', 6 + len(command)) + b'touch ' + command)
    code = code.replace(b'CANARY', command)
    monkeypatch.setitem(copyreg._inverted_registry, 0xf0, ('os', 'system'))
    message = refused(tmp_path / 'a.pt', packed(code, kind))
    if kind == 'zip' or said not in ('no tensors', 'list'):  # other formats are at fault earlier
        assert said in message
    if '.' in said:
        assert 'Nothing of it was run' in message
    assert not canary.exists()


def test_the_attacks_are_real(tmp_path):
    """A pickle module that runs them makes the canary."""
    for name in ('reduce', 'inst', 'obj', 'stack global'):
        canary = tmp_path / name.replace(' ', '')
        command = b'touch ' + str(canary).encode()
        code = ATTACKS[name][0].replace(b'\x0c\x00\x00\x00touch CANARY', struct.pack(
            '<I', len(command)) + command).replace(b'touch CANARY', command)
        pickle.loads(code)
        assert canary.exists(), name


@pytest.mark.parametrize('kind', FORMATS)
def test_tensors_that_cannot_be(kind, tmp_path):
    path = tmp_path / 'a.pt'
    path.write_bytes(packed(tensor(), kind, np.arange(16, dtype='<f4').tobytes()))
    np.testing.assert_array_equal(open_tensors(path).read('a'), np.arange(16.).reshape(4, 4))
    for fields in (dict(offset=-1), dict(offset=1), dict(offset=1 << 70), dict(shape=(-4, 4)),
                   dict(shape=(5, 4)), dict(shape=(1 << 40, 1 << 40)), dict(strides=(4,)),
                   dict(strides=(-4, 1)), dict(strides=(5, 1)), dict(strides=(1 << 61, 1)),
                   dict(shape=(1 << 30, 16), strides=(0, 1)), dict(shape=(1,) * 40,
                                                                   strides=(1,) * 40)):
        assert 'corrupt' in refused(path, packed(tensor(**fields), kind))
    for size in (17, 1 << 40, 1 << 61, -16):
        assert 'corrupt' in refused(path, packed(tensor(size), kind)), size
    assert 'corrupt' in refused(path, packed(tensor(), kind, bytes(60)))
    code = tensor().replace(b'\x01\x00\x00\x000', b'\x01\x00\x00\x001')
    assert {'zip': "no storage '1'", 'old': 'corrupt'}[kind] in refused(path, packed(code, kind))
    assert 'asks for' in refused(path, packed(tensor(call=b'_rebuild_sparse_tensor'), kind))


def test_zip_files_that_are_traps(tmp_path):
    path = tmp_path / 'a.pt'
    bomb = packed(tensor(1 << 24, shape=(1 << 24,), strides=(1,)), data=bytes(1 << 26),
                  method=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 17
    assert "compressed entry, 'a/data.pkl'" in refused(path, bomb)
    for name in ('../../evil', '/etc/evil', 'a/../../evil', '..\\..\\evil'):
        said = refused(path, packed(tensor(), extra={name: b'x'}))
        assert 'evil' in said and 'Nothing of it was run' in said
    assert 'data.pkl' in refused(path, packed(tensor()).replace(b'data.pkl', b'data.pkk'))
    assert 'little-endian' in refused(path, packed(tensor()).replace(b'little', b'bigbig').replace(
        struct.pack('<I', zipfile.crc32(b'little')), struct.pack('<I', zipfile.crc32(b'bigbig'))))
    for keep in (3, 5, 60, 200, 400, -30, -3):
        assert 'truncated' in refused(path, packed(tensor())[:keep]), keep
    for keep in (5, 30, 200, -3):
        assert 'truncated' in refused(path, packed(tensor(), 'old')[:keep]), keep


def test_nothing_is_imported(tmp_path):
    """What is named by a checkpoint, allowed or not, is not in sys.modules afterwards."""
    (tmp_path / 'a.ckpt').write_bytes(GOLDENS['zip'].tobytes())
    (tmp_path / 'b.ckpt').write_bytes(packed(call('antigravity.fly')))
    script = ('import sys; from jaxsd.weights.pickles import PickleFile\n'
              'PickleFile(sys.argv[1])\n'
              'try: PickleFile(sys.argv[2])\n'
              'except ValueError as error: assert "antigravity.fly" in str(error)\n'
              'print(sorted({"torch", "pytorch_lightning", "antigravity"} & sys.modules.keys()))')
    out = subprocess.run([sys.executable, '-c', script, tmp_path / 'a.ckpt', tmp_path / 'b.ckpt'],
                         check=True, capture_output=True, text=True, cwd=HERE.parents[1]).stdout
    assert out == '[]\n'


def test_missing_and_renamed(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file'):
        PickleFile(tmp_path / 'none.pt')
    with pytest.raises(FileNotFoundError, match='no such file'):
        open_tensors(tmp_path / 'none.pt')
    (tmp_path / 'a.safetensors').write_bytes(GOLDENS['old'].tobytes())
    assert 'plain' in open_tensors(tmp_path / 'a.safetensors').shapes
    # A header of 640 bytes begins with the bytes of a pickle.
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(640)
    (tmp_path / 'b.bin').write_bytes(struct.pack('<Q', 640) + header + struct.pack('<f', 2))
    assert open_tensors(tmp_path / 'b.bin').read('a') == 2


def mutated(data, rng):
    """One of the ways in which bytes go wrong."""
    data, at = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del data[at:at + rng.randrange(1, 50)]
    elif kind == 2:
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    elif kind == 3:
        start = rng.randrange(len(data))
        data[at:at] = data[start:start + rng.randrange(1, 200)]
    else:
        numbers = list(re.finditer(rb'\d+', data)) or [re.search(b'', data)]
        data[slice(*rng.choice(numbers).span())] = str(rng.choice(
            (0, -1, 7, 2 ** 31, 2 ** 63, 10 ** 40))).encode()
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize('kind', FORMATS)
def test_fuzz(kind, tmp_path):
    """Half of the 500 mutations each: an error of one line, or tensors within the file's size."""
    data, rng, read = GOLDENS[kind].tobytes(), random.Random(0), 0
    path = tmp_path / 'a.ckpt'
    signal.setitimer(signal.ITIMER_REAL, 60)
    for _ in range(250):
        path.write_bytes(mutated(data, rng))
        tracemalloc.start()
        try:
            file = open_tensors(path)
            for name in file.shapes:
                assert file.read(name).nbytes <= path.stat().st_size
            read += 1
        except ValueError as error:
            assert '\n' not in str(error)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data) + 500_000
        tracemalloc.stop()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert 0 < read < 250
