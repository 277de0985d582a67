"""Exact solutions of the unmasking decision process on boards small enough to list, in float64.

A state is a board, an action a masked position, and the frozen denoiser fills it: with its most likely symbol
(temperature 0), or with symbol v in proportion to p_i(v)^(1 / T). A complete board earns ``task.reward``. For a
reference policy g the regularised objective is J(pi) = E[r(x_0)] - beta * sum_n E KL(pi(.|s_n) || g(.|s_n)).

Shapes: N instances, P starts (distinct instance boards), S boards and E edges of one level, L positions, V symbols.
A policy is a :class:`Policy` of single positions, or its table: per level (S, L) log-probabilities. KLs are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tasks import Instances, Task, UnmaskError
from unmask_env.distributions import masked_log_softmax
from unmask_env.process import Unmasking, checked_reward
from unmask_env.reference import Policy, Random
from unmask_env.state import Denoised, Observation

INF = math.inf
MAX_HOLES = 16
Table = list[Tensor]


class TooLargeError(UnmaskError):
    """More holes or boards than can be listed."""


# ---------------------------------------------------------------------- all boards
@dataclass(frozen=True)
class Level:
    """The boards that the same number of actions reaches, and the edges to the next level.

    Attributes:
        observation: the S boards and the denoiser's output for them.
        start: (S,) int64, the start that the board came from. reward: (S,) float64, 0 on incomplete boards.
        parent, position, child: (E,) int64, row of this level, position filled, row of the next level.
        log_fill: (E,) float64 log-probability of the symbol given the position.
    """

    observation: Observation
    start: Tensor
    reward: Tensor
    parent: Tensor
    position: Tensor
    child: Tensor
    log_fill: Tensor

    @property
    def complete(self) -> Tensor:
        """(S,) bool."""
        return ~self.observation.masked.any(1)


@dataclass(frozen=True)
class Graph:
    """Every board that filling can reach, by number of actions taken; row p of ``levels[0]`` is start p.

    Attributes:
        start_of: (N,) int64, the start of each instance.
        weight: (P,) float64, its share of the instances: ``(weight * value).sum()`` averages over instances.
    """

    levels: list[Level]
    start_of: Tensor
    weight: Tensor

    @property
    def starts(self) -> int:
        """P, how many different boards play begins at."""
        return len(self.weight)

    @property
    def boards(self) -> int:
        """How many different boards can be met, over all levels."""
        return sum(len(level.start) for level in self.levels)


@torch.no_grad()
def enumerate_boards(
    process: Unmasking, instances: Instances, max_states: int = 300_000, batch: int = 2048, hidden: bool = False
) -> Graph:
    """All boards reachable from ``instances``, level by level; each is denoised once, ``batch`` at a time.

    Instances with the same board are one start, and a complete board's reward is the mean over that start's answers:
    a policy does not see the answer, so that mean is all it can raise. Boards of different starts are kept apart; where
    two starts share a board, optima are upper bounds for a policy that sees the board alone.

    Args:
        process: of single positions. Temperature 0 fills greedily; above 0, symbols of probability 0 are left out.
        hidden: keep the denoiser's hidden states, for policies that read them.

    Raises:
        TooLargeError: more than 16 masks in an instance, or more than ``max_states`` boards.
        UnmaskError: a denoiser that gives no symbol any probability.
    """
    task, instances = process.task, instances.to(process.device)
    check_holes(task, instances)
    tokens, start_of, count = instances.tokens.unique(dim=0, return_inverse=True, return_counts=True)
    start = torch.arange(len(tokens), device=tokens.device)
    by_start = instances[start_of.argsort()]
    levels, total = [], 0
    while len(tokens):
        total += len(tokens)
        if total > max_states:
            raise TooLargeError(
                f"{len(count)} starts reach at least {total} boards, and {max_states} are allowed; take fewer blanks, "
                "fewer instances or greedy filling (temperature 0), or raise max_states"
            )
        observation, (parent, position, symbol, log_fill) = _expand(process, tokens, batch, hidden)
        reward = _mean_reward(task, observation, start, by_start, count)
        child, tokens, following = _merge(task, tokens, start, parent, position, symbol)
        levels.append(Level(observation, start, reward, parent, position, child, log_fill))
        start = following
    return Graph(levels, start_of, count.double() / len(instances))


def _expand(process: Unmasking, tokens: Tensor, batch: int, hidden: bool) -> tuple[Observation, list[Tensor]]:
    """The observation of the boards, and per edge: row, position, symbol, log-probability of the symbol."""
    seen: list[Observation] = []
    edges: list[tuple[Tensor, ...]] = []
    for some in tokens.split(batch):
        observation = observe(process, some)
        seen.append(observation if hidden else replace(observation, denoised=observation.denoised.without_hidden()))
        symbols, log_fill = fillings(observation.denoised, process.temperature)  # (N, L, K)
        likely = (log_fill > -INF) & observation.masked.unsqueeze(2)
        if not torch.equal(likely.any(2), observation.masked):
            raise UnmaskError("the denoiser gives every symbol probability 0 somewhere; take instances that it allows")
        row, position, k = likely.nonzero(as_tuple=True)
        edges.append((row + len(edges) * batch, position, symbols[row, position, k], log_fill[row, position, k]))
    return Observation.join(seen, torch.cat), [torch.cat(column) for column in zip(*edges, strict=True)]


def observe(process: Unmasking, tokens: Tensor) -> Observation:
    """What a policy sees of boards (N, L), as at the start of an episode."""
    return replace(process.observe(process.reset(Instances(tokens, torch.zeros_like(tokens)))), history=None)


def _mean_reward(task: Task, observation: Observation, start: Tensor, by_start: Instances, count: Tensor) -> Tensor:
    """(S,) the mean over the start's answers, 0 on incomplete boards; ``count`` (P,) instances have each start."""
    reward = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    first = count.cumsum(0) - count
    for nth in range(int(count.max())):
        rows = (~observation.masked.any(1) & (count[start] > nth)).nonzero().squeeze(1)
        if not len(rows):
            break
        instances = by_start[first[start[rows]] + nth]
        reward[rows] += checked_reward(task, observation.tokens[rows], instances).double()
    return reward / count[start]


