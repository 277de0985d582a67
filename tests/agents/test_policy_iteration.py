"""Policy iteration: values by play against enumeration, the closed form, labels, and runs."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import tasks
from agents import policy_iteration
from agents.policy import OrderPolicy, PolicyConfig, load_policy, new_policy
from agents.policy_iteration import (
    OneByOne,
    Player,
    PolicyIterationConfig,
    best_symbols_values,
    finished_boards,
    set_value_loss,
    value_loss,
    values_of,
)
from agents.states import States
from pretrain.checkpoint import load_state, save_model
from pretrain.run import Interrupted
from tasks import Instances, Task, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint, sequences
from tests.toys import generator, one_of
from unmask_env import exact
from unmask_env.denoiser import Denoiser, TableDenoiser, load_denoiser
from unmask_env.distributions import Categorical, masked_log_softmax
from unmask_env.process import Unmasking
from unmask_env.reference import MaxConfidence, Policy, SoftmaxConfidence, reference
from unmask_env.state import Denoised, Observation, Rules, State

SMALL = PolicyConfig(copy=False, dim=16, layers=1, defer_above=2.0, num_passes=2)


class Graded(TableTask):
    """Rewarded by the share of letters that are the drawn ones."""

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens == instances.answers).float().mean(1)


class Likely(TableTask):
    """Rewarded by how likely the finished sequence is."""

    one_answer = False

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        seen = tokens.clamp(max=self.vocab_size - 1)  # rows that are not complete are asked about, too
        return (self.joint / self.joint.max())[tuple(seen.unbind(1))].float()


class Either(TableTask):
    """Every sequence with an even sum of its letters is right."""

    one_answer = False

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens.sum(1) % 2 == 0).float()


class Neighbours(TableDenoiser):
    """p(x_i | the visible neighbours of i): right conditionals, but not those of one joint, so that order matters."""

    def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised:
        parts = []
        for position in range(self.length):
            near = torch.full_like(tokens, self.mask_id)
            for at in {position - 1, position + 1} & set(range(self.length)):
                near[:, at] = tokens[:, at]
            parts.append(super().__call__(near).log_probs[:, position])
        return Denoised.of(torch.stack(parts, 1))


@pytest.fixture(scope="module")
def sudoku6() -> Task:
    return tasks.get("sudoku6")


@pytest.fixture(scope="module")
def tiny(sudoku6) -> Denoiser:
    return load_denoiser("sudoku6-tiny", sudoku6)


def table(kind: type[TableTask] = TableTask, seed: int = 12, temperature: float = 0.0) -> Unmasking:
    joint = random_joint(3, 4, seed=seed)
    return Unmasking(kind(joint), Neighbours(joint), temperature=temperature)


def config(out: object, **changes: object) -> PolicyIterationConfig:
    few = {"iterations": 2, "puzzles": 24, "steps": 10, "batch": 16, "policy": SMALL, "validate_every": 0}
    return PolicyIterationConfig(out=str(out), **few | changes)


def settled(**changes: object) -> PolicyIterationConfig:
    return config("unused", **{"labels": "values", "candidates": 64} | changes)


# ---------------------------------------------------------------------- values
class Last(Policy):
    """The last masked position first."""

    def __call__(self, seen: Observation) -> Categorical:
        return Categorical.of(1e3 * torch.arange(seen.tokens.shape[1]).expand(seen.tokens.shape), seen.fillable)


def test_values_are_the_rewards_of_play_by_hand() -> None:
    """Each position filled by itself, and the rest by a loop of this test's own."""
    process = table()
    state = process.reset(process.task.sample(12, generator(3)))
    player = Player.of(process, Last(), SoftmaxConfidence(), 2.0, 0.0)
    values = values_of(settled(rows=7), player, process.observe(state), state, generator())
    for row in range(12):
        for position in range(4):
            tokens, order = state.tokens[row : row + 1].clone(), [position, *(i for i in (3, 2, 1, 0) if i != position)]
            for at in order:
                tokens[0, at] = process.denoiser(tokens).best[0, at]
            assert values[row, position] == process.task.reward(tokens, state.instances[row : row + 1])[0]
    assert 0 < float(values.mean()) < 1


def exact_values(process: Unmasking, policy: Policy, tokens: Tensor, instance: Instances) -> Tensor:
    """(L,) expected reward of filling each position by a sample, then play by ``policy``: a plain recursion."""

    def value(board: Tensor) -> float:
        if not (board == process.task.mask_id).any():
            return float(process.task.reward(board[None], instance)[0])
        state = process.reset(Instances(board[None], instance.answers))
        pi = policy(process.observe(state)).log_probs[0].exp()
        return sum(float(pi[i]) * filled(board, i) for i in range(len(board)) if float(pi[i]) > 0)

    def filled(board: Tensor, position: int) -> float:
        probabilities = process.denoiser(board[None]).log_probs[0, position].exp()
        total = 0.0
        for symbol, probability in enumerate(probabilities.tolist()):
            following = board.clone()
            following[position] = symbol
            total += probability * value(following)
        return total

    return torch.tensor([filled(tokens, position) for position in range(len(tokens))])


