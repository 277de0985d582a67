"""Adapters: what is learned, saved and read back, on a causal model of a few thousand weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import tasks
from pretrain import masking
from pretrain.adapter import (
    AdapterConfig,
    adapt,
    adapter_folder,
    adapter_loss,
    heldout_loss,
    mask_of,
    masked_model,
    new_adapter,
)
from tasks import UnmaskError
from tasks.text import Corpus, Text
from unmask_env.denoiser import load_denoiser

transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
peft = pytest.importorskip("peft")
WORDS = ["<mask>", "the", "cat", "dog", "sat", "ran", "on", "mat", "."]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of random weights and a tokenizer of words, in one folder."""
    folder = tmp_path_factory.mktemp("base")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="."))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, mask_token="<mask>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, initializer_range=0.5)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task(base: Path) -> Text:
    text = "the cat sat on the mat . the dog ran on the mat . " * 30
    return Text(Corpus((text,), (text,), (text,)), tokenizer=str(base), length=7, packed=False)


def config(base: Path, out: Path, **settings) -> AdapterConfig:
    return AdapterConfig("text", str(out), base=str(base), **{"steps": 6, "rank": 2, "log_every": 2} | settings)


@pytest.fixture(scope="module")
def trained_once(task: Text, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of one step."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    adapt(config(base, out, steps=1), task)
    return out


@pytest.fixture
def adapter(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(trained_once, tmp_path / "out")


def test_text_in_a_models_tokens(task: Text, base: Path) -> None:
    assert task.vocab_size == len(WORDS)
    assert task.mask_id == len(WORDS)  # the task's own; the model's stays a token that no text holds
    assert task.draw(task.heldout_answers(1, "test")[0]).split() == ["thecatsatonthemat."]
    assert task.tokenizer.mask_token_id == 0


def test_an_untrained_adapters_loss_is_the_causal_models_under_a_mask_that_hides_nothing(
    task: Text, base: Path
) -> None:
    model = new_adapter(AdapterConfig("text", "x", base=str(base)), task).eval()
    head = model.get_output_embeddings().weight.detach()
    clean = task.heldout_answers(4, "validation")
    with torch.no_grad():
        found = adapter_loss(model, head, clean, 0, torch.Generator().manual_seed(3))

        generator = torch.Generator().manual_seed(3)
        t = masking.low_discrepancy_times(4, generator).unsqueeze(1)
        noisy = masking.mask(clean, t.expand(clean.shape), 0, generator)
        plain = transformers.LlamaForCausalLM.from_pretrained(base).eval()
        logits = plain(input_ids=noisy, attention_mask=torch.zeros(4, 1, 7, 7)).logits
    before = torch.tensor([0, 0, 1, 2, 3, 4, 5])  # whose logits are a position's
    logits[..., 0] = -torch.inf
    each = -logits[:, before].log_softmax(-1).gather(-1, clean.unsqueeze(-1)).squeeze(-1)
    assert float(found) == pytest.approx(float(each[noisy == 0].mean()), abs=1e-5)


@pytest.mark.trains
def test_it_learns_and_what_was_saved_is_what_was_trained(task: Text, base: Path, tmp_path: Path) -> None:
    settings = config(base, tmp_path / "run", steps=120, batch=16, lr=2e-2, rank=4, warmup=10)
    before = new_adapter(settings, task)
    clean = task.heldout_answers(32, "validation")
    head = before.get_output_embeddings().weight.detach()
    start = heldout_loss(before, head, clean, 0)
    trained = adapt(settings, task)
    assert heldout_loss(trained, head, clean, 0) < 0.6 * start
    trained.eval()

    folder = adapter_folder(tmp_path / "run")
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base)
    told = ModelCard.load(folder / "README.md")
    assert (told.data.library_name, told.data.base_model) == ("peft", str(base))
    assert "120 steps of 16 sequences" in told.content
    read = masked_model(folder).eval()
    assert mask_of(read) == 0
    tokens = torch.tensor([[1, 0, 4, 0, 1, 0, 8]])
    with torch.no_grad():
        expected = trained(input_ids=tokens).logits
        torch.testing.assert_close(read(input_ids=tokens).logits, expected, rtol=0.05, atol=0.1)  # bfloat16 on disk

        denoiser = load_denoiser(str(folder), task)
        board = torch.tensor([[1, 9, 4, 9, 1, 9, 8]])  # the task's mask is 9
        seen = denoiser(board).log_probs[0, 1:]
        wanted = read(input_ids=tokens).logits[0, :-1, :9].index_fill(-1, torch.tensor([0]), -torch.inf).log_softmax(-1)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-4)
    changed = board.clone()
    changed[0, 6] = 2
    assert not torch.equal(denoiser(changed).log_probs[0, 1], seen[0])  # it sees what stands to the right


