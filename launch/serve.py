"""A server with A1111's API, for teams.

python -m launch.serve --config=configs/emoji.py --port=7860

Pictures of requests that come at once are made together, and come out as they do alone. On
SIGTERM what runs is finished.
"""

import os
import pathlib
import signal
import socket
import sys

from absl import app, flags

from jaxsd.recipe import fields, files, model_name

from . import engine, generate

FLAGS = flags.FLAGS


def define_flags():
    """Not at import: other mains have flags of these names."""
    engine.define_flags()
    for name, what in (('checkpoints', 'Checkpoints that clients may load'), (
            'vaes', 'VAEs that they may load'), ('controlnet', 'ControlNets for their units'), (
            'detectors', 'Networks that find hints for these (OpenPose, HED, lineart, M-LSD, '
            'NormalBae, MiDaS, Depth Anything)')):
        flags.DEFINE_multi_string(name, [], f'{what}, "[name=]PATH", or a folder of them; repeat '
                                  'for several.')
    flags.DEFINE_string('restore_faces', None, 'A file of GFPGAN v1.2 to v1.4 or CodeFormer, for '
                        "the extras endpoints; needs OpenPose's body_pose_model.pth and "
                        'facenet.pth among --detectors.')
    flags.DEFINE_string('preview', None, 'A small VAE (TAESD: folder, files or Hub id) that shows '
                        'the pictures come; else the model\'s own does, or what it taught.')
    flags.DEFINE_string('wildcards', None, 'A folder of NAME.txt, for __NAME__ in prompts.')
    flags.DEFINE_string('host', '127.0.0.1', 'Address to listen at; another than this machine\'s '
                        'own needs --api_key or --insecure.')
    flags.DEFINE_integer('port', 7860, 'Port.', 1, 65535)
    flags.DEFINE_string('api_key', None, 'What clients must send, as a Bearer token or as the '
                        'password of Basic; better given as JAXSD_API_KEY, which ps does not show.')
    flags.DEFINE_boolean('insecure', False, 'Let everybody in who reaches --host, without a key.')
    flags.DEFINE_list('hosts', [], 'Further names that clients call this machine by, for servers '
                      'without a key.')
    flags.DEFINE_integer('queue', 64, 'Pictures that may wait; beyond, 429.', 1)
    flags.DEFINE_float('timeout', 300, 'Seconds for a request, waiting included; then 504.', 0.1)
    flags.DEFINE_float('read_timeout', 30, 'Seconds to send a request, and to take its answer.',
                       0.1)
    flags.DEFINE_integer('max_pixels', 2**20, 'Width times height; of a picture that is sent, four '
                         'times that.', 64)
    flags.DEFINE_integer('max_steps', 100, 'Steps of a picture.', 1)
    flags.DEFINE_integer('max_batch', 16, 'Pictures of a request.', 1)
    flags.DEFINE_integer('max_body', 2**24, 'Bytes of a request\'s body.', 1)


