"""Training against torch: losses, gradients and steps with diffusers, PEFT and transformers, and
what was trained in diffusers' pipelines, on tiny random models in float32.

One program a family trains everything at once: the model, adapters of four kinds on layers of
their own, a word, and a ControlNet or T2I-Adapter; each is compared by itself.
"""

import dataclasses
import functools
import math
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.training_utils import compute_snr
from flax import traverse_util
from pipelines import STEPS as PICTURE_STEPS
from pipelines import TEXTS, normal, picture, pipeline, random_model, request, tiny
from pipelines import ours as latents_of
from safetensors.torch import load_file
from test_models import nchw

import jaxsd
from jaxsd import Control
from jaxsd.config import TEXT_ENCODERS, ScheduleConfig
from jaxsd.models import spec
from jaxsd.run import decode
from jaxsd.train import loop, losses, methods, optimizers
from jaxsd.train.config import (
    AdapterConfig,
    ControlConfig,
    EmbeddingConfig,
    FullConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxsd.weights import save_network

pytestmark = pytest.mark.parity
STEPS = 10
END = 527  # the id of the end of text
WORD = 300  # the row of torch's table of tokens where the trained word begins
ADAPTERS = {  # kind: layers of its own; linear ones, 1x1 and 3x3 convolutions
    'lora': r'attn1\.to_|\.conv1$|(v|out)_proj',
    'dora': r'attn2\.to_|\.conv2$|k_proj|mlp\.fc1',
    'loha': r'ff\.net|proj_in|time_emb_proj|downsamplers|conv_out|q_proj',
    'lokr': r'proj_out|conv_shortcut|upsamplers|mlp\.fc2',
}
RANK, ALPHA, CONV_RANK, CONV_ALPHA, FACTOR = 2, 1.0, 3, 6.0, 4
LOSSES = {'sd1': LossConfig(weighting='min_snr'),
          'sd2': LossConfig(error='huber'), 'sdxl': LossConfig()}
# Of the numbers that adapters and networks start with. The gradients' errors are at most 4e-6
# then; with other seeds float32 leaves up to 17e-6 to those of DoRA's queries and keys, which are
# small differences of large terms.
SEED = 2
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup=3, weight_decay=0.1, clip=0.5)


def methods_of(family, model):
    """{name: Method}: everything that is trained."""
    rng = np.random.default_rng(0)
    parts = ('unet', *(part for part in TEXT_ENCODERS if part in model.params))
    hint = (('conditioning_embedding_out_channels', (16, 24, 32, 40)),)
    network = ControlConfig(network=() if family == 'sd2' else hint)
    return {
        'full': methods.full(model, FullConfig(parts), rng),
        **{kind: methods.lora(model, AdapterConfig(
            kind, RANK, ALPHA, CONV_RANK, CONV_ALPHA, layers, parts, FACTOR), rng)
           for kind, layers in ADAPTERS.items()},
        'textual_inversion': methods.textual_inversion(
            model, EmbeddingConfig('<thing>', 2, 'apple'), rng),
        'network': methods.METHODS['t2i_adapter' if family == 'sd2' else 'controlnet'](
            model, network, rng)}


def excited(tree):
    """Random numbers where training starts with 0, and a little more everywhere."""
    rng = np.random.default_rng(SEED)

    def excite(a):
        size = 0.05 if a.any() else 0.3 * np.prod(a.shape[:-1]) ** -0.5
        return np.float32(a + size * rng.standard_normal(a.shape))

    return jax.tree.map(excite, jax.device_get(tree))


def batch_of(model):
    """Two examples of noise; their captions name the word, in two blocks."""
    rng, c = np.random.default_rng(1), model.config.unet
    tokens = {}
    for part, tokenizer in model.tokenizers.items():
        ids = rng.integers(1, 250, (2, 2, tokenizer.length))
        ids[..., 0], ids[:, 0, 9:], ids[:, 1, 12:] = END - 1, END, END
        ids[:, 0, 3:5] = -1, -2
        tokens[part] = ids
    batch = {'latent': rng.standard_normal((2, 8, 8, 4), np.float32), 'tokens': tokens,
             'noise': rng.standard_normal((2, 8, 8, 4), np.float32),
             'timesteps': np.int32([201, 742]), 'weight': np.float32([1, 0.3]),
             'hint': rng.integers(0, 256, (2, 64, 64, 3), np.uint8)}
    if c.added_dim:
        batch['time_ids'] = rng.integers(0, 99, (2, 6)).astype(np.float32)
    if c.in_channels == 9:
        batch |= {'image': rng.integers(0, 256, (2, 64, 64, 3), np.uint8),
                  'mask': rng.integers(0, 2, (2, 8, 8, 1)).repeat(8, 1).repeat(8, 2)
                  .astype(np.float32)}
    return batch


