"""Time the networks against diffusers and transformers, alternating in one run.

`python -m launch.bench --version=sd15`: seeded random weights of full size, the same on both
sides; prints the median time of a call, torch's divided by ours (above 1: ours is faster), and
the largest difference of the outputs relative to their deviation.

`python -m launch.bench --parts=mixed`: a batch of 16 different samplers against 16 times one, on
the emoji model, the same number of model calls.

`python -m launch.bench --parts=requests`: 256 requests for emoji, of 4 samplers and mixed steps,
made and written as launch.batch does it, against diffusers' pipeline, which makes those of one
sampler and number of steps together.

`python -m launch.bench --parts=quantized`: the emoji model with its weights kept in each kind of
--config.quantize: their megabytes, those of the denoise loop beside them, seconds for 16 pictures,
and how far these are from those of the file's weights, the root mean square of 255.

`python -m launch.bench --parts=cheaper`: the emoji model's pictures with EasyCache, DeepCache and
the like: how much faster they come, at 64 and at 256 pixels, and how far those of 64 are from what
they are without, the root mean square of 255.

`python -m launch.bench --parts=train_lora,train_full --pixels=256`: steps of fine-tuning a U-Net, a
LoRA of rank 16 with AdamW, or all of it with SGD (AdamW's state of both sides would not fit beside
it), against PEFT and diffusers.
"""

import json
import os
import platform
import statistics
import time

from absl import app, flags

from . import define_plugin_flag, plain_errors

FLAGS = flags.FLAGS


def define_flags():
    """Not at import: other mains have flags of these names."""
    define_plugin_flag()
    flags.DEFINE_string('version', 'sd15', 'A released version, see jaxsd.versions().')
    flags.DEFINE_list('parts', ['text', 'unet', 'vae'], 'What to time: text, unet, vae, mixed, '
                      'requests, quantized, cheaper, train_lora, train_full.')
    flags.DEFINE_integer('pixels', 256, 'Height and width of the pictures that are trained on.',
                         lower_bound=64)
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'Of both sides.')
    flags.DEFINE_integer('batch', 1, 'Pictures; the U-Net sees two latents for each.',
                         lower_bound=1)
    flags.DEFINE_integer('rounds', 3, 'Timed calls of each side, after one to warm up.',
                         lower_bound=1)
    flags.DEFINE_enum('against', 'eager', ['eager', 'compile', 'none'],
                      'torch eager, torch.compile, or jaxsd alone.')
    flags.DEFINE_string('out', None, 'Also write the results to this JSON file.')


def cases(config, batch, seed=0):
    """{part: (component, ours(params, **inputs), inputs)}; inputs: numpy arrays, NHWC."""
    import jax.numpy as jnp
    import numpy as np

    from jaxsd.models import clip, unet, vae
    from jaxsd.models.layers import timestep_embedding
    rng, u = np.random.default_rng(seed), config.unet

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def predict(p, x, t, context, pooled=None, ids=None):
        added = None
        if pooled is not None:
            sinusoids = timestep_embedding(ids, u.added_time_dim).reshape(len(ids), -1)
            added = jnp.concatenate([pooled, sinusoids], -1)
        return unet.apply(p, u, x, t, context, added)

    inputs = {'x': normal(2 * batch, u.sample_size, u.sample_size, u.in_channels),
              't': np.full(2 * batch, 481.0, np.float32),
              'context': normal(2 * batch, 77, u.cross_attention_dim)}
    name = 'text_encoder' if config.text_encoder else 'text_encoder_2'
    text = getattr(config, name)
    if u.added_dim:
        ids = 5 if config.aesthetic else 6
        inputs['pooled'] = normal(2 * batch, u.added_dim - ids * u.added_time_dim)
        inputs['ids'] = rng.integers(0, 1024, (2 * batch, ids)).astype(np.float32)
    tokens = rng.integers(0, text.vocab_size - 1, (2 * batch, 77)).astype(np.int32)
    tokens[:, -1] = text.vocab_size - 1
    latent = normal(batch, u.sample_size, u.sample_size, config.vae.latent_channels)
    return {'text': (name, lambda p, tokens: clip.encode(p, text, tokens).hidden,
                     {'tokens': tokens}),
            'unet': ('unet', predict, inputs),
            'vae': ('vae', lambda p, z: vae.decode(p, config.vae, z), {'z': latent})}


