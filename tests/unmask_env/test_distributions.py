"""Distributions over actions against sums over every action and every sequence of draws."""

import itertools
import math

import pytest
import torch

from tasks import UnmaskError
from unmask_env.distributions import Bernoulli, Categorical, NoClosedFormError, PlackettLuce


def bernoulli(log_odds: torch.Tensor, allowed: torch.Tensor) -> Bernoulli:
    return Bernoulli(torch.nn.functional.logsigmoid(log_odds).masked_fill(~allowed, -torch.inf), allowed)


def every_set(entries: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=entries)))


def by_sequences(rates: list[float]) -> dict[frozenset[int], float]:
    """P(set) of Plackett-Luce draws with a stop of rate 1, summed over all orders of drawing."""
    found: dict[frozenset[int], float] = {}

    def draw(drawn: tuple[int, ...], chance: float) -> None:
        left = [i for i in range(len(rates)) if i not in drawn]
        total = 1 + sum(rates[i] for i in left)
        found[frozenset(drawn)] = found.get(frozenset(drawn), 0.0) + chance / total
        for i in left:
            draw((*drawn, i), chance * rates[i] / total)

    draw((), 1.0)
    return found


@pytest.mark.parametrize("rates", [[1.0], [0.3, 2.0, 5.0], [1e-4, 1e3, 1.0, 40.0], [0.5, 0.5, 0.5, 3.0, 1e5, 1e-6]])
def test_plackett_luce_with_a_stop_is_the_sum_over_sequences(rates: list[float]) -> None:
    log_rates = torch.tensor(rates).log()
    for chosen, chance in by_sequences(rates).items():
        action = torch.tensor([[i in chosen for i in range(len(rates))]])
        found = PlackettLuce(log_rates[None], torch.ones_like(action)).log_prob(action)
        assert float(found) == pytest.approx(math.log(chance), abs=2e-4)


def test_probabilities_sum_to_one_over_the_allowed_sets() -> None:
    g = torch.Generator().manual_seed(0)
    log_odds, allowed = 3 * torch.randn(5, 6, generator=g), torch.rand(5, 6, generator=g) < 0.7
    allowed[4] = False
    for distribution in (PlackettLuce(log_odds, allowed), bernoulli(log_odds, allowed)):
        each = torch.stack([distribution.log_prob(s.expand(5, -1)) for s in every_set(6)])
        torch.testing.assert_close(each.logsumexp(0), torch.zeros(5), atol=1e-4, rtol=0)
        outside = torch.stack([(s & ~allowed).any(1) for s in every_set(6)])
        assert (each[outside] == -torch.inf).all()


@pytest.mark.parametrize("kind", [PlackettLuce, bernoulli])
def test_samples_of_sets_follow_their_distribution(kind) -> None:
    log_odds = torch.tensor([0.5, -1.0, 2.0])
    allowed = torch.ones(20_000, 3, dtype=torch.bool)
    drawn = kind(log_odds.expand(20_000, 3), allowed).sample(torch.Generator().manual_seed(1))
    one = kind(log_odds[None], allowed[:1])
    torch.testing.assert_close(
        drawn.float().mean(0), log_odds.sigmoid(), atol=0.02, rtol=0
    )  # both have these marginals
    for s in every_set(3):
        wanted = float(one.log_prob(s[None]).exp())
        assert float((drawn == s).all(1).float().mean()) == pytest.approx(wanted, abs=4 * (0.25 / 20_000) ** 0.5)


def test_the_kl_and_entropy_of_independent_entries_are_sums_over_sets() -> None:
    g = torch.Generator().manual_seed(2)
    allowed = torch.tensor([[True, True, False, True], [True] * 4])
    p, q = (bernoulli(2 * torch.randn(2, 4, generator=g), allowed) for _ in range(2))
    total, entropy = torch.zeros(2), torch.zeros(2)
    for s in every_set(4):
        log_p, log_q = (x.log_prob(s.expand(2, -1)) for x in (p, q))
        total += torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
        entropy -= torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0)
    torch.testing.assert_close(p.kl(q), total)
    torch.testing.assert_close(p.entropy(), entropy)
    certain = Bernoulli(torch.tensor([[0.0, -torch.inf, -torch.inf, 0.0]]), allowed[:1])
    assert certain.kl(certain).tolist() == [0.0]
    assert certain.entropy().tolist() == [0.0]


def test_the_mode_of_independent_entries_is_the_likeliest_set() -> None:
    g = torch.Generator().manual_seed(3)
    allowed = torch.rand(20, 4, generator=g) < 0.8
    p = bernoulli(2 * torch.randn(20, 4, generator=g), allowed)
    best = torch.stack([p.log_prob(s.expand(20, -1)) for s in every_set(4)]).argmax(0)
    assert torch.equal(p.mode(), every_set(4)[best])


