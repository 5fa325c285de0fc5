"""Encoded prompts against compel, and clip skip against diffusers, on tiny text encoders."""

import pathlib
import sys

import diffusers
import numpy as np
import pytest
import torch
import transformers
from compel import EmbeddingsProvider
from compel.embeddings_provider import SplitLongTextMode

from jaxsd.config_files import VERSIONS
from jaxsd.prompt import grammar
from jaxsd.prompt.emphasis import BREAK

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'prompt'))
import tiny_clip  # noqa: E402
from test_blocks import GOLDEN, TOKENIZERS, encoder, read  # noqa: E402

pytestmark = pytest.mark.parity


def text_model(family, name):
    """transformers' module with the weights of tiny_clip."""
    cfg, seed = tiny_clip.FAMILIES[family][name]
    kind = (transformers.CLIPTextModelWithProjection if cfg.projection_dim
            else transformers.CLIPTextModel)
    module = kind(transformers.CLIPTextConfig(
        **tiny_clip.TINY, hidden_act=cfg.hidden_act, projection_dim=cfg.projection_dim or 512,
        eos_token_id=49407)).eval()
    names = {key.removeprefix('text_model.'): key for key in module.state_dict()}
    module.load_state_dict({names[key.removeprefix('text_model.')]: torch.tensor(array)
                            for key, array in tiny_clip.weights(cfg, seed).items()}, strict=False)
    if not hasattr(module, 'text_model'):  # transformers >= 5; diffusers' clip_skip asks for it
        vars(module)['text_model'] = module
    return module


def close(ours, theirs, tolerance=1e-5):
    """Maximal difference in units of the features' deviation."""
    theirs = np.asarray(theirs)
    error = np.abs(ours - theirs).max() / theirs.std()
    assert ours.shape == theirs.shape and error <= tolerance, error
    return error


def tokenizer():
    return transformers.CLIPTokenizer.from_pretrained(str(VERSIONS / 'clip'), model_max_length=77)


def test_compel():
    """compel's hard cut (BRUTAL); it knows no BREAK, and fails on a light segment of no tokens."""
    provider = EmbeddingsProvider(
        tokenizer(), text_model('sd15', 'text_encoder'), truncate=False,
        split_long_text_mode=SplitLongTextMode.BRUTAL)
    texts = [grammar.plan(str(text), tiny_clip.STEPS, 'compel', negative=True).parts[0]
             .schedule[-1][1] for text in GOLDEN['texts']]
    ids = TOKENIZERS['text_encoder'].ids
    texts = [[s for s in text if ids(s.text)] for text in texts
             if BREAK not in text and not any('embedding:' in s.text for s in text)]
    light = [any(s.weight < 1 for s in text) for text in texts]
    assert len(texts) > 230 and sum(light) > 30
    rows, _ = read([[text] for text in texts], 'compel', 'hard')
    found = encoder('sd15')(rows).context
    worst = 0
    for text, ours in zip(texts, found):
        with torch.no_grad():
            theirs = provider.get_embeddings_for_weighted_prompt_fragments(
                [[s.text for s in text] or ['']],
                [[s.weight for s in text] or [1.0]])[0]
        worst = max(worst, close(ours[0, :len(theirs)], theirs))
    print(worst)


@pytest.mark.parametrize('skip', [0, 1])
def test_clip_skip_is_that_of_diffusers(skip):
    prompt = 'a photo of a cat'
    rows, _ = read([[prompt]] * 2)
    pipe = diffusers.StableDiffusionPipeline(
        None, text_model('sd15', 'text_encoder'), tokenizer(), None, None, None, None,
        requires_safety_checker=False)
    ours = encoder('sd15')(rows, None, None, np.array([skip, 2], np.int32)).context
    theirs, _ = pipe.encode_prompt(prompt, 'cpu', 1, False, clip_skip=skip or None)
    close(ours[0], theirs.detach())
    rows, _ = read([[prompt]] * 2, family='sdxl')
    bigg = tokenizer()
    bigg.pad_token = '!'
    pipe = diffusers.StableDiffusionXLPipeline(
        None, text_model('sdxl', 'text_encoder'), text_model('sdxl', 'text_encoder_2'),
        tokenizer(), bigg, None, None, add_watermarker=False)
    found = encoder('sdxl')(rows, np.zeros((2, 1, 6), np.float32), None,
                            np.array([skip, 1 - skip], np.int32))
    theirs, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False,
                                              device='cpu', clip_skip=skip or None)
    close(found.context[0], theirs.detach())
    close(found.added[0, :, :24], pooled.detach())
