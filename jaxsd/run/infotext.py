"""How a picture was made, read back from its file: our own record, or what A1111, ComfyUI and
InvokeAI write."""

import json
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxsd import images
from jaxsd.config import ModelConfig
from jaxsd.run import comfyui, invokeai, picture
from jaxsd.run.request import MAX_SIDE, Control, ImagePrompt, Reference, Region, Request
from jaxsd.sampling import BROWNIAN, plugins, schedule_file
from jaxsd.sampling.names import SCHEDULE_NAMES, find_sampler
from jaxsd.typing import Path

# Fields of a Request, and what else is in a record, that name files, folders and models.
PATHS = ('image', 'mask', 'depth', 'schedule', 'wildcards', 'controls', 'image_prompts', 'regions',
         'reference')
NAMES = ('checkpoint', 'base', 'vae', 'refiner', 'control', 'lora', 'embeddings', 'upscalers',
         'ip_adapter', 'image_encoder', 'detectors')


class Metadata(NamedTuple):
    """fields: arguments of a Request. run: what else `picture.record` was given (checkpoint,
    dtype, vae ...), empty for pictures of other programs. notes: a line for each thing that cannot
    be honoured. files: {path: digest} of the files that the picture was made from. hashes: of
    weights, {'model', 'vae', 'lora:NAME': digits}, for `hashes.differences`."""

    fields: dict[str, Any]
    run: dict[str, Any]
    notes: list[str]
    files: Mapping[str, str] = MappingProxyType({})
    hashes: Mapping[str, str] = MappingProxyType({})

    def named(self) -> dict[str, Any]:
        """What of it names files, folders and models, {name of the field or of the run's: value}.
        Whoever made the picture chose them: they may lead anywhere."""
        fields = {name: self.fields.get(name) for name in PATHS}
        if not isinstance(fields['wildcards'], str):  # the lists themselves
            fields.pop('wildcards')
        if schedule_file(fields['schedule']) is None:
            fields.pop('schedule')
        named = fields | {name: self.run.get(name) for name in NAMES}
        return {name: value for name, value in named.items() if value}

    def check_files(self, names: Collection[str] = PATHS) -> None:
        """Raises ValueError where a file that these fields name has changed since, and
        FileNotFoundError where it is gone."""
        given = [self.fields.get(name) for name in names
                 if name not in ('controls', 'image_prompts', 'regions', 'reference')]
        if 'controls' in names:
            given += [control.image for control in self.fields.get('controls', ())]
        if 'image_prompts' in names:
            given += [source for prompt in self.fields.get('image_prompts', ())
                      for source in prompt.sources]
        if 'regions' in names:
            given += [region.mask for region in self.fields.get('regions', ())]
        if 'reference' in names and (reference := self.fields.get('reference')):
            given.append(reference.image)
        for path in map(_file_named, given):
            if path in self.files and picture.digest(path) != self.files[path]:
                raise ValueError(f'{path} has changed since the picture was made from it')


def _file_named(value):
    """The file that a field's value names: a schedule's stands in its name."""
    return schedule_file(value) or value if isinstance(value, str) else value


def read(path: Path, upscalers: Collection[str] = ()) -> Metadata:
    """A picture's file -> Metadata. Opens no file but this one.

    A PNG of ours tells everything; of PNG, JPEG and WebP files of other programs the text is read
    that stable-diffusion-webui (A1111) writes, else InvokeAI's or ComfyUI's. Raises ValueError
    where there is none, and for a record with values that no request and no command line takes.
    """
    return from_texts(path, _texts(path))


def from_texts(name: Path, texts: Mapping[str, str],
               upscalers: Collection[str] = ()) -> Metadata:
    """`read` of a picture's texts, {keyword: text}; name: what errors call it."""
    if 'jaxsd' in texts:
        return _recorded(name, texts['jaxsd'])
    if texts.get('parameters'):
        return foreign(texts['parameters'], upscalers)
    try:
        found = invokeai.read(texts) or comfyui.read(texts.get('prompt', ''))
        if found is not None:
            Request(**found[0] | ({'image': 'given later'} if 'strength' in found[0] else {}))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f'{name}: {brief(error)}') from None
    if found is None:
        raise ValueError(f'{name} does not say how it was made: expected the text that this '
                         'program, stable-diffusion-webui, ComfyUI or InvokeAI writes into its '
                         'pictures')
    fields, run, notes = found
    return Metadata(fields, run, notes)


