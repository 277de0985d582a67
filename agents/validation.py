"""What a training run tells of itself: its policy beside the reference on validation instances, and whether it learns.

monitor = Validation(config, process, reference, "upo sudoku6")
with run:
    for iteration in run.loop():
        ...
        monitor.report(run, policy, scalars, "reward 0.941", steps=len(batch))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agents.evaluate import interval, paired_difference
from agents.policy import OrderPolicy
from agents.setup import TrainConfig, load_init
from agents.shares import play_share
from pretrain import processes
from pretrain.run import Run
from tasks import Instances, UnmaskError
from tasks.task import check_instances
from unmask_env.distributions import Categorical, Distribution, NoClosedFormError
from unmask_env.process import Unmasking, checked_metrics
from unmask_env.reference import Policy, Reference
from unmask_env.state import Observation

BATCH = 500  # instances per forward
PATIENCE = 5  # iterations without an informative group before the run says so
ADVICE = "try more --puzzles, more --iterations or another --lr; more --validation-puzzles show smaller gains"


# ---------------------------------------------------------------------- policies that are watched
class Greedy(Policy):
    """The most likely positions of a reference, those that tie drawn at random; over sets its mode."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.actions, self.reads_hidden = policy, policy.actions, policy.reads_hidden

    def __call__(self, seen: Observation) -> Distribution:
        distribution = self.policy(seen)
        return distribution.tempered(1e-6) if isinstance(distribution, Categorical) else distribution


class Watched(Policy):
    """A policy, and its entropy and its divergence from a reference (N,) at each of its decisions, of the
    rows that this process plays."""

    def __init__(self, policy: Policy, reference: Reference) -> None:
        self.policy, self.reference = policy, reference
        self.actions, self.reads_hidden = policy.actions, policy.reads_hidden
        self.seen: dict[str, list[Tensor]] = {}

    def __call__(self, seen: Observation) -> Distribution:
        pi, g = self.policy(seen), self.reference(seen)
        rows = decisions(self.policy, seen)
        measures = {"entropy": pi.entropy, "divergence": lambda: divergence(pi, g, self.reference)}
        for name, measure in measures.items():
            try:
                self.seen.setdefault(name, []).append(measure()[rows])
            except NoClosedFormError:
                del self.seen[name]
        return pi

    def means(self) -> dict[str, float]:
        """Over all decisions; infinite divergences, where the policy is not free, are left out."""
        parts = processes.gather({name: torch.cat(values).cpu() for name, values in self.seen.items()})
        joined = {name: torch.cat([part[name] for part in parts if name in part]) for name in self.seen}
        finite = {name: values[values.isfinite()] for name, values in joined.items()}
        return {f"validation/{name}": float(values.mean()) for name, values in finite.items() if len(values)}


def decisions(policy: Policy, seen: Observation) -> Tensor:
    """(N,) bool: rows where ``policy`` decides something: several positions may be filled and, of single positions, it
    reads the board."""
    several = seen.fillable.sum(1) > 1
    reads = isinstance(policy, OrderPolicy) and policy.actions == "single"
    return several & policy.uncertain(seen) if reads else several


def divergence(pi: Distribution, g: Distribution, reference: Reference) -> Tensor:
    """(N,) in nats: KL(pi || g), or the cross-entropy to a deterministic reference, whose KL is infinite."""
    return pi.cross_entropy(g) if reference.deterministic else pi.kl(g)


# ---------------------------------------------------------------------- the monitor
class Played(NamedTuple):
    """How one policy does, (n,) per instance: the task's first metric, the reward, the forwards taken, and the network
    passes of denoiser and policy."""

    score: Tensor
    reward: Tensor
    nfe: Tensor
    passes: Tensor

    def gains_over(self, start: Played) -> bool:
        """More than the noise: in score or reward, or as good in fewer forwards."""
        better = [paired_difference(self.score, start.score), paired_difference(self.reward, start.reward)]
        _, saved, _ = paired_difference(start.nfe, self.nfe)
        return any(low > 0 for _, low, _ in better) or (saved > 0 and not self.falls_below(start))

    def falls_below(self, start: Played) -> bool:
        """Whether score or reward is below that of ``start``, beyond the paired 95 % interval."""
        return any(paired_difference(*pair)[2] < 0 for pair in ((self.score, start.score), (self.reward, start.reward)))

    def summary(self) -> dict[str, Any]:
        """Means; of score and reward with their 95 % intervals."""
        intervals = {name: getattr(self, name) for name in ("score", "reward")}
        means = {"forwards": float(self.nfe.mean()), "passes": float(self.passes.mean())}
        return {name: [float(values.mean()), *interval(values)] for name, values in intervals.items()} | means

    @property
    def perfect(self) -> bool:
        """Whether every instance has a score and a reward of 1."""
        return bool((self.score == 1).all() and (self.reward == 1).all())


