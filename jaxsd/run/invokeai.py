"""What InvokeAI writes into its pictures, as settings here: `invokeai_metadata`
(invokeai/app/invocations/metadata.py), and of versions up to 2 `sd-metadata` and `Dream`
(ldm/invoke/args.py)."""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from jaxsd.sampling import schedulers

Found = tuple[dict[str, Any], dict[str, Any], list[str]]

LONGEST = 2**20  # characters
_DPM = 'DPMSolverMultistep'
# invokeai/backend/stable_diffusion/schedulers/schedulers.py: their class and settings; with `_k`
# behind the name, on Karras' levels.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    'ddim': ('DDIM', {}), 'ddpm': ('DDPM', {}), 'deis': ('DEISMultistep', {}),
    'lms': ('LMSDiscrete', {}), 'pndm': ('PNDM', {}), 'heun': ('HeunDiscrete', {}),
    'euler': ('EulerDiscrete', {}), 'euler_a': ('EulerAncestralDiscrete', {}),
    'kdpm_2': ('KDPM2Discrete', {}), 'kdpm_2_a': ('KDPM2AncestralDiscrete', {}),
    'dpmpp_2s': ('DPMSolverSinglestep', {}), 'dpmpp_2m': (_DPM, {}),
    'dpmpp_3m': (_DPM, {'solver_order': 3}),
    'dpmpp_2m_sde': (_DPM, {'algorithm_type': 'sde-dpmsolver++'}),
    'unipc': ('UniPCMultistep', {}), 'lcm': ('LCM', {}), 'tcd': ('TCD', {})}
NOISY = ('euler_a', 'kdpm_2_a', 'ddpm', 'dpmpp_2m_sde', 'lcm', 'tcd')  # that draw noise in steps
# Settings of the scheduler in a model's folder, which stay: those of the released 1.x and SDXL.
FOLDERS = {'sd-1': {'steps_offset': 1, 'set_alpha_to_one': False, 'skip_prk_steps': True},
           'sdxl': {'steps_offset': 1, 'set_alpha_to_one': False, 'skip_prk_steps': True,
                    'timestep_spacing': 'leading'}}
OLD = {  # samplers of versions up to 2
    'ddim': 'ddim', 'plms': 'plms', 'k_lms': 'lms', 'k_heun': 'heun', 'k_euler': 'euler',
    'k_euler_a': 'euler_ancestral', 'k_dpm_2': 'dpm_2', 'k_dpm_2_a': 'dpm_2_ancestral',
    'k_dpmpp_2': 'dpmpp_2m', 'k_dpmpp_2_a': 'dpmpp_2s_ancestral'}
KARRAS_MAX = 29  # steps from which on their k_ samplers are on the model's own levels
DREAM = {'-s': 'steps', '-S': 'seed', '-W': 'width', '-H': 'height', '-C': 'cfg_scale',
         '-A': 'sampler', '-f': 'strength', '-I': 'init_img'}
# Keys that change nothing, or that are read beside others.
HARMLESS = ('generation_mode', 'app_version', 'rand_device', 'app_id', 'model_hash', 'type',
            'init_image', 'init_img', 'clip_skip', 'model_id', 'hrf_method', 'hrf_strength',
            'z_image_seed_variance_enabled', 'orig_hash', 'fit')
PLAIN = {'positive_prompt': ('prompt', str), 'negative_prompt': ('negative_prompt', str),
         'seed': ('seed', int), 'steps': ('steps', int), 'cfg_scale': ('guidance', float),
         'width': ('width', int), 'height': ('height', int),
         'positive_style_prompt': ('prompt_2', str), 'negative_style_prompt': (
             'negative_prompt_2', str), 'strength': ('strength', float)}
LEFT_OUT = {'controlnets': 'ControlNets are left out, as their hints are not in the text: give '
            'them as --control', 't2iAdapters': 'T2I-Adapters are left out, as their hints are not '
            'in the text: give them as --control', 'ipAdapters': 'IP-Adapters are left out, as '
            'their pictures are not in the text: give them as --image_prompt'}


