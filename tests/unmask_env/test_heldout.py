"""Held-out instances in environments: drawn by split, chosen by index; and environments that are pickled."""

import pickle
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv
from stable_baselines3.common.vec_env import SubprocVecEnv
from torch import Tensor

import tasks
from tasks import UnmaskError
from tests.toys import legal
from unmask_env.denoiser import FrozenDenoiser, TableDenoiser, load_denoiser
from unmask_env.sb3_env import SB3VecEnv
from unmask_env.torchrl_env import UnmaskTorchEnv

ENV = "Unmask/Sudoku4x4-v0"


@pytest.fixture(scope="module")
def heldout() -> dict[str, Tensor]:
    return {split: tasks.get("sudoku4").heldout(split=split).tokens for split in ("validation", "test")}


def rows_of(boards: np.ndarray | Tensor, among: Tensor) -> list[int]:
    """The index ``among`` (M, L) of each of the ``boards`` (N, L), which must be there."""
    equal = (torch.as_tensor(boards).unsqueeze(1) == among).all(2)
    assert equal.any(1).all()
    return equal.float().argmax(1).tolist()


# ---------------------------------------------------------------------- split
@pytest.mark.parametrize("split", ["validation", "test"])
def test_episodes_are_drawn_from_the_split_by_the_seed(split: str, heldout: dict[str, Tensor]) -> None:
    """Also after an episode ended; row i as a single environment that is seeded with seed + i."""
    envs = gym.make_vec(ENV, num_envs=3, split=split)
    obs, _ = envs.reset(seed=5)
    first = rows_of(obs["tokens"], heldout[split])
    generators = [torch.Generator().manual_seed(5 + row) for row in range(3)]
    drawn = [torch.randint(len(heldout[split]), (16,), generator=g).tolist() for g in generators]
    assert first == [rows[0] for rows in drawn]
    rng, ended = np.random.default_rng(0), np.zeros(3, dtype=bool)
    while not ended.any():
        obs, _, ended, _, _ = envs.step(legal(obs["action_mask"], rng))
    for row in np.flatnonzero(ended):
        assert rows_of(obs["tokens"][[row]], heldout[split]) == [drawn[row][1]]
    single = gym.make(ENV, split=split)
    assert rows_of(single.reset(seed=6)[0]["tokens"][None], heldout[split]) == [drawn[1][0]]


def test_training_is_the_default_and_other_splits_are_refused() -> None:
    same = [gym.make_vec(ENV, num_envs=2, **split).reset(seed=1)[0]["tokens"] for split in ({}, {"split": "train"})]
    np.testing.assert_array_equal(*same)
    for make in (gym.make, gym.make_vec, SB3VecEnv, UnmaskTorchEnv):
        with pytest.raises(UnmaskError, match="split must be train or validation or test, not 'dev'"):
            make(ENV, split="dev")


# ---------------------------------------------------------------------- index
def test_an_index_chooses_the_instance(heldout: dict[str, Tensor]) -> None:
    single = gym.make(ENV, split="test")
    for index in (3, np.int64(0), 999):
        obs, _ = single.reset(seed=0, options={"index": index})
        assert obs["tokens"].tolist() == heldout["test"][int(index)].tolist()
    envs = gym.make_vec(ENV, num_envs=3, split="validation", autoreset_mode="DISABLED")
    for index in ([4, 2, 4], np.array([4, 2, 4]), torch.tensor([4, 2, 4]), (4, 2, 4)):
        obs, _ = envs.reset(options={"index": index})
        assert torch.as_tensor(obs["tokens"]).equal(heldout["validation"][[4, 2, 4]])
    obs, _ = envs.reset(options={"index": [9, 8], "reset_mask": np.array([True, False, True])})
    assert torch.as_tensor(obs["tokens"]).equal(heldout["validation"][[9, 2, 8]])
    obs, _ = envs.reset(options={"index": 7})
    assert torch.as_tensor(obs["tokens"]).equal(heldout["validation"][[7, 7, 7]])


def test_an_index_of_torchrl_also_for_rows_that_have_ended(heldout: dict[str, Tensor]) -> None:
    env = UnmaskTorchEnv(ENV, num_envs=2, split="test", seed=0)
    td = env.reset(options={"index": [1, 6]})
    assert td["tokens"].equal(heldout["test"][[1, 6]])
    while not bool(td["done"].any()):
        td["action"] = td["action_mask"].float().argmax(1)
        td = env.step(td)["next"]
    td["_reset"] = td["done"].clone()
    again = env.reset(td.clone(), set_state=False, options={"index": [8] * int(td["done"].sum())})
    for row, done in enumerate(td["done"].flatten().tolist()):
        assert again["tokens"][row].equal(heldout["test"][8] if done else td["tokens"][row])
    with pytest.raises(UnmaskError, match="reset takes set_state or options, not both"):
        env.reset(again, set_state=True, options={"index": [0, 0]})