def peer(component, config, params, inputs, dtype):
    """A function of no arguments that calls torch's network on our weights and inputs."""
    import diffusers
    import numpy as np
    import torch
    import transformers
    from flax import traverse_util

    from jaxsd.config_files import VERSIONS
    from jaxsd.models import spec
    settings = json.loads((VERSIONS / config.version / component / 'config.json').read_text())
    if component == 'unet':
        module = diffusers.UNet2DConditionModel.from_config(settings)
    elif component == 'vae':
        module = diffusers.AutoencoderKL.from_config(settings)
    else:
        module = getattr(transformers, settings['architectures'][0])(
            transformers.CLIPTextConfig(**settings))
    state = {k: torch.from_numpy(np.array(spec.from_jax(k, np.asarray(v, np.float32))))
             for k, v in traverse_util.flatten_dict(params, sep='.').items()}
    if not any(k.startswith('text_model.') for k in module.state_dict()):  # transformers 5
        state = {k.removeprefix('text_model.'): v for k, v in state.items()}
    module.load_state_dict(state)
    device, kind = 'cuda' if torch.cuda.is_available() else 'cpu', getattr(torch, dtype)
    module = module.to(device, kind).eval().requires_grad_(False)
    compiled = torch.compile if FLAGS.against == 'compile' else lambda f: f

    def tensor(array):
        t = torch.tensor(array, device=device)
        t = t.to(kind) if t.is_floating_point() else t.long()
        return t.permute(0, 3, 1, 2).contiguous() if t.ndim == 4 else t

    a = {k: tensor(v) for k, v in inputs.items()}
    if component == 'unet':
        forward = compiled(module.forward)
        added = {'text_embeds': a.get('pooled'), 'time_ids': a.get('ids')}

        def call():
            return forward(a['x'], a['t'], a['context'],
                           added_cond_kwargs=added).sample.permute(0, 2, 3, 1)
    elif component == 'vae':
        decoder = compiled(module.decoder)

        def call():
            return decoder(module.post_quant_conv(a['z'])).permute(0, 2, 3, 1)
    else:
        forward = compiled(module.forward)

        def call():
            out = forward(a['tokens'], output_hidden_states=True)
            return out.hidden_states[-2] if getattr(config, component).skip else (
                out.last_hidden_state)

    def run():
        with torch.inference_mode():
            out = call()
            if device == 'cuda':
                torch.cuda.synchronize()
            return out

    return run