def kept():
    """The first part of an optimiser: its state is the gradient."""
    return optax.GradientTransformation(lambda params: params, lambda grads, *_: (grads, grads))


class Ours:
    """Ten steps of training -> losses, first gradients, parameters before and after.

    It trains one vector, which is cut up inside of the loss: the optimiser's part compiles sooner.
    """

    def __init__(self, family, model):
        self.methods, batch = methods_of(family, model), batch_of(model)
        config = self.methods['network'].config
        self.params = excited({name: m.trainable for name, m in self.methods.items()})
        leaves, tree = jax.tree.flatten(self.params)
        vector = np.concatenate([a.reshape(-1) for a in leaves])
        ends = np.cumsum([a.size for a in leaves])[:-1]

        def apart(vector, split=np.split):
            return jax.tree.unflatten(tree, [
                a.reshape(leaf.shape) for a, leaf in zip(split(vector, ends), leaves)])


        def loss(vector, frozen, batch, key):
            trainable, params = apart(vector['all'], jnp.split), frozen
            for name, method in self.methods.items():
                params = method.apply(params, trainable[name])
            return losses.diffusion(params, config, batch, key, LOSSES[family], family == 'sd2')

        tx = optax.chain(kept(), optimizers.optimizer(OPTIMIZER, STEPS, {'all': vector}))
        c = TrainConfig(steps=STEPS, batch_size=2)
        step = jax.jit(loop.make_step(loss, tx, c))
        state, self.losses = loop.start({'all': vector}, tx, c), []
        for i in range(STEPS):
            state, metrics = step(state, self.methods['full'].frozen, batch, jax.random.key(i))
            self.losses.append(float(metrics['loss']))
            if i == 0:
                self.grads = apart(jax.device_get(state.optimizer[0]['all']))
        self.after = apart(jax.device_get(loop.result(state)['all']))


def named(tree):
    """{(method, component, torch's name of a parameter): array in torch's order}."""
    found = {}
    for method, parts in tree.items():
        for component, arrays in parts.items():
            flat = traverse_util.flatten_dict(arrays, sep='.') if isinstance(
                arrays, dict) else {'': arrays}
            for name, array in flat.items():
                if method == 'network':
                    name = name.removeprefix('hint.')
                if method in ('full', 'network'):
                    array = spec.from_jax(name, np.asarray(array))
                found[method, component, name.removeprefix('text_model.')] = np.asarray(array)
    return found


PARTS = {'lora_A': 'down', 'lora_B': 'up', 'lora_magnitude_vector': 'magnitude'}
INSIDE = re.compile(r'(.+)\.(lora_A|lora_B|lora_magnitude_vector|hada_\w+|lokr_\w+)\.(\w+?)'
                    r'(?:\.weight)?')


TABLE = 'embeddings.token_embedding.weight'


def torch_loss(scheduler, c, x0, noise, t, out, weight=1.0):
    """The loss of a network's output, as train_text_to_image.py and, for Huber's,
    train_dreambooth_lora_sdxl... of diffusers."""
    kind = scheduler.config.prediction_type
    target = {'epsilon': lambda: noise, 'sample': lambda: x0,
              'v_prediction': lambda: scheduler.get_velocity(x0, noise, t)}[kind]()
    error = torch.nn.functional.mse_loss(out, target, reduction='none')
    snr = compute_snr(scheduler, t)
    if c.error != 'l2':
        width = {'constant': lambda: torch.full_like(snr, c.huber_c),
                 'exponential': lambda: torch.exp(math.log(c.huber_c) * t / 1000),
                 'snr': lambda: (1 - c.huber_c) / (1 + snr**-0.5) ** 2 + c.huber_c}
        width = width[c.huber_schedule]()[:, None, None, None]
        error = 2 * (torch.sqrt(error + width**2) - width)
        error = width * error if c.error == 'huber' else error
    error = error.mean((1, 2, 3))
    if c.weighting == 'min_snr':
        error = error * torch.clamp(snr, max=c.gamma) / {
            'epsilon': snr, 'v_prediction': snr + 1, 'sample': 1}[kind]
    return (error * weight).mean()


