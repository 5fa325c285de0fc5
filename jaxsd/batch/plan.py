"""What a run shall make: requests from files, times seeds, times a grid of their fields."""

import ast
import codecs
import csv
import functools
import io
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsd.run.infotext import tuples
from jaxsd.run.request import MAX_SEED, PROMPTS, Control, ImagePrompt, Reference, Region, Request
from jaxsd.sampling.choice import one_of
from jaxsd.typing import Path

LONGEST = 2**17  # characters of an axis or of seeds, as of csv's cells
MAX_PICTURES = 10**6  # of a plan, which takes 2 GB of memory; beyond is a slip
DELIMITERS = ',;\t'  # of a CSV; spreadsheets write the others where commas are decimal points
PATHS = ('image', 'mask', 'depth')  # relative to the file that names them
TEXTS = (*PROMPTS, *PATHS, 'sampler', 'schedule', 'aspect')  # of a CSV, taken as they stand


class Item(NamedTuple):
    """One entry of a file: arguments of a Request, and where they stand, 'plan.jsonl:7'."""

    fields: dict
    source: str


class ParseError(NamedTuple):
    """An entry that cannot be read, and what is wrong with it: where it stands, and why."""

    source: str
    error: str


class _Problem(ValueError):
    """What is wrong with an entry, and in which column, from 1."""

    def __init__(self, column, error):
        super().__init__(error)
        self.column = column


