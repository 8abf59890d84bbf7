"""What do ten epochs with a frozen backbone cost, when its embeddings are computed once?

Fine-tunes the head of a model of random weights on synthetic cells (the law of `loading.py`) with random labels, a
tenth of which validate, once as `finetune` does it and once with the backbone at work in every epoch. Processor time is
counted, from the end of the imports to the finished run: reading, checkpoints and validation are in it. The more cells
and the larger the model, the less these weigh. That both learn the same is tested in
`tests/finetuning/test_frozen_cache.py`.

    python benchmarks/frozen.py --rounds 1
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import harness
import loading
import numpy as np

EPOCHS = 10


def prepare(folder: str, n_cells: int, hidden_dim: int) -> None:
    """Write labelled cells and a model folder."""
    import anndata as ad

    from scmodelforge.config import Config
    from scmodelforge.genes.vocab import predefined
    from scmodelforge.models.bundle import ModelBundle, build_model, save_bundle

    cells, rng = Path(folder) / "cells.h5ad", np.random.default_rng(0)
    loading.write_cells(str(cells), n_cells)
    adata = ad.read_h5ad(cells)
    adata.obs["cell_type"] = rng.choice(["B", "monocyte", "NK", "T"], n_cells)
    adata.write_h5ad(cells)
    config = Config.model_validate(
        {
            "tokenizer": {"max_genes": 256},
            "model": {"hidden_dim": hidden_dim, "num_layers": 2, "num_heads": 4, "gene_head": "tied"},
        }
    )
    vocab = predefined("human_protein_coding")
    vocab = vocab.with_medians(rng.uniform(0.5, 20, vocab.n_genes))
    save_bundle(ModelBundle(config, vocab, build_model(config, vocab, seed=0)), Path(folder) / "model")


def seconds(folder: str, once: bool) -> float:
    """Fine-tune in this process; `once`: with embeddings that are computed once."""
    from scmodelforge.config import Config
    from scmodelforge.finetuning import run

    if not once:
        run.embeds_once = lambda *_: False
    config = Config.model_validate(
        {
            "data": {"paths": [str(Path(folder) / "cells.h5ad")], "split": {"val_split": 0.1}},
            "finetune": {"freeze_backbone": True},
            "training": {"max_epochs": EPOCHS, "num_gpus": 0, "run_dir": str(Path(folder) / f"run_{once}")},
        }
    )
    started = time.process_time()
    run.finetune(config, Path(folder) / "model")
    return time.process_time() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=2_000)
    parser.add_argument("--hidden-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        harness.fresh(prepare, folder=folder, n_cells=options.cells, hidden_dim=options.hidden_dim)
        runs = {
            name: partial(harness.fresh, seconds, folder=folder, once=once)
            for name, once in (("once", True), ("each", False))
        }
        seen = harness.medians(runs, options.rounds)
    rows = [
        harness.Row("backbone in each epoch", seen["each"], "s"),
        harness.Row("embeddings computed once", seen["once"], "s"),
        harness.Row("times faster", seen["each"] / seen["once"], ""),
    ]
    title = f"{EPOCHS} frozen epochs, {options.cells:,} cells, 2 layers × {options.hidden_dim}"
    harness.report(title, rows, harness.versions("lightning"), options.json)


if __name__ == "__main__":
    main()
