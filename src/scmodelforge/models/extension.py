"""A model learns new genes: its vocabulary and every tensor with a row per token grow at the end.

The rows that were there stay bit for bit. A new row is the mean of the genes' rows and a little noise, so that the
model treats the gene as an average one until it has learned better.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from scmodelforge.config import Config
from scmodelforge.data.sources import Source, open_matrix
from scmodelforge.data.species import species_of_matrices
from scmodelforge.data.statistics import gene_medians
from scmodelforge.data.store import CellStore
from scmodelforge.errors import ConfigError, ModelError
from scmodelforge.genes.embeddings import read_gene_embeddings
from scmodelforge.genes.identifiers import NOT_MEASURED, GeneMatch, match_genes
from scmodelforge.genes.names import clean_ensembl_ids
from scmodelforge.genes.tables import SPECIES, known_genes
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.bundle import ModelBundle, assemble, build_model

log = logging.getLogger(__name__)

SPREAD = 0.1  # of the noise, in standard deviations of the genes' rows
NO_GENES = ("no name", "ambiguous symbol", NOT_MEASURED)
GENE_TABLES = ("embedding.tokens.weight", "embedding.tokens.vectors.weight")


def extend_vocabulary(bundle: ModelBundle, sources: Sequence[Source], config: Config) -> ModelBundle:
    """The model with the genes of some data that it lacks, as `data.extend_vocab` says; itself if none are new.

    A new gene has no median yet; see `measure_new_medians`. A fine-tuned model loses its head and labels.

    Parameters
    ----------
    sources
        The data whose genes are added.
    config
        `data.extend_vocab`, `layer`, `gene_column` and `species` of `data`, and `training.seed` are read.

    Raises
    ------
    ConfigError
        If the model's genes were selected as the most variable ones, or the given vectors are of another width.
    DataError
        If data or vectors cannot be read.
    """
    how = config.data.extend_vocab
    if how is None:
        return bundle
    if bundle.config.data.preprocessing.hvg is not None:
        raise ConfigError(
            "data.extend_vocab: the genes of this model were selected as the most variable ones "
            "(data.preprocessing.hvg), and adding all others would undo that. Set data.extend_vocab: null."
        )
    matrices = [open_matrix(source, config.data.layer) for source in sources]
    species = species_of_matrices(matrices, config.data)
    new = new_genes(bundle.vocab, [matrix.var for matrix in matrices], config.data.gene_column, species)
    if new is None:
        log.info("data.extend_vocab: the model knows all genes of the data.")
        return bundle
    vocab = _appended(bundle.vocab, new)
    with torch.device("meta"):
        wanted = build_model(bundle.config, vocab).state_dict()
    noise = torch.Generator().manual_seed(config.training.seed)
    state = {
        name: _grown(name, tensor, wanted[name].shape, bundle.vocab.n_genes, noise)
        for name, tensor in bundle.model.state_dict().items()
    }
    if how != "mean":
        table = next(name for name in GENE_TABLES if name in state)
        _take_vectors(state[table], how, new)
    log.info(
        "data.extend_vocab: %s genes of the data that the model lacks were added (%s%s); it has %s now.",
        f"{new.n_genes:,}",
        ", ".join(new.tokens_to_names(range(new.first_gene_token, new.n_tokens)[:3])),
        ", …" if new.n_genes > 3 else "",
        f"{vocab.n_genes:,}",
    )
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    grown = assemble(bundle.config, vocab, None, named, "the model with more genes")
    return replace(grown, trained_on=bundle.trained_on)


def new_genes(
    vocab: GeneVocab,
    var_frames: Sequence[pd.DataFrame],
    column: str | None,
    species: Sequence[str | None] = (),
) -> GeneVocab | None:
    """Genes of data that `vocab` lacks, ascending by id, or None: known genes by their id, others by their name.

    Of files of another species (`species`, of each file), the one-to-one orthologs are taken, so that a vocabulary
    stays of one species.
    """
    parts = []
    for var, of in zip(var_frames, species or [None] * len(var_frames), strict=True):
        match = match_genes(var, vocab, column, of)
        if match.species and vocab.species in SPECIES:
            parts.append(_new_orthologs(match))
            continue
        rest = match.table[(match.gene_index < 0) & ~match.table.reason.isin(NO_GENES).to_numpy()]
        own = clean_ensembl_ids(rest.used)
        known = rest.gene_id != ""
        names = {"gene_id": rest.gene_id.where(known, own), "symbol": rest.symbol.where(known, own)}
        parts.append(pd.DataFrame(names))
    union = pd.concat(parts).drop_duplicates("gene_id").sort_values("gene_id")
    union = union[(union.gene_id != "") & ~union.gene_id.isin(vocab.gene_ids)]
    if not len(union):
        return None
    ids = union.gene_id.to_numpy(object)
    table = known_genes().reindex(ids)
    return GeneVocab(
        ids,
        table.symbol.where(table.symbol.notna(), union.symbol.to_numpy()).to_numpy(object),
        table.biotype.fillna("").to_numpy(object),
        species=vocab.species,
        special_tokens=vocab.special_tokens,
        name="new genes",
    )


def _new_orthologs(match: GeneMatch) -> pd.DataFrame:
    """The orthologs that the vocabulary lacks."""
    rest = match.table[(match.gene_index < 0) & (match.table.reason != NOT_MEASURED).to_numpy()]
    ids = rest.ortholog[rest.ortholog != ""]
    if n_without := len(rest) - len(ids):
        log.info(
            "data.extend_vocab: %s genes of %s have no one-to-one ortholog.", f"{n_without:,}", match.species
        )
    return pd.DataFrame({"gene_id": ids, "symbol": known_genes().symbol.loc[ids].to_numpy(object)})


def measure_new_medians(
    vocab: GeneVocab, n_before: int, store: CellStore, rows: np.ndarray, config: Config
) -> GeneVocab:
    """`vocab` with medians of its genes from `n_before` on, measured on cells `rows`; the others keep theirs."""
    if vocab.medians is None or vocab.n_genes == n_before:
        return vocab
    preprocessing = config.data.preprocessing
    measured, _ = gene_medians(
        store, rows, preprocessing.target_sum, preprocessing.normalize, config.training.loader_threads
    )
    medians = vocab.medians.copy()
    medians[n_before:] = measured[n_before:]
    if unseen := int(np.isnan(medians[n_before:]).sum()):
        log.info("%s of the new genes are in no training cell: the model leaves them out.", f"{unseen:,}")
    return vocab.with_medians(medians)


def _appended(vocab: GeneVocab, new: GeneVocab) -> GeneVocab:
    medians = vocab.medians
    return replace(
        vocab,
        gene_ids=np.concatenate([vocab.gene_ids, new.gene_ids]),
        symbols=np.concatenate([vocab.symbols, new.symbols]),
        biotypes=np.concatenate([vocab.biotypes, new.biotypes]),
        medians=None if medians is None else np.concatenate([medians, np.full(new.n_genes, np.nan)]),
        name=f"{vocab.name} and {new.n_genes:,} more",
    )


def _grown(
    name: str, tensor: torch.Tensor, shape: torch.Size, n_genes: int, noise: torch.Generator
) -> torch.Tensor:
    """`tensor` with rows added at the end until it has `shape`; its last `n_genes` rows are the genes'."""
    if tensor.shape == shape:
        return tensor
    n_new = shape[0] - tensor.shape[0]
    if n_new < 0 or tensor.shape[1:] != shape[1:] or tensor.shape[0] < n_genes:
        raise ModelError(
            f"data.extend_vocab: {name} has the shape {tuple(tensor.shape)} and would need {tuple(shape)}; this kind "
            "of model cannot take more genes."
        )
    genes = tensor[-n_genes:].float()
    drawn = torch.randn((n_new, *tensor.shape[1:]), generator=noise)
    rows = genes.mean(dim=0) + SPREAD * genes.std(dim=0, correction=0) * drawn
    return torch.cat([tensor, rows.to(tensor.dtype)])


def _take_vectors(table: torch.Tensor, path: str, new: GeneVocab) -> None:
    """Put the vectors of a file into the last rows of `table`, for the new genes that have one."""
    vectors, known = read_gene_embeddings(path, new, "data.extend_vocab")
    if vectors.shape[1] != table.shape[1]:
        raise ConfigError(
            f"data.extend_vocab: the vectors in '{path}' have {vectors.shape[1]} numbers, and the gene embeddings of "
            f"the model {table.shape[1]}. Use a file of that width, or data.extend_vocab: mean."
        )
    taken = torch.from_numpy(vectors[new.first_gene_token :][known]).to(table.dtype)
    table[-new.n_genes :][torch.from_numpy(known)] = taken