@pytest.mark.slow
def test_with_drawn_symbols_values_average_to_the_exact_expectation() -> None:
    process = table(Likely, temperature=1.0)
    instance = process.task.sample(1, generator(1))
    state = process.reset(instance)
    g = SoftmaxConfidence(tau=0.2)
    player = Player.of(process, g, g, 2.0, 0.0)
    played = values_of(settled(continuations=10_000, sampled=True), player, process.observe(state), state, generator())
    expected = exact_values(process, g, state.tokens[0], instance)
    torch.testing.assert_close(played[0], expected, atol=0.012, rtol=0)  # three standard errors
    assert float(expected.max() - expected.min()) > 0.025


def test_the_candidates_of_a_state_are_filled_with_the_same_random_numbers(monkeypatch) -> None:
    """In every step of play, positions that are filled in forks of one state and continuation share their draws."""
    process = table(temperature=1.0)
    state = process.reset(process.task.sample(3, generator()))
    player = Player.of(process, Last(), SoftmaxConfidence(), 2.0, 0.0)
    seen, drawn = process.observe(state), []
    original = Unmasking.step

    def step(self: Unmasking, state: State, seen: Observation, action: Tensor, uniform: Tensor | None = None):
        drawn.append(uniform)
        return original(self, state, seen, action, uniform)

    monkeypatch.setattr(Unmasking, "step", step)
    values_of(settled(continuations=2), player, seen, state, generator(5))
    assert len(drawn) == 4
    for uniform in drawn:  # three states, of four candidates, with two continuations each
        forks = uniform.view(3, 4, 2, 4)
        assert torch.equal(forks, forks[:, :1].expand_as(forks))
        assert len(forks[:, 0, :, 0].unique()) == 6


def test_play_in_a_hurry_ends_with_the_same_boards(sudoku6, tiny) -> None:
    process = Unmasking(sudoku6, tiny)
    state = process.reset(sudoku6.heldout(60, "validation"))
    slow = Player(process, MaxConfidence(), SoftmaxConfidence(), 0.97)
    fast = Player.of(process, MaxConfidence(), SoftmaxConfidence(), 0.97, 0.0)
    (end, reward), (other, same) = (player.play(state, generator()) for player in (slow, fast))
    assert fast.process.rules.actions == "set"
    assert (reward == same).float().mean() > 0.95
    assert (end.tokens == other.tokens).float().mean() > 0.97
    assert other.steps.sum() < end.steps.sum() / 2


def test_play_stops_where_nothing_is_certain(sudoku6, tiny) -> None:
    process = Unmasking(sudoku6, tiny)
    state = process.reset(sudoku6.heldout(60, "validation"))
    reached, _ = Player.of(process, MaxConfidence(), SoftmaxConfidence(), 0.97, 0.0).play(
        state, generator(), to_uncertain=True
    )
    assert reached.instances.tokens.equal(state.tokens), "rows keep their order"
    open_rows = ~reached.done
    assert 0 < int(open_rows.sum()) < 60
    seen = process.observe(reached[open_rows])
    assert (seen.confidence.masked_fill(~seen.fillable, 0.0).max(1).values < 0.97).all()


# ---------------------------------------------------------------------- the closed form
def test_the_policy_is_the_reference_times_the_exponential_of_values() -> None:
    process = table()
    policy = new_policy(
        SMALL, process.task, process.denoiser, 0, "softmax_confidence", 0.1, belief_weight=1.0, beta=0.2
    )
    seen = process.observe(process.reset(process.task.sample(3, generator())))
    beliefs, _ = policy.read(seen)
    values = beliefs[-1].gather(-1, seen.denoised.best.unsqueeze(-1)).squeeze(-1).exp()
    expected = SoftmaxConfidence(tau=0.1)(seen).log_probs + values / 0.2
    torch.testing.assert_close(policy(seen).log_probs, expected.log_softmax(1), atol=1e-4, rtol=0)
    policy.head.value_range.copy_(torch.tensor([-0.5, 0.5]))
    (
        torch.testing.assert_close(policy(seen).log_probs, expected.log_softmax(1), atol=1e-4, rtol=0),
        "a constant is nothing",
    )


def soft_improvement(graph: exact.Graph, table: list[Tensor], g: list[Tensor], beta: float) -> list[Tensor]:
    """g exp(Q / beta) of the regularised values Q of ``table``, backwards through the graph."""
    value = graph.levels[-1].reward
    improved = [table[-1]]
    for level, pi, ref in list(zip(graph.levels, table, g, strict=True))[-2::-1]:
        q = torch.zeros_like(pi).index_put(
            (level.parent, level.position), level.log_fill.exp() * value[level.child], True
        )
        improved.append(masked_log_softmax(ref.masked_fill(pi == -torch.inf, 0.0) + q / beta, pi > -torch.inf))
        p = pi.exp()
        terms = p * (q - beta * (pi - ref).masked_fill(p == 0, 0.0))
        value = torch.where(level.complete, level.reward, terms.nan_to_num(0.0).sum(1))
    return improved[::-1]


