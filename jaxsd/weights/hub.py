"""Diffusers folders on the Hugging Face Hub: only the files that are needed, kept in its cache."""

import pathlib
import re
from collections.abc import Sequence

from jaxsd.config import TEXT_ENCODERS
from jaxsd.typing import Path
from jaxsd.weights.files import PICKLES, choose

WEIGHTS = ('unet', 'vae', *TEXT_ENCODERS, 'depth_estimator', 'image_encoder', 'image_normalizer')
SMALL = ('model_index.json', 'extras.safetensors', '*scheduler/*.json', 'tokenizer*/*.json',
         'tokenizer*/*.txt', *(f'{part}/config.json' for part in WEIGHTS))


def shipped(name: Path) -> pathlib.Path | None:
    """The folder of a model that comes with jaxsd, such as 'emoji', or None."""
    package = pathlib.Path(__file__).parents[1]
    for root in (package, package.parent):  # of a wheel, and of a checkout
        if re.fullmatch(r'\w+', str(name)) and (root / 'checkpoints' / str(name)).is_dir():
            return root / 'checkpoints' / str(name)
    return None


def is_hub_id(path: Path) -> bool:
    """Whether a name that is no path has the form of a Hub id: owner/name."""
    return bool(re.fullmatch(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', str(path))
                and not str(path).endswith(('.safetensors', *PICKLES)))


def download(repo: str, half: bool = False, part: str | None = None) -> pathlib.Path:
    """A Hub id -> the folder in the cache, downloaded where the cache lacks it.

    half: prefer fp16 variants. part: only this component of a model, or the one network that a
    repository holds. Raises FileNotFoundError when the Hub cannot be reached and the cache has no
    copy, or when there is no such repository.
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
    patterns = needed(repo, files, half, part)
    return pathlib.Path(hf.snapshot_download(repo, allow_patterns=patterns))


def needed(repo: str, files: Sequence[str], half: bool = False,
           part: str | None = None) -> list[str]:
    """The patterns of the files to download, from a repository's list of files."""
    if part is None and 'model_index.json' not in files:
        raise ValueError(f'{repo!r}: not in diffusers layout, it has no model_index.json; download '
                         'its .safetensors file and give that path')
    if part is None:
        return [*SMALL, *(pattern for name in WEIGHTS
                          for pattern in _weights(repo, f'{name}/', files, half))]
    folder = next((at for at in ('', f'{part}/') if f'{at}config.json' in files), None)
    if folder is None:
        raise ValueError(f'{repo!r}: has no config.json and no {part}/config.json; download the '
                         '.safetensors file that you need and give that path')
    return [f'{folder}config.json', *_weights(repo, folder, files, half)]


def _weights(repo, folder, files, half):
    """The files of one network's weights; folder: what their names start with."""
    inside = [f.removeprefix(folder) for f in files if f.startswith(folder)]
    name = choose(inside, half)
    if name is None:
        return []
    if not name.endswith('.json'):
        return [folder + name]
    variant, end = 'fp16' in name, '.bin' if '.bin.' in name else '.safetensors'
    return [folder + name, *(folder + f for f in inside if f.endswith(end)
                             and '-of-' in f and ('fp16' in f) == variant)]
