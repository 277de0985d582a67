"""What caches of keys and values save, counted in FLOPs, and what they change of the tokens that are decoded.

    python benchmarks/cache.py --threads 1 --out benchmarks/results/cache.json
    python benchmarks/cache.py --task math:FILE,tokenizer=DIR --denoiser hf:DIR,dtype=bfloat16 --device cuda

Without a denoiser, small models in the layouts of LLaDA and Dream are trained here to fill in English letters (State of
the Union addresses), and continue 64 letters of years from 2008 by 256 in blocks of 32; that of SDAR has the weights it
was drawn with, since its cache is exact. *Changed* is the share of the decoded tokens that are others than without a
cache: after the first one that is, boards are no longer the same. *Other best* compares the same boards, those of play
without a cache: the share of fillable positions whose most likely symbol is another. The last column is the task's
first measure; of text, the share of letters that are its own.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import report
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import tasks
from tasks import Instances, Task, Text, UnmaskError
from unmask_env.denoiser import load_denoiser
from unmask_env.families import FAMILIES, configure
from unmask_env.process import Unmasking
from unmask_env.reference import REFERENCES, Policy, reference
from unmask_env.state import Rules

PROMPT, ANSWER, WIDE, INNER, LAYERS, HEADS = 64, 256, 64, 192, 2, 4
LLADA = {"d_model": WIDE, "mlp_hidden_size": INNER, "n_layers": LAYERS, "n_heads": HEADS, "rope_theta": 1e4}
LLADA |= {"max_sequence_length": PROMPT + ANSWER}
QWEN = {"hidden_size": WIDE, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
QWEN |= {"num_key_value_heads": HEADS, "max_position_embeddings": PROMPT + ANSWER, "rms_norm_eps": 1e-6}
QWEN |= {"tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 1e4, "head_dim": WIDE // HEADS}
LAYOUTS: dict[str, dict[str, Any]] = {"llada": LLADA, "dream": QWEN, "sdar": QWEN}


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of shapes."""
    return sdpa_flop_count(query, key, value)


# The attention of CPUs, which the counter does not know.
COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


class Continued(Text):
    """A window of English, of which the first letters are given."""

    prompt_length = PROMPT

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        return self.behind_prompt(self.heldout_answers(n, split))


def checkpoint(layout: str, folder: Path, task: Task, steps: int, batch: int = 8) -> None:
    """A model in the ``layout`` of a family, trained for ``steps`` to fill in what is masked of a random share."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    family, mask, draws = FAMILIES[layout], task.vocab_size, torch.Generator().manual_seed(0)
    published = LAYOUTS[layout] | {"model_type": layout, "vocab_size": mask + 1, "mask_token_id": mask}
    torch.manual_seed(0)
    model = getattr(transformers, family.architecture)(configure(family, published, layout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, max(1, steps), pct_start=0.1)
    for step in range(steps):
        tokens = task.clean(batch, draws)
        hidden = torch.rand(tokens.shape, generator=draws) < torch.rand(batch, 1, generator=draws)
        hidden[:, :PROMPT] = False
        logits = model(input_ids=tokens.masked_fill(hidden, mask)).logits
        if family.shifted:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        loss = torch.nn.functional.cross_entropy(logits[hidden], tokens[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"{layout} {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(published))


def other_best(plain: Unmasking, cached: Unmasking, policy: Policy, instances: Instances) -> float:
    """The share of fillable positions, on the way that ``policy`` goes without a cache, of another likeliest symbol."""
    state, carried, others, positions = plain.reset(instances), None, 0, 0
    while not bool(state.done.all()):
        seen = plain.observe(state)
        with_cache = cached.observe(replace(state, carried=carried))
        carried = with_cache.denoised.carried
        others += int(((seen.denoised.best != with_cache.denoised.best) & seen.fillable).sum())
        positions += int(seen.fillable.sum())
        state, _ = plain.step(state, seen, policy(seen).mode())
    return others / positions


def measure(
    source: str, task: Task, device: str, orders: tuple[str, ...], block: int, instances: Instances
) -> list[dict[str, Any]]:
    """A row per order and cache of the denoiser ``source``, ``hf:`` and its options."""
    names = ("none", "prefix", "dual")
    denoisers, rows = {cache: load_denoiser(f"{source},cache={cache}", task, device) for cache in names}, []
    instances = instances.to(next(iter(denoisers.values())).device)
    hidden = instances.tokens == task.mask_id
    for order in orders:
        policy = reference(order)
        rules = Rules(actions=REFERENCES[order.partition(":")[0]].actions, block_length=block)
        plain = Unmasking(task, denoisers["none"], rules)
        for cache, denoiser in denoisers.items():
            process = replace(plain, denoiser=denoiser)
            with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
                played = process.rollout(policy, instances)
            flops = counter.get_total_flops()
            if cache == "none":
                tokens, most = played.tokens, flops
            others = 0.0 if cache == "none" else other_best(plain, process, policy, instances)
            name, right = next(iter(task.metrics(played.tokens, instances).items()))
            row = {"order": order, "cache": cache, "forwards": float(played.nfe.float().mean())}
            row |= {"teraflops": round(flops / 1e12, 4), "saved": round(most / flops, 2)}
            row |= {"changed": round(float(((played.tokens != tokens) & hidden).sum() / hidden.sum()), 4)}
            rows.append(row | {"other_best": round(others, 4), name: round(float(right.mean()), 4)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(
    denoiser: str | None = None,
    task: str | None = None,
    device: str = "cpu",
    orders: tuple[str, ...] = ("max_confidence", "fixed_k:k=4"),
    block: int = 32,
    instances: int = 4,
    steps: int = 1000,
    threads: int | None = None,
    out: Path | None = None,
) -> None:
    """Args: denoiser, task: a model of ``hf:`` and its task, both. steps: of training the small models."""
    torch.set_num_threads(threads or torch.get_num_threads())
    if (task is None) != (denoiser is None):
        raise UnmaskError("name a denoiser and its task, both or neither")
    game = Continued(length=PROMPT + ANSWER) if task is None else tasks.get(task)
    models = {}
    with tempfile.TemporaryDirectory() as made:
        for name in LAYOUTS if denoiser is None else (denoiser,):
            source = name if denoiser is not None else f"hf:{made}/{name}"
            if denoiser is None:
                checkpoint(name, Path(made) / name, game, 0 if name == "sdar" else steps)
            print(name, flush=True)
            models[name] = measure(source, game, device, orders, block, game.heldout(instances))
    report(out, block_length=block, instances=instances, steps=steps, models=models)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