def test_improvement_is_monotone_and_ends_at_the_optimum() -> None:
    """In exact evaluation J(pi) never falls from one iteration to the next."""
    process, g, beta = table(), SoftmaxConfidence(tau=0.2), 0.1
    graph = exact.enumerate_boards(process, process.task.sample(5, generator(2)))
    ref = exact.tabulate(graph, g)
    best = exact.soft_optimal(graph, ref, beta)
    pi, values = ref, []
    for _ in range(5):
        own = exact.evaluate(graph, pi, ref)
        values.append(float((graph.weight * (own.reward - beta * own.trajectory_kl)).sum()))
        pi = soft_improvement(graph, pi, ref, beta)
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(values))
    assert values[-1] > values[0] + 1e-3
    assert values[-1] == pytest.approx(float((graph.weight * best.value).sum()), abs=1e-9)


@pytest.mark.trains
def test_a_run_reaches_the_regularised_optimum(tmp_path) -> None:
    process, beta = table(Likely), 0.1
    settings = config(
        tmp_path,
        beta=beta,
        sampled=True,
        continuations=8,
        iterations=6,
        puzzles=48,
        steps=80,
        batch=64,
        lr=5e-3,
        reference="softmax_confidence:tau=0.2",
        capacity=200,
    )
    policy = policy_iteration.train(settings, process).eval()
    graph = exact.enumerate_boards(process, process.task.sample(400, generator(2)))
    ref = exact.tabulate(graph, reference("softmax_confidence:tau=0.2"))
    best = exact.soft_optimal(graph, ref, beta)
    with torch.no_grad():
        own = exact.evaluate(graph, exact.tabulate(graph, policy), ref)
    start = exact.evaluate(graph, ref)
    reached, most = (graph.weight * (own.reward - beta * own.trajectory_kl)).sum(), (graph.weight * best.value).sum()
    begun = (graph.weight * start.reward).sum()
    assert float(most - reached) < 0.1 * float(most - begun)


# ---------------------------------------------------------------------- losses by hand
def test_the_value_loss_by_hand() -> None:
    process = table()
    policy = new_policy(SMALL, process.task, process.denoiser, 0, "softmax_confidence", belief_weight=1.0, beta=0.1)
    seen = process.observe(process.reset(process.task.sample(2, generator())))
    values = torch.tensor([[1.0, torch.nan, 0.0, 0.25], [torch.nan, torch.nan, 1.0, torch.nan]])
    total = 0.0
    for belief in policy.read(seen)[0]:
        q = belief.gather(-1, seen.denoised.best.unsqueeze(-1)).squeeze(-1).exp()
        q = q.detach()
        for row, column in ((0, 0), (0, 2), (0, 3), (1, 2)):
            target, p = values[row, column], q[row, column]
            total += float(-(target * p.log() + (1 - target) * (1 - p).log())) / 4 / 2
    assert float(value_loss(policy, seen, values).detach()) == pytest.approx(total, abs=1e-4)


def test_the_improved_policy_by_hand() -> None:
    process = table()
    policy = new_policy(SMALL, process.task, process.denoiser, 0, "softmax_confidence", belief_weight=1.0, beta=0.1)
    seen = process.observe(process.reset(process.task.sample(1, generator())))
    values, known = torch.tensor([[1.0, torch.nan, 0.0, 0.9]]), [0, 2, 3]
    beliefs, states = policy.read(seen)
    g = policy.head.base(seen).log_probs[0, known]
    own = (g + policy.head.values(seen, beliefs[-1], states)[0, known] / 0.1).log_softmax(0)
    improved = (g + values[0, known] / 0.1).log_softmax(0)
    divergence = float((improved.exp() * (improved - own)).sum().detach())
    both, alone = (float(value_loss(policy, seen, values, regularised).detach()) for regularised in (True, False))
    assert divergence > 0.01
    assert both - alone == pytest.approx(divergence, abs=1e-4)


def test_graded_values_are_advantages() -> None:
    process = table()
    policy = new_policy(SMALL, process.task, process.denoiser, 0, "softmax_confidence", belief_weight=1.0, beta=0.1)
    states = States(process.task)
    values = torch.tensor([[0.5, 0.25, torch.nan, 0.0]])
    states.add(9, values=values)
    policy_iteration.widen_value_range(policy, states)
    assert policy.head.value_range.tolist() == [-0.25, 0.25]
    seen = process.observe(process.reset(process.task.sample(1, generator())))
    torch.testing.assert_close(value_loss(policy, seen, values), value_loss(policy, seen, values + 7.0))


def test_of_sets_what_keeps_the_most_is_right() -> None:
    process = replace(table(), rules=Rules("set"))
    policy = new_policy(SMALL, process.task, process.denoiser, 0, belief_weight=1.0, sets=True)
    seen = process.observe(process.reset(process.task.sample(1, generator())))
    values = torch.tensor([[0.5, 0.75, torch.nan, 0.75]])
    labels = torch.tensor([[0.0, 1.0, torch.nan, 1.0]])
    torch.testing.assert_close(set_value_loss(policy, seen, values, 20.0), set_value_loss(policy, seen, labels, 20.0))


def test_symbols_that_were_not_tried_are_worth_nothing_or_unknown() -> None:
    process = table()
    seen = process.observe(process.reset(process.task.sample(1, generator())))
    best, values = seen.denoised.best, torch.tensor([[1.0, 1.0, torch.nan, 0.0]])
    answers = torch.where(torch.tensor([[True, False, True, True]]), best, (best + 1) % 3)
    tried = best_symbols_values("values", seen, answers, values)
    board = best_symbols_values("boards", seen, answers, values)
    torch.testing.assert_close(tried, torch.tensor([[1.0, torch.nan, torch.nan, 0.0]]), equal_nan=True)
    torch.testing.assert_close(board, torch.tensor([[1.0, 0.0, torch.nan, 0.0]]), equal_nan=True)


