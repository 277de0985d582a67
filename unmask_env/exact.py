"""Exact solutions of the unmasking decision process on boards small enough to list, in float64.

A state is a board, an action an open position, and the frozen denoiser fills it: with its most likely symbol
(temperature 0), or with symbol v in proportion to p_i(v)^(1 / T). A complete board earns ``task.reward``. For a
reference policy g the regularised objective is J(pi) = E[r(x_0)] - beta * sum_n E KL(pi(.|s_n) || g(.|s_n)).

Shapes: N instances, P starts (distinct instance boards), S boards and E edges of one level, L positions, V symbols.
A policy is an order, or its table: per level (S, L) log-probabilities. KLs are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tasks import Instances, Task, UnmaskError
from unmask_env.core import Denoised, Observation, Order, masked_log_softmax
from unmask_env.denoiser import Denoiser
from unmask_env.reference import Random

INF = math.inf
MAX_HOLES = 16
MAX_HOLES_OF_SETS = 12
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
        return ~self.observation.open.any(1)


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
        return len(self.weight)

    @property
    def boards(self) -> int:
        return sum(len(level.start) for level in self.levels)


@torch.no_grad()
def enumerate_boards(
    task: Task,
    denoiser: Denoiser,
    instances: Instances,
    temperature: float = 0.0,
    max_states: int = 300_000,
    batch: int = 2048,
    hidden: bool = False,
) -> Graph:
    """All boards reachable from ``instances``, level by level; each is denoised once, ``batch`` at a time.

    Instances with the same board are one start, and a complete board's reward is the mean over that start's answers:
    an order does not see the answer, so that mean is all it can raise. Boards of different starts are kept apart; where
    two starts share a board, optima are upper bounds for an order that sees the board alone.

    Args:
        temperature: 0 fills greedily; above 0, symbols of probability 0 are left out.
        hidden: keep the denoiser's hidden states, for orders that read them.

    Raises:
        TooLargeError: more than 16 holes in an instance, or more than ``max_states`` boards.
        UnmaskError: a negative temperature, or a denoiser that gives no symbol any probability.
    """
    check_holes(task, instances)
    instances = instances.to(denoiser.device)
    tokens, start_of, count = instances.tokens.unique(dim=0, return_inverse=True, return_counts=True)
    start = torch.arange(len(tokens), device=tokens.device)
    by_start = instances[start_of.argsort()]
    levels: list[Level] = []
    total = 0
    while len(tokens):
        total += len(tokens)
        if total > max_states:
            raise TooLargeError(
                f"{len(count)} starts reach at least {total} boards, and {max_states} are allowed; take fewer blanks, "
                "fewer instances or greedy filling (temperature 0), or raise max_states"
            )
        observation, (parent, position, symbol, log_fill) = _expand(task, denoiser, tokens, temperature, batch, hidden)
        reward = _mean_reward(task, observation, start, by_start, count)
        child, tokens, following = _merge(task, tokens, start, parent, position, symbol)
        levels.append(Level(observation, start, reward, parent, position, child, log_fill))
        start = following
    return Graph(levels, start_of, count.double() / len(instances))


def _expand(
    task: Task, denoiser: Denoiser, tokens: Tensor, temperature: float, batch: int, hidden: bool
) -> tuple[Observation, list[Tensor]]:
    """The observation of the boards, and per edge: row, position, symbol, log-probability of the symbol."""
    is_open = tokens == task.mask_id
    outputs: list[Denoised] = []
    edges: list[tuple[Tensor, ...]] = []
    for some, open_here in zip(tokens.split(batch), is_open.split(batch), strict=True):
        output = denoiser(some)
        outputs.append(output if hidden else output._replace(hidden=None))
        log_fill = _log_fill(outputs[-1], temperature)
        likely = (log_fill > -INF) & open_here.unsqueeze(2)
        if not torch.equal(likely.any(2), open_here):
            raise UnmaskError("the denoiser gives every symbol probability 0 somewhere; take instances that it allows")
        row, position, symbol = likely.nonzero(as_tuple=True)
        edges.append((row + len(edges) * batch, position, symbol, log_fill[row, position, symbol]))
    joined = [torch.cat(column) for column in zip(*edges, strict=True)]
    return Observation(tokens, is_open, Denoised.join(outputs, torch.cat)), joined


def _mean_reward(task: Task, observation: Observation, start: Tensor, by_start: Instances, count: Tensor) -> Tensor:
    """(S,) the mean over the start's answers, 0 on incomplete boards; ``count`` (P,) instances have each start."""
    reward = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    first = count.cumsum(0) - count
    for nth in range(int(count.max())):
        rows = (~observation.open.any(1) & (count[start] > nth)).nonzero().squeeze(1)
        if not len(rows):
            break
        reward[rows] += task.reward(observation.tokens[rows], by_start[first[start[rows]] + nth]).double()
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


