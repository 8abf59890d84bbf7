"""Write golden/scgpt_tokens.npz: what scGPT's own code makes of a few cells.

    python tests/parity/make_golden_scgpt_tokens.py FOLDER

FOLDER holds the unpacked wheel scgpt-0.2.4. Only its preprocessing, its tokenizer and its collator are imported; the
package's other modules need libraries that are gone, so the package itself is an empty one of the same name.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from pathlib import Path

import anndata
import numpy as np
import torch

SEED = 7
MAX_LENGTH = 20  # shorter than some cells
PAD, CLS = 60, 61  # after the genes, as in the published vocabulary


def import_scgpt(folder: Path) -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """Its modules preprocess, tokenizer.gene_tokenizer and data_collator."""
    for name, path in {"scgpt": "scgpt", "scgpt.tokenizer": "scgpt/tokenizer"}.items():
        package = types.ModuleType(name)
        package.__path__ = [str(folder / path)]
        package.logger = logging.getLogger("scGPT")
        sys.modules[name] = package
    torchtext, vocab = types.ModuleType("torchtext"), types.ModuleType("torchtext.vocab")
    torchtext.vocab, vocab.Vocab = vocab, object
    sys.modules.update({"torchtext": torchtext, "torchtext.vocab": vocab})
    preprocess, tokenizer, collator = (
        importlib.import_module(f"scgpt.{name}")
        for name in ("preprocess", "tokenizer.gene_tokenizer", "data_collator")
    )
    return preprocess, tokenizer, collator


def some_counts() -> np.ndarray:
    """float32 (12, 60): many ties, all different, one gene, equal counts, no zero, and an empty cell."""
    rng = np.random.default_rng(0)
    counts = rng.negative_binomial(1, 0.3, (12, 60)) * (rng.random((12, 60)) < 0.4)
    counts[1] = rng.permutation(60) + 1
    counts[2] = np.where(np.arange(60) < 52, rng.permutation(60) * 3 + 1, 0)
    counts[3], counts[4], counts[5] = 0, 0, 0
    counts[3, 17] = 4
    counts[4, 5:30] = 2
    return counts.astype(np.float32)


def main(folder: Path) -> None:
    """Run the original code and write the file."""
    preprocess, tokenizer, collator = import_scgpt(folder)
    counts = some_counts()
    total = np.maximum(counts.sum(1, keepdims=True, dtype=np.float64), 1)
    logged = np.log1p(counts / total * 10_000)
    golden: dict[str, np.ndarray] = {"counts": counts, "seed": np.array(SEED)}

    for name, values in {"counts": counts, "logged": logged}.items():
        adata = anndata.AnnData(values)
        np.random.seed(SEED)  # noqa: NPY002
        preprocess.Preprocessor(use_key="X", normalize_total=False, binning=51)(adata)
        golden[f"{name}_bins"] = adata.layers["X_binned"].astype(np.int16)
        golden[f"{name}_edges"] = np.asarray(adata.obsm["bin_edges"])[:, 1:]

    vocab = {"<pad>": PAD, "<cls>": CLS}
    for name, zeros in {"nonzero": False, "all": True}.items():
        padded = tokenizer.tokenize_and_pad_batch(
            golden["counts_bins"],
            np.arange(60),
            max_len=61,
            vocab=vocab,
            pad_token="<pad>",
            pad_value=-2,
            include_zero_gene=zeros,
        )
        golden[f"{name}_genes"] = padded["genes"].numpy().astype(np.int16)
        golden[f"{name}_values"] = padded["values"].numpy()

    examples = []
    for row in np.delete(counts, 5, axis=0):  # its binning fails for a cell without genes
        genes = row.nonzero()[0]
        examples.append(
            {
                "genes": torch.from_numpy(np.insert(genes, 0, CLS)),
                "expressions": torch.from_numpy(np.insert(row[genes], 0, -2)).float(),
            }
        )
    np.random.seed(SEED)  # noqa: NPY002
    collated = collator.DataCollator(
        pad_token_id=PAD, pad_value=-2, do_mlm=False, max_length=MAX_LENGTH, sampling=False
    )(examples)
    golden["collated_genes"] = collated["gene"].numpy().astype(np.int16)
    golden["collated_values"] = collated["expr"].numpy()
    np.savez_compressed(Path(__file__).parent / "golden" / "scgpt_tokens.npz", **golden)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
