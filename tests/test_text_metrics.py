"""Text metrics against values by hand, and a small random causal model against its own logits."""

import math
import sys

import pytest
import torch

from benchmarks.text_metrics import CausalLM, distinct
from tasks import UnmaskError
from tasks.free_text import unigram_entropy

transformers = pytest.importorskip("transformers")
WORDS = ["<s>", "<unk>", "a", "b", "c", "d", "e"]


def test_unigram_entropy_by_hand():
    tokens = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 2, 3], [5, 5, 5, 1]])
    third = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(
        unigram_entropy(tokens), torch.tensor([0.0, math.log(2), math.log(4), third], dtype=torch.float64)
    )


def test_distinct_by_hand():
    tokens = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 2]])  # runs of two: 01 10 01, 01 12 22
    assert distinct(tokens, 2) == pytest.approx(4 / 6)
    assert distinct(tokens, 1) == pytest.approx(3 / 8)
    assert distinct(tokens, 4) == 1
    with pytest.raises(UnmaskError, match="n must be between 1 and 4, not 5"):
        distinct(tokens, 5)
    with pytest.raises(UnmaskError, match="at least one"):
        distinct(tokens[:0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of two small layers with random weights, and a tokenizer of words."""
    import tokenizers

    words = {word: i for i, word in enumerate(WORDS)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("lm")
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", unk_token="<unk>").save_pretrained(
        path
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=7,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_nats_are_those_of_the_models_logits_whatever_the_batch(folder):
    scorer = CausalLM(str(folder))
    texts = ["a b c", "e", "", "d d d d d d", "a b c d"]
    nats, count = scorer.nats(texts)
    assert count.tolist() == [3, 1, 0, 6, 4]
    for text, found in zip(texts, nats, strict=True):
        ids = torch.tensor([[0, *(WORDS.index(word) for word in text.split())]])
        log_probs = scorer.model(input_ids=ids).logits.detach().double().log_softmax(-1)[0]
        expected = -sum(float(log_probs[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1))
        assert float(found) == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(scorer.nats(texts, batch=1)[0], nats, rtol=0, atol=1e-5)
    assert (nats[torch.tensor([0, 1, 3, 4])] > 0.1).all()


def test_what_cannot_be_scored_is_one_message(folder, monkeypatch, tmp_path):
    with pytest.raises(UnmaskError, match="a text has 21 tokens, the model's context 12"):
        CausalLM(str(folder)).nats(["a " * 20])
    with pytest.raises(UnmaskError, match="cannot read the tokenizer"):
        CausalLM(str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnmaskError, match=r"pip install 'unmask\[text\]'"):
        CausalLM(str(folder))