def _log_fill(denoised: Denoised, temperature: float) -> Tensor:
    """(N, L, V) float64 log-probability that a position, once chosen, is filled with a symbol."""
    if temperature < 0:
        raise UnmaskError(f"temperature must be 0 (greedy filling) or more, not {temperature}")
    log_probs = denoised.log_probs.double()
    if temperature == 0:
        best = denoised.log_probs.argmax(-1, keepdim=True)
        return torch.full_like(log_probs, -INF).scatter(-1, best, 0.0)
    return masked_log_softmax(log_probs / temperature, log_probs > -INF)


def check_holes(task: Task, instances: Instances, most: int = MAX_HOLES) -> None:
    """Raises :class:`TooLargeError` if an instance has more than ``most`` holes."""
    holes = int((instances.tokens == task.mask_id).sum(1).max()) if len(instances) else 0
    if holes > most:
        raise TooLargeError(f"an instance has {holes} holes, and {most} are allowed; take instances of fewer blanks")


# ---------------------------------------------------------------------- policies as tables
def tabulate(graph: Graph, order: Order, batch: int = 4096) -> Table:
    """The policy table of an order: per level (S, L) float64 log-probabilities, -inf on complete boards' rows.

    The order is asked about ``batch`` incomplete boards at a time; gradients reach its parameters.
    """
    table = []
    for level in graph.levels:
        rows = (~level.complete).nonzero().squeeze(1)
        log_prob = torch.full(level.observation.open.shape, -INF, dtype=torch.float64, device=rows.device)
        if len(rows):
            asked = torch.cat([_ask(order, level.observation[some]) for some in rows.split(batch)])
            log_prob = log_prob.index_put((rows,), asked)
        table.append(log_prob)
    return table


class TableOrder:
    """A policy table as an order, for rollouts; where several starts share a board, the shallowest one's row counts."""

    def __init__(self, graph: Graph, table: Table) -> None:
        boards = torch.cat([level.observation.tokens for level in graph.levels]).cpu().numpy()
        self.row = {board.tobytes(): row for row, board in reversed(list(enumerate(boards)))}
        self.table = torch.cat(table)

    def log_prob(self, observation: Observation) -> Tensor:
        """(N, L) float64 log-probabilities.

        Raises:
            UnmaskError: a board that is not in the graph.
        """
        rows = [self.row.get(board.tobytes()) for board in observation.tokens.cpu().numpy()]
        if None in rows:
            board = observation.tokens[rows.index(None)].tolist()
            raise UnmaskError(f"board {board} is not in the graph; enumerate it with this denoiser and temperature")
        return self.table[torch.tensor(rows, device=self.table.device)]


def _ask(order: Order, observation: Observation) -> Tensor:
    """(N, L) float64 log-probabilities, normalised anew: in float32 they sum to one to 1e-7 only."""
    log_prob = order.log_prob(observation).double()
    return masked_log_softmax(log_prob, log_prob > -INF)


def _table(graph: Graph, policy: Order | Table) -> Table:
    return policy if isinstance(policy, list) else tabulate(graph, policy)


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


def evaluate(graph: Graph, policy: Order | Table, reference: Order | Table | None = None) -> Values:
    """What ``policy`` earns and how far it goes from ``reference``; differentiable in both tables."""
    table = _table(graph, policy)
    log_visits = _log_visits(graph, table)
    visits = [log_visit.exp() for log_visit in log_visits]
    reward = _sum_by_start(graph, [p * level.reward for p, level in zip(visits, graph.levels, strict=True)])
    if reference is None:
        return Values(reward, None, None, visits)
    other = _table(graph, reference)
    trajectory_kl = _trajectory_kl(graph, visits, table, other)
    return Values(reward, trajectory_kl, _terminal_kl(graph, log_visits, _log_visits(graph, other)), visits)


