"""Samplers against the exact laws of finished sequences, summed over all orders (events) and all steps of time."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pretrain import likelihood
from pretrain.backbone import Backbone
from pretrain.masking import blocks_of
from pretrain.orders import PositionOrder
from pretrain.samplers import Remasking, nucleus, sample
from tasks import UnmaskError
from tests.oracles.boards import BOARDS, SEQUENCES, Exact, L, M, V, backbone, counted, generator, index
from tests.oracles.statistics import chi_square, plackett_luce_probability
from tests.toys import sweep

METHODS = ["event", "ancestral", "cached"]
MODELS = {
    "none": {},
    "positions": {"order": "positions"},
    "symbols": {"order": "symbols"},
    "context": {"order": "context"},
    "autoregressive": {"block_length": 1},
    "blocks": {"block_length": 2},
}
EMPTY = [M] * L


def prompts(n: int, board: list[int] = EMPTY) -> Tensor:
    return torch.tensor([board]).expand(n, L)


# ---------------------------------------------------------------------- exact laws
@torch.no_grad()
def predictions(model: Backbone, temperature: float = 1.0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of each of the 27 boards: (27, L, V) probabilities of symbols and (27, L) exponents, float64."""
    log_probs, own = model.order.reverse(*model(BOARDS))
    p = (log_probs.double() / temperature).softmax(-1)
    if top_p < 1:  # of two symbols: the likelier one alone if it reaches top_p
        p = torch.where((p >= top_p).any(-1, keepdim=True), (p >= top_p).double(), p)
    return p, own.double()


def law(transitions: list[Tensor], start: list[int]) -> Tensor:
    """(8,) probabilities of the complete sequences after steps with these (27, 27) matrices."""
    mass = torch.zeros(27, dtype=torch.float64)
    mass[index(torch.tensor(start))] = 1
    for transition in transitions:
        mass = mass @ transition
    return mass[index(SEQUENCES)]


def inside(model: Backbone) -> list[Tensor]:
    """(L,) bool per block, in the order in which they are filled."""
    block = blocks_of(L, model.block_length or L)
    return [block == b for b in range(int(block.max()) + 1)]


def event_law(model: Backbone, start: list[int] = EMPTY, **tuned: float) -> Tensor:
    p, own = predictions(model, **tuned)
    transitions = []
    for block in inside(model):
        transition = torch.zeros(27, 27, dtype=torch.float64)
        for row, board in enumerate(BOARDS):
            holes = ((board == M) & block).nonzero().flatten().tolist()
            if not holes:
                transition[row, row] = 1
            for i, v in itertools.product(holes, range(V)):
                after = board.clone()
                after[i] = v
                transition[row, index(after)] += own[row, i] / own[row, holes].sum() * p[row, i, v]
        transitions += [transition] * int(block.sum())
    return law(transitions, start)


def step_law(model: Backbone, steps: int, start: list[int] = EMPTY) -> Tensor:
    p, own = predictions(model)
    transitions = []
    for block in inside(model):
        for step in range(steps, 0, -1):
            stays = ((step - 1) / step) ** own
            transition = torch.ones(27, 27, dtype=torch.float64)
            for i in range(L):
                before, after = BOARDS[:, i].unsqueeze(1), BOARDS[:, i].unsqueeze(0)
                fills = (1 - stays[:, i]).unsqueeze(1) * p[:, i][:, BOARDS[:, i].clamp(max=V - 1)]
                filled = torch.where(after == M, stays[:, i].unsqueeze(1), fills)
                free = (before == M) & block[i]
                transition = transition * torch.where(free, filled, (before == after).double())
            transitions.append(transition)
    return law(transitions, start)


def frequencies(tokens: Tensor) -> Tensor:
    assert int(tokens.max()) < V, "no holes are left"
    return (tokens * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8).double()


@pytest.mark.parametrize("name", MODELS)
def test_the_exact_laws_agree_with_the_likelihoods_of_the_bounds(name):
    """Two enumerations: over boards here, over orders there. What bounds call -log p(x) is what samplers draw."""
    model = backbone(**MODELS[name])
    found = event_law(model)
    assert float(found.sum()) == pytest.approx(1)
    if model.block_length is None:
        torch.testing.assert_close(found, (-Exact(model).nll()).exp().detach(), rtol=1e-5, atol=1e-6)
    if model.block_length == 1:
        torch.testing.assert_close(
            found, (-likelihood.bound(model, SEQUENCES, generator()).path).exp(), rtol=1e-5, atol=1e-6
        )
    assert (found - 1 / 8).abs().max() > 0.05, "the weights prefer some sequences"


