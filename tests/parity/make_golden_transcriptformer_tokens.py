"""Write golden/transcriptformer_tokens.npz: what TranscriptFormer's own code makes of a few cells.

    python tests/parity/make_golden_transcriptformer_tokens.py FOLDER

FOLDER holds the unpacked wheel transcriptformer-0.6.1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

N_GENES, MAX_LENGTH, CLIP = 50, 24, 30
SPECIAL = ("unknown", "[PAD]", "[START]", "[END]", "[RD]", "[CELL]", "[MASK]")


def some_counts() -> np.ndarray:
    """float32 (8, 50): counts above the clip, cells longer than the window, an empty one."""
    rng = np.random.default_rng(1)
    counts = rng.negative_binomial(1, 0.06, (8, N_GENES)) * (rng.random((8, N_GENES)) < 0.5)
    counts[2] = rng.permutation(N_GENES) + 1
    counts[3] = 0
    return counts.astype(np.float32)


def main(folder: Path) -> None:
    """Run the original code and write the file."""
    sys.path.insert(0, str(folder))
    from transcriptformer.data.dataloader import process_batch
    from transcriptformer.tokenizer.tokenizer import BatchGeneTokenizer

    names = np.array([f"G{i}" for i in range(N_GENES)])
    vocab = {name: token for token, name in enumerate([*SPECIAL, *names])}
    counts = some_counts()
    golden: dict[str, np.ndarray] = {"counts": counts}
    for name, sort, pad_zeros in (("column", False, True), ("zeros", False, False), ("sorted", True, True)):
        batch = process_batch(
            counts,
            None,
            names,
            BatchGeneTokenizer(vocab),
            None,
            sort,
            False,
            MAX_LENGTH,
            pad_zeros,
            "[PAD]",
            vocab,
            0,
            CLIP,
            None,
        )
        golden[f"{name}_tokens"] = batch["gene_token_indices"].numpy().astype(np.int16)
        golden[f"{name}_counts"] = batch["gene_counts"].numpy()
    np.savez_compressed(Path(__file__).parent / "golden" / "transcriptformer_tokens.npz", **golden)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
