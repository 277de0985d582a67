"""Boards that Ray's workers play, on this machine or a cluster, through TorchRL's own collector (the extra ``ray``).

collector = ray_collector(policy, workers=4, num_envs=64, steps=36, task="sudoku6", denoiser="sudoku6")
for data in collector:  # TensorDict of (workers, num_envs, steps)
    ...  # a loss step on ``policy``
    collector.update_policy_weights_()

For loops of one's own, as in docs/examples.md; ``unmask train`` plays in its own processes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from agents.policy import OrderPolicy
from agents.torchrl_ppo import make_actor, observation_keys
from tasks import UnmaskError
from tasks.errors import optional
from tasks.settings import AtLeast1, Seed, check
from unmask_env.torchrl_env import KLReward, UnmaskTorchEnv

with optional("workers of Ray", "unmask[ray]"):
    from torchrl.collectors.distributed import RayCollector
    from torchrl.envs import TransformedEnv

FOREVER = 2**62  # frames; of -1 the collector makes none


def make_env(seed: int, beta: float, **environment: Any) -> UnmaskTorchEnv | TransformedEnv:
    """The boards of one worker, who loads its denoiser itself; also seeds the worker's own stream, which samples its
    actions."""
    torch.manual_seed(seed)
    env = UnmaskTorchEnv(seed=seed, **environment)
    return TransformedEnv(env, KLReward(beta)) if beta > 0 else env


def ray_collector(
    policy: OrderPolicy,
    workers: int,
    num_envs: int,
    steps: int,
    seed: int = 0,
    beta: float = 0.0,
    **environment: Any,
) -> RayCollector:
    """A collector whose batches all ``workers`` fill with the same weights, those that ``policy`` had when they were
    last sent by ``update_policy_weights_()``; here they are sent once. ``shutdown()`` ends the workers.

    Args:
        num_envs: boards of each worker. steps: of each board per batch; every batch begins with new boards.
        seed: worker w's boards have the seeds from ``seed + w * num_envs`` on.
        beta: weight of the KL in the reward; 0 leaves it out.
        environment: further arguments of :class:`UnmaskTorchEnv`; ``denoiser`` by name, as each worker loads it.

    Raises:
        UnmaskError: no ``ray``, a denoiser that is an object, or counts below 1.
    """
    with optional("workers of Ray", "unmask[ray]"):
        import ray
    for name, number in {"workers": workers, "num_envs": num_envs, "steps": steps}.items():
        check(name, number, AtLeast1)
    check("seed", seed, Seed)
    if not isinstance(environment.get("denoiser", ""), str):
        raise UnmaskError("workers load the denoiser themselves; give its packaged name, folder or hub id")
    environment["num_envs"] = num_envs
    keys = observation_keys(UnmaskTorchEnv(seed=seed, **environment))
    started = ray.is_initialized()  # a cluster that the caller has connected to
    here = {"num_cpus": workers + 2, "include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    collector = RayCollector(
        [partial(make_env, seed + worker * num_envs, beta, **environment) for worker in range(workers)],
        make_actor(policy, keys),
        frames_per_batch=workers * num_envs * steps,
        total_frames=FOREVER,
        sync=True,
        reset_at_each_iter=True,
        ray_init_config=None if started else here,
        remote_configs={"num_cpus": 1, "num_gpus": 0},
        collector_kwargs={"auto_register_policy_transforms": False, "track_traj_ids": False},
    )
    collector.update_policy_weights_()
    return collector
