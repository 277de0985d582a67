"""Tokens per second of decoding rules on a model in LLaDA's layout, the rule's own time included, beside bare forwards.

    python benchmarks/speed.py --out benchmarks/results/speed.json

The model has random weights, so its text means nothing; its output head is scaled until confidences spread as those of
trained models do, and the rules are set to fill some tokens per forward. A prompt is continued in blocks, one row at a
time, on one thread; seconds are of CPU time, so that other work on the machine hardly matters. *Bare* are as many
forwards by hand, on the same boards without a cache, with logits and their 16 best where the block in play has masks;
each round times every rule and its bare forwards one after the other. *Deciding* is from observations to actions alone.

The share of a policy in the work of LLaDA-8B is computed from FLOPs, not measured.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from cache import COUNTED
from common import interleaved, median_ratio, report
from memory import LLADA_8B, PUBLISHED, VOCABULARY
from overhead import Letters
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agents.policy import LearnedPolicy, OrderPolicy
from agents.policy_iteration import PolicyIterationConfig
from agents.policy_iteration import train as train_policy
from tasks import Instances
from unmask_env.denoiser import load_denoiser
from unmask_env.families import FAMILIES, configure
from unmask_env.process import Unmasking
from unmask_env.reference import Policy, reference
from unmask_env.state import Observation, Rules

HEADS = 8
SPREAD = 9.0  # standard deviation of the logits
RULES = ("fixed_k:k=4,score=confidence", "threshold:theta=0.5", "entropy_bounded:gamma=4")
DECODED_AT = 0.05  # probability of filling from which on the policy, which has hardly learned, fills
CACHES = ("none", "prefix", "dual")


class Continued(Letters):
    """A prompt of random tokens, continued. The reward, which only training asks for, is the share of even tokens."""

    def __init__(self, vocab_size: int, prompt: int, answer: int) -> None:
        self.name, self.symbols = "continued", tuple(map(str, range(vocab_size)))
        self.shape, self.prompt_length = (1, prompt + answer), prompt

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        return self.behind_prompt(torch.randint(self.mask_id, (n, self.length), generator=generator))

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens[:, self.prompt_length :] % 2 == 0).float().mean(1)


def checkpoint(folder: Path, published: dict[str, Any]) -> int:
    """A random model in LLaDA's layout whose logits have the standard deviation ``SPREAD``; its parameters."""
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(configure(FAMILIES["llada"], published, "llada"))
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
        model.get_input_embeddings().weight.normal_()
        model.lm_head.weight.mul_(SPREAD)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(published))
    return sum(p.numel() for p in model.parameters())


def trained(process: Unmasking, out: Path, puzzles: int) -> LearnedPolicy:
    """A policy over sets after a few steps of policy iteration: its time is that of any of its size."""
    short = {"iterations": 1, "puzzles": puzzles, "steps": 10, "batch": 4, "retries": 0}
    config = PolicyIterationConfig(out=str(out), rules=process.rules, validate_every=0, **short)
    return train_policy(config, process)


# ---------------------------------------------------------------------- one rule
def bare_forwards(process: Unmasking, boards: list[Observation]) -> Callable[[], None]:
    """The forwards of these boards by hand, without a cache."""
    model, mask = process.denoiser.model, process.denoiser.mask_id
    ids = [torch.where(seen.masked, mask, seen.tokens) for seen in boards]
    where = [seen.fillable[0].nonzero().squeeze(1) for seen in boards]

    @torch.no_grad()
    def bare() -> None:
        for tokens, positions in zip(ids, where, strict=True):
            states = model.base_model(input_ids=tokens).last_hidden_state
            model.lm_head(states[:, positions]).float().log_softmax(-1).topk(16, -1)

    return bare


def deciding(policy: Policy, boards: list[Observation]) -> Callable[[], None]:
    @torch.no_grad()
    def decide() -> None:
        for seen in boards:
            policy(seen).act(None)

    return decide


