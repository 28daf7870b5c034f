"""What the site of mkdocs.yml is made of beside the pages of docs/ (`make docs`).

It is the repository's tree with docs/ at its root and README.md as its first page: whatever a page links to is in it, too, so
that a link is right in both places. Links, the table of every key, drawings and equations are made here.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from docs.drawing import svg
from docs.keys import PLACE, tables
from docs.public import undocumented

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
CODE = {".py": "python", ".yaml": "yaml"}  # pages of the site; a browser would save such a file
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)(?=[)#])")
_CHART = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_pre_build(config: MkDocsConfig) -> None:
    if names := undocumented():
        raise PluginError(f"without a docstring: {', '.join(names)}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds all that the pages lead to."""
    for path in _reached(["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]):
        if not path.startswith("docs/"):
            files.append(_file(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here, source = posixpath.dirname(page.file.src_uri), _source(page.file.src_uri)

    def inside(link: re.Match[str]) -> str:
        path = _linked(source, link[1])
        return posixpath.relpath(_uri(path), here or ".") if (ROOT / path).exists() else link[1]

    markdown = _CHART.sub(lambda chart: svg(chart[1]), _LINK.sub(inside, markdown))
    return markdown.replace(PLACE, tables()) if PLACE in markdown else markdown


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Equations become MathML, which browsers show with nothing loaded."""
    display = {"span": "inline", "div": "block"}
    return _MATHS.sub(lambda found: convert(html.unescape(found[2]), display=display[found[1]]), content)


def _reached(paths: list[str]) -> Iterator[str]:
    """These files of the repository, and those that they link to, and so on; each once."""
    waiting, seen = list(paths), set(paths)
    while waiting:
        yield (path := waiting.pop())
        if path.endswith(".md"):
            linked = {_linked(path, link) for link in _LINK.findall((ROOT / path).read_text(encoding="utf-8"))}
            new = {path for path in linked - seen if (ROOT / path).is_file()}
            waiting += sorted(new)
            seen |= new


def _linked(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _uri(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") + ".md" * (posixpath.splitext(path)[1] in CODE)


def _source(uri: str) -> str:
    """The file of the repository that a page of the site is."""
    if uri == "index.md":
        return "README.md"
    path = uri if (ROOT / uri.removesuffix(".md")).is_file() or (ROOT / uri).is_file() else f"docs/{uri}"
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def _file(path: str, config: MkDocsConfig) -> File:
    language = CODE.get(posixpath.splitext(path)[1])
    if language is None:
        return File.generated(config, _uri(path), abs_src_path=str(ROOT / path))
    code = (ROOT / path).read_text(encoding="utf-8")
    return File.generated(config, _uri(path), content=f"# {path}\n\n````{language}\n{code}````\n")
