"""Ray's workers play with the weights that they were last sent."""

import pytest
import torch

from agents.ray_collector import ray_collector
from agents.torchrl_ppo import make_actor, observation_keys
from tasks import UnmaskError, get
from tests.toys import random_order
from unmask_env.torchrl_env import UnmaskTorchEnv

pytest.importorskip("ray", reason="the extra ray is not installed")

BOARDS = {"task": "sudoku4", "denoiser": "sudoku4"}


@torch.no_grad()
def test_changed_weights_reach_every_worker() -> None:
    policy = random_order(get("sudoku4"), defer_above=2.0)
    env = UnmaskTorchEnv(num_envs=4, **BOARDS)
    actor = make_actor(policy, observation_keys(env))
    collector = ray_collector(policy, workers=2, num_envs=4, steps=5, **BOARDS)
    try:
        batches, before = iter(collector), None
        for _ in range(3):
            data = next(batches)
            assert data.shape == (2, 4, 5)
            assert not torch.equal(data["tokens"][0], data["tokens"][1]), "workers play boards of their own"
            now = actor.log_prob(data)
            torch.testing.assert_close(data["action_log_prob"], now, atol=1e-4, rtol=1e-4)
            if before is not None:
                assert (before(data) - now).abs().flatten(1).amax(1).min() > 0.1, "each worker's weights have changed"
            old = random_order(get("sudoku4"), defer_above=2.0)
            old.load_state_dict(policy.state_dict())
            before = make_actor(old, observation_keys(env)).log_prob
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter))
            collector.update_policy_weights_()
    finally:
        collector.shutdown()


def test_what_does_not_fit_is_one_line() -> None:
    policy = random_order(get("sudoku4"))
    for changes, message in (
        ({"workers": 0}, "workers must be"),
        ({"denoiser": object()}, "workers load the denoiser themselves"),
    ):
        with pytest.raises(UnmaskError, match=message):
            ray_collector(policy, **{"workers": 1, "num_envs": 1, "steps": 1} | BOARDS | changes)
