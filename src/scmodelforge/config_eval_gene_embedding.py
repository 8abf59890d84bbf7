"""Config of the benchmark `gene_embedding`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scmodelforge.config_section import Section


class GeneEmbeddingParams(Section):
    """Are genes that belong together near each other in the model's gene embeddings?"""

    network: str = Field(
        description="File of gene pairs (.tsv, .txt or .csv): symbols or Ensembl ids in the first two columns."
    )
    max_pairs: int = Field(20_000, ge=20, description="Of more pairs so many are drawn at random.")


class GeneEmbeddingSpec(Section):
    """The gene embeddings of a benchmark file."""

    name: Literal["gene_embedding"]
    dataset: str = Field("test", description="Name of the data set in the results.")
    params: GeneEmbeddingParams
