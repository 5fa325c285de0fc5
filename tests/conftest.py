"""Settings for CPU; tiny random models, and a browser with a gallery, shared by the tests."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import time

# The processes that the tests start are many: none of them compiles Python anew.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
sys.dont_write_bytecode = False

# Before jax starts: tests compare numbers in float32 and need no accelerator.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

# Compiling is most of the work. Three quarters of it are left out: LLVM's optimisations, and XLA's
# newer code for fusions, which make parity has; `optimised` has both. XLA aborts on flags that it
# does not know. Programs are kept, for the other processes and the next run. Where their size is
# limited JAX looks at all files for each that it writes, so the limit is here.
QUICK = {'xla_backend_optimization_level': '0'}
if importlib.metadata.version('jaxlib').startswith('0.10.') and not os.environ.get('JAXSD_FUSIONS'):
    QUICK['xla_cpu_use_fusion_emitters'] = 'false'
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *(
    f'--{name}={value}' for name, value in QUICK.items())]).strip()
os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', '-1')
PROGRAMS = pathlib.Path(__file__).resolve().parents[1] / '.pytest_cache' / 'programs'
if 'PYTEST_XDIST_WORKER' not in os.environ and sum(
        file.stat().st_size for file in PROGRAMS.rglob('*-cache')) > 2**31:
    shutil.rmtree(PROGRAMS, ignore_errors=True)  # another session may do it, too

import launch  # noqa: E402

launch.keep_programs(PROGRAMS)

import pytest  # noqa: E402

import jaxsd  # noqa: E402
from jaxsd.config import (  # noqa: E402
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from jaxsd.models import spec  # noqa: E402

collect_ignore = [] if importlib.util.find_spec('torch') else ['parity']


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: what the last process is left with is short."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


WORDS = ['red', 'green', 'apple', 'cat', 'dog', 'a']
END = '<|endoftext|>'


def _text(**fields):
    tiny = dict(vocab_size=528, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=16)
    return TextConfig(**{**tiny, **fields})


def _unet(**fields):
    tiny = dict(block_out_channels=(32, 64), layers_per_block=1, transformer_layers=(1, 0),
                heads=(4, 4), only_cross_attention=(False, False), cross_attention_dim=32,
                norm_num_groups=8, sample_size=8)
    return UNetConfig(**{**tiny, **fields})


TINY_VAE = VAEConfig(block_out_channels=(16, 16, 16, 16), layers_per_block=1, norm_num_groups=8)

# The released families in miniature: 64 x 64 pixels, 8 x 8 latents.
TINY = {
    'sd1': ModelConfig(unet=_unet(), vae=TINY_VAE, text_encoder=_text()),
    'sd2': ModelConfig(
        unet=_unet(use_linear_projection=True, heads=(2, 4)), vae=TINY_VAE,
        schedule=ScheduleConfig(prediction_type='v_prediction'),
        text_encoder=_text(hidden_act='gelu')),
    'sdxl': ModelConfig(
        unet=_unet(use_linear_projection=True, cross_attention_dim=80, added_time_dim=8,
                   added_dim=24 + 6 * 8),
        vae=TINY_VAE, text_encoder=_text(skip=1, final_norm=False),
        text_encoder_2=_text(hidden_size=48, hidden_act='gelu', skip=1, final_norm=False,
                             projection_dim=24),
        zero_negative=True),
    'refiner': ModelConfig(
        unet=_unet(use_linear_projection=True, cross_attention_dim=48, added_time_dim=8,
                   added_dim=24 + 5 * 8),
        vae=TINY_VAE,
        text_encoder_2=_text(hidden_size=48, hidden_act='gelu', skip=1, final_norm=False,
                             projection_dim=24),
        aesthetic=True),
}


def write_tokenizer(folder, pad=END, length=16, words=WORDS):
    """A tokenizer folder with a small vocabulary: every byte, and a few words as single tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    letters = sorted(ByteLevel.alphabet())
    vocab, merges = {'!': 0}, []

    def add(token):
        vocab.setdefault(token, len(vocab))

    for letter in letters:
        add(letter)
    for word in words:  # merges that build the word from left to right
        parts = [*word[:-1], word[-1] + '</w>']
        add(parts[-1])
        while len(parts) > 1:
            merges.append(f'{parts[0]} {parts[1]}')
            parts[:2] = [parts[0] + parts[1]]
            add(parts[0])
    for letter in letters:
        add(letter + '</w>')
    vocab['<|startoftext|>'] = len(vocab)
    vocab[END] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *dict.fromkeys(merges)]) + '\n')
    (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
        tokenizer_class='CLIPTokenizer', model_max_length=length, bos_token='<|startoftext|>',
        eos_token=END, unk_token=END, pad_token=pad)))
    return len(vocab)


