"""What models know about their order, blocks of attention, and the learned order as a reference policy."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, CheckpointError, load_model, save_model
from pretrain.objectives.masked import integrand
from pretrain.orders import ContextOrder, NoOrder, PositionOrder, SymbolOrder
from tests.oracles.boards import BOARDS, HIDDEN, SEQUENCES, L, V, backbone, close, generator

INF = math.inf
EVERY = ["none", "positions", "symbols", "context"]
LEARNED = EVERY[1:]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- each order by itself
def test_no_order_reveals_all_alike():
    order, logits = NoOrder(), randn(4, L, V)
    log_probs, own = order.reverse(logits, randn(4, L, 5))
    close(log_probs, logits.log_softmax(-1))
    assert own.tolist() == torch.ones(4, L).tolist()
    assert order.order_weights(SEQUENCES, None).expand(8, L).tolist() == torch.ones(8, L).tolist()
    assert not list(order.parameters())
    assert not order.learned


@pytest.mark.parametrize("order", [PositionOrder(L), SymbolOrder(V)], ids=["positions", "symbols"])
def test_learned_schedules_start_as_masked_diffusion(order):
    assert order.learned
    assert not order.reads_clean
    ones = torch.ones(8, L)
    torch.testing.assert_close(order.order_weights(SEQUENCES, None).expand(8, L), ones, atol=1e-6, rtol=0)
    logits = randn(8, L, V).float()
    log_probs, own = order.reverse(logits, randn(8, L, 5))
    torch.testing.assert_close(own, ones, atol=1e-6, rtol=0)
    torch.testing.assert_close(log_probs, logits.log_softmax(-1), atol=1e-6, rtol=0)


def test_position_order_by_hand():
    order = PositionOrder(L)
    order.raw.data = torch.tensor([-1.0, 0.0, 2.0])
    expected = torch.tensor([math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(2))])
    masking, (log_probs, revealing) = (
        order.order_weights(SEQUENCES, None),
        order.reverse(randn(8, L, V), randn(8, L, 1)),
    )
    torch.testing.assert_close(masking, expected.unsqueeze(0))
    torch.testing.assert_close(revealing, expected.expand(8, L))
    close(log_probs, randn(8, L, V).log_softmax(-1))


def symbol_order(seed: int = 0, vocab: int = V) -> SymbolOrder:
    order = SymbolOrder(vocab)
    order.raw.data = 1.5 * randn(vocab, seed=seed)
    return order


def test_expected_places_are_those_of_all_orders():
    """By enumeration of Plackett-Luce's orders."""
    order = PositionOrder(4)
    weights = torch.tensor([0.3, 1.0, 2.5, 1.0], dtype=torch.float64)
    order.raw.data = torch.log(torch.expm1(weights)).float()
    expected = torch.zeros(4, dtype=torch.float64)
    for ranking in itertools.permutations(range(4)):
        chance, left = 1.0, float(weights.sum())
        for position in ranking:
            chance, left = chance * float(weights[position]) / left, left - float(weights[position])
        for place, position in enumerate(ranking):
            expected[position] += chance * place
    assert torch.allclose(order.expected_places(), expected, atol=1e-6)
    assert PositionOrder(5).expected_places().tolist() == pytest.approx([2.0] * 5)


def test_symbol_order_by_hand():
    """A masked position turns into v at a rate proportional to w_v mu_v."""
    order, logits = symbol_order(vocab=4), randn(5, L, 4, seed=1)
    w = torch.log1p(order.raw.detach().exp())
    clean = torch.tensor([[0, 3, 1]])
    close(order.order_weights(clean, None).detach(), w[clean])
    rates = w * logits.softmax(-1)
    log_probs, own = order.reverse(logits, randn(5, L, 1))
    close(own.detach(), rates.sum(-1))
    close(log_probs.detach().exp(), rates / rates.sum(-1, keepdim=True))


@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_integrand_of_symbol_order_is_the_one_of_genmd4(hidden):
    """(1 / t) (-w_x log mu_x - w_x + sum_v w_v mu_v) per masked position, mu being the model's distribution."""
    order, logits = symbol_order(2), randn(8, L, V, seed=3)
    t = torch.linspace(0.05, 1, 8, dtype=torch.float64).unsqueeze(1)
    masked = torch.zeros(L, dtype=torch.bool)
    masked[list(hidden)] = True
    log_probs, own = order.reverse(logits, randn(8, L, 1))
    cross_entropy = -log_probs.gather(2, SEQUENCES.unsqueeze(2)).squeeze(2)
    found = integrand(cross_entropy, order.order_weights(SEQUENCES, None) / t, own / t, masked.expand(8, L))
    w, mu = torch.log1p(order.raw.exp()), logits.softmax(-1)
    w_x, mu_x = w[SEQUENCES], mu.gather(2, SEQUENCES.unsqueeze(2)).squeeze(2)
    expected = torch.where(masked, (-w_x * mu_x.log() - w_x + (w * mu).sum(-1)) / t, 0).sum(1)
    close(found.detach(), expected.detach(), 1e-12)


