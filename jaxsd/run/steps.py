"""What changes from row to row of a sampler's table, for all kinds of conditions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsd import sampling
from jaxsd.sampling.guidance import Guidance
from jaxsd.sampling.guidance_options import steps_of


class Steps(NamedTuple):
    """Rows of B pictures, [rows,B,...] of each field, or one row of them, [B,...]. A field that is
    None is absent from the program."""

    row: sampling.Row | sampling.Custom  # the sampler's
    call: Any  # int32: the row's number in the picture's own table, by which its noise is drawn
    guidance: Guidance
    text_index: Any = None  # int32 [...,P]: the text of each part of the guidance; None: its own
    control: dict | None = None  # {ControlNet: [...,P,N]}: weights of its N outputs; of a union
    # [...,P,N+K], and of its K hints
    image_prompts: dict | None = None  # {IP-Adapter: [...,J,L]}: see image_prompts
    strength: Any = None  # a mask from here up is painted, where it says how strongly
    timestep: Any = None  # at which the model is called, -1: as the noise level says
    noise: Any = None  # [...,h,w,L]: of stochastic samplers, where it is not drawn from the key
    reference: Any = None  # [...,P,L]: how much each self-attention sees the reference


def fractions(levels: np.ndarray) -> np.ndarray:
    """The part of the steps that lies before each, [steps]; [0.] for one without steps. levels: a
    picture's noise levels, [steps + 1]."""
    steps = max(len(levels) - 1, 1)
    return np.arange(steps) / steps


def span(before: np.ndarray, start: float, end: float) -> np.ndarray:
    """bool [steps]: those from a fraction of the steps to another, as of diffusers' ControlNets.
    before: of `fractions`."""
    after = (np.arange(len(before)) + 1) / len(before)
    return (before >= start) & (after <= end)


def over_rows(values: Sequence[np.ndarray], sigmas: Sequence[np.ndarray], rows: Any, what: str,
              varies: Any) -> np.ndarray:
    """What pictures have for their steps, a list of [steps,...], dealt to rows -> [rows,B,...].

    sigmas: of each picture, [steps + 1]. rows: of [rows,B]. varies bool [B]: for whom it is not
    constant, which samplers that choose their own steps cannot have: ValueError that names `what`.
    """
    if sampling.free(rows) and np.any(varies):
        raise ValueError(f'{what}: expected no change over the steps with {rows.rule.name}, which '
                         'chooses its own steps; take another sampler')
    return np.stack([some[steps_of(levels, rows.sigma[:, i])] for i, (some, levels)
                     in enumerate(zip(values, sigmas))], 1)


def chunk(steps: Steps, start: int, stop: int, length: int) -> Steps:
    """Rows start to stop of a table, and idle ones up to `length` -> Steps [length,B,...]."""
    def part(a):
        tail = np.broadcast_to(a[max(stop - 1, 0)], (length - (stop - start), *a.shape[1:]))
        return np.concatenate([a[start:stop], tail])

    row = sampling.pad(jax.tree.map(lambda a: a[start:stop], steps.row), length)
    return jax.tree.map(part, steps._replace(row=None))._replace(row=jax.tree.map(np.float32, row))


def beside(tables: Sequence[Steps]) -> Steps:
    """Steps of one picture each, of one length -> those of all, side by side."""
    return tables[0] if len(tables) == 1 else jax.tree.map(
        lambda *fields: np.concatenate(fields, 1), *tables)

