"""The DiffusionGemma that benchmarks/diffusion_gemma.py trains is the one that plays, wherever its training stopped."""

import os
import signal
from pathlib import Path

import pytest
import torch

from pretrain.run import Interrupted
from tasks import Countdown
from unmask_env.denoiser import load_denoiser

pytest.importorskip("transformers")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import diffusion_gemma

    return diffusion_gemma


def config(benchmark, out, steps=4):
    return benchmark.Training(str(out), 20, steps, seed=1, batch=4, dim=16, layers=2, heads=2, save_every=2)


def test_noise_is_a_share_of_uniform_symbols(benchmark) -> None:
    answers = torch.zeros(20_000, 6, dtype=torch.int64)
    noised = benchmark.noised(answers, 4, torch.Generator().manual_seed(0))
    changed = (noised != answers).float().mean(1)
    assert float(changed.mean()) == pytest.approx(3 / 8, abs=0.01)  # half of all, of which a quarter is the same symbol
    assert float((changed == 0).float().mean()) == pytest.approx(
        sum((1 - 0.75 * (i + 0.5) / 1000) ** 6 for i in range(1000)) / 1000, abs=0.01
    )


@pytest.mark.trains
def test_the_folder_holds_the_trained_model(benchmark, tmp_path) -> None:
    task = Countdown(largest=20)
    benchmark.train(config(benchmark, tmp_path), task)
    denoiser, answers = load_denoiser(f"hf:{tmp_path}", task), task.heldout(3).answers
    canvas = benchmark.noised(answers[:, 12:], task.vocab_size, torch.Generator().manual_seed(0))
    logits = denoiser.model(input_ids=answers[:, :12], decoder_input_ids=canvas).logits
    where = (torch.arange(task.length) >= 12).expand(3, -1)
    seen = denoiser(torch.cat([answers[:, :12], canvas], 1), where, torch.ones(3), denoiser.begin(3))
    torch.testing.assert_close(seen.log_probs[:, 12:], (logits / denoiser.t_max).log_softmax(-1))
    assert denoiser.ends == ()  # no symbol of the task ends a sequence
    before = benchmark.model_of(config(benchmark, tmp_path), task).state_dict()
    after = denoiser.model.state_dict()
    assert all(torch.equal(before[name], after[name]) == ("vision" in name) for name in before if "proj" in name)


@pytest.mark.trains
def test_training_that_was_cut_off_goes_on(benchmark, tmp_path, monkeypatch) -> None:
    task, loss_of, calls = Countdown(largest=20), benchmark.loss_of, []
    benchmark.train(config(benchmark, tmp_path / "whole"), task)

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss_of(*given)

    monkeypatch.setattr(benchmark, "loss_of", interrupted)
    with pytest.raises(Interrupted):
        benchmark.train(config(benchmark, tmp_path / "parts"), task)
    benchmark.train(config(benchmark, tmp_path / "parts"), task)
    assert len(calls) == 4
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
