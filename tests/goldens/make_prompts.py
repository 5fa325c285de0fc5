"""Make tests/goldens/prompts.json.gz: how A1111 and ComfyUI read the prompts of tests/data.

    python tests/goldens/make_prompts.py PROMPT_PARSER EXTRA_NETWORKS SD1_CLIP

modules/prompt_parser.py and modules/extra_networks.py of AUTOMATIC1111/stable-diffusion-webui 1.10,
and comfy/sd1_clip.py of comfyanonymous/ComfyUI; of the last two only the functions that read
prompts are run. Needs lark, and torch for prompt_parser.py. A row for each prompt, of STEPS steps:
tags [[kind, argument, ...], ...]; AND's parts [[weight, [[end, [[text, weight], ...]], ...]], ...];
ComfyUI's reading of the text without tags [[text, weight], ...]. After the prompts come random
ones, with their text in front; of those with an unbalanced bracket and a schedule none is kept:
Earley's algorithm picks any one of their readings.
"""

import ast
import gzip
import json
import pathlib
import random
import re
import runpy
import sys
from collections import defaultdict

HERE = pathlib.Path(__file__).parent
STEPS = 12
PIECES = [*'[[[[]]]](())::::||ab3', ' ', '0.5', '\\', ':1.2)', ':4]', '\n', 'BREAK', ' AND ']


def functions(path, names):
    """What some top-level names of a file are, without its imports."""
    tree = ast.parse(pathlib.Path(path).read_text())
    tree.body = [node for node in tree.body if getattr(node, 'name', None) in names
                 or isinstance(node, ast.Assign) and node.targets[0].id in names]
    space = {'re': re, 'defaultdict': defaultdict}
    exec(compile(tree, path, 'exec'), space)
    return space


def main(prompt_parser, extra_networks, sd1_clip):
    a1111 = runpy.run_path(prompt_parser)
    tags = functions(extra_networks, ('ExtraNetworkParams', 're_extra_net', 'parse_prompt'))
    comfy = functions(sd1_clip, ('parse_parentheses', 'token_weights', 'escape_important',
                                 'unescape_important'))

    def row(text):
        text, found = tags['parse_prompt'](text)
        (indexes,), texts, _ = a1111['get_multicond_prompt_list']([text])
        schedules = a1111['get_learned_conditioning_prompt_schedules'](texts, STEPS)
        return [[[kind, *params.items] for kind in found for params in found[kind]],
                [[weight, [[end, a1111['parse_prompt_attention'](at)] for end, at in schedules[i]]]
                 for i, weight in indexes],
                [[comfy['unescape_important'](words), weight] for words, weight
                 in comfy['token_weights'](comfy['escape_important'](text), 1.0)]]

    prompts = (HERE.parent / 'data' / 'prompts.txt').read_text('utf-8').split('\n')[:-1]
    rows = [row(prompt.replace('\\n', '\n')) for prompt in prompts]
    rng = random.Random(0)
    fuzz = []
    while len(fuzz) < 1000:
        text = ''.join(rng.choices(PIECES, k=rng.randint(2, 14)))
        if not ambiguous(text):
            fuzz.append([text, *row(text)])
    with gzip.GzipFile(HERE / 'prompts.json.gz', 'wb', mtime=0) as file:
        file.write(json.dumps({'steps': STEPS, 'prompts': rows, 'fuzz': fuzz}).encode())


def ambiguous(text):
    """Whether a bracket is unbalanced while there is something like a schedule."""
    bare = re.sub(r'\\.', '', text)
    while bare != (bare := re.sub(r'\[[^][()]*\]|\([^][()]*\)', '', bare)):
        pass
    return re.search(r'[][()]', bare) and re.search(r':\s*[-+.\d]+\s*\]', text)


if __name__ == '__main__':
    main(*sys.argv[1:])
