"""Random streams of rows, what they remember, and what masks, rewards and references of boards that go on rest on."""

import numpy as np
import pytest
import torch

from tasks import Instances, Task
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import FavouriteDenoiser
from unmask_env.denoiser import TableDenoiser
from unmask_env.encoding import LOG_ZERO
from unmask_env.gym_env import UnmaskEnv
from unmask_env.process import Unmasking
from unmask_env.reference import reference
from unmask_env.sb3_env import SB3VecEnv
from unmask_env.state import Rules
from unmask_env.torchrl_env import KLReward, UnmaskTorchEnv
from unmask_env.vector_env import UnmaskVectorEnv

TASK = TableTask(random_joint(3, 4, seed=7), clues=(1,))  # 4 positions, 3 symbols; position 1 is a clue


def options(**more) -> dict:
    return {"task": TASK, "denoiser": TableDenoiser(TASK.joint, TASK)} | more


def bits(*chosen: int, entries: int = 8) -> np.ndarray:
    return np.isin(np.arange(entries), chosen).astype(np.int8)


# ---------------------------------------------------------------------- two streams per row
class Dice(Task):
    """Four dice, all to be guessed: every face is as likely as the others, and drawn as filling draws its symbols."""

    name, symbols, shape = "dice", tuple("123456"), (1, 4)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        answers = (torch.rand(n, 4, generator=generator) * 6).long()
        return Instances(torch.full_like(answers, self.mask_id), answers)

    def reward(self, tokens: torch.Tensor, instances: Instances) -> torch.Tensor:
        return (tokens == instances.answers).float().mean(1)


def test_the_filling_draws_from_another_stream_than_the_instances() -> None:
    """Seeded alike, the first symbols would be the first answers."""
    dice = FavouriteDenoiser(torch.zeros(300, 4, dtype=torch.long), torch.full((300, 4), 1 / 6).log(), vocab_size=6)
    envs = UnmaskVectorEnv(300, task=Dice(), denoiser=dice, actions="set", temperature=1.0)
    envs.reset(seed=0)
    _, reward, terminated, _, _ = envs.step(np.ones((300, 4), dtype=np.int8))
    assert terminated.all()
    assert abs(reward.mean() - 1 / 6) < 5 * (5 / 36 / 1200) ** 0.5


def test_instances_are_the_same_whatever_the_filling_draws() -> None:
    """Twenty episodes: more than are drawn at a time."""
    answers = []
    for temperature in (0.0, 1.0):
        envs = UnmaskVectorEnv(2, **options(temperature=temperature))
        envs.reset(seed=3)
        answers.append([])
        for _ in range(20):
            answers[-1].append(envs.state.instances.answers)
            for position in (0, 2, 3):
                envs.step(np.full(2, position))
    assert torch.equal(torch.stack(answers[0]), torch.stack(answers[1]))


# ---------------------------------------------------------------------- remasking within a budget
def test_masks_offer_no_remasking_that_the_budget_forbids() -> None:
    """A budget of 2 counts all positions together, also those that were masked again once each."""
    rules = {"actions": "set+remask", "remask_budget": 2}
    env, rl = UnmaskEnv(**options(**rules)), UnmaskTorchEnv(num_envs=1, seed=0, **options(**rules))
    obs, _ = env.reset(seed=0)
    td = rl.reset()
    for action, remaskable in (
        (bits(0), [1, 0, 0, 0]),
        (bits(2, 4), [0, 0, 1, 0]),  # fills 2, masks 0 again
        (bits(0, 6), [0, 0, 0, 0]),  # fills 0, masks 2 again: the budget is spent
    ):
        obs, *_, info = env.step(action)
        td = rl.step(td.set("action", torch.from_numpy(action).bool()[None]))["next"]
        assert not info["illegal"]
        for shown in (obs, {key: td[key][0].numpy() for key in obs}):
            assert shown["remaskable"].tolist() == shown["action_mask"][4:].tolist() == remaskable
    assert obs["remask_count"].tolist() == [1, 0, 1, 0]
    assert obs["masked"].tolist() == [0, 0, 1, 1]
    assert env.step(bits(4))[-1]["illegal"]


