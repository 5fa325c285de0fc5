"""Names of MiDaS' hybrid DPT and of Depth Anything in their own files, from transformers' (see
names.py)."""

RULES = [
    # timm's vision transformer with its ResNet stem
    (r'^dpt\.embeddings\.backbone\.bit\.embedder\.convolution', 'stem.conv'),
    (r'^dpt\.embeddings\.backbone\.bit\.embedder\.', 'stem.'),
    (r'^dpt\.embeddings\.backbone\.bit\.encoder\.', ''),
    (r'^(stages\.\d+)\.layers', r'\1.blocks'),
    (r'^(stem|stages)', r'pretrained.model.patch_embed.backbone.\1'),
    (r'^dpt\.embeddings\.projection', 'pretrained.model.patch_embed.proj'),
    (r'^dpt\.embeddings\.position_embeddings', 'pretrained.model.pos_embed'),
    (r'^dpt\.embeddings\.', 'pretrained.model.'),
    (r'^dpt\.encoder\.layer\.', 'pretrained.model.blocks.'),
    (r'^dpt\.layernorm', 'pretrained.model.norm'),
    (r'attention\.attention\.(?:query|key|value)', 'attn.qkv'),
    (r'attention\.output\.dense', 'attn.proj'),
    (r'intermediate\.dense', 'mlp.fc1'),
    (r'output\.dense', 'mlp.fc2'),
    (r'layernorm_before', 'norm1'),
    (r'layernorm_after', 'norm2'),
    # reassembly, fusion and head; counted from 1, fusion from the finest map
    (r'^neck\.reassemble_stage\.readout_projects\.(\d+)',
     lambda m: f'pretrained.act_postprocess{int(m[1]) + 1}.0.project'),
    (r'^neck\.reassemble_stage\.layers\.(\d+)\.projection',
     lambda m: f'pretrained.act_postprocess{int(m[1]) + 1}.3'),
    (r'^neck\.reassemble_stage\.layers\.(\d+)\.resize',
     lambda m: f'pretrained.act_postprocess{int(m[1]) + 1}.4'),
    (r'^neck\.convs\.(\d+)', lambda m: f'scratch.layer{int(m[1]) + 1}_rn'),
    (r'^neck\.fusion_stage\.layers\.(\d+)', lambda m: f'scratch.refinenet{4 - int(m[1])}'),
    (r'(refinenet\d)\.projection', r'\1.out_conv'),
    (r'residual_layer(\d)\.convolution', r'resConfUnit\1.conv'),
    (r'^head\.head', 'scratch.output_conv'),
]

DEPTH_ANYTHING = [
    (r'^backbone\.embeddings\.patch_embeddings\.projection', 'pretrained.patch_embed.proj'),
    (r'^backbone\.embeddings\.position_embeddings', 'pretrained.pos_embed'),
    (r'^backbone\.embeddings\.', 'pretrained.'),
    (r'^backbone\.encoder\.layer\.', 'pretrained.blocks.'),
    (r'^backbone\.layernorm', 'pretrained.norm'),
    (r'attention\.attention\.(?:query|key|value)', 'attn.qkv'),
    (r'attention\.output\.dense', 'attn.proj'),
    (r'layer_scale(\d)\.lambda1', r'ls\1.gamma'),
    (r'^neck\.reassemble_stage\.layers\.(\d+)\.projection', r'depth_head.projects.\1'),
    (r'^neck\.reassemble_stage\.layers\.(\d+)\.resize', r'depth_head.resize_layers.\1'),
    (r'^neck\.convs\.(\d+)', lambda m: f'depth_head.scratch.layer{int(m[1]) + 1}_rn'),
    (r'^neck\.fusion_stage\.layers\.(\d+)',
     lambda m: f'depth_head.scratch.refinenet{4 - int(m[1])}'),
    (r'(refinenet\d)\.projection', r'\1.out_conv'),
    (r'residual_layer(\d)\.convolution', r'resConfUnit\1.conv'),
    (r'^head\.conv1', 'depth_head.scratch.output_conv1'),
    (r'^head\.conv(\d)', lambda m: f'depth_head.scratch.output_conv2.{2 * int(m[1]) - 4}'),
]
