"""A run's gallery: index.html in its folder, which needs nothing but the pictures beside it."""

import base64
import datetime
import hashlib
import html
import json
import math
import pathlib
import re

from jaxsd.batch import folder
from jaxsd.run import picture
from jaxsd.typing import Path

EXACT = 2**53  # whole numbers up to here survive JavaScript's JSON.parse


def write(path: Path) -> pathlib.Path:
    """Write the gallery of a run's folder, as it is now -> the path of index.html.

    Another index.html is replaced; whoever opens it finds the old one or the new one. Raises
    FileNotFoundError and ValueError as `folder.read_config` and `folder.read` do, and OSError.
    """
    path = pathlib.Path(path)
    config = folder.read_config(path)
    records = sorted(folder.read(path).values(), key=lambda r: r.get('index', math.inf))
    rows = [_row(record) for record in records]
    names = dict.fromkeys(name for row in rows for name in row)
    data = {
        'path': path.as_posix(),
        'written': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'command': config.pop('command', ''),
        'axes': [*axes] if isinstance(axes := config.pop('grid', None), dict) else [],
        'config': _flat(config),
        'count': len(rows),
        'columns': [_column(name, [row.get(name) for row in rows]) for name in names],
    }
    page = path / 'index.html'
    picture.write_whole(page, _page(path.resolve().name, data))
    return page


def _row(record):
    """A record -> {field: cell}: the request's fields, then what became of it."""
    made = {name: value for name, value in record.items() if name != 'request'}
    made['state'] = 'failed' if 'error' in record else 'finished'
    return _flat({**record.get('request', {}), **made})


def _flat(fields, prefix=''):
    """Nested mappings -> {'outer.inner': text, number or None}; lists are told as their JSON."""
    cells = {}
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            cells |= _flat(value, f'{prefix}{name}.')
        else:
            number = isinstance(value, float) and math.isfinite(value)
            plain = number or type(value) in (int, str, type(None))
            cells[prefix + name] = value if plain else json.dumps(value, ensure_ascii=False)
    return cells


def _column(name, cells):
    """A field of all rows, each value once: row i has values[at[i]], or values[i] without `at`.

    Whole numbers that JavaScript would round are digits, and `big` says so.
    """
    places = {}
    at = [places.setdefault(cell, len(places)) for cell in cells]
    values = list(places)
    column = {'name': name, 'values': values}
    if any(isinstance(value, int) and abs(value) > EXACT for value in values):
        column['big'] = all(isinstance(value, (int, type(None))) for value in values)
        column['values'] = [str(v) if isinstance(v, int) else v for v in values]
    if len(values) < len(cells):
        column['at'] = at
    return column


def _page(title, data):
    """The page, as bytes. Its policy lets run what stands in the template, and nothing else."""
    page = pathlib.Path(__file__).with_name('gallery.html').read_text('utf-8')

    def allow(tag):
        text = re.search(f'<{tag}>(.*?)</{tag}>', page, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    parts = {
        'title': html.escape(title),
        'policy': f"default-src 'none'; img-src 'self'; style-src {allow('style')}; script-src "
                  f"{allow('script')}; base-uri 'none'; form-action 'none'; "
                  "require-trusted-types-for 'script'",
        # All but "<" is harmless in a script element. ASCII: half a surrogate pair is no UTF-8.
        'data': json.dumps(data, separators=(',', ':')).replace('<', '\\u003c'),
    }
    page = re.sub('@(title|policy|data)@', lambda found: parts[found[1]], page)
    return page.encode('utf-8', 'replace')
