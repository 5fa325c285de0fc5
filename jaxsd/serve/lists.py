"""What there is, as A1111's clients ask for it, and which model is loaded: routes of `app`."""

import asyncio
import html
import os
import pathlib
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import fastapi
import jax

from jaxsd.run import infotext
from jaxsd.run.inputs import check_clip_skip
from jaxsd.sampling import SAMPLERS, SCHEDULES
from jaxsd.sampling.names import A1111_SAMPLERS, A1111_SCHEDULES
from jaxsd.serve import a1111, schemas
from jaxsd.serve.middleware import HTTPError, read_body

NOTHING = ('hypernetworks', 'realesrgan-models', 'prompt-styles', 'script-info')


def add(app: fastapi.FastAPI, service: Any, errors: Callable, reads: Callable) -> None:
    """Give the application these routes."""
    def get(path, answer, model=Any, *codes):
        app.add_api_route(path, answer, response_model=model, responses=errors(*codes),
                          name=path.rpartition('/')[2])

    def has(path, answer, model=Any, *codes):
        get(f'/sdapi/v1/{path}', answer, model, *codes)

    def loaded():
        return service.ready().queue.engine.nets[0]

    async def options() -> schemas.Options:
        checkpoint = service.current()
        return schemas.Options(
            sd_model_checkpoint=checkpoint.title, sd_checkpoint_hash=checkpoint.sha256 or '',
            sd_vae=service.ready().vae or 'Automatic',
            CLIP_stop_at_last_layers=service.defaults.get('clip_skip', 1))

    async def sd_models() -> list[schemas.SDModel]:
        service.ready()
        return [schemas.SDModel(title=one.title, model_name=one.name, hash=one.hash,
                                sha256=one.sha256, filename=one.filename)
                for one in service.models()]

    async def sd_vae() -> list[dict[str, str]]:
        return [{'model_name': one.name, 'filename': one.filename}
                for one in service.choices.all('vaes')]

    async def loras() -> list[dict[str, Any]]:
        files = {one.name: one.filename for one in service.choices.all('lora')}
        return [{'name': name, 'alias': adapter.metadata.get('ss_output_name', name),
                 'path': files.get(name, name), 'metadata': adapter.metadata}
                for name, adapter in sorted(loaded().adapters.items())]

    async def embeddings() -> dict[str, Any]:
        shapes = {name: [vectors.shape for vectors in one.vectors.values()]
                  for name, one in sorted(loaded().embeddings.items())}
        return {'loaded': {name: {
            'step': None, 'sd_checkpoint': None, 'sd_checkpoint_name': None,
            'shape': found[0][-1], 'vectors': found[0][0]} for name, found in shapes.items()},
            'skipped': {}}

    async def upscalers() -> list[dict[str, Any]]:
        scales = dict.fromkeys(('None', 'Lanczos', 'Nearest'), 4.0) | {
            name: float(network.config.scale)
            for name, network in sorted(loaded().upscalers.items())}
        return [{'name': name, 'model_name': None, 'model_path': None, 'model_url': None,
                 'scale': scale} for name, scale in scales.items()]

    async def latent_upscale_modes() -> list[dict[str, str]]:
        return [{'name': name} for name in infotext.HIRES_UPSCALERS
                if name.startswith('Latent')]

    async def face_restorers() -> list[dict[str, str | None]]:
        name = a1111.restorer_name(service.loaded.restorer) if service.loaded else None
        return [{'name': name, 'cmd_dir': None}] if name else []

    async def nothing() -> list[Any]:
        return []

    async def scripts() -> dict[str, list[str]]:
        names = ['controlnet'] if loaded().controlnets or loaded().ip_adapters else []
        return {'txt2img': names, 'img2img': names}

    async def cmd_flags() -> dict[str, Any]:
        return {'api': True, 'nowebui': True, 'api_auth': service.settings.key is not None}

    async def model_list() -> dict[str, list[str]]:
        titles = {one.name: one.title for kind in ('controlnet', 'ip_adapter')
                  for one in service.choices.all(kind)}
        return {'model_list': [titles.get(name, name)
                               for name in (*loaded().controlnets, *loaded().ip_adapters)]}

    async def module_list() -> dict[str, list[str]]:
        return {'module_list': [*a1111.modules(service.detectors()), *a1111.LOOKS]}

    async def version() -> dict[str, int]:
        return {'version': 3}  # of the units that sd-webui-controlnet takes

    @app.post('/controlnet/detect', response_model=dict[str, Any], responses=errors(413, 503),
              openapi_extra=reads(schemas.DetectBody))
    async def detect(request: fastapi.Request) -> dict[str, Any]:
        data = await read_body(request, service.settings)
        return await asyncio.get_running_loop().run_in_executor(
            service.picture_pool, service.detect, data)

    def extra(path, model):
        @app.post(f'/sdapi/v1/{path}', response_model=dict[str, Any], responses=errors(413, 503),
                  openapi_extra=reads(model))
        async def enlarge(request: fastapi.Request) -> dict[str, Any]:
            data = await read_body(request, service.settings)
            return await asyncio.get_running_loop().run_in_executor(
                service.picture_pool, service.extras, model, data)

    extra('extra-single-image', schemas.ExtraSingle)
    extra('extra-batch-images', schemas.ExtraBatch)

    async def ping() -> dict[str, str]:
        return {}

    has('samplers', samplers, list[schemas.Sampler])
    has('schedulers', schedulers, list[schemas.Scheduler])
    has('sd-models', sd_models, list[schemas.SDModel], 503)
    has('options', options, schemas.Options, 503)
    has('sd-vae', sd_vae, list[dict[str, str]])
    has('loras', loras, list[dict[str, Any]], 503)
    has('embeddings', embeddings, dict[str, Any], 503)
    has('upscalers', upscalers, list[dict[str, Any]], 503)
    has('latent-upscale-modes', latent_upscale_modes, list[dict[str, str]])
    has('face-restorers', face_restorers, list[dict[str, str | None]])
    has('scripts', scripts, dict[str, list[str]], 503)
    has('cmd-flags', cmd_flags, dict[str, Any])
    has('memory', memory, dict[str, Any])
    get('/controlnet/model_list', model_list, dict[str, list[str]], 503)
    get('/controlnet/module_list', module_list, dict[str, list[str]])
    get('/controlnet/version', version, dict[str, int])
    get('/internal/ping', ping, dict[str, str])
    for path in NOTHING:
        has(path, nothing, list[Any])

    @app.post('/sdapi/v1/options', responses=errors(413, 503),
              openapi_extra=reads(schemas.OptionsBody))
    async def set_options(request: fastapi.Request) -> None:
        body = a1111.parse(schemas.OptionsBody, await read_body(request, service.settings))
        await asyncio.to_thread(_set, service, body)

    @app.get('/docs', include_in_schema=False, response_class=fastapi.responses.HTMLResponse)
    async def docs() -> str:
        return page(app.openapi())

    def post(path, act):
        async def answer(request: fastapi.Request) -> None:
            await read_body(request, service.settings, needed=False)
            await asyncio.to_thread(act)
        app.add_api_route(f'/sdapi/v1/{path}', answer, methods=['POST'], name=path,
                          responses=errors(403, 413, 503))

    for path in ('refresh-checkpoints', 'refresh-vae', 'refresh-loras', 'refresh-embeddings'):
        post(path, lambda: _refresh(service))
    post('unload-checkpoint', service.unload)
    post('reload-checkpoint', service.switch)


