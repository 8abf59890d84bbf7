"""The genes and states that a user names, found in the model and the data, or refused in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from scmodelforge.errors import DataError, UserError
from scmodelforge.genes.names import recognise, reference_of
from scmodelforge.genes.vocab import GeneVocab


def gene_tokens(names: Sequence[str], vocab: GeneVocab) -> np.ndarray:
    """int64 (n): tokens of genes given by Ensembl id or symbol, in their order.

    Raises
    ------
    UserError
        If the model does not know a gene, or one is given twice.
    """
    given = pd.Series([name.strip() for name in names], dtype=object)
    if not len(given) or (given == "").any():
        raise UserError(
            "No gene is given, or an empty name: give symbols or Ensembl ids, such as --genes ISG15,IFI6."
        )
    reference = reference_of(vocab)
    found, reasons = recognise(given, reference)
    rows = np.where(found >= 0, reference.genes.vocab_row.to_numpy()[found], -1)
    reasons[(found >= 0) & (rows < 0)] = "not in the model's vocabulary"
    never_seen = np.zeros(len(rows), dtype=bool) if vocab.medians is None else np.isnan(vocab.medians)[rows]
    reasons[(rows >= 0) & never_seen] = "no training cell had it, so the model has not learned it"
    rows[never_seen] = -1
    if (rows < 0).any():
        parts = [
            _unknown(name, reason, vocab)
            for name, reason in zip(given[rows < 0], reasons[rows < 0], strict=True)
        ]
        raise UserError(f"The model does not know {len(parts)} of the genes to perturb:\n" + "\n".join(parts))
    if (doubled := pd.Series(rows).duplicated()).any():
        raise UserError(
            f"A gene is given twice: {', '.join(given[doubled])} (another name of it may be among the others)."
        )
    return rows.astype(np.int64) + vocab.first_gene_token


def _unknown(name: str, reason: str, vocab: GeneVocab) -> str:
    candidates = [*vocab.symbols[vocab.symbols != ""], *vocab.gene_ids]
    near = [other for other in difflib.get_close_matches(name, candidates, n=3) if other != name]
    return f"  {name}: {reason}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def rows_of_state(obs: pd.DataFrame, key: str, state: str, where: str) -> np.ndarray:
    """int64 (n): the cells whose `obs[key]` is `state`.

    Raises
    ------
    DataError
        If there is no such column, or no such cell.
    """
    if key not in obs:
        raise DataError(
            f"'{where}' has no obs column '{key}' (state_key).{_near(key, obs.columns)}\n"
            f"Columns of obs: {', '.join(map(str, obs.columns[:20])) or 'none'}."
        )
    values = obs[key].astype(str)
    rows = np.flatnonzero((values == state) & obs[key].notna())
    if not len(rows):
        states = values[obs[key].notna()].value_counts().index
        raise DataError(
            f"No cell of '{where}' has the state '{state}' in obs['{key}'].{_near(state, states)}\n"
            f"States: {', '.join(states[:20])}{', …' if len(states) > 20 else ''}."
        )
    return rows


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(map(str, names)), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
