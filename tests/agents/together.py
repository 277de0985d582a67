"""What two processes of ``torchrun`` do in test_processes.py: ``python -m tests.agents.together FOLDER [fail]``."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from agents import cli, evaluate, imitation, policy_iteration, setup, upo
from agents.imitation import ImitationConfig
from agents.policy import OrderPolicy, PolicyConfig
from agents.policy_iteration import PolicyIterationConfig
from agents.replay import Replay
from agents.states import States
from agents.upo import Tempered, UPOConfig
from pretrain import processes
from pretrain.run import Interrupted, Run
from tasks import UnmaskError
from tests.agents.test_policy_iteration import table
from tests.toys import generator
from unmask_env import make_process
from unmask_env.reference import Oracle

SHAPE = PolicyConfig(copy=False, dim=8, layers=1, heads=2, defer_above=2.0, num_passes=2)
FEW = {"policy": SHAPE, "puzzles": 8, "validation_puzzles": 5}
ORDERS = ("random", "margin", "softmax_margin", "threshold:theta=0.6", "soft_threshold", "oracle", "remdm")
LEARNED = ("sudoku6-tiny-rewards", "sudoku6-tiny-sets-rewards", "belief:sudoku6-tiny-rewards")


# ---------------------------------------------------------------------- learners
def upo_config(out: Path, **changes: object) -> UPOConfig:
    few = {"iterations": 3, "imitation": 1, "group": 4, "minibatches": 2, "replay_fraction": 0.5, "validate_every": 1}
    return UPOConfig(out=str(out), **FEW | few | changes)


def imitation_config(out: Path, **changes: object) -> ImitationConfig:
    few = {"puzzles": 64, "steps": 4, "batch": 16, "log_every": 1, "validate_every": 2}
    return ImitationConfig(out=str(out), **FEW | few | changes)


def policy_iteration_config(out: Path, **changes: object) -> PolicyIterationConfig:
    few = {"iterations": 2, "steps": 3, "batch": 16, "log_every": 1, "validate_every": 2}
    return PolicyIterationConfig(out=str(out), **FEW | few | changes)


LEARNERS = {
    "upo": (upo_config, upo.train),
    "imitation": (imitation_config, imitation.train),
    "policy-iteration": (policy_iteration_config, policy_iteration.train),
    "policy-iteration-drawn": (partial(policy_iteration_config, fill_temperature=1.0), policy_iteration.train),
}


# ---------------------------------------------------------------------- one update
def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def check_update(name: str, policy: OrderPolicy, loss_of: Callable[[slice], Tensor], rows: int) -> None:
    """The gradient that :func:`agents.setup.descend` follows, from this process's half, is that of all ``rows``."""
    whole = gradients(policy, loss_of(slice(None)))
    half = rows // 2
    mine = slice(processes.rank() * half, (processes.rank() + 1) * half)
    own = gradients(policy, loss_of(mine))
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    still = torch.optim.SGD(policy.parameters(), lr=0.0)
    setup.descend(UPOConfig(out="", grad_clip=1e9), still, list(policy.parameters()), loss_of(mine))
    for parameter, expected in zip(policy.parameters(), whole, strict=True):
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(own, whole, strict=True) if a is not None), "halves differ"
    for key, value in policy.state_dict().items():
        assert torch.equal(value, before[key])


def check_updates() -> None:
    """Both processes hold the same data, of which each takes a half of whole groups, or of states alike in number."""
    config = upo_config(Path("unused"), imitation=0, normalise=True, beta=0.05)
    ready = setup.setup(config, table(), belief_weight=1.0)
    behaviour = Tempered(ready.policy, 1.0)
    batch, _, _ = upo.collect(ready, behaviour, Replay(ready.process.task, 0.0), "step_kl", generator(1))
    count = config.puzzles * config.group

    def upo_loss(part: slice) -> Tensor:
        chosen = torch.isin(batch.trajectory, torch.arange(count)[part]).nonzero().squeeze(1)
        return upo.upo_loss(behaviour, ready.reference, batch.rows(chosen), "step_kl", 0.05, 0.2)[0]

    check_update("upo", ready.policy, upo_loss, count)

    process, states = table(), States(table().task)
    states.collect(process, process.task.sample(100, generator(2)), 2.0, generator(3))
    drawn = states.sample(process.task, 100, 0.0, generator(4))
    seen = drawn.observe(process)
    rows = replace(Oracle(), answers=drawn.answers).right(seen).any(1).nonzero().squeeze(1)[:64]
    assert len(rows) == 64
    seen, answers = seen[rows], drawn.answers[rows]

    def imitation_loss(part: slice) -> Tensor:
        index = torch.arange(64)[part]
        return imitation.imitation_loss(ready.policy, Oracle(), seen[index], answers[index])

    check_update("imitation", ready.policy, imitation_loss, 64)

    known = seen.fillable & (seen.fillable.cumsum(1) <= 2)  # two candidates of each state
    rows = (known.sum(1) == 2).nonzero().squeeze(1)[:32]
    values = torch.rand(known.shape, generator=generator(5)).masked_fill(~known, torch.nan)

    policy = setup.setup(policy_iteration_config(Path("unused")), table(), belief_weight=1.0, beta=0.1).policy

    def value_loss(part: slice) -> Tensor:
        return policy_iteration.value_loss(policy, seen[rows[part]], values[rows[part]])

    check_update("policy-iteration", policy, value_loss, 32)


