"""An order policy as stable-baselines3 sees it: the same distribution, legal actions, its own settings."""

import numpy as np
import pytest
import torch

from agents import sb3_ppo
from agents.critic import Critic
from agents.policy import OrderPolicy
from agents.sb3_ppo import SB3PPOConfig
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import observation as observation_of
from tests.toys import random_critic, random_order
from unmask_env.denoiser import TableDenoiser
from unmask_env.sb3_env import SB3VecEnv
from unmask_env.state import Observation
from unmask_env.vector_env import UnmaskVectorEnv

TASK = TableTask(random_joint(3, 4, seed=0), clues=(1,))
DENOISER = TableDenoiser(TASK.joint)


def playing(order: OrderPolicy, critic: Critic, **settings: object):
    """The model and its environment of 16 boards, in mid-play."""
    vec = SB3VecEnv(UnmaskVectorEnv(16, task=TASK, denoiser=DENOISER))
    model = sb3_ppo.make_model(SB3PPOConfig(out="", lr=1e-3, **settings), vec, order, critic, steps=3)
    vec.seed(0)
    vec.reset()
    actions = np.array([0, 2, 3] * 5 + [0])
    shown, *_ = vec.step(actions)
    return model, vec, shown


def full(shown: dict[str, np.ndarray]) -> Observation:
    """What an order would see in a rollout, without the environment between them."""
    tokens = torch.from_numpy(shown["tokens"]).long()
    return observation_of(tokens, tokens == TASK.mask_id, DENOISER(tokens))


@pytest.mark.parametrize("candidates", [None, 1])
@torch.no_grad()
def test_the_distribution_is_the_orders(candidates: int | None) -> None:
    order, critic = random_order(TASK, candidates), random_critic(TASK)
    model, vec, shown = playing(order, critic)
    seen = full(shown)
    unsure = order.uncertain(seen)
    assert unsure.any()
    assert not unsure.all()
    expected = order(seen).log_probs
    masks = np.stack(vec.env_method("action_masks"))
    tensors, _ = model.policy.obs_to_tensor(shown)
    given = model.policy.get_distribution(tensors, action_masks=masks).distribution.probs
    torch.testing.assert_close(given, expected.exp(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.policy.predict_values(tensors).squeeze(1), critic(seen), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sampled_and_evaluated_actions_have_the_orders_log_probability() -> None:
    order, critic = random_order(TASK), random_critic(TASK)
    model, vec, shown = playing(order, critic)
    seen, masks = full(shown), np.stack(vec.env_method("action_masks"))
    tensors, _ = model.policy.obs_to_tensor(shown)
    actions, values, log_prob = model.policy(tensors, action_masks=masks)
    expected = order(seen).log_probs.gather(1, actions.view(-1, 1)).squeeze(1)
    torch.testing.assert_close(log_prob, expected, atol=1e-4, rtol=1e-4)
    again, evaluated, _ = model.policy.evaluate_actions(tensors, actions, action_masks=torch.from_numpy(masks))
    torch.testing.assert_close(evaluated, log_prob)
    torch.testing.assert_close(again, values)
    torch.testing.assert_close(values.squeeze(1), critic(seen), atol=1e-4, rtol=1e-4)


def test_actions_are_legal() -> None:
    order = random_order(TASK)
    model, vec, shown = playing(order, random_critic(TASK))
    with torch.no_grad():
        likely = order(full(shown)).log_probs.argmax(1)
    masks = np.stack(vec.env_method("action_masks"))
    best, _ = model.predict(shown, action_masks=masks, deterministic=True)
    assert best.tolist() == likely.tolist()
    drawn = np.stack([model.predict(shown, action_masks=masks)[0] for _ in range(40)])
    assert np.take_along_axis(masks, drawn.T, 1).all()
    assert (drawn != best).any(), "they are drawn"


def test_the_model_has_the_settings() -> None:
    """J has no discount; matrices alone decay; the policy's parameters are the order's and the critic's."""
    order, critic = random_order(TASK), random_critic(TASK)
    settings = {
        "minibatches": 4, "epochs": 3, "gae_lambda": 0.8, "clip": 0.3, "normalise": True, "critic_weight": 0.7,
        "grad_clip": 2.0, "weight_decay": 0.05, "beta": 0.2,
    }  # fmt: skip
    model, *_ = playing(order, critic, **settings)
    assert (model.n_steps, model.batch_size, model.n_epochs, model.gamma, model.gae_lambda) == (3, 12, 3, 1.0, 0.8)
    assert (model.clip_range(1), model.normalize_advantage, model.vf_coef, model.max_grad_norm) == (0.3, True, 0.7, 2.0)
    assert (model.ent_coef, model.target_kl, model.rollout_buffer.beta) == (0.0, None, 0.2)
    decays, stays = model.policy.optimizer.param_groups
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.05, 0.0)
    assert {p.ndim >= 2 for p in decays["params"]} == {True}
    ours = {id(p) for p in [*order.parameters(), *critic.parameters()]}
    theirs = [id(p) for group in model.policy.optimizer.param_groups for p in group["params"]]
    assert set(theirs) == ours
    assert len(theirs) == len(ours)
