"""The losses of learned orders and of blocks: expectations and gradients against enumeration, and training."""

import itertools
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain import likelihood, masking
from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model, load_state
from pretrain.masking import PolynomialSchedule
from pretrain.objectives.learned_order import ESTIMATORS, Estimator, at_even_shares, block_loss, learned_order_loss
from pretrain.objectives.masked import masked_diffusion_loss
from pretrain.run import Interrupted
from pretrain.train import (
    ARConfig,
    BlockConfig,
    GenMD4Config,
    LearnedScheduleConfig,
    LoMDMConfig,
    MDMConfig,
    Objective,
    PretrainConfig,
    pretrain,
)
from tasks import UnmaskError
from tests.oracles.boards import SEQUENCES, Exact, L, M, V, agrees, backbone, block_nll, generator
from tests.oracles.enumeration import TableTask, random_joint

LEARNED = ["positions", "symbols", "context"]
MASKS = torch.tensor(list(itertools.product([False, True], repeat=L)))  # (8, L)


# ---------------------------------------------------------------------- gradients, by enumeration of pairs of masks
@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are summed in float32; here they stay in float64, so that formulas can be told from roundings."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def gradients(value: Tensor, model: Backbone) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def time_of(w: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(t, d log(1 / t) / d share), (1,) each: the time at which this share is masked on average, by bisection."""
    low, high = -400.0, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((w.double() * middle).exp().mean()) < share else (low, middle)
    t = torch.tensor([low], dtype=torch.float64).exp()
    return t, 1 / (w.double() * t ** w.double()).mean(1)


def expected_surrogate(
    model: Backbone, clean: Tensor, share: float, monkeypatch: pytest.MonkeyPatch, estimator: Estimator
) -> Tensor:
    """The mean of the surrogate of one sequence (1, L) over all 64 pairs of masks at the time of ``share``."""
    pending: list[Tensor] = []
    monkeypatch.setattr(masking, "low_discrepancy_times", lambda n, _: torch.full((n,), share, dtype=torch.float64))
    monkeypatch.setattr(masking, "mask", lambda x, p, mask_id, _: torch.where(pending.pop(0), mask_id, x))
    w = model.order.order_weights(clean, model.trunk(clean)).detach()
    p = time_of(w, share)[0] ** w
    total = torch.zeros((), dtype=torch.float64)
    for first, second in itertools.product(MASKS, repeat=2):
        pending += [first, second]
        q = torch.where(first, p, 1 - p).prod() * torch.where(second, p, 1 - p).prod()
        total = total + q * learned_order_loss(model, clean, generator(), estimator)[0]
        assert not pending, "two masks at one time"
    return total


def decides_masks(name: str) -> bool:
    """Whether a parameter decides which masks are drawn."""
    return name.startswith(("order.masking", "order.raw"))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("share", [0.15, 0.8])
@pytest.mark.parametrize("order", LEARNED)
def test_the_expected_gradient_is_the_gradient_of_the_expectation(order, share, estimator, monkeypatch):
    """Of every parameter: trunk, head, masking and revealing exponents. The time is a constant for the gradient."""
    model, clean = backbone(order=order).double(), SEQUENCES[3:4]
    t, weight = time_of(model.order.order_weights(clean, model.trunk(clean)).detach(), share)
    exact = gradients((weight * t * Exact(model, clean).at_time(t)).sum() / L, model)
    found = gradients(expected_surrogate(model, clean, share, monkeypatch, estimator), model)
    assert exact.keys() == found.keys()
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-8, msg=name)
    assert max(float(value.abs().max()) for name, value in exact.items() if decides_masks(name)) > 1e-3
    assert float(exact["head.weight"].abs().max()) > 1e-3


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("order", LEARNED)
def test_without_the_score_term_the_masking_exponents_are_misled(order, estimator, monkeypatch):
    model, clean, share = backbone(order=order).double(), SEQUENCES[3:4], 0.5
    t, weight = time_of(model.order.order_weights(clean, model.trunk(clean)).detach(), share)
    exact = gradients((weight * t * Exact(model, clean).at_time(t)).sum() / L, model)
    whole = PolynomialSchedule.log_probability
    monkeypatch.setattr(PolynomialSchedule, "log_probability", lambda self, *given: whole(self, *given).detach())
    found = gradients(expected_surrogate(model, clean, share, monkeypatch, estimator), model)
    off = {name: float((found[name] - value).abs().max()) for name, value in exact.items()}
    assert max(value for name, value in off.items() if decides_masks(name)) > 1e-2
    assert max(value for name, value in off.items() if not decides_masks(name)) < 1e-8


