"""Observations as arrays, and actions as spaces know them: what all environment interfaces share.

The keys of the arrays are the fields of :class:`unmask_env.state.Observation`, and two that the interfaces add:
``action_mask`` (A,) and ``log_reference`` (A,), the log-probability that the reference policy has each entry in its
action. Shapes: N rows, L positions, K shown symbols, D hidden channels; A = L entries, or 2 L with remasking.
"""

from __future__ import annotations

from dataclasses import replace
from numbers import Number
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from tasks import UnmaskError
from tasks.errors import first_line
from unmask_env.distributions import Bernoulli, Categorical
from unmask_env.process import Unmasking
from unmask_env.state import FLOOR, SHOWN, WHOLE, Denoised, InvalidActionError, Observation, Rules, State

LOG_ZERO = -1e4  # shown where the reference's log-probability is -inf, or below it

Extra = Literal["hidden", "order_weights"]
Arrays = dict[str, Tensor]
DENOISED = ("top_symbols", "top_log_probs", "entropy", "hidden", "order_weights")  # what the denoiser says


# ---------------------------------------------------------------------- observations
def shown_symbols(vocab_size: int) -> int:
    """K."""
    return vocab_size if vocab_size <= WHOLE else SHOWN


def encode(seen: Observation, log_reference: Tensor, extras: tuple[Extra, ...] = ()) -> Arrays:
    """The arrays of N boards. ``extras``: which of the optional parts are among them."""
    arrays = {
        "tokens": seen.tokens,
        "masked": seen.masked,
        "action_mask": seen.action_mask,
        "top_symbols": seen.top_symbols,
        "top_log_probs": seen.top_log_probs.clamp(min=FLOOR, max=0.0),
        "entropy": seen.entropy,
        "log_reference": log_reference.clamp(min=LOG_ZERO),
    }
    if seen.remaskable is not None:
        arrays |= {"remaskable": seen.remaskable, "remask_count": seen.remask_count}
    for extra in extras:
        value = getattr(seen, extra)
        if value is None:
            raise UnmaskError(f"this denoiser gives no {extra}, so an environment cannot show them")
        arrays[extra] = value.float()
    return arrays


def encode_unseen(process: Unmasking, state: State, extras: tuple[Extra, ...] = ()) -> Arrays:
    """The arrays of boards on which the denoiser is not run: its parts are 0, the reference's -1e4."""
    vocab_size = process.task.vocab_size
    zeros = torch.zeros(*state.tokens.shape, shown_symbols(vocab_size), device=state.tokens.device)
    hidden = zeros.new_zeros(*state.tokens.shape, process.denoiser.hidden_dim or 0)
    denoised = Denoised(vocab_size, None, hidden, zeros[..., 0], zeros.long(), zeros, zeros[..., 0])
    fillable, remaskable = process.permitted(replace(state, done=torch.zeros_like(state.done)))
    seen = Observation(state.tokens, state.masked, fillable, denoised, remaskable, state.remask_count)
    return encode(seen, torch.full(seen.action_mask.shape, LOG_ZERO, device=zeros.device), extras)


def decode(arrays: Arrays, vocab_size: int) -> Observation:
    """The observation that ``arrays`` hold, for policies; exact up to the floor of log-probabilities.

    Whole numbers and flags may be floats, as stable-baselines3 hands them on. It has no history.
    """
    tokens, mask = arrays["tokens"].long(), arrays["action_mask"].bool()
    length = tokens.shape[1]
    denoised = Denoised.shown(
        vocab_size,
        arrays["top_symbols"].long(),
        arrays["top_log_probs"].float(),
        arrays["entropy"].float(),
        arrays.get("hidden"),
        arrays.get("order_weights"),
    )
    remasks = mask.shape[1] > length
    return Observation(
        tokens,
        arrays["masked"].bool(),
        mask[:, :length],
        denoised,
        mask[:, length:] if remasks else None,
        arrays["remask_count"].long() if remasks else None,
    )


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy on the host: observations must not share memory with the state."""
    return tensor.numpy(force=True).copy()


def as_numpy(arrays: Arrays) -> dict[str, np.ndarray]:
    """Arrays of their own, which the caller may write to; flags are int8, as Gymnasium's ``MultiBinary`` is."""
    shown = {key: value.numpy(force=True) for key, value in arrays.items()}
    return {key: value.astype(np.int8) if value.dtype == bool else value.copy() for key, value in shown.items()}


def observation_space(process: Unmasking, extras: tuple[Extra, ...] = ()) -> spaces.Dict:
    """Of one board."""
    length, vocab_size, entries = process.task.length, process.task.vocab_size, process.entries
    k = shown_symbols(vocab_size)
    shown: dict[str, spaces.Space] = {
        "tokens": spaces.Box(0, vocab_size, (length,), np.int64),
        "masked": spaces.MultiBinary(length),
        "action_mask": spaces.MultiBinary(entries),
        "top_symbols": spaces.Box(0, vocab_size - 1, (length, k), np.int64),
        "top_log_probs": spaces.Box(FLOOR, 0.0, (length, k), np.float32),
        "entropy": spaces.Box(0.0, float(np.log(vocab_size)) + 1e-3, (length,), np.float32),
        "log_reference": spaces.Box(LOG_ZERO, 0.0, (entries,), np.float32),
    }
    if process.rules.actions == "set+remask":
        shown["remaskable"] = spaces.MultiBinary(length)
        shown["remask_count"] = spaces.Box(0, process.horizon, (length,), np.int64)
    if "hidden" in extras:
        shown["hidden"] = spaces.Box(-np.inf, np.inf, (length, process.denoiser.hidden_dim or 0), np.float32)
    if "order_weights" in extras:
        shown["order_weights"] = spaces.Box(0.0, np.inf, (length,), np.float32)
    return spaces.Dict(shown)