class Validation:
    """Follows a training run on validation instances, always the same and played greedily. It has random streams of
    its own, so the numbers of training do not depend on it.

    A run is compared with where it began: with ``config.init``, else with the reference. The policy of the best score
    is kept in the folder ``best`` of the run's.

    Args:
        config: its ``validate_every`` (0: never) and ``validation_puzzles``.
        process: the decision process of the training. reference: whose greedy score stands beside the policy's.
        title: of the lines in the log. gains: whether the run is to end above where it began.
    """

    def __init__(
        self, config: TrainConfig, process: Unmasking, reference: Reference, title: str = "train", gains: bool = True
    ) -> None:
        self.config, self.process, self.reference, self.title, self.gains = config, process, reference, title, gains
        self.cause = ""  # what the learner knows of why it does not learn
        self.instances = self._instances()
        self._reference: Played | None = None
        self._start: Played | None = None
        self._latest: Played | None = None
        self._latest_step, self._metric = 0, ""
        self._told: dict[str, Any] | None = None
        self._uninformative = 0
        self._best = -math.inf

    def _instances(self) -> Instances | None:
        task, count = self.process.task, self.config.validation_puzzles
        if not self.config.validate_every:
            return None
        try:
            instances = task.heldout(count, "validation")
        except UnmaskError:  # it has fewer, or none
            try:
                instances = task.heldout(None, "validation")[:count]
            except UnmaskError:
                return None
        check_instances(task, instances)
        return instances.to(self.process.device) if len(instances) else None

    # ------------------------------------------------------------------ scores
    def due(self, step: int) -> bool:
        """Whether to validate after ``step`` steps, which count from 1."""
        return self.instances is not None and step % self.config.validate_every == 0

    def scores(self, policy: Policy) -> dict[str, float]:
        """``validation/policy`` and ``validation/reference``, the task's first metric; ``validation/reward`` and
        ``validation/nfe`` of the policy; and its entropy and its divergence from the reference where it decides."""
        watched = Watched(policy, self.reference)
        self._latest = self._play(watched)
        return {
            "validation/policy": float(self._latest.score.mean()),
            "validation/reference": float(self.reference_played.score.mean()),
            "validation/reward": float(self._latest.reward.mean()),
            "validation/nfe": float(self._latest.nfe.mean()),
        } | watched.means()

    @property
    def reference_played(self) -> Played:
        """Played once."""
        if self._reference is None:
            self._reference = self._play(Greedy(self.reference))
        return self._reference

    @property
    def start_played(self) -> Played:
        """How the run began, played once."""
        if self._start is None:
            begun = self.config.init is not None
            policy = load_init(self.config, self.process).to(self.process.device) if begun else None
            self._start = self.reference_played if policy is None else self._play(policy)
        return self._start

    @torch.no_grad()
    def _play(self, policy: Policy) -> Played:
        process, rows, parts = self.process, torch.arange(len(self.instances)), []
        with evaluated(getattr(policy, "policy", policy)):
            for number, some in enumerate(rows.split(BATCH)):
                draws = [torch.Generator(process.device).manual_seed(2 * number + k) for k in range(2)]
                ties = draws[0] if isinstance(policy, Greedy) and policy.actions == "single" else None
                fills = draws[1] if process.draws else None
                instances = self.instances[some.to(process.device)]
                mine, played = play_share(process, policy, instances, [ties, fills])
                if len(mine):
                    metrics = checked_metrics(process.task, played.tokens, instances[mine])
                    self._metric, score = next(iter(metrics.items()))
                    columns = {"score": score, "reward": played.reward, "nfe": played.nfe}
                    columns |= {"passes": played.denoiser_passes + played.policy_passes}
                    parts.append((some[mine.cpu()], {name: column.cpu().double() for name, column in columns.items()}))
        return Played(**processes.in_order(parts))

    # ------------------------------------------------------------------ what the run says
    def report(self, run: Run, policy: Policy, scalars: dict[str, float], said: str, steps: int = 0) -> None:
        """The end of an iteration: its ``scalars`` and, where due, the validation's to TensorBoard; a line to the log,
        or below the progress bar of a terminal.

        Args:
            said: begins the line. steps: boards times steps of an iteration, for the throughput.
        """
        done = run.step + 1
        if steps:
            scalars["throughput/steps_per_second"] = run.rate(steps)
        if self.instances is not None and self._reference is None:
            self._say_if_perfect(run)
        if self.due(done) or (self.instances is not None and done == run.steps):
            scalars |= self.scores(policy)
            self._latest_step = done
            if run.main and run.publish is not None and scalars["validation/policy"] > self._best:
                self._best = scalars["validation/policy"]
                run.publish(done, run.out / "best")
        note = said + (self._note() if self._latest_step == done else "")
        if "learning_rate" in scalars:
            note += f" lr {scalars['learning_rate']:.1e}"
        run.log(scalars, note)
        self._watch_groups(run, scalars)
        if done == run.steps and self.gains and self._latest is not None:
            self._conclude(run)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the best score, the last results, and what the learner knows."""
        return {"best": self._best, "results": self.results(), "cause": self.cause}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the best score and the last results that the state holds."""
        self._best, self._told, self.cause = float(state["best"]), state.get("results"), str(state.get("cause", ""))
        if not (self._told is None or _are_results(self._told)):
            raise ValueError("the results of the last validation are damaged")

    def results(self) -> dict[str, Any] | None:
        """What cards tell of the last validation, plain values: its ``step``, the number ``n`` of instances and the
        ``metric``; ``rows`` by policy, the means of score and reward with their 95 % intervals, of forwards and network
        passes; and the ``difference`` in score from the row ``over``, paired. None: there was none.

        The start of a run from ``config.init`` is known at the end.
        """
        now = self._latest
        if now is None or not self._latest_step:
            return self._told
        over, before = f"the reference {self.reference.name}", self.reference_played
        played = {over: before}
        if self.config.init is not None and self._start is not None:
            over, before = "the start", self._start
            played[over] = before
        played["this policy"] = now
        difference = list(paired_difference(now.score, before.score))
        shared = {"step": self._latest_step, "n": len(now.score), "metric": self._metric}
        return shared | {
            "rows": {name: some.summary() for name, some in played.items()},
            "over": over,
            "difference": difference,
        }

    def _note(self) -> str:
        """Of a new result, with its paired difference from the reference, 95 %, in points."""
        if self._latest is None or self._reference is None:
            return ""
        paired = paired_difference(self._latest.score, self._reference.score)
        mean, low, high = (f"{100 * value:+.1f}" for value in paired)
        change = mean if mean == low == high else f"{mean}, {low} to {high}"
        return f" validation {percent(self._latest.score)} (reference {percent(self._reference.score)}, {change})"

    def _say_if_perfect(self, run: Run) -> None:
        if self.gains and self.reference_played.perfect:
            single = self.process.rules.actions == "single"
            sets = ", or several positions per forward (--actions set)" if single else ""
            run.say(
                f"{self.title}: the reference {self.reference.name} is at 100 % of {len(self.instances)} validation "
                f"instances, so nothing can be gained; take harder instances, a weaker denoiser{sets}",
            )

    def _watch_groups(self, run: Run, scalars: dict[str, float]) -> None:
        """Say once that nothing can be learned from groups whose trajectories are all rewarded alike."""
        if "groups/informative" not in scalars:
            return
        self._uninformative = 0 if scalars["groups/informative"] > 0 else self._uninformative + 1
        if self._uninformative == PATIENCE:
            run.say(
                f"{self.title}: in {PATIENCE} iterations no group was rewarded unequally, so nothing is learned; take "
                "harder instances, more --puzzles or a larger --group",
            )

    def _conclude(self, run: Run) -> None:
        """Say at the end that nothing was learned, where that is so."""
        now, start = self._latest, self.start_played
        if start.perfect or now.gains_over(start):
            return
        mean, low, high = (f"{100 * value:+.1f}" for value in paired_difference(now.score, start.score))
        what = "validation fell" if now.falls_below(start) else "no gain above the noise on validation"
        change = f"{percent(start.score)} at the start, {percent(now.score)} now ({mean}, {low} to {high})"
        run.say(f"{self.title}: {what}: {change}; {self.cause + '; ' if self.cause else ''}{ADVICE}")