# ---------------------------------------------------------------------- expectations, by sampling
def over_one(order: str) -> Backbone:
    """Exponents above 1, where the estimates at one time have a finite variance."""
    model = backbone(order=order, seed=1, c1=2.0, c2=1.0)
    if order != "context":
        model.order.raw.data = torch.tensor([1.0, 1.5, 2.5])[: len(model.order.raw)]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("order", LEARNED)
def test_the_loss_and_its_gradient_are_unbiased(order):
    """Over sequences, times and masks, as training draws them."""
    model, draw = over_one(order), generator(1)
    exact = Exact(model)
    expected = gradients(exact.path_bound().mean() / L, model)
    values, found = [], {name: [] for name in expected}
    for _ in range(500):
        clean = SEQUENCES[torch.randint(8, (64,), generator=draw)]
        surrogate, bound = learned_order_loss(model, clean, draw)
        assert not bound.requires_grad
        assert surrogate.shape == bound.shape == ()
        values.append(bound)
        for name, value in gradients(surrogate, model).items():
            found[name].append(value)
    agrees(torch.stack(values).double(), exact.path_bound().mean().detach() / L, visible=0.03)
    for name, value in expected.items():
        agrees(torch.stack(found[name]).double(), value.double(), visible=0.05)
    certain = [
        value.abs() / torch.stack(found[name]).std(0) * 500**0.5
        for name, value in expected.items()
        if decides_masks(name)
    ]
    # Also of the masking exponents, whose score term is the noisiest part: the mean is far from 0 in its own errors.
    assert max(float(ratio.max()) for ratio in certain) > (2.5 if order == "positions" else 6)


@pytest.mark.parametrize("order", LEARNED)
def test_one_draw_of_the_loss_by_hand(order):
    """Repeat the loss's draws, then sum in a plain loop; the second sample says what the first is expected to cost."""
    model, clean = backbone(order=order), SEQUENCES
    repeat = generator(5)
    with torch.no_grad():
        w = model.order.order_weights(clean, model.trunk(clean)).expand(8, L)
    shares = masking.low_discrepancy_times(8, repeat).tolist()
    t, weight = (torch.cat(x) for x in zip(*(time_of(w[n : n + 1], shares[n]) for n in range(8)), strict=True))
    masks, costs, reveal = [], [], []
    for _ in range(2):
        noisy = masking.mask(clean, t.unsqueeze(1) ** w, M, repeat)
        with torch.no_grad():
            log_probs, own = model.order.reverse(*model(noisy))
        masks.append(noisy == M)
        costs.append(-log_probs.gather(2, clean.unsqueeze(2)).squeeze(2))
        reveal.append(own)
    bound = surrogate = 0.0
    for n in range(8):
        hidden = [float(costs[1][n, i]) for i in range(L) if masks[1][n, i]]
        expected = [float(costs[1][n, i]) if masks[1][n, i] else sum(hidden) / max(1, len(hidden)) for i in range(L)]
        surprise, chance, known = 0.0, 0.0, 0.0
        for i in range(L):
            a, b, p = (float(x) for x in (w[n, i] * weight[n], reveal[0][n, i] * weight[n], t[n] ** w[n, i]))
            chance += math.log(p if masks[0][n, i] else 1 - p)
            known += p * a * expected[i]
            if masks[0][n, i]:
                velocities = a * math.log(a / b) - a + b
                bound += (a * float(costs[0][n, i]) + velocities) / 8 / L
                surprise += a * (float(costs[0][n, i]) - expected[i]) + velocities
        surrogate += (surprise + chance * surprise + known) / 8 / L
    found = learned_order_loss(model, clean, generator(5))
    assert found[1].item() == pytest.approx(bound, rel=1e-4)
    assert found[0].item() == pytest.approx(surrogate, rel=1e-3)


