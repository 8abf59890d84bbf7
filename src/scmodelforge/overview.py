"""What can be combined and what is preset, as plain text of at most 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from scmodelforge import registry
from scmodelforge.config import Config
from scmodelforge.config_presets import PRESETS, Preset
from scmodelforge.errors import PluginError
from scmodelforge.strategies import ARCHITECTURES, TABLE, TASKS, TOKENIZERS

WIDTH = 120


def overview() -> str:
    """The table of strategies with the reasons against what does not fit, and the presets."""
    plugins = list(_plugins())  # first: whoever takes a built-in name spoils the rest
    return "\n".join([*_combinations(), "", *_presets(), "", *plugins])


def _combinations() -> Iterable[str]:
    reasons = list(dict.fromkeys(row.refusal for row in TABLE.values() if row.refusal))
    header = [["tokenizer.strategy"], ["model.architecture"], *(_folded(task) for task in TASKS)]
    rows = [
        [
            tokenizer,
            architecture,
            *(
                "yes" if row.allowed else f"no ({reasons.index(row.refusal) + 1})"
                for task in TASKS
                for row in [TABLE[tokenizer, architecture, task]]
            ),
        ]
        for tokenizer in TOKENIZERS
        for architecture in ARCHITECTURES
    ]
    yield "What fits together; the last four columns are model.pretraining_task:"
    yield ""
    tall = max(map(len, header))
    yield from _aligned([[(part + [""] * tall)[line] for part in header] for line in range(tall)] + rows)
    yield ""
    for number, reason in enumerate(reasons, 1):
        yield from textwrap.wrap(f"({number}) {reason}", WIDTH, subsequent_indent="    ")


def _plugins() -> Iterable[str]:
    """What installed packages bring, without importing it; a name that is there twice is an error."""
    rows = []
    for kind in (registry.TOKENIZERS, registry.ARCHITECTURES, registry.TASKS, registry.BENCHMARKS):
        for name, plugins in registry.plugins_in(kind.group).items():
            try:
                kind.check(name)
            except ValueError as error:
                raise PluginError(str(error)) from error
            rows.append([f"  {name}", kind.kind, *map(str, plugins)])
    yield "Plugins (entry points of installed packages)" + (":" if rows else ": none.")
    if rows:
        yield from _aligned(rows)


def _folded(name: str) -> list[str]:
    """A long name on two lines: "masked_gene_prediction" → "masked_gene_", "prediction"."""
    start, _, end = name.rpartition("_")
    return [f"{start}_", end] if len(name) > len("next_gene") else [name]


def _presets() -> Iterable[str]:
    groups: dict[str, list[list[str]]] = {}
    for name, preset in PRESETS.items():
        config = Config.model_validate({"model": {"preset": name}})
        model, tokenizer = config.model, config.tokenizer
        family = f"{tokenizer.strategy}, {model.architecture}, {model.pretraining_task}"
        groups.setdefault(family, []).append(
            [
                name,
                _parameters(preset),
                f"{preset.n_genes:,}",
                f"{model.num_layers} × {model.hidden_dim:,}",
                str(model.num_heads),
                f"{model.feed_forward_dim:,}",
                f"{tokenizer.max_genes:,}",
            ]
        )
    yield "Presets (model.preset: NAME); keys written beside it win:"
    header = ["name", "parameters", "genes", "layers × width", "heads", "feed-forward", "tokens per cell"]
    family_of = {row[0]: family for family, rows in groups.items() for row in rows}
    lines = list(_aligned([header, *(row for rows in groups.values() for row in rows)], right=True))
    yield ""
    yield f"  {lines[0]}"
    said = ""
    for line in lines[1:]:
        family = family_of[line.split()[0]]
        if family != said:
            yield f"{family}:"
            said = family
        yield f"  {line}"
    yield ""
    yield "~ as published, rounded or not confirmed; all others are exact."


def _parameters(preset: Preset) -> str:
    return f"{'' if preset.rounding == 0 else '~ '}{preset.n_parameters:,}"


def _aligned(rows: Sequence[Sequence[str]], right: bool = False) -> Iterable[str]:
    """Columns two spaces apart; all but the first to the right if asked."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if right and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
