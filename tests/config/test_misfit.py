"""What is right by itself and does not fit together is refused, with the keys to change."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from scmodelforge.config import Config

BINS = {"strategy": "binned_expression"}
LABELS = {"batch_key": "donor", "batch_labels": True}


@pytest.mark.parametrize(
    ("tokenizer", "model", "message"),
    [
        # Neither has a vector in the table of bins.
        (BINS | {"cls_value": 51.0}, {"value_embedding": "category"}, "cls_value 51 is no bin"),
        (BINS | {"cls_value": 0.5}, {"value_embedding": "category"}, "cls_value 0.5 is no bin"),
        # `<cls>` has no value that could be told.
        (
            BINS | {"masking": {"reference": True}},
            {"pretraining_task": "expression_reconstruction"},
            "masking.reference asks special tokens too",
        ),
        # Only expression heads read the batch.
        (BINS, {"objective": LABELS | {"cell_weight": 1.0}}, "has no expression head"),
    ],
)
def test_it_is_refused(tokenizer: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"tokenizer": tokenizer, "model": model})


@pytest.mark.parametrize("cls_value", [-2.0, 0.0, 50.0])
def test_a_bin_or_scgpt_s_padding_value_may_be_that_of_cls(cls_value: float) -> None:
    Config.model_validate(
        {"tokenizer": BINS | {"cls_value": cls_value}, "model": {"value_embedding": "category"}}
    )


def test_cells_are_drawn_by_weight_or_in_stretches() -> None:
    data = {"shuffle_buffer": 1000, "sampling": {"label_key": "cell_type"}}
    with pytest.raises(ValidationError, match=r"data\.shuffle_buffer: null .*scmodelforge shard"):
        Config.model_validate({"data": data})
    Config.model_validate({"data": data | {"sampling": None}})
    Config.model_validate({"data": data | {"shuffle_buffer": None}})
