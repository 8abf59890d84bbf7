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

with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    Path("examples").symlink_to(ROOT / "examples")
    for page in sys.argv[1:]:
        said = iter([output for _, output in run(page, shell)])
        file = ROOT / f"docs/tutorials/{page}.md"
        text = re.sub(
            r"^```text\n.*?^```",
            lambda _: "```text\n" + next(said).strip("\n") + "\n```",
            file.read_text("utf-8"),
            flags=re.MULTILINE | re.DOTALL,
        )
        file.write_text(text, "utf-8")
