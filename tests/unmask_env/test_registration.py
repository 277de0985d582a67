"""Ids: what is registered, what is refused, and a task of one's own in forty lines."""

import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor

import unmask_env
from tasks import Instances, Task, UnknownNameError, UnmaskError
from unmask_env import registration
from unmask_env.denoiser import TableDenoiser


class Parity(Task):
    """Bits whose sum is even; the first bit is shown. Written from the documentation of :class:`tasks.Task` alone."""

    def __init__(self, bits: int = 4) -> None:
        self.name, self.symbols, self.shape = f"parity{bits}", ("0", "1"), (1, bits)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        free = torch.randint(2, (n, self.length - 1), generator=generator)
        answers = torch.cat([free, free.sum(1, keepdim=True) % 2], 1)
        tokens = torch.full_like(answers, self.mask_id)
        tokens[:, 0] = answers[:, 0]
        return Instances(tokens, answers)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens.sum(1) % 2 == 0).float()

    def joint(self) -> Tensor:
        """(2,) * L: uniform over the words of even parity."""
        sums = sum(torch.meshgrid(*[torch.arange(2)] * self.length, indexing="ij"))
        return (sums % 2 == 0).double()


@pytest.fixture
def parity():
    """The id of a registered parity environment; it is forgotten afterwards."""
    task, id = Parity(), "Test/Parity4-v0"
    unmask_env.register(id, task, TableDenoiser(task.joint(), task))
    yield id
    registration._REGISTERED.pop(id)
    gym.registry.pop(id)


def test_the_packaged_ids() -> None:
    sudokus = ["Unmask/Sudoku4x4-v0", "Unmask/Sudoku6x6-v0", "Unmask/Sudoku9x9-v0"]
    assert [id for id in unmask_env.ids() if "Sudoku" in id] == sudokus
    assert all(id in gym.registry for id in sudokus)
    assert registration.lookup(sudokus[1]) == registration.Registered("sudoku6", "sudoku6")


def test_a_new_task_passes_check_env(parity: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(parity).unwrapped)


def test_a_new_task_plays_by_id_single_and_vector(parity: str) -> None:
    assert parity in unmask_env.ids()
    env, envs = gym.make(parity, temperature=1.0), gym.make_vec(parity, num_envs=3, temperature=1.0)
    obs, info = env.reset(seed=5)
    many, _ = envs.reset(seed=5)
    rewards = []
    for position in (2, 1, 3):
        assert obs["tokens"].tolist() == many["tokens"][0].tolist()
        assert info["action_mask"][position] == 1
        obs, reward, terminated, truncated, info = env.step(position)
        many, rewards3, ended, _, infos = envs.step(np.full(3, position))
        rewards.append(reward)
        assert (terminated, truncated) == (bool(ended[0]), False)
    # The exact denoiser never breaks parity, whatever it samples.
    assert rewards == [0.0, 0.0, 1.0]
    assert terminated
    assert info["reward"] == 1.0
    assert rewards3.tolist() == [1.0, 1.0, 1.0]
    assert obs["tokens"].sum() % 2 == 0
    assert obs["tokens"].tolist() == infos["final_obs"][0]["tokens"].tolist()


def test_registering_again_replaces(parity: str) -> None:
    unmask_env.register(parity, Parity(3), TableDenoiser(Parity(3).joint()))
    assert gym.make(parity).action_space.n == 3
    assert unmask_env.ids().count(parity) == 1


@pytest.mark.parametrize("id", ["", "Parity", "Parity-v", "a/b/Parity-v0", "Par ity-v0", "Parity-v0 "])
def test_malformed_ids_are_refused(id: str) -> None:
    with pytest.raises(UnmaskError, match="write it as Namespace/Name-v0"):
        unmask_env.register(id, Parity())
    assert id not in unmask_env.ids()


def test_unknown_task_and_unknown_id_list_the_known_ones() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown task 'sudoku5'; did you mean sudoku4 or sudoku6\? known: .*sudoku4, sudoku6"
    ):
        unmask_env.register("Test/Sudoku5-v0", "sudoku5")
    assert "Test/Sudoku5-v0" not in gym.registry
    with pytest.raises(UnknownNameError, match=r"unknown environment 'Test/Nothing-v0'; known: .*Unmask/Sudoku6x6-v0"):
        registration.lookup("Test/Nothing-v0")
    with pytest.raises(gym.error.Error, match="Nothing"):
        gym.make("Unmask/Nothing-v0")


def test_an_id_without_a_denoiser_asks_for_one_and_takes_one() -> None:
    task, id = Parity(2), "Test/Parity2-v0"
    unmask_env.register(id, task)
    try:
        for make in (gym.make, gym.make_vec):
            with pytest.raises(UnmaskError, match="needs a denoiser; give one"):
                make(id)
        env = gym.make(id, denoiser=TableDenoiser(task.joint()))
        assert env.reset(seed=0)[0]["top_symbols"].shape == (2, 2)
    finally:
        registration._REGISTERED.pop(id)
        gym.registry.pop(id)


# ---------------------------------------------------------------------- what the package gives
def test_a_process_is_made_of_a_task_or_an_id() -> None:
    named = unmask_env.make_process("sudoku4", denoiser="sudoku4", temperature=0.5, actions="set", nfe_budget=9)
    assert isinstance(named, unmask_env.Unmasking)
    assert (named.task.name, named.temperature, named.horizon) == ("sudoku4", 0.5, 9)
    assert named.rules == unmask_env.Rules("set", nfe_budget=9)
    by_id = unmask_env.make_process("Unmask/Sudoku4x4-v0")
    assert (by_id.task.name, by_id.rules) == ("sudoku4", unmask_env.Rules())
    instances = named.task.heldout(20)
    margin = unmask_env.reference("margin")
    played = [
        process.rollout(margin, instances).tokens
        for process in (by_id, unmask_env.make_process(by_id.task, by_id.denoiser))
    ]
    assert torch.equal(*played)


def test_what_a_process_lacks_is_named() -> None:
    with pytest.raises(UnmaskError, match="needs a denoiser; give one"):
        unmask_env.make_process("sudoku4")
    with pytest.raises(
        UnknownNameError, match=r"unknown environment 'Unmask/Sudoku5x5-v0'; did you mean .* known: .*Sudoku4x4"
    ):
        unmask_env.make_process("Unmask/Sudoku5x5-v0")
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'budget'; .* it takes actions, "):
        unmask_env.make_process("sudoku4", "sudoku4", budget=3)


def test_references_are_made_by_name_though_their_module_is_called_alike() -> None:
    from unmask_env.reference import Threshold

    assert unmask_env.reference("threshold:theta=0.8") == Threshold(0.8)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        unmask_env.nothing  # noqa: B018


@pytest.mark.slow
def test_importing_the_package_loads_no_learner_and_no_model_library() -> None:
    heavy = ["stable_baselines3", "torchrl", "transformers", "matplotlib"]
    code = f"import sys, unmask_env; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_unknown_optional_part_is_refused() -> None:
    with pytest.raises(UnmaskError, match="show takes hidden and order_weights, not 'attention'"):
        gym.make("Unmask/Sudoku4x4-v0", show=("attention",))


def test_an_unknown_task_is_named_before_a_missing_denoiser() -> None:
    with pytest.raises(UnknownNameError, match="unknown task 'nope'; known: "):
        unmask_env.make_process("nope")
    with pytest.raises(UnmaskError, match="needs a denoiser; give one"):
        unmask_env.make_process("sudoku4")
