"""Our encoder against `transformers.BertForMaskedLM`, the class of the published Geneformer checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scmodelforge.config import Config
from scmodelforge.errors import ModelError
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, GeneVocab
from scmodelforge.models.encoder import TransformerEncoder
from scmodelforge.models.objectives.batch import TrainingBatch
from scmodelforge.models.published.geneformer import from_bert, to_bert
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import masked_genes

transformers = pytest.importorskip("transformers", reason="needs the dev extra (transformers)")

pytestmark = pytest.mark.parity

N_GENES, LENGTH, LAYERS = 61, 24, 3


def make_vocab(layout: str) -> GeneVocab:
    ids = np.array([f"ENSG{i:011d}" for i in range(N_GENES)], dtype=object)
    return GeneVocab(
        gene_ids=ids,
        symbols=ids,
        biotypes=np.full(N_GENES, "protein_coding", dtype=object),
        species="human",
        medians=None,
        special_tokens=VOCAB_LAYOUTS[layout],
        name="test",
    )


@pytest.fixture(params=["geneformer_v1", "geneformer_v2"])
def pair(request: pytest.FixtureRequest) -> tuple[TransformerEncoder, torch.nn.Module, GeneVocab]:
    """Our encoder with every parameter drawn at std 0.3, and BERT with the same weights."""
    vocab = make_vocab(request.param)
    v2 = request.param == "geneformer_v2"
    config = Config.model_validate(
        {
            "tokenizer": {
                "max_genes": LENGTH,
                "vocab_layout": request.param,
                "prepend_cls": v2,
                "append_eos": v2,
            },
            "model": {
                "hidden_dim": 32,
                "num_layers": LAYERS,
                "num_heads": 4,
                "ffn_dim": 64,
                "activation": "relu",
                "norm": "post",
                "dropout": 0.02,
                "attention_dropout": 0.02,
            },
        }
    )
    torch.manual_seed(0)
    ours = TransformerEncoder(config, vocab).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    bert_config = transformers.BertConfig(
        vocab_size=vocab.n_tokens,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_act="relu",
        hidden_dropout_prob=0.02,
        attention_probs_dropout_prob=0.02,
        max_position_embeddings=LENGTH,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        pad_token_id=0,
    )
    bert = transformers.BertForMaskedLM(bert_config).eval()
    missing, unexpected = bert.load_state_dict(to_bert(ours.state_dict(), LAYERS), strict=False)
    assert not unexpected
    assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    bert.tie_weights()
    return ours, bert, vocab


def ragged_tokens(vocab: GeneVocab) -> TokenBatch:
    rng = np.random.default_rng(1)
    lengths = np.array([LENGTH, 3, 17, 9])
    ids = np.zeros((4, LENGTH), dtype=np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.choice(N_GENES, length, replace=False) + vocab.first_gene_token
    return TokenBatch(
        torch.from_numpy(ids), torch.ones(4, LENGTH), torch.from_numpy(lengths), torch.arange(4), True
    )


def corrupted(vocab: GeneVocab) -> TrainingBatch:
    config = Config.model_validate({"tokenizer": {"masking": {"mask_ratio": 0.4}}})
    return masked_genes(config.tokenizer.masking, vocab).corrupt(ragged_tokens(vocab), seed=3, epoch=0)


def test_hidden_states_of_every_layer_are_bert_s(pair) -> None:
    ours, bert, vocab = pair
    tokens = ragged_tokens(vocab)
    mask = tokens.attention_mask
    theirs = bert(tokens.input_ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    states = ours.hidden_states(tokens)
    assert len(states) == len(theirs) == LAYERS + 1
    for mine, reference in zip(states, theirs, strict=True):
        torch.testing.assert_close(mine[mask], reference[mask], atol=1e-5, rtol=0)


def test_logits_loss_and_gradients_are_bert_s(pair) -> None:
    ours, bert, vocab = pair
    batch = corrupted(vocab)
    task = masked_genes(Config().tokenizer.masking, vocab)
    labels = torch.full(batch.tokens.input_ids.shape, -100)
    labels.view(-1)[batch.asked] = batch.genes
    reference = bert(batch.tokens.input_ids, attention_mask=batch.tokens.attention_mask.long(), labels=labels)
    output = task(ours, batch)
    assert len(batch.genes) > 5
    asked = reference.logits.flatten(0, 1)[batch.asked]
    torch.testing.assert_close(output.genes.logits, asked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, reference.loss, atol=1e-5, rtol=0)

    output.loss.backward()
    reference.loss.backward()
    gradients = to_bert({name: p.grad for name, p in ours.named_parameters()}, LAYERS)
    checked = 0
    for name, parameter in bert.named_parameters():
        if name in gradients and "token_type" not in name:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
            checked += 1
    assert checked == len(list(ours.parameters()))


def test_cell_embeddings_are_the_published_mean(pair) -> None:
    ours, bert, vocab = pair
    tokens = ragged_tokens(vocab)
    hidden = bert(
        tokens.input_ids, attention_mask=tokens.attention_mask.long(), output_hidden_states=True
    ).hidden_states[-1]
    expected = torch.stack([hidden[i, :length].mean(0) for i, length in enumerate(tokens.lengths.tolist())])
    torch.testing.assert_close(ours.encode(tokens, "mean"), expected, atol=1e-5, rtol=0)


def test_weights_make_the_round_trip(pair) -> None:
    ours, bert, _ = pair
    back = from_bert(bert.state_dict(), LAYERS)
    assert back.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back[name]), name


def test_the_token_type_row_is_folded_into_the_ranks(pair) -> None:
    ours, bert, vocab = pair
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.normal_(std=0.3)
    ours.load_state_dict(from_bert(bert.state_dict(), LAYERS))
    tokens = ragged_tokens(vocab)
    mask = tokens.attention_mask
    reference = bert.bert(tokens.input_ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(tokens)[mask], reference[mask], atol=1e-5, rtol=0)


def test_foreign_weights_are_refused_by_name(pair) -> None:
    _, bert, _ = pair
    state = dict(bert.state_dict())
    state["bert.pooler.dense.weight"] = torch.zeros(1)
    del state["bert.embeddings.LayerNorm.bias"]
    with pytest.raises(ModelError, match=r"missing: \['bert.embeddings.LayerNorm.bias'\]") as error:
        from_bert(state, LAYERS)
    assert "bert.pooler.dense.weight" in str(error.value)