def read(texts: Mapping[str, str]) -> Found | None:
    """A picture's texts -> (arguments of a Request, {'model'}, a line for each thing that cannot
    be honoured); None where InvokeAI wrote none of them. Raises ValueError for what is damaged."""
    low = {key.lower(): text for key, text in texts.items()}
    for key in ('invokeai_metadata', 'sd-metadata', 'dream'):
        text = low.get(key)
        if not text:
            continue
        if len(text) > LONGEST:
            raise ValueError(f'{key}: {len(text)} characters: expected at most {LONGEST}')
        if key == 'dream':
            return _old(_dream(text), {})
        try:
            found = json.loads(text)
            if not isinstance(found, dict):
                raise ValueError
        except (ValueError, RecursionError):
            raise ValueError(f'{key}: expected JSON, as InvokeAI writes it') from None
        image = found.get('image')
        if key == 'sd-metadata':
            return _old(image, found) if isinstance(image, dict) else None
        return _new(found)
    return None


def _new(given):
    """`invokeai_metadata`."""
    notes, given = [], {key: value for key, value in given.items()
                        if value not in (None, [], False, '')}
    fields = {'prompt': '', 'negative_prompt': '', 'weighting': 'compel',
              'noise': 'torch' if given.get('rand_device', 'cpu') == 'cpu' else 'philox'}
    fields |= _plain(given, notes)
    model = _named(given.pop('model', None))
    scheduler = given.pop('scheduler', 'euler')
    fields |= _scheduler(scheduler, model.get('base'), notes)
    if str(scheduler).removesuffix('_k') in NOISY and 'seed' in fields:
        # Drawn on the GPU, by the seed with all of its 32 bits flipped (denoise_latents.py).
        fields |= {'step_noise': 'philox',
                   'eta_noise_seed_delta': (fields['seed'] ^ 0xFFFFFFFF) - fields['seed']}
    axes = ''.join(axis for axis in 'xy' if given.pop(f'seamless_{axis}', None) is True)
    if axes:
        fields['tiling'] = axes
    skip = given.get('clip_skip', 0)
    if isinstance(skip, int) and skip > 0:
        fields['clip_skip'] = skip + 1
    if rescale := given.pop('cfg_rescale_multiplier', None):
        fields['guidance_options'] = {'rescale': rescale}
    loras = {}
    for lora in given.pop('loras', ()) if isinstance(given.get('loras', ()), list) else ():
        lora = lora if isinstance(lora, dict) else {}
        weight, name = lora.get('weight', 0.75), _named(lora.get('model', lora.get('lora')))
        if name.get('name') and isinstance(weight, (int, float)):
            loras[name['name']] = weight
        else:
            notes.append('a LoRA of it is not understood')
    if loras:
        fields['adapters'] = loras
    for key, text in LEFT_OUT.items():
        if given.pop(key, None):
            notes.append(text)
    if vae := _named(given.pop('vae', None)).get('name'):
        notes.append(f'{vae!r} is not known by its name alone: give its file as --vae')
    if refiner := _named(given.pop('refiner_model', None)).get('name'):
        notes.append(f'{refiner!r} is not known by its name alone: give its file as --refiner; '
                     f'there it begins at {given.pop("refiner_start", 0.8)}')
    given = {key: value for key, value in given.items() if not key.startswith('refiner_')}
    if given.pop('hrf_enabled', None):
        notes.append('its second pass at a larger size is left out: see --hires')
    return _ended(fields, model, given, notes)


