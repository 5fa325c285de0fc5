"""Fine-tuning by a recipe, from its fields to the files that it leaves."""

import collections
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from ml_collections import ConfigDict

import jaxsd
from jaxsd.batch.identity import digest
from jaxsd.config import ModelConfig
from jaxsd.models import vae
from jaxsd.prompt import blocks
from jaxsd.recipe import options
from jaxsd.run import depth, picture
from jaxsd.run.pipeline import once
from jaxsd.train import cache, data, examples, loop, losses, methods, optimizers
from jaxsd.train.config import BaseConfig, Settings, read
from jaxsd.train.data_config import SetConfig
from jaxsd.typing import Path
from jaxsd.weights import Adapter, Embedding, Model, Network

EXPORTED = 'exported.txt'  # in a run's folder: what it wrote


def fine_tune(recipe: ConfigDict, overwrite: bool = False, strict: bool = False) -> Any:
    """Train what a recipe says and write it -> what was trained.

    recipe: of `jaxsd.train.config.recipe`. A training that is in its folder goes on. overwrite:
    recipe.export may be written over though another run wrote it. strict: the first bad file ends
    the training. Raises ValueError or FileNotFoundError of one line for what cannot be trained,
    before anything is compiled.
    """
    c = read(recipe)
    check_export(c.base, overwrite)
    if strict:
        c = c._replace(data=dataclasses.replace(c.data, strict=True))
    loop.make_mesh(c.train)
    optimizers.learning_rate(c.optimizer, c.train.steps)
    sets = read_pictures(c)
    model = load_model(c)
    if c.prior.prompt:
        c = with_class_pictures(c, model)
        sets = examples.read_sets(c.data)
    for line in data.Buckets(sets.examples, c.data, c.train.batch_size).describe():
        tqdm.tqdm.write(line)
    method = methods.METHODS[c.base.method](model, c.method, np.random.default_rng(c.train.seed))
    tokenize = functools.partial(_tokens, model, method, c.base.blocks,
                                 c.loss.objective == 'consistency')
    stores = fill_caches(c, model, tokenize, [*sets.examples, *sets.heldout])
    loss, frozen = make_loss(c, method)
    tx = optimizers.optimizer(c.optimizer, c.train.steps, method.trainable)

    def load(examples, settings, start=0):
        return data.batches(examples, settings, c.train.batch_size, c.train.seed, tokenize,
                            process=jax.process_index(), processes=jax.process_count(),
                            start=start, **stores)

    heldout: list[Mapping[str, Any]] = []
    if sets.heldout:
        steady = dataclasses.replace(c.data, crop='center', flip=False, caption_dropout=0.0,
                                     shuffle_tags=False, tag_dropout=0.0)
        count = -(-len(sets.heldout) // c.train.batch_size)
        with contextlib.closing(load(sets.heldout, steady)) as batches:
            heldout = [next(batches) for _ in range(min(count, 8))]
    trained = loop.fit(
        loss, method.trainable, frozen, lambda step: load(sets.examples, c.data, step), tx,
        c.train, c.base.out, sampler(c, method), heldout,
        data.fingerprint(sets.examples, c.data, c.train.batch_size, c.train.seed), str(recipe))
    found = method.result(trained)
    if jax.process_index() == 0:
        export(found, c.base.export, c.base.layout, c.base.dtype or None, kohya_metadata(c, sets))
        exported(c.base)
    return found


def check_export(c: BaseConfig, overwrite: bool = False) -> None:
    """ValueError where c.export is there and the run in c.out did not write it."""
    path, ours = pathlib.Path(c.export), pathlib.Path(c.out) / EXPORTED
    if path.exists() and not overwrite and not (
            ours.exists() and ours.read_text() == str(path.absolute())):
        raise ValueError(f'export={c.export}: is there already, and this run did not write it; '
                         'give another path, or --overwrite')
    single = c.method in ('lora', 'textual_inversion') or getattr(c, 'layout', '') == 'single-file'
    if single and path.suffix != '.safetensors':
        raise ValueError(f'export={c.export!r}: expected a file for method={c.method}, '
                         f'{c.export or "trained"}.safetensors')


def exported(c: BaseConfig) -> None:
    """Note that the run in c.out wrote c.export, and may do so again."""
    pathlib.Path(c.out, EXPORTED).write_text(str(pathlib.Path(c.export).absolute()))
    print(f'written: {c.export}')


def export(result: Any, path: Path, layout: str = '', dtype: DTypeLike | None = None,
           metadata: Mapping[str, Any] | None = None) -> None:
    """Write what was trained; layout: '' is the one that most programs read, see jaxsd.save,
    jaxsd.save_adapter, which takes the metadata."""
    if isinstance(result, Adapter):
        jaxsd.save_adapter(result, path, layout or 'kohya', dtype, metadata, overwrite=True)
    elif isinstance(result, Embedding):
        jaxsd.save_embedding(result, path, dtype, overwrite=True)
    elif isinstance(result, Network):
        jaxsd.save_network(result, path, dtype, layout or 'diffusers')
    else:
        jaxsd.save(result, path, layout or 'diffusers', dtype)


def kohya_metadata(c: Settings, sets: examples.Sets) -> dict[str, Any]:
    """What kohya's sd-scripts say of a training in an adapter's header, and A1111 shows."""
    tags = collections.Counter(
        tag.strip() for e in sets.examples for text in e.captions
        for tag in text.split(c.data.tag_separator) if tag.strip())
    return {
        'ss_num_train_images': str(len(sets.examples)), 'ss_seed': str(c.train.seed),
        'ss_max_train_steps': str(c.train.steps),
        'ss_learning_rate': str(c.optimizer.learning_rate),
        'ss_optimizer': c.optimizer.name, 'ss_lr_scheduler': c.optimizer.schedule,
        'ss_total_batch_size': str(c.train.batch_size), 'ss_mixed_precision': c.train.dtype,
        'ss_resolution': f'({c.data.size[0]}, {c.data.size[1]})', 'ss_tag_frequency': {
            pathlib.Path(c.data.sets[0].path).name or 'pictures': dict(tags.most_common(1000))}}


def load_model(c: Settings) -> Model:
    """The model that a recipe starts from, as it is to be trained.

    Raises ValueError for what cannot be."""
    full, spread = c.base.method == 'full', c.train.fsdp > 1
    model = jaxsd.load(c.base.model, 'float32' if full else c.train.dtype,
                       prediction_type=c.base.prediction_type or None,
                       device=jax.local_devices(backend='cpu')[0] if spread else None)
    config = trainable_config(c, model.config)
    new = config.unet.in_channels - model.config.unet.in_channels
    if new:  # with weights 0, as Rombach et al. 2022 began to train theirs
        first = model.params['unet']['conv_in']
        weight = jnp.pad(first['weight'], ((0, 0), (0, 0), (0, new), (0, 0)))
        model = model.replace(params=model.params | {'unet': model.params['unet'] | {
            'conv_in': first | {'weight': weight}}})
    return model.replace(config=config)


def trainable_config(c: Settings, config: ModelConfig) -> ModelConfig:
    """A model's config as the recipe has it: noise schedule, channels. Raises ValueError for what
    cannot be trained."""
    schedule = config.schedule
    if c.base.zero_terminal_snr:
        schedule = dataclasses.replace(schedule, rescale_betas_zero_snr=True)
    if schedule.rescale_betas_zero_snr and schedule.prediction_type == 'epsilon':
        raise ValueError('zero_terminal_snr: at the last timestep there is only noise, from which '
                         "'epsilon' says nothing; give prediction_type='v_prediction'")
    if schedule.edm or config.low_res or config.aesthetic or config.task in (
            'pix2pix', 'unclip'):
        raise ValueError(f'{c.base.model}: training EDM models, upscalers, InstructPix2Pix, '
                         'unCLIP and the SDXL refiner is not implemented')
    config = config.replace(schedule=schedule)
    if c.base.inpainting:
        config = config.replace(unet=dataclasses.replace(
            config.unet, in_channels=2 * config.vae.latent_channels + 1))
    if losses.inpaints(config) and c.data.cache_latents:
        raise ValueError('data.cache_latents: inpainting draws new masks for each step; expected '
                         'cache_latents=False')
    if config.depth_estimator and not c.data.cache_latents:
        raise ValueError('data.cache_latents: depth is estimated once for each picture and kept; '
                         'expected cache_latents=True for a depth model')
    return config


def with_class_pictures(c: Settings, model: Model) -> Settings:
    """The settings with a set of class pictures, for prior preservation (Ruiz et al. 2023, section
    3.2), which the model draws where there are fewer than c.prior.count."""
    folder = pathlib.Path(c.base.out) / 'class_pictures'
    folder.mkdir(parents=True, exist_ok=True)
    missing = [] if jax.process_index() else [
        i for i in range(c.prior.count) if not (folder / f'{i:05d}.png').exists()]
    size = dict(width=c.data.size[0], height=c.data.size[1])
    for i in tqdm.tqdm(missing, 'class pictures', disable=None):
        request = jaxsd.Request(c.prior.prompt, seed=i, **size | options(c.prior.request))
        picture.write_png(folder / f'{i:05d}.png', jaxsd.generate(model, [request])[0])
    _wait_for_others('class pictures')
    prior = SetConfig(path=str(folder), kind='folder', prior=True, caption=c.prior.prompt)
    return c._replace(data=dataclasses.replace(c.data, sets=(*c.data.sets, prior)))


def _wait_for_others(what):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def read_pictures(c: Settings) -> examples.Sets:
    """The pictures of a recipe; names each bad one once."""
    sets = examples.read_sets(c.data)
    for line in (*sets.problems, *sets.notes):
        tqdm.tqdm.write(line)
    if c.base.method == 'textual_inversion' and not any(
            c.method.token in text for e in sets.examples for text in e.captions):
        raise ValueError(f'textual_inversion.token={c.method.token!r}: no caption has it; expected '
                         "it in them, or in the set's caption: 'a photo of " + c.method.token + "'")
    hints = c.base.method in ('controlnet', 't2i_adapter')
    if hints and sets.examples[0].hint is None:
        raise ValueError(f'method={c.base.method}: the pictures have no hints; expected a folder '
                         "of them in the set's `hints`, named as the pictures are")
    return sets


def _tokens(model, method, count, unconditional, captions):
    rows = functools.partial(blocks.captions, model.tokenizers, K=count,
                             embeddings=method.embeddings)
    return {'tokens': rows(captions)} | ({'uncond_tokens': rows([''] * len(captions))}
                                         if unconditional else {})


def fill_caches(c: Settings, model: Model, tokenize: Callable[[list[str]], Any],
                found: Sequence[examples.Example]) -> dict[str, cache.Cache]:
    """Compute what the recipe keeps on disk -> arguments of data.batches."""
    stores = {}
    config = model.config
    if c.data.cache_latents:
        encode = jax.jit(lambda p, image: jnp.concatenate(
            vae.encode(p, config.vae, vae.unit(image)), -1))
        part = _float32(model.params['vae']) if config.vae.force_upcast else model.params['vae']
        stores['latents'] = cache.Cache(c.data.cache, digest(part))

        def arrays(image):
            found = {'moments': encode(part, image)}
            if config.depth_estimator:
                size = [n // config.vae.factor for n in image.shape[1:3]]
                found['depth'] = depth.condition(depth.estimate(model, image), *size)
            return found

        cache.cache_latents(found, c.data, arrays, stores['latents'],
                            process=jax.process_index(), processes=jax.process_count())
    if c.data.cache_texts:
        trained = [part for part in getattr(c.method, 'components', ()) if part != 'unet']
        if trained or c.base.method == 'textual_inversion':
            raise ValueError('data.cache_texts: what the text encoders make of a caption changes '
                             'when they are trained; expected cache_texts=False')
        parts = {k: p for k, p in model.params.items() if k.startswith('text_encoder')}

        @jax.jit
        def text(params, tokens):
            context, pooled = losses.text_features(params, config, {'tokens': tokens})
            return {'context': context, 'pooled': pooled}

        stores['texts'] = cache.Cache(c.data.cache, digest(parts))
        cache.cache_texts(found, c.data, lambda captions: text(parts, tokenize(captions)['tokens']),
                          stores['texts'], process=jax.process_index(),
                          processes=jax.process_count())
    _wait_for_others('caches')
    return stores


def _float32(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def make_loss(c: Settings, method: methods.Method) -> tuple[loop.Apply, Any]:
    """-> (loss(trainable, frozen, batch, key), the frozen arrays that it needs)."""
    frozen = dict(method.frozen)
    if c.data.cache_latents and c.loss.objective != 'preference':  # it encodes the other picture
        del frozen['vae']
    if c.data.cache_texts:
        frozen = {k: p for k, p in frozen.items() if not k.startswith('text_encoder')}
    frozen.pop('depth_estimator', None)
    keep = ('vae',) if method.config.vae.force_upcast else ()
    frozen = {part: _float32(tree) if part in keep else jax.tree.map(
        lambda a: a.astype(c.train.dtype), tree) for part, tree in frozen.items()}
    frozen = jax.jit(once)(frozen)

    objective = losses.OBJECTIVES[c.loss.objective]
    if c.loss.objective != 'diffusion' and c.base.method == 'full':
        raise ValueError(f"loss.objective={c.loss.objective!r}: is measured by the model as it "
                         "was, which method='full' changes; expected method='lora'")

    if c.loss.objective == 'consistency' and c.data.cache_texts:
        raise ValueError("data.cache_texts: loss.objective='consistency' encodes '' too; expected "
                         'cache_texts=False')
    if c.loss.objective == 'preference' and c.data.cache_latents:
        raise ValueError("data.cache_latents: loss.objective='preference' encodes the hints; "
                         'expected cache_latents=False')

    def loss(trainable, frozen, batch, key):
        return objective(once(method.apply(frozen, trainable)), method.config, batch, key,
                         c.loss, c.train.remat, teacher=frozen)

    return loss, frozen


def sampler(c: Settings, method: methods.Method) -> Callable[[Any, int], np.ndarray] | None:
    """-> sample(params, step), a grid of c.sample.prompts, the same seeds each time."""
    if not c.sample.prompts:
        return None
    size = dict(width=c.data.size[0], height=c.data.size[1])
    requests = [jaxsd.Request(prompt, seed=i, **size | options(c.sample.request))
                for i, prompt in enumerate(c.sample.prompts)]

    def sample(params, step):
        return picture.grid(jaxsd.generate(method.model(params), requests))

    return sample
