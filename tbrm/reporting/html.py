"""Pages that need nothing from outside themselves: a template of web/, with the style, the script and the plots inside."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_WEB = Path(__file__).with_name("web")


def write_page(path: Path, template: str, **values: Any) -> Path:
    """`values` hold `plots`; all text in them is escaped, for it may be whatever a model or a data set came up with."""
    # A response may hold half of a UTF-16 pair, which no file can: it becomes a question mark.
    path.write_text(
        _environment().get_template(template).render(values), encoding="utf-8", errors="replace", newline="\n"
    )
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    script = "\n".join([f"/*\n{_read('uplot/LICENSE')}*/", _read("uplot/uPlot.iife.min.js"), _read("plots.js")])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "style": Markup(_read("uplot/uPlot.min.css") + _read("page.css")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
    }
    return environment


def _read(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")