def _texts(path):
    """The text chunks of a PNG, and the EXIF user comment as 'parameters'."""
    from PIL import Image
    try:
        data = pathlib.Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f'no such file: {path}') from None
    texts, exif = images.read_texts(data, path, Image.MAX_IMAGE_PIXELS)
    return ({'parameters': comment(exif)} if exif else {}) | texts


def comment(value: str | bytes) -> str:
    """EXIF's user comment: 8 bytes that name the code, then text; UTF-16 in either order."""
    if isinstance(value, str):
        return value
    code, text = value[:8], value[8:]
    if code.startswith(b'UNICODE'):
        low = text[1::2].count(0) > text[::2].count(0)  # ASCII's zeros come second
        return text.decode('utf-16-le' if low else 'utf-16-be', 'replace')
    return text.decode('utf-8', 'replace')


# Our own record.


MOST = 2**12  # pictures that one program makes at once
RECORD = 2**20  # characters; Pillow reads no more either


def _text(value):
    return isinstance(value, str)


def _several(value):
    return isinstance(value, list) and all(map(_text, value))


def _flag(value):
    return isinstance(value, bool)


def _whole(low, high):
    return lambda value: type(value) is int and low <= value <= high


RUN = {  # what `picture.record` is given beside the request, where it is given
    **dict.fromkeys(('checkpoint', 'base', 'dtype', 'quantize', 'prediction', 'vae', 'refiner',
                     'model', 'device', 'id'), _text),
    **dict.fromkeys(('control', 'lora', 'embeddings', 'upscalers', 'ip_adapter', 'image_encoder',
                     'detectors', 'plugin'), _several),
    **dict.fromkeys(('ema', 'offload', 'strays'), _flag),
    'slots': _whole(1, MOST),
    'tile': _whole(0, MAX_SIDE),
    'hint_size': lambda value: isinstance(value, list) and list(
        map(_whole(1, MAX_SIDE), value)) == [True, True],
    'versions': lambda value: isinstance(value, dict) and all(map(_text, value.values())),
    'plugins': lambda value: isinstance(value, dict) and all(
        ' ' in key and _text(code) for key, code in value.items()),
}
# Of them, those that are never None.
SURE = ('checkpoint', 'dtype', 'ema', 'offload', 'tile', 'slots')


