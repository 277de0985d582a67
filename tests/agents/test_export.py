"""Exported programs decide as the policies do."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from agents.cli import main
from agents.export import ExportCommand, engine_files, export, run
from agents.policy import load_policy
from tasks import UnmaskError
from tests.toys import generator, observation, sweep
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


@pytest.mark.parametrize("vocab_size", sweep([6, 300], lambda size: size == 300))
@pytest.mark.parametrize("name", sweep(RULES, {"threshold:theta=0.6", "margin"}.__contains__))
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


SETS = "sudoku6-tiny-sets-rewards"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What `unmask export --to sglang` leaves of a packaged policy."""
    folder = tmp_path_factory.mktemp("exported")
    main(["export", SETS, "--to", "sglang", "--out", str(folder)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [SETS, "sudoku6-tiny-rewards"])
def test_a_trained_policy_from_its_file(name, exported, tmp_path, capsys) -> None:
    folder = exported if name == SETS else tmp_path
    if name != SETS:
        main(["export", name, "--out", str(folder)])
        assert "6 symbols, 36 positions" in capsys.readouterr().out
        assert {file.name for file in folder.iterdir()} == {"policy.pt2", "policy.json", "policy.safetensors"}
    program = torch.export.load(folder / "policy.pt2").module()
    policy = load_policy(name)
    process = make_process("sudoku6", denoiser="sudoku6-tiny", actions=policy.actions)
    instances = process.task.heldout(20)
    tokens = process.rollout(policy, instances).tokens
    assert torch.equal(played(program, process, instances), tokens)
    with torch.no_grad():
        for weight in program.parameters():
            weight.fill_(torch.nan)
    program.load_state_dict(load_file(folder / "policy.safetensors"))
    assert torch.equal(played(program, process, instances), tokens)
    assert json.loads((folder / "policy.json").read_text())["policy"] == name


def defined_by(text, monkeypatch, module, **names):
    """What an exported file defines. The engines are not here: what of theirs it imports is stood in for."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    vars(sys.modules[module]).update(names)
    defined: dict = {}
    exec(text, defined)
    return defined


def rolled():
    """Boards, the network whose logits an engine would have, and the boards as the process fills them."""
    process = make_process("sudoku6", denoiser="sudoku6-tiny", actions="set")
    instances = process.task.heldout(5)
    return instances.tokens, process.denoiser.model, process.rollout(load_policy(SETS), instances).tokens


@pytest.mark.slow
def test_the_step_of_the_algorithm_for_sglang(exported, monkeypatch) -> None:
    class DllmAlgorithm:
        def __init__(self, config):
            self.block_size, self.mask_id = config.block_size, config.mask_id

    base = "sglang.srt.dllm.algorithm.base"
    text = (exported / "unmask_policy.py").read_text()
    assert "SGLang 0.5.23" in text
    assert "has not been run in the engine" in text.replace("\n", " ")
    defined = defined_by(text, monkeypatch, base, DllmAlgorithm=DllmAlgorithm)
    program, size = yaml.safe_load((exported / "unmask.yaml").read_text()).values()
    config = SimpleNamespace(block_size=int(size), mask_id=6, algorithm_config={"program": program})
    algorithm = defined["Algorithm"](config)
    tokens, model, filled = rolled()
    batch = SimpleNamespace(batch_size=5, input_ids=tokens.flatten().int(), dllm_prompt_mask=None)
    done, steps = [False], 0
    while not all(done):
        logits = model(batch.input_ids.long().view(5, 36))[0]
        done, steps = algorithm.step(batch, logits.flatten(0, 1), [None] * 5), steps + 1
        assert steps <= 37  # SGLang's own limit
    assert torch.equal(batch.input_ids.long().view(5, 36), filled)


@pytest.mark.slow
def test_the_step_of_the_decoder_for_dinfer(exported, monkeypatch) -> None:
    class ParallelDecoder:
        def __init__(self, temperature, remasking="low_confidence", mask_id=126336):
            self.mask_id = mask_id

    names = {"ParallelDecoder": ParallelDecoder, "broadcast_if_needed": lambda x: None}
    (text,) = engine_files("dinfer", 6, 36, exported / "policy.pt2").values()
    assert "has not been run in the engine" in text.replace("\n", " ")
    defined = defined_by(text, monkeypatch, "dinfer.decoding.parallel_strategy", **names)
    decoder = defined["UnmaskDecoder"](exported / "policy.pt2", 6)
    tokens, model, filled = rolled()
    prompt = torch.zeros(5, 3, dtype=torch.long)
    x = torch.cat([prompt, tokens], 1)
    while bool((x == 6).any()):
        decoder.decode(model(x[:, 3:])[0], 3, 39, x)
    assert torch.equal(x, torch.cat([prompt, filled], 1))


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


def test_a_program_is_of_a_size_and_a_place_that_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="positions of 1000000 symbols are more than a program takes"):
        run(ExportCommand("margin", tmp_path, vocab_size=10**6, length=10**6))
    (tmp_path / "file").touch()
    with pytest.raises(UnmaskError, match="cannot write --out "):
        run(ExportCommand("margin", tmp_path / "file", vocab_size=4, length=4))
    place = tmp_path / "a: #b" / os.fsdecode(b"\xff")
    (text,) = (t for name, t in engine_files("sglang", 4, 4, place / "policy.pt2").items() if name.endswith("yaml"))
    read = yaml.safe_load(text)
    assert read == {"program": str(place.resolve() / "policy.pt2"), "block_size": 4}


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UnmaskError, match=r"cannot write .*policy\.pt2: File too large"):
            run(ExportCommand("margin", tmp_path / "out", vocab_size=4, length=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [*(tmp_path / "out").iterdir()] == []
