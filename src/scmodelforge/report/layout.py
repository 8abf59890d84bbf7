"""Where cells lie in a UMAP, and in which colours: scanpy's layout and palettes."""

from __future__ import annotations

import numpy as np

from scmodelforge.errors import DataError

MIN_CELLS_FOR_UMAP = 10


def umap_layout(embedding: np.ndarray, seed: int = 0) -> np.ndarray:
    """Coordinates of a UMAP of cell embeddings, float32 (n_cells, 2).

    Neighbours and layout are scanpy's, with its defaults and a fixed seed.

    Raises
    ------
    DataError
        If there are fewer than ten cells.
    """
    import anndata
    import scanpy as sc
    import torch

    if len(embedding) < MIN_CELLS_FOR_UMAP:
        raise DataError(f"A UMAP needs at least {MIN_CELLS_FOR_UMAP} cells, and there are {len(embedding)}.")
    adata = anndata.AnnData(obsm={"X": np.asarray(embedding, dtype=np.float32)})
    threads = torch.get_num_threads()
    sc.pp.neighbors(adata, n_neighbors=min(15, len(embedding) - 1), use_rep="X", random_state=seed)
    sc.tl.umap(adata, random_state=seed)
    torch.set_num_threads(
        threads
    )  # numba's OpenMP changes it, and with it speed and last digits of what comes after
    return np.asarray(adata.obsm["X_umap"], dtype=np.float32)


def class_colours(n: int) -> list[str]:
    """`n` colours: scanpy's palettes for up to 20, 28 and 102 classes, repeated beyond."""
    from scanpy.plotting import palettes

    choices = (palettes.vega_20_scanpy, palettes.default_28, palettes.default_102)
    palette = next((choice for choice in choices if len(choice) >= n), choices[-1])
    return [palette[i % len(palette)] for i in range(n)]
