"""Uniform diffusion against brute-force enumeration: conversions, bridges, losses, the absorbing form, correctors."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain import likelihood, masking
from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model
from pretrain.objectives import uniform as losses
from pretrain.samplers import sample
from pretrain.train import AUDMConfig, MaxCouplingConfig, UDMConfig, pretrain
from pretrain.uniform import ALPHA_MIN, Uniform, alpha_of
from pretrain.uniform_samplers import sample_uniform
from tasks import UnmaskError
from tests.oracles.enumeration import TableTask
from tests.oracles.uniform import JOINTS, Enumerated, close, generator, one_hot, process, tv
from tests.toys import sweep
from unmask_env.denoiser import FrozenDenoiser

ALPHAS = (0.05, 0.3, 0.7, 0.95)


@pytest.fixture(params=JOINTS)
def joint(request: pytest.FixtureRequest) -> Enumerated:
    return JOINTS[request.param]


def at(alpha: float, rows: int) -> Tensor:
    return torch.full((rows, 1), alpha, dtype=torch.float64)


# ---------------------------------------------------------------------- (a) conversions
@pytest.mark.parametrize("alpha", ALPHAS)
def test_predictions_convert_into_each_other(joint, alpha):
    u, a = process(joint), at(alpha, joint.S)
    d, r = joint.denoiser(alpha).log(), joint.loo(alpha).log()
    close(u.convert(r, joint.X, a, "loo", "denoiser"), d)
    close(u.convert(d, joint.X, a, "denoiser", "loo"), r, 1e-9)
    close(u.score(r, joint.X, a).exp(), joint.ratios(alpha))
    p = joint.marginal(alpha)
    for row, place in itertools.product(range(joint.S), range(joint.L)):
        changed = torch.stack([p[joint.changed(row, place, j)] for j in range(joint.K)])
        close(u.conditional(r, a)[row, place].exp(), changed / changed.sum())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_leave_one_out_does_not_depend_on_its_own_symbol(joint, alpha):
    """Of the enumeration, and of what a denoiser converts to."""
    u = process(joint)
    r = u.convert(joint.denoiser(alpha).log(), joint.X, at(alpha, joint.S), "denoiser", "loo").exp()
    for row, place, j in itertools.product(range(joint.S), range(joint.L), range(joint.K)):
        close(r[joint.changed(row, place, j), place], r[row, place], 1e-9)


@pytest.mark.parametrize(("source", "target"), [("absorbing", "loo"), ("absorbing", "denoiser"), ("loo", "absorbing")])
def test_the_absorbing_prediction_is_not_converted(source, target):
    joint = JOINTS["3^2"]
    with pytest.raises(UnmaskError, match="cannot be converted"):
        process(joint).convert(joint.loo(0.5).log(), joint.X, at(0.5, 9), source, target)


# ---------------------------------------------------------------------- (b) the bridge
STEPS = [(0.2, 0.3), (0.4, 0.8), (0.7, 0.75), (0.5, 1.0)]


@pytest.mark.parametrize(("now", "then"), STEPS)
def test_the_bridge_of_leave_one_out_is_the_reverse_marginal(joint, now, then):
    u, a, b = process(joint), at(now, joint.S), at(then, joint.S)
    true = joint.reverse(now, then)
    close(u.bridge(joint.loo(now).log(), joint.X, a, b).exp(), true)
    d = joint.denoiser(now)
    mixed = sum(
        d[..., k : k + 1] * u.bridge(one_hot(torch.full_like(joint.X, k), joint.K), joint.X, a, b).exp()
        for k in range(joint.K)
    )
    close(mixed, true)  # a symbol drawn from the denoiser, then its bridge
    assert tv(u.bridge(d.log(), joint.X, a, b).exp(), true).max() > 0.02, "plugging the denoiser in is wrong"
    if then == 1:
        close(u.bridge(joint.loo(now).log(), joint.X, a, b).exp(), d)


# ---------------------------------------------------------------------- (c) losses
def expectation(joint: Enumerated, alpha: float, table: Tensor, loss) -> Tensor:
    """E over x_0 and x_t of the sum over positions of loss(log-probabilities, x_0, x_t)."""
    s = joint.S
    weight = (joint.p0[:, None] * joint.kernel(alpha)).flatten()
    clean, tokens = joint.X.repeat_interleave(s, 0), joint.X.repeat(s, 1)
    return (weight[:, None] * loss(table.repeat(s, 1, 1), clean, tokens)).sum()


def losses_of(joint: Enumerated, alpha: float, slope: float) -> dict[str, tuple]:
    """Per loss and kind of network output: the loss of a table (S, L, K) of log-probabilities."""
    u = process(joint)
    a = at(alpha, joint.S**2)

    def plug_in(x, clean, tokens):
        return losses.plug_in_bound(u, x, clean, tokens, a, slope)

    def coupling(x, clean, tokens):
        return losses.maximal_coupling_bound(x, clean, tokens, a, slope)

    def entropy(x, clean, tokens):
        return losses.cross_entropy(x, clean)

    def given(kind, wanted, loss):
        return lambda x, clean, tokens: loss(u.convert(x, tokens, a, kind, wanted), clean, tokens)

    return {
        "plug-in, loo": (given("loo", "loo", plug_in), "loo"),
        "plug-in, denoiser": (given("denoiser", "loo", plug_in), "denoiser"),
        "cross-entropy, denoiser": (given("denoiser", "denoiser", entropy), "denoiser"),
        "cross-entropy, loo": (given("loo", "denoiser", entropy), "loo"),
        "coupling, denoiser": (given("denoiser", "denoiser", coupling), "denoiser"),
        "coupling, loo": (given("loo", "denoiser", coupling), "loo"),
    }


@pytest.mark.parametrize("name", losses_of(JOINTS["3^2"], 0.45, -1.0))
def test_what_each_loss_teaches_each_network(name):
    """Minimised over free tables: the network's own kind, whatever the loss."""
    joint, alpha = JOINTS["3^2"], 0.45
    loss, kind = losses_of(joint, alpha, -1.0)[name]
    free = torch.zeros(joint.S, joint.L, joint.K, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [free], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = expectation(joint, alpha, free.log_softmax(-1), loss)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    tables = {"loo": joint.loo(alpha), "denoiser": joint.denoiser(alpha)}
    found = free.detach().softmax(-1)
    assert tv(found, tables.pop(kind)).max() < 1e-5
    assert tv(found, tables.popitem()[1]).max() > 0.05


def udlm(x: Tensor, clean: Tensor, tokens: Tensor, alpha: float, slope: float) -> Tensor:
    """The closed form that UDLM and Duo compute; x are probabilities."""
    k = x.shape[-1]
    true = k * alpha * torch.nn.functional.one_hot(clean, k).double() + 1 - alpha
    model = k * alpha * x + 1 - alpha
    t, m = (y.gather(-1, tokens[..., None]) for y in (true, model))
    inner = (true / t * (m.log() + true.log() - model.log() - t.log())).sum(-1)
    return slope / (k * alpha) * (k / t - k / m)[..., 0] - slope / (k * alpha) * inner


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.99])
def test_the_plug_in_bound_is_udlms(joint, alpha):
    x = torch.rand(joint.S**2, joint.L, joint.K, generator=generator(), dtype=torch.float64).log_softmax(-1)
    clean, tokens = joint.X.repeat_interleave(joint.S, 0), joint.X.repeat(joint.S, 1)
    found = losses.plug_in_bound(process(joint), x, clean, tokens, at(alpha, joint.S**2), -0.7)
    close(found, udlm(x.exp(), clean, tokens, alpha, -0.7), 1e-8)
    assert (found >= 0).all()
    in_float32 = losses.plug_in_bound(process(joint), x.float(), clean, tokens, at(alpha, joint.S**2).float(), -0.7)
    torch.testing.assert_close(in_float32.double(), found, rtol=1e-3, atol=1e-4)