class Theirs:
    """The same training in torch, in float64: all rounding is ours."""

    def __init__(self, family, model, ours, folder, dtype=torch.float64):
        self.family, self.dtype = family, dtype
        pipe = pipeline(diffusers.DiffusionPipeline, model, folder)
        self.modules = {part: getattr(pipe, part) for part in ('unet', *TEXT_ENCODERS)
                        if part in model.params}
        self.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        self.vae = pipe.vae.to(dtype)
        for component, module in self.modules.items():
            self.adapt(component, module)
        network = ours.methods['network'].result(ours.params['network'])
        save_network(network, folder / 'network')
        kind = diffusers.T2IAdapter if family == 'sd2' else diffusers.ControlNetModel
        self.modules['network'] = kind.from_pretrained(folder / 'network')
        self.batch = {k: torch.tensor(v) for k, v in batch_of(model).items() if k != 'tokens'}
        self.tokens = {k: torch.tensor(np.where(v < 0, WORD - 1 - v, v))
                       for k, v in batch_of(model)['tokens'].items()}
        self.parameters = {}
        for component, module in self.modules.items():
            module.to(dtype).requires_grad_(True)
            for name, p in module.named_parameters():
                self.parameters[self.key(component, name)] = p
        values = named(ours.params)
        with torch.no_grad():
            for key, value in values.items():
                if key[0] == 'textual_inversion':
                    table = self.parameters['full', key[2], TABLE]
                    table[WORD:WORD + len(value)] = torch.tensor(value)
                else:
                    p = self.parameters[key]
                    p.copy_(torch.tensor(value.copy()).reshape(p.shape))

    def text(self):
        """The features of the captions, and of SDXL its pooled text and time ids."""
        hidden, pooled, xl = [], None, 'text_encoder_2' in self.modules
        for part, tokens in self.tokens.items():
            blocks = [self.modules[part](block, output_hidden_states=True)
                      for block in tokens.unbind(1)]
            hidden.append(torch.cat([
                b.hidden_states[-2] if xl else b.last_hidden_state for b in blocks], 1))
            pooled = blocks[0][0]
        context = torch.cat(hidden, -1)
        if not xl:
            return {'encoder_hidden_states': context}
        return {'encoder_hidden_states': context, 'added_cond_kwargs': {
            'text_embeds': pooled, 'time_ids': self.batch['time_ids']}}

    def loss(self):
        """As diffusers' scripts have it."""
        b, t = self.batch, self.batch['timesteps']
        x0, noise = (b[name].permute(0, 3, 1, 2).to(self.dtype) for name in ('latent', 'noise'))
        noisy, text = self.scheduler.add_noise(x0, noise, t), self.text()
        hint, more = b['hint'].permute(0, 3, 1, 2).to(self.dtype) / 255, {}
        if self.family == 'sd2':
            more['down_intrablock_additional_residuals'] = list(self.modules['network'](hint))
        else:
            down, mid = self.modules['network'](
                noisy, t, controlnet_cond=hint, return_dict=False, **text)
            more = {'down_block_additional_residuals': down, 'mid_block_additional_residual': mid}
        x = noisy
        if 'mask' in b:  # train_dreambooth_inpaint.py
            mask = b['mask'].permute(0, 3, 1, 2).to(self.dtype)
            around = (b['image'].permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1) * (mask < 0.5)
            around = self.vae.encode(around).latent_dist.mode() * self.vae.config.scaling_factor
            small = torch.nn.functional.interpolate(mask, size=(8, 8))
            x = torch.cat([noisy, small, around], 1)
        out = self.modules['unet'](x, t, **text, **more).sample
        return torch_loss(self.scheduler, LOSSES[self.family], x0, noise, t, out, b['weight'])

    def adapt(self, component, module):
        """Adapters on its layers, all of them at work."""
        names = [name for name, layer in module.named_modules()
                 if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
        wide = r'conv\d?|conv_out'  # names of 3x3 convolutions
        for kind, layers in ADAPTERS.items():
            chosen = [name for name in names if re.search(layers, f'.{name}')]
            if not chosen:
                continue
            common = {'r': RANK, 'target_modules': chosen}
            if any(re.search(rf'\.({wide})$', f'.{name}') for name in chosen):
                common |= {'rank_pattern': {wide: CONV_RANK}, 'alpha_pattern': {wide: CONV_ALPHA}}
            config = {
                'lora': lambda c: peft.LoraConfig(lora_alpha=ALPHA, **c),
                'dora': lambda c: peft.LoraConfig(lora_alpha=ALPHA, use_dora=True, **c),
                'loha': lambda c: peft.LoHaConfig(alpha=ALPHA, **c),
                'lokr': lambda c: peft.LoKrConfig(alpha=ALPHA, decompose_factor=FACTOR, **c),
            }[kind](common)
            peft.inject_adapter_in_model(config, module, kind)
        for layer in module.modules():
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                layer.set_adapter([kind for kind in ADAPTERS if any(
                    kind in getattr(layer, part) for part in layer.adapter_layer_names)])

    def train(self):
        """Ten steps -> losses, {key: first gradient} and {key: parameter after} as `named`."""
        parameters, o = list(self.parameters.values()), OPTIMIZER
        optimizer = torch.optim.AdamW(parameters, o.learning_rate, (o.b1, o.b2), o.eps,
                                      o.weight_decay)
        rate = get_constant_schedule_with_warmup(optimizer, o.warmup)
        found, grads = [], {}
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            for p in parameters:  # which torch would not let decay: SDXL's last layers of text
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads = grads or self.apart({key: p.grad for key, p in self.parameters.items()})
            torch.nn.utils.clip_grad_norm_(parameters, o.clip)
            optimizer.step()
            rate.step()
            found.append(loss.item())
        return found, grads, self.apart(self.parameters)

    def apart(self, tensors):
        """Copies as numpy arrays; the word's rows of the table by themselves."""
        found = {key: t.detach().clone().numpy() for key, t in tensors.items()}
        for part in self.tokens:
            table = found['full', part, TABLE]
            found['textual_inversion', 'embeddings', part] = table[WORD:WORD + 2]
            found['full', part, TABLE] = np.delete(table, [WORD, WORD + 1], 0)
        return found

    def key(self, component, name):
        """What `named` calls a parameter."""
        if component == 'network':
            return 'network', 'controlnet', name
        name = name.removeprefix('text_model.')
        inside = INSIDE.fullmatch(name)
        if inside:
            layer, part, kind = inside.groups()
            return kind, component, f'{layer}.{PARTS.get(part, part)}'
        return 'full', component, name.replace('.base_layer', '')


@pytest.fixture(scope='module')
def trained(tokenizer_folder, tmp_path_factory):
    """trained('sd1') -> (Model, Ours, what Theirs.train gives)."""
    @functools.cache
    def train(family):
        config = tiny(family, levels=2 if family == 'sdxl' else 4,
                      **{'in_channels': 9} if family == 'sd2' else {})
        # Without the id transformers takes the highest one, that of a word that diffusers adds.
        texts = {part: dataclasses.replace(getattr(config, part), eos_token_id=END)
                 for part in TEXT_ENCODERS if getattr(config, part)}
        model = random_model(config.replace(**texts), tokenizer_folder)
        ours = Ours(family, model)
        theirs = Theirs(family, model, ours, tmp_path_factory.mktemp('trained') / family)
        return model, ours, theirs.train()

    return train


def compare(ours, theirs, method, tolerance):
    """Norms of differences, of each tensor by itself, relative to torch's tensor."""
    ours = {key: array for key, array in named(ours).items() if key[0] == method}
    assert ours and ours.keys() == {key for key in theirs if key[0] == method}
    for key, array in ours.items():
        expected = theirs[key].reshape(theirs[key].shape if key[2] == TABLE else array.shape)
        if key[2] == TABLE:
            array = np.delete(array, [WORD, WORD + 1], 0)
        error, size = np.linalg.norm(array - expected), np.linalg.norm(expected)
        assert error <= tolerance * size, (key, error, size)
    return len(ours)


LOSS_CASES = {
    'plain': {}, 'min_snr': {'weighting': 'min_snr'},
    'gamma': {'weighting': 'min_snr', 'gamma': 1.0},
    'huber': {'error': 'huber', 'huber_schedule': 'constant', 'huber_c': 0.2},
    'huber snr': {'error': 'huber'}, 'smooth_l1': {'error': 'smooth_l1'},
    'both': {'error': 'huber', 'huber_schedule': 'exponential', 'weighting': 'min_snr'},
    'offset': {'noise_offset': 0.3},
    'perturbed': {'noise_offset': 0.3, 'input_perturbation': 0.1}}


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('case', LOSS_CASES)
def test_losses_of_a_network_that_is_known(monkeypatch, kind, case):
    """a x + b for the network: the loss and its gradients of a and b, with drawn noise."""
    c = LossConfig(**LOSS_CASES[case])
    monkeypatch.setattr(losses, 'predict', lambda p, config, batch, x, *_: p['a'] * x + p['b'])
    config = tiny('sd1')
    config = config.replace(schedule=ScheduleConfig(prediction_type=kind))
    rng, key = np.random.default_rng(0), jax.random.key(5)
    params = {name: rng.standard_normal((4, 8, 8, 4), np.float32) for name in 'ab'}
    batch = {'latent': rng.standard_normal((4, 8, 8, 4), np.float32), 'pooled': None,
             'context': np.zeros((4, 7, 32), np.float32), 'timesteps': np.int32([0, 90, 500, 999])}
    value, grads = jax.jit(jax.value_and_grad(
        lambda p: losses.diffusion(p, config, batch, key, c)[0]))(params)

    drawn = jax.random.split(key, 4)[1]
    white, offset = (losses.draw_noise(drawn, (4, 8, 8, 4), dataclasses.replace(
        c, noise_offset=size)) for size in (0.0, c.noise_offset))
    shift = np.asarray(offset - white)
    assert np.ptp(shift, (1, 2)).max() < 1e-6
    assert not c.noise_offset or 0.5 < shift[:, 0, 0].std() / c.noise_offset < 1.5
    noise = torch.tensor(np.asarray(offset), dtype=torch.float64)
    more = c.input_perturbation * np.asarray(
        jax.random.normal(jax.random.fold_in(key, 1), noise.shape))
    x0, t = torch.tensor(batch['latent']).double(), torch.tensor(batch['timesteps'])
    a, b = (torch.tensor(params[name]).double().requires_grad_() for name in 'ab')
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, prediction_type=kind,
                                        beta_schedule='scaled_linear')
    out = a * scheduler.add_noise(x0, noise + torch.tensor(more), t) + b
    expected = torch_loss(scheduler, c, x0, noise, t, out)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for found, wanted in ((grads['a'], a.grad), (grads['b'], b.grad)):
        found, wanted = (np.asarray(array).reshape(4, -1) for array in (found, wanted))
        error = np.linalg.norm(found - wanted, axis=1)  # of each example: their weights differ
        assert (error <= 1e-5 * np.linalg.norm(wanted, axis=1)).all()


