"""scGPT's checkpoints: a folder with args.json, best_model.pt and vocab.json.

Weights that hold a `flag_encoder` were pretrained in the generative mode and become an autoregressive_transformer,
others a transformer_encoder. Token ids change: scGPT puts its special tokens last, ours are first, and `<mask>`,
which scGPT has not, gets a row of zeros that the way out drops.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from scmodelforge.config import Config
from scmodelforge.errors import ModelError
from scmodelforge.files import atomic_path, write_text
from scmodelforge.genes.names import recognise, reference_of_species
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, GeneVocab
from scmodelforge.models.bundle import ModelBundle, assemble
from scmodelforge.models.embeddings import MASKED_VALUE
from scmodelforge.models.published.reading import config_from, n_rows, read_json, read_weights

log = logging.getLogger(__name__)

# scGPT's names and ours, beginnings first; where one begins like another, the longer one comes first.
PREFIXES = {
    "encoder.embedding.": "embedding.tokens.",
    "encoder.enc_norm.": "embedding.norm.",
    "value_encoder.embedding.": "embedding.values.bins.",
    "value_encoder.enc_norm.": "embedding.values.norm.",
    "value_encoder.": "embedding.values.",
    "flag_encoder.": "flags.",
    "batch_encoder.embedding.": "expression_head.batch_embedding.0.",
    "batch_encoder.enc_norm.": "expression_head.batch_embedding.1.",
    "decoder.fc.": "expression_head.value.",
    "decoder.zero_logit.": "expression_head.nonzero.",
    "mvc_decoder.gene2query.": "auxiliary.cell_expression.query.",
    "mvc_decoder.W.": "auxiliary.cell_expression.value.",
    "mvc_decoder.W_zero_logit.": "auxiliary.cell_expression.nonzero.",
    "grad_reverse_discriminator._decoder.": "auxiliary.batch.layers.",
    "grad_reverse_discriminator.out_layer.": "auxiliary.batch.out.",
}
LAYER_PREFIXES = {
    "self_attn.out_proj.": "attention.out.",
    "linear1.": "feed_forward.fc1.",
    "linear2.": "feed_forward.fc2.",
    "norm1.": "attention_norm.",
    "norm2.": "feed_forward_norm.",
}
# In turn: flash-attention, its wrapper in later versions, and torch; rows are those of q, k and v.
PACKED = re.compile(r"self_attn\.(?:_impl\.)?(?:Wqkv\.|in_proj_)(weight|bias)")
THEIR_LAYER = re.compile(r"transformer_encoder\.layers\.(\d+)\.(.+)")
OUR_LAYER = re.compile(r"transformer\.blocks\.(\d+)\.(.+)")
OUR_QKV = re.compile(r"attention\.([qkv])\.(weight|bias)")
BATCHES = "expression_head.batch_embedding.0.weight"
TOKENS = "embedding.tokens.weight"
CLASSIFIER = "cls_decoder."
SPECIAL_TOKENS = ("<pad>", "<cls>", "<eoc>")  # in the order in which scGPT appends them
BATCH_KEY = "batch_id"
SIZES = ("embsize", "nheads", "d_hid", "nlayers")
# What a name of the vocabulary may be matched by, best first; an Ensembl id can also be a part of the name.
RELIABLE = ("gene id", "symbol", "Ensembl id", "previous symbol")


def from_scgpt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """scGPT's weights under our names, rows of tokens in scGPT's order.

    Reads the layouts of torch and of flash-attention. The embedding of batches gets a row before the others for
    unknown batches, their mean. The classifier of cell types (`cls_decoder`) is left out, and that is logged.

    Raises
    ------
    ModelError
        If a tensor has no place in our model; they are listed.
    """
    ours, left_over = {}, []
    for name, tensor in state.items():
        layer = THEIR_LAYER.fullmatch(name)
        packed = layer and PACKED.fullmatch(layer[2])
        if layer and packed:
            if tensor.ndim == 0 or len(tensor) % 3:
                raise ModelError(
                    f"{name} has the shape {tuple(tensor.shape)}; q, k and v are not three equal parts."
                )
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                ours[f"transformer.blocks.{layer[1]}.attention.{part}.{packed[1]}"] = rows.clone()
        elif layer and (inner := _renamed(layer[2].replace("._impl.", "."), LAYER_PREFIXES)):
            ours[f"transformer.blocks.{layer[1]}.{inner}"] = tensor
        elif outer := _renamed(name, PREFIXES):
            ours[outer] = tensor
        elif not name.startswith(CLASSIFIER):
            left_over.append(name)
    if left_over:
        raise ModelError(
            "These weights are not those of an scGPT that this version knows (no domain-specific batch norm, no "
            f"perturbation or multi-omic model, MVC of style 'inner product').\n  left over: {sorted(left_over)[:10]}"
        )
    if n_classifier := sum(name.startswith(CLASSIFIER) for name in state):
        log.warning("The classifier of cell types (%s tensors of cls_decoder) is left out.", n_classifier)
    if BATCHES in ours:
        ours[BATCHES] = torch.cat([ours[BATCHES].mean(dim=0, keepdim=True), ours[BATCHES]])
    return ours


def to_scgpt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under scGPT's names, the inverse of `from_scgpt`, with attention as flash-attention has it.

    That is the layout of the published files, and the one from which scGPT's loader makes every other.

    Raises
    ------
    ModelError
        If scGPT has no place for a tensor; they are listed.
    """
    category = "embedding.values.bins.weight" in state
    hidden = "value_encoder." if category else "value_encoder.enc_norm."
    back = {ours: theirs for theirs, ours in PREFIXES.items() if theirs != hidden}
    layer_back = {ours: theirs for theirs, ours in LAYER_PREFIXES.items()}
    theirs, left_over = {}, []
    for name, tensor in state.items():
        layer = OUR_LAYER.fullmatch(name)
        part = layer and OUR_QKV.fullmatch(layer[2])
        if layer and part:
            if part[1] == "q":
                packed = [state[name.replace("attention.q.", f"attention.{p}.")] for p in "qkv"]
                theirs[f"transformer_encoder.layers.{layer[1]}.self_attn.Wqkv.{part[2]}"] = torch.cat(packed)
        elif layer and (inner := _renamed(layer[2], layer_back)):
            theirs[f"transformer_encoder.layers.{layer[1]}.{inner}"] = tensor
        elif outer := _renamed(name, back):
            theirs[outer] = tensor[1:] if name == BATCHES else tensor
        else:
            left_over.append(name)
    if left_over:
        raise ModelError(f"scGPT has no place for these weights: {sorted(left_over)[:10]}")
    return theirs


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    """The name with its beginning replaced; "" if it begins with none of `prefixes`."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return ""


def read_published(folder: Path) -> ModelBundle:
    """A published scGPT as a model of ours, ready to embed, to generate and to be trained on.

    The task and its losses follow from the heads that the weights hold. Batches, where there are any, are only numbers
    in scGPT; they become the categories "0", "1", … of the obs column `batch_id`.

    Raises
    ------
    ModelError
        If files are missing or damaged, do not belong together, or hold a model that ours cannot be.
    """
    args = read_json(folder / "args.json")
    if missing := [key for key in SIZES if not isinstance(args, dict) or key not in args]:
        raise ModelError(
            f"'{folder / 'args.json'}' does not describe an scGPT; it lacks {', '.join(missing)}."
        )
    theirs = read_weights(folder / "best_model.pt")
    if missing := [
        name for name in ("encoder.embedding.weight", "decoder.fc.0.weight") if name not in theirs
    ]:
        raise ModelError(f"'{folder / 'best_model.pt'}' is not an scGPT: it has no {', '.join(missing)}.")
    state = {name: tensor.float() for name, tensor in from_scgpt(theirs).items()}
    vocab, rows = _read_vocab(folder / "vocab.json", n_tokens=n_rows(state[TOKENS]))
    config = _config(args, state, folder)
    if config.model.objective.batch_key:
        n_batches = len(state.get(BATCHES, state.get("auxiliary.batch.out.bias", [])))
        n_batches -= BATCHES in state  # the row of unknown batches
        vocab = vocab.with_obs_categories({BATCH_KEY: map(str, range(n_batches))})
    padded = torch.cat([state[TOKENS], torch.zeros_like(state[TOKENS][:1])])  # row -1 is that of <mask>
    state[TOKENS] = padded[torch.from_numpy(rows)]
    where = str(folder / "best_model.pt")
    return assemble(config, vocab, None, {f"model.{name}": tensor for name, tensor in state.items()}, where)


def _config(args: dict[str, Any], state: dict[str, torch.Tensor], folder: Path) -> Config:
    """Settings that follow from args.json and from the heads that are there."""
    if args.get("input_style", "binned") != "binned":
        raise ModelError(
            f"'{folder / 'args.json'}': input_style is {args['input_style']!r}; only models of binned values are read."
        )
    generative = "flags.weight" in state
    zeros = "expression_head.nonzero.0.weight" in state
    adversarial = "auxiliary.batch.out.weight" in state
    has_batches = BATCHES in state or adversarial
    dropout = args.get("dropout", 0.2)
    settings: dict[str, Any] = {
        "data": {
            "gene_vocab": str(folder / "vocab.json"),
            "preprocessing": {"normalize": "none", "log1p": False},
        },
        "tokenizer": {
            "strategy": "binned_expression",
            "max_genes": args.get("max_seq_len", 1200),
            "n_bins": args.get("n_bins", 51),
            "vocab_layout": "scgpt",
            "cls_value": args.get("pad_value", -2),
            "include_zero_genes": zeros,
            "masking": {"mask_ratio": 0.4, "mask_token_share": 1.0, "random_share": 0.0},
        },
        "model": {
            "architecture": "autoregressive_transformer" if generative else "transformer_encoder",
            "pretraining_task": "expression_reconstruction",
            "hidden_dim": args["embsize"],
            "num_layers": args["nlayers"],
            "num_heads": args["nheads"],
            "ffn_dim": args["d_hid"],
            "dropout": dropout,
            "attention_dropout": dropout,
            "activation": "relu",
            "norm": "post",
            "layer_norm_eps": 1e-5,
            "value_embedding": args.get("input_emb_style", "continuous"),
            "pooling": "cls",
            "normalize_embedding": True,
            "objective": {
                "reference": generative,
                "second_pass_weight": float(generative),
                "zero_probability": zeros,
                "cell_weight": float("auxiliary.cell_expression.value.weight" in state),
                "batch_key": BATCH_KEY if has_batches else None,
                "batch_labels": BATCHES in state,
                "batch_weight": float(adversarial),
            },
        },
    }
    return config_from(settings, folder / "args.json")


# --- vocabulary -----------------------------------------------------------------------------------


def _read_vocab(path: Path, n_tokens: int) -> tuple[GeneVocab, np.ndarray]:
    """Our vocabulary, and the row of scGPT's embedding for each of our tokens, -1 for none."""
    table = read_json(path)
    if not isinstance(table, dict) or sorted(table.values(), key=str) != sorted(range(len(table)), key=str):
        raise ModelError(f"'{path}' does not number its tokens 0, 1, 2, … without gaps and repeats.")
    for token in SPECIAL_TOKENS:  # as scGPT does on loading
        table.setdefault(token, len(table))
    if len(table) != n_tokens:
        raise ModelError(
            f"'{path}' has {len(table):,} tokens with {' '.join(SPECIAL_TOKENS)}, and the weights have {n_tokens:,}: "
            "they belong to different models."
        )
    special = VOCAB_LAYOUTS["scgpt"]
    genes = sorted(table.keys() - {*special}, key=table.__getitem__)
    rows = np.array([table.get(token, -1) for token in (*special, *genes)], dtype=np.int64)
    return gene_vocab(genes, path.stem), rows


