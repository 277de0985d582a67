"""Observations as arrays and back, actions as spaces know them, and whose the arrays are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tasks import Instances, Task, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import FavouriteDenoiser, observation, shown
from unmask_env.denoiser import TableDenoiser
from unmask_env.encoding import FLOOR, LOG_ZERO, decode, encode
from unmask_env.gym_env import UnmaskEnv
from unmask_env.reference import Margin, Random, Reference, SoftmaxConfidence
from unmask_env.sb3_env import SB3VecEnv
from unmask_env.state import Denoised, InvalidActionError, Observation
from unmask_env.torchrl_env import UnmaskTorchEnv
from unmask_env.vector_env import UnmaskVectorEnv

TASK = TableTask(random_joint(3, 4, seed=7), clues=(1,))  # 4 positions, 3 symbols; position 1 is a clue


def options(**more) -> dict:
    return {"task": TASK, "denoiser": TableDenoiser(TASK.joint, TASK)} | more


# ---------------------------------------------------------------------- observations
def boards_of(vocab: int, seed: int = 0) -> Observation:
    """500 rows of 6 positions: sharp, flat and certain distributions, some positions closed."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.0, 0.5, 2.0, 8.0, 30.0, 100.0]).view(6, 1)
    log_probs = (torch.randn(500, 6, vocab, generator=generator) * scale).log_softmax(-1)
    is_open = torch.rand(500, 6, generator=generator) < 0.7
    filled = torch.randint(vocab, (500, 6), generator=generator)
    return observation(torch.where(is_open, vocab, filled), is_open, Denoised.of(log_probs))


@pytest.mark.parametrize("vocab", [2, 3, 8, 9, 20, 100, 128])
def test_decoding_gives_back_what_was_encoded(vocab: int) -> None:
    seen = boards_of(vocab)
    back = decode(shown(seen), vocab)
    assert torch.equal(back.denoised.log_probs, seen.denoised.log_probs.clamp(min=FLOOR))
    for name in ("tokens", "masked", "fillable", "entropy"):
        assert torch.equal(getattr(back, name), getattr(seen, name)), name
    assert back.hidden is None
    assert back.history is None


@pytest.mark.parametrize("vocab", [129, 300])
def test_of_large_vocabularies_sixteen_symbols_are_shown(vocab: int) -> None:
    seen = boards_of(vocab)
    arrays = shown(seen)
    assert arrays["top_symbols"].shape == arrays["top_log_probs"].shape == (500, 6, 16)
    back = decode(arrays, vocab)
    assert back.denoised.log_probs is None
    assert torch.equal(back.top_symbols, seen.top_symbols)
    assert torch.equal(back.top_log_probs, seen.top_log_probs.clamp(min=FLOOR))
    assert torch.equal(back.entropy, seen.entropy)
    assert back.denoised.vocab_size == vocab


