"""The TorchRL interface: N boards as one batched, device-resident ``EnvBase``, and the KL as a reward transform."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from pretrain.checkpoint import checked_device
from tasks import Instances, UnmaskError
from tasks.errors import optional
from tasks.settings import AtLeast1, check
from unmask_env.distributions import regularised_reward
from unmask_env.encoding import (
    Arrays,
    action_space,
    log_reference_of,
    observation_space,
    read_actions,
    require_possible,
    shown_symbols,
    to_action,
)
from unmask_env.state import Denoised, Observation, State
from unmask_env.streams import Seen, Streams, read_options, read_seeds, whole

with optional("the interface of TorchRL", "unmask[torchrl]"):
    from tensordict import TensorDict, TensorDictBase
    from torchrl.data import Binary, Bounded, Categorical, Composite, TensorSpec, Unbounded
    from torchrl.envs import EnvBase
    from torchrl.envs.transforms import Transform

READ = ("tokens", "top_symbols", "top_log_probs", "entropy", "state")  # what a step reads beside the action
OF_ROWS, OF_POSITIONS = ("steps", "done", "truncated"), ("remask_count", "fill_prob")  # fields of State in "state"


def _spec(space: spaces.Space, n: int, device: torch.device) -> TensorSpec:
    """Of N boards, for the space of one."""
    shape = (n, *space.shape)
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n), shape=shape, device=device)
    if isinstance(space, spaces.MultiBinary):
        return Binary(shape[-1], shape=shape, dtype=torch.bool, device=device)
    if space.dtype == np.int64:
        return Categorical(int(space.high.max()) + 1, shape=shape, device=device)
    if np.isinf(space.high).any():
        return Unbounded(shape=shape, device=device)
    return Bounded(float(space.low.min()), float(space.high.max()), shape=shape, device=device)


class UnmaskTorchEnv(EnvBase):
    """N boards of :class:`unmask_env.gym_env.UnmaskEnv`, ``batch_size=[N]``; tensors stay on ``device``.

    Keys: ``action`` (N,) int64 positions or (N, A) bool sets; observations as in the Gymnasium interface, with bool
    flags; ``reward``, ``done``, ``terminated``, ``truncated`` (N, 1).

    The state of play is in the tensordict, so a rollout can be forked: put rows of an earlier tensordict, in any
    arrangement, into ``reset(td, set_state=True)``. It lies under ``state``, for the environment and not for policies:
    ``("state", "given")`` and ``("state", "answers")``, the instance, and what the episode remembers. Sampled filling
    draws at the step, from the row's own stream, so a fork draws fresh symbols.

    ``reset(options={"index": [...]})`` and ``options={"instances": ...}`` are those of the vector environment.

    A step makes one denoiser forward, even where rows finish: their next boards ride in it and wait for the reset.

    Args:
        env_id: a registered id, or give ``task`` and ``denoiser``.
        num_envs: N.
        group: rows come in groups of this many that draw the same instances, for group-relative advantages.
        seed: row i draws the instances of a single environment seeded with ``seed + i`` (its group's first row's).
        The others are those of the Gymnasium interface.

    Raises:
        UnmaskError: sizes or settings that do not fit.
    """

    batch_locked = True
    _supports_set_state = True

    def __init__(
        self,
        env_id: str | None = None,
        num_envs: int = 1,
        group: int = 1,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        num_envs, group = whole(num_envs), whole(group)
        check("num_envs", num_envs, AtLeast1)
        if not isinstance(group, int) or group < 1 or num_envs % group:
            raise UnmaskError(f"num_envs must be a multiple of group; {num_envs} is not one of {group}")
        self.streams = Streams(num_envs, env_id=env_id, **options)
        self.process, self.task, self.group = self.streams.process, self.streams.task, group
        super().__init__(device=self.process.device, batch_size=[num_envs])
        self._waiting: tuple[Tensor, State, Seen] | None = None  # rows that finished, and how they begin anew
        self._make_specs(num_envs)
        self.set_seed(seed if seed is not None else int(torch.empty((), dtype=torch.long).random_(2**31)))

    def _make_specs(self, n: int) -> None:
        where = {"shape": (n,), "device": self.process.device}
        shown = observation_space(self.process, self.streams.extras)
        specs = {key: _spec(space, n, self.process.device) for key, space in shown.items()}
        memory = {
            key: Unbounded(value.shape, dtype=value.dtype, device=value.device)
            for key, value in self._memory(self.streams.empty()).items()
        }
        end = Categorical(2, shape=(n, 1), dtype=torch.bool, device=self.process.device)
        self.observation_spec = Composite(**specs, state=Composite(**memory, **where), **where)
        self.state_spec = Composite(**{key: self.observation_spec[key].clone() for key in READ}, **where)
        self.action_spec = _spec(action_space(self.process), n, self.process.device)
        self.reward_spec = Unbounded(shape=(n, 1), device=self.process.device)
        ends = {key: end.clone() for key in ("done", "terminated", "truncated")}
        self.full_done_spec = Composite(**ends, **where)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.streams.seed(read_seeds(seed, self.streams.n), share=self.group)
            self._waiting = None

    # ------------------------------------------------------------------ play
    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        set_state: bool = False,
        options: dict[str, Any] | None = None,
        **_: Any,
    ) -> TensorDict:
        given = read_options(options, ("index", "instances"))
        if set_state and tensordict is not None:
            if given:
                raise UnmaskError("reset takes set_state or options, not both; a fork plays the instance that it has")
            return self._fork(tensordict)
        n = self.streams.n
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        chosen = torch.ones(n, dtype=torch.bool) if chosen is None else chosen.view(n).cpu()
        waiting, state, seen = self._waiting or (torch.zeros(n, dtype=torch.bool), self.streams.empty(), None)
        missing = (chosen & ~waiting).nonzero().flatten().tolist()
        instances = self.streams.chosen(given, int(chosen.sum()))
        if instances is not None:  # what was drawn for those that wait is not played
            missing = chosen.nonzero().flatten().tolist()
            self.streams.put_back((chosen & waiting).nonzero().flatten().tolist())
        if missing:
            state = self.streams.begin(state, missing, instances)
            seen = self.streams.observe(state)
        self._waiting = (waiting & ~chosen, state, seen) if bool((waiting & ~chosen).any()) else None
        return self._pack(state, seen.arrays)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        state = self._state(tensordict)
        action = to_action(read_actions(tensordict.get("action"), self.process, self.streams.n), self.process)
        state, reward = self.streams.step(state, self._observation(tensordict, state), action)
        if bool(state.done.any()):
            if self._waiting is not None:  # never claimed: those rows were not reset
                self.streams.put_back(self._waiting[0].nonzero().flatten().tolist())
            following, seen, rows, last = self.streams.autoreset(state)
            self._waiting = (state.done.cpu(), following, seen)
            arrays = {key: value.index_copy(0, rows, last[key]) for key, value in seen.arrays.items()}
        else:
            arrays = self.streams.observe(state).arrays
        out = self._pack(state, arrays)
        ends = {"done": state.done, "terminated": state.terminated, "truncated": state.truncated, "reward": reward}
        for key, value in ends.items():
            out[key] = value.unsqueeze(1)
        return out

    def _fork(self, tensordict: TensorDictBase) -> TensorDict:
        needed = {"tokens", *(("state", key) for key, _ in self.observation_spec["state"].items())}
        if not needed <= set(tensordict.keys(True)):
            raise UnmaskError("set_state needs tokens and state, whole, of an earlier tensordict")
        state = self._state(tensordict)
        if not bool(state.masked.any(1).all()):
            raise UnmaskError("set_state needs a masked position in every row; a complete board has nothing to play")
        return self._pack(state, self.streams.observe(state).arrays)

    def to(self, device: torch.device | str) -> UnmaskTorchEnv:
        """Itself, if it is on ``device``; the denoiser stays where it was loaded, so elsewhere is refused."""
        if torch.empty(0, device=checked_device(device)).device != torch.empty(0, device=self.process.device).device:
            raise UnmaskError(
                f"this environment is on {self.process.device}; make another one with device={str(device)!r}"
            )
        return self

    # ------------------------------------------------------------------ the state in the tensordict
    def _state(self, tensordict: TensorDictBase) -> State:
        tokens, memory = tensordict["tokens"], tensordict.get("state", None)
        if memory is None:
            raise UnmaskError(
                "the tensordict has lost its instances: go on from what reset and step returned. SerialEnv and "
                "ParallelEnv drop them; this environment is a batch already, so raise num_envs, or use a MultiCollector"
            )
        # Of the forward before this one nobody asks the entropy.
        symbols, log_probs = memory["previous_symbols"], memory["previous_log_probs"]
        previous = Denoised.shown(self.task.vocab_size, symbols, log_probs, torch.zeros_like(log_probs[..., 0]))
        return State(
            tokens,
            tokens == self.task.mask_id,
            Instances(memory["given"], memory["answers"]),
            **{name: memory[name].squeeze(1) for name in OF_ROWS},
            **{name: memory[name] for name in OF_POSITIONS},
            illegal=torch.zeros_like(memory["done"]).squeeze(1),
            previous=previous,
        )

    def _observation(self, tensordict: TensorDictBase, state: State) -> Observation:
        """What the process needs of the forward that the tensordict shows, whatever its flags were made to say."""
        parts = [tensordict[key] for key in ("top_symbols", "top_log_probs", "entropy")]
        fillable, remaskable = self.process.permitted(state)
        return Observation(
            state.tokens, state.masked, fillable, Denoised.shown(self.task.vocab_size, *parts), remaskable
        )

    def _memory(self, state: State) -> Arrays:
        """What lies under ``state`` in the tensordict."""
        if state.previous is None:
            log_probs = torch.zeros(
                *state.tokens.shape, shown_symbols(self.task.vocab_size), device=self.process.device
            )
            symbols = log_probs.long()
        else:
            symbols, log_probs = state.previous.top_symbols, state.previous.top_log_probs
        return {
            "given": state.instances.tokens,
            "answers": state.instances.answers,
            **{name: getattr(state, name).unsqueeze(1) for name in OF_ROWS},
            **{name: getattr(state, name) for name in OF_POSITIONS},
            "previous_symbols": symbols,
            "previous_log_probs": log_probs,
        }

    def _pack(self, state: State, arrays: Arrays) -> TensorDict:
        where = {"batch_size": self.batch_size, "device": self.device}
        return TensorDict(arrays | {"state": TensorDict(self._memory(state), **where)}, **where)


class KLReward(Transform):
    """Rewards become r - beta * (log pi(a|s) - log g(a|s)): a learner that maximises their sum maximises J(pi).

    ``TransformedEnv(UnmaskTorchEnv(...), KLReward(0.01))``, with a policy that writes its log-probability
    (``ProbabilisticActor(..., return_log_prob=True)``).

    Raises:
        UnmaskError: a beta below 0; in a step, a policy that writes no log-probability, or an action to which the
            reference gives probability 0.
    """

    def __init__(self, beta: float, log_prob_key: str = "action_log_prob") -> None:
        if not beta >= 0:
            raise UnmaskError(f"beta must be at least 0, not {beta}")
        super().__init__()
        self.beta, self.log_prob_key = beta, log_prob_key

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        log_prob = tensordict.get(self.log_prob_key, None)
        if log_prob is None:
            raise UnmaskError(
                f"KLReward needs the policy's log-probability under {self.log_prob_key!r}; build the policy as "
                "ProbabilisticActor(..., return_log_prob=True)"
            )
        if log_prob.shape != tensordict.batch_size:
            raise UnmaskError(
                f"{self.log_prob_key} must be of shape {tuple(tensordict.batch_size)}, not {tuple(log_prob.shape)}"
            )
        log_reference = log_reference_of(tensordict["log_reference"], tensordict["action"]).unsqueeze(-1)
        idle = tensordict["state", "done"]  # boards that ended and were not reset
        require_possible(log_reference.masked_fill(idle, 0.0))
        reward = next_tensordict["reward"]
        regularised = regularised_reward(reward, log_prob.unsqueeze(-1), log_reference, self.beta)
        return next_tensordict.set("reward", torch.where(idle, reward, regularised))