def gene_vocab(names: list[str], name: str = "scgpt") -> GeneVocab:
    """The vocabulary of scGPT's gene names, in their order.

    A name becomes an Ensembl id where it means one gene and no other name means that gene better; scGPT's own name is
    kept as the symbol. Others stay under their own name, so that data that use it still match. Both are counted.
    """
    reference = reference_of_species("human")
    found, reasons = recognise(pd.Series(names, dtype=object), reference)
    gene_ids = reference.genes.gene_id.to_numpy(object)
    frame = pd.DataFrame({"name": names, "row": found, "reason": reasons})
    frame.loc[(frame.row >= 0) & (frame["name"] == gene_ids[frame.row]), "reason"] = "gene id"
    frame["rank"] = frame.reason.map({reason: rank for rank, reason in enumerate(RELIABLE)})
    usable = frame[(frame.row >= 0) & frame["rank"].notna()].sort_values("rank", kind="stable")
    chosen = usable.drop_duplicates("row")
    ids, biotypes = np.array(names, dtype=object), np.full(len(names), "", dtype=object)
    ids[chosen.index] = gene_ids[chosen.row]
    biotypes[chosen.index] = reference.genes.biotype.to_numpy()[chosen.row]
    log.info(
        "%s of %s gene names are known genes (%s); %s keep scGPT's name: %s unknown or ambiguous, %s another name of a "
        "gene that is there already",
        f"{len(chosen):,}",
        f"{len(names):,}",
        ", ".join(f"{count:,} by {reason}" for reason, count in chosen.reason.value_counts().items()),
        f"{len(names) - len(chosen):,}",
        f"{len(names) - len(usable):,}",
        f"{len(usable) - len(chosen):,}",
    )
    symbols = np.array(names, dtype=object)
    return GeneVocab(ids, symbols, biotypes, "human", None, VOCAB_LAYOUTS["scgpt"], name)