def test_one_draw_of_two_sample_rloo_by_hand():
    """Hong et al. 2026, arXiv 2602.02112, eq. 8: each mask's loss is the other's baseline."""
    model, clean = backbone(order="context"), SEQUENCES
    at = at_even_shares(model, clean, generator(5))
    losses, chances = [], []
    for _ in range(2):
        masked, cross_entropy, reverse = at.draw()
        velocities = at.velocity * (at.velocity / reverse).log() - at.velocity + reverse
        losses.append(torch.where(masked, at.velocity * cross_entropy + velocities, 0).sum(1).tolist())
        chances.append(torch.where(masked, at.probability, 1 - at.probability).log().sum(1).tolist())
    pairs = list(zip(*losses, *chances, strict=True))
    bound = sum(one + other for one, other, *_ in pairs) / 2 / 8 / L
    score = sum((one - other) * p + (other - one) * q for one, other, p, q in pairs) / 2 / 8 / L
    surrogate, found = learned_order_loss(model, clean, generator(5), "rloo")
    assert found.item() == pytest.approx(bound, rel=1e-4)
    assert surrogate.item() == pytest.approx(bound + score, rel=1e-3)


def test_the_common_scale_of_the_exponents_does_not_matter():
    """The same draws, loss and gradients; so c1 is a scale of time, and c2 / c1 says how much of an order there is."""
    one, other = (backbone(order="context", c1=scale, c2=0.9 * scale) for scale in (1.0, 0.3))
    losses = [learned_order_loss(model, SEQUENCES, generator(2)) for model in (one, other)]
    assert losses[0][1].item() == pytest.approx(losses[1][1].item(), rel=1e-5)
    first, second = (gradients(loss, model) for (loss, _), model in zip(losses, (one, other), strict=True))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5, msg=name)


def test_without_spread_the_loss_is_masked_diffusions_to_the_bit():
    """With c1 = 1, c2 = 0: the same masks, bound and gradients of trunk and head."""
    plain, context = backbone(), backbone(order="context", c1=1.0, c2=0.0)
    context.load_state_dict(plain.state_dict(), strict=False)
    clean = SEQUENCES.repeat(4, 1)
    for seed in range(5):
        masked_diffusion = masked_diffusion_loss(plain, clean, M, generator(seed))
        surrogate, bound = learned_order_loss(context, clean, generator(seed))
        assert torch.equal(bound, masked_diffusion)
        one, other = gradients(masked_diffusion, plain), gradients(surrogate, context)
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


# ---------------------------------------------------------------------- where gradients stop
def parts(model: Backbone, clean: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, L) each, at the loss's draws: cross-entropy, velocities of masking and revealing, masked."""
    repeat, n = generator(seed), len(clean)
    w = model.order.order_weights(clean, model.trunk(clean)).expand(n, L)
    shares = masking.low_discrepancy_times(n, repeat).tolist()
    t, weight = (torch.cat(x) for x in zip(*(time_of(w[i : i + 1].detach(), shares[i]) for i in range(n)), strict=True))
    noisy = masking.mask(clean, t.unsqueeze(1) ** w.detach(), M, repeat)
    log_probs, own = model.order.reverse(*model(noisy))
    cross_entropy = -log_probs.gather(2, clean.unsqueeze(2)).squeeze(2)
    return cross_entropy, w * weight.unsqueeze(1), own * weight.unsqueeze(1), noisy == M


def test_the_trunk_and_head_learn_from_cross_entropy_alone():
    """Weighted with the velocity: nothing of the velocities' mismatch or the score term reaches them."""
    model, clean = backbone(order="context"), SEQUENCES.repeat(3, 1)
    found = gradients(learned_order_loss(model, clean, generator(3))[0], model)
    cross_entropy, a, _, masked = parts(model, clean, 3)
    alone = gradients(torch.where(masked, a.detach() * cross_entropy, 0).sum() / len(clean) / L, model)
    shared = [name for name in found if not name.startswith("order")]
    assert "head.weight" in shared
    assert "symbols.weight" in shared
    for name in shared:
        torch.testing.assert_close(found[name], alone[name], rtol=1e-4, atol=1e-5, msg=name)
    assert max(float(found[name].abs().max()) for name in shared) > 0.1