def check_nothing_to_decide() -> None:
    """A process whose denoiser was confident takes the others' step; where all were, nobody takes one."""
    policy = nn.Linear(2, 1)
    with torch.no_grad():
        policy.weight.fill_(1.0)
    config, optimizer = UPOConfig(out="", epochs=1, minibatches=3), torch.optim.SGD(policy.parameters(), lr=1.0)
    decides = [True]

    def loss_of(rows: Tensor) -> tuple[Tensor, dict[str, float]]:
        if processes.rank() or not decides[0]:
            return torch.zeros(()), {}
        return policy.weight.sum(), {}

    # Three minibatches here and two there, and a mean of a gradient of 1 and of none.
    count = 9 - 5 * processes.rank()
    logged = setup.minibatch_epochs(config, optimizer, list(policy.parameters()), count, loss_of, generator())
    assert torch.allclose(policy.weight, torch.full((1, 2), 1 - 3 / 2)), policy.weight
    assert policy.bias.grad is None, "what has no gradient anywhere keeps none"
    assert "gradient/norm" in logged
    decides[0] = False
    assert setup.minibatch_epochs(config, optimizer, list(policy.parameters()), count, loss_of, generator()) == {}


# ---------------------------------------------------------------------- runs
def check_runs(folder: Path) -> None:
    """Straight through, and stopped by a signal to the second process and resumed: the same weights in both."""
    log, rank = Run.log, processes.rank()

    def stop(run: Run, *args: object) -> None:
        if rank == 1 and not run._stop:
            os.kill(os.getpid(), signal.SIGTERM)
        log(run, *args)

    for name, (config_of, train) in LEARNERS.items():
        process = table(temperature=1.0 if name.endswith("drawn") else 0.0)
        whole = train(config_of(folder / name, save_every=1), process).state_dict()
        save_file({key: value.contiguous() for key, value in whole.items()}, folder / f"{name}-{rank}")
        cut = config_of(folder / f"{name}-cut")
        Run.log = stop
        with contextlib.suppress(Interrupted):
            train(cut, process)
            raise AssertionError("nobody stopped")
        Run.log = log
        resumed = train(replace(cut, resume="must"), process).state_dict()
        for key, value in whole.items():
            assert torch.equal(value, resumed[key]), (name, key)
    refused = [
        (upo.train, upo_config(folder / "odd", puzzles=7), "puzzles 7 does not split over 2 processes"),
        (imitation.train, imitation_config(folder / "odd", batch=7), "batch 7 does not split over 2 processes"),
        (upo.train, upo_config(folder / "upo"), "already holds a run; add --resume auto"),
    ]
    for train, config, message in refused:
        with pytest.raises(UnmaskError, match=message):
            train(config, table())
    assert not (folder / "odd").exists()


# ---------------------------------------------------------------------- evaluation
def rows(temperature: float) -> dict[str, Tensor]:
    """Per order and column, what every instance came to; the last batch has fewer rows than processes."""
    process = make_process("sudoku6", "sudoku6-tiny", temperature=temperature)
    instances = process.task.heldout(29)
    policies = {name: evaluate.load_order(name, process.task, process.denoiser) for name in ORDERS + LEARNED}
    results = evaluate.compare(process, policies, instances, seed=3, batch=14)
    columns = {}
    for result in results:
        spent = {"nfe": result.forwards, "passes": result.passes, "policy_passes": result.policy_passes}
        columns |= {f"{result.order} {name}": values for name, values in (result.metrics | spent).items()}
    return columns


def command(file: Path) -> list[str]:
    """``unmask evaluate`` with exact columns."""
    words = "evaluate --task sudoku4:blanks=6 --denoiser sudoku4 --limit 6 --exact --orders random margin"
    return [*words.split(), "--json", str(file)]


def main(folder: Path) -> None:
    processes.join(torch.device("cpu"))
    rank = processes.rank()
    check_updates()
    check_nothing_to_decide()
    check_runs(folder)
    for temperature in (0.0, 1.0):
        save_file(rows(temperature), folder / f"rows-{temperature}-{rank}")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cli.main(command(folder / "rows.json"))
    assert bool(said.getvalue()) == (rank == 0), "the first process alone shows a table"


def fail(folder: Path) -> None:
    """The second process fails in the middle of a run."""
    improve, rank = upo.improve, int(os.environ["RANK"])

    def failing(*args: object) -> dict[str, float]:
        if rank == 1:
            raise UnmaskError("this one fails")
        return improve(*args)

    upo.improve = failing
    try:
        upo.train(upo_config(folder / "failed", iterations=1000, imitation=0), table())
    except UnmaskError as error:
        cli.fail(str(error))


if __name__ == "__main__":
    (fail if sys.argv[2:] else main)(Path(sys.argv[1]))
