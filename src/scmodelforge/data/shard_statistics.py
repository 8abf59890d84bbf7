"""`gene_statistics.parquet` beside shards: what `train` would measure on them, so that it can start at once."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scmodelforge.config import DataConfig
from scmodelforge.data.shards import shard_vocabulary
from scmodelforge.data.statistics import gene_statistics
from scmodelforge.data.store import open_store
from scmodelforge.files import atomic_path
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.manifest import MANIFEST, shard_paths

log = logging.getLogger(__name__)

STATISTICS = "gene_statistics.parquet"
NORMALIZE = "scmodelforge_normalize"  # in the metadata: what the values are


def write_gene_statistics(folder: str | Path, vocab: GeneVocab, config: DataConfig, threads: int = 2) -> Path:
    """Measure the genes of a folder of shards, over all of its cells; a table that is there already is kept.

    Columns are those of `GeneStatistics.table`, rows the genes that have a count. It is a table of medians for
    `tokenizer.gene_medians`, if `data.preprocessing.normalize` is the same there; another `target_sum` multiplies all
    medians alike, and changes no rank.

    Parameters
    ----------
    vocab
        The vocabulary of the shards.
    config
        `preprocessing` is read.

    Returns
    -------
    Where it is.
    """
    path, normalize = Path(folder) / STATISTICS, config.preprocessing.normalize
    if _is_current(path, Path(folder) / MANIFEST, normalize):
        return path
    store = open_store(shard_paths(folder), shard_vocabulary(vocab), DataConfig(min_gene_overlap=0.0))
    log.info("Measuring the genes of %s cells.", f"{store.n_cells:,}")
    table = gene_statistics(store, np.arange(store.n_cells), config.preprocessing, threads).table(store.vocab)
    written = pa.Table.from_pandas(table[table.n_cells > 0], preserve_index=False)
    with atomic_path(path) as temporary:
        pq.write_table(written.replace_schema_metadata({NORMALIZE: normalize}), temporary)
    store.close()
    return path


def _is_current(path: Path, manifest: Path, normalize: str) -> bool:
    if not path.exists() or path.stat().st_mtime_ns < manifest.stat().st_mtime_ns:
        return False
    return (pq.read_schema(path).metadata or {}).get(NORMALIZE.encode()) == normalize.encode()