def test_the_revealing_network_learns_from_the_velocities_alone():
    model, clean = backbone(order="context"), SEQUENCES.repeat(3, 1)
    found = gradients(learned_order_loss(model, clean, generator(3))[0], model)
    _, a, b, masked = parts(model, clean, 3)
    a = a.detach()
    alone = gradients(torch.where(masked, a * (a / b).log() - a + b, 0).sum() / len(clean) / L, model)
    model.head.bias.data += torch.tensor([3.0, -1.0])  # other predictions, the same hidden states
    other = gradients(learned_order_loss(model, clean, generator(3))[0], model)
    for name, value in found.items():
        if name.startswith("order.revealing"):
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5, msg=name)
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6, msg=name)
    assert found["order.revealing.4.weight"].abs().max() > 1e-3


def test_the_masking_network_learns_from_the_score_term(monkeypatch):
    model, clean = backbone(order="context"), SEQUENCES.repeat(3, 1)
    whole = PolynomialSchedule.log_probability
    found = gradients(learned_order_loss(model, clean, generator(3))[0], model)
    monkeypatch.setattr(PolynomialSchedule, "log_probability", lambda self, *given: whole(self, *given).detach())
    without = gradients(learned_order_loss(model, clean, generator(3))[0], model)
    changed = {name for name in found if not torch.allclose(found[name], without[name], rtol=1e-4, atol=1e-6)}
    assert "order.masking.4.weight" in changed
    assert all(name.startswith("order.masking") for name in changed)


@pytest.mark.parametrize("order", LEARNED)
def test_gradients_are_finite_at_the_ends_of_time(order, monkeypatch):
    model = backbone(order=order)
    for t in (1.0, 1 - 6e-8, 1e-7):
        monkeypatch.setattr(masking, "low_discrepancy_times", lambda n, _, t=t: torch.full((n,), t))
        for seed in range(10):
            surrogate, bound = learned_order_loss(model, SEQUENCES, generator(seed))
            assert bound.isfinite()
            assert all(value.isfinite().all() for value in gradients(surrogate, model).values())


# ---------------------------------------------------------------------- blocks
@pytest.mark.parametrize("length", [3, 5])
def test_the_autoregressive_loss_is_the_exact_likelihood(length):
    model = backbone(1, length=length)
    clean = torch.tensor(list(itertools.product(range(V), repeat=length)))
    expected = block_nll(model, clean).mean() / length
    assert block_loss(model, clean, generator()).item() == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(block_loss(model, clean, generator(0)), block_loss(model, clean, generator(1)))


@pytest.mark.parametrize(("block_length", "length"), [(2, 3), (3, 3), (2, 5)])
def test_the_block_loss_is_the_sum_over_blocks_on_average(block_length, length):
    model, draw = backbone(block_length, length=length), generator(1)
    every = torch.tensor(list(itertools.product(range(V), repeat=length)))
    expected = block_nll(model, every).mean() / length
    values = []
    with torch.no_grad():
        for _ in range(300):
            clean = every[torch.randint(len(every), (128,), generator=draw)]
            values.append(block_loss(model, clean, draw).double())
    agrees(torch.stack(values), expected, visible=0.03)


def test_the_gradient_of_the_block_loss_is_unbiased():
    model, draw = backbone(2), generator(2)
    exact, frozen = 0.0, [p.requires_grad for p in model.parameters()]
    assert all(frozen)
    orders = [(0, 1, 2), (1, 0, 2)]
    for order in orders:
        for step, i in enumerate(order):
            noisy = SEQUENCES.clone()
            noisy[:, list(order[step:])] = M
            log_p = model(noisy).logits.log_softmax(2)[:, i]
            exact = exact - log_p.gather(1, SEQUENCES[:, i : i + 1]).mean() / len(orders) / L
    expected = gradients(exact, model)
    found: dict[str, list[Tensor]] = {name: [] for name in expected}
    for _ in range(300):
        clean = SEQUENCES[torch.randint(8, (64,), generator=draw)]
        for name, value in gradients(block_loss(model, clean, draw), model).items():
            found[name].append(value)
    for name, value in expected.items():
        agrees(torch.stack(found[name]).double(), value.double(), visible=0.1)