# ---------------------------------------------------------------------- laws of the samplers
@pytest.mark.parametrize("seed", [3, 0])
@pytest.mark.parametrize("name", MODELS)
def test_the_event_sampler_draws_from_the_sum_over_orders(name, seed):
    model = backbone(seed=seed, **MODELS[name])
    drawn = sample(model, prompts(20_000), generator(seed))
    chi_square(frequencies(drawn.tokens), event_law(model))
    assert drawn.nfe == L


@pytest.mark.parametrize("steps", sweep([1, 2, 5], lambda steps: steps == 2))
@pytest.mark.parametrize("name", MODELS)
def test_the_ancestral_sampler_draws_from_the_sum_over_steps(name, steps):
    model = backbone(**MODELS[name])
    drawn = sample(model, prompts(10_000), generator(1), "ancestral", steps=steps)
    chi_square(frequencies(drawn.tokens), step_law(model, steps))


@pytest.mark.parametrize("name", sweep(MODELS, "none".__eq__))
def test_ancestral_sampling_goes_to_the_event_law_as_steps_grow(name):
    """The difference is of the order of 1 / steps; with one position per block there is none."""
    model = backbone(**MODELS[name])
    exact = event_law(model)
    gaps = [float((step_law(model, steps) - exact).abs().sum() / 2) for steps in (1, 16, 64, 256)]
    if name == "autoregressive":
        assert max(gaps) < 1e-9
        return
    assert gaps[0] > 0.005
    assert gaps[1] > 2 * gaps[2] > 4 * gaps[3]
    assert gaps[3] < 0.01
    drawn = sample(model, prompts(4000), generator(2), "ancestral", steps=64)
    assert (frequencies(drawn.tokens) / 4000 - exact).abs().max() < gaps[2] + 5 * 0.5 / 4000**0.5


@pytest.mark.parametrize("steps", [1, 8, 50])
@pytest.mark.parametrize("name", MODELS)
def test_cached_sampling_is_ancestral_sampling_to_the_bit(name, steps):
    """With the same draws it gives the same sequences, so it has the same law."""
    model = backbone(**MODELS[name])
    for n in (1, 2, 40):
        plain, cached = (sample(model, prompts(n), generator(n), method, steps=steps) for method in METHODS[1:])
        assert torch.equal(plain.tokens, cached.tokens)
        assert cached.nfe <= plain.nfe


@pytest.mark.slow
def test_cached_sampling_has_the_exact_law_by_itself():
    """Row by row, where most steps reveal nothing and nothing is predicted anew."""
    model, n = backbone(order="context"), 1500
    drawn = torch.cat([sample(model, prompts(1), generator(seed), "cached", steps=5).tokens for seed in range(n)])
    chi_square(frequencies(drawn), step_law(model, 5))


def test_the_order_of_events_is_plackett_luce_where_exponents_are_constant():
    model, n = backbone(order="positions"), 20_000
    seen: list[Tensor] = []
    inner = model.forward
    model.forward = lambda tokens: (seen.append(tokens), inner(tokens))[1]
    final = sample(model, prompts(n), generator(5)).tokens
    rank = sum((tokens != M).long() for tokens in seen)  # visible in this many forwards: less is later
    assert torch.equal(rank.sort(1).values, torch.arange(L).expand(n, L))
    order = (L - 1 - rank).argsort(1)
    for before, after in itertools.pairwise([*seen, final]):
        assert ((before == M) & (after != M)).sum(1).tolist() == [1] * n, "one position at a time"
        assert torch.equal(before[before != M], after[before != M])
    counts = (order * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27).double()
    assert isinstance(model.order, PositionOrder)
    w = model.order.order_weights(final, None)[0].detach().double()
    orders = list(itertools.permutations(range(L)))
    found = counts[[9 * a + 3 * b + c for a, b, c in orders]]
    chi_square(found, torch.tensor([plackett_luce_probability(w, order) for order in orders]).double())


def test_blocks_are_filled_one_after_the_other():
    for method in METHODS:
        model = backbone(2)
        seen: list[Tensor] = []
        inner = model.forward
        model.forward = lambda tokens, seen=seen, inner=inner: (seen.append(tokens), inner(tokens))[1]
        sample(model, prompts(50), generator(), method, steps=5)
        for tokens in seen:
            first_open = (tokens[:, :2] == M).any(1).any()
            assert not first_open or (tokens[:, 2] == M).all()