def _recorded(path, text):
    if len(text) > RECORD:
        raise ValueError(f'{path}: its record has {len(text)} characters: expected at most '
                         f'{RECORD}')
    try:
        run = json.loads(text)
        versions, files = run['versions'], run.pop('files', {})
        hashes = run.pop('hashes', {})
        found = {name: tuples(value) for name, value in run.pop('request').items()}
        controls, image = found.pop('controls', ()), found.get('image')
        hints = [dict(control) for control in controls]
        looks = [dict(prompt) for prompt in found.pop('image_prompts', ())]
        regions = [dict(region) for region in found.pop('regions', ())]
        follows = dict(found.pop('reference', None) or {})
        if not _text(found['prompt']) or not all(
                map(_text, [*files.values(), *hashes.values()])):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f'{path}: its record is damaged, expected the JSON that this program '
                         'writes') from None
    for name, check in RUN.items():
        if name in run and not check(run[name]) and (run[name] is not None or name in SURE):
            raise ValueError(f'{path}: its record is damaged: {name}={brief(run[name])}')
    try:
        plugins.changed(run.get('plugins') or {})
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    notes = []
    for name in [name for name in found if name not in Request.__dataclass_fields__]:
        notes.append(f'{name}={brief(found.pop(name))}: unknown here, written by jaxsd '
                     f'{versions.get("jaxsd")}')
    for name in [name for name, value in found.items() if _lost(value)]:
        notes.append(f'{name}: was given as an array, which the record does not hold')
        found[name] = None
    if image is None:
        found.pop('strength', None)  # so that an image given now has the default
    try:
        if 'control' in run:  # how to make the hints again
            run['hints'] = [hint['image'] for hint in hints]
            if len(hints) != len(run['control']):
                raise ValueError(f'{len(run["control"])} ControlNets and {len(hints)} hints')
        else:
            kept = [hint for hint in hints if not _lost(hint['image'])]
            notes += [f'ControlNet {hint["net"]!r}: its hint was given as an array, which the '
                      'record does not hold' for hint in hints if hint not in kept]
            found['controls'] = tuple(Control(**hint) for hint in kept)
        arrays = [look for look in looks if any(
            _lost(value) for values in look.values()
            for value in (values if isinstance(values, tuple) else (values,)))]
        notes += [f'image prompt {look["net"]!r}: was given as an array, which the record does '
                  'not hold' for look in arrays]
        found['image_prompts'] = tuple(ImagePrompt(**look) for look in looks if look not in arrays)
        for source in [s for prompt in found['image_prompts'] for s in prompt.sources]:
            if not isinstance(source, (str, type(None))):
                raise ValueError(f'image_prompts: {source!r}: expected a path')
        lost = [region for region in regions if _lost(region.get('mask'))]
        notes += [f'region {brief(region.get("prompt"))!r}: its mask was given as an array, which '
                  'the record does not hold' for region in lost]
        found['regions'] = tuple(Region(**region) for region in regions if region not in lost)
        for region in found['regions']:
            if not isinstance(region.mask, (str, type(None))):
                raise ValueError(f'regions: {region.mask!r}: expected a path')
        if follows and _lost(follows['image']):
            notes.append('reference: was given as an array, which the record does not hold')
        elif follows:
            found['reference'] = Reference(**follows)
            if not isinstance(found['reference'].image, str):
                raise ValueError(f'reference: {follows["image"]!r}: expected a path')
        Request(**found | {'image': image or 'given later'})
        for name in ('image', 'mask', 'depth', 'wildcards'):
            kinds = (str, type(None), *[dict] * (name == 'wildcards'))
            if not isinstance(found.get(name), kinds):
                raise ValueError(f'{name}={found[name]!r}: expected a path')
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f'{path}: its record is damaged: {brief(error)}') from None
    return Metadata(found, run, notes, files, hashes)


def brief(value: object) -> str:
    """What a file says, as an error or a note tells it: of one line, and not long."""
    text = ' '.join(str(value).split())
    return text if len(text) <= 200 else f'{text[:200]}...'


def tuples(value: Any) -> Any:
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def _lost(value):
    return isinstance(value, dict) and 'sha256' in value


def differences(run: Mapping[str, Any]) -> str:
    """What of a record's versions, device and plugins is otherwise here: a line, '' for nothing."""
    then = {**run['versions'], 'device': run.get('device')}
    now = {**picture.versions(), 'device': picture.device()}
    changed = [f'{name} {value}, here {now[name]}' for name, value in then.items()
               if value and name in now and value != now[name]]
    notes = [f'made with {"; ".join(changed)}: the last bits may differ'] if changed else []
    if other := plugins.changed(run.get('plugins') or {}):
        notes.append(f'made with other code of {", ".join(other)}: the picture may differ')
    return '; '.join(notes)


# What A1111 writes.

LONGEST = 2**18  # characters; A1111 and its kin write a few thousand
# A1111's own pairs; a run of letters is taken whole, so that one without a colon is read once. A
# line that begins with a key ends the value before it, as a comma does.
KEY = re.compile(r'[ \-/]*+(?:(\w[\w \-/]++)(:\s*+)?|.)?', re.DOTALL)
VALUE = re.compile(r'''("(?:\\.|[^\\"])++"(?=[,\n]|$)|(?:[^,\n]|\n(?!\w[\w \-/]++:))*+),?+''',
                   re.DOTALL)