def read(path: Path, defaults: Mapping[str, Any]) -> tuple[list[Item], list[ParseError]]:
    """Read a file of requests -> (a list of Item, a list of ParseError).

    path: .jsonl (an object of Request's fields on each line), .csv (their names in the first line)
    or .txt (a prompt on each line), in UTF-8, or in UTF-16 with its byte order mark.
    defaults: fields that entries leave open.
    Controls and image prompts are objects of Control's and ImagePrompt's fields; hints are taken as
    they are.
    Raises OSError, and ValueError for another kind of file.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f'{path}: expected a file that ends in {", ".join(READERS)}')
    items, bad = [], []
    for number, parse in READERS[path.suffix.lower()](_decoded(path)):
        source = f'{path.name}:{number}'
        try:
            fields, column = parse()
            items.append(Item(_checked(fields, column, defaults, path.parent), source))
        except _Problem as problem:
            bad.append(ParseError(f'{source}:{problem.column}', str(problem)))
    return items, bad


def expand(items: Sequence[Item], seeds: Sequence[int],
           grid: Mapping[str, Sequence[Any]]) -> list[Request]:
    """Items, times a grid {field: values}, times seeds -> a list of Request.

    An item that names a seed has that one alone. Raises ValueError for what no Request can have.
    """
    points = math.prod(map(len, grid.values()))
    count = points * sum(len(seeds) if item.fields.get('seed', -1) == -1 else 1 for item in items)
    if count > MAX_PICTURES:
        raise ValueError(f'{len(items)} requests times {points} points of the grid times '
                         f'{len(seeds)} seeds: {count} pictures, expected at most {MAX_PICTURES}; '
                         'share them out over several runs')
    requests = []
    for item in items:
        own = item.fields.get('seed', -1)
        for values in itertools.product(*grid.values()):
            for seed in seeds if own == -1 else [own]:
                point = dict(zip(grid, values))
                try:
                    requests.append(Request(**{**item.fields, **point, 'seed': seed}))
                except ValueError as error:
                    at = ', '.join(f'{name}={value!r}' for name, value in point.items())
                    raise ValueError(f'{item.source}: at {at}: {error}' if at else
                                     f'{item.source}: {error}') from None
    return requests


def grid(texts: Iterable[str]) -> dict[str, list[Any]]:
    """['sampler=euler,heun', 'guidance=4,7'] -> {field: list of values}.

    Raises ValueError for what is no field of Request, has no values, or comes twice.
    """
    found = {}
    for text in texts:
        _check_length('--grid', text)
        name, equals, values = (part.strip() for part in text.partition('='))
        if not equals or not values:
            raise ValueError(f'--grid={text}: expected a field and its values, for example '
                             '--grid=guidance=4,7')
        one_of('field of Request', name, Request.__dataclass_fields__)
        if name == 'seed':
            raise ValueError(f'--grid={text}: expected --seeds={values}, which is for that')
        if name in found:
            raise ValueError(f'--grid={text}: {name} has its values already')
        found[name] = _values(values)
    return found


def _check_length(flag, text):
    if len(text) > LONGEST:
        raise ValueError(f'{flag}={text[:40]}...: {len(text)} characters, expected at most '
                         f'{LONGEST}')


def _values(text):
    """'4, 7', 'euler, heun' or '(1, 2), (3, 4)' -> a list; bare words are strings."""
    try:
        nodes = ast.parse(f'[{text}]', mode='eval').body.elts
        return [node.id if isinstance(node, ast.Name) and node.id not in ('None',)
                else ast.literal_eval(node) for node in nodes]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [word.strip() for word in text.split(',')]


def seeds(text: str | int) -> list[int]:
    """'7', '0-99' or '1,5,10-12' -> a list of seeds. Raises ValueError for anything else."""
    _check_length('--seeds', str(text))
    found, count = [], 0
    for part in str(text).split(','):
        ends = re.fullmatch(r'\s*(\d+)\s*(?:-\s*(\d+)\s*)?', part)
        first, last = (int(end or ends[1]) for end in ends.groups()) if ends else (1, 0)
        if not first <= last <= MAX_SEED:
            raise ValueError(f'--seeds={text}: expected whole numbers from 0 to 2^64 - 1 and '
                             'ranges of them, for example 0-99 or 1,5,10-12')
        found.append(range(first, last + 1))
        count += last + 1 - first
        if count > MAX_PICTURES:
            raise ValueError(f'--seeds={text}: {count} seeds, expected at most {MAX_PICTURES}; '
                             'share them out over several runs')
    return [*itertools.chain(*found)]


def _checked(fields, column, defaults, folder):
    """An entry's fields with the defaults, as a Request takes them. Raises _Problem.

    column(name): where a field stands, from 0.
    """
    try:
        for name in fields:
            one_of('field', name, Request.__dataclass_fields__)
        found = {name: tuples(value) for name, value in fields.items()}
        found |= {name: os.path.join(folder, found[name]) for name in PATHS
                  if isinstance(found.get(name), str)}
        if 'controls' in found:
            found['controls'] = tuple(_control(each, folder) for each in found['controls'])
        if 'image_prompts' in found:
            found['image_prompts'] = tuple(_image_prompt(each, folder)
                                           for each in found['image_prompts'])
        if 'regions' in found:
            found['regions'] = tuple(_region(each, folder) for each in found['regions'])
        if found.get('reference') is not None:
            found['reference'] = _reference(found['reference'], folder)
        found = {**defaults, **found}
        Request(**found)
        return found
    except (ValueError, TypeError) as error:
        named = [word for word in re.findall(r'\w+', str(error)) if word in fields]
        raise _Problem(column(named[0]) + 1 if named else 1, str(error)) from None


def _control(given, folder):
    """An object in `controls` -> a Control."""
    if not isinstance(given, dict) or not isinstance(given.get('image'), str):
        raise ValueError(f'controls: {given!r}: expected objects with net and image')
    for name in given:
        one_of('field of controls', name, Control.__dataclass_fields__)
    return Control(**{**given, 'image': os.path.join(folder, given['image'])})


def _reference(given, folder):
    """An object in `reference` -> a Reference."""
    if not isinstance(given, dict) or not isinstance(given.get('image'), str):
        raise ValueError(f'reference: {given!r}: expected an object with image')
    for name in given:
        one_of('field of reference', name, Reference.__dataclass_fields__)
    return Reference(**{**given, 'image': os.path.join(folder, given['image'])})


def _image_prompt(given, folder):
    """An object in `image_prompts` -> an ImagePrompt."""
    if not isinstance(given, dict) or not isinstance(given.get('net'), str):
        raise ValueError(f'image_prompts: {given!r}: expected objects with net and image')
    for name in given:
        one_of('field of image_prompts', name, ImagePrompt.__dataclass_fields__)

    def inside(source):
        if isinstance(source, (tuple, list)):
            return tuple(map(inside, source))
        if not isinstance(source, (str, type(None))):
            raise ValueError(f'image_prompts: {source!r}: expected a path')
        return source if source is None else os.path.join(folder, source)

    paths = ('image', 'mask', 'embeds', 'negative_embeds')
    return ImagePrompt(**{name: inside(value) if name in paths else value
                          for name, value in given.items()})


def _region(given, folder):
    """An object in `regions` -> a Region."""
    if not isinstance(given, dict) or not isinstance(given.get('mask'), (str, type(None))):
        raise ValueError(f'regions: {given!r}: expected objects with prompt, and mask or box')
    for name in given:
        one_of('field of regions', name, Region.__dataclass_fields__)
    mask = given.get('mask')
    return Region(**{'prompt': None, **given,
                     'mask': None if mask is None else os.path.join(folder, mask)})


def _decoded(path):
    """A file's text, without a byte order mark; bytes that are no UTF-8 are surrogates."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # Excel's 'Unicode text'
        try:
            text = data.decode('utf-16')
        except UnicodeDecodeError as error:
            raise ValueError(f'{path}: its byte order mark says UTF-16, and bytes {error.start} to '
                             f'{error.end} are none; save it as UTF-8') from None
    else:
        text = data.removeprefix(codecs.BOM_UTF8).decode(errors='surrogateescape')
    if '\0' in text[:4]:
        raise ValueError(f'{path} begins with zero bytes: expected UTF-8, or UTF-16 with its byte '
                         'order mark; save it as UTF-8')
    return text