# ---------------------------------------------------------------------- labels and states
def test_finished_boards_are_rewarded_ones(sudoku6, tiny) -> None:
    process = Unmasking(sudoku6, tiny)
    instances = sudoku6.heldout(120, "validation")
    player = Player.of(process, SoftmaxConfidence(), SoftmaxConfidence(), 0.97, 0.0)
    state = process.reset(instances)
    greedy, first = finished_boards(settled(retries=0), player, state, generator())
    board, reward = finished_boards(settled(retries=8), player, state, generator())
    once, rewarded = first == 1, reward == 1
    assert torch.equal(rewarded, (board == instances.answers).all(1)), "one answer is right"
    assert torch.equal(once, (greedy == instances.answers).all(1))
    assert once.sum() < rewarded.sum()
    assert torch.equal(board[once], greedy[once])


def test_values_follow_a_board_under_its_symmetries(sudoku6) -> None:
    states, instances = States(sudoku6), sudoku6.heldout(20, "validation")
    states.tokens, states.answers, states.given = instances.tokens, instances.answers, instances.tokens
    states.remask_count, states.uncertain = torch.zeros_like(instances.tokens), torch.ones(20, dtype=torch.bool)
    states.values = (instances.answers + torch.arange(20).unsqueeze(1) * 10).float()
    drawn = states.sample(sudoku6, 50, 0.0, generator())
    for row in range(50):
        whose = int(drawn.values[row, 0]) // 10
        for symbol in range(6):  # whatever it is called now, its positions have one value
            assert len(drawn.values[row][drawn.answers[row] == symbol].unique()) == 1
        holes = sorted((states.values[whose][instances.tokens[whose] == 6]).tolist())
        assert sorted(drawn.values[row][drawn.tokens[row] == 6].tolist()) == holes


# ---------------------------------------------------------------------- runs
@pytest.mark.trains
@pytest.mark.parametrize("actions", ["single", "set"])
@pytest.mark.parametrize("labels", ["boards", "values"])
@pytest.mark.parametrize("kind", [TableTask, Graded, Either])
def test_every_kind_of_task_label_and_action(tmp_path, kind, labels, actions) -> None:
    process = table(kind)
    policy = policy_iteration.train(config(tmp_path, labels=labels, rules=Rules(actions)), process)
    assert policy.actions == actions
    assert policy.trained == "rewards"
    played = process.rollout(policy, process.task.sample(20, generator())) if actions == "single" else None
    assert played is None or played.state.done.all()
    loaded = load_policy(tmp_path, process.task, process.denoiser)
    assert loaded.trained == "rewards"
    assert isinstance(loaded, OrderPolicy)


@pytest.mark.trains
def test_drawn_symbols_take_several_continuations(tmp_path) -> None:
    process = table(temperature=1.0)
    several = config(tmp_path, fill_temperature=1.0, continuations=4, sampled=True)  # whose values are not shrunk
    policy = policy_iteration.train(several, process)
    assert float(policy.head.value_range[0]) < 0, "means of 0 and 1 are graded"


@pytest.mark.trains
def test_masking_again_is_learned_from_its_own_boards(tmp_path) -> None:
    rules = Rules("set+remask", nfe_budget=8)
    first = policy_iteration.train(config(tmp_path / "a", rules=Rules("set")), table())
    assert isinstance(first, OrderPolicy)
    again = policy_iteration.train(config(tmp_path / "b", rules=rules, init=str(tmp_path / "a")), table())
    assert again.actions == "set+remask"


@pytest.mark.trains
@pytest.mark.parametrize(("stop_at", "drawn"), [(10, 0.0), (13, 0.0), (13, 1.0)])  # between two iterations, within one
def test_a_stopped_run_goes_on_to_the_same_policy(tmp_path, monkeypatch, stop_at, drawn) -> None:
    process = table(Likely if drawn else TableTask, temperature=drawn)
    original, counted = policy_iteration.descend, iter(range(99))
    whole = policy_iteration.train(config(tmp_path / "whole", fill_temperature=drawn), process)
    settings = config(tmp_path / "stopped", fill_temperature=drawn, save_every=1)

    def descend(*args: object, **more: object) -> float:
        if next(counted) == stop_at:
            raise KeyboardInterrupt
        return original(*args, **more)

    monkeypatch.setattr(policy_iteration, "descend", descend)
    with pytest.raises(KeyboardInterrupt):
        policy_iteration.train(settings, process)
    monkeypatch.setattr(policy_iteration, "descend", original)
    resumed = policy_iteration.train(replace(settings, resume="must"), process)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.trains