def integrate(f, n: int = 80) -> float:
    """Over t in (0, 1), with t = u^2 (3 - 2 u), which tames the ends."""
    x, w = np.polynomial.legendre.leggauss(n)
    return sum(b / 2 * 6 * u * (1 - u) * float(f(u * u * (3 - 2 * u))) for u, b in zip((x + 1) / 2, w, strict=True))


@pytest.mark.parametrize("name", ["3^2", "4^2"])
def test_bounds_of_exact_predictions(name):
    """Plug-in with leave-one-out: the data's entropy. With the denoiser in its place, or coupled maximally: more."""
    joint = JOINTS[name]

    def whole(kind: str, table) -> float:
        def integrand(t: float) -> Tensor:
            loss = losses_of(joint, 1 - t, -1.0)[kind][0]
            return expectation(joint, 1 - t, table(1 - t).log(), loss)

        return integrate(integrand)

    entropy = joint.entropy()
    assert whole("plug-in, loo", joint.loo) == pytest.approx(entropy, abs=1e-5)
    assert whole("plug-in, loo", joint.denoiser) > entropy + 0.5  # a denoiser taken for leave-one-out
    assert whole("coupling, denoiser", joint.denoiser) > entropy + 0.2


def test_the_priors_divergence_by_hand():
    u = Uniform(torch.tensor([[True, True, False], [True, True, True]]))
    for place, k in enumerate((2, 3)):
        q = [0.1 + 0.9 / k] + [0.9 / k] * (k - 1)
        expected = sum(p * math.log(p * k) for p in q)
        assert losses.prior_divergence(u, 0.1, 4)[3, place].item() == pytest.approx(expected)
    assert losses.prior_divergence(u, 0.0, 1).abs().max() < 1e-12