# ---------------------------------------------------------------------- prompts
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_visible_symbols_never_change(name, method):
    model = backbone(**MODELS[name])
    given = BOARDS.repeat(20, 1)
    before = given.clone()
    drawn = sample(model, given, generator(1), method, steps=6)
    assert torch.equal(given, before), "the prompts are left as they were"
    assert torch.equal(drawn.tokens[given != M], given[given != M])
    assert (drawn.tokens != M).all()
    assert drawn.tokens.dtype == torch.int64


@pytest.mark.parametrize("start", sweep([[M, 1, M], [0, M, M], [M, M, 0]], lambda start: start[1] == 1, str))
@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_completed_with_the_exact_law(name, start):
    model, n = backbone(**MODELS[name]), 8000
    for method, exact in [("event", event_law(model, start)), ("ancestral", step_law(model, 3, start))]:
        counts = frequencies(sample(model, prompts(n, start), generator(2), method, steps=3).tokens)
        possible = exact > 0
        assert possible.sum() == 4
        assert counts[~possible].sum() == 0
        chi_square(counts[possible], exact[possible])


@pytest.mark.parametrize("method", METHODS)
def test_complete_and_missing_prompts(method):
    model = backbone()
    assert torch.equal(sample(model, SEQUENCES, generator(), method).tokens, SEQUENCES)
    assert sample(model, SEQUENCES, generator(), method).nfe == 0
    assert sample(model, torch.empty(0, L, dtype=torch.long), generator(), method).tokens.shape == (0, L)


# ---------------------------------------------------------------------- cost
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_forwards_are_counted(name, method):
    model = backbone(**MODELS[name])
    rows = counted(model, "forward")
    for start in (EMPTY, [M, 0, M], [0, 0, M]):
        rows.clear()
        drawn = sample(model, prompts(6, start), generator(1), method, steps=9)
        assert drawn.nfe == len(rows)
        assert set(rows) == {6}, "each is for all sequences"
        holes = [int((torch.tensor(start) == M)[block].sum()) for block in inside(model)]
        if method == "event":
            assert drawn.nfe == sum(holes)
        else:
            assert drawn.nfe <= 9 * sum(h > 0 for h in holes)


def test_the_event_sampler_takes_as_many_forwards_as_the_emptiest_prompt():
    given = torch.tensor([[0, 1, 1], [M, 1, 1], [M, M, 0]])
    assert sample(backbone(), given, generator()).nfe == 2


def test_how_many_forwards_steps_take():
    model, many = backbone(), prompts(500)
    assert sample(model, many, generator(), "ancestral", steps=7).nfe == 7, "some row is open until the end"
    assert sample(model, many, generator(), "ancestral", steps=1).nfe == 1
    for seed in range(12):
        one = sample(model, prompts(1), generator(seed), "cached", steps=300)
        assert one.nfe <= L, "a forward follows a change"
        assert one.nfe <= sample(model, prompts(1), generator(seed), "ancestral", steps=300).nfe <= 300
    assert any(sample(model, prompts(1), generator(s), "ancestral", steps=300).nfe < 300 for s in range(9)), (
        "nothing is predicted for complete sequences"
    )


# ---------------------------------------------------------------------- temperature and nucleus
@pytest.mark.parametrize("tuned", [{"temperature": 0.4}, {"temperature": 2.5}, {"top_p": 0.7}], ids=str)
@pytest.mark.parametrize("name", sweep(["none", "symbols", "context", "autoregressive"], "none".__eq__))
def test_settings_of_the_symbols_change_the_law_as_they_say(name, tuned):
    """The order keeps its law: only symbols are drawn more or less boldly."""
    model = backbone(**MODELS[name])
    exact = event_law(model, **tuned)
    assert (exact - event_law(model)).abs().max() > 0.01
    counts = frequencies(sample(model, prompts(20_000), generator(3), **tuned).tokens)
    likely = exact > 5e-4
    assert counts[exact == 0].sum() == 0
    chi_square(counts[likely] / counts[likely].sum() * 20_000, exact[likely] / exact[likely].sum())


@pytest.mark.parametrize("method", METHODS)
def test_temperature_zero_takes_the_most_likely_symbol(method):
    model = backbone(1)
    drawn = [sample(model, prompts(5), generator(seed), method, steps=4, temperature=0.0).tokens for seed in range(5)]
    expected = torch.full((1, L), M)
    for i in range(L):
        expected[:, i] = model(expected).logits[:, i].argmax(-1)
    for tokens in drawn:
        assert torch.equal(tokens, expected.expand(5, L))