def _merge(
    task: Task, tokens: Tensor, start: Tensor, parent: Tensor, position: Tensor, symbol: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Edges that lead to the same board get the same child: (E,) child, and the children's tokens and starts."""
    base = task.mask_id + 1
    per_word = int(62 / math.log2(base))  # boards as few integers: sorting whole rows is far slower
    where = torch.arange(task.length, device=tokens.device)
    word, place = where // per_word, base ** (where % per_word)
    group = start[parent]
    for w in range(int(word[-1]) + 1):
        code = (tokens * place * (word == w)).sum(1)[parent]
        code += (symbol - task.mask_id) * place[position] * (word[position] == w)
        values, number = code.unique(return_inverse=True)
        groups, group = (group * len(values) + number).unique(return_inverse=True)
    edge = torch.arange(len(parent), device=tokens.device)
    via = edge.new_zeros(len(groups)).scatter(0, group, edge)  # one edge into each child: any of them gives its board
    children = tokens[parent[via]].scatter(1, position[via].unsqueeze(1), symbol[via].unsqueeze(1))
    return group, children, start[parent[via]]


def fillings(denoised: Denoised, temperature: float) -> tuple[Tensor, Tensor]:
    """(N, L, K) symbols that a position may be filled with once it is chosen, and their float64 log-probabilities."""
    if temperature == 0:
        best = denoised.best.unsqueeze(-1)
        return best, torch.zeros(best.shape, dtype=torch.float64, device=best.device)
    log_probs = denoised.top_log_probs.double()
    return denoised.top_symbols, masked_log_softmax(log_probs / temperature, log_probs > -INF)


def check_holes(task: Task, instances: Instances, most: int = MAX_HOLES) -> None:
    """Raises :class:`TooLargeError` if an instance has more than ``most`` holes."""
    holes = int((instances.tokens == task.mask_id).sum(1).max()) if len(instances) else 0
    if holes > most:
        raise TooLargeError(f"an instance has {holes} holes, and {most} are allowed; take instances of fewer blanks")


# ---------------------------------------------------------------------- policies as tables
def tabulate(graph: Graph, policy: Policy | Table, batch: int = 4096) -> Table:
    """The table of a policy: per level (S, L) float64 log-probabilities, -inf on complete boards' rows.

    It is asked about ``batch`` incomplete boards at a time; gradients reach its parameters. A table stays as it is.
    """
    if isinstance(policy, list):
        return policy
    table = []
    for level in graph.levels:
        rows = (~level.complete).nonzero().squeeze(1)
        log_prob = torch.full(level.observation.masked.shape, -INF, dtype=torch.float64, device=rows.device)
        if len(rows):
            asked = torch.cat([ask(policy, level.observation[some]) for some in rows.split(batch)])
            log_prob = log_prob.index_put((rows,), asked)
        table.append(log_prob)
    return table


def ask(policy: Policy, observation: Observation) -> Tensor:
    """(N, L) float64 log-probabilities, normalised anew: in float32 they sum to one to 1e-7 only."""
    log_prob = policy(observation).log_probs.double()
    return masked_log_softmax(log_prob, log_prob > -INF)


# ---------------------------------------------------------------------- what a policy earns
class Values(NamedTuple):
    """Exact expectations from each start; the KLs are None without a reference, inf where pi goes and g never does.

    ``reward`` (P,) is E[r(x_0)]; ``trajectory_kl`` (P,) the expected sum of KL(pi(.|s) || g(.|s)) over the steps;
    ``terminal_kl`` (P,) KL(p_pi || p_g) of the complete boards; ``visits`` per level (S,) P(board is visited).
    """

    reward: Tensor
    trajectory_kl: Tensor | None
    terminal_kl: Tensor | None
    visits: list[Tensor]


def evaluate(graph: Graph, policy: Policy | Table, reference: Policy | Table | None = None) -> Values:
    """What ``policy`` earns and how far it goes from ``reference``; differentiable in both tables."""
    table = tabulate(graph, policy)
    log_visits = _log_visits(graph, table)
    visits = [log_visit.exp() for log_visit in log_visits]
    reward = _sum_by_start(graph, [p * level.reward for p, level in zip(visits, graph.levels, strict=True)])
    if reference is None:
        return Values(reward, None, None, visits)
    other = tabulate(graph, reference)
    terminal_kl = _terminal_kl(graph, log_visits, _log_visits(graph, other))
    return Values(reward, _trajectory_kl(graph, visits, table, other), terminal_kl, visits)


def finished(graph: Graph, policy: Policy | Table) -> tuple[Tensor, Tensor, Tensor]:
    """The exact distribution of finished sequences: tokens (C, L), start (C,), probability (C,) given the start."""
    log_visits = _log_visits(graph, tabulate(graph, policy))
    done = [level.complete for level in graph.levels]
    tokens = torch.cat([level.observation.tokens[d] for level, d in zip(graph.levels, done, strict=True)])
    start = torch.cat([level.start[d] for level, d in zip(graph.levels, done, strict=True)])
    return tokens, start, torch.cat([p[d] for p, d in zip(log_visits, done, strict=True)]).exp()


def _log_visits(graph: Graph, table: Table) -> list[Tensor]:
    """Per level (S,) log-probability that a board is visited; in logs, so that none underflows."""
    log_visits = [torch.zeros_like(graph.weight)]
    for level, following, log_pi in zip(graph.levels, graph.levels[1:], table, strict=False):
        flow = log_visits[-1][level.parent] + log_pi[level.parent, level.position] + level.log_fill
        log_visits.append(_logsumexp_by(level.child, flow, len(following.start)))
    return log_visits


def _logsumexp_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    """(size,) logsumexp of the ``values`` that share an index; -inf, with gradient 0, where all of them are -inf."""
    top = values.new_full((size,), -INF).scatter_reduce(0, index, values.detach(), "amax")
    never = top == -INF
    top = top.masked_fill(never, 0.0)
    total = torch.zeros_like(top).index_add(0, index, (values - top[index]).exp())
    return (total.masked_fill(never, 1.0).log() + top).masked_fill(never, -INF)


def _sum_by_start(graph: Graph, values: list[Tensor]) -> Tensor:
    """(P,) sums of the values of boards, per level (S,)."""
    start = torch.cat([level.start for level in graph.levels])
    return torch.zeros_like(graph.weight).index_add(0, start, torch.cat(values))


def _relative(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q) elementwise: 0 where p is 0, with gradient 0, and inf where only q is."""
    no_p, no_q = log_p == -INF, log_q == -INF
    log_p = log_p.masked_fill(no_p, 0.0)
    terms = log_p.exp() * (log_p - log_q.masked_fill(no_q, 0.0))
    return terms.masked_fill(no_q, INF).masked_fill(no_p, 0.0)


def _trajectory_kl(graph: Graph, visits: list[Tensor], table: Table, other: Table) -> Tensor:
    kl = [_relative(log_p, log_q).sum(1) for log_p, log_q in zip(table, other, strict=True)]
    return _sum_by_start(graph, [p * k.masked_fill(p == 0, 0.0) for p, k in zip(visits, kl, strict=True)])


def _terminal_kl(graph: Graph, log_p: list[Tensor], log_q: list[Tensor]) -> Tensor:
    terms = [_relative(p, q) for p, q in zip(log_p, log_q, strict=True)]
    return _sum_by_start(graph, [t.masked_fill(~x.complete, 0.0) for t, x in zip(terms, graph.levels, strict=True)])


# ---------------------------------------------------------------------- optima
class Optimum(NamedTuple):
    """``policy``, the table of pi*; and (P,) each: ``value`` = J(pi*), ``reward`` and ``trajectory_kl``."""

    policy: Table
    value: Tensor
    reward: Tensor
    trajectory_kl: Tensor


class TerminalOptimum(NamedTuple):
    """``policy``, its table; (P,) each: ``value`` = ``reward`` - beta * ``terminal_kl``, and ``gap``, which bounds how
    far ``value`` is below the optimum; ``iterations`` done."""

    policy: Table
    value: Tensor
    reward: Tensor
    terminal_kl: Tensor
    gap: Tensor
    iterations: int


@torch.no_grad()
def best_reward(graph: Graph) -> Tensor:
    """(P,) the largest E[r(x_0)] of any policy, which is what the denoiser leaves to win (beta to 0)."""
    return _hard_value(graph, tabulate(graph, Random()), [level.reward for level in graph.levels])


@torch.no_grad()
def soft_optimal(graph: Graph, reference: Policy | Table, beta: float) -> Optimum:
    """The policy that maximises J: pi*(a|s) in proportion to g(a|s) exp(Q(s, a) / beta), by backward recursion.

    V(s) = beta log sum_a g(a|s) exp(Q(s, a) / beta) and Q(s, a) = sum_v p(v|s, a) V(s'), with V = r on complete boards
    (KL control; Todorov 2009, doi 10.1073/pnas.0710743106). Raises :class:`UnmaskError` unless beta is above 0.
    """
    _check_beta(beta)
    table, reward = tabulate(graph, reference), [level.reward for level in graph.levels]
    value, policy = _soft_value(graph, table, reward, torch.full_like(graph.weight, beta))
    earned = evaluate(graph, policy, table)
    return Optimum(policy, value, earned.reward, earned.trajectory_kl)


@torch.no_grad()
def terminal_optimal(
    graph: Graph, reference: Policy | Table, beta: float, tolerance: float = 1e-6, max_iterations: int = 10_000
) -> TerminalOptimum:
    """Maximises UPO's output-level objective E[r(x_0)] - beta * KL(p_pi || p_g) over policies that go where g goes.

    With greedy filling the answer is :func:`soft_optimal`'s, found in one step. In general: mirror descent in path
    space, where pi_{k+1} is soft-optimal for reference pi_k, temperature beta / step and terminal reward
    r - beta log(p_k / p_g), from pi_0 = g. Terminal KL is at most path KL, so the objective is beta-smooth relative to
    path KL: step 1 never lowers it and leaves an error of at most beta * KL_path(pi* || g) / k (Lu, Freund and
    Nesterov 2018, arXiv 1610.05708). Longer steps are tried, start by start, and kept where
    step * KL(p_{k+1} || p_k) <= KL_path(pi_{k+1} || pi_k), which is all that the proof needs.

    It stops once the Frank-Wolfe gap, the most that any policy gains to first order, is below ``tolerance`` at every
    start, or after ``max_iterations``; ``gap`` says how far it got. Raises as :func:`soft_optimal`.
    """
    _check_beta(beta)
    base = table = tabulate(graph, reference)
    log_g = log_p = _log_visits(graph, base)
    step = torch.ones_like(graph.weight)
    for iteration in range(max_iterations + 1):
        slope = [
            (level.reward - beta * (p - g)).masked_fill((g == -INF) | ~level.complete, 0.0)
            for level, p, g in zip(graph.levels, log_p, log_g, strict=True)
        ]
        mean = _sum_by_start(graph, [p.exp() * s for p, s in zip(log_p, slope, strict=True)])
        gap = _hard_value(graph, base, slope) - mean
        if iteration == max_iterations or bool((gap < tolerance).all()):
            break
        _, proposal = _soft_value(graph, table, slope, beta / step)
        log_q = _log_visits(graph, proposal)
        path_kl = _trajectory_kl(graph, [q.exp() for q in log_q], proposal, table)
        safe = (step <= 1) | (step * _terminal_kl(graph, log_q, log_p) <= path_kl)
        step = torch.where(safe, 1.3 * step, step / 2).clamp(1.0, 1e6)
        rows = [(safe & (gap >= tolerance))[level.start] for level in graph.levels]
        table = [torch.where(r.unsqueeze(1), new, old) for r, new, old in zip(rows, proposal, table, strict=True)]
        log_p = [torch.where(r, new, old) for r, new, old in zip(rows, log_q, log_p, strict=True)]
    reward, _, kl, _ = evaluate(graph, table, base)
    return TerminalOptimum(table, reward - beta * kl, reward, kl, gap, iteration)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise UnmaskError(f"beta must be greater than 0, not {beta!r}; best_reward is the limit of small beta")


def _action_values(level: Level, following: Tensor) -> Tensor:
    """(S, L) Q(s, a) = sum_v p(v|s, a) V(s'), with V of the next level's boards in ``following``."""
    shape = level.observation.masked.shape
    flat = following.new_zeros(shape).flatten()
    index = level.parent * shape[1] + level.position
    return flat.index_add(0, index, level.log_fill.exp() * following[level.child]).view(shape)


def _soft_value(graph: Graph, table: Table, terminal: list[Tensor], beta: Tensor) -> tuple[Tensor, Table]:
    """(P,) value and policy table of :func:`soft_optimal` for rewards ``terminal`` of boards; ``beta`` (P,)."""
    value, policy = terminal[-1], []
    for level, log_g, reward in reversed(list(zip(graph.levels, table, terminal, strict=True))):
        scale = beta[level.start]
        score = log_g + _action_values(level, value) / scale.unsqueeze(1)
        policy.append(masked_log_softmax(score, log_g > -INF))
        value = torch.where(level.complete, reward, scale * score.logsumexp(1))
    return value, policy[::-1]


def _hard_value(graph: Graph, table: Table, terminal: list[Tensor]) -> Tensor:
    """(P,) the most that a policy earns of rewards ``terminal`` of boards, going where ``table`` goes."""
    value = terminal[-1]
    for level, log_g, reward in reversed(list(zip(graph.levels, table, terminal, strict=True))):
        best = _action_values(level, value).masked_fill(log_g == -INF, -INF).amax(1)
        value = torch.where(level.complete, reward, best)
    return value
