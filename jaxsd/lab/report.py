"""What a sweep looks like: a labelled grid of pictures, a CSV file and a page with plots.

The page needs nothing but itself: plots are inline SVG that take the reader's colours.
"""

import base64
import csv
import html
import io
import math
import os
import pathlib
import re
import string
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxsd.images.reading import Picture
from jaxsd.lab.sweep import Line, placing
from jaxsd.typing import Path

try:
    import matplotlib
except ImportError:
    raise ImportError('the laboratory draws with matplotlib, which is missing: '
                      'pip install matplotlib') from None

FIELDS = ('sampler', 'schedule', 'guidance', 'steps', 'prompt', 'seed', 'calls', 'error', 'seconds',
          'rank')
INK = '#010203'  # replaced by the page's own colour of text
COLUMNS = 4  # panels side by side


def write(path: Path, data: bytes) -> None:
    """Write bytes; a file of that name is there whole or not at all."""
    path = pathlib.Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.') as folder:
        part = pathlib.Path(folder) / path.name
        part.write_bytes(data)
        os.replace(part, path)


def encode(image: Picture, kind: str = 'PNG', **options: Any) -> bytes:
    """uint8 [H,W,3] -> the bytes of a picture file, Pillow's kinds and options."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def table(results: Iterable[Mapping[str, Any]]) -> bytes:
    """Results (dicts, see sweep.lines) -> the bytes of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    for result in results:
        missing = math.isnan(result['error'])
        writer.writerow({**result, 'error': '' if missing else f'{result["error"]:.6g}',
                         'seconds': f'{result["seconds"]:.6g}'})
    return text.getvalue().encode()


def grid(images: Mapping[tuple[str, str, str, str], Picture], size: int) -> Picture:
    """Labelled pictures -> one picture uint8 [H,W,3].

    images: {(title, schedule, sampler, column): uint8 [h,w,3]}. Titles go down, each with a row per
    sampler; schedules go across, each with its columns. size: pixels of a picture's side.
    """
    titles, schedules, samplers, columns = (list(dict.fromkeys(v)) for v in zip(*images))
    font, gap, line = ImageFont.load_default(13), 6, 20
    left = math.ceil(max(map(font.getlength, samplers))) + 2 * gap
    panel = len(columns) * size + 2 * gap  # one schedule
    height = 3 * line + len(samplers) * size + gap  # one title
    sheet = Image.new('RGB', (left + len(schedules) * panel, len(titles) * height), 'white')
    pen = ImageDraw.Draw(sheet)

    def text(x, y, words, anchor='mm'):
        pen.text((x, y), words, fill='black', font=font, anchor=anchor)

    for t, title in enumerate(titles):
        top = t * height
        text(gap, top + line / 2, title, 'lm')
        for s, schedule in enumerate(schedules):
            x = left + s * panel
            text(x + (panel - 2 * gap) / 2, top + line * 1.5, schedule)
            for c, column in enumerate(columns):
                text(x + (c + 0.5) * size, top + line * 2.5, column)
        for r, sampler in enumerate(samplers):
            y = top + 3 * line + r * size
            text(left - gap, y + size / 2, sampler, 'rm')
            for (s, schedule), (c, column) in (
                    (a, b) for a in enumerate(schedules) for b in enumerate(columns)):
                image = images.get((title, schedule, sampler, column))
                if image is not None:
                    small = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
                    sheet.paste(small, (left + s * panel + c * size, y))
    return np.asarray(sheet)


