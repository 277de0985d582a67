"""The canvas: block by block, uniform noise becomes text, as in DiffusionGemma.

A canvas is the block in play under actions ``accept``. All its free positions hold symbols from the first forward on,
noise at first. In every forward the denoiser proposes a symbol for each; the accepted positions take theirs, and the
others are noise again. So nothing is settled before the whole canvas is: after ``canvas_steps`` forwards, or where the
denoiser is stable and confident. Then it holds the denoiser's most likely symbols, and the next canvas begins. A canvas
that holds an end token ends the sequence: what is behind it becomes padding.

Noise enters in the order of ``transformers``' sampler: where a canvas begins before its first forward, elsewhere after
each. The same generator so gives the same tokens.

Shapes: N rows, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks import Task, UnmaskError
from unmask_env.denoiser import CanvasDenoiser, Denoiser
from unmask_env.state import Canvas, Observation, Rules, State


def check_canvas(task: Task, denoiser: Denoiser | CanvasDenoiser, rules: Rules, temperature: float) -> None:
    """Hold task, denoiser and rules to each other, where one of them has to do with canvases.

    Raises:
        UnmaskError: in one line.
    """
    has, name = hasattr(denoiser, "canvas_length"), type(denoiser).__name__
    if has != (rules.actions == "accept"):
        raise UnmaskError(
            f"the denoiser {name} fills canvases; play it with actions 'accept', not {rules.actions!r}"
            if has
            else f"actions 'accept' are for denoisers of canvases, such as DiffusionGemma; {name} fills masks"
        )
    if not has:
        return
    length, behind = denoiser.canvas_length, task.length - task.prompt_length
    if rules.block_length not in (None, length):
        raise UnmaskError(f"block_length is that of the denoiser's canvas, {length}, not {rules.block_length}")
    if behind % length:
        raise UnmaskError(
            f"task {task.name} has {behind} positions behind its prompt, which are no whole number of canvases of "
            f"{length}; choose another length of answers"
        )
    if temperature not in (0.0, 1.0):
        raise UnmaskError(f"with actions 'accept' the temperature must be 0 or 1, not {temperature:g}")


def begin(denoiser: CanvasDenoiser, n: int) -> Canvas:
    """The first canvas of N rows."""
    zeros = torch.zeros(n, dtype=torch.long, device=denoiser.device)
    return Canvas(zeros, zeros, denoiser.begin(n))


def followed(rules: Rules, state: State, seen: Observation) -> tuple[Canvas, Tensor]:
    """After one more forward: the canvas in play, begun anew where it ended, and (N,) bool where it did.

    It ends as ``StableAndConfidentStoppingCriteria`` of ``transformers`` says, or after ``canvas_steps`` forwards.
    """
    canvas, on, denoised = state.canvas, seen.fillable, seen.denoised
    steps, same = canvas.steps + 1, torch.zeros_like(state.done)
    if state.previous is not None:
        same = ((denoised.best == state.previous.best) | ~on).all(1) & (canvas.steps > 0)
    stable = torch.where(same, canvas.stable + 1, 0)
    ended = steps >= rules.canvas_steps
    if rules.stop_entropy is not None:
        entropy = (denoised.entropy * on).sum(1) / on.sum(1).clamp(min=1)
        ended = ended | ((stable >= rules.stop_stable) & (entropy < rules.stop_entropy))
    carried = denoised.carried
    if carried is not None:
        carried = carried.masked_fill(ended.view(-1, *[1] * (carried.ndim - 1)), 0.0)
    return Canvas(steps.masked_fill(ended, 0), stable.masked_fill(ended, 0), carried), ended


def after_end(denoiser: CanvasDenoiser, tokens: Tensor, masked: Tensor, settled: Tensor) -> tuple[Tensor, Tensor]:
    """``tokens`` and ``masked`` (N, L) with padding behind the first end token of what is now ``settled`` (N, L) bool;
    the sequence is complete there."""
    if not denoiser.ends:
        return tokens, masked
    ends = settled & torch.isin(tokens, torch.tensor(denoiser.ends, device=tokens.device))
    behind = (ends.long().cumsum(1) > ends.long()) & (settled | masked)
    return tokens.masked_fill(behind, denoiser.pad_id), masked & ~behind
