"""What the pages tell people to type: shell commands and Python, taken out of the Markdown."""

import dataclasses
import re

from mains import ROOT

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'checkpoints' / 'README.md',
         *sorted((ROOT / 'docs').glob('*.md'))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
SHELL = ('sh', 'bash', 'shell')  # all lines of these blocks are commands
PROGRAMS = ('jaxsd|python3?|pip|make|curl|apt-get|conda|docker|export|git|gcloud|kubectl|mpirun|ray'
            '|sbatch|srun|uv')
# In blocks without a language, and in sentences. There `jaxsd serve` without flags is a name.
COMMAND = re.compile(rf'(?:[A-Z_]+=\S* )*(?:\.venv/bin/)?(?:{PROGRAMS}) +\S')
NAMED = re.compile(r'(?:jaxsd |python -m launch\.)(\w+)|pip install')


@dataclasses.dataclass(frozen=True)
class Piece:
    """A command, or a Python block, and where it stands; lines that a command must print, if the
    page shows some (it may fail then)."""
    page: str
    line: int
    text: str
    output: tuple = ()


def blocks(text):
    """The code blocks of a page -> [(language, '' without one; its first line; its text)]."""
    found, lines, i = [], text.splitlines(), 0
    while i < len(lines):
        if opening := re.match(r'( *)(```+)(\w*)', lines[i]):
            indent, mark, language = opening.groups()
            start = i = i + 1
            while not lines[i].strip().startswith(mark):
                i += 1
            found.append((language, start + 1,
                          '\n'.join(line.removeprefix(indent) for line in lines[start:i])))
        elif lines[i].startswith('    ') and not (i and lines[i - 1].strip()):
            start = i
            while i < len(lines) and (lines[i].startswith('    ') or not lines[i].strip()):
                i += 1
            found.append(('', start + 1, '\n'.join(line[4:] for line in lines[start:i])))
            continue
        i += 1
    return found


def commands(path):
    """The shell commands of a page, those in its sentences and tables too -> [Piece]."""
    text, page = path.read_text('utf-8'), path.relative_to(ROOT).as_posix()
    found, lines = [], text.splitlines()
    for language, number, body in blocks(text):
        lines[number - 1:number + body.count('\n')] = [''] * (body.count('\n') + 1)
        if language == 'console':  # `$ command`, and what it prints
            for shown in re.finditer(r'^\$ (.*)\n((?:(?!\$ ).*(?:\n|\Z))*)', body, re.M):
                found.append(Piece(page, number + body.count('\n', 0, shown.start()), shown[1],
                                   tuple(shown[2].splitlines())))
            continue
        for line in re.sub(r'\\\n\s*', '\0', body).split('\n'):
            command = re.sub(r'(^|\s+)# .*$', '', line.replace('\0', ' ')).strip()
            if command and (language in SHELL or not language and COMMAND.match(command)):
                found.append(Piece(page, number, command))
            number += 1 + line.count('\0')
    rest = '\n'.join(lines)
    for code in re.finditer(r'(?<!`)`([^`]+)`(?!`)', rest):
        command = ' '.join(code[1].replace('\\|', '|').split())
        if COMMAND.match(command):
            found.append(Piece(page, rest.count('\n', 0, code.start()) + 1, command))
    return sorted(found, key=lambda piece: piece.line)


def named(path):
    """{file: text} of the Python blocks of a page that begin with `# file.py`."""
    return {match[1]: piece.text for piece in programs(path)
            if (match := re.match(r'# (\w+\.py)\n', piece.text))}


def programs(path):
    """The Python blocks of a page -> [Piece]."""
    page = path.relative_to(ROOT).as_posix()
    return [Piece(page, line, body) for language, line, body in blocks(path.read_text('utf-8'))
            if language == 'python']
