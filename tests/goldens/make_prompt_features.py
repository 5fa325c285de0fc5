"""Make tests/goldens/prompt_features.npz: what A1111's and ComfyUI's own code makes of prompts.txt.

    python tests/goldens/make_prompt_features.py PATH_TO_A1111 PATH_TO_COMFYUI

A1111: modules/prompt_parser.py, extra_networks.py (its two functions that read prompts),
sd_hijack_clip.py and sd_emphasis.py of stable-diffusion-webui 1.10. ComfyUI: comfy/sd1_clip.py
(commit f7e6a5e). What they import and do not use is stubbed; the text encoders are transformers'
with the weights of tests/prompt/tiny_clip.py. Needs torch, transformers, lark.

`texts`: those that the prompts' parts have at the last step, and long ones made of them.
{reference}/{how}/{what}: `which` of them, `blocks` of each; then of all blocks one after the other
`tokens` [77] (0: a vector), `weights` [77], and by text encoder the features [8],
tiny_clip.project; `pooled` [texts,24]. Textual inversions are written as each program wants them: a
bare name, or embedding:name.
"""

import importlib.util
import pathlib
import re
import sys
import types

import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'prompt')]
import tiny_clip  # noqa: E402

CLIP = ROOT / 'jaxsd' / 'versions' / 'clip'


