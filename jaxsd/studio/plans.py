"""What the page asked for, as files for `launch.batch` and as Python."""

import dataclasses
import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsd.run import picture
from jaxsd.run.request import Request
from jaxsd.studio.settings import PICTURES, Axis, plain


def export(requests: Sequence[Request], base: Request, along: Sequence[Axis],
           recipe: Sequence[str], model: str) -> dict[str, Any]:
    """Requests of a job -> {'command', 'python': text, 'zip': bytes of a file with both, the plan
    and the pictures that it follows}.

    base, along: what the requests were expanded from. recipe: fields that a recipe has, which the
    plan says in any case. model: its name.
    """
    files: dict[str, bytes] = {}
    lines = [json.dumps(_fields(request, recipe, files), ensure_ascii=False)
             for request in requests]
    nets = sorted({control.net for control in base.controls})
    command = (f'jaxsd batch --requests=plan.jsonl --out=runs/grid{_checkpoint(model)}')
    python = _python(base, along, len(requests), model, nets)
    texts = {'plan.jsonl': '\n'.join(lines) + '\n', 'command.txt': f'{command}\n',
             'plan.py': python}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, 'w') as folder:
        for name, data in {**{k: v.encode() for k, v in texts.items()}, **files}.items():
            folder.writestr(name, data)
    return {'command': command, 'python': python, 'plan': texts['plan.jsonl'],
            'zip': packed.getvalue()}


def _checkpoint(model):
    return '' if model == 'emoji' else f' --checkpoint={model}'


def _fields(request, recipe, files):
    """A request as a line of a plan; pictures become files."""
    usual, found = Request(), {}
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if field.name in PICTURES and value is not None:
            found[field.name] = _file(files, field.name, value)
        elif field.name == 'controls' and value:
            found['controls'] = [
                {**{f.name: getattr(control, f.name) for f in dataclasses.fields(control)},
                 'image': _file(files, f'hint{i}', control.image)}
                for i, control in enumerate(value)]
        elif field.name not in (*PICTURES, 'controls') and (
                field.name in recipe or field.name in ('prompt', 'seed')
                or value != getattr(usual, field.name)):
            found[field.name] = plain(value)
    return found


def _file(files, name, value):
    """Keep a picture -> the name of its file. Masks and depth maps keep 16 bits of gray."""
    from PIL import Image
    path, data = f'{name}.png', np.asarray(value)
    if data.dtype == np.uint8:
        files[path] = picture.png(data)
    else:
        file = io.BytesIO()
        Image.fromarray(np.rint(data * 65535).astype(np.uint16)).save(file, 'PNG')
        files[path] = file.getvalue()
    return path


def _python(base, along, count, model, nets):
    """A program of five lines that makes the pictures."""
    fields = _fields(base, (), {})
    controls = fields.pop('controls', [])
    words = [f'{name}={value!r}' for name, value in fields.items()
             if name not in {axis.field for axis in along}]
    if controls:
        words.append('controls=[' + ', '.join(
            f'jaxsd.Control({", ".join(f"{k}={v!r}" for k, v in control.items())})'
            for control in controls) + ']')
    counted = 'subseed' if base.subseed_strength else 'seed'
    names = ['y', 'x'][-len(along):] if along else [counted]
    values = [axis.values for axis in reversed(along)] or [
        [getattr(base.numbered(i), counted) for i in range(count)]]
    changed = [axis.field for axis in reversed(along)] or [counted]
    each = ', '.join(f'{field}={name}' for field, name in zip(changed, names))
    loops = ' '.join(f'for {name} in {some!r}' for name, some in zip(names, values))
    added = ', '.join(f'{net!r}: jaxsd.load_controlnet({net!r})' for net in nets)
    return (f'import jaxsd\n'
            f'model = jaxsd.load({model!r})'
            f'{f".replace(controlnets={{{added}}})" if nets else ""}\n'
            f'base = jaxsd.Request({", ".join(words)})\n'
            f'requests = [base.replace({each}) {loops}]\n'
            f'images = jaxsd.generate(model, requests)\n')