STEPS, STEPS_LINE = re.compile(r'(?<!\S)Steps: *+\d'), re.compile(r'^[ \t]*+Steps: *+\d', re.M)
TEMPLATE = re.compile(r'^(Template|Negative Template):', re.M)  # of sd-dynamic-prompts
SETTING = re.compile(r'\b(steps|sampler|seed|cfg scale)\s*+[:=]', re.I)
HASH = re.compile('[0-9a-fA-F]{8,64}')
# Nothing that changes a picture, or told elsewhere in the text.
HARMLESS = ('Version', 'Model hash', 'VAE hash', 'Lora hashes', 'TI hashes', 'Hashes', 'User',
            'Batch size', 'Batch pos', 'Init image hash', 'Downcast alphas_cumprod', 'Pad conds',
            'Wildcard prompt', 'Wildcard negative prompt', 'Template', 'Negative Template',
            'Civitai resources', 'Civitai metadata', 'Created Date')
# modules/sd_samplers_kdiffusion.py and sd_samplers_timesteps.py: what 'Automatic' stands for.
AUTOMATIC = {
    **dict.fromkeys(('dpmpp_2m', 'dpmpp_sde', 'dpmpp_2s_ancestral', 'dpm_2', 'dpm_2_ancestral',
                     'restart'), 'karras'),
    **dict.fromkeys(('dpmpp_2m_sde', 'dpmpp_3m_sde'), 'exponential')}
BY_TIMESTEPS = ('ddim', 'plms', 'unipc')  # whose schedule is always the same
HABITS = {  # what A1111 calls samplers with, where that is not their own default here
    'unipc': {'order': 3, 'variant': 'bh1'}, 'dpm_fast': {'eta': 1.0}, 'dpm_adaptive': {'eta': 1.0}}
SOFTWARE = {'jaxsd': 'threefry', 'ComfyUI': 'torch', 'A1111': 'philox'}  # and their noise
NOISES = {'CPU': 'torch', 'NV': 'philox', 'GPU': 'philox'}  # Philox is what CUDA draws
EMPHASIS = {'Original': 'a1111'} | {theirs: ours for ours, theirs in picture.WEIGHTINGS.items()}
FIELDS = {  # of A1111's keys that are fields of a Request: what they become
    'Steps': lambda v: {'steps': int(v)},
    'CFG scale': lambda v: {'guidance': float(v)},
    'Image CFG scale': lambda v: {'image_guidance': float(v)},
    'Seed': lambda v: {'seed': int(v)},
    'Size': lambda v: dict(zip(('width', 'height'), _size(v))),
    'Denoising strength': lambda v: {'strength': float(v)},
    'Clip skip': lambda v: {'clip_skip': max(1, int(v))},
    'Eta': lambda v: {'eta': float(v)},
    'RNG': lambda v: {'noise': NOISES[v]},
    'Step RNG': lambda v: {'step_noise': NOISES[v]},  # ours
    'Tiling': lambda v: {'tiling': {'True': 'xy', 'False': ''}.get(v, v)},
    'ENSD': lambda v: {'eta_noise_seed_delta': int(v)},
    'Variation seed': lambda v: {'subseed': int(v)},
    'Variation seed strength': lambda v: {'subseed_strength': float(v)},
    'Seed resize from': lambda v: {'seed_resize_from': _size(v)},
    'Emphasis': lambda v: {'weighting': EMPHASIS[v]},
    'Mask blur': lambda v: {'mask_blur': float(v)},
    'Refiner switch at': lambda v: {'switch': float(v)},
}
HIRES_UPSCALERS = {theirs: ours for ours, theirs in picture.UPSCALERS.items()} | {
    'Latent (antialiased)': 'latent', 'None': 'lanczos'}
