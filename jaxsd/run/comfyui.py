"""ComfyUI's graph of a picture, which stands as `prompt` in its PNG files, as settings here.

Nodes and their inputs: ComfyUI's nodes.py and comfy_extras/nodes_custom_sampler.py. The graph is
followed upwards from the nodes that save pictures: the sampler, and from it its model, prompts and
latents.
"""

import inspect
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxsd.sampling import SAMPLERS, SCHEDULES
from jaxsd.sampling.names import SCHEDULE_NAMES, find_sampler
from jaxsd.sampling.noise_schedule import DISCARD_PENULTIMATE

LONGEST, MOST = 2**22, 2000  # characters of JSON, and nodes
SAMPLING = ('KSampler', 'KSamplerAdvanced', 'SamplerCustom', 'SamplerCustomAdvanced')
SAVING = ('SaveImage', 'PreviewImage')
EMPTY = ('EmptyLatentImage', 'EmptySD3LatentImage')
ENCODING = ('VAEEncode', 'VAEEncodeTiled', 'VAEEncodeForInpaint', 'InpaintModelConditioning',
            'InstructPixToPixConditioning')
SIGMAS = {'KarrasScheduler': 'karras', 'ExponentialScheduler': 'exponential',
          'PolyexponentialScheduler': 'polyexponential', 'LaplaceScheduler': 'laplace',
          'VPScheduler': 'vp', 'SDTurboScheduler': 'turbo', 'BetaSamplingScheduler': 'beta',
          'AlignYourStepsScheduler': 'ays', 'GITSScheduler': 'gits', 'BasicScheduler': None}
TABLES = {'SD1': 'sd15', 'SDXL': 'sdxl'}  # of Align Your Steps
SAMPLER_NODES = {  # samplers with options; the others are named by KSamplerSelect
    'SamplerDPMPP_3M_SDE': 'dpmpp_3m_sde', 'SamplerDPMPP_2M_SDE': 'dpmpp_2m_sde',
    'SamplerDPMPP_SDE': 'dpmpp_sde', 'SamplerDPMPP_2S_Ancestral': 'dpmpp_2s_ancestral',
    'SamplerEulerAncestral': 'euler_ancestral',
    'SamplerEulerAncestralCFGPP': 'euler_ancestral_cfg_pp', 'SamplerLMS': 'lms',
    'SamplerDPMAdaptative': 'dpm_adaptive'}
PATCHES = {  # of models, that are guidance options here: {their input: our option}
    'PatchModelAddDownscale': ('deep_shrink', {
        'block_number': 'block', 'downscale_factor': 'factor', 'start_percent': 'start',
        'end_percent': 'end', 'downscale_after_skip': 'after_skip',
        'downscale_method': 'downscale_method', 'upscale_method': 'upscale_method'}),
    'EasyCache': ('easycache', {'reuse_threshold': 'threshold', 'start_percent': 'start',
                                'end_percent': 'end'}),
    'TomePatchModel': ('token_merging', {'ratio': 'ratio'})}
UPSCALES = {'bilinear': 'latent', 'bicubic': 'latent_bicubic', 'nearest-exact': 'latent_nearest'}
# Samplers that draw the noise of their steps on the GPU (default_noise_sampler).
NOISY = ('ancestral', 'ddpm', 'lcm', 'er_sde', 'seeds_', 'sa_solver')
# What changes nothing on the way to a model, a prompt or a latent.
HARMLESS = ('Reroute', 'CheckpointLoaderSimple', 'CheckpointLoader', 'CLIPLoader',
            'DualCLIPLoader', 'InpaintModelConditioning', 'InstructPixToPixConditioning')
# What a text means here and not there.
LANGUAGE = re.compile(r'<\w+:[^>]+>|\[[^\]]*[|:][^\]]*\]|\{[^}]*\|[^}]*\}|\bAND\b|__[\w/*-]+__')