@pytest.mark.parametrize("actions", ["single", "set"])
def test_a_stop_during_play_is_heeded_at_once(tmp_path, actions) -> None:
    """In the third reward of the second iteration's play: the state is that of the first iteration's end."""

    class Stopping(TableTask):
        iteration = rewards = 0

        def sample(self, n: int, generator: torch.Generator) -> Instances:
            self.iteration += n == settings.puzzles
            return super().sample(n, generator)

        def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
            self.rewards += self.iteration == 2
            if self.rewards == 3:
                signal.raise_signal(signal.SIGTERM)
            return super().reward(tokens, instances)

    settings = config(tmp_path / "stopped", rules=Rules(actions), save_every=7)
    whole = policy_iteration.train(replace(settings, out=str(tmp_path / "whole")), table())
    with pytest.raises(Interrupted, match="stopped at step 10 of 20"):
        policy_iteration.train(settings, table(Stopping))
    resumed = policy_iteration.train(replace(settings, resume="must"), table())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.trains
def test_answers_are_not_read(tmp_path) -> None:
    """With other answers beside the same rewards a run is the same."""

    class Blind(Either):
        def sample(self, n: int, generator: torch.Generator) -> Instances:
            instances = super().sample(n, generator)
            return Instances(instances.tokens, torch.zeros_like(instances.answers))

    for actions in ("single", "set"):
        plain, blind = (
            policy_iteration.train(config(tmp_path / f"{kind.__name__}{actions}", rules=Rules(actions)), table(kind))
            for kind in (Either, Blind)
        )
        for name, value in plain.state_dict().items():
            assert torch.equal(value, blind.state_dict()[name]), name


@pytest.mark.trains
def test_where_nothing_can_be_learned_one_line_says_so(tmp_path, capsys) -> None:
    class Never(TableTask):
        def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
            return torch.zeros(len(tokens))

    for actions in ("single", "set"):
        for labels in ("boards", "values"):
            settings = config(tmp_path / f"{actions}-{labels}", labels=labels, rules=Rules(actions))
            policy = policy_iteration.train(settings, table(Never))
            said = [line for line in capsys.readouterr().out.splitlines() if "no state of 24 puzzles" in line]
            assert len(said) == 1 < settings.iterations
            assert "nothing was learned" in said[0]
            assert policy.trained == ""
            assert (tmp_path / f"{actions}-{labels}" / "model.safetensors").exists()


@pytest.mark.trains
def test_values_are_the_labels_where_chance_plays_or_several_answers_are_right(tmp_path) -> None:
    drawn, regularised = {"fill_temperature": 1.0}, {"sampled": True}
    for number, (kind, changes, expected) in enumerate(
        [
            (Graded, {}, "boards"),
            (Graded, {"rules": Rules("set")}, "boards"),
            (Graded, drawn, "values"),
            (Graded, regularised, "values"),
            (Either, {}, "values"),
            (Either, {"rules": Rules("set")}, "boards"),
        ]
    ):
        out = tmp_path / str(number)
        policy_iteration.train(config(out, iterations=1, steps=1, **changes), table(kind))
        assert json.loads((out / "run.json").read_text())["labels"] == expected


@pytest.mark.trains
def test_a_run_goes_on_from_a_policy_with_values_of_the_same_beta(tmp_path) -> None:
    process = table()
    policy_iteration.train(config(tmp_path / "first"), process)
    again = policy_iteration.train(config(tmp_path / "again", init=str(tmp_path / "first")), process)
    assert again.trained == "rewards"
    save_model(new_policy(SMALL, process.task, process.denoiser, 0), tmp_path / "plain")
    for name, beta, message in (
        ("plain", 1e-3, "a policy that has no values"),
        ("first", 0.1, "of beta 0.001, and beta"),
    ):
        with pytest.raises(UnmaskError, match=message):
            policy_iteration.train(config(tmp_path / "x", init=str(tmp_path / name), beta=beta), process)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": Rules("set"), "sampled": True}, "sampled is for single positions"),
        ({"rules": Rules("set+remask"), "labels": "values"}, "say nothing of masking again"),
        ({"rules": Rules("set+remask", remask_budget=3)}, "does not count a remask_budget"),
        ({"beta": 0.0}, "beta must be a number above 0, not 0.0"),
        ({"candidates": 1}, "candidates must be a whole number of at least 2, not 1"),
        ({"labels": "answers"}, "labels must be auto or values or boards, not 'answers'"),
        ({"reference": "oracle"}, "is no reference for actions 'single'"),
        ({"rules": Rules("set", speed=1.0)}, "over sets does not count forwards"),
        ({"rules": Rules("set", speed=1.0, speed_bonus=True)}, "over sets does not count forwards"),
        ({"rules": Rules("set"), "beta": 0.1}, "beta is for single positions; over sets leave it out"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, message) -> None:
    with pytest.raises(UnmaskError, match=message):
        policy_iteration.train(config(tmp_path / "x", **changes), table())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        (
            {"rules": Rules("set"), "levels": 2, "states": 9},
            "sets and labels of boards: levels (of single positions), st",
        ),
        ({"rules": Rules("set"), "candidates": 2}, "sets and labels of boards: candidates (of labels of values)"),
        (
            {"labels": "boards", "continuations": 2},
            "single positions and labels of boards: continuations (of labels of",
        ),
        ({"labels": "values", "retries": 2}, "single positions and labels of values: retries (of labels of boards)"),
        ({"error_cost": 2.0}, "single positions and labels of boards: error_cost (of sets)"),
        ({"labels": "values", "candidates": 16, "levels": 2}, ""),
        ({"rules": Rules("set"), "retries": 2, "error_cost": 3.0}, ""),
    ],
)
def test_settings_that_nothing_reads_are_told(changes: dict[str, object], idle: str, tmp_path, capsys) -> None:
    policy_iteration.train(config(tmp_path / "run", **changes), table())
    lines = [line for line in capsys.readouterr().out.splitlines() if "not used with" in line]
    assert len(lines) == (1 if idle else 0)
    assert all(f"not used with {idle}" in line for line in lines)