def test_which_loss_a_model_is_trained_with():
    clean = SEQUENCES.repeat(2, 1)
    for config, model, loss in [
        (MDMConfig, backbone(), lambda m: masked_diffusion_loss(m, clean, M, generator(4))),
        (ARConfig, backbone(1), lambda m: block_loss(m, clean, generator(4))),
        (BlockConfig, backbone(2), lambda m: block_loss(m, clean, generator(4))),
        (GenMD4Config, backbone(order="symbols"), lambda m: learned_order_loss(m, clean, generator(4))[0]),
        (LoMDMConfig, backbone(order="context"), lambda m: learned_order_loss(m, clean, generator(4))[0]),
    ]:
        value, bound = Objective(model, config(task="", out=""))(clean, generator(4))
        assert torch.equal(value, loss(model))
        assert value.requires_grad
        assert not bound.requires_grad


# ---------------------------------------------------------------------- training
class Task(TableTask):
    """Three symbols, four positions."""

    def __init__(self) -> None:
        super().__init__(random_joint(3, 4, seed=2))
        self.name = "table"


class Stopping(Task):
    """Presses Ctrl-C while the batch of the given step is drawn."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        self.left -= 1
        return super().clean(n, generator)


KINDS: dict[str, Callable[..., PretrainConfig]] = {
    "masked": MDMConfig,
    "ar": ARConfig,
    "block": lambda **settings: BlockConfig(**{"block_length": 2} | settings),
    "learned-schedule": LearnedScheduleConfig,
    "genmd4": GenMD4Config,
    "lomdm": lambda **settings: LoMDMConfig(
        **{"order_lr": 1.0, "order_start": 0.2} | settings
    ),  # a few steps must show
}


def small(kind: str, out: Path, **changes: object) -> PretrainConfig:
    settings = {"steps": 20, "batch": 32, "dim": 16, "layers": 1, "heads": 2, "warmup": 3, "lr": 2e-2, "ema": 0.5}
    return KINDS[kind](task="table", out=str(out), threads=1, log_every=5, save_every=7, **settings | changes)


def heldout_bound(model: Backbone) -> float:
    clean = Task().clean(512, generator(11))
    return float(likelihood.bound(model, clean, generator(12), samples=4).path.mean()) / 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Backbone]]:
    """Uninterrupted runs of 20 steps, made when first asked for."""
    folder, runs = tmp_path_factory.mktemp("finished"), {}

    def run(kind: str) -> tuple[Path, Backbone]:
        if kind not in runs:
            runs[kind] = folder / kind, pretrain(small(kind, folder / kind), Task())
        return runs[kind]

    return run


@pytest.mark.trains
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_lower_the_bound(kind, finished):
    _, model = finished(kind)
    assert not model.training
    config = small(kind, Path("unused"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        start = Backbone(3, Task().coordinates.tolist(), 16, 1, 2, **config.architecture())
    assert heldout_bound(model) < heldout_bound(start) - 0.1
    assert heldout_bound(model) < math.log(3), "better than knowing nothing"


@pytest.mark.trains
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_run_reloads_with_its_order(kind, finished):
    out, model = finished(kind)
    loaded = load_model(Backbone, out, PACKAGED_DENOISERS, "denoiser")
    assert type(loaded.order) is type(model.order)
    assert loaded.block_length == model.block_length == {"ar": 1, "block": 2}.get(kind)
    if kind == "lomdm":
        assert (loaded.order.c1, loaded.order.c2) == (0.7, 0.65)
    tokens = torch.randint(4, (9, 4), generator=generator(5))
    for one, other in zip(model.order.reverse(*model(tokens)), loaded.order.reverse(*loaded(tokens)), strict=True):
        assert torch.equal(one, other)
    clean = Task().clean(9, generator(6))
    w = [m.order.order_weights(clean, m.trunk(clean)) for m in (model, loaded)]
    assert torch.equal(*w)


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["learned-schedule", "genmd4", "lomdm"])
def test_a_few_steps_move_the_order(kind, finished):
    _, model = finished(kind)
    clean = Task().clean(64, generator(6))
    with torch.no_grad():
        w = model.order.order_weights(clean, model.trunk(clean))
        own = model.order.reverse(*model(torch.full((1, 4), 3)))[1]
    assert w.max() - w.min() > 1e-3
    assert own.max() - own.min() > 1e-4
    if kind == "lomdm":
        torch.testing.assert_close(w.mean(1), torch.full((64,), 0.7))


@pytest.mark.trains
def test_before_its_start_the_order_is_left_alone(tmp_path):
    """The trunk learns as in masked diffusion, to the bit, and the order networks stay where they are."""
    settings = {"steps": 9, "ema": 0.0}
    plain = pretrain(small("masked", tmp_path / "plain", **settings), Task())
    late = pretrain(small("lomdm", tmp_path / "late", order_start=1.0, **settings), Task())
    for name, value in plain.named_parameters():
        assert torch.equal(value, dict(late.named_parameters())[name]), name
    clean = Task().clean(5, generator())
    assert (late.order.order_weights(clean, late.trunk(clean)) == 0.7).all()
    begun = pretrain(small("lomdm", tmp_path / "begun", order_start=0.8, **settings), Task())
    assert not torch.equal(begun.head.weight, plain.head.weight)
    assert not (begun.order.masking[-1].weight == 0).all()


@pytest.mark.trains
@pytest.mark.parametrize("at", [4, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_and_resume_end_with_the_same_weights(kind, at, finished, tmp_path):
    out, whole = tmp_path / "run", finished(kind)[0]
    with pytest.raises(Interrupted, match=f"stopped at step {at + 1} of 20"):
        pretrain(small(kind, out), task=Stopping(at))
    pretrain(small(kind, out, resume="must"), Task())
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    states = [load_state(folder / "state.safetensors")["parts"] for folder in (out, whole)]
    for part in ("model", "averaged"):
        assert all(torch.equal(value, states[1][part][key]) for key, value in states[0][part].items())
    for slot, values in states[0]["optimizer"]["state"].items():
        assert all(torch.equal(value, states[1]["optimizer"]["state"][slot][key]) for key, value in values.items())


@pytest.mark.trains
def test_an_order_of_another_form_is_not_resumed(tmp_path):
    with pytest.raises(Interrupted):
        pretrain(small("learned-schedule", tmp_path / "run"), Stopping(3))
    with pytest.raises(UnmaskError, match="cannot resume"):
        pretrain(small("genmd4", tmp_path / "run", resume="must"), Task())


@pytest.mark.trains
@pytest.mark.parametrize("changes", [{"c1": 0.8}, {"c2": 0.5}], ids=str)
def test_the_constants_of_an_order_may_not_change(tmp_path, changes):
    with pytest.raises(Interrupted):
        pretrain(small("lomdm", tmp_path / "run"), Stopping(3))
    with pytest.raises(UnmaskError, match="with other settings"):
        pretrain(small("lomdm", tmp_path / "run", resume="must", **changes), Task())


@pytest.mark.trains
@pytest.mark.parametrize(("first", "then"), [("masked", "ar"), ("ar", "masked"), ("masked", "block"), ("ar", "block")])
def test_a_run_of_one_objective_is_not_resumed_with_another(tmp_path, first, then):
    """These have the same weights, so nothing else would notice."""
    with pytest.raises(Interrupted):
        pretrain(small(first, tmp_path / "run"), Stopping(3))
    with pytest.raises(UnmaskError):
        pretrain(small(then, tmp_path / "run", resume="must"), Task())


@pytest.mark.trains
def test_settings_of_the_order_are_saved(finished):
    described = {kind: json.loads((finished(kind)[0] / "run.json").read_text()) for kind in ("block", "lomdm")}
    assert described["block"]["block_length"] == 2
    assert (described["lomdm"]["c1"], described["lomdm"]["c2"]) == (0.7, 0.65)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("block", {"block_length": 5}, "block_length must be between 1 and 4, not 5"),
        ("lomdm", {"c1": 0.5, "c2": 0.5}, "0 <= c2 < c1, not c1 = 0.5, c2 = 0.5"),
        ("lomdm", {"c2": 0.9}, "0 <= c2 < c1, not c1 = 0.7, c2 = 0.9"),
        ("lomdm", {"c2": -0.1}, "c2 must be a number of at least 0, not -0.1"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, kind, changes, message):
    with pytest.raises(UnmaskError) as caught:
        pretrain(small(kind, tmp_path / "run", **changes), Task())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing was written"


@pytest.mark.trains
@pytest.mark.parametrize("changes", [{"c1": 1.0, "c2": 0.0}, {"bf16": True}, {"half": True}], ids=str)
def test_more_ways_to_train_an_order(tmp_path, changes):
    model = pretrain(small("lomdm", tmp_path / "run", **changes, steps=3), Task())
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    assert math.isfinite(heldout_bound(load_model(Backbone, tmp_path / "run", PACKAGED_DENOISERS, "denoiser")))
