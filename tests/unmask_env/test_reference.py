"""Reference policies against hand-computed values and, with hypothesis, on degenerate inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tasks import UnknownNameError, UnmaskError
from tests.toys import observation as observation_of
from unmask_env.reference import (
    REFERENCES,
    Entropy,
    LeftToRight,
    Margin,
    MaxConfidence,
    Oracle,
    Random,
    Reference,
    SoftmaxConfidence,
    SoftmaxMargin,
    TopK,
    reference,
)
from unmask_env.state import Denoised, Observation

INF = math.inf
ORDERS = [
    Random(),
    LeftToRight(),
    MaxConfidence(),
    Margin(),
    Entropy(),
    SoftmaxConfidence(),
    SoftmaxConfidence(literal=True),
    SoftmaxConfidence(tau=1e-3),
    SoftmaxMargin(),
    TopK(1),
    TopK(3),
    TopK(50),
]


def str_of(value: object) -> str | None:
    """A test id without memory addresses; None leaves it to pytest."""
    if not isinstance(value, Reference):
        return None
    return type(value).__name__ + " ".join(f"-{k}={v}" for k, v in vars(value).items())


def observe(probabilities: Tensor | list, fillable: list[list[bool]] | Tensor | None = None) -> Observation:
    """An observation of the given (N, L, V) probabilities; the tokens are masks where fillable, else 0."""
    p = torch.as_tensor(probabilities, dtype=torch.float32)
    masked = torch.ones(p.shape[:2], dtype=torch.bool) if fillable is None else torch.as_tensor(fillable)
    return observation_of(torch.where(masked, p.shape[2], 0), masked, Denoised.of(p.log()))


def probabilities_of(order: Reference, observation: Observation) -> Tensor:
    return order(observation).log_probs.exp()


@st.composite
def observations(draw) -> Observation:
    """Random fillable positions, and integer weights so that zeros, one-hot rows and exact ties are common."""
    n, length, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(2, 5))
    weights = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=n * length * vocab, max_size=n * length * vocab)))
    weights = weights.view(n, length, vocab).float()
    weights[..., 0] += weights.sum(-1) == 0
    fillable = torch.tensor(draw(st.lists(st.booleans(), min_size=n * length, max_size=n * length))).view(n, length)
    return observe(weights / weights.sum(-1, keepdim=True), fillable)


@pytest.mark.parametrize("order", ORDERS, ids=str_of)
@given(observation=observations())
def test_log_probs_are_a_distribution_over_the_fillable_positions(order, observation: Observation) -> None:
    log_prob = order(observation).log_probs
    assert log_prob.shape == observation.fillable.shape
    assert not log_prob.isnan().any()
    assert (log_prob[~observation.fillable] == -INF).all()
    total = log_prob.double().exp().sum(1)
    torch.testing.assert_close(total, observation.fillable.any(1).double(), atol=1e-5, rtol=0)


@given(observation=observations())
def test_entropy_is_finite_and_zero_for_certain_positions(observation: Observation) -> None:
    h = observation.entropy
    assert h.isfinite().all()
    certain = observation.confidence == 1
    assert (h[certain] == 0).all()
    assert (h[~certain] > 0).all()


@given(observation=observations(), seed=st.integers(0, 2**20))
def test_oracle_never_picks_a_wrong_cell_while_a_right_one_is_fillable(observation: Observation, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, length = observation.fillable.shape
    answers = torch.randint(observation.denoised.vocab_size, (n, length), generator=generator)
    order = Oracle(answers)
    right = observation.fillable & (observation.denoised.best == answers)
    chosen = order(observation).act(generator)
    for row in range(n):
        p = order(observation).log_probs[row].exp()
        among = right[row] if right[row].any() else observation.fillable[row]
        torch.testing.assert_close(p, among.float() / among.sum().clamp(min=1))
        assert not among.any() or among[chosen[row]].all()


def test_oracle_needs_the_answers() -> None:
    with pytest.raises(UnmaskError, match="for_instances"):
        Oracle()(observe([[[0.5, 0.5]]]))


# Five positions; the last is the best by every measure, but may not be filled.
BOARD = [
    [0.50, 0.50, 0.00],  # confidence .50, margin .00, entropy .693
    [0.55, 0.25, 0.20],  # confidence .55, margin .30, entropy .997
    [0.60, 0.40, 0.00],  # confidence .60, margin .20, entropy .673
    [0.40, 0.30, 0.30],
    [1.00, 0.00, 0.00],
]
FILLABLE = [True, True, True, True, False]


@pytest.mark.parametrize(
    ("order", "position"),
    [
        (LeftToRight(), 0),
        (MaxConfidence(), 2),
        (Margin(), 1),
        (Entropy(), 2),
        (TopK(1), 2),
    ],
    ids=str_of,
)
def test_deterministic_choices_by_hand(order: Reference, position: int) -> None:
    p = probabilities_of(order, observe([BOARD], [FILLABLE]))[0]
    assert p.tolist() == [float(i == position) for i in range(5)]


def test_scores_by_hand() -> None:
    observation = observe([BOARD])
    torch.testing.assert_close(observation.confidence[0], torch.tensor([0.5, 0.55, 0.6, 0.4, 1.0]))
    torch.testing.assert_close(observation.margin[0], torch.tensor([0.0, 0.3, 0.2, 0.1, 1.0]))
    expected = [-sum(p * math.log(p) for p in row if p) for row in BOARD]
    torch.testing.assert_close(observation.entropy[0], torch.tensor(expected))


def test_left_to_right_skips_filled_positions_and_rows_without_any() -> None:
    fillable = [[False, True, True], [False, False, False], [False, False, True]]
    p = probabilities_of(LeftToRight(), observe(torch.full((3, 3, 2), 0.5), fillable))
    assert p.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("order", [MaxConfidence(), Margin(), Entropy()], ids=str_of)
def test_ties_are_split_evenly(order: Reference) -> None:
    best = [0.7, 0.2, 0.1]
    board = [best, [0.4, 0.3, 0.3], best, [1.0, 0.0, 0.0], best]
    p = probabilities_of(order, observe([board], [[True, True, True, False, True]]))[0]
    torch.testing.assert_close(p, torch.tensor([1 / 3, 0, 1 / 3, 0, 1 / 3]))


@pytest.mark.parametrize(
    "order",
    [MaxConfidence(), Margin(), Entropy(), SoftmaxConfidence()],
    ids=str_of,
)
def test_one_hot_rows_tie_whatever_their_symbol(order: Reference) -> None:
    p = probabilities_of(order, observe([[[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]]]))[0]
    torch.testing.assert_close(p, torch.full((3,), 1 / 3))


def spread(vocab: int) -> Observation:
    """Four positions with confidences .3 .5 .7 .9 and the other mass spread evenly over the other symbols."""
    top = torch.tensor([0.3, 0.5, 0.7, 0.9])
    p = ((1 - top) / (vocab - 1)).unsqueeze(1).repeat(1, vocab)
    p[:, 0] = top
    return observe(p.unsqueeze(0))


@pytest.mark.parametrize(
    ("vocab", "literal", "expected"),
    [
        (9, False, [0.0000, 0.0003, 0.0180, 0.9817]),  # softmax of (6, 10, 14, 18)
        (9, True, [0.0000, 0.0003, 0.0180, 0.9817]),
        (126464, False, [0.0000, 0.0003, 0.0180, 0.9817]),
        (126464, True, [0.0019, 0.0022, 0.0197, 0.9762]),  # each score is 126463 + exp(p(1) / tau): nearly even
    ],
)
def test_softmax_confidence_by_hand(vocab: int, literal: bool, expected: list[float]) -> None:
    p = probabilities_of(SoftmaxConfidence(tau=0.05, literal=literal), spread(vocab))[0]
    torch.testing.assert_close(p, torch.tensor(expected), atol=6e-5, rtol=0)


def test_softmax_temperatures_reach_both_limits() -> None:
    observation = observe([BOARD], [FILLABLE])
    even = torch.tensor(FILLABLE).float() / 4
    for kind, greedy in (
        (SoftmaxConfidence, MaxConfidence),
        (SoftmaxMargin, Margin),
    ):
        torch.testing.assert_close(probabilities_of(kind(tau=1e6), observation)[0], even, atol=1e-5, rtol=0)
        cold = probabilities_of(kind(tau=1e-4), observation)
        torch.testing.assert_close(cold, probabilities_of(greedy(), observation))


def test_softmax_margin_by_hand() -> None:
    p = probabilities_of(SoftmaxMargin(tau=0.1), observe([BOARD], [FILLABLE]))[0]
    weights = [math.exp(0), math.exp(3), math.exp(2), math.exp(1), 0.0]
    torch.testing.assert_close(p, torch.tensor([w / sum(weights) for w in weights]))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("fillable", [[1, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]])
def test_top_k_is_uniform_over_the_k_most_confident_fillable_positions(k: int, fillable: list[int]) -> None:
    p = probabilities_of(TopK(k), observe([BOARD], torch.tensor([fillable]).bool()))[0]
    by_confidence = [i for i in (4, 2, 1, 0, 3) if fillable[i]][:k]
    expected = [1 / len(by_confidence) if i in by_confidence else 0.0 for i in range(5)]
    torch.testing.assert_close(p, torch.tensor(expected))


def test_top_k_ties_for_the_last_place_go_to_the_lowest_index() -> None:
    p = probabilities_of(TopK(2), observe(torch.full((1, 4, 2), 0.5), [[False, True, True, True]]))
    assert p.tolist() == [[0, 0.5, 0.5, 0]]


@pytest.mark.parametrize("order", ORDERS, ids=str_of)
def test_sample_respects_the_distribution(order: Reference) -> None:
    n = 20_000
    board = torch.tensor([BOARD]).expand(n, -1, -1)
    observation = observe(board, torch.tensor([FILLABLE]).expand(n, -1))
    drawn = order(observation).act(torch.Generator().manual_seed(0))
    p = order(observation).log_probs[0].double().exp()
    frequency = drawn.double().mean(0)
    assert (frequency[p == 0] == 0).all()
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_sample_repeats_with_its_generator() -> None:
    observation = observe(torch.full((64, 5, 3), 1 / 3))
    first, again, other = (Random()(observation).act(torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_registry_knows_every_name_and_refuses_the_rest() -> None:
    for name, kind in REFERENCES.items():
        assert type(reference(name)) is kind
        assert kind.name == name
    assert reference("top_k", k=3) == reference("top_k:k=3") == TopK(3)
    with pytest.raises(
        UnknownNameError, match=r"unknown reference policy 'maxconf'; did you mean max_confidence\? known: .*margin"
    ):
        reference("maxconf")
    with pytest.raises(UnmaskError, match="reference policy 'random' takes no options; not tau"):
        reference("random", tau=0.1)
    with pytest.raises(UnmaskError, match="reference policy 'top_k': k must be a whole number, not 'x'"):
        reference("top_k:k=x")


@pytest.mark.parametrize("value", [0, -1, math.nan])
@pytest.mark.parametrize(("name", "option"), [("softmax_confidence", "tau"), ("softmax_margin", "tau"), ("top_k", "k")])
def test_options_out_of_range_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(UnmaskError, match=f"{option} must be a "):
        reference(name, **{option: value})


def test_oracle_of_several_answers_takes_the_likeliest_that_agrees_with_the_board() -> None:
    several = torch.tensor([[[0, 1, 2], [1, 1, 0], [1, 0, 2]]])
    log_probs = torch.tensor([[[0.1, 0.6, 0.3], [0.3, 0.6, 0.1], [0.3, 0.2, 0.5]]]).log()

    def board(*tokens: int) -> Observation:
        tokens = torch.tensor([tokens])
        return observation_of(tokens, tokens == 3, Denoised.of(log_probs))

    oracle = Oracle(several)
    # By hand: .1 * .6 * .5 = .03, .6 * .6 * .3 = .108 and .6 * .3 * .5 = .09.
    assert oracle.answer(board(3, 3, 3)).tolist() == [[1, 1, 0]]
    assert oracle.right(board(3, 3, 3)).tolist() == [[True, True, False]]
    assert oracle.answer(board(3, 3, 2)).tolist() == [[1, 0, 2]]  # .6 * .3 against .1 * .6
    assert oracle.right(board(3, 3, 2)).tolist() == [[True, False, False]]
    assert oracle.answer(board(0, 3, 3)).tolist() == [[0, 1, 2]]
    assert oracle.answer(board(2, 3, 3)).tolist() == [[0, 1, 2]]  # lost: none agrees; .6 * .5 is most


def test_oracle_of_several_answers_takes_the_nearest_and_one_that_helps() -> None:
    oracle = Oracle(torch.tensor([[[0, 0, 0, 0], [1, 1, 1, 1]]]))
    tokens = torch.tensor([[1, 1, 0, 2]])
    log_probs = torch.tensor([0.6, 0.4]).log().expand(1, 4, 2)
    assert oracle.answer(observation_of(tokens, tokens == 2, Denoised.of(log_probs))).tolist() == [[1, 1, 1, 1]]
    # The likelier answer, (1, 1) at .39 * .45, is at no position the top symbol; (0, 2) is at the first.
    tokens = torch.tensor([[3, 3]])
    log_probs = torch.tensor([[[0.40, 0.39, 0.21], [0.50, 0.45, 0.05]]]).log()
    seen = observation_of(tokens, tokens == 3, Denoised.of(log_probs))
    oracle = Oracle(torch.tensor([[[1, 1], [0, 2]]]))
    assert oracle.right(seen).tolist() == [[True, False]]