# ---------------------------------------------------------------------- small parts
def _are_results(told: Any) -> bool:
    """Whether ``told`` has the form of :meth:`Validation.results`."""

    def numbers(values: Any, count: int) -> bool:
        return type(values) is list and len(values) == count and all(type(value) in (int, float) for value in values)

    if not isinstance(told, dict) or not isinstance(rows := told.get("rows"), dict) or "this policy" not in rows:
        return False
    texts = all(isinstance(told.get(name), str) for name in ("metric", "over"))
    return (
        texts
        and numbers([told.get("step"), told.get("n")], 2)
        and numbers(told.get("difference"), 3)
        and all(isinstance(row, dict) for row in rows.values())
        and all(numbers(row.get(name), 3) for row in rows.values() for name in ("score", "reward"))
        and all(numbers([row.get("forwards"), row.get("passes")], 2) for row in rows.values())
    )


def percent(values: Tensor) -> str:
    """The mean of ``values`` in percent, with one decimal."""
    return f"{100 * float(values.mean()):.1f}"


@contextmanager
def evaluated(policy: Policy) -> Iterator[None]:
    """A network in evaluation mode, and back as it was."""
    was = isinstance(policy, nn.Module) and policy.training
    if was:
        policy.eval()
    try:
        yield
    finally:
        if was:
            policy.train()