# ---------------------------------------------------------------------- (d) the absorbing form
def test_the_absorbing_posterior_refines_the_denoiser():
    """Carry-over where x is not u; the mean over u is the denoiser; a tilt towards u relates it to leave-one-out."""
    joint, alpha = JOINTS["3^2"], 0.45
    x, u = joint.pairs()
    post = joint.absorbing(alpha)
    own = post.gather(-1, x[..., None])[..., 0]
    close(own[x != u], torch.ones_like(own[x != u]))
    weight = joint.pair_joint(alpha).sum(0).view(joint.S, joint.S)
    mean = (weight[..., None, None] * post.view(joint.S, joint.S, joint.L, joint.K)).sum(1) / weight.sum(1)[
        :, None, None
    ]
    close(mean, joint.denoiser(alpha))
    for place in range(joint.L):
        others = joint.pair_joint(alpha, place)
        rho = torch.einsum("st,sk->tk", others / others.sum(0), joint.one_hot[:, place])
        tilted = rho.log() - math.log(1 - alpha) * torch.nn.functional.one_hot(u[:, place], joint.K).double()
        same = x[:, place] == u[:, place]
        close(tilted.softmax(-1)[same], post[same, place])


@pytest.mark.parametrize("name", ["3^2", "4^2"])
def test_the_absorbing_bound_is_tight(name):
    joint = JOINTS[name]
    x, u = joint.pairs()

    def integrand(t: float) -> Tensor:
        weight = joint.pair_joint(1 - t)
        table = joint.absorbing(1 - t).clamp(min=1e-300).log()
        total = torch.zeros((), dtype=torch.float64)
        for row in range(joint.S):
            clean = joint.X[row].expand_as(x)
            loss = losses.absorbing_bound(table, clean, x, u, at(1 - t, len(x)), -1.0)
            total = total + (weight[row][:, None] * torch.where(weight[row][:, None] > 0, loss, 0.0)).sum()
        return total

    assert integrate(integrand, 40) == pytest.approx(joint.entropy(), abs=1e-4)


