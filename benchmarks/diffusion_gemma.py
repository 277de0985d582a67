"""A small DiffusionGemma, trained here on Countdown: which symbols to accept, by the entropy bound or as learned.

    python benchmarks/diffusion_gemma.py --threads 1 --out benchmarks/results/diffusion-gemma.json

The denoiser is the class of ``transformers``: uniform noise on one canvas behind the prompt, self-conditioning in half
of the training steps, cross-entropy of the clean symbols. ``hf:RUNS/denoiser`` loads it. The acceptance policy learns
with UPO from rewards alone, in which forwards count (``speed``). The entropy bound, a confidence threshold (where the
policy begins) and the policy are played with every setting, number of ``canvas_steps`` and ``stop_entropy`` on
validation instances; what no other setting of the same method beats there is played on test instances. Differences are
paired by instance, at as many forwards of the denoiser; the policy's own passes are listed beside them. Training that
was cut off goes on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import report
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from agents import frontier, upo
from agents.frontier import Methods, Point
from agents.policy import OrderPolicy, PolicyConfig
from agents.setup import annealed
from pretrain.checkpoint import save_model, step_generator
from pretrain.run import Run, set_learning_rate
from tasks import Countdown, Instances, Task
from unmask_env.denoiser import load_denoiser
from unmask_env.diffusion_gemma import DiffusionGemma
from unmask_env.process import Unmasking
from unmask_env.reference import EntropyBounded, Threshold
from unmask_env.state import Rules

GAMMAS = (0.01, 0.05, 0.1, 0.3, 1.0, 3.0)
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


# ---------------------------------------------------------------------- the denoiser
@dataclass(frozen=True)
class Training:
    """How the denoiser is trained; ``largest`` is of the task's numbers."""

    out: str
    largest: int
    steps: int
    seed: int
    batch: int = 64
    dim: int = 96
    layers: int = 3
    heads: int = 4
    lr: float = 4e-3
    resume: str = "auto"
    save_every: int = 200