def _check_decoded(text, column=None):
    """Raise _Problem for a byte that is no UTF-8, in its own column or in the one that is given."""
    if stray := re.search('[\udc80-\udcff]', text):
        raise _Problem(column or stray.start() + 1,
                       f'byte {ord(stray[0]) - 0xdc00:#04x} is no UTF-8')


def _check_once(names, columns):
    """Raise _Problem, in its column, for a name that stands there before."""
    first = {}
    for i, name in enumerate(names):
        if name and first.setdefault(name, i) != i:
            raise _Problem(columns(name, i) + 1, f'{name!r} stands there twice')


# Readers: text -> for each entry the number of its line, and a function that parses it, or raises
# _Problem -> its fields, and in which column a field stands, from 0.


def _lines(parse, text):
    for number, line in enumerate(text.split('\n'), 1):
        if line.strip():
            yield number, functools.partial(parse, line.strip('\r'))


def _prompt(line):
    _check_decoded(line)
    return {'prompt': line.strip()}, {'prompt': 0}.get


def _object(line):
    """A line of JSON; refuses names that come twice and NaN, which json lets pass, too."""
    def place(name, _=None):
        return max(line.find(json.dumps(name, ensure_ascii=False)), 0)

    def once(pairs):
        _check_once([name for name, _ in pairs], place)
        return dict(pairs)

    def refuse(word):
        raise _Problem(line.find(word) + 1, f'{word}: expected a finite number')

    _check_decoded(line)
    try:
        found = json.loads(line, object_pairs_hook=once, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise _Problem(error.colno, error.msg) from None
    except (RecursionError, ValueError) as error:  # nested too deeply, numbers of too many digits
        raise error if isinstance(error, _Problem) else _Problem(1, str(error)) from None
    if not isinstance(found, dict):
        raise _Problem(1, f'expected an object such as {{"prompt": "red apple"}}, found '
                       f'{line[:40]}')
    return found, place


def _rows(text, delimiter):
    return csv.reader(io.StringIO(text, newline=''), delimiter=delimiter)


def _names(text, delimiter):
    """The names in a CSV's head, after Excel's `sep=;`, with one of the delimiters."""
    try:
        return next(([name.strip() for name in row] for row in _rows(text, delimiter)
                     if any(map(str.strip, row)) and not row[0].startswith('sep=')), [])
    except csv.Error:
        return []


def _csv(text):
    known = [len(set(_names(text, d)) & set(Request.__dataclass_fields__)) for d in DELIMITERS]
    rows, names = _rows(text, DELIMITERS[known.index(max(known))]), None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield rows.line_num, functools.partial(_fail, _Problem(1, str(error)))
            continue
        if row is None:
            return
        if not any(map(str.strip, row)) or names is None and row[0].startswith('sep='):
            continue
        if names is not None:
            yield rows.line_num, functools.partial(_cells, names, row)
            continue
        names = [name.strip() for name in row]
        try:
            for column, name in enumerate(names, 1):
                _check_decoded(name, column)
            _check_once(names, lambda name, column: column)
        except _Problem as problem:
            yield rows.line_num, functools.partial(_fail, problem)
            return  # nobody knows what stands below


def _fail(problem):
    raise problem


def _cells(names, row):
    if len(row) > len(names):
        raise _Problem(len(names) + 1, f'{len(row)} cells, expected at most {len(names)}')
    found = {}
    for column, (name, cell) in enumerate(zip(names, row), 1):
        _check_decoded(cell, column)
        if cell.strip():
            values = [cell] if name in TEXTS else _values(cell)
            if len(values) > 1:
                raise _Problem(column, f'{name}: {cell!r}: expected one value: a number as 7.5, a '
                               'list as (7, 5)')
            found[name] = values[0]
    return found, names.index


READERS: dict[str, Callable[[str], Iterator]] = {
    **dict.fromkeys(('.jsonl', '.ndjson'), functools.partial(_lines, _object)),
    '.csv': _csv, '.txt': functools.partial(_lines, _prompt)}