def load(name, path):
    """A module from its file, under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def stub(name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    return module


def text_model(cfg, seed):
    """transformers' CLIPTextModel (with projection) of tiny_clip's weights."""
    kind = (transformers.CLIPTextModelWithProjection if cfg.projection_dim
            else transformers.CLIPTextModel)
    module = kind(transformers.CLIPTextConfig(
        **tiny_clip.TINY, hidden_act=cfg.hidden_act, projection_dim=cfg.projection_dim or 512,
        eos_token_id=49407)).eval()
    arrays = {k: torch.tensor(v) for k, v in tiny_clip.weights(cfg, seed).items()}
    if not any(k.startswith('text_model.') for k in module.state_dict()):  # transformers >= 5
        arrays = {k.removeprefix('text_model.'): v for k, v in arrays.items()}
    missing, extra = module.load_state_dict(arrays, strict=False)
    assert not extra and not [k for k in missing if 'position_ids' not in k]
    return module


class Wrapped(torch.nn.Module):
    """What A1111 wraps: a text model as its code calls it."""

    def __init__(self, module, tokenizer, **settings):
        super().__init__()
        self.transformer, self.tokenizer = module, tokenizer
        vars(self).update(settings)
        if not hasattr(module, 'text_model'):  # transformers >= 5
            module.__dict__['text_model'] = module


def a1111(folder):
    """(texts of a prompt, {how: encode(text) -> chunks, {text encoder: z}, pooled})."""
    folder = pathlib.Path(folder)
    opts = types.SimpleNamespace(
        emphasis='Original', comma_padding_backtrack=20, CLIP_stop_at_last_layers=1,
        use_old_emphasis_implementation=False, textual_inversion_add_hashes_to_infotext=False,
        sdxl_clip_l_skip=False)
    modules = stub('modules', devices=types.SimpleNamespace(device='cpu'), sd_hijack=None)
    stub('modules.shared', opts=opts)
    for name in ('prompt_parser', 'extra_networks', 'sd_emphasis', 'sd_hijack_clip'):
        setattr(modules, name, load(f'modules.{name}', folder / 'modules' / f'{name}.py'))
    hijack_clip, parser = modules.sd_hijack_clip, modules.prompt_parser
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(CLIP))
    names = {name: tokenizer(name, add_special_tokens=False)['input_ids']
             for name in tiny_clip.VECTORS}

    def find(tokens, at):
        for name, ids in names.items():
            if tokens[at:at + len(ids)] == ids:
                return types.SimpleNamespace(name=name, vectors=tiny_clip.VECTORS[name]), len(ids)
        return None, None

    def hijack(module, seed):
        """With a hook that puts vectors where sd_hijack.EmbeddingsWithFixes does."""
        found = types.SimpleNamespace(
            embedding_db=types.SimpleNamespace(find_embedding_at_position=find),
            extra_generation_params={}, fixes=None)

        def fix(_, tokens, embedded):
            for row, fixes in zip(embedded, found.fixes, strict=True):
                for offset, embedding in fixes:
                    vectors = torch.tensor(tiny_clip.vectors(embedding.name, seed))
                    row[offset + 1:offset + 1 + len(vectors)] = vectors

        module.get_input_embeddings().register_forward_hook(fix)
        return found

    class BigG(hijack_clip.FrozenCLIPEmbedderWithCustomWords):
        """As FrozenOpenCLIPEmbedder2WithCustomWords, which needs open_clip."""

        def __init__(self, *args):
            super().__init__(*args)
            self.id_pad = 0

        def encode_with_transformers(self, tokens):
            out = self.wrapped.transformer(input_ids=tokens, output_hidden_states=True)
            z = out.hidden_states[-2]
            z.pooled = out.text_embeds
            return z

    kinds = {('sd15', 'text_encoder'): hijack_clip.FrozenCLIPEmbedderWithCustomWords,
             ('sdxl', 'text_encoder'): hijack_clip.FrozenCLIPEmbedderForSDXLWithCustomWords,
             ('sdxl', 'text_encoder_2'): BigG}
    encoders = {}
    for (family, name), kind in kinds.items():
        cfg, seed = tiny_clip.FAMILIES[family][name]
        module = text_model(cfg, seed)
        wrapped = Wrapped(module, tokenizer, layer='hidden', layer_idx=-2,
                          return_pooled=name == 'text_encoder_2')
        encoders[family, name] = kind(wrapped, hijack(module, seed))

    def texts(prompt):
        prompt, _ = modules.extra_networks.parse_prompt(prompt)
        _, parts, _ = parser.get_multicond_prompt_list([prompt])
        return [schedule[-1][1] for schedule in
                parser.get_learned_conditioning_prompt_schedules(parts, tiny_clip.STEPS)]

    def how(family, **settings):
        def encode(text):
            text = bare(text)
            vars(opts).update(emphasis='Original', comma_padding_backtrack=20,
                              CLIP_stop_at_last_layers=1)
            vars(opts).update(settings)
            zs, pooled = {}, None
            for name in tiny_clip.FAMILIES[family]:
                encoder = encoders[family, name]
                z = encoder([text])
                if name == 'text_encoder_2':
                    z, pooled = z
                zs[name] = z.reshape(-1, 77, z.shape[-1])
            chunks, _ = encoder.tokenize_line(text)
            return [c.tokens for c in chunks], [c.multipliers for c in chunks], zs, pooled
        return encode

    return texts, {
        'sd15': how('sd15'), 'sdxl': how('sdxl'), 'hard': how('sd15', comma_padding_backtrack=0),
        'skip': how('sd15', CLIP_stop_at_last_layers=2), 'none': how('sd15', emphasis='None')}


def bare(text):
    """Text with the embeddings' names alone, as A1111 reads them."""
    names = '|'.join(map(re.escape, tiny_clip.VECTORS))
    return re.sub(f'embedding:({names})|<({names})>', r'\1\2', text)


