"""Some cells of a store as a store: what is held out, for code that knows nothing of the others."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd

from scmodelforge.data.batch import CellBatch
from scmodelforge.data.store import CellStore


class SelectedCells(CellStore):
    """The cells `rows` (int64) of another store, numbered from 0; what is random about a cell stays as it was."""

    def __init__(self, store: CellStore, rows: np.ndarray) -> None:
        super().__init__(store.matrices, store.matches, store.vocab)
        self.whole, self.chosen = store, rows
        self.n_cells = len(rows)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """Annotations of the chosen cells."""
        return self.whole.obs.iloc[self.chosen]

    def read(self, rows: np.ndarray) -> CellBatch:
        """As of the whole store; `cell_index` counts there."""
        return self.whole.read(self.chosen[rows])
