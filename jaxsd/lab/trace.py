"""The picture that everyone draws to explain diffusion: one picture, from noise to the end."""

import functools
import io
from typing import NamedTuple

import jax
import numpy as np

from jaxsd import sampling
from jaxsd.lab.report import matplotlib
from jaxsd.run import decode, inputs, latents, lengthened, networks, resolve
from jaxsd.run.request import Request
from jaxsd.weights import Model

ROWS = {  # field of Trace: what it says at the left
    'noisy': 'the noisy picture $x$\n(as the network sees it,\n$x / \\sqrt{1 + \\sigma^2}$)',
    'eps': 'the noise $\\varepsilon$\nit predicts',
    'denoised': 'the picture $\\hat x_0$\nit predicts',
}


class Trace(NamedTuple):
    """One denoise loop; a leading axis of calls, all pictures decoded to uint8 [calls,H,W,3]."""

    call: np.ndarray  # [calls] from 1
    step: np.ndarray  # [calls] from 1; samplers with several calls a step repeat it
    sigma: np.ndarray  # [calls]
    timestep: np.ndarray  # [calls]
    noisy: np.ndarray  # x / sqrt(1 + sigma^2), of unit scale
    eps: np.ndarray  # (x - denoised) / sigma, standard normal if the prediction is right
    denoised: np.ndarray
    final: np.ndarray  # uint8 [H,W,3]


def trace(model: Model, request: Request) -> Trace:
    """Draw one picture and keep what every model call saw and said -> Trace.

    The noise is latents of unit scale like pictures are, so the decoder shows it as it is.
    Raises ValueError for samplers that choose their own steps.
    """
    request, = resolve([request], model.config)
    data = inputs(model, [request])
    if sampling.free(data.rows):
        raise ValueError(f'sampler {request.sampler!r} chooses its own steps, which are not known '
                         'beforehand; trace another one')
    data = lengthened(data)
    params, config = networks(model, data)
    final, seen = _loop(params, data, config=config, height=request.height, width=request.width)
    called = data.rows.sigma[:, 0] > 0
    x, eps, denoised = (np.asarray(field)[called, 0] for field in seen)  # [calls,h,w,L]
    sigma = data.rows.sigma[called, 0].astype(np.float64)
    count = len(sigma)
    show = functools.partial(_decode, model.params, config=model.config)
    return Trace(
        call=np.arange(count) + 1,
        step=np.arange(count) * request.steps // count + 1,
        sigma=sigma,
        timestep=sampling.sigma_to_t(sigma, model.config.schedule),
        noisy=_each(show, x / np.hypot(1, sigma)[:, None, None, None].astype(x.dtype)),
        eps=_each(show, eps), denoised=_each(show, denoised), final=_each(show, final)[0])


def picture(trace: Trace, request: Request, columns: int = 7) -> bytes:
    """A Trace as one picture fit for a talk -> the bytes of a PNG.

    Columns of calls evenly spaced in number, the first and the last among them, and the result;
    below, the noise level of all calls with the shown ones marked.
    """
    from matplotlib.figure import Figure
    count = len(trace.sigma)
    shown = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int))
    with matplotlib.rc_context({'font.size': 11, 'mathtext.fontset': 'cm'}):
        size, left, bottom, top, gap = 1.5, 2.5, 1.6, 1.0, 0.08  # inches
        width = left + (len(shown) + 1) * (size + gap) + 0.5
        height = bottom + 3 * (size + gap) + top
        figure = Figure(figsize=(width, height), dpi=160)

        def axes(x, y, w, h):
            return figure.add_axes((x / width, y / height, w / width, h / height))

        def show(column, row, image):
            axis = axes(left + column * (size + gap) + 0.3 * (column == len(shown)),
                        bottom + (2 - row) * (size + gap), size, size)
            axis.imshow(image, interpolation='nearest' if len(image) < 200 else 'antialiased')
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color('0.7')
            return axis

        for column, i in enumerate(shown):
            for row, field in enumerate(ROWS):
                axis = show(column, row, getattr(trace, field)[i])
                if row == 0:
                    axis.set_title(f'step {trace.step[i]}\n$\\sigma = {trace.sigma[i]:.3g}$,  '
                                   f'$t = {trace.timestep[i]:.0f}$', fontsize=11)
                if column == 0:
                    axis.set_ylabel(ROWS[field], rotation=0, ha='right', va='center', labelpad=12)
        show(len(shown), 2, trace.final).set_title('the result', fontsize=11)

        axis = axes(left, 0.55, len(shown) * (size + gap) - gap, bottom - 0.75)
        axis.semilogy(trace.call, trace.sigma, '-', color='0.6')
        axis.semilogy(trace.call, trace.sigma, 'o', color='0.6', markersize=3)
        axis.semilogy(trace.call[shown], trace.sigma[shown], 'o', color='C3')
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel('model call')
        axis.set_ylabel('noise level $\\sigma$', rotation=0, ha='right', va='center')
        axis.spines[['top', 'right']].set_visible(False)
        figure.text(0.2 / width, 1 - 0.25 / height, f'“{request.prompt}”', fontsize=16, va='top')
        figure.text(1 - 0.2 / width, 1 - 0.3 / height, ha='right', va='top', color='0.4', s=(
            f'{request.sampler}, {request.schedule}, {request.steps} steps, '
            f'guidance {np.ravel(request.guidance)[0]:g}, seed {request.seed}'))
        png = io.BytesIO()
        figure.savefig(png, format='png', metadata={'Software': None})
    return png.getvalue()


@functools.partial(jax.jit, static_argnames=('config', 'height', 'width'))
def _loop(params, data, *, config, height, width):
    return latents(params, data, config, height, width,
                   info=lambda call: (call.x, call.eps, call.denoised))


@functools.partial(jax.jit, static_argnames='config')
def _decode(params, latent, *, config):
    return decode(params, config, latent)[0]


def _each(show, latents):
    """One at a time: a single shape to compile, and no more memory than a single picture needs."""
    return np.concatenate([np.asarray(show(latent[None])) for latent in np.asarray(latents)])
