"""The TorchRL face: N boards as one batched, device-resident ``EnvBase``, and the KL as a reward transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.transforms import Transform

from pretrain.backbone import Backbone
from tasks import Instances, Task, UnmaskError
from unmask_env.boards import FLOOR, LOG_ZERO, Boards, Look, View, log_reference_of, require_possible
from unmask_env.core import Rules, State, regularised_reward
from unmask_env.denoiser import Denoiser
from unmask_env.parallel import SetReference
from unmask_env.reference import Reference


class UnmaskTorchEnv(EnvBase):
    """N boards of :class:`unmask_env.gym_env.UnmaskEnv`, ``batch_size=[N]``; tensors stay on ``device``.

    Keys: ``action`` (N,) int64; observations ``tokens``, ``action_mask`` (bool), ``top_tokens``, ``top_log_probs``,
    ``log_reference`` as in the Gymnasium face; ``reward``, ``done``, ``terminated``, ``truncated`` (N, 1).

    The state of play is in the tensordict, so a rollout can be forked: put rows of an earlier tensordict, in any
    arrangement, into ``reset(td, set_state=True)``. Four keys are for the environment and not for policies: ``given``
    and ``answers`` (the instance), ``symbols`` (what each position would become; with sampled filling it is drawn ahead
    of the action) and ``steps``. ``reopened`` (N, L) is here whatever the rules, zeros where nothing is opened again.

    A step makes one denoiser forward, even where rows finish: their next boards ride in it and wait for the reset.

    Args:
        env_id: a registered id, or give ``task`` and ``denoiser``.
        num_envs: N.
        group: rows come in groups of this many that draw the same instances, for group-relative advantages.
        seed: row i draws the instances of a single environment seeded with ``seed + i`` (its group's first row's).
        The others are those of the Gymnasium face.

    Raises:
        UnmaskError: sizes or settings that do not fit.
    """

    batch_locked = True
    _supports_set_state = True

    def __init__(
        self,
        env_id: str | None = None,
        num_envs: int = 1,
        task: str | Task | None = None,
        denoiser: str | Path | Backbone | Denoiser | None = None,
        reference: str | Reference | SetReference | None = None,
        temperature: float = 0.0,
        group: int = 1,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        **rules: Any,
    ) -> None:
        if group < 1 or num_envs % group:
            raise UnmaskError(f"num_envs must be a multiple of group; {num_envs} is not one of {group}")
        self.boards = Boards(num_envs, env_id, task, denoiser, reference, Rules.of(rules), temperature, device)
        super().__init__(device=self.boards.device, batch_size=[num_envs])
        self.group, self.task = group, self.boards.task
        self._waiting: tuple[Tensor, State, Look] | None = None  # rows that finished, and how they begin anew
        n, length, vocab, top = num_envs, self.task.length, self.task.vocab_size, self.boards.top
        where, entries = {"device": self.boards.device}, self.boards.entries
        if self.boards.rules.actions == "single":
            self.action_spec = Categorical(length, shape=(n,), **where)
        else:
            self.action_spec = Binary(entries, shape=(n, entries), dtype=torch.bool, **where)
        self.reward_spec = Unbounded(shape=(n, 1), **where)
        flags = {
            key: Categorical(2, shape=(n, 1), dtype=torch.bool, **where) for key in ("done", "terminated", "truncated")
        }
        self.full_done_spec = Composite(**flags, shape=(n,), **where)
        self.observation_spec = Composite(
            tokens=Categorical(vocab + 1, shape=(n, length), **where),
            action_mask=Binary(entries, shape=(n, entries), dtype=torch.bool, **where),
            top_tokens=Categorical(vocab, shape=(n, length, top), **where),
            top_log_probs=Bounded(FLOOR, 0.0, shape=(n, length, top), **where),
            log_reference=Bounded(LOG_ZERO, 0.0, shape=(n, entries), **where),
            symbols=Categorical(vocab, shape=(n, length), **where),
            steps=Unbounded(shape=(n, 1), dtype=torch.long, **where),
            reopened=Unbounded(shape=(n, length), dtype=torch.long, **where),
            shape=(n,),
            **where,
        )
        self.state_spec = Composite(
            given=Categorical(vocab + 1, shape=(n, length), **where),
            answers=Categorical(vocab, shape=(n, length), **where),
            **{key: self.observation_spec[key].clone() for key in ("tokens", "symbols", "steps", "reopened")},
            shape=(n,),
            **where,
        )
        self.set_seed(seed if seed is not None else int(torch.empty((), dtype=torch.long).random_(2**31)))

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.boards.seed([seed + row for row in range(self.boards.n)], share=self.group)
            self._waiting = None

    # ------------------------------------------------------------------ play
    def _reset(self, tensordict: TensorDictBase | None = None, *, set_state: bool = False, **_: Any) -> TensorDict:
        if set_state and tensordict is not None:
            return self._fork(tensordict)
        n = self.boards.n
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        chosen = torch.ones(n, dtype=torch.bool) if chosen is None else chosen.view(n).cpu()
        if self._waiting is None:
            waiting, state, look = torch.zeros(n, dtype=torch.bool), self.boards.empty(), None
        else:
            waiting, state, look = self._waiting
        missing = (chosen & ~waiting).nonzero().flatten().tolist()
        if missing:
            state = self.boards.begin(state, missing)
            fresh = self.boards.look(state, missing)
            ready = waiting.to(self.boards.device).unsqueeze(1)
            look = fresh if look is None else Look(fresh.view, look.symbols.where(ready, fresh.symbols))
        self._waiting = (waiting & ~chosen, state, look) if bool((waiting & ~chosen).any()) else None
        return self._pack(state, look.view, look.symbols)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        before = self._state(tensordict)
        shown = Look({"top_log_probs": tensordict["top_log_probs"]}, tensordict["symbols"])
        transition = self.boards.step(before, shown, tensordict["action"])
        done = transition.terminated | transition.truncated
        if bool(done.any()):
            if self._waiting is not None:  # never claimed: those rows were played on without a reset
                self.boards.put_back(self._waiting[0].nonzero().flatten().tolist())
            following, look, rows, last = self.boards.go_on(transition)
            self._waiting = (done.cpu(), following, look)
            view: View = {key: value.index_copy(0, rows, last[key]) for key, value in look.view.items()}
            symbols = look.symbols.index_fill(0, rows, 0)
        else:
            look = self.boards.look(transition.state)
            view, symbols = look.view, look.symbols
        out = self._pack(transition.state, view, symbols)
        out["reward"] = transition.reward.unsqueeze(1)
        out["done"] = done.unsqueeze(1)
        out["terminated"], out["truncated"] = transition.terminated.unsqueeze(1), transition.truncated.unsqueeze(1)
        return out

    def _fork(self, tensordict: TensorDictBase) -> TensorDict:
        absent = [key for key in ("tokens", "answers") if key not in tensordict]
        if absent:
            raise UnmaskError(f"set_state needs tokens and answers in the tensordict; {' and '.join(absent)} missing")
        state = self._state(tensordict)
        if not bool(state.open.any(1).all()):
            raise UnmaskError("set_state needs an open position in every row; a complete board has nothing to play")
        look = self.boards.look(state)
        return self._pack(state, look.view, look.symbols)

    def to(self, device: torch.device | str) -> UnmaskTorchEnv:
        """Itself, if it is on ``device``; the denoiser stays where it was loaded, so elsewhere is refused."""
        if torch.device(device) != self.boards.device:
            raise UnmaskError(
                f"this environment is on {self.boards.device}; make another one with device={str(device)!r}"
            )
        return self

    def _state(self, tensordict: TensorDictBase) -> State:
        tokens = tensordict["tokens"]
        answers = tensordict.get("answers", None)
        if answers is None:
            raise UnmaskError(
                "the tensordict has lost its instances: go on from what reset and step returned. SerialEnv and "
                "ParallelEnv drop them; this environment is a batch already, so raise num_envs, or use a MultiCollector"
            )
        steps = tensordict.get("steps", tokens.new_zeros(len(tokens), 1)).squeeze(1)
        given, reopened = tensordict.get("given", tokens), tensordict.get("reopened", torch.zeros_like(tokens))
        if reopened.shape != tokens.shape:
            raise UnmaskError(
                f"reopened must count per position, as {tuple(tokens.shape)}, not {tuple(reopened.shape)}"
            )
        return State(tokens, tokens == self.task.mask_id, Instances(given, answers), steps, reopened)

    def _pack(self, state: State, view: View, symbols: Tensor) -> TensorDict:
        hidden = {
            "given": state.instances.tokens,
            "answers": state.instances.answers,
            "symbols": symbols,
            "steps": state.steps.unsqueeze(1),
            "reopened": state.reopened,
        }
        return TensorDict(view | hidden, batch_size=self.batch_size, device=self.device)


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
        log_reference = log_reference_of(tensordict["log_reference"], tensordict["action"]).unsqueeze(-1)
        idle = ~tensordict["action_mask"].any(-1, keepdim=True)  # boards that finished and were not reset
        require_possible(log_reference.masked_fill(idle, 0.0))
        reward = next_tensordict["reward"]
        regularised = regularised_reward(reward, log_prob.unsqueeze(-1), log_reference, self.beta)
        return next_tensordict.set("reward", torch.where(idle, reward, regularised))