HIRES = {  # of A1111's keys that are fields of Hires: what they become
    'Hires upscale': lambda v: {'scale': float(v)},
    'Hires resize': lambda v: dict(zip(('width', 'height'), _size(v))),
    'Hires steps': lambda v: {'steps': int(v)},
    'Hires upscaler': lambda v: {'upscaler': HIRES_UPSCALERS.get(v, v)},
    'Hires sampler': lambda v: _hires_sampler(v),
    'Hires schedule type': lambda v: {'schedule': _schedule(v)},
    'Hires CFG Scale': lambda v: {'guidance': float(v)},
    'Hires prompt': lambda v: {'prompt': v},
    'Hires negative prompt': lambda v: {'negative_prompt': v},
}
KEYS = {key.lower(): key for key in (*FIELDS, 'Sampler', 'Schedule type', 'Version')} | {
    'scheduler': 'Schedule type'}  # as ComfyUI's savers write it
SCHEDULE_OPTIONS = {'Schedule max sigma': ('sigma_max', float), 'Schedule rho': ('rho', float),
                    'Schedule min sigma': ('sigma_min', float)}
SAMPLER_OPTIONS = {'Sigma churn': ('s_churn', float), 'Sigma tmin': ('s_tmin', float),
                   'Sigma tmax': ('s_tmax', float), 'Sigma noise': ('s_noise', float),
                   'UniPC order': ('order', int), 'UniPC variant': ('variant', str)}


def parse(text: str) -> tuple[str, str, dict[str, str]]:
    """A1111's text -> prompt, negative prompt, {key: value}, all as text.

    modules/infotext_utils.py (parse_generation_parameters): the last line holds the pairs, if it
    has three. Read are also texts whose values go over several lines, to which lines of pairs were
    added, and those that were put on one line: the pairs begin where `Steps: 20` stands last.
    Raises ValueError for more than LONGEST characters.
    """
    if len(text) > LONGEST:
        raise ValueError(f'the text of how a picture was made has {len(text)} characters: expected '
                         f'at most {LONGEST}')
    text = re.sub('\r\n?', '\n', text).strip()
    at, inline = _settings(text)
    settings, *templates = TEMPLATE.split(text[at:])
    pairs = _pairs(settings)
    if len(pairs) < 3:
        at, inline, pairs, templates = len(text), False, [], []
    head = text[:at]
    if inline and not re.search('^Negative prompt:', head, re.M):
        head = head.replace('Negative prompt:', '\nNegative prompt:', 1)
    lines: tuple[list[str], list[str]] = [], []
    into = lines[0]
    for line in map(str.strip, head.strip().split('\n')):
        if line.startswith('Negative prompt:'):
            into, line = lines[1], line[16:].strip()
        into.append(line)
    prompt, negative = ('\n'.join(some).strip('\n') for some in lines)
    pairs = [*pairs, *zip(templates[::2], map(str.strip, templates[1::2]))]
    return prompt, negative, {key: _unquote(value.strip()) for key, value in pairs}


def _settings(text):
    """Where A1111's pairs begin, and whether that is within a line."""
    end = 1 + max(text.rfind('Seed:'), text.rfind('Sampler:'))  # they follow the steps
    if lines := [found.start() for found in STEPS_LINE.finditer(text, 0, end)]:
        return lines[-1], False
    last = text.rfind('\n') + 1
    first = next(iter(_pairs(text[last:])), ('',))[0]
    others = {*FIELDS, 'Sampler'} - {'Steps'}
    if first in others or not STEPS.search(text, 0, end):
        return last, False
    return [found.start() for found in STEPS.finditer(text, 0, end)][-1], True


def _pairs(text):
    """A1111's pairs -> [(key, value)], in linear time. A value may be JSON, as Civitai's are."""
    found, at, structured = [], 0, True
    while at < len(text):
        key = KEY.match(text, at)
        at = key.end()
        if not key[2]:
            continue
        if structured and text.startswith(('[{', '{"'), at):
            try:
                end = json.JSONDecoder().raw_decode(text, at)[1]
                found.append((key[1], text[at:end]))
                at = end
                continue
            except (ValueError, RecursionError):
                structured = False
        value = VALUE.match(text, at)
        found.append((key[1], value[1]))
        at = value.end()
    return found


def _unquote(value):
    try:
        return json.loads(value, strict=False) if value[:1] == value[-1:] == '"' else value
    except ValueError:
        return value