def model_of(config: Training, task: Task) -> Any:
    """A DiffusionGemma whose one canvas is all behind the prompt of ``task``, and that knows no end token."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    channels, vocab_size = config.dim // config.heads, task.vocab_size
    text = {"vocab_size": vocab_size, "hidden_size": config.dim, "intermediate_size": 2 * config.dim}
    text |= {"num_hidden_layers": config.layers, "num_attention_heads": config.heads, "head_dim": channels}
    text |= {"num_key_value_heads": config.heads, "num_global_key_value_heads": config.heads}
    text |= {"global_head_dim": channels, "sliding_window": task.length, "max_position_embeddings": task.length}
    text |= {"layer_types": ["sliding_attention"] * (config.layers - 1) + ["full_attention"]}
    text |= {"num_experts": 1, "top_k_experts": 1, "moe_intermediate_size": config.dim}
    text |= dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"))
    vision = {"model_type": "gemma4_vision", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "position_embedding_size": 2}
    images = dict.fromkeys(("boi_token_id", "eoi_token_id", "image_token_id"), vocab_size)
    canvas, spread = task.length - task.prompt_length, config.dim**-0.5
    torch.manual_seed(config.seed)
    return transformers.DiffusionGemmaForBlockDiffusion(
        transformers.DiffusionGemmaConfig(
            text_config=text, vision_config=vision, canvas_length=canvas, initializer_range=spread, **images
        )
    )


def noised(answers: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    """(N, C) ``answers`` of which a share, uniform in [0, 1) by row, is replaced by uniform symbols."""
    noise = torch.randint(vocab_size, answers.shape, generator=generator)
    share = torch.rand(len(answers), 1, generator=generator)
    return torch.where(torch.rand(answers.shape, generator=generator) < share, noise, answers)


def loss_of(model: Any, task: Task, clean: Tensor, generator: torch.Generator) -> Tensor:
    """The mean cross-entropy of the clean symbols (N, L) on noised canvases; in half of the calls the model is given
    what it says of the same canvas without self-conditioning."""
    prompt, answers = clean[:, : task.prompt_length], clean[:, task.prompt_length :]
    given: dict[str, Tensor] = {"input_ids": prompt, "decoder_input_ids": noised(answers, task.vocab_size, generator)}
    if float(torch.rand((), generator=generator)) < 0.5:
        with torch.no_grad():
            given["self_conditioning_logits"] = model(**given).logits
    return cross_entropy(model(**given).logits.flatten(0, 1), answers.flatten())


class Clock:
    """CPU seconds of a run, with those before it was cut off."""

    def __init__(self) -> None:
        self.before, self.started = 0.0, time.process_time()

    def seconds(self) -> float:
        return self.before + time.process_time() - self.started

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.before, self.started = state["seconds"], time.process_time()


def train(config: Training, task: Task) -> float:
    """Train the denoiser and save it in ``config.out``, unless it is there; its CPU seconds."""
    model = model_of(config, task).train()
    parameters = [p for name, p in model.named_parameters() if "vision" not in name]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)
    clock, losses = Clock(), []
    parts = {"model": model, "optimizer": optimizer, "clock": clock}
    run = Run(config, config.steps, parts, f"denoiser {task.name}", lambda _, folder: save_model(model, folder))
    with run:
        for step in run.loop():
            generator = step_generator("cpu", config.seed, step, 0)
            loss = loss_of(model, task, task.clean(config.batch, generator), generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            set_learning_rate(optimizer, annealed(config.lr, step, config.steps))
            optimizer.step()
            losses.append(loss.item())
            if (step + 1) % 200 == 0:
                print(f"step {step + 1} loss {sum(losses) / len(losses):.4f}", flush=True)
                run.log({"loss": sum(losses) / len(losses)})
                losses.clear()
    return clock.seconds()


# ---------------------------------------------------------------------- the acceptance policy
def acceptance(process: Unmasking, out: Path, iterations: int, speed: float, seed: int) -> tuple[OrderPolicy, float]:
    """A policy of what to accept, learned from rewards under the rules of ``process``; and its CPU seconds."""
    config = upo.UPOConfig(
        out=str(out),
        rules=replace(process.rules, speed=speed),
        policy=PolicyConfig(dim=48, layers=2, num_passes=1),
        fill_temperature=1.0,
        puzzles=24,
        group=8,
        iterations=iterations,
        beta=1e-4,
        seed=seed,
        validate_every=20,
        resume="auto",
    )
    started = time.process_time()
    return upo.train(config, process), time.process_time() - started


# ---------------------------------------------------------------------- play
def methods(policy: OrderPolicy) -> Methods:
    """The two rules and the policy, each at all of its settings."""
    return {
        "entropy_bounded": [({"gamma": gamma}, EntropyBounded(gamma)) for gamma in GAMMAS],
        "threshold": [({"theta": theta}, Threshold(theta)) for theta in SHARES],
        "learned": [({"threshold": t}, policy.at(t)) for t in THRESHOLDS],
    }


def play(process: Unmasking, chosen: Methods, grid: Sequence[Rules], instances: Instances, seed: int) -> list[Point]:
    """All settings under all rules, which become part of the setting."""
    points = []
    for rules in grid:
        more = {"canvas_steps": rules.canvas_steps, "stop_entropy": rules.stop_entropy}
        for point in frontier.sweep(replace(process, rules=rules), chosen, instances, seed, batch=250):
            points.append(replace(point, setting=point.setting | more))
    return points


def apart(instances: Instances, others: Instances) -> Instances:
    """Of ``instances`` the different puzzles that are none of ``others``: there are few, and both are drawn."""
    known = {tuple(row) for row in others.tokens.tolist()}
    boards = [tuple(row) for row in instances.tokens.tolist()]
    return instances[torch.tensor([i for i, row in enumerate(boards) if row not in known and row not in boards[:i]])]


def best_settings(points: Sequence[Point], method: str) -> list[Point]:
    """Those of ``method`` that no other of its settings beats: as few forwards and as good."""
    mine = [point for point in points if point.method == method]
    return frontier.best_of(mine, mine[0].learned)


def again(process: Unmasking, chosen: Methods, best: Sequence[Point], instances: Instances, seed: int) -> list[Point]:
    """The settings of ``best`` on other instances."""
    points = []
    for point in best:
        rules = {name: point.setting[name] for name in ("canvas_steps", "stop_entropy")}
        one = [(s, policy) for s, policy in chosen[point.method] if s.items() <= point.setting.items()]
        under = replace(process.rules, **rules)
        points += play(process, {point.method: one}, [under], instances, seed)
    return points


def paired(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Each point of the policy less each rule's curve at as many forwards, (mean, low, high); None where no two points
    of the rule lie around it."""
    curves = {method: [p.result for p in points if p.method == method] for method in ("entropy_bounded", "threshold")}
    return [
        {"setting": point.setting, "nfe": point.result.nfe, "solved": float(point.result.solved.mean())}
        | {f"less {name}": frontier.at_equal_forwards(curve, point.result) for name, curve in curves.items()}
        for point in points
        if point.method == "learned"
    ]


