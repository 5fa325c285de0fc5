"""A page to draw on, in the browser: the server of `launch.serve`, and its API, with the studio.

python -m launch.studio

opens it on the emoji model; --checkpoint=FILE on any other. The page is there at once, the model
as soon as it is loaded.
"""

import sys
import threading
import webbrowser

from absl import app, flags

from . import generate, serve

FLAGS = flags.FLAGS


def define_flags():
    """Not at import: other mains have flags of these names."""
    serve.define_flags()
    flags.DEFINE_boolean('browser', True, 'Open the page in a browser, where this is a '
                         'terminal.')


def run():
    """Serve the page until SIGTERM or SIGINT. The emoji model brings its ControlNet."""
    shipped = generate.ROOT / 'checkpoints'
    if not (FLAGS.checkpoint or FLAGS.controlnet) and (
            FLAGS.config.checkpoint == str(shipped / 'emoji')):
        FLAGS.controlnet = [f'edges={shipped / "emoji_edges"}']
    serve.run(_extend)


def _extend(routes, service):
    from jaxsd.studio.app import extend
    extend(routes, service)
    url = f'http://{FLAGS.host}:{FLAGS.port}/'
    print(f'the studio is at {url}', flush=True)
    if FLAGS.browser and sys.stdout.isatty():
        threading.Timer(0.5, webbrowser.open, [url]).start()


if __name__ == '__main__':
    define_flags()
    app.run(generate.guarded(run), flags_parser=generate.parse)