# --- the way out ----------------------------------------------------------------------------------


def write_published(bundle: ModelBundle, folder: Path) -> None:
    """Write args.json, best_model.pt and vocab.json as scGPT's own loaders read them.

    Raises
    ------
    ModelError
        If the model computes what scGPT does not; the settings are listed. Nothing is written then.
    """
    model, tokenizer, vocab = bundle.config.model, bundle.config.tokenizer, bundle.vocab
    generative = model.architecture == "autoregressive_transformer"
    style = bundle.config.value_embedding
    needed = {
        "tokenizer.strategy": (tokenizer.strategy, "binned_expression"),
        "tokenizer.vocab_layout": (tokenizer.vocab_layout, "scgpt"),
        "tokenizer.prepend_cls": (tokenizer.prepend_cls, True),
        "tokenizer.obs_tokens": (tokenizer.obs_tokens, []),
        "model.pretraining_task": (model.pretraining_task, "expression_reconstruction"),
        "model.norm": (model.norm, "post"),
        "model.final_norm": (bool(model.final_norm), False),
        "model.qk_norm": (model.qk_norm, False),
        "model.activation": (model.activation, "relu"),
        "model.layer_norm_eps": (model.layer_norm_eps, 1e-5),
        "model.bias": (model.bias, True),
        "model.soft_cap": (model.soft_cap, None),
        "model.count_bias": (model.count_bias, False),
        "model.embedding_norm": (bundle.config.embedding_norm, True),
        "model.gene_embedding_dim": (model.gene_embedding_dim, None),
        "model.objective.value_loss": (bundle.config.value_loss, "mse"),
    }
    if generative:
        needed["model.objective.reference"] = (model.objective.reference, True)
    wrong = [f"{key} is {have!r}, not {want!r}" for key, (have, want) in needed.items() if have != want]
    if style not in ("continuous", "category", "scaling"):
        wrong.append(f"model.value_embedding is {style!r}, not continuous, category or scaling")
    if wrong:
        raise ModelError("This model is no scGPT, as which it should be exported:\n  " + "\n  ".join(wrong))
    state = to_scgpt({name: tensor.cpu() for name, tensor in bundle.model.state_dict().items()})
    if bundle.labels is not None:
        log.warning("The head that predicts '%s' is not exported.", bundle.labels.key)

    tokens = {name: vocab.special_tokens.index(name) for name in SPECIAL_TOKENS}
    rows = [*range(vocab.first_gene_token, vocab.n_tokens), *tokens.values()]
    state["encoder.embedding.weight"] = state["encoder.embedding.weight"][rows]
    args = {
        "input_style": "binned",
        "input_emb_style": style,
        "n_bins": tokenizer.n_bins,
        "max_seq_len": tokenizer.max_genes,
        "mask_ratio": model.objective.generated_share if generative else tokenizer.masking.mask_ratio,
        "training_tasks": "gen" if generative else "pcpt",
        "nlayers": model.num_layers,
        "nheads": model.num_heads,
        "embsize": model.hidden_dim,
        "d_hid": model.feed_forward_dim,
        "dropout": model.dropout,
        "n_layers_cls": 3,
        "pad_token": "<pad>",
        "mask_value": int(MASKED_VALUE),
        "pad_value": tokenizer.cls_value,  # scGPT gives <cls> the value of pads
        "USE_CLS": False,
        "USE_CCE": False,
        "MVC": bool(model.objective.cell_weight),
        "USE_GENERATIVE_TRAINING": generative,
    }
    with atomic_path(folder / "best_model.pt") as temporary:
        torch.save({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
    names = [*_unique_names(vocab), *SPECIAL_TOKENS]
    _write_json(folder / "vocab.json", {name: token for token, name in enumerate(names)})
    _write_json(folder / "args.json", args)


def _unique_names(vocab: GeneVocab) -> np.ndarray:
    """Symbols; gene ids where a symbol is missing or several genes have it."""
    symbols = pd.Series(vocab.symbols)
    unusable = (symbols == "") | symbols.duplicated(keep=False)
    if n_unusable := int(unusable.sum()):
        log.warning(
            "%s genes have no symbol of their own and are exported under their gene id.", f"{n_unusable:,}"
        )
    return np.where(unusable, vocab.gene_ids, vocab.symbols)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
