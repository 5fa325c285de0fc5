"""What a picture is determined by, as a hash: its id.

The same id is the same picture, to the bit, on one kind of device with one version of jaxlib (see
`fingerprint`), and nearly so elsewhere.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np

import jaxsd
from jaxsd.run import picture
from jaxsd.run.engine import slots_for
from jaxsd.run.programs import recall, remember
from jaxsd.run.request import UPSCALERS, Hires, Request
from jaxsd.run.text_conditioning import parse_prompts
from jaxsd.sampling import plugins, schedule_file
from jaxsd.weights import Model

# The rooms whose code pictures depend on; a comment or docstring changes nothing.
ROOMS = ('config.py', 'config_files.py', 'images', 'models', 'prompt', 'run',
         'sampling', 'weights')


@functools.cache
def numerics() -> str:
    """A hash of the code that makes pictures, less comments and docstrings -> 16 hex digits."""
    root = pathlib.Path(jaxsd.__file__).parent
    texts = {str(file.relative_to(root)): file.read_text() for room in ROOMS for file in (
        sorted((root / room).glob('*.py')) if (root / room).is_dir() else [root / room])}
    whole = hashlib.sha256(json.dumps([sys.version, texts]).encode()).hexdigest()
    known = recall('code.json')  # to take the code apart takes half a second
    if known.get('files') != whole:
        found = hashlib.sha256()
        for name, text in texts.items():
            found.update(f'{name}\n{plugins.stripped(text)}\n'.encode())
        known = {'files': whole, 'numerics': found.hexdigest()[:16]}
        remember('code.json', **known)
    return str(known['numerics'])


def digest(tree: Any) -> str:
    """A hash of the names and bytes of nested dicts of arrays -> 64 hex digits."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)

    def leaf(item):
        name, array = item
        array = np.ascontiguousarray(array)
        head = f'{jax.tree_util.keystr(name)} {array.dtype} {array.shape}'
        return head.encode() + hashlib.sha256(array.reshape(-1).view(np.uint8)).digest()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.sha256(b'\n'.join(pool.map(leaf, leaves))).hexdigest()


class Identity:
    """Ids for the pictures of one Engine.

    settings: what is common to all of them: hashes of the weights and of the code, the Engine's
    slots (None: chosen by size), tile, and over how many devices the weights are spread (None:
    not). Adapters, embeddings, ControlNets, IP-Adapters, upscalers and the code of plugins count
    for the requests that name them.
    """

    def __init__(self, model: Model, refiner: Model | None = None, *, slots: int | None,
                 tile: int | None = None, spread: int | None = None) -> None:
        def weights(net):
            words = [(name, tokenizer.backend.get_vocab(), tokenizer.length, tokenizer.pad_id)
                     for name, tokenizer in sorted(net.tokenizers.items())]
            rest = hashlib.sha256(json.dumps([repr(net.config), words], sort_keys=True).encode())
            return digest(net.params)[:32] + rest.hexdigest()[:32]

        self.model = model
        self._file = functools.cache(picture.digest)
        self.settings = {'weights': weights(model), 'refiner': refiner and weights(refiner),
                         'numerics': numerics(), 'slots': slots, 'tile': tile,
                         'spread': spread}

    @functools.cached_property
    def _named(self):
        """Of all that requests may name: {kind: {name: hash}}."""
        model = self.model
        return {'controlnets': {name: digest(found.params)
                                for name, found in model.controlnets.items()},
                'ip_adapters': {
                    name: [f'{net.config} {digest(net.params)}'
                           for net in (found, found.image_encoder) if net]
                    for name, found in model.ip_adapters.items()},
                'adapters': {name: digest([found.deltas, {n: e.vectors for n, e in
                                                          found.embeddings.items()}])
                             for name, found in model.adapters.items()},
                'embeddings': {name: digest(found.vectors)
                               for name, found in model.embeddings.items()},
                'upscalers': {name: digest(found.params)
                              for name, found in model.upscalers.items()}}

    def of(self, request: Request, slots: int | None = None) -> str:
        """A resolved request's id -> 32 hex digits. Reads the files that the request names. slots:
        of the program that makes it; None: the Engine's choice."""
        words = ' '.join(request.texts).lower()
        names = {'controlnets': [control.net for control in request.controls],
                 'ip_adapters': [prompt.net for prompt in request.image_prompts],
                 'adapters': parse_prompts(request).adapters,
                 'embeddings': [n for n in self._named['embeddings'] if n.lower() in words],
                 'upscalers': [request.hires.upscaler] if isinstance(request.hires, Hires) and (
                     request.hires.upscaler not in UPSCALERS) else []}
        used = {kind: {name: self._named[kind].get(name) for name in sorted(found)}
                for kind, found in names.items() if found}
        if own := plugins.used(request):
            used['plugins'] = own
        hashes = {name: self._file(name) for name in picture.files(request)}
        if file := schedule_file(request.schedule):
            hashes[str(request.schedule)] = hashes[file]
        fields = json.loads(json.dumps(vars(request) | {'wildcards': None},
                                       default=picture.describe))
        fields = jax.tree.map(lambda value: hashes.get(value, value), fields)  # by content
        width, height = request.final_size
        cells = height * width // self.model.config.vae.factor ** 2
        slots = slots or self.settings['slots'] or slots_for(jax.default_backend(), cells)
        whole = json.dumps([self.settings | {'slots': slots}, used, fields], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:32]

    def unmade(self, request: Request) -> str:
        """An id for a request that the model cannot make, or whose files cannot be read."""
        fields = json.dumps([self.settings, vars(request)], sort_keys=True,
                            default=picture.describe)
        return hashlib.sha256(fields.encode()).hexdigest()[:32]


def fingerprint() -> dict[str, str]:
    """What else a picture's last bits depend on: the device's kind and the versions."""
    return {'device': picture.device(), **picture.versions()}
