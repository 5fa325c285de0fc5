"""Make tests/data/manifests/ip_adapter.json.gz: names and shapes of h94's IP-Adapters.

    python tests/goldens/make_ip_adapter_names.py

The layers that turn features into tokens are built here of torch's, with the names and sizes that
https://github.com/tencent-ailab/IP-Adapter gives them (ip_adapter.py, resampler.py,
ip_adapter_faceid.py); those at the U-Net's attentions follow diffusers' list of them
(`attn_processors` of UNet2DConditionModel by the released configs); the image encoders are
transformers'. All on torch's meta device, without data. Needs torch, diffusers and transformers.

Files of these come to the bytes that are published, see tests/weights/test_ip_adapter_files.py.
"""

import gzip
import json
import pathlib

import diffusers
import torch
import transformers
from torch import nn

from jaxsd.config_files import VERSIONS

PATH = pathlib.Path(__file__).resolve().parents[1] / 'data' / 'manifests' / 'ip_adapter.json.gz'


def linear(i, o):
    return nn.Linear(i, o, bias=False)


def resampler(dim, heads, features, out, queries=None, depth=4, head=64):
    module, inner = nn.Module(), heads * head
    if queries is not None:
        module.latents = nn.Parameter(torch.empty(1, queries, dim))
    module.proj_in, module.proj_out = nn.Linear(features, dim), nn.Linear(dim, out)
    module.norm_out, module.layers = nn.LayerNorm(out), nn.ModuleList()
    for _ in range(depth):
        attention = nn.ModuleDict({
            'norm1': nn.LayerNorm(dim), 'norm2': nn.LayerNorm(dim), 'to_q': linear(dim, inner),
            'to_kv': linear(dim, 2 * inner), 'to_out': linear(inner, dim)})
        feed = nn.Sequential(nn.LayerNorm(dim), linear(dim, 4 * dim), nn.GELU(),
                             linear(4 * dim, dim))
        module.layers.append(nn.ModuleList([attention, feed]))
    return module


def base(features, context):
    return nn.ModuleDict({'proj': nn.Linear(features, 4 * context), 'norm': nn.LayerNorm(context)})


def full(features, context):
    return nn.ModuleDict({'proj': nn.Sequential(
        nn.Linear(features, features), nn.GELU(), nn.Linear(features, context),
        nn.LayerNorm(context))})


def faceid(context, tokens=4, clip=None):
    module = nn.ModuleDict({'proj': nn.Sequential(
        nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, tokens * context)),
        'norm': nn.LayerNorm(context)})
    if clip:
        module['perceiver_resampler'] = resampler(context, context // 64, clip, context)
    return module


def attentions(version, rank=0):
    """The layers at a U-Net's attentions, {number: {layer: module}}."""
    config = diffusers.UNet2DConditionModel.load_config(VERSIONS / version / 'unet')
    unet, found = diffusers.UNet2DConditionModel.from_config(config), nn.ModuleDict()
    for i, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix('.processor'))
        width, source = attention.to_q.out_features, attention.to_k.in_features
        layers = nn.ModuleDict()
        for layer, reads in (('to_q', width), ('to_k', source), ('to_v', source),
                             ('to_out', width)) if rank else ():
            layers[f'{layer}_lora'] = nn.ModuleDict({
                'down': linear(reads, rank), 'up': linear(rank, width)})
        if name.endswith('attn2.processor'):
            layers['to_k_ip'], layers['to_v_ip'] = linear(source, width), linear(source, width)
        found[str(i)] = layers
    return found


def adapter(projection, version, rank=0):
    whole = nn.ModuleDict({'image_proj': projection, 'ip_adapter': attentions(version, rank)})
    return {name: list(value.shape) for name, value in whole.state_dict().items()}


def encoder(**config):
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        patch_size=14, hidden_act='gelu', **config))
    found = {name: list(value.shape) for name, value in model.state_dict().items()}
    # A constant that transformers saved until 4.31, as the bytes of the published files show.
    return found | {'vision_model.embeddings.position_ids': [1, 257]}


def main():
    with torch.device('meta'):
        plus = resampler(768, 12, 1280, 768, 16)
        plus_xl = resampler(1280, 20, 1280, 2048, 16)
        found = {
            'ip-adapter_sd15': adapter(base(1024, 768), 'sd15'),
            'ip-adapter_sd15_light': adapter(base(1024, 768), 'sd15'),
            'ip-adapter_sd15_vit-G': adapter(base(1280, 768), 'sd15'),
            'ip-adapter-plus_sd15': adapter(plus, 'sd15'),
            'ip-adapter-plus-face_sd15': adapter(plus, 'sd15'),
            'ip-adapter-full-face_sd15': adapter(full(1280, 768), 'sd15'),
            'ip-adapter_sdxl': adapter(base(1280, 2048), 'sdxl'),
            'ip-adapter_sdxl_vit-h': adapter(base(1024, 2048), 'sdxl'),
            'ip-adapter-plus_sdxl_vit-h': adapter(plus_xl, 'sdxl'),
            'ip-adapter-plus-face_sdxl_vit-h': adapter(plus_xl, 'sdxl'),
            'ip-adapter-faceid_sd15': adapter(faceid(768), 'sd15', 128),
            'ip-adapter-faceid_sdxl': adapter(faceid(2048), 'sdxl', 128),
            'ip-adapter-faceid-portrait_sd15': adapter(faceid(768, 16), 'sd15'),
            'ip-adapter-faceid-plus_sd15': adapter(faceid(768, clip=1280), 'sd15', 128),
            'ip-adapter-faceid-plusv2_sd15': adapter(faceid(768, clip=1280), 'sd15', 128),
            'ip-adapter-faceid-plusv2_sdxl': adapter(faceid(2048, clip=1280), 'sdxl', 128),
            'models/image_encoder': encoder(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                num_attention_heads=16, projection_dim=1024),
            'sdxl_models/image_encoder': encoder(
                hidden_size=1664, intermediate_size=8192, num_hidden_layers=48,
                num_attention_heads=16, projection_dim=1280)}
    text = json.dumps(found, separators=(',', ':')).encode()
    PATH.write_bytes(gzip.compress(text, 9, mtime=0))


if __name__ == '__main__':
    main()