@contextlib.contextmanager
def at_most(seconds):
    """What is inside takes no more processor time than this, other threads' and other processes'
    aside; nor does it pay for garbage that is looked for among what other tests made."""
    gc.freeze()
    start = time.thread_time()
    try:
        yield
        took = time.thread_time() - start
    finally:
        gc.unfreeze()
    assert took < seconds


@pytest.fixture(scope='session')
def tokenizer_folder(tmp_path_factory):
    """A folder with a small CLIP tokenizer that pads with end-of-text."""
    folder = tmp_path_factory.mktemp('tokenizer')
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope='session')
def tiny_model(tokenizer_folder):
    """tiny_model('sd1') -> a jaxsd.Model with random weights; families: those of TINY."""
    from jaxsd.prompt.tokenizer import Tokenizer
    made = {}

    def make(name):
        if name not in made:
            config = TINY[name]
            texts = [t for t in ('text_encoder', 'text_encoder_2') if getattr(config, t)]
            tokenizer = Tokenizer.from_folder(tokenizer_folder)
            made[name] = jaxsd.Model(config, spec.init(0, config),
                                     dict.fromkeys(texts, tokenizer))
        return made[name]

    return make


@pytest.fixture(scope='module')
def forgets_programs():
    """What a module compiled goes when it ends: the programs of trainings are large."""
    yield
    forget()


@pytest.fixture(scope='module', autouse=True)
def bounded_memory():
    """So it goes where a process has come to 5 GiB: one had 10 after all slow tests."""
    yield
    status = pathlib.Path('/proc/self/status')  # Linux
    found = re.search(r'VmRSS:\s+(\d+)', status.read_text()) if status.exists() else None
    if found and int(found[1]) > 5 * 2**20:  # KiB
        forget()


def forget():
    import jax
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimised():
    """Programs are compiled as they are for users."""
    from jaxsd.run import replica
    from jaxsd.run.programs import Programs
    with pytest.MonkeyPatch.context() as patch:
        users = {'xla_backend_optimization_level': '3', 'xla_cpu_use_fusion_emitters': True}
        options = {name: users[name] for name in QUICK}
        patch.setattr(replica, 'PROGRAMS', Programs(options=options))
        yield


@pytest.fixture(scope='session')
def checkpoint(tiny_model, tmp_path_factory):
    """A diffusers folder of TINY['sd1']."""
    folder = tmp_path_factory.mktemp('checkpoints') / 'tiny'
    jaxsd.save(tiny_model('sd1'), folder)
    return folder


@pytest.fixture(scope='module')
def window():
    """A browser, for tests of the gallery."""
    import browser
    with browser.chromium() as driver:
        driver.set_script_timeout(20)
        driver.execute_cdp_cmd('Browser.grantPermissions', {
            'permissions': ['clipboardReadWrite', 'clipboardSanitizedWrite']})
        yield driver


@pytest.fixture(scope='module')
def big_gallery(tmp_path_factory):
    """2,000 records in a folder that a shell must have quoted."""
    from galleries import GUIDANCE, SAMPLERS, make_run, planned

    from jaxsd.batch import gallery
    axes = {'sampler': list(SAMPLERS), 'guidance': list(GUIDANCE)}
    where = make_run(tmp_path_factory.mktemp('gallery') / "it's a run", planned(2000), axes)
    return gallery.write(where)


@pytest.fixture
def visit(window, big_gallery):
    """visit(hash, page): open the page -> the driver. The console must stay without errors."""
    import browser
    browser.resize(window, 1280, 900)
    browser.scheme(window, 'light')

    def visit(state='', page=big_gallery):
        window.get('about:blank')
        window.get(page.as_uri() + state)
        return window

    window.get_log('browser')
    yield visit
    errors = [entry for entry in window.get_log('browser') if entry['level'] == 'SEVERE']
    assert not errors


@pytest.fixture(scope='session')
def many_scans():
    """The bytes of a progressive JPEG of which one scan stands there 4,000 times."""
    import io

    import numpy as np
    from PIL import Image
    file = io.BytesIO()
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(array).resize((512, 512)).save(file, 'JPEG', progressive=True, quality=20)
    data = file.getvalue()
    starts = [i for i in range(len(data)) if data[i:i + 2] == b'\xff\xda']
    scan = data[starts[-1]:-2]  # up to the end of the image
    assert len(scan) < 5000
    return data[:-2] + scan * 4000 + data[-2:]
