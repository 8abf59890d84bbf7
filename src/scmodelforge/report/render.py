"""Turns templates and facts into one HTML file that needs nothing else.

Names of classes, files and columns come from data and are escaped everywhere (autoescape). Beside that the page's own
policy allows no request to anywhere, and no script but the one written here, which it knows by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scmodelforge.files import write_text
from scmodelforge.report.charts import number, numbers


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("scmodelforge.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "numbers": numbers}
    return environment


def write_page(template: str, output: Path, **facts: Any) -> Path:
    """Fill a template and write it, whole or not at all; returns where."""
    environment = _environment()
    loader = environment.loader
    assert loader is not None
    style, script = (loader.get_source(environment, name)[0] for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(
        style=Markup(style), script=Markup(script), script_hash=digest, **facts
    )
    write_text(output, page)
    return output