def test_policies_over_sets_play_one_by_one() -> None:
    process = replace(table(), rules=Rules("set"))
    policy = new_policy(SMALL, process.task, process.denoiser, 0, belief_weight=1.0, sets=True)
    seen = process.observe(process.reset(process.task.sample(4, generator())))
    alone = OneByOne(policy)(seen)
    torch.testing.assert_close(alone.log_probs, policy.log_odds(seen).log_softmax(1))
    assert torch.equal(alone.mode(), one_of(policy.log_odds(seen).argmax(1), 4))
    assert len(sequences(3, 4)) == 81


@pytest.mark.parametrize("states", [10**6, 40, 3])
def test_of_many_states_half_of_what_is_left_are_labelled_on_each_level(states) -> None:
    process, kept = table(), States(TableTask(random_joint(3, 4, seed=12)))
    few = settled(puzzles=64, levels=3, states=states, retries=2, labels="boards")
    asked: list[int] = []
    player = Player(process, SoftmaxConfidence(), SoftmaxConfidence(), 2.0, told=asked.append)
    told = policy_iteration.play_positions(few, player, kept, generator())
    assert told["play/states"] == sum(asked)
    assert asked[0] == {10**6: 64, 40: 20, 3: 1}[states]
    left = states
    for labelled in asked:
        assert labelled <= max(1, left // 2)
        left -= labelled


def test_the_variance_that_values_explain_is_of_differences_within_a_state() -> None:
    """Of new states, before they are learned from."""
    process, kept = table(), States(TableTask(random_joint(3, 4, seed=12)))
    all_kept = settled(puzzles=32, levels=2, labels="values", sampled=True, beta=0.5)
    policy = new_policy(SMALL, process.task, process.denoiser, 0, belief_weight=1.0, beta=0.5)
    policy.head.value_range.copy_(torch.tensor([-1.0, 1.0]))
    told = policy_iteration.play_positions(
        all_kept, Player(process, policy, SoftmaxConfidence(), 2.0), kept, generator()
    )
    state = process.reset(Instances(kept.given, kept.given))
    seen = process.observe(replace(state, tokens=kept.tokens, masked=kept.tokens == process.task.mask_id))
    with torch.no_grad():
        q = 2 * policy.log_odds(seen).sigmoid() - 1
    unexplained = differing = 0.0
    for known, predicted in zip(kept.values, q, strict=True):
        tried = ~known.isnan()
        unexplained += float((known - predicted)[tried].var(correction=0) * tried.sum())
        differing += float(known[tried].var(correction=0) * tried.sum())
    logged = policy_iteration.rates(told)
    assert logged["play/explained_variance"] == pytest.approx(1 - unexplained / differing, abs=1e-4)
    assert not logged.keys() & {"play/best_reward", *(name for name in told if "sum/" in name)}


def test_what_was_not_measured_is_not_logged() -> None:
    """Of several processes the sums are pooled, so one that met hardly any state does not decide."""
    names = ("unexplained", "differing", "finished", "rewarded", "earned")
    nothing = {"play/states": 0.0} | {f"sum/{name}": 0.0 for name in names}
    assert policy_iteration.rates(nothing) == {"play/states": 0.0}
    second = {"play/states": 0.0} | {
        f"sum/{name}": x for name, x in zip(names, (1.0, 4.0, 10.0, 8.0, 6.0), strict=True)
    }
    mean = {name: (nothing[name] + second[name]) / 2 for name in nothing}
    shares = {"play/explained_variance": 0.75, "play/labelled": 0.8, "play/best_reward": 0.75}
    assert policy_iteration.rates(mean) == {"play/states": 0.0} | shares


@pytest.mark.trains
@pytest.mark.parametrize(
    ("kind", "labels", "why"),
    [
        (TableTask, "values", "its values explain 0 % of how"),
        (Graded, "boards", r"the boards that it learns from earn 0\.\d\d on average"),
        (TableTask, "boards", r"[1-9]\d % of the boards that it finished earned nothing, and teach nothing"),
    ],
)
def test_a_run_that_does_not_gain_says_why(kind, labels, why, tmp_path, capsys) -> None:
    """Rewards that are luck alone teach nothing of an order, boards that are partly wrong are poor labels, and boards
    that earn nothing are none."""
    settings = config(tmp_path / "x", labels=labels, iterations=2, lr=0.0, validate_every=1)
    policy_iteration.train(settings, table(kind))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "on validation" in line]
    assert re.search(why, line)


