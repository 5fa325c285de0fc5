"""Faces restored by a tiny GFPGAN; tests/parity compares networks, tests/images what is pasted."""

import jax
import numpy as np
import pytest
import tiny_detectors
from mains import run_main
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_faces import FORMER, POINTS, SMALL, seen, write

import jaxsd
from jaxsd.images import faces
from jaxsd.models import gfpgan


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    return jaxsd.load_face_restorer(write(tmp_path_factory.mktemp('a') / 'GFPGANv1.4.safetensors'))


@pytest.fixture(scope='module')
def detectors():
    return [tiny_detectors.network(name) for name in ('body_pose_model', 'facenet')]


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    return np.asarray(Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((90, 60)))


def test_restored(network, detectors, photo, monkeypatch):
    """What the network makes of the aligned face, in its place; by halves at half visibility."""
    seen(monkeypatch, POINTS)
    found = jaxsd.restore_faces(network, photo, detectors)
    assert found.shape == photo.shape and found.dtype == np.uint8
    way = faces.alignment(POINTS, 32)
    face = faces.cut(photo, way, 32)
    raw = jax.jit(gfpgan.apply, static_argnums=1)(
        network.params, SMALL, face[None].astype('f4') / 127.5 - 1)[0]
    restored = np.round(np.clip((np.asarray(raw) + 1) * 127.5, 0, 255)).astype(np.uint8)
    assert restored.std() > 5
    assert abs(found - faces.paste(photo.astype(float), restored, way)).max() < 1.01
    assert (found[:, :20] == photo[:, :20]).all() and (found != photo).any(-1).sum() > 50
    half = jaxsd.restore_faces(network, photo, dict(enumerate(detectors)), 0.5)
    assert abs(half - (photo.astype(float) + found) / 2).max() <= 1
    assert (jaxsd.restore_faces(network, photo, detectors, 0) == photo).all()


def test_codeformer(network, detectors, photo, monkeypatch, tmp_path):
    """Its weight is data, half where nobody said; GFPGAN takes none."""
    former = jaxsd.load_face_restorer(write(tmp_path / 'codeformer.safetensors', FORMER))
    assert former.config == FORMER and FORMER.size == 32
    seen(monkeypatch, POINTS)
    found = [jaxsd.restore_faces(former, photo, detectors, 1, weight)
             for weight in (0, 0.5, 1, None)]
    assert (found[1] == found[3]).all() and (found[0] != photo).any()
    assert all((a != b).any() for a, b in zip(found, found[1:]))
    for net, weight, message in ((former, 1.1, 'fidelity_weight'), (
            network, 0.5, 'fidelity_weight=0.5 is for CodeFormer, and this is GFPGAN')):
        with pytest.raises(ValueError, match=message):
            jaxsd.restore_faces(net, photo, detectors, 1, weight)


def test_one_face_after_the_other(network, detectors, photo, monkeypatch):
    """Each is cut from the picture as it was; without any it stays."""
    pairs = POINTS, POINTS - (25, 5)
    seen(monkeypatch, *pairs)
    both = jaxsd.restore_faces(network, photo, detectors)
    assert (both != photo)[20:30, 20:30].any() and (both != photo)[25:35, 45:55].any()
    seen(monkeypatch)
    assert (jaxsd.restore_faces(network, photo, detectors) == photo).all()


def test_what_is_needed(network, detectors, photo):
    with pytest.raises(ValueError, match='openpose_face needs .*give facenet.pth .*--detectors'):
        jaxsd.restore_faces(network, photo, detectors[:1])
    with pytest.raises(ValueError, match='expected a network of load_face_restorer, found'):
        jaxsd.restore_faces(detectors[0], photo, detectors)
    for value in (-1, 1.5, float('nan'), 'a'):
        with pytest.raises(ValueError, match='visibility'):
            jaxsd.restore_faces(network, photo, detectors, value)
    with pytest.raises(ValueError, match=r'faces of \(16, 32, 3\): expected 32x32'):
        gfpgan.apply(network.params, SMALL, np.zeros((1, 16, 32, 3)))


def test_files(network, tmp_path):
    """Read strictly; other files are named."""
    assert network.config == SMALL and SMALL.size == 32
    path = write(tmp_path / 'a.safetensors')
    tensors = load_file(path)
    former = write(tmp_path / 'b.safetensors', FORMER)
    with pytest.raises(ValueError, match='in float16: expected'):
        jaxsd.load_face_restorer(former, 'float16')
    with pytest.raises(ValueError, match='it is a face restorer; read it with'):
        jaxsd.load_upscaler(former)
    half = jaxsd.load_face_restorer(path, 'bfloat16')
    assert {a.dtype.name for a in jax.tree.leaves(half.params)} == {'bfloat16'}
    with pytest.raises(ValueError, match='in float16: expected float32 or bfloat16'):
        jaxsd.load_face_restorer(path, 'float16')
    for load in (jaxsd.load_upscaler, jaxsd.load_detector):
        with pytest.raises(ValueError, match='a face restorer; read it with .*load_face_restorer'):
            load(path)
    with pytest.raises(ValueError, match='is a face restorer, by its tensor .*load_face_restorer'):
        jaxsd.load(path)

    def refused(changed, message):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            jaxsd.load_face_restorer(path)

    last = 'params_ema.condition_shift.2.2.bias'
    refused({name: a for name, a in tensors.items() if name != last}, r'1 missing: condition_shift')
    refused(tensors | {'params_ema.extra': np.zeros(2, 'f4')}, '1 unexpected: extra')
    refused(tensors | {last: np.zeros(5, 'f4')}, '1 mis-shaped: condition_shift')
    refused({'conv_body_first.0.weight': np.zeros((4, 3, 1, 1), 'f4')},
            'not a face restorer .* v1, of CUDA operations .*expected GFPGAN v1.2, v1.3 or v1.4')
    refused({name: a for name, a in load_file(former).items() if 'generator.blocks.4' not in name},
            '8 missing: generator.blocks.4')
    refused({'quantize.embedding.weight': np.zeros((4, 3), 'f4')}, 'it is something else; expected')
    refused({'conv_hr.weight': np.zeros(1, 'f4'), 'body.0.rdb1.conv1.weight': np.zeros(1, 'f4')},
            'it is an upscaler; read it with jaxsd.load_upscaler')


def test_main(photo, tmp_path):
    """`upscale` without a network that enlarges; what is missing is said at once."""
    net = write(tmp_path / 'GFPGANv1.4.safetensors')
    (tmp_path / 'annotators').mkdir()
    save_file(tiny_detectors.blind(), tmp_path / 'annotators' / 'body.safetensors')
    face = tiny_detectors.write('facenet', tmp_path)
    Image.fromarray(photo).save(tmp_path / 'a.png')
    main = ('-m', 'launch.upscale', f'--out={tmp_path}/out')
    flags = (f'--restore_faces={net}', f'--detectors={tmp_path}/annotators')
    code, _, err = run_main(*main, *flags, f'--detectors={face}', tmp_path / 'a.png')
    assert code == 0, err
    assert (np.asarray(Image.open(tmp_path / 'out' / 'a-restored.png')) == photo).all()
    for wrong, message in (
            (flags, 'needs a network that is not there: give facenet.pth'),
            ((*flags, '--scale=2'), '--scale is for --model, which is not there: give --model='),
            ((), 'expected --model=PATH, which enlarges pictures, or --restore_faces=PATH')):
        code, _, err = run_main(*main, *wrong, tmp_path / 'a.png')
        assert code == 1 and message in err, err
