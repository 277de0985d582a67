"""An order policy as TorchRL sees it, and group-relative advantages by hand."""

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from agents.torchrl_ppo import group_relative, make_actor, observation_keys, summary
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import observation as observation_of
from tests.toys import random_order
from unmask_env.denoiser import TableDenoiser
from unmask_env.state import Observation
from unmask_env.torchrl_env import UnmaskTorchEnv

TASK = TableTask(random_joint(3, 4, seed=0), clues=(1,))
DENOISER = TableDenoiser(TASK.joint)
ENV = UnmaskTorchEnv(num_envs=16, task=TASK, denoiser=DENOISER, seed=0)
SHOWN = observation_keys(ENV)


def full(tokens: Tensor) -> Observation:
    return observation_of(tokens, tokens == TASK.mask_id, DENOISER(tokens))


def mid_play() -> TensorDict:
    """Sixteen boards after one action."""
    ENV.set_seed(0)
    td = ENV.reset()
    td["action"] = torch.tensor([0, 2, 3] * 5 + [0])
    return ENV.step(td)["next"]


# ---------------------------------------------------------------------- the policy
@pytest.mark.parametrize("candidates", [None, 1])
@torch.no_grad()
def test_the_distribution_is_the_orders(candidates: int | None) -> None:
    order, shown = random_order(TASK, candidates), mid_play()
    actor, expected = make_actor(order, SHOWN), order(full(shown["tokens"])).log_probs
    unsure = order.uncertain(full(shown["tokens"]))
    assert unsure.any()
    assert not unsure.all()
    given = actor.get_dist(shown.select(*SHOWN)).probs
    torch.testing.assert_close(given, expected.exp(), atol=1e-5, rtol=1e-4)
    out = actor(shown.select(*SHOWN))
    at_action = expected.gather(1, out["action"].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(out["action_log_prob"], at_action, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_actions_are_legal() -> None:
    order, shown = random_order(TASK), mid_play()
    actor, seen = make_actor(order, SHOWN), full(shown["tokens"])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        best = actor(shown.clone())["action"]
    assert torch.equal(best, order(seen).log_probs.argmax(1))
    with set_exploration_type(ExplorationType.RANDOM):
        drawn = torch.stack([actor(shown.clone())["action"] for _ in range(40)])
    assert seen.fillable.gather(1, drawn.T).all()
    assert (drawn != best).any(), "they are drawn"


@torch.no_grad()
def test_leading_dimensions_are_kept() -> None:
    order, shown = random_order(TASK), mid_play().select(*SHOWN)
    actor = make_actor(order, SHOWN)
    flat, folded = actor.get_dist(shown), actor.get_dist(shown.reshape(2, 8))
    torch.testing.assert_close(folded.probs, flat.probs.view(2, 8, 4))


def test_a_finished_board_gives_no_nan() -> None:
    shown = mid_play().select(*SHOWN)
    shown["action_mask"][0] = False
    shown["tokens"][0] = 0
    actor = make_actor(random_order(TASK), SHOWN)
    out = actor(shown.clone())
    assert out["action_log_prob"].isfinite().all()
    out["action_log_prob"][1:].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in actor.parameters())


# ---------------------------------------------------------------------- advantages
YES, NO = True, False
REWARD = torch.tensor([[1.0, 2, 4, 8], [3, 1, 0, 1], [0, 0, 5, 0], [0, 1, 0, 2]])
DONE = torch.tensor([[NO, YES, NO, NO], [NO, YES, NO, YES], [NO, NO, YES, NO], [NO, NO, NO, YES]])
TO_GO = torch.tensor([[3.0, 2, 12, 8], [4, 1, 1, 1], [5, 5, 5, 0], [3, 3, 2, 2]])
WHOLE = torch.tensor([[YES, YES, NO, NO], [YES] * 4, [YES, YES, YES, NO], [YES] * 4])  # the batch cuts the others off


def test_group_relative_advantages_by_hand() -> None:
    """In pairs, the other's reward still to come is the baseline."""
    before = REWARD.clone(), DONE.clone()
    advantage, counts = group_relative(REWARD, DONE, 2, normalise=False)
    torch.testing.assert_close(advantage, TO_GO - TO_GO[[1, 0, 3, 2]])
    assert torch.equal(counts, WHOLE)
    assert torch.equal(REWARD, before[0])
    assert torch.equal(DONE, before[1])


def test_the_baseline_is_the_mean_of_the_others() -> None:
    advantage, counts = group_relative(REWARD, DONE, 4, normalise=False)
    others = (TO_GO.sum(0) - TO_GO) / 3
    torch.testing.assert_close(advantage, TO_GO - others)
    assert torch.equal(counts, WHOLE)


def test_normalised_group_relative_advantages_by_hand() -> None:
    """Standard deviations (n - 1) of pairs: their difference over the square root of two."""
    advantage, _ = group_relative(REWARD, DONE, 2, normalise=True)
    difference = TO_GO - TO_GO[[1, 0, 3, 2]]
    torch.testing.assert_close(advantage, difference / (difference.abs() / 2**0.5 + 1e-4))
    same, _ = group_relative(torch.ones(2, 3), torch.tensor([[NO, NO, YES]] * 2), 2, normalise=True)
    assert not same.any(), "equal rewards teach nothing"


def test_a_summary_by_hand() -> None:
    """Two episodes; regularised rewards are the task's minus beta times the log-ratios .5, -.25, 1 and .75."""
    ratio = torch.tensor([[0.5, -0.25, 1.0, 0.75]])
    log_reference = torch.tensor([[-1.0, -2.0], [-2.0, -1.0], [-3.0, -0.5], [-0.25, -4.0]]).unsqueeze(0)
    action = torch.tensor([[0, 1, 0, 1]])
    reward = torch.tensor([[0.0, 1.0, 0.0, 0.25]]) - 0.1 * ratio
    data = TensorDict(
        {
            "action": action,
            "log_reference": log_reference,
            "action_log_prob": torch.tensor([[-1.0, -1.0, -3.0, -4.0]]) + ratio,
            "next": {"reward": reward.unsqueeze(-1), "done": torch.tensor([[NO, YES, NO, YES]]).unsqueeze(-1)},
        },
        batch_size=[1, 4],
    )
    assert summary(data, 0.1) == pytest.approx({"reward": 0.625, "divergence/trajectory_kl": 1.0})
