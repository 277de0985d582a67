"""Generation with uniform noise: laws of steps and correctors against enumeration, prompts, forwards, mistakes."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pretrain.backbone import Backbone, Output
from pretrain.uniform import Uniform, alpha_of
from pretrain.uniform_samplers import (
    Corrector,
    NoisySequences,
    _from_posterior,
    _shaped,
    budget,
    correct,
    predict,
    sample_uniform,
)
from tasks import UnmaskError
from tests.oracles.uniform import JOINTS, Enumerated, close, generator, one_hot, process, tv
from tests.toys import sweep

MANY = 60_000
NOISE = 0.012  # total variation that this many samples of 9 or 16 states show by chance, and some


class Table:
    """Exact predictions of an enumerated joint, counted."""

    def __init__(self, joint: Enumerated, predicts: str, as_if: str | None = None) -> None:
        """``as_if``: claims to be of this kind."""
        self.joint, self.kind, self.predicts = joint, predicts, as_if or predicts
        self.process, self.mask_id, self.length, self.calls = process(joint), joint.K, joint.L, 0
        self._known: dict[float, Tensor] = {}

    def __call__(self, tokens: Tensor, alpha: Tensor, is_noise: Tensor) -> Output:
        self.calls += 1
        level, base = float(alpha.min()), torch.tensor([self.joint.K**i for i in reversed(range(self.joint.L))])
        if level not in self._known:
            make = {"loo": self.joint.loo, "denoiser": self.joint.denoiser, "absorbing": self.joint.absorbing}[
                self.kind
            ]
            self._known[level] = make(level).clamp(min=1e-300).log()
        rows = (tokens * base).sum(1)
        if self.kind == "absorbing":  # where x is decided, any other u says the same
            u = torch.where(is_noise, tokens, (tokens + 1) % self.joint.K)
            rows = rows * self.joint.S + (u * base).sum(1)
        return Output(self._known[level][rows], torch.empty(0))


def law(tokens: Tensor, joint: Enumerated) -> Tensor:
    """(S,) shares of the sequences."""
    base = torch.tensor([joint.K**i for i in reversed(range(joint.L))])
    return (tokens * base).sum(1).bincount(minlength=joint.S).double() / len(tokens)


def drawn(joint: Enumerated, alpha: float, seed: int = 0, n: int = MANY) -> tuple[Tensor, NoisySequences]:
    """x_0 and (x_t, u), exactly."""
    g = generator(seed)
    clean = joint.X[torch.multinomial(joint.p0, n, replacement=True, generator=g)]
    noise = torch.randint(joint.K, clean.shape, generator=g)
    tokens = torch.where(torch.rand(clean.shape, generator=g) < alpha, clean, noise)
    return clean, NoisySequences(tokens, noise, torch.ones_like(clean, dtype=torch.bool))


def holes(joint: Enumerated, n: int = MANY) -> Tensor:
    return torch.full((n, joint.L), joint.K)


# ---------------------------------------------------------------------- predictor steps
def levels(steps: int) -> list[float]:
    return [float(alpha_of(torch.tensor(1 - i / steps).double())) for i in range(steps)] + [1.0]


def bridge(joint: Enumerated, x: Tensor, now: float, then: float) -> Tensor:
    """(S, L, K) by Bayes' rule from one position's kernels; x are probabilities (S, L, K) of x_0."""
    arrives = joint.site(now / then)[:, joint.X].permute(1, 2, 0)  # from j to x_t
    unnormalised = arrives * (x @ joint.site(then))
    return unnormalised / unnormalised.sum(-1, keepdim=True)


@pytest.mark.parametrize("predicts", ["loo", "denoiser"])
@pytest.mark.parametrize("name", sweep(["3^2", "4^2"], "3^2".__eq__))
def test_the_law_of_ancestral_samples(name, predicts):
    """Of three steps, each position on its own within a step; whichever exact prediction the model makes."""
    joint = JOINTS[name]
    p = torch.full((joint.S,), 1 / joint.S, dtype=torch.float64)
    for now, then in itertools.pairwise(levels(3)):
        each = bridge(joint, joint.loo(now), now, then)
        moves = torch.stack([each[:, at][:, joint.X[:, at]] for at in range(joint.L)]).prod(0)  # (S, S)
        p = p @ moves
    samples = sample_uniform(Table(joint, predicts), holes(joint), generator(), nfe=3)
    assert samples.nfe == 3
    assert tv(law(samples.tokens, joint), p) < NOISE
    finely = sample_uniform(Table(joint, predicts), holes(joint, 20_000), generator(), nfe=40).tokens
    assert tv(law(finely, joint), joint.p0) < 2 * NOISE + 0.01


@pytest.mark.parametrize("method", ["audm", "reaudm"])
def test_absorbing_samples_come_near_the_data(method):
    joint = JOINTS["3^2"]
    prompts = holes(joint, 20_000)
    few, more = (
        tv(law(sample_uniform(Table(joint, "absorbing"), prompts, generator(), n, method).tokens, joint), joint.p0)
        for n in (2, 30)
    )
    assert more < 2 * NOISE + 0.01 < few


@pytest.mark.parametrize("method", ["audm", "reaudm", "coupling"])
def test_the_two_time_law_of_a_step_given_the_clean_symbol(method):
    """(x_s, u_s) as at that time; (x_s, x_t) maximally coupled, or, for reaudm, as the Markov process has it."""
    joint = Enumerated(3, 1)
    now, then, eye = 0.35, 0.6, torch.eye(3, dtype=torch.float64)
    for k in range(3):
        clean, state = drawn(joint, now, k)
        clean = torch.full_like(clean, k)
        tokens = torch.where(torch.rand(clean.shape, generator=generator(k + 9)) < now, clean, state.noise)
        state = NoisySequences(tokens, state.noise, state.free)
        posterior = one_hot(clean, 3)
        if method != "coupling":
            posterior = torch.where(state.is_noise.unsqueeze(-1), posterior, one_hot(state.tokens, 3))
        after = _from_posterior(process(joint), state, posterior, now, then, method, generator(k))
        found = (after.tokens * 3 + state.tokens).flatten().bincount(minlength=9).double().view(3, 3) / MANY
        marginal = joint.site(now)[k]
        if method == "reaudm":
            expected = joint.site(then)[k][:, None] * joint.site(now / then)
        else:
            moved = (then - now) / (1 - now)
            expected = (moved * eye[k][:, None] + (1 - moved) * eye) * marginal
        assert tv(found.flatten(), expected.flatten()) < NOISE
        if method != "coupling":
            pairs = (after.tokens * 3 + after.noise).flatten().bincount(minlength=9).double() / MANY
            assert tv(pairs, joint.pair_site(then)[k].flatten()) < NOISE
        changes = float((after.tokens != state.tokens).double().mean())
        least = float(tv(joint.site(then)[k], marginal))
        assert (changes == pytest.approx(least, abs=NOISE)) == (method != "reaudm"), "as rarely as it can"


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [0.0, 0.3])
def test_the_law_of_psi_samples(kappa):
    """A position follows the bridge with probability kappa, and is else drawn from x_0 ~ d, renoised, alone."""
    joint = JOINTS["4^2"]
    p = torch.full((joint.S,), 1 / joint.S, dtype=torch.float64)
    plain = p
    for now, then in itertools.pairwise(levels(12)):
        follows, anew = bridge(joint, joint.loo(now), now, then), joint.denoiser(now) @ joint.site(then)
        moves = [kappa * follows + (1 - kappa) * anew, follows]
        p, plain = (
            q @ torch.stack([each[:, at][:, joint.X[:, at]] for at in range(joint.L)]).prod(0)
            for q, each in zip((p, plain), moves, strict=True)
        )
    prompts = holes(joint, 4 * MANY)  # half the noise
    tokens = sample_uniform(Table(joint, "loo"), prompts, generator(), nfe=12, kappa=kappa).tokens
    assert tv(p, plain) > 1.5 * NOISE, "kappa matters"
    assert tv(law(tokens, joint), p) < 0.5 * NOISE


def test_the_law_of_coupling_samples():
    """Each position takes a symbol of the denoiser with probability (alpha_s - alpha_t) / (1 - alpha_t)."""
    joint = JOINTS["4^2"]
    p = torch.full((joint.S,), 1 / joint.S, dtype=torch.float64)
    for now, then in itertools.pairwise(levels(4)):
        moved = (then - now) / (1 - now)
        stays = torch.nn.functional.one_hot(joint.X, joint.K).double()
        each = moved * joint.denoiser(now) + (1 - moved) * stays
        p = p @ torch.stack([each[:, at][:, joint.X[:, at]] for at in range(joint.L)]).prod(0)
    model, prompts = Table(joint, "denoiser"), holes(joint)
    assert tv(law(sample_uniform(model, prompts, generator(), 4, "coupling").tokens, joint), p) < NOISE
    finely = sample_uniform(model, prompts[:20_000], generator(), 40, "coupling").tokens
    assert tv(law(finely, joint), joint.p0) < 2 * NOISE + 0.01, "it goes to the data as steps grow"


# ---------------------------------------------------------------------- correctors
def drift(joint: Enumerated, model: Table, corrector: Corrector, alpha: float = 0.6) -> float:
    _, state = drawn(joint, alpha)
    after = correct(model, state, alpha, corrector, generator(1))
    assert not torch.equal(after.tokens, state.tokens)
    return float(tv(law(after.tokens, joint), joint.marginal(alpha)))


@pytest.mark.parametrize("predicts", ["loo", "denoiser"])
def test_drawing_a_random_position_anew_changes_no_law(predicts):
    assert drift(JOINTS["3^2"], Table(JOINTS["3^2"], predicts), Corrector()) < NOISE


@pytest.mark.parametrize("selection", ["margin", "current"])
def test_informed_selections_do_and_metropolis_mends_it(selection):
    joint = JOINTS["3^2"]
    model = Table(joint, "loo")
    assert drift(joint, model, Corrector(selection=selection)) > 3 * NOISE
    assert drift(joint, model, Corrector(selection=selection, metropolis=True)) < NOISE


def test_two_positions_at_a_time_are_approximate():
    joint = JOINTS["3^2"]
    assert drift(joint, Table(joint, "loo"), Corrector(positions=2)) > 1.5 * NOISE


def test_the_absorbing_corrector_keeps_symbols_and_noise():
    joint, alpha = JOINTS["3^2"], 0.6
    _, state = drawn(joint, alpha)
    after = correct(Table(joint, "absorbing"), state, alpha, Corrector(), generator(1))
    assert tv(law(after.tokens, joint), joint.marginal(alpha)) < NOISE
    pairs = torch.cat([after.tokens, after.noise], 1)
    base = torch.tensor([27, 9, 3, 1])
    found = (pairs * base).sum(1).bincount(minlength=81).double() / MANY
    assert tv(found, joint.pair_joint(alpha).sum(0)) < 3 * NOISE


def test_chances_by_hand():
    conditional = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]]).double().log()
    tokens, free = torch.tensor([[0, 1]]), torch.tensor([[True, True]])

    def chances(selection: str, tau: float = 1.0) -> list[float]:
        return Corrector(selection=selection, tau=tau).log_chances(conditional, tokens, free).exp()[0].tolist()

    assert chances("random") == pytest.approx([0.5, 0.5])
    margin = [0.2 / 0.7, 0.6 / 0.3]
    assert chances("margin") == pytest.approx([m / sum(margin) for m in margin])
    current = [1 / 0.7, 1 / 0.3]
    assert chances("current") == pytest.approx([c / sum(current) for c in current])
    confidence = [1 / 0.7**2, 1 / 0.6**2]
    assert chances("confidence", tau=0.5) == pytest.approx([c / sum(confidence) for c in confidence])
    given = Corrector().log_chances(conditional, tokens, torch.tensor([[True, False]]))
    assert given.exp()[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("nfe", "corrector", "expected"),
    [
        (256, Corrector(steps=2), (86, 85)),
        (16, None, (16, 0)),
        (16, Corrector(steps=1), (9, 7)),
        (16, Corrector(steps=1, metropolis=True), (6, 5)),
        (1, Corrector(steps=2), (1, 0)),
    ],
)
def test_forwards_are_as_many_as_asked_for(nfe, corrector, expected):
    assert budget(nfe, corrector) == expected
    model = Table(JOINTS["3^2"], "loo")
    samples = sample_uniform(model, holes(JOINTS["3^2"], 5), generator(), nfe, corrector=corrector)
    assert samples.nfe == model.calls == nfe


# ---------------------------------------------------------------------- temperature, sensitivity
@pytest.mark.parametrize("predicts", ["loo", "denoiser"])
def test_tempering_the_denoiser_also_holds_on_to_the_present_symbol(predicts):
    """(1 / T - 1) Delta more than tempering leave-one-out, whichever of the two the network predicts."""
    joint, alpha, temperature = JOINTS["4^2"], 0.7, 0.5
    state = NoisySequences(joint.X, joint.X, torch.ones_like(joint.X, dtype=torch.bool))
    loo = joint.loo(alpha).log()
    tempered = predict(Table(joint, predicts), state, alpha, "loo", temperature, tempers="denoiser")
    extra = (1 / temperature - 1) * math.log1p(joint.K * alpha / (1 - alpha))
    present = torch.nn.functional.one_hot(joint.X, joint.K).double()
    close(tempered, (loo / temperature + extra * present).log_softmax(-1), 1e-9)
    others = predict(Table(joint, predicts), state, alpha, "loo", temperature)
    close(others, (loo / temperature).log_softmax(-1), 1e-9)
    greedy = predict(Table(joint, predicts), state, alpha, "denoiser", 0.0, tempers="denoiser")
    assert torch.equal(greedy.argmax(-1), joint.denoiser(alpha).argmax(-1))
    assert (greedy.exp().max(-1).values == 1).all()
    close(_shaped(loo, 0.5, 1.0), (loo / 0.5).log_softmax(-1))
    assert (_shaped(loo, 0.0, 1.0).exp().max(-1).values == 1).all()


ONE = Enumerated(4, 1)
ONE.p0 = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
WAYS = [
    ("loo", "ancestral", None),
    ("loo", "ancestral", Corrector(steps=1)),
    ("denoiser", "coupling", None),
    ("absorbing", "audm", None),
    ("absorbing", "reaudm", None),
    ("absorbing", "reaudm", Corrector(steps=1)),
]


@pytest.mark.parametrize(("predicts", "method", "corrector"), sweep(WAYS, lambda predicts, *_: predicts == "denoiser"))
def test_every_sampler_tempers_what_the_others_say(predicts, method, corrector):
    """Of one position, whose law is p: p^(1/T) renormalised, the nucleus, and at 0 the most likely symbol alone."""
    model, prompts = Table(ONE, predicts), holes(ONE, 30_000)

    def found(**shape: float) -> Tensor:
        return law(sample_uniform(model, prompts, generator(), 32, method, corrector, **shape).tokens, ONE)

    assert tv(found(), ONE.p0) < NOISE
    assert tv(found(temperature=0.5), ONE.p0**2 / (ONE.p0**2).sum()) < NOISE
    assert found(temperature=0.0).tolist() == [1, 0, 0, 0]
    assert tv(found(top_p=0.6), torch.tensor([4 / 7, 3 / 7, 0, 0], dtype=torch.float64)) < NOISE


def sensitivity(model: Table, state: NoisySequences, alpha: float, draw: torch.Generator, trials: int = 10) -> Tensor:
    """(N,) how far a leave-one-out prediction looks at its own symbol: the mean total variation by which it moves at a
    random position when the symbol there is replaced; 0 for an exact one (arXiv 2605.22765, appendix H)."""
    (n, length), rows = state.tokens.shape, torch.arange(len(state.tokens))
    before, moved = predict(model, state, alpha, "loo").exp(), []
    for _ in range(trials):
        at = torch.randint(length, (n,), generator=draw)
        tokens = state.tokens.clone()
        tokens[rows, at] = (tokens[rows, at] + torch.randint(1, before.shape[-1], (n,), generator=draw)) % before.shape[
            -1
        ]
        after = predict(model, state.moved(tokens), alpha, "loo").exp()
        moved.append(0.5 * (after[rows, at] - before[rows, at]).abs().sum(-1))
    return torch.stack(moved).mean(0)


def test_sensitivity_is_zero_for_leave_one_out_and_not_for_a_denoiser_taken_for_it():
    joint = JOINTS["3^2"]
    _, state = drawn(joint, 0.5, n=200)
    assert sensitivity(Table(joint, "loo"), state, 0.5, generator()).max() < 1e-12
    assert sensitivity(Table(joint, "denoiser"), state, 0.5, generator()).max() < 1e-9  # converted
    assert sensitivity(Table(joint, "denoiser", "loo"), state, 0.5, generator()).mean() > 0.1


# ---------------------------------------------------------------------- backbones, prompts, mistakes
def backbone(predicts: str = "loo", **more) -> Backbone:
    torch.manual_seed(0)
    return Backbone(5, [[i] for i in range(6)], 16, 2, 2, noise="uniform", predicts=predicts, **more).eval()


SETTINGS = [
    ("loo", {}), ("loo", {"corrector": Corrector(selection="margin", positions=3)}), ("loo", {"temperature": 0.0}),
    ("loo", {"kappa": 0.3, "top_p": 0.8}), ("denoiser", {"corrector": Corrector(selection="current", metropolis=True)}),
    ("denoiser", {"method": "coupling", "corrector": Corrector()}), ("absorbing", {}),
    ("absorbing", {"method": "reaudm", "corrector": Corrector(positions=2)}),
]  # fmt: skip


@pytest.mark.parametrize(("predicts", "settings"), SETTINGS, ids=str)
def test_what_a_prompt_gives_never_changes(predicts, settings):
    model = backbone(predicts)
    prompts = torch.randint(6, (40, 6), generator=generator(2))
    found = sample_uniform(model, prompts, generator(), nfe=7, **settings)
    given = prompts != model.mask_id
    assert torch.equal(found.tokens[given], prompts[given])
    assert (found.tokens < 5).all()
    assert found.nfe <= 7
    assert torch.equal(found.tokens, sample_uniform(model, prompts, generator(), nfe=7, **settings).tokens)
    if settings.get("temperature") != 0:
        assert not torch.equal(found.tokens, sample_uniform(model, prompts, generator(1), nfe=7, **settings).tokens)


@pytest.mark.parametrize("predicts", ["loo", "denoiser", "absorbing"])
def test_columns_keep_to_their_own_symbols(predicts):
    torch.manual_seed(0)
    model = Backbone(5, [[0], [1]], 16, 1, 2, noise="uniform", predicts=predicts, vocabularies=[2, 3]).eval()
    method = "reaudm" if predicts == "absorbing" else None
    tokens = sample_uniform(model, torch.full((300, 2), 5), generator(), 6, method, Corrector(steps=1)).tokens
    assert set(tokens[:, 0].tolist()) == {0, 1}
    assert set(tokens[:, 1].tolist()) == {2, 3, 4}


def test_an_absorbing_model_is_certain_of_what_is_decided():
    model = backbone("absorbing")
    tokens = torch.randint(5, (20, 6), generator=generator())
    noise = torch.randint(5, (20, 6), generator=generator(1))
    state = NoisySequences(tokens, noise, torch.ones_like(tokens, dtype=torch.bool))
    found = predict(model, state, 0.4, "absorbing").exp()
    certain = found.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert (certain[~state.is_noise] == 1).all()
    assert (certain[state.is_noise] < 1).all()


@pytest.mark.parametrize(
    ("predicts", "settings", "message"),
    [
        ("loo", {"method": "audm"}, "predicts 'loo' does not sample by 'audm'"),
        ("absorbing", {"method": "ancestral"}, "predicts 'absorbing' does not sample by 'ancestral'"),
        ("absorbing", {"kappa": 0.5}, "kappa is of ancestral"),
        ("absorbing", {"corrector": Corrector(selection="margin")}, "chooses positions at random"),
        ("loo", {"nfe": 0}, "nfe must be at least 1"),
        ("loo", {"temperature": -1.0}, "temperature at least 0"),
        ("loo", {"top_p": 0.0}, "top_p above 0"),
        ("loo", {"kappa": 1.5}, "kappa between 0 and 1"),
        ("loo", {"tempers": "loo"}, "tempers must be one of others, denoiser, not 'loo'"),
    ],
    ids=str,
)
def test_mistakes(predicts, settings, message):
    with pytest.raises(UnmaskError, match=message):
        sample_uniform(backbone(predicts), torch.full((2, 6), 5), generator(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "best"}, "selection must be one of random, margin, current, confidence, not 'best'"),
        ({"steps": 0}, "steps and positions must be at least 1"),
        ({"tau": 0.0}, "tau above 0"),
        ({"metropolis": True, "positions": 2}, "one position at a time"),
    ],
    ids=str,
)
def test_correctors_that_are_not_allowed(settings, message):
    with pytest.raises(UnmaskError, match=message):
        Corrector(**settings)


def test_prompts_that_cannot_be_completed():
    with pytest.raises(UnmaskError, match=r"integers, not \(2, 6\) of torch.float32"):
        sample_uniform(backbone(), torch.full((2, 6), 5.0), generator())
    with pytest.raises(UnmaskError, match="symbols must be between 0 and 4"):
        sample_uniform(backbone(), torch.full((2, 6), 6), generator())
    torch.manual_seed(0)
    columns = Backbone(4, [[0], [1]], 16, 1, 2, noise="uniform", predicts="loo", vocabularies=[2, 2])
    with pytest.raises(UnmaskError, match="misses symbol 0 at position 1"):
        sample_uniform(columns, torch.tensor([[4, 0]]), generator())
    with pytest.raises(UnmaskError, match=r"prompts must be \(N, 6\) integers, not \(2, 5\)"):
        sample_uniform(backbone(), torch.full((2, 5), 5), generator())


def test_uniform_is_one_for_all():
    assert isinstance(backbone().process, Uniform)
