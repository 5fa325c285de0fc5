"""What a training says: means of its metrics, its speed, curves, pictures."""

import contextlib
import csv
import html
import json
import os
import pathlib
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from jax import Array

from jaxsd.run.picture import write_png
from jaxsd.train.config import TrainConfig
from jaxsd.typing import Path

# Products and sums a second of one device in bfloat16, for the MFU: by jax.Device.device_kind.
PEAKS = {'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12, 'NVIDIA A100': 312e12, 'TPU v4': 275e12,
         'TPU v5 lite': 197e12, 'TPU v5': 459e12, 'TPU v6 lite': 918e12}


class Meter:
    """Means of metrics, and speed, since the last row."""

    def __init__(self, c: TrainConfig):
        self.c, self.peak = c, next(
            (peak for kind, peak in PEAKS.items()
             if jax.devices()[0].device_kind.startswith(kind)), None)
        self._reset()

    def _reset(self):
        self.metrics, self.waited, self.clock = [], 0.0, time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context: the loop waits for a batch."""
        since = time.monotonic()
        yield
        self.waited += time.monotonic() - since

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context: what is done is no step of the training."""
        since = time.monotonic()
        yield
        self.clock += time.monotonic() - since

    def add(self, metrics: Mapping[str, Array]) -> None:
        """The metrics of a step."""
        self.metrics.append(metrics)

    def row(self, flops: float) -> dict[str, float]:
        """Means and speeds; flops: of a step on one device."""
        row = {k: float(np.mean([float(m[k]) for m in self.metrics])) for k in self.metrics[-1]}
        seconds, count = time.monotonic() - self.clock, len(self.metrics)
        row |= {'seconds_per_step': seconds / count, 'input_wait': self.waited / seconds,
                'examples_per_second': count * self.c.batch_size / seconds}
        if self.peak:
            row['mfu'] = flops * count / seconds / self.peak
        self._reset()
        return row


class Log:
    """Metrics as a CSV, a curve and TensorBoard's events, printed too, under a progress bar; and a
    page with all of it.

    Rows after `first` go when training resumes. about: text for the page, such as the recipe."""

    def __init__(self, folder: pathlib.Path, first: int, steps: int, about: str = ''):
        self.about = about
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / 'log.csv'
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            with open(self.path, newline='') as file:
                self.rows = [r for r in csv.DictReader(file) if int(r['step']) <= first]
        self.bar = tqdm.tqdm(total=steps, initial=first, unit='step', disable=None)
        self.events: Any = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter
            self.events = SummaryWriter(str(folder / 'tensorboard'), purge_step=first + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Add values of a step."""
        if jax.process_index():
            return
        row = {'step': step, **row}
        tqdm.tqdm.write(json.dumps({k: float(f'{v:.5g}') for k, v in row.items()} | {'step': step}))
        self.bar.set_postfix({k: f'{row[k]:.4g}' for k in ('loss',) if k in row}, refresh=False)
        for name, value in row.items():
            if name != 'step':
                self.events.add_scalar(name, value, step)
        if self.rows and int(self.rows[-1]['step']) == step:
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        part = self.path.with_suffix('.part')
        with open(part, 'w', newline='') as file:
            names = dict.fromkeys(name for row in self.rows for name in row)
            writer = csv.DictWriter(file, names, restval='')
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, self.path)

    def image(self, step: int, image: Array | np.ndarray) -> None:
        """Keep a picture, uint8 [H,W,3]."""
        if jax.process_index() == 0:
            folder = self.folder / 'samples'
            folder.mkdir(exist_ok=True)
            write_png(folder / f'{step:06d}.png', np.asarray(image))
            self.events.add_image('samples', np.asarray(image), step, dataformats='HWC')

    def draw(self) -> None:
        """The curves so far, as curve.png, and the page, index.html."""
        if self.rows and jax.process_index() == 0:
            draw_curve(self.rows, self.folder / 'curve.png')
            part = self.folder / 'index.html.part'
            part.write_text(page(self.folder, self.rows[-1], self.about), encoding='utf-8')
            os.replace(part, self.folder / 'index.html')

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        if self.events is not None:
            self.events.close()


PAGE = string.Template("""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$name</title>
<style>
  body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em;
         color-scheme: light dark; }
  img { max-width: 100%; background: white; } figure { display: inline-block; margin: 0 1em 1em 0; }
  td, th { text-align: left; padding: 0 1em 0.2em 0; } pre { overflow: auto; }
</style>
<h1>$name, step $step</h1>
<p><img src="curve.png" alt="metrics over the steps"></p>
<table>$numbers</table>
$samples
<h2>Recipe</h2>
<pre>$about</pre>
""")


def page(folder: pathlib.Path, row: Mapping[str, Any], about: str) -> str:
    """A run's page: curves, the last row of the log, samples, newest first, and its recipe."""
    numbers = ''.join(f'<tr><th>{html.escape(k)}<td>{float(v):.5g}' for k, v in row.items()
                      if k != 'step' and v not in (None, ''))
    pictures = sorted((folder / 'samples').glob('*.png'), reverse=True)
    samples = ''.join(
        f'<figure><img src="samples/{path.name}" alt="samples" loading="lazy">'
        f'<figcaption>step {int(path.stem)}</figcaption></figure>' for path in pictures)
    return PAGE.substitute(name=html.escape(folder.name), step=row['step'], numbers=numbers,
                           samples=f'<h2>Samples</h2>{samples}' if samples else '',
                           about=html.escape(about))


SPEEDS = ('step', 'seconds_per_step', 'input_wait', 'examples_per_second', 'mfu')


def draw_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the metrics of a log, a list of dicts, against the step, each in its own panel."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    names = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in SPEEDS]
    figure, panels = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for panel, name in zip(panels[0], names):
        shown = [r for r in rows if r.get(name) not in (None, '')]
        values = np.array([float(r[name]) for r in shown])
        panel.plot([int(r['step']) for r in shown], values, linewidth=0.8)
        panel.set(title=name, xlabel='step', yscale='log' if (values > 0).all() else 'linear')
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
