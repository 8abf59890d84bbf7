"""Run a tutorial in an empty folder and write into its text blocks what was really said; shorten them by hand then.

`PYTHONPATH=. python scripts/refresh_tutorials.py pretrain finetune`: the named pages, of which pretrain comes first.
The page about plugins is not run here, because it installs a package; `tests/test_tutorials.py` runs all of them.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from pathlib import Path

from tests.test_tutorials import ROOT, run, shell


def refreshed(page: str) -> str:
    """The text of a tutorial with what its commands say now."""
    said = iter([output for _, output in run(page, shell)])
    text = (ROOT / f"docs/tutorials/{page}.md").read_text("utf-8")
    block = re.compile(r"^```text\n.*?^```", re.MULTILINE | re.DOTALL)
    return block.sub(lambda _: "```text\n" + next(said).strip("\n") + "\n```", text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("examples").symlink_to(ROOT / "examples")
        for page in sys.argv[1:]:
            (ROOT / f"docs/tutorials/{page}.md").write_text(refreshed(page), "utf-8")