@pytest.mark.parametrize("kind", [PlackettLuce, bernoulli])
def test_the_cross_entropy_to_a_deterministic_target_is_the_sum_over_sets(kind) -> None:
    p = kind(torch.tensor([[0.5, -1.0, 2.0], [-3.0, 0.2, 0.1]]), torch.ones(2, 3, dtype=torch.bool))
    chosen = torch.tensor([[True, False, True], [False, False, False]])
    target = Bernoulli(torch.zeros(2, 3).masked_fill(~chosen, -torch.inf), torch.ones(2, 3, dtype=torch.bool))
    total = torch.zeros(2)
    for s in every_set(3):
        mass = target.log_prob(s.expand(2, -1)).exp()
        total -= torch.where(mass > 0, mass * p.log_prob(s.expand(2, -1)), 0.0)
    assert (total > 0.1).all()
    torch.testing.assert_close(p.cross_entropy(target), total)


def test_a_kl_to_what_excludes_an_allowed_entry_is_infinite() -> None:
    allowed = torch.ones(4, 2, dtype=torch.bool)
    p = bernoulli(torch.zeros(4, 2), allowed)
    others = torch.tensor([[-0.7, -0.7], [-torch.inf, -0.7], [-0.7, 0.0], [-torch.inf, 0.0]])  # even, never, always
    assert p.kl(Bernoulli(others, allowed)).isinf().tolist() == [False, True, True, True]
    certain = Bernoulli(torch.tensor([[-torch.inf, 0.0]]), allowed[:1])
    torch.testing.assert_close(certain.kl(bernoulli(torch.zeros(1, 2), allowed[:1])), torch.tensor([2 * math.log(2)]))
    assert certain.kl(Bernoulli(others[3:], allowed[:1])).tolist() == [0.0]


def test_gradients_are_finite_and_right() -> None:
    log_rates = torch.tensor([[0.3, -2.0, 8.0, -9.0]], dtype=torch.float64, requires_grad=True)
    allowed = torch.ones(1, 4, dtype=torch.bool)
    for s in every_set(4):
        assert torch.autograd.gradcheck(
            lambda x, s=s: PlackettLuce(x, allowed).log_prob(s[None]), (log_rates,), eps=1e-5, atol=1e-4
        )


def test_gradients_are_finite_however_sure_an_entry_is() -> None:
    """At odds of e^20, 1 - p is 0 in float32, and the formula that is not taken there has an infinite slope."""
    odds = torch.tensor([[-30.0, -20.0, -1.0, 1.0, 20.0, 30.0]], requires_grad=True)
    allowed = torch.ones(1, 6, dtype=torch.bool)
    for action in (odds > 0, odds < 0, odds > 10):
        (gradient,) = torch.autograd.grad(bernoulli(odds, allowed).log_prob(action).sum(), odds)
        # d log P / d odds is 1 - p inside the set and -p outside.
        expected = torch.where(action, torch.sigmoid(-odds), -torch.sigmoid(odds))
        torch.testing.assert_close(gradient, expected.detach(), atol=1e-5, rtol=1e-3)
    kl = bernoulli(odds, allowed).kl(Bernoulli(torch.full_like(odds, -0.7).detach(), allowed)).sum()
    assert torch.autograd.grad(kl, odds)[0].isfinite().all()


def test_gradients_are_finite_at_certainty() -> None:
    """Entries of probability exactly 1 and 0, of actions that agree with them."""
    log_p = torch.tensor([[0.0, -torch.inf, -0.5, -1.0]], requires_grad=True)
    action = torch.tensor([[True, False, True, False]])
    p = Bernoulli(log_p, torch.ones_like(action))
    (gradient,) = torch.autograd.grad(p.log_prob(action).sum(), log_p)
    outside = -math.exp(-1) / (1 - math.exp(-1))  # d log(1 - e^l) / dl
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0, 1.0, outside]]))
    for value in (p.entropy(), p.kl(Bernoulli(torch.full((1, 4), -0.7), torch.ones_like(action)))):
        assert torch.autograd.grad(value.sum(), log_p, retain_graph=True)[0].isfinite().all()
    allowed = torch.tensor([[True, True, True, False]])
    scores = torch.tensor([[200.0, 0.0, -200.0, 0.0]], requires_grad=True)  # softmax: exactly 1 and 0 in float32
    one, even = Categorical.of(scores, allowed), Categorical.of(torch.zeros(1, 4), allowed)
    for value in (one.kl(even), even.kl(one), one.entropy(), one.log_prob(torch.tensor([[True, False, False, False]]))):
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), scores, retain_graph=True)[0].isfinite().all()