@pytest.mark.parametrize(
    "make", [lambda **k: gym.make_vec(ENV, num_envs=2, **k), lambda **k: UnmaskTorchEnv(ENV, 2, **k)]
)
def test_wrong_indices_are_named(make, heldout: dict[str, Tensor]) -> None:
    env, count = make(split="test"), len(heldout["test"])
    whole = f"must be a whole number from 0 to {count - 1}, not "
    for index, message in (
        ([0, count], whole + str(count)),
        (-1, whole + "-1"),
        (1.0, whole + "1.0"),
        (True, whole + "True"),
        ("3", whole + "'3'"),
        ([[0], [1]], whole + r"\[0\]"),
        ([0, 1, 2], "must hold one index per row, 2 of them, not 3"),
    ):
        with pytest.raises(UnmaskError, match=message):
            env.reset(options={"index": index})
    instances = tasks.get("sudoku4").heldout(2)
    with pytest.raises(UnmaskError, match=r"options\['index'\] or options\['instances'\], not both"):
        env.reset(options={"index": [0, 1], "instances": instances})
    with pytest.raises(UnmaskError, match=r"make the environment with split='test' or 'validation'"):
        make().reset(options={"index": [0, 1]})


# ---------------------------------------------------------------------- pickles
MAKERS = {
    "single": lambda **options: gym.make(ENV, **options),
    "vector": lambda **options: gym.make_vec(ENV, num_envs=2, **options),
    "sb3": lambda **options: SB3VecEnv(ENV, num_envs=2, **options),
    "torchrl": lambda **options: UnmaskTorchEnv(ENV, num_envs=2, **options),
}


def denoiser_of(env) -> FrozenDenoiser:
    inner = getattr(env, "envs", env)
    return (
        getattr(inner, "unwrapped", inner).process.denoiser
        if not isinstance(env, UnmaskTorchEnv)
        else env.process.denoiser
    )


@pytest.mark.parametrize("kind", MAKERS)
def test_a_denoiser_given_by_name_is_pickled_by_name_and_shared(kind: str) -> None:
    env = MAKERS[kind]()
    env.reset()
    denoiser = denoiser_of(env)
    weights = sum(p.numel() * p.element_size() for p in denoiser.model.parameters())
    task = denoiser._loaded_as[1]
    named, own, of_task = (len(pickle.dumps(each)) for each in (denoiser, FrozenDenoiser(denoiser.model, task), task))
    assert named - of_task < 200 < 300_000 < weights < own
    first, second = pickle.loads(pickle.dumps(env)), pickle.loads(pickle.dumps(env))
    assert denoiser_of(first) is denoiser_of(second)


def test_a_pickled_environment_plays_on_as_the_first_would() -> None:
    env = gym.make_vec(ENV, num_envs=2, temperature=1.0)
    obs, _ = env.reset(seed=3)
    other = pickle.loads(pickle.dumps(env))
    for _ in range(40):
        action = obs["action_mask"].argmax(1)
        obs, reward, *_ = env.step(action)
        same, earned, *_ = other.step(action)
        np.testing.assert_array_equal(obs["tokens"], same["tokens"])
        np.testing.assert_array_equal(reward, earned)


def test_denoiser_objects_are_pickled_with_their_weights() -> None:
    task = tasks.get("sudoku4")
    frozen = FrozenDenoiser(load_denoiser("sudoku4", task).model, task)
    env = gym.make(ENV, denoiser=frozen)
    back = denoiser_of(pickle.loads(pickle.dumps(env)))
    assert back is not frozen
    for a, b in zip(frozen.model.parameters(), back.model.parameters(), strict=True):
        assert torch.equal(a, b)
    joint = torch.rand(2, 2)
    assert torch.equal(
        pickle.loads(pickle.dumps(TableDenoiser(joint))).probabilities, TableDenoiser(joint).probabilities
    )


@pytest.mark.slow
def test_a_name_is_loaded_anew_where_nothing_has_it() -> None:
    """In another process; a name that is a folder as its whole path."""
    denoiser = load_denoiser("sudoku4", tasks.get("sudoku4"))
    total = "float(sum(p.double().sum() for p in d.model.parameters()))"
    code = f"import pickle, sys; d = pickle.load(sys.stdin.buffer); print(type(d).__name__, {total})"
    run = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(denoiser), capture_output=True, check=True)
    total = float(sum(p.double().sum() for p in denoiser.model.parameters()))
    assert run.stdout.decode().split() == ["FrozenDenoiser", str(total)]


@pytest.mark.slow
def test_in_processes_of_gymnasium_and_stable_baselines3(heldout: dict[str, Tensor]) -> None:
    """Started anew (``spawn``), as on macOS and Windows: the environments come through a pickle."""
    env = gym.make(ENV, split="test")
    envs = AsyncVectorEnv([lambda: env], context="spawn")
    obs, _ = envs.reset(options={"index": 3})
    assert obs["tokens"][0].tolist() == heldout["test"][3].tolist()
    envs.close()
    stable = SubprocVecEnv([lambda: env], start_method="spawn")
    stable.set_options({"index": 4})
    assert stable.reset()["tokens"][0].tolist() == heldout["test"][4].tolist()
    stable.close()
