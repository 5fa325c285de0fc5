"""Tokenizer: the released vocabulary, padding, long prompts, bad folders."""

import warnings

import numpy as np
import pytest
from conftest import write_tokenizer

from jaxsd.config_files import VERSIONS
from jaxsd.prompt.tokenizer import Tokenizer

CAT = [49406, 320, 1125, 539, 320, 2368, 49407]  # "a photo of a cat", in every CLIP


@pytest.mark.parametrize('folder, pad', [
    ('sd15/tokenizer', 49407), ('sd21/tokenizer', 0), ('sdxl/tokenizer_2', 0)])
def test_released_versions_pad_as_they_were_trained(folder, pad):
    tokenizer = Tokenizer.from_folder(VERSIONS / folder)
    tokens = tokenizer(['a photo of a  CAT', ''])
    assert tokens.shape == (2, 77) and tokens.dtype == np.int32
    assert tokens[0].tolist() == CAT + [pad] * 70
    assert tokens[1].tolist() == [49406, 49407] + [pad] * 75


def test_entities_and_quotes_are_read_as_written():
    tokenizer = Tokenizer.from_folder(VERSIONS / 'sd15' / 'tokenizer')
    plain, entity, curly, straight = tokenizer(['a & b', 'a &amp; b', '“cat”', '"cat"'])
    assert (plain != entity).any() and (curly != straight).any()


def test_long_prompts_warn_and_name_what_is_dropped(tokenizer_folder):
    tokenizer = Tokenizer.from_folder(tokenizer_folder)  # 16 tokens, 14 of them words
    with pytest.warns(UserWarning, match="15 tokens.*first 14; dropped: 'Dog'"):
        long, = tokenizer(['red ' * 14 + 'Dog '])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        short, = tokenizer(['red ' * 14])
    np.testing.assert_array_equal(long, short)


def test_pad_can_be_given(tokenizer_folder):
    assert Tokenizer.from_folder(tokenizer_folder, pad='!').pad_id == 0
    assert Tokenizer.from_folder(tokenizer_folder)(['cat'])[0, -1] != 0


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'vocab\.json.*download the whole folder'):
        Tokenizer.from_folder(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / 'vocab.json').write_text('{"a": ')
    with pytest.raises(ValueError, match='not a CLIP tokenizer') as caught:
        Tokenizer.from_folder(tmp_path)
    assert '\n' not in str(caught.value)
    (tmp_path / 'tokenizer_config.json').write_text('{')
    with pytest.raises(ValueError, match=r'tokenizer_config\.json: not valid JSON'):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize('text, said', [
    ('[]', 'expected an object'), ('{"model_max_length": "x"}', "model_max_length='x'"),
    ('{"model_max_length": 1}', 'a number of tokens, 3 or more'),
    ('{"added_tokens_decoder": [1]}', 'added_tokens_decoder: expected an object of tokens'),
    ('{"pad_token": 7}', 'special tokens: expected text, found 7'),
    ('{"pad_token": {"a": 1}}', 'special tokens: expected text'), ('[' * 10**5, 'not valid JSON')])
def test_wrong_settings_are_one_line(tmp_path, text, said):
    write_tokenizer(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        Tokenizer.from_folder(tmp_path)
    assert '\n' not in str(caught.value)


def test_a_folder_without_merges_is_read_from_its_tokenizer_json(tmp_path):
    write_tokenizer(tmp_path)
    whole = Tokenizer.from_folder(tmp_path)
    whole.backend.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'merges.txt').unlink()
    text = 'a red apple <|endoftext|> x'
    assert Tokenizer.from_folder(tmp_path).ids(text) == whole.ids(text)
