"""The command `jaxsd`: `jaxsd generate --prompt="red apple"` is `python -m launch.generate ...`."""

import ast
import difflib
import importlib
import pathlib
import runpy
import sys

CHECKOUT = ('emoji_data', 'emoji_sets', 'evaluate', 'gallery')  # need the data of the repository


def commands() -> dict[str, str]:
    """{name: what it does, a line}: the modules of launch/ that are run as mains."""
    folder = pathlib.Path(importlib.import_module('jaxsd.launch').__path__[0])
    texts = {path.stem: path.read_text() for path in sorted(folder.glob('*.py'))}
    if not (folder.parent / 'pyproject.toml').exists():
        texts = {name: text for name, text in texts.items() if name not in CHECKOUT}
    docs = {name: ast.get_docstring(ast.parse(text)) or name for name, text in texts.items()
            if "if __name__ == '__main__'" in text}
    return {name: doc.splitlines()[0].partition(': `')[0].rstrip(':.')
            for name, doc in docs.items()}


def main() -> int:
    """Run a command -> its exit code."""
    known, name = commands(), sys.argv[1] if len(sys.argv) > 1 else '--help'
    if name in ('-h', '--help', 'help'):
        width = max(map(len, known))
        print('jaxsd COMMAND [--flags]; jaxsd COMMAND --help\n')
        print(*(f'  {command:{width}}  {text}' for command, text in known.items()), sep='\n')
        return 0
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f': did you mean {near[0]!r}?' if near else '.'
        print(f'error: unknown command {name!r}{hint} '
              f'Commands: {", ".join(known)}', file=sys.stderr)
        return 2
    sys.argv[:2] = [f'jaxsd {name}']
    runpy.run_module(f'jaxsd.launch.{name}', run_name='__main__', alter_sys=True)
    return 0
