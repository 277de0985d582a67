"""Deliberate bugs of the pretraining code that once passed all tests; each test here fails with one of them."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from pretrain.backbone import Backbone, Output
from pretrain.objectives import uniform as losses
from pretrain.orders import ContextOrder, NoOrder
from pretrain.samplers import Remasking, sample
from pretrain.train import LearnedScheduleConfig, LoMDMConfig, pretrain
from pretrain.uniform import Uniform
from tasks import Sudoku


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- orders
@pytest.mark.parametrize("side", ["masking", "revealing"])
def test_order_weights_of_a_context_have_the_gradient_of_their_deviation_from_the_mean(side: str) -> None:
    """dw_i / dg_j = c2 sigmoid'(g_j) (1{i = j} - 1 / L): the mean moves with each preference."""
    torch.manual_seed(0)
    order, hidden = ContextOrder(nn.Linear(3, 1), nn.Linear(3, 1), 0.7, 0.65), torch.randn(1, 5, 3)
    preferences: list[Tensor] = []
    network = getattr(order, side)
    network.register_forward_hook(lambda *call: preferences.append(call[2]))
    weights = (
        order.order_weights(torch.zeros(1, 5), hidden)
        if side == "masking"
        else order.reverse(torch.zeros(1, 5, 2), hidden)[1]
    )
    rows = [torch.autograd.grad(weights[0, i], preferences[0], retain_graph=True)[0].flatten() for i in range(5)]
    sigmoid = preferences[0].detach().flatten().sigmoid()
    slope = 0.65 * sigmoid * (1 - sigmoid)  # (L,)
    torch.testing.assert_close(torch.stack(rows), slope * (torch.eye(5) - 1 / 5))


# ---------------------------------------------------------------------- learning rates
@pytest.mark.parametrize("config", [LearnedScheduleConfig, LoMDMConfig])
def test_the_order_learns_at_its_multiple_of_the_learning_rate(config: type, tmp_path) -> None:
    """AdamW's first step is the learning rate in size, whatever the gradient."""

    def trained(name: str, order_lr: float) -> Backbone:
        settings = {"steps": 1, "batch": 16, "dim": 16, "layers": 1, "heads": 2, "warmup": 0, "ema": 0.0}
        out = str(tmp_path / name)
        return pretrain(
            config("sudoku4", out, threads=1, lr=0.01, order_lr=order_lr, order_start=0.0, **settings), Sudoku(2, 2)
        )

    still, slow, fast = (trained(f"{multiple}", multiple) for multiple in (0.0, 0.25, 1.0))
    moved = []
    for (name, start), one, other in zip(
        still.order.named_parameters(), slow.order.parameters(), fast.order.parameters(), strict=True
    ):
        if one.ndim < 2 or name.endswith("4.weight"):  # what starts at 0 or does not decay
            torch.testing.assert_close(4 * (one - start), other - start, rtol=1e-2, atol=1e-6)
            moved.append(float((other - start).detach().abs().max()))
    assert max(moved) == pytest.approx(0.01, rel=1e-2)
    assert torch.equal(slow.head.weight, fast.head.weight), "the others' learning rate is not touched"


# ---------------------------------------------------------------------- prompts with uniform noise
class Recorder:
    """Has what the uniform loss uses of an absorbing model; predicts nothing and keeps what it was asked."""

    predicts = "absorbing"

    def __init__(self, length: int, symbols: int) -> None:
        self.process, self.symbols = Uniform(torch.ones(length, symbols, dtype=torch.bool)), symbols

    def __call__(self, tokens: Tensor, alpha: Tensor, is_noise: Tensor) -> Output:
        self.alpha, self.is_noise = alpha, is_noise
        return Output(torch.zeros(*tokens.shape, self.symbols), torch.empty(0))


def test_a_given_symbol_is_no_noise_even_where_it_equals_the_noise_symbol() -> None:
    """As in sampling: a model is never told that a prompt's symbol is noise."""
    model, clean = Recorder(3, 4), torch.tensor([[2, 2, 1]])
    alpha, noise = torch.tensor([[1.0, 0.5, 0.5]]), torch.tensor([[2, 2, 3]])
    losses.loss_at(model, clean, losses.Corrupted(clean, alpha, noise), "bound")
    assert model.is_noise.tolist() == [[False, True, False]]
    clean = torch.randint(4, (500, 3), generator=generator(1))
    losses.uniform_loss(model, clean, generator(2), "bound", 1.0)
    given = model.alpha == 1
    assert given.any()
    assert not model.is_noise[given].any()