def _old(image, found):
    """`sd-metadata`, or what `Dream` says."""
    notes = []
    given = {key: value for key, value in image.items() if value not in (None, [], False, 0, '')}
    prompts = given.pop('prompt', '')
    if isinstance(prompts, list):
        parts = [part for part in prompts if isinstance(part, dict)]
        if len(parts) > 1:
            notes.append('it mixes several prompts: read is the first one')
        prompts = str(parts[0].get('prompt', '')) if parts else ''
    # What stands in brackets is kept out (ldm/invoke/conditioning.py).
    negative = ' '.join(re.findall(r'\[([^\[\]]*)\]', str(prompts)))
    prompt = ' '.join(re.sub(r'\[[^\[\]]*\]', ' ', str(prompts)).split())
    fields = {'prompt': prompt, 'negative_prompt': negative, 'weighting': 'compel',
              'noise': 'philox', **_plain(given, notes)}
    if given.pop('seamless', None) is True:
        fields['tiling'] = 'xy'
    name = given.pop('sampler', 'k_lms')
    if name in OLD:
        karras = str(name).startswith('k_') and fields.get('steps', 50) < KARRAS_MAX
        fields |= {'sampler': OLD[name], 'schedule': 'karras' if karras else
                   'normal' if str(name).startswith('k_') else 'ddim_uniform'}
    else:
        notes.append(f'sampler: {str(name)[:80]} is not known here: name one as --sampler')
    model = {'name': found.get('model_weights')} if isinstance(
        found.get('model_weights'), str) else {}
    if given.get('init_img') or str(given.get('type', '')) in ('img2img', 'inpaint'):
        given['init_image'] = True
    return _ended(fields, model, given, notes)


def _ended(fields, model, given, notes):
    """What is common to all versions; given: keys that are not read yet."""
    if fields.get('strength') is not None and (given.get('init_image') or 'img2img' in str(
            given.get('generation_mode'))):
        notes.append('the picture that it was made from is not in the text: give it as --image')
    else:
        fields.pop('strength', None)
    notes += [f'{key}: {" ".join(str(value).split())[:80]} is not honoured'
              for key, value in given.items() if key not in HARMLESS]
    return fields, {'model': model['name']} if model.get('name') else {}, notes


def _plain(given, notes):
    """Keys that are fields of a Request; takes them out of `given`."""
    found = {}
    for key, (name, kind) in PLAIN.items():
        value = given.pop(key, None)
        if isinstance(value, list) and value and key == 'cfg_scale':  # one a step
            value = value[0]
            notes.append('cfg_scale: one for each step is not honoured, but the first one')
        whole = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and (whole if kind is not str else isinstance(value, str)):
            found[name] = kind(value)
        elif value is not None:
            notes.append(f'{key}: {str(value)[:80]} is not understood')
    return found


def _scheduler(name, base, notes):
    """A scheduler's name and the kind of the model -> sampler and schedule, as diffusers'."""
    plain = str(name).removesuffix('_k')
    if plain not in SCHEDULERS:
        notes.append(f'scheduler: {str(name)[:80]} is not known here: name one as --sampler')
        return {}
    kind, own = SCHEDULERS[plain]
    settings = {'_class_name': kind, 'clip_sample': False, **FOLDERS.get(base, FOLDERS['sd-1']),
                **own, **({'use_karras_sigmas': True} if str(name).endswith('_k') else {})}
    sampler, options = schedulers.sampler_of(settings)
    return {'sampler': sampler, 'sampler_options': options, 'schedule': 'diffusers',
            'schedule_options': schedulers.level_options(settings)}


def _named(model):
    """A model as any version writes it -> {'name', 'base'}."""
    if not isinstance(model, dict):
        return {'name': model} if isinstance(model, str) else {}
    name, base = model.get('name', model.get('model_name')), model.get(
        'base', model.get('base_model'))
    return {'name': name if isinstance(name, str) else '', 'base': base if isinstance(
        base, str) else ''}


def _dream(text):
    """'"a cat" -s 50 -S 7 -W 512 ...' -> the same as a dict."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    first = next((i for i, word in enumerate(words) if re.match('--?[a-zA-Z]', word)), len(words))
    found: dict[str, Any] = {'prompt': ' '.join(words[:first])}
    rest = iter(words[first:])
    for word in rest:
        flag, value = (word[:2], word[2:]) if word[:2] in DREAM else (word, '')
        if flag not in DREAM:
            found[word.lstrip('-')] = 'given'
            continue
        value = value or next(rest, '')
        try:
            found[DREAM[flag]] = float(value) if '.' in value else int(value)
        except ValueError:
            found[DREAM[flag]] = value
    return found
