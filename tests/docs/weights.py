"""Tiny random weights, and other small files, under the names that the pages have for them."""

import dataclasses
import pathlib
import shutil
import sys

import numpy as np
import tiny_detectors
import tiny_faces
import tiny_ip_adapters
from conftest import TINY
from mains import ROOT
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file, safe_open, save_file

import jaxsd
from jaxsd.config import (
    DPTConfig,
    ImageNormalizerConfig,
    KUNetConfig,
    ScheduleConfig,
    UpscalerConfig,
    VisionConfig,
)
from jaxsd.config_files import K_SCHEDULE, VERSIONS
from jaxsd.models import shapes, spec
from jaxsd.prompt.tokenizer import Tokenizer
from jaxsd.weights import Network, save_network

sys.path.append(str(ROOT / 'tests' / 'weights'))
import adapter_files  # noqa: E402

DOUBLES = 'stabilityai/sd-x2-latent-upscaler'
EDITS, VARIES = 'timbrooks/instruct-pix2pix', 'sd2-community/stable-diffusion-2-1-unclip'
HUB = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
COMMIT = 'c0ffee' + 34 * '0'
PARAMETERS = """a red apple
Negative prompt: blurry
Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 64x64"""


def random_model(family, version):
    """A random Model of conftest's TINY with the tokenizers of a released version."""
    config, tokenizers = TINY[family], {}
    for part, place in (('text_encoder', 'tokenizer'), ('text_encoder_2', 'tokenizer_2')):
        if text := getattr(config, part):
            text = dataclasses.replace(text, vocab_size=49408, max_position_embeddings=77)
            config = config.replace(**{part: text})
            tokenizers[part] = Tokenizer.from_folder(VERSIONS / version / place)
    return jaxsd.Model(config, spec.init(0, config), tokenizers)


def unclip(model):
    """A Model with random weights of unCLIP."""
    config = model.config.replace(
        unet=dataclasses.replace(model.config.unet, class_proj_dim=16),
        image_encoder=VisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                   num_attention_heads=2, image_size=28, projection_dim=8),
        image_normalizer=ImageNormalizerConfig(8), image_noise=ScheduleConfig())
    params = spec.init(0, config)
    params['image_normalizer']['std'] += 2
    return model.replace(config=config, params=params)


def doubles(model):
    """A Model with random weights of the x2 latent upscaler."""
    config = model.config.replace(
        schedule=K_SCHEDULE, text_encoder=dataclasses.replace(model.config.text_encoder,
                                                              final_norm=False),
        unet=KUNetConfig(block_out_channels=(32, 64, 64), layers_per_block=1, attention_head_dim=16,
                         cross_attention_dim=32, time_cond_dim=160))
    return model.replace(config=config, params=spec.init(0, config))


def write(folder):
    """files/, what lies where the pages' commands run, and hub/, a cache of Hugging Face's."""
    files, model = pathlib.Path(folder) / 'files', random_model('sd1', 'sd15')
    for name in ('loras', 'embeddings', 'wildcards', 'pictures'):
        (files / name).mkdir(parents=True)
    single = files / 'model.safetensors'
    jaxsd.save(model, single, layout='single-file')
    shutil.copy(single, files / 'other.safetensors')  # to merge with
    save_network(Network(model.config.vae, model.params['vae']), files / 'vae')
    jaxsd.save(random_model('sdxl', 'sdxl'), files / 'sdxl.safetensors', layout='single-file')
    eight = model.config.replace(unet=dataclasses.replace(model.config.unet, in_channels=8))
    edits = model.replace(config=eight, params=spec.init(0, eight))
    varies = unclip(random_model('sd2', 'sd21'))
    for name, some in ((HUB, model), (EDITS, edits), (VARIES, varies), (DOUBLES, doubles(model))):
        home = pathlib.Path(folder) / 'hub' / f'models--{name.replace("/", "--")}'
        jaxsd.save(some, home / 'snapshots' / COMMIT)
        (home / 'refs').mkdir()
        (home / 'refs' / 'main').write_text(COMMIT)

    tensors, header = load_file(single), safe_open(single, 'np').metadata()
    save_file({name: array for name, array in tensors.items()
               if not name.startswith('first_stage_model')}, files / 'no_vae.safetensors', header)
    save_file(tensors | {'model.extra': np.zeros(3, 'f4')}, files / 'extra.safetensors', header)
    small = UpscalerConfig(kind='rrdb', scale=2, ups=1, channels=8, growth=4, blocks=(1,))
    rng = np.random.default_rng(0)
    save_file({name: (0.1 * rng.standard_normal(shape)).astype('f4') for name, shape in
               spec.names(small).items()}, files / 'RealESRGAN_x4plus.pth')
    (files / 'annotators').mkdir()
    for name in ('ControlNetHED', 'sk_model', 'facenet'):
        save_file(tiny_detectors.tensors(name), files / 'annotators' / f'{name}.pth')
    save_file(tiny_detectors.blind(), files / 'annotators' / 'body_pose_model.pth')
    tiny_faces.write(files / 'GFPGANv1.4.pth')
    tiny_faces.write(files / 'codeformer.pth', tiny_faces.FORMER)
    (files / 'evil.ckpt').write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    lora = adapter_files.file(model.config, adapter_files.kohya, adapter_files.KOHYA,
                              adapter_files.lora, adapter_files.attentions(model.config))
    for name in ('watercolour.safetensors', 'ink.safetensors'):
        save_file(lora, files / 'loras' / name)
    save_file({'emb_params': np.ones((2, model.config.text_encoder.hidden_size), 'f4')},
              files / 'embeddings' / 'easynegative.safetensors')
    depth = DPTConfig(image_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=3, backbone_out_indices=(0, 1, 0, 1),
                      neck_hidden_sizes=(32, 64, 24, 20), fusion_hidden_size=16, depths=(1, 1, 1),
                      embedding_size=16, hidden_sizes=(32, 64, 96), num_groups=2)
    network = Network(depth, spec.init_part(np.random.default_rng(0), shapes.dpt(depth)))
    network.params['head']['head']['4']['bias'] += 1  # clear of the last ReLU
    save_network(network, files / 'depth')

    looks = tiny_ip_adapters.encoder()
    save_network(looks, files / 'image_encoder')
    for name, kind, family in (('ip-adapter-plus_sd15', 'plus', 'sd1'),
                               ('ip-adapter_sdxl_vit-h', 'base', 'sdxl')):
        tiny_ip_adapters.adapters(TINY[family].unet, files, looks, **{name: kind})

    (files / 'wildcards' / 'colour.txt').write_text('red\ngreen\n')
    (files / 'prompts.txt').write_text('red apple\nrocket\n')
    examples = ROOT / 'docs' / 'examples'
    Image.open(examples / 'apple.png').save(files / 'photo.jpg')
    shutil.copy(examples / 'mask.png', files / 'mask.png')
    shutil.copy(examples / 'apple.png', files / 'pictures' / '0.png')
    (files / 'pictures' / '0.txt').write_text('red apple\n')
    text = PngImagePlugin.PngInfo()
    text.add_text('parameters', PARAMETERS)
    Image.new('RGB', (64, 64)).save(files / 'picture.png', pnginfo=text)
