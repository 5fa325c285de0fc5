"""What mkdocs.yml needs beside plugins: pages from outside docs/, and lists of arguments."""

import pathlib
import re

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUTSIDE = {'index.md': 'README.md', 'contributing.md': 'CONTRIBUTING.md',
           'changelog.md': 'CHANGELOG.md'}
NAME = r'[\w\\]+(?:\([\w, ]*\)| \\\[[\w,]*\\\])?'
ITEM = re.compile(rf'({NAME}(?:, {NAME})*): |(Raises) ')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as the first page, and the other pages of the root, with their links."""
    for name, source in OUTSIDE.items():
        text = (ROOT / source).read_text('utf-8')
        text = re.sub(r'(\]\(|src=")docs/', r'\1', text)
        for other, path in OUTSIDE.items():
            text = text.replace(f']({path})', f']({other})')
        files.append(File.generated(config, name, content=text))
    return files


class Arguments(griffe.Extension):
    """Docstrings say `name: what it is`, a line each: here an item of a list each."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = as_list(obj.docstring.value)


def as_list(text: str) -> str:
    """A docstring as Markdown: its arguments and errors are items."""
    text = re.sub(r'(`[^`]*`)|([\[\]*_<])', lambda m: m[1] or f'\\{m[2]}', text)
    found = []
    for paragraph in re.split(r'\n\s*\n', text):
        lines = paragraph.split('\n')
        items = [ITEM.match(line) for line in lines]
        for i, (line, item) in enumerate(zip(lines, items)):
            if item and item[1]:
                line = f'- **{item[1]}**: {line[item.end():]}'
            elif item:
                line = f'- {line}'
            elif any(items[:i]):
                line = f'    {line.strip()}'
            if item and not any(items[:i]) and i:
                line = f'\n{line}'
            found.append(line)
        found.append('')
    return '\n'.join(found)