@pytest.mark.parametrize("name", ["none", "context", "symbols"])
def test_temperature_zero_leaves_only_the_order_to_chance(name):
    """With one hole nothing is; from the empty board each sequence drawn is the greedy one of some order."""
    model = backbone(**MODELS[name])
    one_hole = BOARDS[(BOARDS == M).sum(1) == 1]
    drawn = [sample(model, one_hole, generator(seed), temperature=0.0).tokens for seed in range(5)]
    assert all(torch.equal(tokens, drawn[0]) for tokens in drawn)
    greedy = set()
    for order in itertools.permutations(range(L)):
        tokens = torch.full((1, L), M)
        for i in order:
            tokens[:, i] = model.order.reverse(*model(tokens))[0][:, i].argmax(-1)
        greedy.add(tuple(tokens[0].tolist()))
    found = {tuple(row) for row in sample(model, prompts(2000), generator(), temperature=0.0).tokens.tolist()}
    assert found == greedy


def test_the_nucleus_by_hand():
    p = torch.tensor([0.1, 0.5, 0.3, 0.1]).double()
    kept = {
        0.2: [0, 1, 0, 0],
        0.49: [0, 1, 0, 0],
        0.51: [0, 5, 3, 0],
        0.6: [0, 5, 3, 0],
        0.79: [0, 5, 3, 0],
        1.0: [1, 5, 3, 1],
    }
    for top_p, weights in kept.items():
        expected = torch.tensor(weights).double()
        found = nucleus(p.log(), 1.0, top_p).exp()
        torch.testing.assert_close(found, expected / expected.sum())
    # At temperature 1/2 the probabilities are squared: 1, 25, 9, 1 of 36; the first two then hold 34 / 36.
    torch.testing.assert_close(nucleus(p.log(), 0.5, 0.9).exp(), torch.tensor([0, 25, 9, 0]).double() / 34)
    torch.testing.assert_close(nucleus(p.log(), 0.5, 1.0).exp(), torch.tensor([1, 25, 9, 1]).double() / 36)


def test_the_nucleus_holds_top_p_with_as_few_symbols_as_can_be():
    log_probs = torch.randn(50, 3, 9, generator=generator(), dtype=torch.float64).log_softmax(-1)
    for top_p in (0.1, 0.5, 0.9, 0.999):
        kept = nucleus(log_probs, 1.0, top_p) > -math.inf
        p = log_probs.exp()
        held = (p * kept).sum(-1)
        assert (held >= top_p - 1e-12).all()
        least = torch.where(kept, p, 1.0).amin(-1)
        assert (held - least < top_p + 1e-12).all(), "without its last symbol it would hold less"
        assert (torch.where(kept, 0.0, p).amax(-1) <= least).all(), "the likeliest are in it"


def test_a_tiny_nucleus_and_a_tiny_temperature_are_greedy():
    model = backbone(1)
    greedy = sample(model, prompts(200), generator(), temperature=0.0).tokens
    assert torch.equal(sample(model, prompts(200), generator(), top_p=1e-6).tokens, greedy)
    for temperature in (1e-4, 1e-45, 1e-300):
        assert torch.equal(sample(model, prompts(200), generator(), temperature=temperature).tokens, greedy)


# ---------------------------------------------------------------------- draws and errors
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_generator_gives_the_same_samples(name, method):
    model = backbone(**MODELS[name])
    one, same, other = (sample(model, prompts(200), generator(s), method, steps=5).tokens for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_samples_carry_no_graph():
    assert not sample(backbone(order="context"), prompts(2), generator()).tokens.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "greedy"}, "method must be event, ancestral or cached, not 'greedy'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": -3}, "steps must be at least 1"),
        ({"temperature": -0.5}, "temperature at least 0"),
        ({"temperature": math.nan}, "temperature at least 0"),
        ({"top_p": 0.0}, "top_p above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p above 0 and at most 1"),
        ({"prompts": torch.full((2, L + 1), M)}, r"prompts must be \(N, 3\), not \(2, 4\)"),
        ({"prompts": torch.full((L,), M)}, r"prompts must be \(N, 3\), not \(3,\)"),
    ],
)
def test_settings_that_are_not_allowed(settings, message):
    with pytest.raises(UnmaskError, match=message) as caught:
        sample(backbone(), **{"prompts": prompts(2), "generator": generator()} | settings)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- remasking (ReMDM)
