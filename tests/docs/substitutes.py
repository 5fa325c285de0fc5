"""What is changed in the pages' commands and programs before they are run, and what is not run.

Weights that cannot be had here are tiny random ones of the same layout (`weights.py`), under the
same Hub ids or under these names; what takes long is made smaller.
"""

# {pattern: replacement}, of all commands, one after the other. {port}: a free one.
COMMANDS = {
    # templates
    r'^jaxsd generate --warm$': 'jaxsd generate --warm --prompt=rocket',
    r'checkpoints/my-model \.\.\.': 'model.safetensors --prompt=rocket',
    r'--checkpoint=\.\.\. photo\.jpg': '--checkpoint=depth photo.jpg',
    r'(?<=--kind=canny)\|scribble\|tile\|pose \.\.\.': ' photo.jpg',
    # a lone file does not say the sizes of a small VAE
    r'(?<=--vae=)vae\.safetensors': 'vae',
    # of a training that is not run
    r'runs/mine/model': 'checkpoints/emoji',
    # less of the same
    r'--steps=5,10,20,40 --guidance=1,4': '--steps=2,3 --reference_steps=4 --guidance=1',
    r'--steps=5,10,20$': '--steps=2,3 --reference_steps=4 --seeds=0',
    r'--steps=4,5,6,7,8,10,12,16(.*)--reference_steps=400': r'--steps=3\1--reference_steps=4 '
                                                            r'--prompt=rooster',
    r'--steps=4,5,6,8,10,12,15,20': '--steps=4,5 --seeds=0 --options="levels=20"',
    r'--steps=5,6,8,10': '--steps=6 --seeds=0 --options="levels=20"',
    r'--seeds=0,1 ': '--seeds=0 ',
    r'tests/data/emoji_eval\.txt': 'prompts.txt',
    r'--seeds=0-3': '--seeds=0',
    r'--sample=8': '--sample=2',
    r'--method=learn --steps=6': r'--method=learn --steps=2 --seeds=0 --prompt=rooster '
                                 r'--options="updates=1, sampler=euler"',
    r'--seeds=0-49': '--seeds=0',
    r'--rounds=7': '--rounds=1',
    # a server's
    r'7860': '{port}',
}

# {pattern: flags at the end of such commands}: of random models small pictures, of few steps.
SMALLER = {r'(generate|batch) .*(--checkpoint=|--config=(configs/)?(sd|instruct|x2))':
           '--width=64 --height=64 --steps=2',
           r'jaxsd train --config=train_lora': '--config.data.resolution=64 '
           '--config.train.steps=1 --config.optimizer.warmup=0 --config.lora.rank=1'}

# {pattern of a whole command: why it is not run}. That its program and flags exist is tested.
NOT_RUN = {
    r'(uv |\S*/)?pip install .*': 'installs from an index; tests/launch/test_wheel.py does',
    r'docker .*': 'needs Docker; tests/launch/test_containers.py',
    r'jaxsd batch --distributed': 'needs a cluster; tests/batch/test_runner.py has two processes',
    r'jaxsd studio( .*)?': 'a server with a page; tests/studio',
    r'jaxsd batch .*--out=runs/grid': 'of a file that the studio gives; tests/studio runs it',
    r'make docs': 'tests/docs/test_site.py builds it',
    r'apt-get .*': 'changes the machine',
    r'make (test|test-all|parity|lint)|(\S*/)?python -m pytest .*': 'runs what CI runs: .ci/run',
    r'make gallery': '2 minutes; tests/launch/test_emoji_conditions.py draws its rows',
    r'.*-m launch\.emoji_sets.*': 'needs the font; tests/launch/test_emoji_sets.py',
    r'jaxsd generate .*=runs/emoji_.*': 'needs what minutes of training write',
    r'.*-m launch\.ray_batch .*': 'needs GPUs; tests/launch/test_ray_main.py has CPUs',
    r'.*-m launch\.bench .*(--version=|--parts=(requests|train|quantized|cheaper)).*': 'minutes',
    r'.*tests/(serve|studio)/load\.py .*': 'minutes; tests of both ask less',
    r'.*-m launch\.emoji_data .*': 'needs the font; tests/launch/test_emoji_data.py',
    r'jaxsd train .*--memory': 'compiles a network of full size; tests/train/test_finetune.py',
    r'.*-m launch\.train .*': 'minutes to hours; tests/train, tests/launch/test_train.py',
    r'.*-m launch\.evaluate .*': 'minutes; tests/launch/test_emoji_checkpoint.py',
}

# {page: Python before its first block}: what a page takes as given.
BEFORE = {
    'docs/batch.md': """
import jaxsd
model, requests = jaxsd.load('emoji'), [jaxsd.Request('rocket', steps=2)]
requests = [request.replace(seed=0) for request in requests]
""",
    'docs/emoji.md': """
import jaxsd.images
image = jaxsd.images.read('docs/examples/apple.png')
""",
    'docs/guidance.md': """
import jax.numpy as jnp
from jaxsd import Request, sampling
denoise = weak = lambda x, sigma, i: x / (1 + sigma**2)
log_prob = lambda x: -jnp.square(x).sum(axis=(1, 2, 3))
""",
    'docs/prompts.md': 'import jaxsd',
    'docs/training.md': """
import numpy as np
images, captions = np.zeros((2, 64, 64, 3), np.uint8), ['red apple', 'rocket']
""",
    'docs/samplers.md': """
import numpy as np
from jaxsd import sampling
from jaxsd.sampling.tables import mix, pairs, row, table
from jaxsd.config import ScheduleConfig
from types import SimpleNamespace
config, shape = SimpleNamespace(schedule=ScheduleConfig()), (8, 8, 4)
net = lambda x, t, i: 0.1 * x
guidance = np.array([7.0, 5.0], np.float32)
other = sampling.plan('euler', sampling.schedule('normal', 10, config.schedule))
""",
}
# {page: {text: its replacement}}
PROGRAMS = {
    'docs/research.md': {'[:24]': '[:2]', 'seen[:16], steps=[4, 6, 10]': 'seen, steps=[4]',
                         "sampler='dpmpp_2m')": "sampler='dpmpp_2m', updates=1)"},
}
