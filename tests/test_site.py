"""What `make docs` is strict about, as far as it shows without building the site: pages, links, names and keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import tbrm
import tbrm_kernels
from docs.keys import PLACE, tables
from docs.public import names, undocumented
from tbrm.config.recipe import describe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench/NOTES.md", *(ROOT / "docs").rglob("*.md")]


class _Loader(yaml.SafeLoader):
    """Of mkdocs.yml, which names functions of Python's."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    scripts = {f"{path.relative_to(ROOT).as_posix()}.md" for path in (ROOT / "examples").glob("*.py")}
    assert pages | scripts <= set(re.findall(r"[\w./]+\.md", str(config["nav"])))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)\s#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_reference_has_every_public_name() -> None:
    kernels = {f"tbrm_kernels.{name}" for name in tbrm_kernels.__all__}
    trainer = {f"tbrm.{name}" for name in tbrm.__all__ if not name.startswith("_")}
    assert kernels | trainer <= set(names())


def test_public_names_say_what_they_are() -> None:
    assert undocumented() == []


def test_every_key_is_in_the_tables() -> None:
    shown = tables()
    assert [key for key, *_ in describe() if f"| `{key}` |" not in shown] == []
    for key in ("task.heldout_rows", "objective.centre_rewards", "task.verifier_options.timeout_seconds"):
        assert f"| `{key}` | " in shown, "what a task, an objective and a verifier have beside"
    assert "&lt;think&gt;" in shown, "what they mean is text, not HTML"
    assert PLACE in (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