def page(lines: Sequence[Line], grid: Picture, alt: str, *, title: str, summary: str,
         method: Iterable[str], command: str, versions: str, floor: float,
         tolerance: float) -> bytes:
    """The page of a sweep, HTML as bytes.

    lines: sweep.Line. grid: uint8 [H,W,3], alt: what it shows. summary and versions: text;
    method: paragraphs of text; command: to reproduce it. floor and tolerance: as for `sweep.lines`.
    """
    steps = sorted({n for line in lines for n in line.steps})
    scored = np.isfinite([value for line in lines for value in line.top1]).any()
    names = ['sampler', 'schedule', 'guidance', 'order', f'calls to error {tolerance:g}',
             *(f'error, {n} steps' for n in steps), 'ms per call', f's, {steps[-1]} steps',
             *(f'top 1, {n} steps' for n in steps if scored)]
    body = []
    for line in lines:
        at = {n: i for i, n in enumerate(line.steps)}

        def pick(values, at=at):
            return [values[at[n]] if n in at else math.nan for n in steps]

        values = [line.guidance, line.order, line.needed, *pick(line.errors),
                  1e3 * line.seconds[-1] / line.calls[-1], pick(line.seconds)[-1],
                  *(pick(line.top1) if scored else ())]
        cells = [f'<th scope="row" data-value="{_text(line.sampler)}">{_text(line.sampler)}</th>',
                 f'<td data-value="{_text(line.schedule)}">{_text(line.schedule)}</td>',
                 *map(_number, values)]
        body.append(f'<tr>{"".join(cells)}</tr>')
    head = ''.join(f'<th scope="col"><button type="button">{name}</button></th>' for name in names)
    template = string.Template(pathlib.Path(__file__).with_name('report.html').read_text('utf-8'))
    return template.substitute(
        title=_text(title), summary=_text(summary), head=head, body='\n'.join(body),
        figures='\n'.join(_figures(lines, floor, tolerance, scored)),
        grid=base64.b64encode(encode(grid, 'WEBP', quality=80)).decode(), alt=_text(alt),
        command=_text(command),
        method='\n'.join(f'<p>{_text(words)}</p>' for words in method),
        versions=_text(versions)).encode()


def _text(words):
    return html.escape(str(words))


def _number(value):
    if not math.isfinite(value):
        return '<td data-value="">&ndash;</td>'
    return f'<td data-value="{value:.6g}">{value:.3g}</td>'


def _figures(lines, floor, tolerance, scored):
    """HTML of the plots, one set for each guidance."""
    for guidance in dict.fromkeys(line.guidance for line in lines):
        some = [line for line in lines if line.guidance == guidance]
        at = f'guidance {guidance:g}'
        yield f'<h2>Guidance {guidance:g}</h2>'
        best = sorted((line for line in some if math.isfinite(line.needed)),
                      key=placing)[:20]
        if best:
            yield _figure(
                _bars(best),
                f'Fewest model calls until the error stays within {tolerance:g}, {at}: '
                + ', '.join(f'{line.sampler} on {line.schedule} {line.needed:g}'
                            for line in best[:5]) + (', ...' if len(best) > 5 else '.'))
        drawn = [line for line in some if np.isfinite(line.errors).any()]
        if drawn:
            yield _figure(
                _panels(drawn, 'errors', 'error', floor, tolerance),
                f'Error against model calls, {at}, a panel for each sampler, a line for each '
                'schedule, both axes logarithmic. Grey: the least error of all at that many calls. '
                f'Dashed: error {tolerance:g}.'
                + (f' Dotted: the reference\'s own error, {floor:.1g}.' if floor else ''))
        if scored:
            yield _figure(
                _panels(some, 'top1', 'nearest is right'),
                f'Retrieval: part of the pictures whose nearest emoji is the right one, against '
                f'model calls, {at}. Grey: the best of all.')
        yield _figure(_times(some), f'Time per picture against model calls, {at}; a point for each '
                                    'sampler, schedule and number of steps.')