def foreign(text: str, upscalers: Collection[str] = ()) -> Metadata:
    """A1111's text -> Metadata, with a note for each pair that has no counterpart here. upscalers:
    names of networks that there are. Raises ValueError where settings stand in the prompt."""
    prompt, negative, pairs = parse(text)
    pairs = {KEYS.get(key.lower(), key): value for key, value in pairs.items()}
    inside = {name.lower() for name in SETTING.findall(f'{prompt}\n{negative}')}
    if 'Steps' not in pairs and len(inside) > 1:
        raise ValueError(f'what looks like settings ({", ".join(sorted(inside))}) stands in the '
                         'prompt: expected it at the end, as "Steps: 20, Sampler: ..., Seed: 7"')
    notes = [] if pairs else ['the text holds a prompt, but no settings']
    version = pairs.get('Version', '')
    program = next((name for name in SOFTWARE if version.startswith(name)), 'A1111')
    run = {name.lower(): pairs.pop(name) for name in ('Model', 'VAE', 'Refiner') if name in pairs}
    fields: dict[str, Any] = {'prompt': prompt, 'negative_prompt': negative,
                              'noise': SOFTWARE[program]}
    hires = _hires(pairs, notes, upscalers)
    if program == 'ComfyUI':
        fields['weighting'] = 'comfy'
    for key in [key for key in FIELDS if key in pairs]:
        fields |= _value(FIELDS[key], key, pairs.pop(key), notes) or {}
    fields |= _sampling(pairs, program, notes)
    if fields.get('sampler') in BROWNIAN and fields['noise'] == 'torch' and program == 'A1111':
        fields['step_noise'] = 'philox'  # the tree is on the GPU all the same
    if program == 'ComfyUI' and comfyui.draws_on_gpu(fields.get('sampler', '')):
        fields['step_noise'] = 'philox'
    if hires:
        fields['hires'] = hires
        if program == 'A1111':  # as many steps in the second pass as it says
            fields['schedule_options'] = {**fields['schedule_options'], 'convention': 'comfyui'}
    if 'strength' in fields:
        notes.append('the picture that it was made from is not in the text: give it as --image')
        if program == 'A1111':
            fields['schedule_options'] = {**fields['schedule_options'], 'convention': 'a1111'}
    notes += [f'{run[name]!r} is not known by its name alone: give its file as --{name}'
              for name in ('vae', 'refiner') if run.get(name, 'None') not in ('None', 'Automatic')]
    notes += [f'{key}: {value} is not honoured' for key, value in pairs.items()
              if key not in HARMLESS]
    return Metadata(fields, {'model': run['model']} if 'model' in run else {}, notes,
                    hashes=_hashes(pairs))


def _hashes(pairs):
    """A1111's hashes of weights, and those of Civitai's pair -> as of Metadata."""
    found = {name: pairs[key] for name, key in (('model', 'Model hash'), ('vae', 'VAE hash'))
             if key in pairs}
    try:
        given = json.loads(pairs.get('Hashes', '{}'))
        found = {str(key).replace('LORA:', 'lora:'): value for key, value in given.items()
                 if _text(value)} | found
    except (ValueError, AttributeError, RecursionError):
        pass
    for part in pairs.get('Lora hashes', '').split(','):
        name, colon, digest = part.rpartition(':')
        if colon:
            found[f'lora:{name.strip()}'] = digest.strip()
    return {name: value for name, value in found.items() if HASH.fullmatch(value)}


def _hires(pairs, notes, upscalers):
    """A1111's second pass -> fields of Hires, None where there is none; takes it out of the pairs.
    """
    found = {key: pairs.pop(key) for key in list(pairs) if key.lower().startswith('hires')}
    if not found:
        return None
    strength = pairs.pop('Denoising strength', None)
    if found.get('Hires upscaler', 'Latent') not in (*HIRES_UPSCALERS, *upscalers):
        name = found['Hires upscaler']
        notes.append(f'Hires fix is left out: there is no upscaler {name} here; give its file as '
                     f'--upscalers="{name}=PATH"; the picture comes in the size of its first pass')
        return None
    fields = {} if strength is None else (
        _value(lambda v: {'strength': float(v)}, 'Denoising strength', strength, notes) or {})
    for key, value in found.items():
        if key in HIRES:
            fields |= _value(HIRES[key], key, value, notes) or {}
        elif key not in ('Hires Module 1', 'Hires VAE/TE'):
            notes.append(f'{key}: {value} is not honoured')
    return {name: value for name, value in fields.items() if value}