@pytest.mark.parametrize("vocab", [3, 9, 200])
def test_float_arrays_decode_the_same(vocab: int) -> None:
    """As stable-baselines3 hands them to a policy."""
    arrays = shown(boards_of(vocab))
    exact, floats = decode(arrays, vocab), decode({key: value.float() for key, value in arrays.items()}, vocab)
    for name in ("tokens", "masked", "fillable", "top_symbols", "top_log_probs", "entropy"):
        a, b = getattr(exact, name), getattr(floats, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", [SoftmaxConfidence(), Random(), Margin()])
def test_the_references_minus_infinity_is_shown_as_a_bounded_number(order: Reference) -> None:
    seen = boards_of(3)
    expected, log_reference = order(seen).log_probs, shown(seen, order)["log_reference"]
    impossible = expected == -torch.inf
    assert impossible[~seen.fillable].all()
    assert bool(impossible[seen.fillable].any()) == order.deterministic
    assert (log_reference[impossible] == LOG_ZERO).all()
    assert torch.equal(log_reference[~impossible], expected[~impossible])


def test_what_may_be_masked_again_comes_back_too() -> None:
    seen = boards_of(3)
    count = torch.arange(6).expand(500, 6)
    seen = observation(seen.tokens, seen.fillable, seen.denoised, ~seen.masked & (count > 2), count)
    arrays = encode(seen, torch.zeros(500, 12))
    assert arrays["action_mask"].shape == (500, 12)
    back = decode({key: value.float() for key, value in arrays.items()}, 3)
    for name in ("fillable", "remaskable", "remask_count", "action_mask"):
        assert torch.equal(getattr(back, name), getattr(seen, name)), name


# ---------------------------------------------------------------------- actions
def steps(actions: str) -> dict[str, Callable[[Any], Any]]:
    """A step of one board from the start, behind each interface."""
    made = options(actions=actions)
    env, envs, rl = UnmaskEnv(**made), UnmaskVectorEnv(1, **made), UnmaskTorchEnv(num_envs=1, seed=0, **made)
    stable = SB3VecEnv(UnmaskVectorEnv(1, **made))
    for interface in (env, envs, stable):
        interface.reset()
    return {
        "gym": env.step,
        "vector": lambda action: envs.step(np.asarray(action)[None]),
        "sb3": lambda action: stable.step(np.asarray(action)[None]),
        "torchrl": lambda action: rl.step(rl.reset().set("action", torch.as_tensor(action).unsqueeze(0))),
    }


INTERFACES = pytest.mark.parametrize("interface", ["gym", "vector", "sb3", "torchrl"])


@INTERFACES
@pytest.mark.parametrize(
    "action", [2.0, np.float32(2), True, np.True_, "2", b"2", None, {}, 2**70, float("nan"), 2j, [2], -1, 4], ids=repr
)
def test_what_is_no_position_is_refused_alike(interface: str, action: Any) -> None:
    if interface == "torchrl" and np.asarray(action).dtype.kind in "USO":
        return  # a tensordict holds no such thing
    with pytest.raises(InvalidActionError, match=r"^(actions must be 1 integers|position (-1|4) is not on the board)"):
        steps("single")[interface](action)


@INTERFACES
@pytest.mark.parametrize("action", [[0.0, 0, 0, 1], ["0", "0", "0", "1"], [None] * 4, [0, 0, 0, 2], [0, 0, 0, -1], 3])
def test_what_is_no_set_is_refused_alike(interface: str, action: Any) -> None:
    if interface == "torchrl" and np.asarray(action).dtype.kind in "USO":
        return  # a tensordict holds no such thing
    with pytest.raises(InvalidActionError, match=r"^(actions must be sets of shape \(1, 4\)|sets hold 0 and 1, not )"):
        steps("set")[interface](action)


@INTERFACES
@pytest.mark.parametrize("kind", [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)])
def test_every_kind_of_whole_number_plays(interface: str, kind: str) -> None:
    steps("single")[interface](np.array(2, kind))
    for several in (np.array([1, 0, 0, 1], kind), np.array([True, False, False, True])):
        steps("set")[interface](several)


def test_ragged_actions_and_none_at_all_are_refused() -> None:
    envs, rl = UnmaskVectorEnv(2, **options(actions="set")), UnmaskTorchEnv(num_envs=1, seed=0, **options())
    envs.reset(seed=0)
    for action in ([[0, 1, 0, 0], [1]], None):
        with pytest.raises(InvalidActionError, match=r"actions must be sets of shape \(2, 4\)"):
            envs.step(action)
    with pytest.raises(InvalidActionError, match="actions must be 1 integers"):
        rl.step(rl.reset())


def test_an_array_of_actions_stays_the_callers() -> None:
    envs, actions = UnmaskVectorEnv(2, **options(autoreset_mode="NextStep")), np.array([2, 2])
    envs.reset(seed=0)
    for position in (2, 3, 0, 3):
        actions[:] = position
        actions.flags.writeable = False
        envs.step(actions)  # the last one begins anew, whatever it says
        actions.flags.writeable = True
        assert actions.tolist() == [position] * 2


@pytest.mark.parametrize("on_illegal", ["noop", "terminate", "raise"])
@pytest.mark.parametrize("position", [-1, 4])
def test_positions_outside_the_board_are_refused_however_illegal_actions_end(on_illegal: str, position: int) -> None:
    env, envs = UnmaskEnv(**options(on_illegal=on_illegal)), UnmaskVectorEnv(2, **options(on_illegal=on_illegal))
    rl = UnmaskTorchEnv(num_envs=2, seed=0, **options(on_illegal=on_illegal))
    message = f"position {position} is not on the board; positions are 0 to 3"
    for interface in (env, envs):
        interface.reset(seed=0)
    with pytest.raises(InvalidActionError, match=message):
        env.step(position)
    with pytest.raises(InvalidActionError, match=message):
        envs.step(np.array([0, position]))
    with pytest.raises(InvalidActionError, match=message):
        rl.step(rl.reset().set("action", torch.tensor([0, position])))


