"""Make tests/goldens/faces.npz: faces cut out and pasted back by facexlib.

    python tests/goldens/make_faces.py FACE_RESTORATION_HELPER

FACE_RESTORATION_HELPER is facexlib/utils/face_restoration_helper.py of xinntao/facexlib 0.3.0;
needs torch and OpenCV. `picture` uint8 [H,W,3] RGB has faces at `points` [N,5,2], one turned, one
with a corner outside, one point of which is wrong; `ways` [N,2,3] and `faces` [N,32,32,3] are what
it cuts out, `pasted` the picture with these faces' negatives.
"""

import pathlib
import runpy
import sys
from unittest import mock

import numpy as np

for name in ('facexlib', 'facexlib.detection', 'facexlib.parsing', 'facexlib.utils',
             'facexlib.utils.misc', 'torchvision', 'torchvision.transforms',
             'torchvision.transforms.functional'):
    sys.modules[name] = mock.MagicMock()  # networks that find and parse faces
helper = runpy.run_path(sys.argv[1])['FaceRestoreHelper'](1, 32)

rng = np.random.default_rng(0)
picture = np.kron(rng.integers(0, 256, (12, 15, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
points = []
for scale, turn, at in ((1.3, 0.3, (30, 20)), (0.9, -0.1, (91, 70))):
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points.append((helper.face_template - 16) @ turned.T * scale + at + rng.normal(0, 0.3, (5, 2)))
points[1][4] += 6
helper.read_image(picture[..., ::-1].copy())
helper.all_landmarks_5 = points
helper.align_warp_face()
for face in helper.cropped_faces:
    helper.add_restored_face(255 - face)
helper.get_inverse_affine()
pasted = helper.paste_faces_to_input_image()
np.savez_compressed(
    pathlib.Path(__file__).with_name('faces.npz'), picture=picture, points=points,
    ways=helper.affine_matrices, faces=np.stack(helper.cropped_faces)[..., ::-1],
    pasted=pasted[..., ::-1])