def read(text: str) -> tuple[dict[str, Any], dict[str, Any], list[str]] | None:
    """The text of `prompt` -> (arguments of a Request, {'model', perhaps 'prediction'}, a line for
    each thing that cannot be honoured); None for a text that is no graph.

    Raises ValueError for a graph without one of ComfyUI's own samplers, and for more than LONGEST
    characters or MOST nodes.
    """
    if len(text) > LONGEST:
        raise ValueError(f"ComfyUI's graph has {len(text)} characters: expected at most {LONGEST}")
    try:
        nodes = json.loads(text)
        nodes = {str(key): node for key, node in nodes.items()
                 if isinstance(node['class_type'], str) and isinstance(node['inputs'], dict)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if len(nodes) > MOST:
        raise ValueError(f"ComfyUI's graph has {len(nodes)} nodes: expected at most {MOST}")
    return _Graph(nodes).read() if nodes else None


def draws_on_gpu(sampler: str) -> bool:
    """Whether ComfyUI draws the noise of a sampler's steps on the GPU; it starts on the CPU."""
    return sampler.endswith('_gpu') or any(kind in sampler for kind in NOISY)


class _Graph:
    """nodes: {id: {'class_type', 'inputs'}}; an input is a value, or [id, number of an output]."""

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        self.nodes, self.notes = nodes, []

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    def at(self, link):
        """The node that a link leads to, None for a value."""
        if isinstance(link, list) and len(link) == 2 and isinstance(link[0], (str, int)):
            return self.nodes.get(str(link[0]))
        return None

    def links(self, node):
        """[(name, node)] of the inputs that are links."""
        found = [(name, self.at(link)) for name, link in node['inputs'].items()]
        return [(name, to) for name, to in found if to is not None]

    def upwards(self, *starts: Any) -> Iterator[Any]:
        """The nodes from these on, the nearest first, each once."""
        todo, seen = [node for node in starts if node is not None], set()
        for node in todo:
            if id(node) not in seen:
                seen.add(id(node))
                yield node
                todo += [to for _, to in self.links(node)]

    def value(self, node, name, kind, default=None):
        """An input that is a value, or that a node gives which holds one of this kind alone."""
        found = node['inputs'].get(name, default)
        title = f'{node["class_type"]}.{name}'
        for _ in range(20):
            source = self.at(found)
            if source is None:
                break
            given = source['inputs']
            own = [value for key, value in given.items() if self.at(value) is not None
                   or _is(value, kind) and not (kind is int and 'batch' in key)]
            keys = (name, 'value', 'seed', 'text', 'string')
            named = [given[key] for key in keys if key in given]
            if len(own) != 1 and not named:
                self.note(f'{title}: is computed by {source["class_type"]}, which is not read')
                return default
            found = named[0] if named else own[0]
        if not _is(found, kind):
            if found is not None:
                self.note(f'{title}: {str(found)[:80]} is not understood')
            return default
        return kind(found)

    def read(self):
        last = self.last()
        chain = [last]
        while (before := self.before(chain[0])) is not None and before not in chain:
            chain.insert(0, before)
        first = self.settings(chain[0])
        model, fields = self.model(first.pop('model'))
        texts, skips = self.texts(first.pop('positive'), first.pop('negative'))
        if 'guidance_options' in fields and first.get('guidance_options'):
            fields['guidance_options'] |= first.pop('guidance_options')
        size = self.latents(chain[0])
        if chain[0]['inputs'].get('add_noise') in ('disable', False):
            self.note('add_noise: it begins without noise there, which is not honoured')
        fields = {'weighting': 'comfy', 'noise': 'torch', **texts, **first, **size, **fields}
        if skips:
            fields['clip_skip'] = skips
        strength = fields.pop('strength', 1.0)
        if fields.pop('started', False):
            fields |= {'strength': strength, 'schedule_options': {
                **fields['schedule_options'], 'convention': 'comfyui'}}
            self.note('the picture that it was made from is not in the text: give it as --image')
        elif strength != 1:
            self.note(f'denoise: {strength} of an empty picture is not honoured')
        if len(chain) > 1:
            fields |= self.second(chain, fields)
        self.vae(last)
        if LANGUAGE.search(f'{texts["prompt"]} {texts["negative_prompt"]}'):
            self.note('the prompt has tags, schedules, choices or AND: letters in ComfyUI, and '
                      'with a meaning here')
        run = {name: value for name, value in model.items() if value}
        return fields, run, self.notes

    def last(self):
        """The sampler of the picture that is saved."""
        saving = [node for kind in SAVING for node in self.nodes.values()
                  if node['class_type'] == kind]
        given = {id(to) for node in self.nodes.values() for _, to in self.links(node)}
        ends = saving or [node for node in self.nodes.values() if id(node) not in given]
        found = []
        for end in ends:
            node = next((node for node in self.upwards(end) if node['class_type'] in SAMPLING),
                        None)
            if node is not None and node not in found:
                found.append(node)
        # Of samplers that follow each other, the last.
        found = [node for node in found if not any(
            node is above for other in found if other is not node for above in self.upwards(other))]
        if not found:
            kinds = sorted({node['class_type'] for node in self.nodes.values()
                            if 'sampler' in node['class_type'].lower()})
            raise ValueError(
                "ComfyUI's graph of this picture has no sampler that is known here "
                f'({", ".join(kinds)[:200] or "none at all"}): expected one of '
                f'{", ".join(SAMPLING)}')
        if len(found) > 1:
            self.note(f'its graph makes {len(found)} pictures: read is the first one')
        return found[0]

    def before(self, node):
        """The sampler whose latents this one goes on with, or None."""
        return next((up for up in self.upwards(self.at(node['inputs'].get('latent_image')))
                     if up['class_type'] in SAMPLING), None)

    def settings(self, node):
        """A sampler -> fields of a Request, and 'model', 'positive', 'negative': nodes."""
        kind, given = node['class_type'], node['inputs']
        found, source = {}, node
        if kind == 'SamplerCustomAdvanced':
            noise, source = self.at(given.get('noise')), self.at(given.get('guider')) or node
            found['seed'] = self.value(noise, 'noise_seed', int) if noise else None
            if source['class_type'] not in ('CFGGuider', 'BasicGuider'):
                self.note(f'{source["class_type"]} is not honoured')
            alone = source['class_type'] == 'BasicGuider'
            found['guidance'] = 1.0 if alone else self.value(source, 'cfg', float)
        else:
            name = 'seed' if kind == 'KSampler' else 'noise_seed'
            found |= {'seed': self.value(node, name, int),
                      'guidance': self.value(node, 'cfg', float)}
        ends = source['inputs']
        found |= {'model': self.at(ends.get('model')), 'negative': ends.get('negative'),
                  'positive': ends.get('positive', ends.get('conditioning'))}
        if kind.startswith('SamplerCustom'):
            found |= self.custom(given)
        else:
            name = self.value(node, 'sampler_name', str, '')
            found |= {'steps': self.value(node, 'steps', int),
                      **self.sampler(name, self.value(node, 'scheduler', str, ''), True),
                      'strength': self.value(node, 'denoise', float, 1.0)}
        return {name: value for name, value in found.items() if value is not None
                or name in ('model', 'positive', 'negative')}

    def custom(self, given):
        """SamplerCustom's sampler and sigmas."""
        node, sigmas = self.at(given.get('sampler')), self.at(given.get('sigmas'))
        kind, name, options = node and node['class_type'], '', {}
        if kind == 'KSamplerSelect':
            name = self.value(node, 'sampler_name', str, '')
        elif kind in SAMPLER_NODES:
            name = SAMPLER_NODES[kind]
            options = self.options(node, SAMPLERS[name])
            if node['inputs'].get('noise_device') == 'gpu':
                name += '_gpu'
        elif kind:
            self.note(f'{kind} is not known here: name a sampler as --sampler')
        while sigmas is not None and sigmas['class_type'] not in SIGMAS:
            self.note(f'{sigmas["class_type"]} is not honoured')
            sigmas = self.at(sigmas['inputs'].get('sigmas'))
        found = self.sampler(name, '', False)
        found['sampler_options'] = {**found.get('sampler_options', {}), **options}
        if sigmas is None:
            return found
        schedule = SIGMAS[sigmas['class_type']]
        found['steps'] = self.value(sigmas, 'steps', int)
        strength = self.value(sigmas, 'denoise', float, 1.0)
        if schedule is None:
            return found | self.scheduler(self.value(sigmas, 'scheduler', str, '')) | {
                'strength': strength}
        options = self.options(sigmas, SCHEDULES[schedule])
        if schedule == 'turbo':
            options['start'] = 10 - int(10 * strength)
        elif schedule == 'ays':
            options['table'] = TABLES.get(sigmas['inputs'].get('model_type'), 'sd15')
        if schedule != 'turbo':
            found['strength'] = strength
        return found | {'schedule': schedule, 'schedule_options': {
            **found['schedule_options'], **options}}

    def options(self, node, function):
        """A node's inputs that a sampler or a schedule of ours has as well."""
        known = [*inspect.signature(function).parameters][1:]
        return {name: value for name, value in node['inputs'].items()
                if name in known and name not in ('steps', 'config') and isinstance(
                    value, (int, float, str))}

    def sampler(self, name, scheduler, drops):
        """Names of ComfyUI -> fields; drops: whether the last but one level is left out for the
        samplers for which KSampler does so."""
        # There ddim is Euler's method with other noise under a mask.
        sampler, _, options = find_sampler('euler' if name == 'ddim' else name)
        if sampler is None and name:
            self.note(f'sampler_name: {name} is not known here: name one as --sampler')
        dropped, levels = drops and sampler in DISCARD_PENULTIMATE['comfyui'], {}
        if dropped or sampler in DISCARD_PENULTIMATE['a1111']:  # whose habit is the default
            levels = {'discard_penultimate': dropped}
        found = {'sampler_options': options or {}, 'schedule_options': levels}
        if draws_on_gpu(name):
            found['step_noise'] = 'philox'
        return found | ({'sampler': sampler} if sampler else {}) | (
            self.scheduler(scheduler) if scheduler else {})

    def scheduler(self, name):
        if name not in SCHEDULE_NAMES:
            self.note(f'scheduler: {name} is not known here: name one as --schedule')
            return {}
        return {'schedule': SCHEDULE_NAMES[name]}

    def model(self, node):
        """The chain from a sampler to its checkpoint -> ({'model', 'prediction'}, fields)."""
        run, loras, guidance = {}, {}, {}
        seen = set()
        while node is not None and id(node) not in seen:
            seen.add(id(node))
            kind, given = node['class_type'], node['inputs']
            if 'ckpt_name' in given or 'unet_name' in given:
                name = self.value(node, 'ckpt_name' if 'ckpt_name' in given else 'unet_name', str)
                run['model'] = _stem(name or '')
            elif kind in ('LoraLoader', 'LoraLoaderModelOnly'):
                name = _stem(self.value(node, 'lora_name', str, ''))
                weight = self.value(node, 'strength_model', float, 1.0)
                text = self.value(node, 'strength_clip', float, weight)
                loras = {name: (weight, 0.0 if kind.endswith('Only') else text), **loras}
            elif kind == 'RescaleCFG':
                guidance['rescale'] = self.value(node, 'multiplier', float, 0.7)
            elif kind == 'PerturbedAttentionGuidance':
                guidance['pag'] = self.value(node, 'scale', float, 3.0)
            elif kind == 'FreeU':
                guidance['freeu'] = tuple(self.value(node, name, float, 1.0)
                                          for name in ('b1', 'b2', 's1', 's2'))
            elif kind in PATCHES:
                name, options = PATCHES[kind]
                guidance[name] = {ours: given[theirs] for theirs, ours in options.items()
                                  if isinstance(given.get(theirs), (bool, int, float, str))}
                if 'start' in guidance[name]:
                    self.note(f'{kind}: start and end are parts of the noise there, and of the '
                              'steps here')
            elif kind == 'ModelSamplingDiscrete' and given.get('sampling') in (
                    'eps', 'v_prediction') and not given.get('zsnr'):
                run['prediction'] = {'eps': 'epsilon'}.get(given['sampling'], 'v_prediction')
            elif kind not in HARMLESS:
                self.note(f'{kind}, on the way to the model, is not honoured')
            node = self.at(given.get('model'))
        return run, {**({'adapters': loras} if loras else {}),
                     **({'guidance_options': guidance} if guidance else {})}

    def texts(self, positive, negative):
        """Links of a sampler to its prompts -> (fields, clip_skip or None)."""
        found, ours = self.text(positive, 'positive'), {}
        other = self.text(negative, 'negative') if negative is not None else {'prompt': ''}
        skip = self.skip(found.pop('clip', None))
        if negative is not None and self.skip(other.pop('clip', None)) != skip:
            self.note('its two prompts skip different numbers of layers: that of the first is read')
        for name, value in found.items():
            ours[name] = value
        ours['negative_prompt'] = other['prompt']
        if 'prompt_2' in other:
            ours['negative_prompt_2'] = other['prompt_2']
        return ours, skip

    def text(self, link, role):
        """A link to a conditioning -> {'prompt', 'clip': the node of its text encoder, ...}."""
        node, seen = self.at(link), set()
        while node is not None and id(node) not in seen:
            seen.add(id(node))
            kind, given = node['class_type'], node['inputs']
            clip = self.at(given.get('clip'))
            if kind == 'CLIPTextEncodeSDXL':
                sizes = {ours: [self.value(node, name, int, 0) for name in names]
                         for ours, names in (('original_size', ('height', 'width')),
                                             ('crop', ('crop_h', 'crop_w')),
                                             ('target_size', ('target_height', 'target_width')))}
                first, second = (self.value(node, name, str, '') for name in ('text_l', 'text_g'))
                sizes = {} if role == 'negative' else {k: tuple(v) for k, v in sizes.items()}
                return {'prompt': first, 'prompt_2': second, 'clip': clip, **sizes}
            if 'text' in given and clip is not None:
                found = {'prompt': self.value(node, 'text', str, ''), 'clip': clip}
                if kind == 'CLIPTextEncodeSDXLRefiner':
                    name = 'negative_aesthetic' if role == 'negative' else 'aesthetic'
                    found[name] = self.value(node, 'ascore', float, 6.0)
                elif kind != 'CLIPTextEncode':
                    self.note(f'{kind}: its text is read, and not what else it does')
                return found
            if kind.startswith('ControlNetApply'):
                self.control(node)
            elif kind == 'ConditioningZeroOut':
                self.note(f'the {role} prompt is replaced by zeros there: here it is empty')
                return {'prompt': ''}
            elif kind not in HARMLESS:
                self.note(f'{kind}, on the way to the {role} prompt, is not honoured')
            names = (role, 'conditioning', 'conditioning_1', 'conditioning_to')
            ahead = [self.at(given.get(name)) for name in names]
            ahead += [to for _, to in self.links(node)]
            node = next((to for to in ahead if to is not None and any(
                'text' in up['inputs'] or 'text_l' in up['inputs']
                for up in self.upwards(to))), None)
        self.note(f'its {role} prompt is not found')
        return {'prompt': ''}

    def control(self, node):
        """Note a ControlNet with what it was given."""
        loader = self.at(node['inputs'].get('control_net'))
        names = [value for up in self.upwards(loader) for key, value in up['inputs'].items()
                 if key == 'control_net_name' and isinstance(value, str)]
        parts = [f'net={_stem(names[0]) if names else "PATH"}', 'image=PATH',
                 *(f'{ours}={node["inputs"][theirs]:g}' for ours, theirs in (
                     ('scale', 'strength'), ('start', 'start_percent'), ('end', 'end_percent'))
                   if isinstance(node['inputs'].get(theirs), (int, float)))]
        self.note('a ControlNet is left out, as its hint is not in the text: give it as '
                  f'--control="{", ".join(parts)}"')

    def skip(self, node):
        """The layers of CLIPSetLastLayer on the way to a text encoder -> clip_skip, or None."""
        for up in self.upwards(node):
            if up['class_type'] == 'CLIPSetLastLayer':
                layer = self.value(up, 'stop_at_clip_layer', int, -1)
                return -layer if layer < -1 else None
        return None

    def latents(self, node):
        """What a sampler starts from -> width and height, and 'started' where from a picture."""
        for up in self.upwards(self.at(node['inputs'].get('latent_image'))):
            kind = up['class_type']
            if kind in EMPTY:
                found = {name: self.value(up, name, int) for name in ('width', 'height')}
                count = self.value(up, 'batch_size', int, 1)
                if count > 1:
                    found['noise_batch'] = 0, count
                    self.note(f'it is one of {count} of a batch, and the text does not say which: '
                              f'taken is the first; of the others --request="noise_batch=(1, '
                              f'{count})" is the second')
                return {name: value for name, value in found.items() if value is not None}
            if kind in ENCODING:
                if any('mask' in name for name, _ in self.links(up)):
                    self.note('its mask is not in the text: give it as --mask')
                return {'started': True}
            if kind == 'SetLatentNoiseMask':
                self.note('its mask is not in the text: give it as --mask')
            elif kind not in HARMLESS and self.at(up['inputs'].get('samples')):
                self.note(f'{kind}, before the sampler, is not honoured')
        return {}

    def second(self, chain, fields):
        """The samplers after the first -> fields: Hires, or a refiner's switch."""
        if len(chain) > 2:
            self.note(f'{len(chain)} samplers follow each other: the first two are read')
        first, node = chain[:2]
        start = self.value(node, 'start_at_step', int, 0)
        if start > 0:
            self.note('a second sampler goes on with the same noise: give its model as --refiner; '
                      f'it begins at step {start} there, and by the part of the noise here')
            return {'switch': start / fields.get('steps', start)}
        between = [up for up in self.upwards(self.at(node['inputs'].get('latent_image')))
                   if up['class_type'].startswith(('LatentUpscale', 'ImageScale',
                                                   'ImageUpscaleWithModel'))]
        found = self.settings(node)
        scale = between[0] if between else None
        if scale is None or not scale['class_type'].startswith('LatentUpscale'):
            self.note('a second pass, which does not begin with larger latents, is left out: see '
                      '--hires')
            return {}
        method = self.value(scale, 'upscale_method', str, 'bilinear')
        if method not in UPSCALES:
            self.note(f'upscale_method: {method} is not known here: taken is bilinear')
        if found.get('seed') != fields.get('seed'):
            self.note(f'the second pass has the seed {found.get("seed")} there, and that of the '
                      'first here')
        if scale['class_type'] == 'LatentUpscaleBy':
            size = {'scale': self.value(scale, 'scale_by', float, 1.5)}
        else:
            size = {name: self.value(scale, name, int) or None for name in ('width', 'height')}
        texts, _ = self.texts(found['positive'], found['negative'])
        own = {name: found[name] for name in ('steps', 'sampler', 'schedule', 'guidance')
               if name in found and found[name] != fields.get(name)}
        own |= {name: texts[name] for name in ('prompt', 'negative_prompt')
                if texts[name] != fields.get(name)}
        return {'hires': {**size, 'upscaler': UPSCALES.get(method, 'latent'),
                          'strength': found.get('strength', 1.0), **own},
                'schedule_options': {**fields['schedule_options'], 'convention': 'comfyui'}}

    def vae(self, sampler):
        """Note a VAE of its own, of the node that decodes this sampler's latents."""
        for node in self.nodes.values():
            if 'vae' in node['inputs'] and any(
                    up is sampler for up in self.upwards(self.at(node['inputs'].get('samples')))):
                loader = self.at(node['inputs']['vae'])
                if loader and loader['class_type'] == 'VAELoader':
                    name = self.value(loader, 'vae_name', str, '')
                    self.note(f'{name!r} is not known by its name alone: give its file as --vae')
                return


def _is(value, kind):
    if kind is str:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and (kind is float or value == int(value))


def _stem(name):
    """'folder\\\\name.safetensors' -> 'name'."""
    return pathlib.PureWindowsPath(name).stem
