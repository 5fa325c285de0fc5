"""Diffusers folders on the Hugging Face Hub: only the files that are needed, kept in its cache."""

import pathlib
import re

from jaxsd.config import TEXT_ENCODERS
from jaxsd.weights.files import PICKLES, choose

WEIGHTS = ('unet', 'vae', *TEXT_ENCODERS)
SMALL = ('model_index.json', 'extras.safetensors', 'scheduler/*.json', 'tokenizer*/*.json',
         'tokenizer*/*.txt', *(f'{part}/config.json' for part in WEIGHTS))


def is_hub_id(path):
    """Whether a name that is no path has the form of a Hub id: owner/name."""
    return bool(re.fullmatch(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', str(path))
                and not str(path).endswith(('.safetensors', *PICKLES)))


def download(repo, half=False):
    """A Hub id -> the folder in the cache, downloaded where the cache lacks it.

    half: prefer fp16 variants. Raises FileNotFoundError when the Hub cannot be reached and the
    cache has no copy, or when there is no such repository.
    """
    import huggingface_hub as hf
    from huggingface_hub import errors
    try:
        files = hf.HfApi().list_repo_files(repo)
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise FileNotFoundError(
            f'{repo!r}: no such file or folder here, and the Hugging Face Hub has no such public '
            f'repository ({type(error).__name__}); check the name, or log in with `hf auth login` '
            'if it is gated') from None
    except Exception as error:  # offline; which class it is depends on hub's HTTP library
        try:
            return pathlib.Path(hf.snapshot_download(repo, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise FileNotFoundError(
                f'{repo!r}: no such file or folder here, the Hugging Face Hub cannot be reached '
                f'({type(error).__name__}) and its cache has no copy; connect, or give a local '
                'path') from None
    return pathlib.Path(hf.snapshot_download(repo, allow_patterns=needed(repo, files, half)))


def needed(repo, files, half=False):
    """The patterns of the files to download, from a repository's list of files."""
    if 'model_index.json' not in files:
        raise ValueError(f'{repo!r}: not in diffusers layout, it has no model_index.json; download '
                         'its .safetensors file and give that path')
    patterns = list(SMALL)
    for part in WEIGHTS:
        inside = [f.split('/', 1)[1] for f in files if f.startswith(f'{part}/')]
        name = choose(inside, half)
        if name is None and any(f.endswith(PICKLES) for f in inside):
            raise ValueError(f'{repo!r}: its {part} comes only as a pickle, which can run any code '
                             'when it is opened; look for a copy with .safetensors files')
        if name is not None:
            patterns.append(f'{part}/{name}')
        if name is not None and name.endswith('.json'):
            variant = 'fp16' if 'fp16' in name else ''
            patterns += [f'{part}/{f}' for f in inside if f.endswith('.safetensors')
                         and '-of-' in f and ('fp16' in f) == bool(variant)]
    return patterns
