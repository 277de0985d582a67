"""The critic: where it starts, what it returns, and that it sees the whole observation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agents.critic import Critic, new_critic
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import observation as observation_of
from tests.toys import random_critic
from unmask_env.state import Denoised, Observation

TASK = TableTask(random_joint(3, 4, seed=0))


def observation(n: int = 5) -> Observation:
    """Boards whose first two positions are closed."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, (n, 4), generator=generator)
    tokens[:, 2:] = 3
    return observation_of(tokens, tokens == 3, Denoised.of(torch.randn(n, 4, 3, generator=generator).log_softmax(-1)))


def randomised() -> Critic:
    return random_critic(TASK)


@pytest.mark.parametrize("n", [1, 5])
def test_it_starts_at_zero_and_can_learn(n: int) -> None:
    critic = new_critic(TASK, seed=3)
    values = critic(observation(n))
    assert values.shape == (n,)
    assert values.dtype == torch.float32
    assert not values.any()
    values.sum().backward()
    assert critic.value.weight.grad.any()
    assert randomised()(observation(n)).unique().numel() == n


def test_the_seed_draws_its_weights_and_nothing_else() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    one, same, other = (new_critic(TASK, seed).symbols.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def change_a_token(seen: Observation) -> Observation:
    tokens = seen.tokens.clone()
    tokens[:, 0] = (tokens[:, 0] + 1) % 3
    return observation_of(tokens, seen.fillable, seen.denoised)


def open_a_position(seen: Observation) -> Observation:
    fillable = seen.fillable.clone()
    fillable[:, 0] = True
    return observation_of(seen.tokens, fillable, seen.denoised)


def swap_the_likely_symbols(seen: Observation) -> Observation:
    """As sure as before, of another symbol."""
    log_probs = seen.denoised.log_probs.clone()
    log_probs[:, 3] = log_probs[:, 3].roll(1, -1)
    return observation_of(seen.tokens, seen.fillable, Denoised.of(log_probs))


def sharpen(seen: Observation) -> Observation:
    log_probs = seen.denoised.log_probs.clone()
    log_probs[:, 2] = (3 * log_probs[:, 2]).log_softmax(-1)
    return observation_of(seen.tokens, seen.fillable, Denoised.of(log_probs))


@pytest.mark.parametrize("change", [change_a_token, open_a_position, swap_the_likely_symbols, sharpen])
def test_it_sees_every_part_of_the_observation(change: Callable[[Observation], Observation]) -> None:
    critic, seen = randomised(), observation()
    difference = critic(change(seen)) - critic(seen)
    assert (difference.abs() > 1e-4).all()


def test_it_sees_where_a_symbol_stands() -> None:
    """Two boards of the same symbols in other places, the denoiser's output being equal everywhere."""
    tokens = torch.tensor([[0, 1, 3, 3], [1, 0, 3, 3]])
    alike = Denoised.of(torch.full((2, 4, 3), 1 / 3).log())
    values: Tensor = randomised()(observation_of(tokens, tokens == 3, alike))
    assert (values[0] - values[1]).abs() > 1e-4


def test_boards_do_not_see_one_another() -> None:
    critic, seen = randomised(), observation()
    torch.testing.assert_close(torch.cat([critic(seen[i : i + 1]) for i in range(5)]), critic(seen))