def alternate(sides):
    """Call functions in turn -> {name: median seconds}, {name: what the first call gave}."""
    first = {name: call() for name, call in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(FLAGS.rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}, first


def measure_mixed(count=16, steps=12):
    """One row of results: whole pictures in a batch of different samplers, and of one."""
    import jaxsd
    from configs import emoji
    from jaxsd import sampling
    from jaxsd.sampling.plugins import OWN
    model = jaxsd.load(emoji.CHECKPOINT)
    config = model.config.schedule
    sigmas = sampling.schedule('karras', steps, config)
    tables = {name: sampling.plan(name, sigmas, config=config) for name in sampling.SAMPLERS}
    names = [name for name, rows in tables.items()
             if isinstance(rows, sampling.Rows) and sampling.calls(rows) == steps]
    names.sort(key=lambda name: ('sampler', name) not in OWN)  # those of --plugin first

    def pictures(names):
        return lambda: jaxsd.generate(model, [
            jaxsd.Request('red apple', seed=i, sampler=name, steps=steps)
            for i, name in enumerate(names)])

    row, _ = alternate({'mixed': pictures(names[:count]), 'one': pictures(['dpmpp_2m'] * count)})
    return {**row, 'ratio': row['mixed'] / row['one']}


def measure_quantized():
    """A row of results for each way to keep the weights."""
    import jax
    import numpy as np

    import jaxsd
    from configs import emoji
    from jaxsd.models import quantized
    from jaxsd.run.programs import PROGRAMS
    subjects = ['red apple', 'alien', 'rocket', 'rooster', 'musical note', 'red heart',
                'tangerine', 'man student']
    asked = [jaxsd.Request(subjects[i % 8], seed=i, steps=20, guidance=4) for i in range(16)]

    def loaded(name):
        if name == 'bfloat16':
            return jaxsd.load(emoji.CHECKPOINT, 'bfloat16')
        return jaxsd.load(emoji.CHECKPOINT, quantize=None if name == 'float32' else name)

    models = {name: loaded(name) for name in ('float32', 'bfloat16', *quantized.KINDS)}
    loops = {}

    def pictures(name):
        def draw():
            made = jaxsd.generate(models[name], asked)
            if name not in loops:
                loops[name] = [entry.program.call for entry in PROGRAMS._kept.values()
                               if entry.program.function.func.__name__ == '_advance'][-1]
            return made.astype(np.float32)
        return draw

    times, first = alternate({name: pictures(name) for name in models})
    return {name: {
        'MB': sum(a.nbytes for a in jax.tree.leaves(model.params)) / 1e6,
        'loop MB': loops[name].memory_analysis().temp_size_in_bytes / 1e6,
        'seconds': times[name],
        'distance': float(np.sqrt(np.square(first[name] - first['float32']).mean()))}
        for name, model in models.items()}


def measure_cheaper(steps=20):
    """A row of results for each option, of the same requests."""
    import numpy as np

    import jaxsd
    from configs import emoji
    model = jaxsd.load(emoji.CHECKPOINT)
    subjects = ['red apple', 'alien', 'rocket', 'rooster', 'musical note', 'red heart',
                'tangerine', 'man student']
    kinds = {'plain': {}, 'interval 0.1-0.6': {'interval': (0.1, 0.6)},
             **{f'easycache {n}': {'easycache': {'threshold': n}} for n in (0.05, 0.1, 0.2)},
             **{f'deepcache {n}': {'deepcache': {'interval': n}} for n in (2, 3, 5)},
             'deepcache 3, branch 2': {'deepcache': {'interval': 3, 'branch': 2}},
             'hypertile 32': {'hypertile': {'tile_size': 32}},
             'token_merging 0.25': {'token_merging': {'ratio': 0.25}},
             'token_merging 0.5': {'token_merging': {'ratio': 0.5}}}

    def pictures(size, count, options):
        asked = [jaxsd.Request(subjects[i % 8], seed=i, steps=steps, guidance=4, width=size,
                               height=size, guidance_options=options) for i in range(count)]
        return lambda: jaxsd.generate(model, asked).astype(np.float32)

    times, first = alternate({name: pictures(64, 16, kind) for name, kind in kinds.items()})
    large, _ = alternate({name: pictures(256, 1, kind) for name, kind in kinds.items()})
    return {name: {
        'speed': times['plain'] / times[name], 'at 256': large['plain'] / large[name],
        'distance': float(np.sqrt(np.square(first[name] - first['plain']).mean()))}
        for name in kinds}


DIFFUSERS = {  # the same samplers on the same noise levels
    'euler': ('EulerDiscreteScheduler', {}), 'heun': ('HeunDiscreteScheduler', {}),
    'dpmpp_2m': ('DPMSolverMultistepScheduler', {}), 'ddim': ('DDIMScheduler', {})}


def measure_requests(count=256, few=(10, 12, 15, 18, 20, 22, 25, 30)):
    """Rows of results, seconds for all requests: with steps of few values, and with any from 10 to
    30. `first` includes compilation."""
    import collections
    import tempfile

    import diffusers
    import numpy as np
    import torch

    import jaxsd
    from configs import emoji
    from jaxsd.batch import folder, runner
    from jaxsd.batch.identity import Identity
    from jaxsd.run import Engine
    model = jaxsd.load(emoji.CHECKPOINT)
    engine = Engine(model)
    identity = Identity(model, slots=engine.slots)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        emoji.CHECKPOINT, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    rng, names = np.random.default_rng(0), list(DIFFUSERS)
    subjects = ['red apple', 'alien', 'rocket', 'rooster', 'musical note', 'red heart', 'tangerine']

    def requests(values):
        return [jaxsd.Request(subjects[i % len(subjects)], seed=i, sampler=names[i % len(names)],
                              schedule='normal', steps=int(rng.choice(values)), guidance=4)
                for i in range(count)]

    def ours(some):
        with tempfile.TemporaryDirectory() as path:
            run = folder.Folder(path)
            jobs = runner.jobs(engine, identity, some)
            assert runner.Runner(engine, run, {}).run(jobs) == (count, 0)
            run.close()

    def theirs(some, most=16):
        groups = collections.defaultdict(list)
        for r in some:
            groups[r.sampler, r.steps].append(r)
        with tempfile.TemporaryDirectory() as path:
            for (sampler, steps), group in groups.items():
                kind, options = DIFFUSERS[sampler]
                pipe.scheduler = getattr(diffusers, kind).from_config(
                    pipe.scheduler.config, **options)
                for i in range(0, len(group), most):
                    part = group[i:i + most]
                    images = pipe([r.prompt for r in part], num_inference_steps=steps,
                                  guidance_scale=4, height=64, width=64, generator=[
                                      torch.Generator().manual_seed(r.seed) for r in part]).images
                    for r, image in zip(part, images):
                        image.save(f'{path}/{r.seed}.png')

    def seconds(make, some):
        start = time.perf_counter()
        make(some)
        return time.perf_counter() - start

    rows = {}
    for name, values in (('few', few), ('any', range(10, 31))):
        some = requests(values)
        first = seconds(ours, some)
        times = [(seconds(theirs, some), seconds(ours, some)) for _ in range(FLAGS.rounds)]
        torch_, jaxsd_ = map(statistics.median, zip(*times))
        rows[name] = {'first': first, 'jaxsd': jaxsd_, 'torch': torch_, 'ratio': torch_ / jaxsd_}
    return rows


def measure_training(part, config):
    """One row of results: a step of training a U-Net on latents and features of text."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxsd.models import spec
    from jaxsd.run.pipeline import once
    from jaxsd.train import loop, losses, methods, optimizers
    from jaxsd.train.config import AdapterConfig, FullConfig, OptimizerConfig, TrainConfig
    from jaxsd.weights import Model
    rng, u, size = np.random.default_rng(0), config.unet, FLAGS.pixels // config.vae.factor
    batch = {'latent': rng.normal(size=(FLAGS.batch, size, size, 4)).astype(np.float32),
             'noise': rng.normal(size=(FLAGS.batch, size, size, 4)).astype(np.float32),
             'timesteps': rng.integers(0, 1000, FLAGS.batch),
             'context': rng.normal(size=(FLAGS.batch, 77, u.cross_attention_dim)).astype('float32'),
             'pooled': np.zeros((FLAGS.batch, 1), np.float32)}
    params = spec.init_part(rng, spec.spec(config)['unet'])
    model, c = Model(config, {'unet': params}), TrainConfig(dtype=FLAGS.dtype)
    full = part == 'train_full'
    method = (methods.full(model, FullConfig(), rng) if full else
              methods.lora(model, AdapterConfig(rank=16, layers='attention'), rng))
    optimizer = (OptimizerConfig(name='sgd', learning_rate=1e-6, b1=0.0, clip=0.0) if full else
                 OptimizerConfig(clip=0.0))
    tx = optimizers.optimizer(optimizer, 1000, method.trainable)
    apply = method.apply
    step = jax.jit(loop.make_step(lambda trainable, frozen, batch, key: losses.diffusion(
        once(apply(frozen, trainable)), config, batch, key), tx, c), donate_argnums=0)
    sides = {}
    if FLAGS.against != 'none':
        sides['torch'] = train_peer(config, params, batch, full)
    state, frozen = [loop.start(method.trainable, tx, c)], jax.jit(once)(method.frozen)
    del params, model, method

    def ours():
        state[0], metrics = step(state[0], frozen, jax.tree.map(jnp.asarray, batch),
                                 jax.random.key(0))
        return float(metrics['loss'])

    row, first = alternate({'jaxsd': ours, **sides})
    if 'torch' in row:
        row |= {'ratio': row['torch'] / row['jaxsd'],
                'difference': abs(first['torch'] / first['jaxsd'] - 1)}
    return row


def train_peer(config, params, batch, full):
    """A function of no arguments that takes a step of training with torch."""
    import diffusers
    import numpy as np
    import peft
    import torch
    from flax import traverse_util

    from jaxsd.config_files import VERSIONS
    from jaxsd.models import spec
    settings = json.loads((VERSIONS / config.version / 'unet' / 'config.json').read_text())
    net = diffusers.UNet2DConditionModel.from_config(settings)
    net.load_state_dict({k: torch.from_numpy(np.array(spec.from_jax(k, np.asarray(v)), order='C'))
                         for k, v in traverse_util.flatten_dict(params, sep='.').items()},
                        assign=True)  # a copy less
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    net = net.to(device)
    if not full:
        net.requires_grad_(False)
        net.add_adapter(peft.LoraConfig(r=16, lora_alpha=16, target_modules=[
            'to_k', 'to_q', 'to_v', 'to_out.0']))
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-6) if full else torch.optim.AdamW(trained, 1e-4)
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012,
                                        beta_schedule='scaled_linear')
    a = {k: torch.tensor(v, device=device) for k, v in batch.items()}
    x0, noise = (a[k].permute(0, 3, 1, 2).contiguous() for k in ('latent', 'noise'))
    call = torch.compile(net) if FLAGS.against == 'compile' else net

    def run():
        x = scheduler.add_noise(x0, noise, a['timesteps'])
        with torch.autocast(device, getattr(torch, FLAGS.dtype), FLAGS.dtype != 'float32'):
            out = call(x, a['timesteps'], a['context']).sample
        loss = torch.nn.functional.mse_loss(out.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def measure(component, ours, inputs, config):
    """One row of results: both sides called in turn, ours first."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxsd.models import spec
    shapes = spec.spec(config)[component]
    params = spec.init_part(np.random.default_rng(0), shapes, jnp.dtype(FLAGS.dtype))
    jitted = jax.jit(ours)
    inputs = {k: jnp.asarray(v) for k, v in inputs.items()}
    sides = {'jaxsd': lambda: jax.block_until_ready(jitted(params, **inputs))}
    if FLAGS.against != 'none':
        sides['torch'] = peer(component, config, params,
                              {k: np.asarray(v) for k, v in inputs.items()}, FLAGS.dtype)
    row, first = alternate(sides)
    if 'torch' in first:
        row['ratio'] = row['torch'] / row['jaxsd']
        a, b = np.asarray(first['jaxsd'], np.float32), first['torch'].float().cpu().numpy()
        row['difference'] = float(np.abs(a - b).max() / b.std())
    return row


def run():
    """Time each part and print a line for it."""
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # torch needs room too
    import jax

    import jaxsd
    if FLAGS.version not in jaxsd.versions():
        raise ValueError(f'--version={FLAGS.version}: expected one of {jaxsd.versions()}')
    config = jaxsd.read_config(FLAGS.version)
    found = cases(config, FLAGS.batch)
    known = [*found, 'mixed', 'requests', 'quantized', 'cheaper', 'train_lora', 'train_full']
    if unknown := set(FLAGS.parts) - set(known):
        raise ValueError(f'--parts={",".join(sorted(unknown))}: expected some of {known}')
    print(f'{FLAGS.version}, {FLAGS.dtype}, batch {FLAGS.batch} (mixed: emoji, float32, 16), '
          f'{jax.devices()[0].device_kind} ({platform.machine()}), jax {jax.__version__}, '
          f'against: {FLAGS.against}')
    results = {}
    for part in FLAGS.parts:
        rows = (measure_requests() if part == 'requests' else
                measure_quantized() if part == 'quantized' else
                measure_cheaper() if part == 'cheaper' else
                {part: measure_mixed() if part == 'mixed' else
                 measure_training(part, config) if part.startswith('train_') else
                 measure(*found[part], config)})
        results |= rows
        for name, row in rows.items():
            print(f'{name:5}' + ''.join(f'  {k} {v:.3g}' for k, v in row.items()), flush=True)
    if FLAGS.out:
        with open(FLAGS.out, 'w') as file:
            json.dump({'version': FLAGS.version, 'dtype': FLAGS.dtype, 'results': results}, file)


if __name__ == '__main__':
    define_flags()
    app.run(plain_errors(run))