def comfy(folder):
    """{how: encode(text)} by ComfyUI's tokenizers and weighting, on transformers' text models."""
    stub('comfy', ops=stub('comfy.ops'), model_management=stub(
        'comfy.model_management', get_autocast_device=lambda device: 'cpu'))
    transformers.modeling_utils.no_init_weights = None  # imported, not used
    sd1 = load('comfy.sd1_clip', pathlib.Path(folder) / 'comfy' / 'sd1_clip.py')

    names = tiny_clip.VECTORS

    class Encoder(sd1.SD1ClipModel):
        def __init__(self, module, last):
            torch.nn.Module.__init__(self)
            self.transformer = module
            self.layer, self.layer_idx = ('last', None) if last else ('hidden', -2)
            self.empty_tokens = [[49406] + [49407] * 76 if last else [49406, 49407] + [0] * 75]
            self.layer_norm_hidden_state, self.text_projection = last, None

        def forward(self, tokens):
            if self.layer == 'last':
                return super().forward(tokens)
            backup = self.transformer.get_input_embeddings()
            tokens = self.set_up_textual_embeddings(tokens, backup)
            out = self.transformer(torch.LongTensor(tokens), output_hidden_states=True)
            self.transformer.set_input_embeddings(backup)
            return out.hidden_states[self.layer_idx], out.text_embeds

    def how(family, name):
        cfg, seed = tiny_clip.FAMILIES[family][name]
        tokenizer = sd1.SD1Tokenizer(str(CLIP), pad_with_end=name == 'text_encoder',
                                     embedding_directory='vectors')
        encoder = Encoder(text_model(cfg, seed), name == 'text_encoder')

        def vectors(name, *_):
            return torch.tensor(tiny_clip.vectors(name, seed)) if name in names else None

        def encode(text):
            sd1.load_embed = vectors
            text = re.sub('|'.join(map(re.escape, names)), r'embedding:\g<0>', bare(text))
            pairs = tokenizer.tokenize_with_weights(text)
            z, pooled = encoder.encode_token_weights(pairs)
            return ([[t if isinstance(t, int) else 0 for t, _ in block] for block in pairs],
                    [[w for _, w in block] for block in pairs],
                    {name: z.reshape(-1, 77, z.shape[-1])}, pooled)
        return encode

    return {'sd15': how('sd15', 'text_encoder'), 'sdxl': how('sdxl', 'text_encoder_2')}


@torch.no_grad()
def main(a1111_folder, comfy_folder):
    texts, hows = a1111(a1111_folder)
    prompts = tiny_clip.PROMPTS.read_text(encoding='utf-8').rstrip('\n').split('\n')
    texts = [text for prompt in prompts for text in texts(prompt)]
    texts += [', '.join(texts[i:i + 6]) for i in range(170, 250, 7)]  # several blocks each
    golden = {'texts': np.array(texts)}
    hows = [('a1111', how, e) for how, e in hows.items()]
    hows += [('comfy', how, e) for how, e in comfy(comfy_folder).items()]
    for reference, how, encode in hows:
        # BREAK is a word in ComfyUI and in A1111 without emphasis, and `(embedding:` is none there;
        # '!' is how SDXL pads in diffusers' tokenizer, and ours, and a word in the others'.
        which = [i for i, t in enumerate(texts)
                 if not ('BREAK' in t and (reference == 'comfy' or how == 'none'))
                 and not ('embedding:' in t and how == 'none') and not ('!' in t and how == 'sdxl')]
        found = [encode(texts[i]) for i in which]
        at = f'{reference}/{how}/'
        golden[at + 'which'] = np.array(which, np.int16)
        golden[at + 'blocks'] = np.array([len(tokens) for tokens, *_ in found], np.int8)
        golden[at + 'tokens'] = np.concatenate([f[0] for f in found]).astype(np.uint16)
        golden[at + 'weights'] = np.concatenate([f[1] for f in found]).astype(np.float32)
        for name in found[0][2]:
            golden[at + name] = tiny_clip.project(
                np.concatenate([f[2][name] for f in found])).astype(np.float32)
        if found[0][3] is not None and reference == 'a1111':
            golden[at + 'pooled'] = np.concatenate([f[3] for f in found])
    np.savez_compressed(ROOT / 'tests' / 'goldens' / 'prompt_features.npz', **golden)


if __name__ == '__main__':
    main(*sys.argv[1:])
