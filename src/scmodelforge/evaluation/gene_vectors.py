"""The vectors that a model has for its genes, as it reads them itself."""

from __future__ import annotations

import numpy as np
import torch

from scmodelforge.errors import DataError
from scmodelforge.models.bundle import ModelBundle


def gene_vectors(bundle: ModelBundle) -> np.ndarray:
    """The gene embeddings of a model, without rank, value or cell; float32 (n_genes, width).

    They are what the model adds ranks or values to: after the LayerNorm where there is one, and after the network
    where vectors from elsewhere are given (`model.gene_embeddings`).

    Raises
    ------
    DataError
        If a vector is not finite.
    """
    model, vocab = bundle.model.eval(), bundle.vocab
    device = next(model.parameters()).device
    with torch.inference_mode():
        tokens = torch.arange(vocab.first_gene_token, vocab.n_tokens, device=device)
        vectors = model.embedding.genes(tokens).float().cpu().numpy()
    if (bad := ~np.isfinite(vectors).all(axis=1)).any():
        raise DataError(
            f"The gene embeddings of {int(bad.sum()):,} of {vocab.n_genes:,} genes are NaN or infinite.\n"
            "The model has probably diverged: look at its training loss, and train it again."
        )
    return vectors