# ---------------------------------------------------------------------- references that look back
LOOKING_BACK = [
    ("kl_stability:theta=0.01,epsilon=0.03", "set"),
    ("schedule:steps=3", "set"),
    ("remdm:strategy=conf", "set+remask"),
    ("self_planning", "set+remask"),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("name", "actions"), LOOKING_BACK)
def test_references_look_back_on_every_interface(name: str, actions: str, temperature: float) -> None:
    """They show what the process itself, played by hand on the same boards, gives them to look back at."""
    n, rules = 8, {"actions": actions, "temperature": temperature, "reference": name}
    alone = [UnmaskEnv(**options(**rules)) for _ in range(n)]
    envs, stable = UnmaskVectorEnv(n, **options(**rules)), SB3VecEnv(UnmaskVectorEnv(n, **options(**rules)))
    rl = UnmaskTorchEnv(num_envs=n, seed=2, **options(**rules))
    process, policy = Unmasking(TASK, TableDenoiser(TASK.joint, TASK), Rules(actions), temperature), reference(name)

    stable.seed(2)
    many, theirs, td = envs.reset(seed=2)[0], stable.reset(), rl.reset()
    single = [env.reset(seed=2 + i)[0] for i, env in enumerate(alone)]
    state = process.reset(envs.state.instances)
    fillings = [env.streams._fillings[0].clone_state() for env in alone]
    seen = process.observe(state)
    for position in (2, 0, None):
        expected = policy(seen).entry_log_probs().clamp(min=LOG_ZERO)
        stacked = {key: np.stack([obs[key] for obs in single]) for key in ("tokens", "log_reference")}
        for shown in (many, theirs, stacked, td, rl.reset(td, set_state=True)):  # the last is a fork
            np.testing.assert_array_equal(shown["tokens"], state.tokens)
            np.testing.assert_allclose(shown["log_reference"], expected, atol=1e-4)
        if position is None:
            break
        action = np.stack([bits(position, entries=process.entries)] * n)
        many, theirs = envs.step(action)[0], stable.step(action)[0]
        td = rl.step(td.set("action", torch.from_numpy(action).bool()))["next"]
        single = [env.step(action[i])[0] for i, env in enumerate(alone)]
        uniform = torch.stack([torch.rand(4, generator=filling) for filling in fillings])
        state, _ = process.step(state, seen, torch.from_numpy(action).bool(), uniform)
        seen = process.observe(state)


# ---------------------------------------------------------------------- boards that ended and were not reset
def test_truncated_boards_stay_truncated_and_cost_no_divergence() -> None:
    """TorchRL lets a loop play on; a board that was cut off shows positions to fill, but idles."""
    from torchrl.envs import TransformedEnv

    env = TransformedEnv(UnmaskTorchEnv(num_envs=2, seed=0, nfe_budget=2, **options()), KLReward(0.3))
    td, rewards = env.reset(), []
    for position in (0, 2, 3, 3):
        td = td.exclude("reward").set("action", torch.full((2,), position))
        td = env.step(td.set("action_log_prob", torch.full((2,), -3.0)))["next"]
        rewards.append(td["reward"].abs().min().item())
        assert bool(td["truncated"].all()) == bool(td["done"].all()) == (len(rewards) >= 2)
        assert not td["terminated"].any()
    assert td["masked"].tolist() == [[False, False, False, True]] * 2
    assert td["action_mask"].tolist() == td["masked"].tolist()
    assert td["state", "steps"].flatten().tolist() == [2, 2]
    assert rewards[0] > 0
    assert rewards[1] > 0
    assert rewards[2:] == [0.0, 0.0]