# ---------------------------------------------------------------------- noise
def test_noise_and_corruption_follow_the_alphabet():
    alphabet = torch.tensor([[True, True, False, False], [False, True, True, True]])
    u = Uniform(alphabet)
    noise = u.noise(4000, generator())
    for place, k in enumerate((2, 3)):
        share = noise[:, place].bincount(minlength=4) / 4000
        close(share, alphabet[place].float() / k, 0.04)
    clean = torch.tensor([[1, 3]]).expand(4000, -1)
    x = u.corrupt(clean, torch.tensor([[0.6, 0.2]]), noise, generator(1))
    assert float((x[:, 0] == 1).float().mean()) == pytest.approx(0.6 + 0.4 / 2, abs=0.03)
    assert float((x[:, 1] == 3).float().mean()) == pytest.approx(0.2 + 0.8 / 3, abs=0.03)
    r = torch.where(alphabet, 0.0, -torch.inf).double().log_softmax(-1).unsqueeze(0)
    a = torch.tensor([[0.3]])
    for made in (
        u.conditional(r, a),
        u.bridge(r, torch.tensor([[0, 2]]), a, a + 0.3),
        u.convert(r, torch.tensor([[0, 2]]), a, "loo", "denoiser"),
    ):
        close(made.exp().sum(-1), torch.ones(1, 2, dtype=torch.float64))
        assert (made.exp()[:, ~alphabet] == 0).all()


def test_an_alphabet_that_misses_a_symbol_is_one_clear_error():
    u = Uniform(torch.tensor([[True, True, False], [True, True, True]]))
    u.check(torch.tensor([[0, 2], [1, 0]]))
    with pytest.raises(UnmaskError, match="the noise alphabet misses symbol 2 at position 0, which the data holds"):
        u.check(torch.tensor([[0, 2], [2, 0]]))
    with pytest.raises(UnmaskError, match="at least 2 symbols"):
        Uniform(torch.tensor([[True, False]]))


# ---------------------------------------------------------------------- training
def backbone(predicts: str, seed: int = 0, **more) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Backbone(3, [[0], [1]], 8, 1, 2, noise="uniform", predicts=predicts, **more)
    return model.eval()


def loss_at_time(model: Backbone, joint: Enumerated, t: float, loss: str) -> Tensor:
    """Expected over the data and all its corruptions at one time, by enumeration."""
    x, u = joint.pairs()
    alpha = float(alpha_of(torch.tensor(t).double()))
    level = torch.full(x.shape, alpha, dtype=torch.float64)
    weight = joint.pair_joint(alpha)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for row in range(joint.S):
            each = losses.loss_at(model, joint.X[row].expand_as(x), losses.Corrupted(x, level, u), loss)
            total = total + (weight[row] * each.sum(1)).sum()
    return total


CASES = [("loo", "bound"), ("denoiser", "bound"), ("denoiser", "coupling"), ("loo", "cross_entropy"),
         ("absorbing", "bound"), ("absorbing", "cross_entropy")]  # fmt: skip


@pytest.mark.parametrize("t", sweep([0.2, 0.8], lambda t: t == 0.2))
@pytest.mark.parametrize(("predicts", "loss"), CASES)
def test_the_training_loss_is_unbiased(predicts, loss, t, monkeypatch):
    joint, model, draw = JOINTS["3^2"], backbone(predicts), generator(1)
    monkeypatch.setattr(masking, "low_discrepancy_times", lambda n, _: torch.full((n,), t))
    expected = float(loss_at_time(model, joint, t, loss)) / joint.L
    clean = joint.X[torch.multinomial(joint.p0, 40_000, replacement=True, generator=draw)]
    with torch.no_grad():
        found = torch.stack(
            [losses.uniform_loss(model, part, draw, loss, prompt_fraction=0.0) for part in clean.split(400)]
        )
    error = float(found.std()) / len(found) ** 0.5
    assert error < 0.05 * expected
    assert float(found.mean()) == pytest.approx(expected, abs=5 * error)


@pytest.mark.parametrize("predicts", ["loo", "absorbing"])
def test_the_likelihood_bound_is_unbiased_and_a_bound(predicts):
    joint, model = JOINTS["3^2"], backbone(predicts)
    expected = integrate(lambda t: loss_at_time(model, joint, t, "bound"), 40)
    expected += float(losses.prior_divergence(model.process, ALPHA_MIN, 1).sum())
    clean = joint.X[torch.multinomial(joint.p0, 20_000, replacement=True, generator=generator())]
    found = likelihood.bound(model, clean, generator(1), samples=4)
    mean, error = likelihood.mean_and_error(found.path)
    assert error < 0.05 * mean
    assert mean == pytest.approx(expected, abs=5 * error)
    assert mean > joint.entropy()
    assert torch.equal(found.path, found.order)
    assert not found.exact
    with pytest.raises(UnmaskError, match="for masked models"):
        likelihood.bound(model, clean[:2], generator(), truncated=True)


