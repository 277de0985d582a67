"""The order policy: a distribution over fillable positions, equal to its base at the start, seeing what it may see."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tasks
from agents.policy import OrderPolicy, PolicyConfig, belief_log_prob, features, load_policy, new_policy
from pretrain.backbone import Backbone, parameter_count
from pretrain.checkpoint import CheckpointError, save_model
from tasks import UnknownNameError, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import observation as observation_of
from tests.toys import rollout, sweep
from unmask_env.denoiser import FrozenDenoiser, TableDenoiser, load_denoiser
from unmask_env.reference import (
    Margin,
    MaxConfidence,
    Random,
    SoftmaxConfidence,
    SoftmaxMargin,
    TopK,
    reference,
)
from unmask_env.state import Denoised, Observation, Rules

INF = math.inf
LENGTH, VOCAB, HIDDEN = 5, 3, 6
COORDINATES = [[i, i // 2] for i in range(LENGTH)]
READING = {"dim": 8, "layers": 2, "heads": 2, "belief_weight": 1.0, "defer_above": 2.0}  # reads every board
BASES = ("none", "softmax_confidence", "softmax_margin")


def policy(seed: int = 0, **options) -> OrderPolicy:
    """A small policy that is not at its start, so that its scores depend on what it sees."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = OrderPolicy(VOCAB, COORDINATES, **READING | options)
        torch.nn.init.normal_(made.head.feature_head.weight)
    return made.eval()


def observe(seed: int, n: int = 6) -> Observation:
    """Random boards; row 0 has everything masked, row 1 nothing, row 2 one position."""
    generator = torch.Generator().manual_seed(seed)
    is_open = torch.rand(n, LENGTH, generator=generator) < 0.5
    is_open[:3] = torch.tensor([[True] * LENGTH, [False] * LENGTH, [False, False, True, False, False]])
    symbols = torch.randint(VOCAB, (n, LENGTH), generator=generator)
    log_probs = torch.randn(n, LENGTH, VOCAB, generator=generator).mul(2).log_softmax(-1)
    hidden = torch.randn(n, LENGTH, HIDDEN, generator=generator)
    return observation_of(torch.where(is_open, VOCAB, symbols), is_open, Denoised.of(log_probs, hidden))


@pytest.fixture(scope="module")
def sudoku6() -> tasks.Task:
    return tasks.get("sudoku6")


@pytest.fixture(scope="module")
def tiny(sudoku6: tasks.Task) -> FrozenDenoiser:
    return load_denoiser("sudoku6-tiny", sudoku6)


@pytest.fixture(scope="module")
def boards(sudoku6: tasks.Task, tiny: FrozenDenoiser) -> Observation:
    """Held-out puzzles as the tiny denoiser sees them."""
    tokens = sudoku6.heldout(6).tokens
    return observation_of(tokens, tokens == sudoku6.mask_id, tiny(tokens))


# ---------------------------------------------------------------------- a distribution
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("candidates", sweep([None, 1, 3, 50], lambda candidates: candidates == 3))
@given(seed=st.integers(0, 2**20))
def test_log_probs_are_a_distribution_over_the_open_positions(base: str, candidates: int | None, seed: int) -> None:
    observation = observe(seed)
    log_prob = policy(seed, base=base, candidates=candidates)(observation).log_probs
    assert log_prob.shape == (6, LENGTH)
    assert not log_prob.isnan().any()
    assert (log_prob[~observation.fillable] == -INF).all()
    torch.testing.assert_close(log_prob.exp().sum(1), observation.fillable.any(1).float(), atol=1e-5, rtol=0)
    possible = (log_prob > -INF).sum(1)
    assert torch.equal(possible, observation.fillable.sum(1).clamp(max=candidates or LENGTH))


def test_candidates_are_the_most_confident_open_positions() -> None:
    observation = observe(0)
    chosen = policy(candidates=2)(observation).log_probs > -INF
    confidence = observation.denoised.log_probs.max(-1).values.masked_fill(~observation.fillable, -INF)
    for row in range(len(chosen)):
        best = confidence[row].sort(descending=True).indices[:2].tolist()
        assert set(chosen[row].nonzero().flatten().tolist()) == {i for i in best if observation.fillable[row, i]}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("candidates", [None, 2])