@pytest.mark.trains
def test_a_resumed_run_says_why_too(tmp_path, monkeypatch, capsys) -> None:
    original, counted = policy_iteration.descend, iter(range(99))
    settings = config(tmp_path / "x", labels="values", lr=0.0, validate_every=1, save_every=1)

    def descend(*args: object, **more: object) -> float:
        if next(counted) == 15:
            raise KeyboardInterrupt
        return original(*args, **more)

    monkeypatch.setattr(policy_iteration, "descend", descend)
    with pytest.raises(KeyboardInterrupt):
        policy_iteration.train(settings, table())
    monkeypatch.setattr(policy_iteration, "descend", original)
    policy_iteration.train(replace(settings, resume="must"), table())
    assert "its values explain 0 % of how" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_states_within_the_bound_are_labelled_as_without_it(sudoku6, tiny) -> None:
    found = []
    for states in (1500, 10**6):
        kept, few = States(sudoku6), settled(puzzles=60, labels="boards", candidates=16, states=states)
        player = Player.of(Unmasking(sudoku6, tiny), SoftmaxConfidence(), SoftmaxConfidence(), 0.97, 0.0)
        policy_iteration.play_positions(few, player, kept, generator())
        found.append(kept.state_dict())
    for name, column in found[0].items():
        assert torch.equal(column.nan_to_num(-1), found[1][name].nan_to_num(-1)), name


