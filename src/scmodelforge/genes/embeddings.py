"""Vectors of genes from elsewhere, such as ESM-2 embeddings of their proteins, read from a file by gene.

A file is one of

- a matrix `embeddings` (genes × width) with `gene_ids` beside it (.npz, .h5; in .safetensors a JSON list
  `gene_ids` in the metadata),
- an array per gene, under its id (.npz, .h5, .safetensors),
- TranscriptFormer's .h5: the ids in `keys`, the vectors in `arrays/ID`.

Nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from scmodelforge.errors import DataError
from scmodelforge.genes.identifiers import match_genes
from scmodelforge.genes.vocab import GeneVocab

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".npz", ".h5", ".hdf5")
MISSING_SPREAD = 0.1  # how far genes without a vector are from the mean, in standard deviations


@dataclass(frozen=True)
class _Vectors:
    """The names in a file, and how to read some of their vectors: row numbers → (n, width)."""

    names: list[str]
    take: Callable[[np.ndarray], np.ndarray]


def read_gene_embeddings(
    path: str | Path, vocab: GeneVocab, key: str = "model.gene_embeddings"
) -> tuple[np.ndarray, np.ndarray]:
    """Read the vectors of a vocabulary's genes.

    Names in the file are recognised as those of data files are: Ensembl ids without their version, symbols, earlier
    symbols. Of several rows of one gene the first is taken. A gene without a vector gets the mean of the others and a
    little noise (a tenth of their spread), so that such genes can be told apart; special tokens get noise alone. The
    noise is the same each time. `key` names the file in messages.

    Returns
    -------
    vectors
        float32 (n_tokens, width): special tokens, then the genes of `vocab`.
    known
        bool (n_genes): which genes have a vector in the file.

    Raises
    ------
    DataError
        If the file is missing, unreadable or in none of the layouts, has no gene of the vocabulary, or vectors that
        are no numbers, not finite, or of different widths.
    """
    path = Path(path)
    with _opened(path, key) as found:
        if not found.names:
            raise DataError(f"{key}: '{path}' holds no genes.")
        at = match_genes(pd.DataFrame(index=found.names), vocab, "index").gene_index
        genes, rows = np.unique(at, return_index=True)
        genes, rows = genes[genes >= 0], rows[genes >= 0]
        if not len(genes):
            raise DataError(
                f"{key}: none of the {len(at):,} genes in '{path}' is among the {vocab.n_genes:,} that need a vector "
                f"(the file has {found.names[0]}, …; needed are {vocab.gene_ids[0]}, …). It must name genes by Ensembl "
                "id or symbol."
            )
        vectors = found.take(rows)
        if not vectors.shape[1]:
            raise DataError(f"{key}: the vectors in '{path}' have no numbers.")
    if (wrong := ~np.isfinite(vectors).all(axis=1)).any():
        raise DataError(
            f"'{path}' has vectors of {int(wrong.sum()):,} genes with values that are not finite (first: "
            f"{found.names[rows[wrong.argmax()]]})."
        )
    known = np.zeros(vocab.n_genes, dtype=bool)
    known[genes] = True
    noise = np.random.default_rng(0).standard_normal((vocab.n_tokens, vectors.shape[1]), dtype=np.float32)
    table = noise * vectors.std(axis=0) * np.float32(MISSING_SPREAD)
    table[vocab.first_gene_token :] += vectors.mean(axis=0)
    table[vocab.first_gene_token + genes] = vectors
    _say(path, vocab, at, known, vectors.shape[1])
    return table, known


def _say(path: Path, vocab: GeneVocab, at: np.ndarray, known: np.ndarray, width: int) -> None:
    n_known = int(known.sum())
    log.info(
        "%s: vectors of width %d for %s of %s genes.", path.name, width, f"{n_known:,}", f"{vocab.n_genes:,}"
    )
    if n_known < vocab.n_genes:
        without = vocab.gene_ids[~known]
        log.warning(
            "%s has no vector for %s of %s genes (%s%s): they get the mean of the others and a little noise.",
            path,
            f"{len(without):,}",
            f"{vocab.n_genes:,}",
            ", ".join(without[:3]),
            ", …" if len(without) > 3 else "",
        )
    if n_again := int((at >= 0).sum()) - n_known:
        log.warning("%s has %s more rows of genes that it has already: the first is used.", path, n_again)
    if n_outside := int((at < 0).sum()):
        log.info(
            "%s: %s of its genes are not in the vocabulary '%s'.", path.name, f"{n_outside:,}", vocab.name
        )


@contextmanager
def _opened(path: Path, key: str) -> Iterator[_Vectors]:
    """The vectors in a file, which is open as long as the block runs."""
    if not path.is_file():
        raise DataError(f"{key}: there is no file '{path}'.")
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{key}: '{path}' does not end in {', '.join(SUFFIXES)}: gene vectors are read from these."
        )
    # imported here, since it imports torch
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                yield _layout(path, list(arrays.files), lambda name: arrays[name])
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                ids = json.loads((tensors.metadata() or {}).get("gene_ids", "null"))
                if not isinstance(ids, list | None) or not all(isinstance(name, str) for name in ids or []):
                    raise DataError(f"{key}: gene_ids in the metadata of '{path}' is no JSON list of names.")
                yield _layout(
                    path,
                    list(tensors.keys()),
                    lambda name: tensors.get_tensor(name).float().numpy(),
                    ids,
                )
        else:
            with h5py.File(path) as file:
                yield _layout(path, list(file), lambda name: _dataset(path, file, name))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        pickled = "allow_pickle" in str(error)
        why = "it holds Python objects; write the ids as text (dtype 'U')" if pickled else str(error)
        raise DataError(f"{key}: '{path}' cannot be read: {why}.") from error


def _dataset(path: Path, file: h5py.File, name: str) -> np.ndarray:
    item = file[name]
    if not isinstance(item, h5py.Dataset):
        raise DataError(f"'{name}' in '{path}' is a group, and an array of numbers is needed there.")
    return item[()]


def _layout(
    path: Path, names: list[str], get: Callable[[str], np.ndarray], ids: list[str] | None = None
) -> _Vectors:
    """Find out how the vectors lie in a file whose arrays `names` can be `get`."""
    if "embeddings" in names and (ids is not None or "gene_ids" in names):
        genes = _texts(get("gene_ids")) if ids is None else ids
        matrix = get("embeddings")
        if matrix.ndim != 2 or len(matrix) != len(genes):
            raise DataError(
                f"'embeddings' in '{path}' has the shape {matrix.shape}; a row for each of its {len(genes):,} "
                "gene_ids is needed."
            )
        return _Vectors(genes, lambda rows: _numbers(path, matrix[rows], "embeddings"))
    if "embeddings" in names or "gene_ids" in names:
        raise DataError(
            f"'{path}' needs both 'embeddings' and 'gene_ids' (in .safetensors: a JSON list in the metadata)."
        )
    if {"keys", "arrays"} <= set(names):
        genes = _texts(get("keys"))
        return _Vectors(genes, lambda rows: _stacked(path, [genes[row] for row in rows], "arrays/", get))
    return _Vectors(names, lambda rows: _stacked(path, [names[row] for row in rows], "", get))


def _texts(values: np.ndarray) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values.ravel()]


def _stacked(path: Path, names: list[str], folder: str, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """The arrays of `names` as one matrix."""
    vectors = [_numbers(path, get(folder + name), name) for name in names]
    for name, vector in zip(names, vectors, strict=True):
        if vector.ndim != 1 or vector.shape != vectors[0].shape or not vector.size:
            raise DataError(
                f"The vector of {name} in '{path}' has the shape {vector.shape}; one row of numbers is needed, as "
                f"wide as that of {names[0]}, which has {vectors[0].shape}."
            )
    return np.stack(vectors)


def _numbers(path: Path, values: np.ndarray, name: str) -> np.ndarray:
    if not np.issubdtype(values.dtype, np.number) or np.issubdtype(values.dtype, np.complexfloating):
        raise DataError(f"{name} in '{path}' holds {values.dtype}, and numbers are needed.")
    return values.astype(np.float32)