@pytest.mark.parametrize("predicts", ["loo", "denoiser", "absorbing"])
def test_given_positions_cost_nothing_and_teach_nothing(predicts):
    model = backbone(predicts)
    clean, noise = torch.tensor([[0, 1]]), torch.tensor([[2, 1]])
    alpha = torch.tensor([[1.0, 0.5]])
    each = losses.loss_at(model, clean, losses.Corrupted(clean, alpha, noise), "bound")
    assert each[0, 0] == 0
    assert each.isfinite().all()
    (each.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("predicts", "loss"), CASES)
def test_gradients_are_finite_at_the_ends_of_time(predicts, loss, monkeypatch):
    model = backbone(predicts)
    for t in (1e-7, 1.0):
        monkeypatch.setattr(masking, "low_discrepancy_times", lambda n, _, t=t: torch.full((n,), t))
        value = losses.uniform_loss(model, JOINTS["3^2"].X, generator(), loss)
        value.backward()
        assert value.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


KINDS = {
    "udm": UDMConfig, "udm-denoiser": lambda **s: UDMConfig(predicts="denoiser", **s),
    "udm-entropy": lambda **s: UDMConfig(loss="cross_entropy", **s), "maxcoupling": MaxCouplingConfig,
    "audm": AUDMConfig,
}  # fmt: skip


@pytest.mark.trains
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_lower_the_bound(kind, tmp_path):
    task = TableTask(JOINTS["3^3"].p0.view(3, 3, 3))
    task.name = "table"
    config = KINDS[kind](
        task="table", out=str(tmp_path / "run"), steps=60, batch=64, dim=16, layers=1, heads=2, lr=2e-2, ema=0.5,
        warmup=3, threads=1,
    )  # fmt: skip
    model = pretrain(config, task)
    loaded = load_model(Backbone, tmp_path / "run", PACKAGED_DENOISERS, "denoiser")
    assert (loaded.noise, loaded.predicts) == ("uniform", model.predicts)
    clean = task.clean(2000, generator(5))
    found, start = (
        float(likelihood.bound(m, clean, generator(6), samples=4).path.mean())
        for m in (loaded, Backbone(3, task.coordinates.tolist(), 16, 1, 2, **config.architecture()))
    )
    assert found < start
    if kind in ("udm", "audm"):
        assert found < 3 * math.log(3), "better than knowing nothing"
    prompts = task.heldout(20).tokens
    made = sample_uniform(loaded, prompts, generator(), nfe=6).tokens
    assert torch.equal(made[prompts != 3], prompts[prompts != 3])


# ---------------------------------------------------------------------- the wrong model in the wrong place
@pytest.mark.parametrize("predicts", ["loo", "denoiser", "absorbing"])
def test_a_uniform_checkpoint_where_masks_are_needed_is_one_clear_error(predicts):
    model = backbone(predicts)
    with pytest.raises(UnmaskError, match="trained with uniform noise; sample it with sample_uniform"):
        sample(model, torch.full((1, 2), 3), generator())
    task = TableTask(JOINTS["3^2"].p0.view(3, 3))
    if predicts == "absorbing":
        FrozenDenoiser(model, task)
        return
    with pytest.raises(UnmaskError, match=f"trained with uniform noise and predicts '{predicts}'") as caught:
        FrozenDenoiser(model, task)
    assert "\n" not in str(caught.value)


def test_a_masked_checkpoint_where_noise_is_needed_is_one_clear_error():
    with pytest.raises(UnmaskError, match="trained with masks"):
        sample_uniform(Backbone(3, [[0], [1]], 8, 1, 2), torch.full((1, 2), 3), generator())


@pytest.mark.parametrize(
    "settings", [{"noise": "uniform", "order": "context"}, {"noise": "uniform", "block_length": 1}, {"predicts": "loo"},
                 {"noise": "gauss"}], ids=str,
)  # fmt: skip
def test_backbones_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=r"noise must be|predicts one of"):
        Backbone(3, [[0], [1]], 8, 1, 2, **settings)