def test_a_row_with_nothing_open_gives_no_nan_backwards(base: str, candidates: int | None) -> None:
    """Its gradient is that of the batch without the row."""
    observation, model = observe(1), policy(base=base, candidates=candidates)

    def gradients(rows: Tensor) -> list[Tensor]:
        seen = observation[rows]
        log_prob = model(seen).log_probs
        loss = log_prob.masked_fill(log_prob == -INF, 0.0).square().sum()
        return list(torch.autograd.grad(loss, model.parameters(), allow_unused=True, materialize_grads=True))

    everything, alive = gradients(torch.arange(6)), gradients(observation.fillable.any(1).nonzero().flatten())
    for one, other in zip(everything, alive, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert any(bool(g.any()) for g in everything)


def test_impossible_symbols_give_no_nan() -> None:
    """The exact denoiser gives log-probabilities of -inf."""
    denoiser = TableDenoiser(random_joint(2, 3, seed=1, zeros=5))
    tokens = torch.tensor([[2, 2, 2], [0, 2, 2], [1, 1, 2]])
    observation = observation_of(tokens, tokens == 2, denoiser(tokens))
    assert (observation.denoised.log_probs == -INF).any()
    model = OrderPolicy(
        2, [[0], [1], [2]], dim=8, layers=1, heads=2, base="softmax_margin", belief_weight=1.0, defer_above=2.0
    )
    log_prob = model(observation).log_probs
    log_prob.masked_fill(log_prob == -INF, 0.0).sum().backward()
    assert not log_prob.isnan().any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_sampling_follows_the_log_probs() -> None:
    model, observation = policy(), observe(2)[:1]
    n = 40_000
    many = observation_of(
        observation.tokens.expand(n, -1),
        observation.fillable.expand(n, -1),
        Denoised.join([observation.denoised], lambda part: part[0].expand(n, -1, -1)),
    )
    drawn = model(many).sample(torch.Generator().manual_seed(0)).float().mean(0)
    torch.testing.assert_close(drawn, model(observation).log_probs[0].exp().detach(), atol=0.012, rtol=0)


# ---------------------------------------------------------------------- the start
@pytest.mark.parametrize(
    ("start", "target"),
    [
        ({"base": "softmax_confidence", "base_tau": 0.05}, SoftmaxConfidence(0.05)),
        ({"base": "softmax_confidence", "base_tau": 0.7}, SoftmaxConfidence(0.7)),
        ({"base": "softmax_margin", "base_tau": 0.05}, SoftmaxMargin(0.05)),
        ({"base": "none"}, Random()),
        ({"candidates": 5}, TopK(5)),
        ({"candidates": 1}, TopK(1)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("copy", [True, False])
def test_a_new_policy_equals_its_reference(sudoku6, tiny, boards, start: dict, target, copy: bool) -> None:
    model = new_policy(PolicyConfig(copy=copy, read_hidden=True, defer_above=2.0), sudoku6, tiny, seed=3, **start)
    ours, theirs = model(boards).log_probs, target(boards).log_probs
    assert torch.equal(ours > -INF, theirs > -INF)
    divergence = model(boards).kl(target(boards))
    torch.testing.assert_close(divergence, torch.zeros(6), atol=2e-6, rtol=0)


def test_a_new_policy_copies_the_denoiser(sudoku6, tiny) -> None:
    backbone = tiny.model
    for layers in (1, 2, 3):
        model = new_policy(PolicyConfig(layers=layers), sudoku6, tiny, seed=0)
        assert len(model.reader.blocks) == layers
        for own, theirs in zip(model.reader.blocks, backbone.blocks[3 - layers :], strict=True):
            for key, value in theirs.state_dict().items():
                assert torch.equal(own.state_dict()[key], value), key
        for part in ("positions", "norm", "head"):
            for key, value in getattr(backbone, part).state_dict().items():
                assert torch.equal(getattr(model.reader, part).state_dict()[key], value), (part, key)
        assert torch.equal(model.reader.symbols.weight, backbone.symbols.weight[:6]), "all but the mask's"
        assert not set(map(id, model.parameters())) & set(map(id, backbone.parameters())), "copies, not the same"
        assert all(p.requires_grad for p in model.parameters()), "the denoiser is frozen, the copy is not"


def test_a_copied_policy_reads_a_full_board_as_the_denoiser_does(sudoku6, tiny) -> None:
    model = new_policy(PolicyConfig(), sudoku6, tiny, seed=0)
    tokens = sudoku6.heldout(4).answers
    observation = observation_of(tokens, torch.zeros_like(tokens, dtype=torch.bool), tiny(tokens))
    for belief in model.read(observation)[0]:
        torch.testing.assert_close(belief, observation.denoised.log_probs, atol=1e-4, rtol=1e-4)


def test_without_copying_the_shape_decides(sudoku6, tiny) -> None:
    larger = load_denoiser("sudoku6", sudoku6)
    assert len(new_policy(PolicyConfig(), sudoku6, larger, seed=0).reader.blocks) == len(larger.model.blocks) == 4
    model = new_policy(PolicyConfig(copy=False, dim=16, layers=5, heads=2), sudoku6, tiny, seed=0)
    assert not model.reader.rotary
    assert (model.reader.symbols.embedding_dim, len(model.reader.blocks), model.reader.blocks[0].heads) == (16, 5, 2)
    assert not torch.equal(model.reader.norm.weight, tiny.model.norm.weight[:16])


def test_a_copied_policy_is_no_larger_than_the_denoiser(sudoku6, tiny) -> None:
    assert parameter_count(new_policy(PolicyConfig(), sudoku6, tiny, seed=0)) <= parameter_count(tiny.model)


def test_the_seed_draws_what_is_not_copied(sudoku6, tiny) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for shape, drawn in ((PolicyConfig(read_hidden=True), {"reader.hidden.weight"}), (PolicyConfig(), set())):
        one, same, other = (new_policy(shape, sudoku6, tiny, seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert {key for key in one if not torch.equal(one[key], other[key])} == drawn
    assert torch.equal(torch.random.get_rng_state(), before), "torch's own generator is left alone"


def test_more_layers_than_the_denoiser_has_are_refused(sudoku6, tiny) -> None:
    with pytest.raises(UnmaskError, match="has 3 blocks to copy, not 4; use fewer layers or --no-copy"):
        new_policy(PolicyConfig(layers=4), sudoku6, tiny, seed=0)


# ---------------------------------------------------------------------- what it sees
def tampered(observation: Observation, part: str, seed: int = 9) -> Observation:
    """The observation with one part of its information changed and the others kept."""
    generator = torch.Generator().manual_seed(seed)
    log_probs, hidden = observation.denoised.log_probs, observation.denoised.hidden
    if part == "read_tokens":
        symbols = torch.randint(VOCAB, observation.tokens.shape, generator=generator)
        return replace(observation, tokens=torch.where(observation.fillable, observation.tokens, symbols))
    if part == "read_denoiser":  # the same probabilities, of other symbols
        shuffle = torch.rand(log_probs.shape, generator=generator).argsort(-1)
        return replace(observation, denoised=Denoised.of(log_probs.gather(-1, shuffle), hidden))
    if part == "less likely tokens":  # the same probabilities, of other symbols, save for the most likely one
        order = log_probs.argsort(-1, descending=True)
        swapped = order[..., [0, *range(VOCAB - 1, 0, -1)]]
        return replace(
            observation,
            denoised=Denoised.of(
                torch.zeros_like(log_probs).scatter(-1, swapped, log_probs.sort(-1, descending=True).values), hidden
            ),
        )
    return replace(observation, denoised=Denoised.of(log_probs, torch.randn(hidden.shape, generator=generator)))


@pytest.mark.parametrize("part", ["read_tokens", "read_denoiser", "hidden"])
def test_what_is_switched_off_is_not_seen(part: str) -> None:
    """Neither by the policy's beliefs nor by its choice; the choice always knows which symbol would be filled in."""
    seeing = {"seed": 1, "read_tokens": True, "read_denoiser": True, "hidden_dim": HIDDEN}
    blind = seeing | {"hidden_dim": 0} if part == "hidden" else seeing | {part: False}
    observation = observe(4)
    changed = tampered(observation, part)
    kept = tampered(observation, "less likely tokens") if part == "read_denoiser" else changed
    with torch.no_grad():
        for one, other in zip(policy(**blind).read(observation)[0], policy(**blind).read(changed)[0], strict=True):
            assert torch.equal(one, other)
        assert torch.equal(policy(**blind)(observation).log_probs, policy(**blind)(kept).log_probs)
        before, after = (policy(**seeing)(o).log_probs[observation.fillable] for o in (observation, kept))
    assert not torch.allclose(before, after, atol=1e-3), "switched on, it is seen"


def test_what_the_denoiser_says_of_closed_positions_is_not_seen() -> None:
    observation = observe(4)
    other = observe(7).denoised.log_probs
    log_probs = torch.where(observation.fillable.unsqueeze(-1), observation.denoised.log_probs, other)
    changed = replace(observation, denoised=Denoised.of(log_probs, observation.denoised.hidden))
    for base in BASES:
        model = policy(base=base)
        assert torch.equal(model(observation).log_probs, model(changed).log_probs)


def test_features_by_hand() -> None:
    p = torch.tensor([[[0.2, 0.7, 0.1], [1.0, 0.0, 0.0], [0.5, 0.25, 0.25]]])
    is_open = torch.tensor([[True, True, False]])
    numbers = features(observation_of(torch.tensor([[3, 3, 0]]), is_open, Denoised.of(p.log())), 3)[0]
    log = torch.log
    entropy = -(0.2 * log(p[0, 0, 0]) + 0.7 * log(p[0, 0, 1]) + 0.1 * log(p[0, 0, 2]))
    first = torch.tensor([0.7, 0.2, 0.1, *(p[0, 0, [1, 0, 2]].log() / 8), entropy, 0.5, 1.0, 2 / 3])
    e16 = torch.tensor(-16.0).exp()
    second = torch.tensor([1.0, e16, e16, 0.0, -2.0, -2.0, 0.0, 1.0, 1.0, 2 / 3])
    torch.testing.assert_close(numbers[0], first)
    torch.testing.assert_close(numbers[1], second)
    half, quarter = math.log(0.5), math.log(0.25)
    third = [0.5, 0.25, 0.25, half / 8, quarter / 8, quarter / 8, -0.5 * half - 0.5 * quarter, 0.25, 0.0, 2 / 3]
    torch.testing.assert_close(numbers[2], torch.tensor(third))


def test_score_by_hand() -> None:
    """The belief weight times the log-odds of the symbol that would be filled in, plus the linear part."""
    p = torch.tensor([[[0.2, 0.7, 0.1], [0.3, 0.3, 0.4]]])
    observation = observation_of(torch.tensor([[3, 3]]), torch.ones(1, 2, dtype=torch.bool), Denoised.of(p.log()))
    model = OrderPolicy(3, [[0], [1]], dim=4, layers=1, heads=1, belief_weight=0.5)
    belief = torch.tensor([[[0.5, 0.2, 0.3], [0.05, 0.05, 0.9]]]).log()
    torch.testing.assert_close(model.head.scores(observation, belief)[0], 0.5 * torch.tensor([0.2 / 0.8, 9.0]).log())
    with torch.no_grad():
        model.head.feature_head.weight[0, 0] = 2.0  # of the largest probability
    expected = 0.5 * torch.tensor([0.25, 9.0]).log() + 2 * torch.tensor([0.7, 0.4])
    torch.testing.assert_close(model.head.scores(observation, belief)[0], expected)
    torch.testing.assert_close(model.head(observation, belief, None).log_probs[0], expected.log_softmax(0))


def test_passes_by_hand() -> None:
    """The second pass sees the first one's belief where the first saw the denoiser's distributions."""
    twice, observation = policy(num_passes=2), observe(6)
    first, second = twice.read(observation)[0]
    once = policy(num_passes=1)
    assert torch.equal(once.read(observation)[0][0], first)
    seen = replace(observation, denoised=Denoised.of(first, observation.denoised.hidden))
    torch.testing.assert_close(once.read(seen)[0][0], second)
    expected = twice.head(observation, second, None).log_probs
    torch.testing.assert_close(twice(observation).log_probs, expected)
    assert not torch.allclose(first, second, atol=1e-3)


# ---------------------------------------------------------------------- where the denoiser is confident
def half_sure() -> Observation:
    """Row 0 has a confident masked position, row 1 a confident filled one only, row 2 none, row 3 is full."""
    p = torch.full((4, LENGTH, VOCAB), 1 / 3)
    p[:, 1] = torch.tensor([0.5, 0.3, 0.2])
    p[:2, 3] = torch.tensor([0.98, 0.01, 0.01])
    is_open = torch.tensor([[True] * LENGTH, [True, True, True, False, True], [True] * LENGTH, [False] * LENGTH])
    return observation_of(torch.where(is_open, VOCAB, 0), is_open, Denoised.of(p.log()))


@pytest.mark.parametrize("base", BASES)
def test_where_the_denoiser_is_sure_the_policy_is_its_base(base: str) -> None:
    observation, model = half_sure(), policy(base=base, defer_above=0.97)
    assert model.uncertain(observation)[:3].tolist() == [False, True, True]
    followed = MaxConfidence() if base == "none" else reference(base, tau=0.05)
    log_prob = model(observation).log_probs
    torch.testing.assert_close(log_prob[0], followed(observation).log_probs[0])
    always = policy(base=base)(observation).log_probs
    torch.testing.assert_close(log_prob[1:], always[1:])
    assert not torch.allclose(always[0], log_prob[0], atol=1e-3)
    exactly = policy(base=base, defer_above=0.975)(observation).log_probs
    torch.testing.assert_close(exactly, log_prob)
    assert torch.equal(policy(base=base, defer_above=0.99)(observation).log_probs, always), "below the bound it reads"


def test_only_unsure_boards_have_a_gradient() -> None:
    observation, model = half_sure(), policy(base="softmax_margin", defer_above=0.97)

    def gradient(rows: list[int]) -> Tensor:
        log_prob = model(observation).log_probs[rows]
        return torch.autograd.grad(log_prob[log_prob > -INF].square().sum(), model.head.belief_weight)[0]

    assert gradient([0]) == 0
    assert gradient([1]) != 0
    torch.testing.assert_close(gradient([0, 1, 2, 3]), gradient([1]) + gradient([2]))


@pytest.mark.parametrize("defer_above", [0.97, 2.0])
def test_only_candidates_are_chosen_also_where_the_denoiser_is_sure(defer_above: float) -> None:
    """Five positions tie at certainty; two candidates, as the top-k reference chooses them."""
    p = torch.tensor([[[1.0, 0.0, 0.0]] * LENGTH])
    is_open = torch.ones(1, LENGTH, dtype=torch.bool)
    observation = observation_of(torch.full((1, LENGTH), VOCAB), is_open, Denoised.of(p.log()))
    chosen = policy(candidates=2, defer_above=defer_above)(observation).log_probs > -INF
    assert torch.equal(chosen, TopK(2)(observation).log_probs > -INF)


def test_a_certain_belief_has_a_finite_score() -> None:
    belief = torch.tensor([[[0.0, -200.0, -200.0], [-200.0, 0.0, -200.0]]], requires_grad=True)
    observation = observation_of(
        torch.tensor([[3, 3]]), torch.ones(1, 2, dtype=torch.bool), Denoised.of(torch.tensor([[[1.0, 0, 0]] * 2]).log())
    )
    score = OrderPolicy(3, [[0], [1]], dim=4, layers=1, heads=1, belief_weight=1.0).head.scores(observation, belief)
    score.sum().backward()
    assert score.isfinite().all()
    assert belief.grad.isfinite().all()
    assert score[0, 0] > 10
    assert score[0, 1] == -200


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize(
    "options",
    [
        {"base": "softmax_margin", "base_tau": 0.3, "candidates": 2, "num_passes": 3},
        {"read_tokens": False, "read_denoiser": False, "hidden_dim": HIDDEN, "defer_above": 0.6},
    ],
    ids=["base", "blind"],
)
def test_save_and_load_round_trip(tmp_path: Path, options: dict) -> None:
    saved, observation = policy(**options), observe(5)
    save_model(saved, tmp_path / "policy")
    assert {p.name for p in (tmp_path / "policy").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    loaded = load_policy(tmp_path / "policy")
    assert not loaded.training
    assert torch.equal(loaded(observation).log_probs, saved(observation).log_probs)


def test_a_loaded_policy_plays(tmp_path: Path, sudoku6, tiny) -> None:
    save_model(new_policy(PolicyConfig(), sudoku6, tiny, 0, "softmax_margin", 1e-4), tmp_path)
    instances = sudoku6.heldout(20)
    played = rollout(sudoku6, tiny, load_policy(tmp_path, sudoku6), instances)
    margin = rollout(sudoku6, tiny, Margin(), instances)
    assert torch.equal(played.state.tokens, margin.state.tokens), "at a low temperature the base is the heuristic"


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_loading_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError) as error:
        load_policy("sudoku7-upo")
    assert "unknown order policy 'sudoku7-upo'" in one_line(error)


def test_loading_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_policy(tmp_path / "nowhere")
    assert "the folder does not exist" in one_line(error)


def test_loading_for_another_task(tmp_path: Path, sudoku6) -> None:
    save_model(policy(), tmp_path / "policy")
    with pytest.raises(CheckpointError) as error:
        load_policy(tmp_path / "policy", sudoku6)
    assert one_line(error).endswith("is for 3 symbols and 5 positions; task sudoku6 has 6 and 36")
    load_policy(tmp_path / "policy", TableTask(torch.ones((3,) * 5)))  # and this one fits


def test_a_denoiser_is_not_a_policy_and_the_reverse(tmp_path: Path, sudoku6) -> None:
    save_model(Backbone(VOCAB, COORDINATES, dim=8, layers=1, heads=2), tmp_path / "denoiser")
    save_model(policy(), tmp_path / "policy")
    with pytest.raises(CheckpointError) as error:
        load_policy(tmp_path / "denoiser")
    assert "is no order policy" in one_line(error)
    with pytest.raises(CheckpointError) as error:
        load_denoiser(tmp_path / "policy", sudoku6)
    assert "is no denoiser" in one_line(error)


@pytest.mark.parametrize(
    "change", [{"base": "best"}, {"base_tau": 0, "base": "softmax_margin"}, {"dim": 6}, {"layers": 1}, {"colour": 1}]
)
def test_a_config_that_does_not_fit_its_weights(tmp_path: Path, change: dict) -> None:
    save_model(policy(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError) as error:
        load_policy(tmp_path)
    assert "order policy" in one_line(error)


def test_truncated_weights(tmp_path: Path) -> None:
    save_model(policy(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(CheckpointError) as error:
        load_policy(tmp_path)
    assert "truncated or not safetensors" in one_line(error)


def test_positions_are_told_apart_where_it_is_asked_for() -> None:
    """On a board whose positions look alike, only a policy with ``state_head`` can prefer one of them."""
    tokens = torch.full((1, 4), 3)
    seen = observation_of(tokens, tokens == 3, Denoised.of(torch.full((1, 4, 3), 1 / 3).log()))
    for state_head in (False, True):
        torch.manual_seed(0)
        model = OrderPolicy(
            3, [[i] for i in range(4)], dim=8, layers=1, heads=2, defer_above=2.0, state_head=state_head
        )
        uniform = model(seen).log_probs
        torch.testing.assert_close(uniform, torch.full((1, 4), 0.25).log())  # new: as its base
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(30):
            optimizer.zero_grad()
            loss = -model(seen).log_probs[0, 2]
            loss.backward()
            optimizer.step()
        if state_head:
            assert float(loss.detach()) < 0.1


# ---------------------------------------------------------------------- large vocabularies
RULES = {True: Rules("set"), False: Rules()}


class Letters(tasks.Task):
    """Four positions of 200 symbols."""

    name, symbols, shape = "letters", tuple(f"s{i}" for i in range(200)), (1, 4)

    def sample(self, n: int, generator: torch.Generator) -> tasks.Instances:
        answers = torch.randint(200, (n, 4), generator=generator)
        return tasks.Instances(torch.full_like(answers, 200), answers)

    def reward(self, tokens: Tensor, instances: tasks.Instances) -> Tensor:
        return (tokens == instances.answers).float().mean(1)


def letters() -> tuple[Letters, FrozenDenoiser]:
    torch.manual_seed(0)
    model = Backbone(200, Letters().coordinates.tolist(), dim=16, layers=2, heads=2)
    torch.nn.init.normal_(model.head.weight)
    return Letters(), FrozenDenoiser(model, Letters())


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("sets", [True, False])
def test_policies_for_large_vocabularies_read_what_is_shown(copy: bool, sets: bool) -> None:
    """By rank, without a table of the vocabulary, unless they copy the denoiser's: then by name."""
    task, denoiser = letters()
    model = new_policy(PolicyConfig(copy=copy, dim=16, heads=2, defer_above=2.0), task, denoiser, 0, sets=sets)
    tables = [p for p in model.parameters() if 200 in p.shape]
    assert bool(tables) == copy
    generator = torch.Generator().manual_seed(0)
    played = rollout(
        task, denoiser, model, task.sample(8, generator), generator=generator, record=True, rules=RULES[sets]
    )
    seen = played.steps[0].observation
    beliefs, states = model.read(seen)
    assert [b.shape for b in beliefs] == [(8, 4, 16)] * 2
    assert states.shape == (8, 4, 16)
    loss = model(seen).log_prob(played.steps[0].action).sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_copied_policy_for_a_large_vocabulary_reads_by_name_as_the_dense_one_does() -> None:
    """The expected embedding and the belief over the 16 shown symbols, against the computation over all 200."""
    task, denoiser = letters()
    model = new_policy(PolicyConfig(num_passes=1), task, denoiser, 0)
    tokens = torch.full((3, 4), 200)
    seen = observation_of(tokens, tokens == 200, denoiser(tokens, tokens == 200))
    (belief,), _ = model.read(seen)
    dense = torch.zeros(3, 4, 200).scatter(-1, seen.top_symbols, seen.top_log_probs.exp())
    known = model.reader.embed(tokens, tokens == 200)
    (whole,), _ = model.reader(known, dense, tokens == 200)
    expected = whole.gather(-1, seen.top_symbols).log_softmax(-1)
    torch.testing.assert_close(belief, expected, atol=1e-5, rtol=1e-5)


def test_what_a_belief_gives_to_symbols_that_are_not_shown_is_the_floor() -> None:
    _, denoiser = letters()
    tokens = torch.full((1, 4), 200)
    seen = observation_of(tokens, tokens == 200, denoiser(tokens, tokens == 200))
    belief = torch.full((1, 4, 16), 1 / 16).log()
    hidden = next(v for v in range(200) if not (seen.top_symbols == v).any())
    assert belief_log_prob(seen, belief, torch.full((1, 4), hidden)).tolist() == [[-20.0] * 4]
    best = belief_log_prob(seen, belief, seen.denoised.best)
    torch.testing.assert_close(best, torch.full((1, 4), math.log(1 / 16)))