def show(points: Sequence[Point], pairs: Sequence[dict[str, Any]]) -> None:
    table = Table("method", "setting", "forwards", "passes", "solved %", title="test instances")
    for point in sorted(points, key=lambda p: (p.method, p.result.nfe)):
        row, setting = point.row(), ", ".join(f"{name} {value}" for name, value in point.setting.items())
        passes = row["passes"] + row["policy_passes"]
        cells = (f"{row['nfe']:.2f}", f"{passes:.2f}", f"{100 * float(point.result.solved.mean()):.1f}")
        table.add_row(point.method, setting, *cells)
    Console(width=120).print(table)
    for pair in pairs:
        print(pair)


def main(
    out: Path | None = None,
    steps: int = 4500,
    iterations: int = 120,
    speed: float = 1.0,
    largest: int = 20,
    canvas_steps: tuple[int, ...] = (2, 3, 4, 6, 12),
    stop_entropies: tuple[float, ...] = (0.005, 0.1),
    train_stop: float = 0.1,
    validation: int = 400,
    instances: int = 1300,
    seed: int = 0,
    threads: int | None = None,
    runs: Path = Path("runs/diffusion-gemma"),
) -> None:
    """Args:
    steps: of the denoiser. iterations: of UPO, at the most ``canvas_steps`` and ``train_stop``. speed: exponent of the
    share of forwards that are left, times which a right answer is rewarded. validation, instances: of the validation
    and of the test split, where those are left out that were played before. seed: of the denoiser, the policy and the
    play.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    task = Countdown(largest=largest)
    training = Training(str(runs / "denoiser"), largest, steps, seed)
    seconds = {"denoiser": train(training, task)}
    denoiser = load_denoiser(f"hf:{training.out}", task)
    grid = [Rules("accept", canvas_steps=n, stop_entropy=h) for n, h in itertools.product(canvas_steps, stop_entropies)]
    process = Unmasking(task, denoiser, replace(grid[0], canvas_steps=max(canvas_steps), stop_entropy=train_stop), 1.0)
    policy, seconds["policy"] = acceptance(process, runs / "policy", iterations, speed, seed)

    started, chosen = time.process_time(), methods(policy)
    known = task.heldout(validation, "validation")
    tried = play(process, chosen, grid, known, seed)
    best = [point for method in chosen for point in best_settings(tried, method)]
    tested = again(process, chosen, best, apart(task.heldout(instances), known), seed)
    pairs, seconds["play"] = paired(tested), time.process_time() - started
    show(tested, pairs)
    report(
        out,
        task=f"{task.name}, numbers to {largest}",
        parameters={"denoiser": parameters(denoiser), "policy": sum(p.numel() for p in policy.parameters())},
        settings=vars(training) | {"iterations": iterations, "speed": speed, "train_stop": train_stop, "seed": seed},
        cpu_seconds={name: round(value, 1) for name, value in seconds.items()},
        metric="share of answers that are right; differences are paired, with 95 % intervals",
        validation=[point.row() for point in tried],
        test=[point.row() for point in tested],
        at_equal_forwards=pairs,
    )


def parameters(denoiser: DiffusionGemma) -> int:
    """Of the decoder, whose weights the encoder shares; without what reads images."""
    return sum(p.numel() for p in denoiser.model.model.decoder.parameters())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