def _set(service, body):
    """POST options: what is loaded, for all."""
    checkpoint, vae = body.sd_model_checkpoint, body.sd_vae
    current = service.current()
    if checkpoint in (*current.aliases, ''):
        checkpoint = None
    if vae in (service.ready().vae, 'None' if not service.ready().vae else None,
               service.ready().vae or 'Automatic'):
        vae = None
    if body.CLIP_stop_at_last_layers is not None:
        check_clip_skip(service.ready().queue.engine.config, body.CLIP_stop_at_last_layers)
        service.defaults['clip_skip'] = body.CLIP_stop_at_last_layers
    if checkpoint is not None or vae is not None:
        service.switch(checkpoint, vae)


def _refresh(service):
    """See which files there are now; with others for prompts the model is loaded again."""
    try:
        changed = service.choices.refresh()
    except (OSError, ValueError) as error:  # which names folders of the server
        traceback.print_exception(error)
        raise HTTPError(500, 'failed', 'the files could not be listed, see the log of the server'
                        ) from None
    if changed & {'lora', 'embeddings', 'controlnet', 'upscalers', 'ip_adapter', 'detectors'}:
        service.switch()


async def samplers() -> list[schemas.Sampler]:
    """A1111's names, ours where it has none."""
    return [schemas.Sampler(name=A1111_SAMPLERS.get(name, name), aliases=[name], options={})
            for name in SAMPLERS]


async def schedulers() -> list[schemas.Scheduler]:
    """The same."""
    names = {'automatic': 'Automatic', **{name: A1111_SCHEDULES.get(name, name)
                                          for name in SCHEDULES}}
    return [schemas.Scheduler(name=name, label=label, aliases=None, need_inner_model=False,
                              default_rho=7.0 if name == 'karras' else None)
            for name, label in names.items()]


async def memory() -> dict[str, Any]:
    """Bytes of this machine and, as A1111 has them, of its first device."""
    ram: dict[str, Any] = {'error': 'unavailable'}
    if hasattr(os, 'sysconf') and pathlib.Path('/proc/self/statm').exists():
        page, total = os.sysconf('SC_PAGE_SIZE'), os.sysconf('SC_PHYS_PAGES')
        free = os.sysconf('SC_AVPHYS_PAGES')
        own = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
        ram = {'free': free * page, 'used': own * page, 'total': total * page}
    stats = jax.local_devices()[0].memory_stats()
    if not stats or 'bytes_limit' not in stats:
        return {'ram': ram, 'cuda': {'error': 'unavailable'}}
    used, total = stats['bytes_in_use'], stats['bytes_limit']
    return {'ram': ram, 'cuda': {
        'system': {'free': total - used, 'used': used, 'total': total},
        'allocated': {'current': used, 'peak': stats.get('peak_bytes_in_use', used)}}}


def page(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as HTML with nothing from elsewhere: FastAPI's own page loads its scripts
    from another host."""
    rows = []
    for path, methods in document['paths'].items():
        for method, route in methods.items():
            body = route.get('requestBody', {}).get('content', {}).get('application/json', {})
            fields = body.get('schema', {}).get('properties', {})
            asked = [one['name'] for one in route.get('parameters', ())] + list(fields)
            rows.append(f'<tr><th scope="row">{method.upper()} <code>{html.escape(path)}</code>'
                        f'<td>{html.escape(", ".join(asked))}'
                        f'<td>{html.escape(", ".join(route.get("responses", ())))}')
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>jaxsd: the API</title>
<style>body {{ font: 1rem/1.4 sans-serif; margin: 1rem; color-scheme: light dark }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem; overflow-wrap: anywhere }}</style>
<h1>The API of this server</h1><p>With all types: <a href="openapi.json">openapi.json</a>.
<table><tr><th>Route<th>Fields<th>Answers{"".join(rows)}</table></html>"""