def _figure(figure, caption):
    """A matplotlib figure -> HTML: SVG in the page's own colours, with a text for readers aloud."""
    text = io.StringIO()
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': caption}):
        figure.savefig(text, format='svg', transparent=True,
                       metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
    svg = text.getvalue()
    svg = svg[svg.index('<svg'):].replace(INK, 'currentColor')
    svg = re.sub(r' id="[\w.]+_\d+"', '', svg)  # the same in every figure, and nothing uses them
    svg = svg.replace('<svg', f'<svg role="img" aria-label="{_text(caption)}"', 1)
    return f'<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>'


def _axes(rows, columns, width, height):
    """A figure and its axes [rows,columns], everything in INK."""
    from matplotlib.figure import Figure
    colours = dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color',
                             'ytick.color', 'axes.titlecolor'), INK)
    with matplotlib.rc_context({**colours, 'font.size': 9, 'axes.titlesize': 9,
                                'font.family': 'sans-serif', 'font.sans-serif': 'DejaVu Sans'}):
        figure = Figure(figsize=(width, height), layout='constrained')
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat:
        axis.spines[['top', 'right']].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _style(i):
    """Ten colours that are seen on white and on black, then others' dashes."""
    return {'color': f'C{i % 10}', 'linestyle': ('-', '--', ':')[i // 10 % 3],
            'marker': 'osv^D'[i % 5], 'markersize': 3, 'linewidth': 1.2}


def _panels(lines, field, label, floor=0.0, tolerance=None):
    """Small multiples: a panel for each sampler, a line for each schedule, over model calls."""
    from matplotlib import ticker
    samplers = list(dict.fromkeys(line.sampler for line in lines))
    schedules = list(dict.fromkeys(line.schedule for line in lines))
    log = field == 'errors'
    points = sorted(
        (n, value) for line in lines for n, value in zip(line.calls, getattr(line, field))
        if math.isfinite(value) and (value > 0 or not log))
    best = [value for _, value in points]
    best = np.minimum.accumulate(best) if log else np.maximum.accumulate(best)
    rows = -(-len(samplers) // COLUMNS)
    figure, axes = _axes(rows, COLUMNS, 11, 1.9 * rows + 0.8)
    for axis, sampler in zip(axes.flat, samplers):
        axis.plot([n for n, _ in points], best, color='0.55', linewidth=3, alpha=0.5,
                  drawstyle='steps-post')
        for line in lines:
            if line.sampler == sampler:
                axis.plot(line.calls, getattr(line, field), label=line.schedule,
                          **_style(schedules.index(line.schedule)))
        axis.set_title(sampler)
        axis.set_xscale('log')
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        if log:
            axis.set_yscale('log')
        if tolerance:
            axis.axhline(tolerance, color=INK, linestyle='--', linewidth=0.7)
        if floor:
            axis.axhline(floor, color=INK, linestyle=':', linewidth=0.7)
    for axis in axes.flat[len(samplers):]:
        axis.set_visible(False)
    figure.supxlabel('model calls', fontsize=9)
    figure.supylabel(label, fontsize=9)
    handles = {}
    for axis in axes.flat:
        found, names = axis.get_legend_handles_labels()
        handles.update(zip(names, found))
    figure.legend([handles[name] for name in schedules], schedules, loc='outside upper left',
                  ncols=6, frameon=False, labelcolor=INK)
    return figure


def _bars(lines):
    figure, axes = _axes(1, 1, 8, 0.24 * len(lines) + 0.9)
    axis, places = axes[0, 0], range(len(lines))
    axis.barh(places, [line.needed for line in lines], color='C0')
    axis.set_yticks(places, [f'{line.sampler}, {line.schedule}' for line in lines])
    axis.invert_yaxis()
    for y, line in enumerate(lines):
        axis.text(line.needed, y, f' {line.needed:g}', va='center', color=INK)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel('model calls')
    return figure


def _times(lines):
    figure, axes = _axes(1, 1, 8, 3)
    axis = axes[0, 0]
    for line in lines:
        axis.plot(line.calls, line.seconds, 'o', markersize=3, color='C0', alpha=0.6)
    axis.set_xlabel('model calls')
    axis.set_ylabel('seconds per picture')
    axis.set_ylim(0)
    return figure