def remasking_law(model: Backbone, steps: int, remasking: Remasking) -> Tensor:
    """As step_law, with visible symbols masked again: sigma by hand from the paper's equations."""
    p, _ = predictions(model)
    transitions = []
    for now, then, active in remasking.visible(steps):
        most = min(1.0, (1 - then) / now) if now > 0 else 0.0
        sigma = remasking.eta * most if remasking.strategy == "rescale" else min(remasking.eta, most)
        sigma = sigma if active else 0.0
        stays = (1 - then - sigma * now) / (1 - now)
        transition = torch.ones(27, 27, dtype=torch.float64)
        for i in range(L):
            before, after = BOARDS[:, i].unsqueeze(1), BOARDS[:, i].unsqueeze(0)
            fills = (1 - stays) * p[:, i][:, BOARDS[:, i].clamp(max=V - 1)]
            from_mask = torch.where(after == M, torch.full_like(fills, stays), fills)
            from_symbol = torch.where(after == M, sigma, (before == after).double() * (1 - sigma))
            transition = transition * torch.where(before == M, from_mask, from_symbol)
        transitions.append(transition)
    return law(transitions, EMPTY)


REMASKINGS = [Remasking("cap", 0.3), Remasking("rescale", 0.7), Remasking("loop", 0.4)]


@pytest.mark.parametrize("remasking", sweep(REMASKINGS, lambda r: r.strategy == "cap", lambda r: r.strategy))
def test_remasking_draws_from_the_sum_over_its_steps(remasking):
    model = backbone()
    exact = remasking_law(model, 20, remasking)
    assert float(exact.sum()) == pytest.approx(1)
    assert (exact - step_law(model, 20)).abs().sum() > 0.01, "it is another law than without"
    drawn = sample(model, prompts(40_000), generator(1), "ancestral", steps=20, remasking=remasking)
    chi_square(frequencies(drawn.tokens), exact)
    assert 0 < drawn.nfe <= 20


@pytest.mark.parametrize("strategy", ["cap", "rescale"])
def test_no_remasking_is_ancestral_sampling(strategy):
    model = backbone()
    none = remasking_law(model, 5, Remasking(strategy, 0.0))
    torch.testing.assert_close(none, step_law(model, 5))


@pytest.mark.parametrize("remasking", [Remasking("cap", 0.2), Remasking("rescale", 0.9), Remasking("loop", 0.5)])
def test_remasking_keeps_as_many_positions_visible(remasking):
    """Share of visible positions at the start of each step: alpha_t, whatever sigma is."""
    model, n, steps = backbone(), 20_000, 10
    seen: list[Tensor] = []
    inner = model.forward
    model.forward = lambda tokens: (seen.append(tokens), inner(tokens))[1]
    sample(model, prompts(n), generator(3), "ancestral", steps=steps, remasking=remasking)
    for tokens, (now, _, _) in zip(seen, remasking.visible(steps), strict=True):
        share = float((tokens != M).double().mean())
        assert share == pytest.approx(now, abs=5 * (now * (1 - now) / (n * L)) ** 0.5 + 1e-9)


def test_remasking_loops_at_nine_tenths():
    profile = Remasking("loop", 0.1).visible(100)
    assert [round(now, 6) for now, _, _ in profile[:3]] == [0.0, 0.02, 0.04]
    assert {(round(now, 6), round(then, 6)) for now, then, active in profile if active} == {(0.9, 0.9)}
    assert sum(active for _, _, active in profile) == 50
    assert profile[-1][1] == 1, "exactly: nothing stays masked"


def test_remasking_by_confidence_remasks_the_least_confident_most():
    model, n = backbone(), 20_000
    drawn = sample(model, prompts(n), generator(4), "ancestral", steps=20, remasking=Remasking("conf"))
    assert frequencies(drawn.tokens).sum() == n
    assert (frequencies(drawn.tokens) / n - step_law(model, 20)).abs().sum() > 0.01


def test_remasking_leaves_prompts_and_refuses_what_it_cannot_do():
    model = backbone()
    start = prompts(500, [1, M, M])
    drawn = sample(model, start, generator(), "ancestral", steps=8, remasking=Remasking("cap", 1.0))
    assert bool((drawn.tokens[:, 0] == 1).all())
    again = sample(model, start, generator(), "ancestral", steps=8, remasking=Remasking("cap", 1.0))
    assert torch.equal(drawn.tokens, again.tokens)
    with pytest.raises(UnmaskError, match="ancestral sampling from a model without a learned order"):
        sample(model, start, generator(), "event", remasking=Remasking())
    with pytest.raises(UnmaskError, match="without a learned order"):
        sample(backbone(order="context"), start, generator(), "ancestral", remasking=Remasking())
    with pytest.raises(UnmaskError, match="strategy must be one of cap, rescale, loop, conf"):
        Remasking("capped")
    with pytest.raises(UnmaskError, match="eta must be between 0 and 1"):
        Remasking("cap", 1.5)
