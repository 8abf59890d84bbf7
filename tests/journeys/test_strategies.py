"""`scmodelforge strategies`: all that fits together and all presets, readable in a terminal and in a pipe."""

from __future__ import annotations

from scmodelforge.config_presets import PRESETS
from scmodelforge.strategies import ARCHITECTURES, TABLE, TASKS, TOKENIZERS
from tests.journeys.command import done


def test_every_combination_has_its_answer_and_every_preset_its_line() -> None:
    answer = done("strategies")
    assert answer.err == ""
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 120
    assert "\x1b" not in answer.out
    assert "│" not in answer.out
    for tokenizer in TOKENIZERS:
        for architecture in ARCHITECTURES:
            (line,) = [line for line in lines if line.split()[:2] == [tokenizer, architecture]]
            cells = line.replace("no (", "no(").split()[2:]
            for task, cell in zip(TASKS, cells, strict=True):
                row = TABLE[tokenizer, architecture, task]
                assert row.allowed == (cell == "yes")
                if not row.allowed:
                    number = cell.removeprefix("no")
                    assert f"{number} {row.refusal}" in lines
    for name, preset in PRESETS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert f"{preset.n_parameters:,}" in line
        assert ("~" in line) == (preset.rounding != 0)