@pytest.mark.parametrize(
    ("actions", "action", "message"),
    [
        ("single", [1, 0, 0, 0], r"must be 1 integers, not torch.int64 of shape \(1, 4\)"),
        ("set", 3, r"must be sets of shape \(1, 4\), not torch.int64 of shape \(1,\)"),
        ("set", [0, 2, 1, 1], "sets hold 0 and 1, not 2"),
        ("set+remask", [1, 0, 0, 0], r"must be sets of shape \(1, 8\), not torch.int64 of shape \(1, 4\)"),
    ],
)
def test_an_action_of_another_kind_is_refused(actions: str, action: list[int] | int, message: str) -> None:
    env, rl = UnmaskEnv(**options(actions=actions)), UnmaskTorchEnv(num_envs=1, seed=0, **options(actions=actions))
    env.reset(seed=0)
    with pytest.raises(InvalidActionError, match=message):
        env.step(np.array(action))
    with pytest.raises(InvalidActionError, match=message):
        rl.step(rl.reset().set("action", torch.tensor([action])))


# ---------------------------------------------------------------------- whose the arrays are
class Many(Task):
    """Two of 200 symbols."""

    name, symbols, shape = "many", tuple(map(str, range(200))), (1, 2)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        answers = torch.randint(200, (n, 2), generator=generator)
        return Instances(torch.full_like(answers, self.mask_id), answers)

    def reward(self, tokens: torch.Tensor, instances: Instances) -> torch.Tensor:
        return (tokens == instances.answers).all(1).float()


@pytest.mark.parametrize("actions", ["single", "set+remask"])
@pytest.mark.parametrize("large", [False, True])
def test_what_is_handed_out_is_the_callers_to_write_to(large: bool, actions: str) -> None:
    denoiser = FavouriteDenoiser(torch.tensor([[7, 5]] * 2), torch.full((2, 2), -0.1), vocab_size=200)
    made = {"task": Many(), "denoiser": denoiser} if large else options()
    played = []
    for scribble in (False, True):
        envs = UnmaskVectorEnv(2, **made, actions=actions)
        obs, _ = envs.reset(seed=0)
        for position in (0, 3) if not large else (0, 1):
            if scribble:
                for value in obs.values():
                    value[...] = 0
            action = np.full(2, position)
            if actions != "single":
                action = np.stack([np.isin(np.arange(envs.process.entries), position)] * 2).astype(np.int8)
            obs, *_ = envs.step(action)
        played.append({key: value.copy() for key, value in obs.items()})
    for key, value in played[0].items():
        np.testing.assert_array_equal(value, played[1][key])


# ---------------------------------------------------------------------- what is shown when asked for
class Learned(TableDenoiser):
    """Hidden states and a learned order beside the probabilities: their sums and products, to be told apart."""

    hidden_dim = 2

    def __call__(self, tokens: torch.Tensor) -> Denoised:
        log_probs = super().__call__(tokens).log_probs
        hidden = torch.stack([tokens.float() + 1, tokens.float() * 2 + 1], -1)
        return Denoised.of(log_probs, hidden, tokens.float() + 0.5)


@pytest.mark.parametrize("autoreset", ["SameStep", "NextStep"])
def test_hidden_states_and_the_learned_order_are_shown_alike(autoreset: str) -> None:
    """On all interfaces, up to the finished board, on which the denoiser is not run."""
    made = options(denoiser=Learned(TASK.joint, TASK), show=("hidden", "order_weights"))
    env, envs = UnmaskEnv(**made), UnmaskVectorEnv(2, **made, autoreset_mode=autoreset)
    rl = UnmaskTorchEnv(num_envs=2, seed=0, **made)
    obs, many, td = env.reset(seed=0)[0], envs.reset(seed=0)[0], rl.reset()
    assert env.observation_space.contains(obs)
    for position in (0, 2, 3):
        np.testing.assert_array_equal(obs["hidden"][:, 0], obs["tokens"] + 1)
        np.testing.assert_array_equal(obs["order_weights"], obs["tokens"] + np.float32(0.5))
        back = decode({key: torch.from_numpy(value)[None] for key, value in obs.items()}, 3)
        np.testing.assert_array_equal(back.hidden[0], obs["hidden"])
        np.testing.assert_array_equal(back.order_weights[0], obs["order_weights"])
        obs, *_ = env.step(position)
        many, *_, info = envs.step(np.full(2, position))
        td = rl.step(td.set("action", torch.full((2,), position)))["next"]
        last = info["final_obs"][0] if "final_obs" in info else {key: value[0] for key, value in many.items()}
        for key in ("hidden", "order_weights", "entropy"):
            np.testing.assert_array_equal(last[key], obs[key])
            np.testing.assert_array_equal(td[key][0], obs[key])
    assert not obs["hidden"].any()
    assert not obs["order_weights"].any()


@pytest.mark.parametrize("extra", ["hidden", "order_weights"])
def test_a_denoiser_that_has_none_cannot_show_them(extra: str) -> None:
    with pytest.raises(UnmaskError, match=f"this denoiser gives no {extra}, so an environment cannot show them"):
        UnmaskEnv(**options(show=(extra,))).reset(seed=0)