def _size(text):
    width, height = map(int, text.split('x'))
    return width, height


def _hires_sampler(text):
    sampler, schedule, _ = find_sampler(text)
    if sampler is None:
        raise ValueError
    return {'sampler': sampler} | ({'schedule': schedule} if schedule else {})


def _value(convert, key, text, notes):
    """The converted text; None, and a note, for what is not understood."""
    try:
        return convert(text)
    except (ValueError, KeyError):
        notes.append(f'{key}: {text} is not understood')


def _sampling(pairs, program, notes):
    """Sampler, schedule and their options -> fields of a Request; takes them out of the pairs."""
    name, kind = pairs.pop('Sampler', ''), pairs.pop('Schedule type', '')
    sampler, schedule, habits = find_sampler(name)
    if sampler is None and name:
        notes.append(f'Sampler: {name} is not known here: name one as --config.sampler')
    if kind == 'Automatic':
        schedule = schedule or AUTOMATIC.get(sampler)
    elif kind:
        schedule = _value(_schedule, 'Schedule type', kind, notes)
    if sampler in BY_TIMESTEPS and program == 'A1111':
        schedule = 'ddim_uniform'
    options = _options(pairs, SCHEDULE_OPTIONS, notes)
    options = {option: value for option, value in options.items() if value}  # 0: its own
    if schedule == 'beta' and program == 'A1111':
        options['space'] = 'sigma'
    habits = habits or (HABITS.get(sampler, {}) if program == 'A1111' else {})
    known = {'sampler': sampler} if sampler else {}
    return {**known, 'schedule': schedule or 'normal', 'schedule_options': options,
            'sampler_options': {**habits, **_options(pairs, SAMPLER_OPTIONS, notes)}}


def _options(pairs, table, notes):
    found = {name: _value(convert, key, pairs.pop(key), notes)
             for key, (name, convert) in table.items() if key in pairs}
    return {name: value for name, value in found.items() if value is not None}


def _schedule(text):
    """The written name of a schedule, a path or levels -> what a Request takes."""
    if ',' in text:
        return tuple(map(float, text.split(',')))
    return text if text.endswith('.json') else SCHEDULE_NAMES[text.lower()]


def fit(requests: Sequence[Request], config: ModelConfig) -> tuple[Sequence[Request], list[str]]:
    """Requests read from texts of A1111 or ComfyUI, as these take them with this model -> them,
    and notes."""
    notes = []
    for i, request in enumerate(requests):
        if request.weighting == 'comfy' and request.clip_skip > 1:
            text = config.text_encoder or config.text_encoder_2
            # Counted from the last layer, also where the version uses the one before it; of 2.x the
            # last of 24 is not in the file.
            own = text.skip + (text.num_hidden_layers == 23)
            request = request.replace(clip_skip=max(1, request.clip_skip - own))
        elif request.clip_skip > 1 and (config.text_encoder_2 or config.text_encoder.skip):
            notes = [f'Clip skip: {request.clip_skip}: A1111 has it for 1.x models only']
            request = request.replace(clip_skip=1)
        if request.schedule == 'ays' and config.text_encoder_2:
            request = request.replace(
                schedule_options={**request.schedule_options, 'table': 'sdxl'})
        if request.image_guidance is not None and config.task != 'pix2pix':
            notes = [*notes, f'Image CFG scale: {request.image_guidance:g}: this model does not '
                     'see the image']
            request = request.replace(image_guidance=None)
        requests = [*requests[:i], request, *requests[i + 1:]]
    return requests, notes
