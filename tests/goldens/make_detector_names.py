"""Make tests/data/manifests/detectors.json.gz: names and shapes of detectors' files.

    python tests/goldens/make_detector_names.py PATH_TO_DEPTH_ANYTHING_V2

By the code that reads the files: controlnet_aux 0.0.10's networks (OpenPose's body and hand files
lack the names' first part, see open_pose/util.py), and those of a clone of
DepthAnything/Depth-Anything-V2 and of transformers for the two layouts of Depth Anything 2. Needs
torch, transformers and controlnet_aux.
"""

import functools
import gzip
import json
import pathlib
import sys
import tempfile
import types

import safetensors
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
PATH = HERE.parent / 'data' / 'manifests' / 'detectors.json.gz'
sys.path.insert(0, str(HERE.parent / 'parity'))
from test_detectors_parity import annotators  # noqa: E402

SIZES = {'vits': (384, 12, 64, (48, 96, 192, 384), (2, 5, 8, 11)),
         'vitb': (768, 12, 128, (96, 192, 384, 768), (2, 5, 8, 11)),
         'vitl': (1024, 24, 256, (256, 512, 1024, 1024), (4, 11, 17, 23))}


def modules(aux):
    """(file, its module, whether its names are short)."""
    pose = aux('open_pose.model')
    norm = functools.partial(torch.nn.InstanceNorm2d, affine=False, track_running_stats=False)
    yield 'body_pose_model.pth', pose.bodypose_model(), True
    yield 'hand_pose_model.pth', pose.handpose_model(), True
    yield 'facenet.pth', aux('open_pose.face').FaceNet(), False
    yield 'ControlNetHED.pth', aux('hed').ControlNetHED_Apache2(), False
    yield 'sk_model.pth', aux('lineart').Generator(3, 1, 3), False
    yield 'netG.pth', aux('lineart_anime').UnetGenerator(3, 1, 8, 64, norm), False
    yield 'mlsd_large_512_fp32.pth', aux('mlsd.models.mbv2_mlsd_large').MobileV2_MLSD_Large(), False
    args = types.SimpleNamespace(sampling_ratio=0.4, importance_ratio=0.7, architecture='BN')
    yield 'scannet.pt', aux('normalbae.nets.NNET').NNET(args), False


def transformers_layout(width, layers, fused, neck, read):
    backbone = transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        image_size=518, patch_size=14, out_indices=[i + 1 for i in read],
        reshape_hidden_states=False)
    return transformers.DepthAnythingForDepthEstimation(transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=width,
        neck_hidden_sizes=list(neck), fusion_hidden_size=fused))


def main(clone):
    found = {}
    with annotators() as aux:
        for name, module, short in modules(aux):
            found[name] = {key.partition('.')[2] if short else key: list(value.shape)
                           for key, value in module.state_dict().items()}
        sys.modules['torchvision.transforms'].Compose = None
        sys.path.insert(0, clone)
        from depth_anything_v2.dpt import DepthAnythingV2
        for size, (width, layers, fused, neck, read) in SIZES.items():
            module = DepthAnythingV2(size, fused, list(neck))
            found[f'depth_anything_v2_{size}.pth'] = {
                key: list(value.shape) for key, value in module.state_dict().items()}
            module = transformers_layout(width, layers, fused, neck, read)
            with tempfile.TemporaryDirectory() as folder:
                module.save_pretrained(folder)
                with safetensors.safe_open(f'{folder}/model.safetensors', 'np') as file:
                    found[f'Depth-Anything-V2-{size}-hf'] = {
                        key: file.get_slice(key).get_shape() for key in sorted(file.keys())}
    PATH.write_bytes(gzip.compress(json.dumps(found).encode(), 9, mtime=0))


if __name__ == '__main__':
    main(sys.argv[1])