def run(extend=None):
    """Listen, load, serve until SIGTERM or SIGINT. extend: as of `jaxsd.serve.app.build`, called
    when the imports are done; pages do not wait for the first picture."""
    recipe = FLAGS.config
    key = FLAGS.api_key or os.environ.get('JAXSD_API_KEY')
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's chatter
    try:
        from jaxsd.serve.middleware import LOOPBACK
        from jaxsd.serve.server import Server
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is missing: pip install "jaxsd[serve]"') from None
    from jaxsd.serve.a1111 import Limits
    from jaxsd.serve.app import Service, Settings
    from jaxsd.serve.choices import Choices
    from jaxsd.serve.metrics import Metrics
    local = FLAGS.host in LOOPBACK
    if not local and not (key or FLAGS.insecure):
        raise ValueError(f'--host={FLAGS.host}: expected --api_key, or JAXSD_API_KEY, for a server '
                         'that others can reach; --insecure does without')
    if FLAGS.max_batch > FLAGS.queue:
        raise ValueError(f'--max_batch={FLAGS.max_batch}: expected at most --queue={FLAGS.queue}')
    hosts = None  # a web page that leads a browser here does not know the key
    if local or not key:
        hosts = tuple(name.lower() for name in (*LOOPBACK, *FLAGS.hosts, *(
            () if local else (socket.gethostname(), socket.getfqdn()))))
    if not local and not key:
        print(f'warning: without a key, everybody who reaches {FLAGS.host} may use this server',
              file=sys.stderr)
    settings = Settings(
        defaults={**fields(recipe), 'wildcards': FLAGS.wildcards},
        limits=Limits(FLAGS.max_pixels, FLAGS.max_steps, FLAGS.max_batch), key=key or None,
        body=FLAGS.max_body, timeout=FLAGS.timeout, read=FLAGS.read_timeout,
        hosts=hosts, addresses=not local, connections=FLAGS.queue + 64)
    metrics = Metrics()
    choices = Choices(_files)
    if not (FLAGS.checkpoint or recipe.checkpoint or choices.all('checkpoints')):
        raise ValueError('--checkpoints: expected at least one')
    service = Service(settings, metrics, lambda *chosen: _load(metrics, choices, *chosen), choices,
                      early=extend is not None)
    server = Server(service, FLAGS.host, FLAGS.port, extend)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it is done
    code = 0
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    except SystemExit as end:  # uvicorn's, which has said why: a port that is taken
        code = end.code
    if service.failed is not None:
        print('error:', ' '.join(str(service.failed).split()), file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread may still load or compile: nobody waits for it


def _files():
    """What clients may load and name, for Choices; the checkpoint of the start is among it."""
    from jaxsd.serve.choices import KINDS
    found = {kind: files(f'--{kind}', FLAGS[kind].value or ()) for kind in KINDS}
    if start := FLAGS.checkpoint or FLAGS.config.checkpoint:
        found['checkpoints'] = {model_name(start): start} | found['checkpoints']
    return found


def _load(metrics, choices, checkpoint=None, vae=None):
    """The model and all that requests may name, on all devices -> Loaded. checkpoint, vae: Weights,
    or None: those of the flags."""
    import jaxsd
    from jaxsd.run import faces
    from jaxsd.serve.app import Loaded
    from jaxsd.serve.queue import Queue
    several = len(choices.all('checkpoints')) > 1  # of which not all may take every LoRA
    how = engine.describe() | {'controlnet': FLAGS.controlnet, 'detectors': FLAGS.detectors,
                               'fitting': several}
    if checkpoint is None and not how['checkpoint']:
        checkpoint = choices.all('checkpoints')[0]
    how |= {kind: one.path for kind, one in (('checkpoint', checkpoint), ('vae', vae)) if one}
    maker, identity, how = engine.build(how, lone=FLAGS.slots is None)
    preview = jaxsd.load_vae(FLAGS.preview, how['dtype']) if FLAGS.preview else None
    restorer = jaxsd.load_face_restorer(FLAGS.restore_faces) if FLAGS.restore_faces else None
    if restorer:
        faces.check(restorer, maker.nets[0].detectors)
    queue = Queue(maker, identity, metrics, FLAGS.queue, preview)
    name = checkpoint.name if checkpoint else how['model']
    print(f'{name} at http://{FLAGS.host}:{FLAGS.port}', flush=True)
    names = {'vae': vae.name if vae else pathlib.Path(FLAGS.vae or '').stem,
             'refiner': pathlib.Path(FLAGS.refiner or '').stem}
    kept = {key: how[key] for key in ('dtype', 'tile', 'settings')}  # no path of here
    return Loaded(queue, name, **names, run=kept | {'model': name}, restorer=restorer)


if __name__ == '__main__':
    define_flags()
    app.run(generate.guarded(run), flags_parser=generate.parse)