METHODS = ('full', *ADAPTERS, 'textual_inversion', 'network')


@pytest.mark.parametrize('family', LOSSES)
def test_losses_of_ten_steps(trained, family):
    _, ours, (losses, _, _) = trained(family)
    np.testing.assert_allclose(ours.losses[0], losses[0], rtol=1e-5)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-4)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('family', LOSSES)
def test_every_gradient(trained, family, method):
    _, ours, (_, grads, _) = trained(family)
    grads, mine = dict(grads), dict(ours.grads)
    if method == 'full':  # a constant in all scores of a query does not change their softmax
        for part in ours.methods['full'].trainable.keys() - {'unet'}:
            arrays = mine['full'][part]
            zero = [name for name in arrays if name.endswith('k_proj.bias')]
            for name in zero:
                size = np.linalg.norm(arrays[name.replace('k_proj', 'q_proj')])
                key = 'full', part, name.removeprefix('text_model.')
                assert max(np.linalg.norm(arrays[name]), np.linalg.norm(grads.pop(key))) <= (
                    1e-5 * size)
            mine['full'] = mine['full'] | {part: {
                name: a for name, a in arrays.items() if name not in zero}}
    assert compare(mine, grads, method, 1e-5) >= len(ours.methods[method].trainable)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('family', LOSSES)
