"""Laws of sets against sums over every set and every sequence of draws."""

import itertools
import math

import pytest
import torch

from unmask_env import set_laws


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
        found = set_laws.stopping_log_prob(log_rates[None], torch.ones_like(action), action)
        assert float(found) == pytest.approx(math.log(chance), abs=2e-4)


def test_probabilities_sum_to_one_over_the_allowed_sets() -> None:
    g = torch.Generator().manual_seed(0)
    log_odds, choices = 3 * torch.randn(5, 6, generator=g), torch.rand(5, 6, generator=g) < 0.7
    choices[4] = False
    log_inclusion = set_laws.log_odds_to_inclusion(log_odds, choices)
    for law, parameters in ((set_laws.stopping_log_prob, log_odds), (set_laws.independent_log_prob, log_inclusion)):
        each = torch.stack([law(parameters, choices, s.expand(5, -1)) for s in every_set(6)])
        torch.testing.assert_close(each.logsumexp(0), torch.zeros(5), atol=1e-4, rtol=0)
        outside = torch.stack([(s & ~choices).any(1) for s in every_set(6)])
        assert (each[outside] == -torch.inf).all()


@pytest.mark.parametrize("law", ["stopping", "independent"])
def test_samples_follow_the_law(law: str) -> None:
    log_odds = torch.tensor([0.5, -1.0, 2.0])
    choices = torch.ones(20_000, 3, dtype=torch.bool)
    many = log_odds.expand(20_000, 3)
    generator = torch.Generator().manual_seed(1)
    if law == "stopping":
        drawn = set_laws.stopping_sample(many, choices, generator)
        log_prob = set_laws.stopping_log_prob
    else:
        many = set_laws.log_odds_to_inclusion(many, choices)
        drawn = set_laws.independent_sample(many, choices, generator)
        log_prob = set_laws.independent_log_prob
    torch.testing.assert_close(
        drawn.float().mean(0), log_odds.sigmoid(), atol=0.02, rtol=0
    )  # both have these marginals
    for s in every_set(3):
        wanted = float(log_prob(many[:1], choices[:1], s[None]).exp())
        assert float((drawn == s).all(1).float().mean()) == pytest.approx(wanted, abs=4 * (0.25 / 20_000) ** 0.5)


def test_divergence_of_independent_laws_is_the_sum_over_sets() -> None:
    g = torch.Generator().manual_seed(2)
    choices = torch.tensor([[True, True, False, True], [True] * 4])
    p, q = (set_laws.log_odds_to_inclusion(2 * torch.randn(2, 4, generator=g), choices) for _ in range(2))
    total = torch.zeros(2)
    for s in every_set(4):
        log_p, log_q = (set_laws.independent_log_prob(x, choices, s.expand(2, -1)) for x in (p, q))
        total += torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
    torch.testing.assert_close(set_laws.independent_kl(p, q, choices), total)
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf, 0.0]])
    assert set_laws.independent_kl(certain, certain, choices[:1]).tolist() == [0.0]


def test_gradients_are_finite_and_right() -> None:
    log_rates = torch.tensor([[0.3, -2.0, 8.0, -9.0]], dtype=torch.float64, requires_grad=True)
    choices = torch.ones(1, 4, dtype=torch.bool)
    for s in every_set(4):
        assert torch.autograd.gradcheck(
            lambda x, s=s: set_laws.stopping_log_prob(x, choices, s[None]), (log_rates,), eps=1e-5, atol=1e-4
        )


def test_gradients_are_finite_however_sure_an_entry_is() -> None:
    """At odds of e^20, 1 - p is 0 in float32, and the formula that is not taken there has an infinite slope."""
    odds = torch.tensor([[-30.0, -20.0, -1.0, 1.0, 20.0, 30.0]], requires_grad=True)
    choices = torch.ones(1, 6, dtype=torch.bool)
    for action in (odds > 0, odds < 0, odds > 10):
        log_p = set_laws.log_odds_to_inclusion(odds, choices)
        (gradient,) = torch.autograd.grad(set_laws.independent_log_prob(log_p, choices, action).sum(), odds)
        # d log P / d odds is 1 - p inside the set and -p outside.
        expected = torch.where(action, torch.sigmoid(-odds), -torch.sigmoid(odds))
        torch.testing.assert_close(gradient, expected.detach(), atol=1e-5, rtol=1e-3)
    log_p = set_laws.log_odds_to_inclusion(odds, choices)
    kl = set_laws.independent_kl(log_p, torch.full_like(odds, -0.7).detach(), choices).sum()
    assert torch.autograd.grad(kl, odds)[0].isfinite().all()
