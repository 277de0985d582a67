"""Exported programs decide as the policies do."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from agents.cli import main
from agents.export import export
from agents.policy import load_policy
from tasks import UnmaskError
from tests.toys import generator, observation
from unmask_env import make_process
from unmask_env.reference import reference
from unmask_env.state import Denoised

RULES = (
    "threshold:theta=0.6",
    "fixed_k:k=3,score=entropy",
    "factor",
    "entropy_bounded:gamma=0.4",
    "margin",
    "max_confidence",
    "left_to_right",
)


@pytest.mark.parametrize("vocab_size", [6, 300])
@pytest.mark.parametrize("name", RULES)
def test_rules(name, vocab_size) -> None:
    program = export(reference(name), vocab_size, 9).module()
    for rows in (1, 20):
        logits = 3 * torch.randn(rows, 9, vocab_size, generator=generator(rows))
        masked = torch.rand(rows, 9, generator=generator(rows + 1)) < 0.6
        tokens = torch.randint(vocab_size, (rows, 9), generator=generator(2)).where(~masked, vocab_size)
        seen = observation(tokens, masked, Denoised.of(logits.log_softmax(-1)))
        assert torch.equal(program(logits, masked, tokens.clamp(max=vocab_size - 1)), reference(name)(seen).mode())


def played(program, process, instances):
    """Boards as ``program`` fills them, from the packaged network's logits."""
    tokens = instances.tokens
    for _ in range(process.task.length):
        masked = tokens == process.task.mask_id
        logits = process.denoiser.model(tokens)[0]
        fill = program(logits, masked, tokens.clamp(max=process.task.vocab_size - 1))
        assert bool((fill.any(1) == masked.any(1)).all())
        tokens = torch.where(fill, logits.argmax(-1), tokens)
    return tokens


@pytest.mark.parametrize("name", ["sudoku6-tiny-sets-rewards", "sudoku6-tiny-rewards"])
def test_a_trained_policy_from_its_file(name, tmp_path, capsys) -> None:
    main(["export", name, "--out", str(tmp_path)])
    assert "6 symbols, 36 positions" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "policy.pt2").module()
    policy = load_policy(name)
    process = make_process("sudoku6", denoiser="sudoku6-tiny", actions=policy.actions)
    instances = process.task.heldout(20)
    assert torch.equal(played(program, process, instances), process.rollout(policy, instances).tokens)
    assert json.loads((tmp_path / "policy.json").read_text())["policy"] == name


def test_the_algorithm_for_sglang(tmp_path, monkeypatch) -> None:
    """Its step alone: SGLang is not here, so its base class is stood in for by what of it the step reads."""
    main(["export", "sudoku6-tiny-sets-rewards", "--to", "sglang", "--out", str(tmp_path)])
    program = (tmp_path / "unmask.yaml").read_text().splitlines()[0].removeprefix("program: ")

    class DllmAlgorithm:
        def __init__(self, config):
            self.block_size, self.mask_id = config.block_size, config.mask_id

    for name in ("sglang", "sglang.srt", "sglang.srt.dllm", "sglang.srt.dllm.algorithm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    base = ModuleType("sglang.srt.dllm.algorithm.base")
    base.DllmAlgorithm = DllmAlgorithm
    monkeypatch.setitem(sys.modules, base.__name__, base)
    written = {}
    exec((tmp_path / "unmask_policy.py").read_text(), written)
    config = SimpleNamespace(block_size=36, mask_id=6, algorithm_config={"program": program})
    algorithm = written["Algorithm"](config)

    policy = load_policy("sudoku6-tiny-sets-rewards")
    process = make_process("sudoku6", denoiser="sudoku6-tiny", actions="set")
    instances = process.task.heldout(5)
    batch = SimpleNamespace(batch_size=5, input_ids=instances.tokens.flatten().int(), dllm_prompt_mask=None)
    done = [False]
    for _ in range(37):
        logits = process.denoiser.model(batch.input_ids.long().view(5, 36))[0]
        done = algorithm.step(batch, logits.flatten(0, 1), [None] * 5)
        if all(done):
            break
    assert all(done)
    assert torch.equal(batch.input_ids.long().view(5, 36), process.rollout(policy, instances).tokens)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["threshold"], "threshold is a rule; say --vocab-size and --length"),
        (["random", "--vocab-size", "6", "--length", "4"], "random cannot be exported: it draws"),
        (["remdm", "--vocab-size", "6", "--length", "4"], "masks positions again"),
        (["kl_stability", "--vocab-size", "6", "--length", "4"], "kl_stability looks back"),
        (["sudoku6-tiny-rewards", "--length", "4"], "is for 6 symbols and 36 positions, not 6 and 4"),
        (["best"], "unknown order policy 'best'"),
    ],
)
def test_mistakes(words, said, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["export", *words, "--out", str(tmp_path / "out")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_the_order_is_read_from_is_the_logits() -> None:
    with pytest.raises(UnmaskError, match="learned no order"):
        export(reference("learned_greedy"), 6, 4)