@pytest.mark.parametrize("levels", [1, 2])
def test_levels_are_spread_over_boards_that_are_always_uncertain(levels) -> None:
    """At equal distances, from an offset that is drawn for each board; on each level as many states."""
    process, kept = table(Likely), States(TableTask(random_joint(3, 4, seed=12)))
    asked: list[int] = []
    player = Player(process, SoftmaxConfidence(), SoftmaxConfidence(), 2.0, told=asked.append)
    few = settled(puzzles=60, levels=levels, states=24 * levels, sampled=True)
    policy_iteration.play_positions(few, player, kept, generator())
    assert asked == [24] * levels
    filled, apart = (kept.tokens != process.task.mask_id).sum(1), 4 // levels
    assert set(filled.tolist()) == {0, 1, 2}  # at the last position there is no choice to learn
    of_level = filled.split([24, len(filled) - 24]) if levels == 2 else (filled,)
    for level, counts in enumerate(of_level):
        assert bool((counts // apart == level).all())


def test_uncertain_states_are_passed_over() -> None:
    process = table()
    player = Player(process, MaxConfidence(), SoftmaxConfidence(), 2.0)
    passing = torch.tensor([0, 3, 1, 9])
    state, _ = player.play(process.reset(process.task.sample(4, generator())), generator(), False, True, None, passing)
    assert (~state.masked).sum(1).tolist() == [0, 3, 1, 4]
    assert passing.tolist() == [0, 0, 0, 5]


def test_levels_are_further_apart_on_boards_with_more_holes() -> None:
    """Uncertain states per hole over levels; one forward never has more boards than ``rows``."""

    class Counting(MaxConfidence):
        most = 0

        def __call__(self, seen: Observation) -> Categorical:
            Counting.most = max(Counting.most, len(seen.tokens))
            return super().__call__(seen)

    process = table()
    answers = process.task.sample(40, generator()).answers
    tokens = answers.clone()
    tokens[:30, 2:] = process.task.mask_id  # 30 boards of two holes, 10 of four
    tokens[30:] = process.task.mask_id
    state = process.reset(Instances(tokens, answers))
    player = Player(process, Counting(), SoftmaxConfidence(), 2.0)
    assert policy_iteration.spread_of(settled(levels=2, rows=7), player, state) == 0
    assert Counting.most == 7
    spread = policy_iteration.spread_of(settled(levels=1, rows=7), player, state)
    assert spread == 1.0  # every hole meets an uncertain state
    many = state[torch.arange(40).repeat(9)]
    short = (many.instances.tokens == process.task.mask_id).sum(1) == 2
    first = policy_iteration.pass_over(player, many, 0.75, 0, generator())
    later = policy_iteration.pass_over(player, many, 0.75, 1, generator())
    assert (set(first[short].tolist()), set(first[~short].tolist())) == ({0, 1}, {0, 1, 2})
    assert (set(later[short].tolist()), set(later[~short].tolist())) == ({0, 1}, {2})  # distances of 1.5 and of 3


# ---------------------------------------------------------------------- values of noise
@pytest.mark.parametrize(
    ("true", "noise", "least", "most"), [(0.25, 0.01, 0.1, 0.3), (-0.5, 0.01, 0, 0), (3, 0.01, 0.5, 1), (0, 1, 0, 0)]
)
def test_values_are_shrunk_to_what_they_predict(true, noise, least, most) -> None:
    """Held-out values that are ``true`` times the policy's, with noise; against sums state by state."""
    process = table(Likely)
    policy = new_policy(SMALL, process.task, process.denoiser, 0, "softmax_confidence", belief_weight=1.0, beta=0.01)
    policy.head.value_range.copy_(torch.tensor([-0.5, 0.5]))
    state = process.reset(process.task.sample(7, generator()))
    state = replace(state, tokens=torch.where(torch.eye(7, 4) > 0, state.instances.answers, state.tokens))
    state = replace(state, masked=state.tokens == process.task.mask_id)
    seen = process.observe(state)
    own = policy_iteration.predicted_values(policy, seen).detach()
    values = (true * own + noise * torch.randn(7, 4, generator=generator(8)) + 7.0).masked_fill(
        ~state.masked, torch.nan
    )
    values[6, 0] = torch.nan  # of a position that was not tried
    products, squares = [], 0.0
    for known, predicted in zip(values, own, strict=True):
        tried = ~known.isnan()
        centred = predicted[tried] - predicted[tried].mean()
        products.append(float((centred * (known[tried] - known[tried].mean())).sum()))
        squares += float(centred.square().sum())
    certainty = 1 - sum(product**2 for product in products) / sum(products) ** 2
    expected = min(1.0, sum(products) / squares) * certainty if sum(products) > 0 and certainty > 0 else 0.0
    if true == 0:
        assert sum(products) > 0, "a slope by chance"
    heldout = States(process.task)
    columns = {"tokens": state.tokens, "answers": seen.denoised.best, "given": state.instances.tokens}
    heldout.add(9, **columns, remask_count=state.tokens * 0, values=values)
    slope = policy_iteration.shrink_values(settled(rows=3), process, policy, heldout)
    assert slope == pytest.approx(expected, abs=1e-4)
    assert least <= slope <= most
    assert policy.head.value_range.tolist() == pytest.approx([-0.5 * expected, 0.5 * expected], abs=1e-4)
    if expected == 0:
        torch.testing.assert_close(policy(seen).log_probs, policy.head.base(seen).log_probs)


@pytest.mark.trains
def test_where_symbols_are_drawn_some_states_are_kept_from_the_fit(tmp_path, monkeypatch) -> None:
    """One in ten; they shrink the values at the end of each iteration and before each validation, and only there."""
    original, ends = policy_iteration.shrink_values, []

    def shrunk(settings: object, process: object, policy: OrderPolicy, heldout: States) -> float:
        before = float(policy.head.value_range[1])
        policy.head.value_range.mul_(0.5)  # whatever the slope is
        ends.append((before, len(heldout)))
        return 0.5

    settings = {
        "fill_temperature": 1.0,
        "continuations": 2,
        "puzzles": 40,
        "validate_every": 4,
        "validation_puzzles": 4,
    }
    monkeypatch.setattr(policy_iteration, "shrink_values", shrunk)
    policy = policy_iteration.train(config(tmp_path / "drawn", **settings), table(Likely, temperature=1.0))
    monkeypatch.setattr(policy_iteration, "shrink_values", original)
    assert float(policy.head.value_range[1]) == ends[-1][0] / 2
    policy_iteration.train(config(tmp_path / "greedy"), table(Likely))
    states, heldout = ({}, {})
    for name in ("drawn", "greedy"):
        parts = load_state(tmp_path / name / "state.safetensors")["parts"]
        states[name], heldout[name] = len(parts["states"]["tokens"]), len(parts["heldout"]["tokens"])
    assert heldout["drawn"] == (states["drawn"] + heldout["drawn"]) // 10 > 0
    assert heldout["greedy"] == 0
    assert len(ends) == 6  # of 20 steps: after 4, 8, 10, 12, 16 and 20
    befores = [before for before, _ in ends]
    assert (len(set(befores[:3])), len(set(befores[3:]))) == (1, 1), "the fit has whole values"


@pytest.mark.trains
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_while_all_values_are_0_the_reference_plays(tmp_path, monkeypatch, slope) -> None:
    original, players = policy_iteration._play, []

    def shrunk(settings: object, process: object, policy: OrderPolicy, heldout: States) -> float:
        policy.head.value_range.mul_(slope)
        return slope

    def play(settings: object, process: object, g: object, policy: OrderPolicy | None, *rest: object) -> object:
        players.append(policy)
        return original(settings, process, g, policy, *rest)

    monkeypatch.setattr(policy_iteration, "shrink_values", shrunk)
    monkeypatch.setattr(policy_iteration, "_play", play)
    settings = {"fill_temperature": 1.0, "iterations": 3, "puzzles": 40}
    policy = policy_iteration.train(config(tmp_path / "drawn", **settings), table(Likely, temperature=1.0))
    assert policy.values_are_zero == (slope == 0)
    assert players == ([None, None, None] if slope == 0 else [None, policy, policy])


def test_a_policy_whose_values_are_0_plays_its_base_without_reading() -> None:
    """The same distribution as where it reads; one without a base has only what it reads."""
    process = table()
    seen = process.observe(process.reset(process.task.sample(8, generator())))
    for base in ("softmax_confidence", "none"):
        shape = replace(SMALL, defer_above=2.0)
        policy = new_policy(shape, process.task, process.denoiser, 0, base, belief_weight=1.0, beta=1e-3)
        assert policy(seen).passes.tolist() == [SMALL.num_passes] * 8
        policy.head.value_range.mul_(0.0)
        decided, read = policy(seen), policy._head_at(seen)
        torch.testing.assert_close(decided.log_probs, read.log_probs)
        assert decided.passes.tolist() == [0 if base == "softmax_confidence" else SMALL.num_passes] * 8


def test_a_policy_whose_values_are_0_is_no_start(tmp_path) -> None:
    process = table()
    policy = new_policy(SMALL, process.task, process.denoiser, 0, "softmax_confidence", belief_weight=1.0, beta=1e-3)
    policy.head.value_range.mul_(0.0)
    save_model(policy, tmp_path / "zero")
    with pytest.raises(UnmaskError, match="has values of 0: it is its reference; leave --init out"):
        policy_iteration.train(config(tmp_path / "x", init=str(tmp_path / "zero")), process)