def test_parameters_after_ten_steps_of_adamw(trained, family, method):
    _, ours, (_, _, after) = trained(family)
    compare(ours.after, after, method, 1e-4)
    moved = [np.abs(a - b).max() for a, b in zip(*map(
        jax.tree.leaves, (ours.after[method], ours.params[method])))]
    assert max(moved) > 2e-3


PIPELINES = {'sd1': diffusers.StableDiffusionControlNetPipeline,
             'sdxl': diffusers.StableDiffusionXLPipeline}


@pytest.fixture(scope='module')
def untrained(trained, tmp_path_factory):
    """untrained('sd1') -> (Model with a word and for 1.x a ControlNet, diffusers' pipeline of it,
    our picture)."""
    @functools.cache
    def model_of(family):
        model, ours, _ = trained(family)
        start = {name: method.result(method.trainable) for name, method in ours.methods.items()}
        folder = tmp_path_factory.mktemp('untrained')
        save_network(start['network'], folder / 'hint')
        controls = {'hint': start['network']} if family == 'sd1' else {}
        return folder, model, model.replace(
            embeddings={'thing': start['textual_inversion']}, controlnets=controls)

    def make(family):
        folder, model, with_all = model_of(family)
        pipe = pipeline(diffusers.DiffusionPipeline, model, folder / 'model')
        if family == 'sd1':
            pipe = controlled(pipe, folder / 'hint')
        name_word(pipe, with_all.embeddings['thing'], folder)
        return with_all, pipe, our_picture(with_all)

    return make