def test_the_share_of_positions_to_predict_is_uniform_between_none_and_all() -> None:
    """With prompts in every sequence: deciles of 4,000 shares of 200 positions, and none without prompts."""
    model, clean = Recorder(200, 2), torch.zeros(4000, 200, dtype=torch.long)
    losses.uniform_loss(model, clean, generator(3), "bound", 1.0)
    share = (model.alpha < 1).double().mean(1)
    expected = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    torch.testing.assert_close(share.quantile(expected), expected, rtol=0, atol=0.04)
    losses.uniform_loss(model, clean, generator(3), "bound", 0.0)
    assert (model.alpha < 1).all()


# ---------------------------------------------------------------------- ReMDM
def probabilities(remasking: Remasking, step: int, fill_prob: list[float]) -> tuple[list[float], list[float]]:
    """Of one row in forward ``step`` of 4, whose first positions are filled and whose last is masked."""
    remaskable = torch.tensor([[True] * (len(fill_prob) - 1) + [False]])
    fill, remask = remasking.probabilities(torch.tensor([step]), 4, remaskable, torch.tensor([fill_prob]))
    return fill[0].tolist(), remask[0].tolist()


def test_rescaled_remasking_by_hand() -> None:
    """From alpha 1/2 to 3/4, sigma_max = (1 - 3/4) / (1/2) = 1/2, sigma = eta / 2, and masked positions stay with
    probability (1 - 3/4 - sigma / 2) / (1/2)."""
    for eta in (0.0, 0.4, 1.0):
        fill, remask = probabilities(Remasking("rescale", eta), 2, [0.9, 0.2, 0.0])
        assert remask == pytest.approx([eta / 2] * 3)
        assert fill == pytest.approx([1 - (0.25 - eta / 4) / 0.5] * 3)
    assert probabilities(Remasking("rescale", 0.4), 0, [0.0, 0.0])[1] == [0, 0], "nothing is filled before the first"
    assert probabilities(Remasking("rescale", 0.4), 3, [0.5, 0.0]) == ([1, 1], [0, 0]), "the last one fills the rest"


def test_confidence_remasks_the_least_confident_most_by_hand() -> None:
    chance = torch.tensor([-0.9, -0.2]).exp()
    expected = (0.5 * chance / chance.sum()).tolist()  # sigma_max times the softmax of minus the probabilities
    fill, remask = probabilities(Remasking("conf"), 2, [0.9, 0.2, 0.0])
    assert remask == pytest.approx([*expected, 0.0])
    assert expected[1] > expected[0]
    assert fill == pytest.approx([0.5] * 3), "masked positions do not make up for it"


def test_sampling_by_confidence_remasks_sure_symbols_less_often() -> None:
    """The first four of eight positions are certain, the others a coin's toss. How often each kind is masked again,
    against sigma_max times the softmax of minus the probabilities over what is visible, summed over all boards."""
    boards: list[Tensor] = []

    class Stub:
        mask_id, length, noise, block_length, order = 2, 8, "mask", None, NoOrder()

        def __call__(self, tokens: Tensor) -> Output:
            boards.append(tokens)
            logits = torch.zeros(*tokens.shape, 2)
            logits[:, :4, 0] = 30.0
            return Output(logits, torch.empty(0))

    sample(Stub(), torch.full((4000, 8), 2), generator(4), "ancestral", steps=12, remasking=Remasking("conf"))
    assert len(boards) == 12
    weight = torch.tensor([-1.0] * 4 + [-0.5] * 4, dtype=torch.float64).exp()
    remasked, expected = torch.zeros(8).double(), torch.zeros(8).double()
    for step, (before, after) in enumerate(itertools.pairwise(boards)):
        visible = before != 2
        share = visible * weight / (visible * weight).sum(1, keepdim=True).clamp(min=1e-9)
        expected += min(1.0, (11 - step) / max(step, 1)) * share.sum(0)  # sigma_max = (1 - alpha_s) / alpha_t
        remasked += (visible & (after == 2)).sum(0)
    remasked, expected = remasked.view(2, 4).sum(1), expected.view(2, 4).sum(1)
    assert ((remasked - expected).abs() < 5 * expected.sqrt()).all()
    assert remasked[1] - remasked[0] > 5 * expected.sum().sqrt()
