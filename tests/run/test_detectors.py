"""Hints that networks find, of tiny ones; tests/parity compares them with controlnet_aux."""

import numpy as np
import pytest
import tiny_detectors
from PIL import Image

import jaxsd
from jaxsd import config as configs
from jaxsd.images import openpose
from jaxsd.models import detector
from jaxsd.run import depth, detectors


@pytest.fixture(scope='module')
def photo():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), np.uint8))
    return np.asarray(coarse.resize((100, 70)))


@pytest.fixture(scope='module')
def networks():
    return {name: tiny_detectors.network(name) for name in tiny_detectors.CONFIGS}


@pytest.mark.parametrize('kind', ['softedge_hed', 'softedge_hedsafe', 'scribble_hed',
                                  'lineart_realistic', 'lineart_coarse', 'lineart_anime'])
def test_a_hint_has_the_pictures_size(kind, photo, networks):
    found = jaxsd.detect(kind, photo, networks)
    assert found.shape == photo.shape and found.dtype == np.uint8
    assert found.std() > 1 and (found == found[..., :1]).all()
    if kind == 'lineart_realistic':
        assert (found != jaxsd.detect('lineart_coarse', photo, networks)).any()
    if kind == 'softedge_hed':  # what is beyond the picture's edge is not told apart from it
        wide = jaxsd.detect(kind, np.pad(photo, ((0, 58), (0, 28), (0, 0)), 'edge'), networks)
        assert abs(wide[:70, :100].astype(int) - found).max() <= 1


def test_poses(photo, networks, monkeypatch):
    """People as they are found are drawn: bodies, or faces alone; networks see what they are for.
    """
    body = np.full((18, 2), np.nan)
    body[:2] = [[0.3, 0.3], [0.5, 0.6]]
    face = np.array([[0.8, 0.2]])

    def found(image, *see):
        return [openpose.Person(body, face=face if see[2] else np.zeros((0, 2)))]

    monkeypatch.setattr(openpose, 'people', found)
    plain, full, alone = (jaxsd.detect(kind, photo, networks.values()) for kind in (
        'openpose', 'openpose_face', 'openpose_faceonly'))
    assert plain.any() and (full != plain).any()
    assert (alone == np.where(plain == full, 0, full)).all()


def test_nobody_is_there(photo, networks):
    """Random networks find no people; a picture without any is black."""
    flat = np.full((64, 48, 3), 128, np.uint8)
    net = tiny_detectors.network('body_pose_model')
    net.params['Mconv7_stage2_L2']['bias'] -= 100.0
    assert not jaxsd.detect('openpose_full', flat, [
        net, networks['hand_pose_model'], networks['facenet']]).any()


def test_what_is_needed(photo, networks):
    assert detectors.possible(networks) == [
        'openpose', 'openpose_hand', 'openpose_face', 'openpose_faceonly', 'openpose_full',
        'softedge_hed', 'softedge_hedsafe', 'scribble_hed', 'lineart_realistic', 'lineart_coarse',
        'lineart_anime']
    fine = {'sk_model': networks['sk_model']}
    for kind, given, message in (
            ('openpose_full', {'a': networks['body_pose_model']},
             'openpose_full needs .*give hand_pose_model.pth, facenet.pth .*--detectors=PATH'),
            ('lineart_coarse', fine, 'give sk_model2.pth'), ('mlsd', fine, 'mlsd_large_512'),
            ('depth_anything_v2', (), 'depth_anything_v2_vits.pth'),
            ('canny', fine, "unknown detector 'canny'"), ('softedge', fine, 'did you mean')):
        with pytest.raises(ValueError, match=message):
            jaxsd.detect(kind, photo, given)
    with pytest.raises(ValueError, match='unknown preprocessor'):
        detectors.hint('linart', photo, networks=fine)
    with pytest.raises(ValueError, match='expected networks of load_detector'):
        jaxsd.detect('mlsd', photo, [3])
    with pytest.raises(TypeError):
        jaxsd.detect('softedge_hed', photo, networks, low=3)


def test_hints_that_need_no_network_are_as_before(photo):
    from jaxsd import images
    for kind in ('tile', 'scribble'):
        assert (detectors.hint(kind, photo, 64, 64) == images.hint(kind, photo, 64, 64)).all()


def test_sizes(networks):
    """The network's own limits, and at what size Depth Anything looks at a picture."""
    with pytest.raises(ValueError, match='a picture of 60x64: expected sides that are multiples'):
        net = networks['ControlNetHED']
        detector.apply(net.params, net.config, np.zeros((1, 64, 60, 3), np.uint8))
    config = configs.DepthAnythingConfig()
    assert depth._near((518, 518), config) == (518, 518)
    assert depth._near((1000, 500), config) == (1036, 518)
    assert depth._near((400, 600), config) == (350, 518)