# ---------------------------------------------------------------------- actions
def action_space(process: Unmasking) -> spaces.Discrete | spaces.MultiBinary:
    """Of one board: the position to fill, or a bit for each entry of a set."""
    if process.rules.actions == "single":
        return spaces.Discrete(process.task.length)
    return spaces.MultiBinary(process.entries)


def read_actions(given: Any, process: Unmasking, n: int) -> Tensor:
    """What an interface was given as the actions of N boards, on the process's device: (N,) positions, whole numbers of
    any kind, or (N, A) sets of such or of bools; int64, a copy.

    Raises:
        InvalidActionError: another shape, or anything else: floats, strings, None, bools as positions.
    """
    single = process.rules.actions == "single"
    shape = (n,) if single else (n, process.entries)
    expected = f"{n} integers" if single else f"sets of shape {shape}"
    if not isinstance(given, Tensor):
        try:
            given = np.asarray(_numbers(given))
        except Exception as reason:  # ragged lists, tensors of another device, what others' arrays raise
            raise InvalidActionError(f"actions must be {expected}: {first_line(reason)}") from None
        if given.dtype.kind in "iu":
            given = torch.from_numpy(given.astype(np.int64))
        elif given.dtype.kind == "b":
            given = torch.from_numpy(given.copy())
    whole = isinstance(given, Tensor) and not given.is_floating_point() and not given.is_complex()
    if not whole or given.shape != shape or (single and given.dtype == torch.bool):
        raise InvalidActionError(f"actions must be {expected}, not {given.dtype} of shape {tuple(given.shape)}")
    return given.to(process.device, torch.int64, copy=True)


def _numbers(given: Any) -> Any:
    """``given``, which is made of what numpy reads as it is. Raises :class:`TypeError` for all else: there are objects
    that numpy would take the entries of for ever."""
    if isinstance(given, list | tuple | range):
        return [_numbers(each) for each in given]
    if not (isinstance(given, Number | np.generic) or hasattr(type(given), "__array__")):
        raise TypeError(f"a {type(given).__name__} is none")
    return np.asarray(given)


def to_action(encoded: Tensor, process: Unmasking) -> Tensor:
    """(N, A) bool actions of what :func:`action_space` holds, in a batch: (N,) positions or (N, A) bits, int64.

    Raises:
        InvalidActionError: a position that is not on the board, or a bit that is neither 0 nor 1.
    """
    if process.rules.actions == "single":
        return _one_hot(encoded, process.entries)
    action = encoded == 1
    if bool((action != (encoded != 0)).any()):
        raise InvalidActionError(f"sets hold 0 and 1, not {int(encoded[action != (encoded != 0)][0])}")
    return action


def _one_hot(positions: Tensor, length: int) -> Tensor:
    """(N, L) bool of positions (N,). Raises :class:`InvalidActionError` if one is out of range."""
    outside = (positions < 0) | (positions >= length)
    if bool(outside.any()):
        raise InvalidActionError(
            f"position {int(positions[outside][0])} is not on the board; positions are 0 to {length - 1}"
        )
    action = torch.zeros(len(positions), length, dtype=torch.bool, device=positions.device)
    return action.scatter_(1, positions.unsqueeze(1), True)


def for_sampling(action_mask: np.ndarray, rules: Rules) -> np.ndarray:
    """``action_mask`` as ``action_space.sample(mask=...)`` takes it: in sets, 2 lets an entry be in or out."""
    return action_mask.copy() if rules.actions == "single" else 2 * action_mask


def for_maskable_ppo(action_mask: np.ndarray, rules: Rules) -> np.ndarray:
    """(N, A) bool as sb3-contrib takes it: of sets (N, 2 A), per entry whether it may be out, and in."""
    if rules.actions == "single":
        return action_mask
    return np.stack([np.ones_like(action_mask), action_mask], -1).reshape(len(action_mask), -1)


def log_reference_of(log_reference: np.ndarray | Tensor, encoded: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """(N,) log g(action | s) from ``log_reference`` (N, A), of (N,) positions or (N, A) sets."""
    if isinstance(log_reference, np.ndarray):
        return log_reference_of(torch.from_numpy(log_reference), torch.as_tensor(encoded)).numpy()
    if encoded.ndim == 1:
        return Categorical(log_reference).log_prob(_one_hot(encoded.long(), log_reference.shape[1]))
    return Bernoulli(log_reference, log_reference > LOG_ZERO).log_prob(encoded.bool())


def require_possible(log_reference: np.ndarray | Tensor) -> None:
    """Raises :class:`tasks.UnmaskError` where an action has log g(a|s) = -inf: the KL would be infinite."""
    if bool((log_reference <= LOG_ZERO).any()):
        raise UnmaskError(
            "an action has probability 0 under the reference (a filled position, or one that it excludes), so the KL "
            "is infinite; mask the policy's actions, and take a reference that allows every masked position"
        )