@pytest.mark.trains
def test_a_resumed_run_is_the_same(task: Text, base: Path, tmp_path: Path) -> None:
    whole, parts = config(base, tmp_path / "whole"), config(base, tmp_path / "parts", save_every=3)
    adapt(whole, task)
    run = adapt.__globals__["Run"]
    original = run.save

    def stop(self) -> None:
        original(self)
        self._stop = self.step == 3

    run.save = stop
    try:
        with pytest.raises(Exception, match=r"stopped at step [34] of 6"):
            adapt(parts, task)
    finally:
        run.save = original
    adapt(config(base, tmp_path / "parts", save_every=3, resume="must"), task)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other
    again = adapt(config(base, tmp_path / "again", init=str(tmp_path / "whole"), lr=0.0, steps=1), task)
    assert mask_of(again) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init": "nowhere"}, "--init nowhere is no adapter: it has no adapter_config.json"),
        ({"base": "/nowhere"}, "cannot read the language model /nowhere"),
        ({"rank": 0}, "rank must be"),
        ({"lr": float("nan")}, "lr must be"),
    ],
)
def test_what_cannot_be_adapted(task: Text, base: Path, tmp_path: Path, settings: dict, said: str) -> None:
    with pytest.raises(UnmaskError) as caught:
        adapt(replace(config(base, tmp_path / "out"), **settings), task)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_needs_the_bases_tokens_and_a_mask(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="has no mask token; name a task of the base's tokens"):
        adapt(config(base, tmp_path / "out"), tasks.get("sudoku4"))


def test_damaged_adapters_are_one_message(task: Text, tmp_path: Path) -> None:
    for name, text in {"a": "{", "b": "[]", "c": '{"peft_type": "LORA"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(text)
        with pytest.raises(UnmaskError) as caught:
            load_denoiser(str(tmp_path / name), task)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "is not of a LoRA adapter"),
        ({"peft_type": None}, "is not of a LoRA adapter"),
        ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "is not of a LoRA adapter"),
        ({"base_model_name_or_path": None}, "does not name its base_model_name_or_path"),
        ({"base_model_name_or_path": ["a"]}, "does not name its base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere"}, "cannot read the language model /nowhere"),
        ({"r": 10**9}, "r=1000000000 is no rank"),
        ({"r": "8"}, "r='8' is no rank"),
        ({"r": True}, "r=True is no rank"),
        ({"rank_pattern": {"q_proj": 10**9}}, "is no rank"),
        ({"rank_pattern": [1]}, "must be objects"),
        ({"target_modules": "(a+)+!"}, "a pattern that may take for ever"),
        ({"target_modules": ".*.*.*.*.*.*!"}, "a pattern that may take for ever"),
        ({"rank_pattern": {"(a|a)*!": 2}}, "a pattern that may take for ever"),
        ({"target_modules": 5}, "cannot read the adapter"),
        ({"trainable_token_indices": [10**9]}, "cannot read the adapter"),
        ({"trainable_token_indices": []}, "cannot read the adapter"),
    ],
)
def test_crafted_adapters_are_refused(task: Text, adapter: Path, changes: dict, said: str) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(UnmaskError) as caught:
        load_denoiser(str(adapter), task)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapters_weights_are_safetensors_of_finite_numbers(task: Text, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    stored = load_file(weights)
    name = next(iter(stored))
    for value, said in ((stored[name] / 0, "no finite numbers"), (stored[name].int(), "no finite numbers")):
        save_file(stored | {name: value}, weights)
        with pytest.raises(UnmaskError, match=said):
            load_denoiser(str(adapter), task)
    weights.write_bytes(b"\0" * 8)
    with pytest.raises(UnmaskError, match="truncated or not safetensors"):
        load_denoiser(str(adapter), task)
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(UnmaskError, match=r"adapter_model.safetensors is missing"):
        load_denoiser(str(adapter), task)
