"""What a vocabulary of 126,464 symbols costs: time and memory of a rollout beside its bare forwards, and what is kept.

    python benchmarks/memory.py --threads 1 --out benchmarks/results/memory.json

A random model in LLaDA's layout and with its vocabulary fills 32 masked positions of 96 and of 456, one per forward.
*Bare* are the same forwards by hand, with logits and their 16 best at the masked positions; *whole* is one forward with
the logits of all positions. Each peak is of a fresh process, above its loaded model.

    python benchmarks/memory.py --plan --out benchmarks/results/memory-llada-8b.json

computes, without running it, what training an order policy for LLaDA-8B takes on one device.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from common import interleaved, median_ratio, report
from overhead import Letters
from safetensors.torch import save_file
from torch import Tensor

from agents.policy import OrderPolicy
from tasks import Instances
from unmask_env.families import FAMILIES, configure
from unmask_env.language_models import HFDenoiser
from unmask_env.process import Unmasking
from unmask_env.reference import reference
from unmask_env.state import CHUNK, Denoised, Observation

VOCABULARY, LENGTHS, MASKED, BOARDS, WIDE, INNER, LAYERS = 126_464, (96, 456), 32, 4, 128, 384, 4
PUBLISHED = {"model_type": "llada", "vocab_size": VOCABULARY, "embedding_size": VOCABULARY, "d_model": WIDE}
PUBLISHED |= {"n_layers": LAYERS, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": INNER, "mask_token_id": 126_336}
PUBLISHED |= {"max_sequence_length": 4096, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "weight_tying": False}


LLADA_8B = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288}


class Words(Letters):
    symbols = tuple(map(str, range(VOCABULARY)))

    def __init__(self, length: int) -> None:
        self.shape = (1, length)


def checkpoint(folder: Path) -> None:
    """A random model in LLaDA's layout."""
    square, norm, outer = (WIDE, WIDE), (WIDE,), (VOCABULARY, WIDE)
    block = {"attn_norm": norm, "ff_norm": norm, "attn_out": square, "ff_proj": (INNER, WIDE), "up_proj": (INNER, WIDE)}
    block |= {"ff_out": (WIDE, INNER), "q_proj": square, "k_proj": square, "v_proj": square}
    shapes = {"wte": outer, "ff_out": outer, "ln_f": norm}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    draws = torch.Generator().manual_seed(0)
    weights = {
        f"model.transformer.{name}.weight": torch.randn(shape, generator=draws) / WIDE**0.5
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(PUBLISHED))


def storages(value: object) -> dict[int, int]:
    """Bytes by address of every storage that ``value`` keeps alive."""
    if isinstance(value, Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
    parts = vars(value).values() if is_dataclass(value) else value if isinstance(value, list | tuple) else ()
    return {address: size for part in parts for address, size in storages(part).items()}


def measure(what: str, folder: Path, length: int) -> Any:
    """Mebibytes of resident memory at most that ``bare``, ``rollout`` or a ``whole`` forward adds; kibibytes per step
    and board that ``recorded`` keeps; or the ratio in ``time`` of a rollout to its bare forwards."""
    task = Words(length)
    process, draws = Unmasking(task, HFDenoiser(folder, task)), torch.Generator().manual_seed(0)
    model, mask = process.denoiser.model, PUBLISHED["mask_token_id"]
    answers = torch.randint(mask, (BOARDS, length), generator=draws)
    tokens = torch.where(torch.arange(length) >= length - MASKED, VOCABULARY, answers)
    played = (reference("softmax_confidence"), Instances(tokens, answers), draws)

    @torch.no_grad()
    def bare() -> None:
        ids = tokens.clamp(max=mask)
        for filled in range(MASKED):
            states = model.base_model(input_ids=ids).last_hidden_state
            model.lm_head(states[:, length - MASKED + filled :]).float().log_softmax(-1).topk(16, -1)

    if what == "recorded":
        return sum(storages(process.rollout(*played, record=True).steps).values()) / 2**10 / MASKED / BOARDS
    if what == "time":
        spent = interleaved({"bare": bare, "rollout": lambda: process.rollout(*played)}, 3)
        return median_ratio(spent["rollout"], spent["bare"])
    # A child's ru_maxrss begins at its parent's size, so the level before is read elsewhere.
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    with torch.no_grad():
        {"bare": bare, "rollout": lambda: process.rollout(*played), "whole": lambda: model(tokens.clamp(max=mask))}[
            what
        ]()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before


def planned(boards: int, positions: int, block: int, answer: int) -> dict[str, float]:
    """Gibibytes that UPO with LLaDA-8B in bfloat16 takes, computed from its configuration and this package's shapes.

    Args:
        boards: played and updated together. positions: of prompt and answer. block: positions that are filled in turn.
        answer: positions to fill, one per forward.
    """
    published = PUBLISHED | LLADA_8B
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(configure(FAMILIES["llada"], published, "LLaDA-8B"))
    wide, inner = published["d_model"], published["mlp_hidden_size"]
    shown = torch.zeros(boards, positions, dtype=torch.bool)
    shown[:, -block:] = True
    task = Words(positions)
    denoised = Denoised.at(shown, VOCABULARY, lambda rows, _: torch.zeros(len(rows), VOCABULARY))
    tokens = torch.zeros(boards, positions, dtype=torch.int64)
    seen = Observation(tokens, shown, shown.clone(), denoised)
    step = sum(storages(seen).values()) + tokens.numel()  # and the action
    policy = OrderPolicy(VOCABULARY, task.coordinates.tolist(), rotary=True, by_rank=True)
    kept = 16 * policy.config.dim * (policy.config.layers or 3)  # numbers per position that a gradient needs, about
    count = sum(p.numel() for p in policy.parameters())
    parts = {
        "weights": 2 * sum(p.numel() for p in model.parameters()),
        "activations of a forward": 2 * boards * positions * (2 * wide + 3 * inner),  # a block's widest moment
        "logits, some at a time": CHUNK * (2 + 3 * 4),
        f"recorded: {answer} steps": step * answer,
        "policy, its gradient and AdamW": 4 * 4 * count,
        "activations of a policy's update": 4 * boards * positions * kept,
    }
    return {name: round(size / 2**30, 3) for name, size in parts.items()} | {"policy parameters": count}


def main(
    measured: str = "",
    folder: Path = Path(),
    length: int = 0,
    threads: int | None = None,
    plan: bool = False,
    out: Path | None = None,
) -> None:
    """Args: measured, folder, length: one measurement, in this process. plan: compute LLaDA-8B's needs instead."""
    if plan:
        sizes = {"boards": 16, "positions": 768, "block": 32, "answer": 256}
        print(found := planned(**sizes))
        return report(out, computed=found, **sizes)
    torch.set_num_threads(threads or torch.get_num_threads())
    if measured:
        return print(measure(measured, folder, length))
    rows = []
    with tempfile.TemporaryDirectory() as made:
        checkpoint(Path(made))
        for positions in LENGTHS:
            command = [sys.executable, __file__, "--folder", made, "--length", str(positions), "--measured"]
            threaded = ["--threads", str(torch.get_num_threads())]
            parts = ("bare", "whole", "rollout", "recorded", "time")
            found = {part: round(float(subprocess.check_output([*command, part, *threaded])), 2) for part in parts}
            rows.append({"positions": positions, "peak_ratio": round(found["rollout"] / found["bare"], 2)} | found)
            print(rows[-1])
    report(out, rows=rows, at_most={"recorded": 64, "peak_ratio": 1.3, "time": 1.15})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