def finished(graph: Graph, policy: Order | Table) -> tuple[Tensor, Tensor, Tensor]:
    """The exact distribution of finished sequences: tokens (C, L), start (C,), probability (C,) given the start."""
    log_visits = _log_visits(graph, _table(graph, policy))
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
    top = torch.full((size,), -INF, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce(0, index, values.detach(), "amax")
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
    """(P,) the largest E[r(x_0)] of any order, which is what the denoiser leaves to win (beta to 0)."""
    return _hard_value(graph, tabulate(graph, Random()), [level.reward for level in graph.levels])


@torch.no_grad()
def soft_optimal(graph: Graph, reference: Order | Table, beta: float) -> Optimum:
    """The policy that maximises J: pi*(a|s) in proportion to g(a|s) exp(Q(s, a) / beta), by backward recursion.

    V(s) = beta log sum_a g(a|s) exp(Q(s, a) / beta) and Q(s, a) = sum_v p(v|s, a) V(s'), with V = r on complete boards
    (KL control; Todorov 2009, doi 10.1073/pnas.0710743106).

    Raises:
        UnmaskError: beta is not above 0.
    """
    _check_beta(beta)
    table = _table(graph, reference)
    reward = [level.reward for level in graph.levels]
    value, policy = _soft_value(graph, table, reward, torch.full_like(graph.weight, beta))
    earned = evaluate(graph, policy, table)
    return Optimum(policy, value, earned.reward, earned.trajectory_kl)


@torch.no_grad()
def terminal_optimal(
    graph: Graph, reference: Order | Table, beta: float, tolerance: float = 1e-6, max_iterations: int = 10_000
) -> TerminalOptimum:
    """Maximises UPO's output-level objective E[r(x_0)] - beta * KL(p_pi || p_g) over policies that go where g goes.

    With greedy filling the answer is :func:`soft_optimal`'s, found in one step. In general: mirror descent in path
    space, where pi_{k+1} is soft-optimal for reference pi_k, temperature beta / step and terminal reward
    r - beta log(p_k / p_g), from pi_0 = g. Terminal KL is at most path KL, so the objective is beta-smooth relative to
    path KL: step 1 never lowers it and leaves an error of at most beta * KL_path(pi* || g) / k (Lu, Freund and
    Nesterov 2018, arXiv 1610.05708). Longer steps are tried, start by start, and kept where
    step * KL(p_{k+1} || p_k) <= KL_path(pi_{k+1} || pi_k), which is all that the proof needs.

    It stops once the Frank-Wolfe gap, the most that any policy gains to first order, is below ``tolerance`` at every
    start, or after ``max_iterations``; ``gap`` says how far it got.

    Raises:
        UnmaskError: beta is not above 0.
    """
    _check_beta(beta)
    base = table = _table(graph, reference)
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
    earned = evaluate(graph, table, base)
    value = earned.reward - beta * earned.terminal_kl
    return TerminalOptimum(table, value, earned.reward, earned.terminal_kl, gap, iteration)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise UnmaskError(f"beta must be greater than 0, not {beta!r}; best_reward is the limit of small beta")


def _action_values(level: Level, following: Tensor) -> Tensor:
    """(S, L) Q(s, a) = sum_v p(v|s, a) V(s'), with V of the next level's boards in ``following``."""
    shape = level.observation.open.shape
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


# ---------------------------------------------------------------------- one sequence
@torch.no_grad()
def sequence_log_prob(
    task: Task, denoiser: Denoiser, order: Order, instances: Instances, temperature: float = 1.0, batch: int = 2048
) -> Tensor:
    """(N,) float64 log-probability that ``order`` finishes with exactly ``instances.answers``.

    By the subset dynamic programme P(S) = sum_{i in S} P(S - i) pi(i | x on S - i) p(x_i | x on S - i) over the 2^n
    sets S of filled holes, so no other sequence is listed.

    Raises:
        TooLargeError: more than 16 holes in an instance. UnmaskError: a negative temperature.
    """
    check_holes(task, instances)
    instances = instances.to(denoiser.device)
    found = []
    for tokens, answer in zip(instances.tokens, instances.answers, strict=True):
        holes = (tokens == task.mask_id).nonzero().squeeze(1)
        bits = 2 ** torch.arange(len(holes), device=tokens.device)
        filled = (torch.arange(2 ** len(holes), device=tokens.device).unsqueeze(1) & bits) > 0  # (2^n, n)
        flow = []
        for some in filled.split(batch):
            boards = tokens.repeat(len(some), 1)
            boards[:, holes] = torch.where(some, answer[holes], task.mask_id)
            denoised = denoiser(boards)
            where = _ask(order, Observation(boards, boards == task.mask_id, denoised))
            flow.append(where[:, holes] + _log_fill(denoised, temperature)[:, holes, answer[holes]])
        found.append(_subset_log_prob(filled, torch.cat(flow)))
    possible = ((instances.tokens == task.mask_id) | (instances.tokens == instances.answers)).all(1)
    return torch.stack(found).masked_fill(~possible, -INF)


def _subset_log_prob(filled: Tensor, flow: Tensor) -> Tensor:
    """log P(all holes), where ``flow`` (2^n, n) is the log-probability of each next hole after the sets ``filled``."""
    hole = torch.arange(filled.shape[1], device=filled.device)
    log_p = torch.zeros(len(filled), dtype=torch.float64, device=filled.device)
    size = filled.sum(1)
    for n in range(1, len(hole) + 1):
        sets = (size == n).nonzero().squeeze(1)
        before = (sets.unsqueeze(1) - 2**hole).clamp(min=0)  # (C, n); where the set lacks the hole, masked below
        log_p[sets] = (log_p[before] + flow[before, hole]).masked_fill(~filled[sets], -INF).logsumexp(1)
    return log_p[-1]


# ---------------------------------------------------------------------- sets
@torch.no_grad()
def fewest_forwards(task: Task, denoiser: Denoiser, instances: Instances, batch: int = 2048) -> Tensor:
    """(N,) float64: the fewest forwards in which sets of positions, filled greedily and never opened again, can restore
    each instance's own answer; inf where no sequence of sets does.

    n(A) = 0 where every hole is filled, and else 1 + min n(A') over A' that adds to A some positions whose top symbol
    is right on the board with the holes A filled: a recursion over the 2^H boards without a mistake, 3^H steps in all.
    No order that plays so, learned or not, restores more answers in as many forwards.

    Raises:
        TooLargeError: more than 12 holes in an instance. UnmaskError: a task with several right answers.
    """
    if not task.one_answer:
        raise UnmaskError(
            f"{task.name} has several right answers; the fewest forwards are counted towards the only one"
        )
    check_holes(task, instances, MAX_HOLES_OF_SETS)
    instances = instances.to(denoiser.device)
    fewest = torch.zeros(len(instances), dtype=torch.float64, device=denoiser.device)
    holes = (instances.tokens == task.mask_id).sum(1)
    for count in holes.unique().tolist():
        rows = (holes == count).nonzero().squeeze(1)
        for some in rows.split(max(1, 2**17 >> count)) if count else ():
            fewest[some] = _fewest(task, denoiser, instances[some], count, batch)
    possible = ((instances.tokens == task.mask_id) | (instances.tokens == instances.answers)).all(1)
    return fewest.masked_fill(~possible, INF)


def _fewest(task: Task, denoiser: Denoiser, instances: Instances, count: int, batch: int) -> Tensor:
    """(N,) :func:`fewest_forwards` of instances with ``count`` holes each."""
    n, device = len(instances), instances.tokens.device
    where = (instances.tokens == task.mask_id).nonzero()[:, 1].view(n, count)
    bit = 2 ** torch.arange(count, device=device)
    sets = torch.arange(2**count, device=device)
    member = (sets.unsqueeze(1) & bit) > 0  # (2^H, H)
    answer = instances.answers.gather(1, where)  # (N, H)
    reach = torch.empty(n, len(sets), dtype=torch.long, device=device)  # what is filled, or would be filled rightly
    boards = torch.arange(n * len(sets), device=device)
    for some in boards.split(batch):
        row, held = some // len(sets), member[some % len(sets)]
        tokens = instances.tokens[row].scatter(1, where[row], answer[row].masked_fill(~held, task.mask_id))
        right = denoiser(tokens).log_probs.argmax(-1).gather(1, where[row]) == answer[row]
        reach.view(-1)[some] = ((right | held) * bit).sum(1)
    fewest = torch.full((n, len(sets)), INF, dtype=torch.float64, device=device)
    fewest[:, -1] = 0
    for held in range(len(sets) - 2, -1, -1):
        larger = sets[(sets & held == held) & (sets != held)]
        allowed = larger & ~reach[:, held].unsqueeze(1) == 0
        fewest[:, held] = 1 + torch.where(allowed, fewest[:, larger], INF).min(1).values
    return fewest[:, 0]