def measure(
    processes: dict[str, Unmasking], policies: dict[str, Policy], instances: Instances, repeats: int
) -> list[dict[str, Any]]:
    """A row per rule and cache; ``processes`` by cache."""
    paths: dict[str, Callable[[], object]] = {}
    forwards: dict[str, int] = {}
    count = int((instances.tokens == processes["none"].task.mask_id).sum())
    cases = {f"{order} {cache}": (order, cache) for order in policies for cache in processes}
    for case, (order, cache) in cases.items():
        process, policy = processes[cache], policies[order]
        with torch.no_grad():
            boards = [step.observation for step in process.rollout(policy, instances, record=True).steps]
        forwards[case] = len(boards)
        paths[case] = lambda process=process, policy=policy: process.rollout(policy, instances)
        paths[f"bare {case}"] = bare_forwards(processes["none"], boards)
        paths[f"deciding {case}"] = deciding(policy, boards)
    spent = interleaved(paths, repeats, time.process_time)
    rows = []
    for case, (order, cache) in cases.items():
        seconds, bare, decided = (statistics.median(spent[f"{kind}{case}"]) for kind in ("", "bare ", "deciding "))
        row = {"order": order, "cache": cache, "forwards": forwards[case]}
        row |= {
            "tokens_per_forward": round(count / forwards[case], 2),
            "tokens_per_cpu_second": round(count / seconds, 2),
        }
        row |= {"of_bare": round(median_ratio(spent[case], spent[f"bare {case}"]), 3)}
        row |= {"bare_forward_ms": round(1e3 * bare / forwards[case], 1)}
        rows.append(row | {"deciding_ms": round(1e3 * decided / forwards[case], 2)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


# ---------------------------------------------------------------------- LLaDA-8B, computed
def planned(positions: int, block: int, published: dict[str, Any]) -> dict[str, float]:
    """Gigaflops of one forward of a model in LLaDA's layout and of the default policy over sets, and their ratio,
    computed from shapes: without a cache, and where the cache leaves the block alone to compute (``dual``).

    Args:
        positions: of prompt and answer. block: positions whose logits are asked for.
    """
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(configure(FAMILIES["llada"], published, "LLaDA"))
    matrices = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    attended = 4 * positions * published["d_model"] * published["n_layers"]  # per query: scores, and values summed
    head = 2 * block * model.lm_head.weight.numel()
    found = {name: count * (2 * matrices + attended) + head for name, count in (("none", positions), ("dual", block))}
    policy = OrderPolicy(
        VOCABULARY, [[i] for i in range(positions)], distribution="bernoulli", by_rank=True, rotary=True
    )
    masked = torch.zeros(1, positions, dtype=torch.bool)
    masked[:, -block:] = True
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        known = policy.reader.embed(None, masked)
        policy.reader(known, torch.zeros(1, positions, 16), masked)
    decided = counter.get_total_flops()
    shares = {f"policy_share_{cache}": decided / flops for cache, flops in found.items()}
    gigaflops = {f"denoiser_{cache}": flops / 1e9 for cache, flops in found.items()}
    return gigaflops | {"policy": decided / 1e9} | shares


def main(
    vocab_size: int = VOCABULARY,
    prompt: int = 96,
    answer: int = 64,
    block: int = 32,
    width: int = 384,
    layers: int = 8,
    repeats: int = 2,
    puzzles: int = 1,
    out: Path | None = None,
) -> dict[str, Any]:
    """Args: width, layers: of the model. puzzles: from which the policy learns."""
    torch.set_num_threads(1)
    sizes = {"d_model": width, "n_layers": layers, "n_heads": HEADS, "n_kv_heads": HEADS, "mlp_hidden_size": 3 * width}
    published = PUBLISHED | sizes | {"vocab_size": vocab_size, "embedding_size": vocab_size}
    task = Continued(vocab_size - 1, prompt, answer)
    published["mask_token_id"] = vocab_size - 1
    rules = Rules("set", block_length=block)
    with tempfile.TemporaryDirectory() as made:
        parameters = checkpoint(Path(made), published)
        source = f"hf:{made}"
        processes = {name: Unmasking(task, load_denoiser(f"{source},cache={name}", task), rules) for name in CACHES}
        policies: dict[str, Policy] = {order: reference(order) for order in RULES}
        policies["policy"] = trained(processes["dual"], Path(made) / "policy", puzzles).at(DECODED_AT)
        instances = task.sample(1, torch.Generator().manual_seed(1))
        print(f"{parameters:,} parameters of random weights: the text that is timed means nothing", flush=True)
        rows = measure(processes, policies, instances, repeats)
    computed = {}
    for positions in (768, 4096):
        plan = planned(positions, 32, PUBLISHED | LLADA_8B)
        computed[f"{positions} positions"] = {name: float(f"{value:.4g}") for name, value in plan.items()}
    print(json.dumps({"LLaDA-8B, computed from FLOPs, not measured": computed}, indent=2))
    shape = {"parameters": parameters, "vocab_size": vocab_size, "prompt": prompt, "answer": answer, "block": block}
    found = shape | {"weights": "random", "rows": rows, "llada_8b_computed_not_measured": computed}
    report(out, **found)
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
