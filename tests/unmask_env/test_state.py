"""Rules, one forward's symbols and the cutting and joining of observations, by hand."""

import pytest
import torch

from tasks import UnmaskError
from tests.toys import observation
from unmask_env.state import FLOOR, Denoised, Rules


# ---------------------------------------------------------------------- rules
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actions": "sets"}, "actions must be single or set or set\\+remask or accept, not 'sets'"),
        ({"nfe_budget": 0}, "nfe_budget must be a whole number of at least 1, not 0"),
        ({"block_length": 1.5}, "block_length must be a whole number of at least 1, not 1.5"),
        ({"remask_budget": 2}, "remask_budget is for actions 'set\\+remask', not 'single'"),
        ({"on_illegal": "ignore"}, "on_illegal must be noop or terminate or raise"),
    ],
)
def test_rules_that_are_not_allowed(options: dict, message: str) -> None:
    with pytest.raises(UnmaskError, match=message):
        Rules(**options)


def test_speed_rewards_by_hand() -> None:
    """Row 0 has two masks, row 1 one: (H - NFE + 1) / H is 1 in one forward, and 1/2 in two of two."""
    nfe, holes, reward = torch.tensor([1, 2, 3, 1]), torch.tensor([2, 2, 2, 1]), torch.tensor([1.0, 1.0, 1.0, 0.5])
    assert Rules(speed=1.0).shaped(reward, nfe, holes).tolist() == [1.0, 0.5, 0.0, 0.5]
    assert Rules(speed=2.0).shaped(reward, nfe, holes).tolist() == [1.0, 0.25, 0.0, 0.5]
    bonus = Rules(speed=0.4, speed_bonus=True).shaped(reward, nfe, holes)
    torch.testing.assert_close(bonus, torch.tensor([1.4, 1.2, 1.0, 0.9]))


# ---------------------------------------------------------------------- one denoiser forward
def test_filling_is_greedy_at_temperature_zero_and_sharper_below_one() -> None:
    p = torch.tensor([0.0, 0.2, 0.5, 0.3, 0.0], dtype=torch.float64)
    assert Denoised.of(p.log().expand(1, 3, 5)).draw(0.0, torch.rand(1, 3)).tolist() == [[2, 2, 2]]
    n, generator = 40_000, torch.Generator().manual_seed(0)
    for temperature in (1.0, 0.5):
        uniform = torch.rand(n // 4, 4, generator=generator, dtype=torch.float64)
        uniform[0] = torch.tensor([0.0, 1 - 2**-53, 0.0, 1 - 2**-53])  # the ends must not reach impossible symbols
        denoised = Denoised.of(p.log().expand(n // 4, 4, 5))
        drawn = denoised.draw(temperature, uniform).flatten().bincount(minlength=5)
        expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        deviation = (drawn / n - expected).abs()
        assert (deviation <= 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_of_a_large_vocabulary_nothing_is_made_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the positions asked for are asked about, each once, and never more at a time than fit a chunk."""
    log_probs = torch.randn(4, 5, 300, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    where = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    monkeypatch.setattr("unmask_env.state.CHUNK", 1000)
    asked = []

    def log_probs_at(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        asked.append(torch.stack([rows, positions], 1))
        return log_probs[rows, positions]

    denoised, whole = Denoised.at(where, 300, log_probs_at), Denoised.of(log_probs)
    assert max(len(some) for some in asked) == 3
    assert torch.equal(torch.cat(asked), where.nonzero())
    assert torch.equal(denoised.top_symbols[where], whole.top_symbols[where])
    torch.testing.assert_close(denoised.top_log_probs[where], whole.top_log_probs[where])
    torch.testing.assert_close(denoised.entropy[where], whole.entropy[where])
    assert (denoised.top_log_probs[~where] == FLOOR).all()
    assert (denoised.entropy[~where] == 0).all()


def test_observations_are_cut_and_joined_whatever_the_vocabulary() -> None:
    for vocab_size in (5, 200):
        log_probs = torch.randn(3, 4, vocab_size, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
        tokens = torch.full((3, 4), vocab_size)
        seen = observation(tokens, tokens == vocab_size, Denoised.of(log_probs))
        again = type(seen).join([seen[:1], seen[1:]], torch.cat)
        assert torch.equal(again.top_symbols, seen.top_symbols)
        assert torch.equal(again.entropy, seen.entropy)
        picked = seen[torch.tensor([2, 0])]
        assert torch.equal(picked.top_log_probs, seen.top_log_probs[[2, 0]])
        assert picked.denoised.vocab_size == vocab_size


def test_forwards_that_keep_different_numbers_of_positions_are_joined() -> None:
    """Also with one that keeps them all; everything that is asked of the whole is what each part says."""
    log_probs = torch.randn(6, 5, 200, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    where = torch.zeros(6, 5, dtype=torch.bool)
    where[0, 4] = where[1, 1] = where[2:, 1:4] = True

    def at(rows: slice) -> Denoised:
        some = log_probs[rows]
        return Denoised.at(where[rows], 200, lambda r, p: some[r, p].clone())

    def whole(rows: slice) -> Denoised:
        dense = at(rows)
        return Denoised.shown(200, dense.top_symbols, dense.top_log_probs, dense.entropy)

    first, last = slice(0, 2), slice(2, 6)
    assert at(first)._values.shape[1] < at(last)._values.shape[1]
    symbols, uniform = torch.full((6, 5), 7), torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
    for parts in ([at(first), at(last)], [whole(first), at(last)], [at(first), whole(last)]):
        joined = Denoised.join(parts, torch.cat)
        for expected in (whole(slice(0, 6)), at(slice(0, 6))[torch.arange(6)]):
            for name in ("top_symbols", "top_log_probs", "entropy", "best", "best_log_prob"):
                assert torch.equal(getattr(joined, name), getattr(expected, name)), name
            assert torch.equal(joined.top_k_log_probs(3), expected.top_k_log_probs(3))
            assert torch.equal(joined.log_prob_of(symbols), expected.log_prob_of(symbols))
            assert torch.equal(joined.draw(1.0, uniform), expected.draw(1.0, uniform))