def controlled(pipe, folder):
    """diffusers' pipeline with a ControlNet from a folder."""
    pipe = PIPELINES['sd1'](**pipe.components | {
        'controlnet': diffusers.ControlNetModel.from_pretrained(folder)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def name_word(pipe, embedding, folder):
    """Write a textual inversion and load it in a pipeline, as diffusers' documentation says."""
    path = folder / 'thing.safetensors'
    jaxsd.save_embedding(embedding, path, overwrite=True)
    if len(embedding.vectors) == 1:
        return pipe.load_textual_inversion(path)
    tensors = load_file(path)
    pipe.load_textual_inversion(tensors['clip_l'], token='<thing>')
    return pipe.load_textual_inversion(tensors['clip_g'], token='<thing>',
                                       tokenizer=pipe.tokenizer_2, text_encoder=pipe.text_encoder_2)


def our_picture(model):
    """uint8 [H,W,3]."""
    size = 8 * model.config.vae.factor
    controls = [Control('hint', picture(0, size))] if model.controlnets else []
    asked = request(prompt='a <thing> apple', width=size, height=size, controls=controls)
    image, _ = _decode(model.params, model.config, latents_of(model, [asked], normal(1)))
    return np.asarray(image)[0]


_decode = jax.jit(decode, static_argnums=1)


def their_picture(pipe, model):
    """float [H,W,3], of 255."""
    kept = {k: v for k, v in pipe.scheduler.config.items() if k.startswith('beta')}
    pipe.scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing='trailing', **kept)
    size = 8 * model.config.vae.factor
    hint = {'image': picture(0, size)} if model.controlnets else {}
    return 255 * pipe(**TEXTS | {'prompt': 'a <thing> apple'}, **hint, height=size, width=size,
                      num_inference_steps=PICTURE_STEPS, guidance_scale=5.0,
                      latents=nchw(normal(1)), output_type='np').images[0]


def compare_pictures(model, pipe, before):
    """Within 1 of 255 of each other, and not as before."""
    found, expected = our_picture(model), their_picture(pipe, model)
    assert found.shape == expected.shape and expected.std() > 12
    assert np.abs(found - expected).max() <= 1
    assert np.abs(np.float32(found) - before).max() > 3  # what was trained is seen


@pytest.mark.parametrize('kind, layout', [  # diffusers leaves the norms out of kohya's DoRAs
    ('lora', 'kohya'), ('lora', 'diffusers'), ('dora', 'diffusers')])
@pytest.mark.parametrize('family', PIPELINES)
def test_pictures_of_an_adapter(trained, untrained, family, kind, layout, tmp_path):
    _, ours, _ = trained(family)
    model, pipe, before = untrained(family)
    adapter = ours.methods[kind].result(ours.after[kind])
    path = tmp_path / 'style.safetensors'
    jaxsd.save_adapter(adapter, path, layout)
    pipe.load_lora_weights(path)
    compare_pictures(jaxsd.merge(model, {adapter: 1}), pipe, before)


@pytest.mark.parametrize('family', PIPELINES)
def test_pictures_of_a_word(trained, untrained, family, tmp_path):
    _, ours, _ = trained(family)
    model, pipe, before = untrained(family)
    word = ours.methods['textual_inversion'].result(ours.after['textual_inversion'])
    pipe.unload_textual_inversion()
    if family == 'sdxl':
        pipe.unload_textual_inversion(tokenizer=pipe.tokenizer_2, text_encoder=pipe.text_encoder_2)
    name_word(pipe, word, tmp_path)
    compare_pictures(model.replace(embeddings={'thing': word}), pipe, before)


def test_pictures_of_a_controlnet(trained, untrained, tmp_path):
    _, ours, _ = trained('sd1')
    model, pipe, before = untrained('sd1')
    network = ours.methods['network'].result(ours.after['network'])
    save_network(network, tmp_path / 'hint')
    pipe = controlled(pipe, tmp_path / 'hint')
    compare_pictures(model.replace(controlnets={'hint': network}), pipe, before)