# ---------------------------------------------------------------------- one position
def categorical(seed: int) -> tuple[Categorical, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([[True, True, False, True], [False, True, False, False], [False] * 4])
    return Categorical.of(torch.randn(3, 4, generator=g), allowed), allowed


def test_a_categorical_by_enumeration() -> None:
    """Over all 16 actions: those of one allowed position have the mass, and all formulas are sums over them."""
    (p, allowed), (q, _) = categorical(0), categorical(1)
    log_p, log_q = (torch.stack([d.log_prob(s.expand(3, -1)) for s in every_set(4)], 1) for d in (p, q))  # (3, 16)
    torch.testing.assert_close(log_p.exp().sum(1), torch.tensor([1.0, 1.0, 0.0]))
    for row, s in itertools.product(range(2), range(16)):
        action = every_set(4)[s]
        one = int(action.sum()) == 1 and bool((action & allowed[row]).any())
        assert (log_p[row, s] > -torch.inf) == one
    ratio = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(1)
    torch.testing.assert_close(p.kl(q), ratio)
    torch.testing.assert_close(p.entropy(), -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(1))
    torch.testing.assert_close(p.cross_entropy(q), q.entropy() + q.kl(p))
    assert p.mode()[2].any() == False  # noqa: E712 - a row without an allowed position gives the empty action
    best = log_p[:2].argmax(1)
    assert torch.equal(p.mode()[:2], every_set(4)[best])


def test_the_kl_of_categoricals_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], requires_grad=True)
    q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    kl = Categorical(p.log()).kl(Categorical(q.log()))
    expected = [0.5 * math.log(2) - 0.25 * math.log(2), math.log(5), 0.0, math.inf]
    torch.testing.assert_close(kl, torch.tensor(expected))
    log_p = p[:3].detach().log().requires_grad_()
    Categorical(log_p).kl(Categorical(q[:3].log())).sum().backward()
    assert log_p.grad.isfinite().all()
    # d/dl of e^l (l - m) is e^l (1 + l - m)
    torch.testing.assert_close(log_p.grad[0], torch.tensor([0.5 * (1 + math.log(2)), 0.25, 0.25 * (1 - math.log(2))]))


def test_the_cross_entropy_of_categoricals_by_hand() -> None:
    """One best position, a tie split evenly; positions outside the target's support do not count, even at -inf."""
    target = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    log_pi = torch.tensor([[0.2, 0.3, 0.5], [0.25, 0.25, 0.5], [0.0, 1.0, 0.0]]).log().requires_grad_()
    value = Categorical(log_pi).cross_entropy(Categorical(target.log()))
    torch.testing.assert_close(value, torch.tensor([-math.log(0.3), 1.5 * math.log(2), 0.0]))
    value.sum().backward()
    assert torch.equal(log_pi.grad, -target)


def test_samples_of_a_categorical_follow_it() -> None:
    p, _ = categorical(0)
    many = Categorical(p.log_probs[:1].expand(20_000, -1))
    drawn = many.sample(torch.Generator().manual_seed(0))
    assert (drawn.sum(1) == 1).all()
    torch.testing.assert_close(drawn.float().mean(0), p.log_probs[0].exp(), atol=0.02, rtol=0)
    assert torch.equal(drawn, many.sample(torch.Generator().manual_seed(0)))


def test_temperatures_by_hand() -> None:
    p = Categorical(torch.tensor([[0.2, 0.8, 0.0]]).log())
    torch.testing.assert_close(p.tempered(0.5).log_probs.exp(), torch.tensor([[0.04, 0.64, 0.0]]) / 0.68)
    assert p.tempered(1.0) is p
    assert Categorical(torch.full((1, 3), -torch.inf)).tempered(0.5).log_probs.isneginf().all()
    with pytest.raises(UnmaskError, match="Bernoulli actions are sampled at temperature 1, not"):
        bernoulli(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)).tempered(0.5)


def test_what_has_no_closed_form_says_so() -> None:
    p = PlackettLuce(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))
    for ask in (lambda: p.kl(p), p.entropy):
        with pytest.raises(NoClosedFormError, match="has no closed form"):
            ask()


@pytest.mark.parametrize("kind", [PlackettLuce, bernoulli])
def test_entries_are_in_the_set_with_their_probability(kind) -> None:
    """By the sum over all sets that hold the entry; of sets the libraries' logits are the log-odds of that."""
    log_odds, allowed = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[True, True, False]])
    p = kind(log_odds, allowed)
    chance = torch.stack([p.log_prob(s[None]).exp() for s in every_set(3)])  # (8, 1)
    expected = (chance * every_set(3)).sum(0)
    torch.testing.assert_close(p.entry_log_probs().exp()[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(p.logits()[0, :2], log_odds[0, :2])
    both = p.sb3_logits().view(3, 2)
    torch.testing.assert_close(both.exp().sum(1), torch.ones(3))


@pytest.mark.parametrize("kind", [PlackettLuce, bernoulli])
def test_a_remask_budget_keeps_the_likeliest(kind) -> None:
    log_odds = torch.tensor([[9.0, -9.0, 3.0, 5.0]]).repeat(100, 1)
    allowed = torch.ones(100, 4, dtype=torch.bool)
    distribution = kind(log_odds, allowed)
    distribution.remasks_left = torch.tensor([1]).expand(100)
    assert distribution.mode()[0].tolist() == [True, False, False, True]
    drawn = distribution.sample(torch.Generator().manual_seed(0))
    assert drawn[:, 2:].sum(1).max() == 1
    free = kind(log_odds, allowed).sample(torch.Generator().manual_seed(0))
    assert (drawn[:, :2] == free[:, :2]).all(), "filling is untouched"
    assert free[:, 2:].sum(1).max() == 2