def context_order(c1: float, c2: float) -> ContextOrder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ContextOrder(nn.Linear(4, 1), nn.Linear(4, 1), c1, c2)


def test_context_order_by_hand():
    order = context_order(0.7, 0.65)
    hidden = randn(6, 5, 4).float()
    for network, found in [
        (order.masking, order.order_weights(SEQUENCES, hidden)),
        (order.revealing, order.reverse(randn(6, 5, V), hidden)[1]),
    ]:
        sigmoid = 1 / (1 + (-network(hidden).squeeze(2)).exp())
        expected = 0.7 + 0.65 * (sigmoid - sigmoid.mean(1, keepdim=True))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.sum(1), torch.full((6,), 5 * 0.7))
    assert order.learned
    assert order.reads_clean


def test_context_exponents_stay_between_their_limits():
    """Even where one position is preferred as firmly as can be."""
    order = context_order(0.7, 0.65)
    for sign in (1.0, -1.0):
        hidden = torch.zeros(1, 9, 4)
        hidden[0, 0] = 1e4 * sign * order.masking.weight.detach().sign()
        hidden[0, 1:] = -hidden[0, 0]
        w = order.order_weights(SEQUENCES, hidden)
        assert w.min() > 0.05
        assert w.max() < 1.35
        assert w[0, 0].item() == pytest.approx(0.7 + sign * 0.65 * 8 / 9)


def test_without_spread_the_context_order_is_masked_diffusion_to_the_bit():
    order = context_order(1.0, 0.0)
    hidden, logits = 3 * randn(8, L, 4).float(), randn(8, L, V).float()
    masking, (log_probs, revealing) = order.order_weights(SEQUENCES, hidden), order.reverse(logits, hidden)
    assert masking.tolist() == revealing.tolist() == torch.ones(8, L).tolist()
    assert torch.equal(log_probs, logits.log_softmax(-1))
    t = torch.linspace(1e-3, 1, 8).unsqueeze(1)
    cross_entropy = -log_probs.gather(2, SEQUENCES.unsqueeze(2)).squeeze(2)
    masked = torch.rand(8, L, generator=generator(1)) < t
    plain = integrand(cross_entropy, (1 / t).expand(8, L), (1 / t).expand(8, L), masked)
    assert torch.equal(integrand(cross_entropy, masking / t, revealing / t, masked), plain)
    torch.testing.assert_close(plain, torch.where(masked, cross_entropy / t, 0).sum(1))


def test_a_backbone_starts_without_preferences():
    for name, start in {"none": 1.0, "positions": 1.0, "symbols": 1.0, "context": 0.7}.items():
        model = Backbone(V, [[i] for i in range(L)], dim=8, layers=1, heads=2, order=name)
        logits, hidden = model(BOARDS)
        log_probs, own = model.order.reverse(logits, hidden)
        w = model.order.order_weights(SEQUENCES, model.trunk(SEQUENCES)).expand(8, L)
        torch.testing.assert_close(own, torch.full((27, L), start), atol=1e-6, rtol=0)
        torch.testing.assert_close(w, torch.full((8, L), start), atol=1e-6, rtol=0)
        torch.testing.assert_close(log_probs, logits.log_softmax(-1), atol=1e-6, rtol=0)
        assert any(name.startswith("order.") for name, _ in model.named_parameters()) == (name != "none")


def test_the_order_networks_of_a_backbone_see_all_positions():
    model = backbone(order="context")
    hidden = model.trunk(SEQUENCES[:1]).detach().requires_grad_()
    for network in (model.order.masking, model.order.revealing):
        (gradient,) = torch.autograd.grad(network(hidden)[0, 0, 0], hidden)
        assert (gradient.abs().sum(2) > 0).all()
    assert not torch.equal(model.order.masking(hidden), model.order.revealing(hidden)), "each has its own weights"


# ---------------------------------------------------------------------- the bracket of the objective
def test_the_integrand_by_hand():
    ce, a, b = torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([[2.0, 3.0, 0.5]]), torch.tensor([[1.0, 7.0, 2.0]])
    masked = torch.tensor([[True, False, True]])
    expected = (2 * 1 + 2 * math.log(2) - 2 + 1) + (0.5 * 2 + 0.5 * math.log(0.25) - 0.5 + 2)
    assert integrand(ce, a, b, masked).item() == pytest.approx(expected)


