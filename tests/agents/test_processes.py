"""Two processes equal one: updates, runs and rows; and where one fails the other does not wait."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents import cli, imitation
from agents.setup import annealed, descend, make_optimizer
from agents.states import States
from pretrain import processes
from pretrain.checkpoint import step_generator
from pretrain.run import set_learning_rate
from tasks import UnmaskError
from tests.agents import together
from tests.agents.test_policy_iteration import table
from tests.toys import torchrun
from unmask_env.reference import Oracle

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left; their own checks are in together.py."""
    path = tmp_path_factory.mktemp("together")
    result = torchrun("-m", "tests.agents.together", str(path))
    assert result.returncode == 0, result.stderr[-5000:]
    return path


@pytest.mark.parametrize("name", together.LEARNERS)
def test_both_processes_end_with_the_weights_that_the_first_one_saved(folder: Path, name: str) -> None:
    ranks = [load_file(folder / f"{name}-{rank}") for rank in range(2)]
    saved = load_file(folder / name / "model.safetensors")
    for key, value in saved.items():
        assert torch.equal(ranks[0][key], ranks[1][key]), key
        assert torch.equal(ranks[0][key], value), key


def test_imitation_by_two_is_one_loop_over_both_shares(folder: Path) -> None:
    """Each process's puzzles, states and streams, one after the other in one process."""
    config = together.imitation_config(Path("unused"))
    process, target = table(), Oracle()
    policy, _ = imitation._policies(imitation.check(config), process)
    optimizer, parts = make_optimizer(config, policy), []
    for rank in range(2):
        generator, part = step_generator("cpu", config.seed, 0, 3 << 16, rank), States(process.task)
        part.collect(process, process.task.sample(config.puzzles // 2, generator), 2.0, generator)
        parts.append(part.state_dict())
    states = States(process.task)
    states.load_state_dict({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    policy.train()
    for step in range(config.steps):
        losses = []
        for rank in range(2):
            generator = step_generator("cpu", config.seed, step, 2 << 16, rank)
            drawn = states.sample(process.task, config.batch // 2, 0.15, generator)
            losses.append(imitation.imitation_loss(policy, target, drawn.observe(process), drawn.answers))
        set_learning_rate(optimizer, annealed(config.lr, step, config.steps))
        descend(config, optimizer, list(policy.parameters()), sum(losses) / 2)
    saved = load_file(folder / "imitation" / "model.safetensors")
    for key, value in policy.state_dict().items():
        torch.testing.assert_close(saved[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_evaluation_gives_the_rows_of_one_process(folder: Path, temperature: float) -> None:
    """Per instance: references that draw, over sets too, sampled filling, learned orders, and one that fills."""
    expected = together.rows(temperature)
    for rank in range(2):
        played = load_file(folder / f"rows-{temperature}-{rank}")
        assert played.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.equal(played[name], values), name
    assert len({tuple(v.tolist()) for name, v in expected.items() if name.endswith("solved")}) > 2, "orders differ"


def test_the_command_writes_the_rows_of_one_process(folder: Path, tmp_path: Path) -> None:
    cli.main(together.command(tmp_path / "rows.json"))
    one, two = (json.loads((path / "rows.json").read_text()) for path in (tmp_path, folder))
    for row in (*one, *two):
        del row["seconds"]
    assert one == two
    assert "exact_reward" in one[0]


def test_a_process_that_fails_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    """Without torchrun, which would stop it: it ends by itself, in one line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.agents.together", str(tmp_path), "fail"]
    pair = [
        subprocess.Popen(words, env=os.environ | common | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    first, second = (process.communicate(timeout=120)[1].strip().splitlines() for process in pair)
    assert [process.returncode for process in pair] == [2, 2]
    assert second[-1] == "unmask (process 1): this one fails"
    assert first[-1].startswith("unmask: another process of this run has ended, or did not answer")


@pytest.mark.parametrize("name", ["train ppo-sb3 --out x", "train grpo-torchrl --out x", "demo --out x"])
def test_what_runs_in_one_process_says_so(name: str, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(name.split())
    assert stop.value.code == 2
    assert "runs in one process, not in 2; leave torchrun out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_alone_everything_is_handed_back() -> None:
    value = {"loss": 1.0}
    assert processes.mean(value) is value
    assert processes.gather(value) == [value]
    assert processes.share(together.imitation_config(Path("x"), batch=7), "batch").batch == 7
    with pytest.raises(UnmaskError, match="as it is"):
        processes.from_first(lambda: (_ for _ in ()).throw(UnmaskError("as it is")))
