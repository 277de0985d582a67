"""The examples of the documentation run, shortened by their own options, and compute what they say."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.distributions import Categorical
from torchrl.objectives.value.functional import generalized_advantage_estimate

from agents.evaluate import compare

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
SHORT = {"denoiser": "sudoku4", "num_envs": 16, "iterations": 2, "epochs": 1, "limit": 20}


def load(name: str) -> ModuleType:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_these_are_all_examples() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == ["maskable_ppo", "ppo", "torchrl_ppo"]


@pytest.mark.trains
@pytest.mark.parametrize("name", ["maskable_ppo", "torchrl_ppo"])
def test_the_libraries_ppo(name: str, tmp_path: Path) -> None:
    example = load(name)
    compared = example.main(example.Args(**SHORT, out=tmp_path / "rows.json"))
    assert [row["order"] for row in compared.rows] == ["random", "max_confidence", "learned"]
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == compared.rows
    again = example.main(example.Args(**SHORT))
    assert torch.equal(again["learned"].metrics["cell_accuracy"], compared["learned"].metrics["cell_accuracy"])


@pytest.mark.trains
def test_ppo_in_one_file(tmp_path: Path) -> None:
    ppo = load("ppo")
    args = ppo.Args(**SHORT, out=tmp_path / "result.json")
    result = ppo.main(args)
    written = json.loads((tmp_path / "result.json").read_text())
    assert {name: written[name] for name in result} == result
    assert len(written["curve"]) == 2
    [row] = compare(args.task, "max_confidence", denoiser="sudoku4", limit=20).rows
    assert result["max_confidence"] == pytest.approx(row["cell_accuracy"], abs=1e-6)


def test_the_agent_of_ppo_begins_as_the_reference() -> None:
    ppo = load("ppo")
    args = ppo.Args(**SHORT)
    envs = ppo.make(args, 4)
    obs = ppo.tensors(envs.reset(seed=0)[0])
    policy, _ = ppo.Agent(envs, args.dim, args.layers)(obs)
    uniform = Categorical(probs=obs["action_mask"].float())
    torch.testing.assert_close(policy.probs, uniform.probs)


def test_the_advantages_of_ppo_are_torchrls() -> None:
    ppo, generator = load("ppo"), torch.Generator().manual_seed(0)
    rewards, values = (torch.rand(6, 3, generator=generator) for _ in range(2))
    dones, following = torch.rand(6, 3, generator=generator) < 0.3, torch.rand(3, generator=generator)
    assert dones.any()
    ours = ppo.advantages_of(rewards, dones, values, following, 0.9, 0.8)
    after = torch.cat([values[1:], following.unsqueeze(0)])
    shaped = [part.T.unsqueeze(-1) for part in (values, after, rewards, dones)]  # (N, T, 1)
    theirs, _ = generalized_advantage_estimate(0.9, 0.8, *shaped)
    torch.testing.assert_close(ours, theirs.squeeze(-1).T)