def test_the_integrand_where_nothing_flows():
    """A velocity of 0 leaves the model's own, without a NaN in value or gradient."""
    a, b = torch.zeros(1, 2, requires_grad=True), torch.tensor([[3.0, 0.0]], requires_grad=True)
    value = integrand(torch.ones(1, 2), a, b, torch.ones(1, 2, dtype=torch.bool))
    assert value.item() == 3
    value.sum().backward()
    assert a.grad.isfinite().all()
    assert b.grad.tolist() == [[1, 1]]


def test_velocities_that_agree_cost_nothing_and_others_do():
    a = randn(50, L).exp()
    masked = torch.ones(50, L, dtype=torch.bool)
    close(integrand(torch.zeros(50, L).double(), a, a, masked), torch.zeros(50).double(), 1e-12)
    assert (integrand(torch.zeros(50, L).double(), a, randn(50, L, seed=1).exp(), masked) > 0).all()


# ---------------------------------------------------------------------- blocks of attention
LONG = 6


def boards(n: int, seed: int, symbols: int = V + 1) -> Tensor:
    return torch.randint(symbols, (n, LONG), generator=generator(seed))


@pytest.mark.parametrize("block_length", [1, 2, 4, LONG, None])
def test_one_pass_predicts_every_block_as_plain_forwards_do(block_length):
    """Block b given the clean blocks before it, b's own holes, and anything after."""
    model = backbone(block_length, "none", length=LONG, layers=3)  # deep enough to see through clean positions
    noisy, clean, after = boards(7, 1), boards(7, 2, V), boards(7, 3)
    found = model.predict_blocks(noisy, clean)
    assert found.shape == (7, LONG, V)
    length = block_length or LONG
    for start in range(0, LONG, length):
        stop = min(start + length, LONG)
        mixed = torch.cat([clean[:, :start], noisy[:, start:stop], after[:, stop:]], 1)
        torch.testing.assert_close(found[:, start:stop], model(mixed).logits[:, start:stop], rtol=1e-4, atol=1e-5)


def depends(function, tokens: Tensor, others: Tensor) -> Tensor:
    """(L, L) bool: which positions (rows) of the output change with which ones of the input (columns)."""
    before = function(tokens)
    columns = []
    for i in range(LONG):
        changed = tokens.clone()
        changed[:, i] = others[:, i]
        columns.append((function(changed) - before).abs().amax((0, 2)) > 1e-6)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("block_length", [1, 2, 4, LONG])
def test_which_positions_see_which(block_length):
    model = backbone(block_length, length=LONG, layers=2)
    block = torch.arange(LONG) // block_length
    tokens, clean = boards(5, 1), boards(5, 2, V)
    same, before = block.unsqueeze(1) == block, block.unsqueeze(1) > block
    others = (tokens + 1) % (V + 1)
    assert torch.equal(depends(lambda x: model(x).logits, tokens, others), same | before)
    assert torch.equal(depends(lambda x: model.predict_blocks(x, clean), tokens, others), same)
    assert torch.equal(depends(lambda x: model.predict_blocks(tokens, x), clean, 1 - clean), before)


def test_without_blocks_every_position_sees_every_other():
    model = backbone(None, length=LONG)
    tokens = boards(5, 1)
    assert depends(lambda x: model(x).logits, tokens, (tokens + 1) % (V + 1)).all()


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize(
    "settings",
    [*({"order": name} for name in EVERY), {"order": "context", "c1": 2.0, "c2": 0.5}, {"block_length": 2}],
    ids=str,
)
def test_a_saved_model_knows_its_order(tmp_path, settings):
    model = backbone(**settings)
    save_model(model, tmp_path)
    loaded = load_model(Backbone, tmp_path, PACKAGED_DENOISERS, "denoiser")
    assert type(loaded.order) is type(model.order)
    assert loaded.block_length == model.block_length
    for one, other in zip(model.order.reverse(*model(BOARDS)), loaded.order.reverse(*loaded(BOARDS)), strict=True):
        assert torch.equal(one, other)
    w = [m.order.order_weights(SEQUENCES, m.trunk(SEQUENCES)) for m in (model, loaded)]
    assert torch.equal(*w)


def test_a_model_of_one_order_is_not_taken_for_another(tmp_path):
    save_model(backbone(order="positions"), tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"positions"', '"symbols"'))
    with pytest.raises(CheckpointError, match=r"tensor 'order\.raw' differs"):
        load_model(Backbone, tmp_path, PACKAGED_DENOISERS, "denoiser")


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "contxt"},
        {"block_length": 0},
        {"order": "context", "c1": 0.5, "c2": 0.5},
        {"order": "symbols", "block_length": 2},
    ],
    ids=str,
)
def test_a_backbone_refuses_settings_that_do_not_fit(settings):
    """As it does for sizes; without it load_model takes such a config.json for a model of another kind."""
    with pytest.raises(ValueError, match=r"order|block_length|c2"):
        Backbone(V, [[i] for i in range(L)], dim=8, layers=1, heads=2, **settings)
