"""The TorchRL face, with TorchRL's own checks, rollouts, collectors, actors and loss-facing transforms."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import GymEnv, TransformedEnv
from torchrl.envs.transforms import Compose, RewardSum
from torchrl.envs.utils import check_env_specs
from torchrl.modules import MaskedCategorical, ProbabilisticActor

from tasks import UnknownNameError, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint
from tests.oracles.episodes import Counting, agrees, exact_return
from tests.toys import shown
from unmask_env.denoiser import TableDenoiser
from unmask_env.distributions import Categorical
from unmask_env.encoding import LOG_ZERO
from unmask_env.reference import SoftmaxConfidence
from unmask_env.state import Observation
from unmask_env.torchrl_env import KLReward, UnmaskTorchEnv

with warnings.catch_warnings():  # torchrl 0.14 warns of its own classes
    warnings.filterwarnings("ignore", "Creating .* which inherits from WeightUpdaterBase", DeprecationWarning)
    from torchrl.collectors import Collector, MultiCollector

CLUE = 1
TASK = TableTask(random_joint(3, 4, seed=7), clues=(CLUE,))  # 4 positions, 3 symbols
BETA = 0.3
SEEN = ("tokens", "masked", "action_mask", "top_symbols", "top_log_probs", "entropy", "log_reference")
ANSWERS, GIVEN, STEPS = ("state", "answers"), ("state", "given"), ("state", "steps")


def table(n: int = 2, **options) -> UnmaskTorchEnv:
    settings = {"task": TASK, "denoiser": TableDenoiser(TASK.joint, TASK), "seed": 0}
    return UnmaskTorchEnv(num_envs=n, **(settings | options))


def play(env, td: TensorDict, actions: list[int]) -> TensorDict:
    """One step; what it leads to, without a reset."""
    td = td.clone()
    td["action"] = torch.tensor(actions)
    return env.step(td)["next"]


def go_on(env, td: TensorDict, actions: list[int]) -> tuple[TensorDict, TensorDict]:
    """One step with automatic reset: the step taken, and from where play goes on."""
    td = td.clone()
    td["action"] = torch.tensor(actions)
    return env.step_and_maybe_reset(td)


def equal(a: TensorDict, b: TensorDict, keys: tuple[str, ...] = SEEN) -> None:
    for key in keys:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")


def uniform(td: TensorDict) -> TensorDict:
    """A legal action."""
    return td.set("action", torch.multinomial(td["action_mask"].float(), 1).squeeze(-1))


def stubborn(td: TensorDict) -> TensorDict:
    """Legal actions, but the last row insists on the clue, until it is truncated."""
    action = uniform(td)["action"].clone()
    action[-1] = CLUE
    return td.set("action", action)


@contextmanager
def collecting(env, policy, frames: int, total: int) -> Iterator[Collector]:
    """A collector of ``total`` frames in batches of ``frames``, which is shut down at the end."""
    # Without memory there is nothing that a policy would want to be told of resets.
    options = {"frames_per_batch": frames, "total_frames": total, "auto_register_policy_transforms": False}
    collector = Collector(env, policy, **options)
    try:
        yield collector
    finally:
        collector.shutdown()


def actor(seed: int = 0, symbols: int = 3) -> ProbabilisticActor:
    """A policy over the denoiser's confidences, of parts that any worker process can unpickle."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(symbols, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(-2))
    with torch.no_grad():
        net[2].weight.mul_(2)  # the first policy is nearly uniform; this one has preferences of its own
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=["top_log_probs"], out_keys=["logits"]),
        in_keys={"logits": "logits", "mask": "action_mask"},
        distribution_class=MaskedCategorical,
        return_log_prob=True,
    )


# ---------------------------------------------------------------------- conventions
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("n", "group"), [(1, 1), (64, 1), (64, 2)])
def test_specs_hold_without_a_warning(n: int, group: int, temperature: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env_specs(table(n, group=group, temperature=temperature))
        if n == 1:
            sudoku = UnmaskTorchEnv("Unmask/Sudoku4x4-v0", n, group=group, temperature=temperature, seed=0)
            check_env_specs(sudoku)


@pytest.mark.parametrize("settings", [{}, {"categorical_action_encoding": True}, {"frame_skip": 1}])
def test_their_own_wrapper_of_gymnasium_makes_it_as_it_makes_others(settings: dict) -> None:
    """It tries keywords, and reads in Python's own words that they are not taken."""
    env = GymEnv("Unmask/Sudoku4x4-v0", **settings)
    taken = env.rollout(12, break_when_any_done=False)
    assert taken["next", "tokens"].shape == (12, 16)


def test_every_observation_lies_in_its_spec() -> None:
    """Finished, truncated and wrongly ended boards included."""
    for on_illegal in ("noop", "terminate"):
        env = table(3, on_illegal=on_illegal)
        torch.manual_seed(0)
        taken = env.rollout(40, stubborn, break_when_any_done=False)
        assert taken["next", "done"].any()
        for at in range(40):
            for td in (taken[:, at], taken["next"][:, at]):
                for key, spec in env.observation_spec.items():
                    assert spec.is_in(td[key]), key


# ---------------------------------------------------------------------- the ends of episodes
def finished_boards_are_intact(taken: TensorDict, temperature: float) -> int:
    """(N, T) consecutive steps: the last board of each episode is whole, and the step after it starts a fresh one."""
    done, after = taken["next", "done"].squeeze(-1), taken["next", "tokens"]
    chosen = nn.functional.one_hot(taken["action"], 4).bool() & taken["action_mask"]
    assert torch.equal(after[~chosen], taken["tokens"][~chosen])
    assert (after[chosen] < 3).all()
    if temperature == 0:
        assert torch.equal(after[chosen], taken["top_symbols"][..., 0][chosen])
    terminated, truncated = (taken["next", key].squeeze(-1) for key in ("terminated", "truncated"))
    assert torch.equal(done, terminated | truncated)
    last = taken["next"][terminated]
    assert (last["tokens"] < 3).all()
    assert not last["action_mask"].any()
    assert (last["log_reference"] == LOG_ZERO).all()
    solved = (last["tokens"] == taken[ANSWERS][terminated]).all(1)
    assert torch.equal(last["reward"].squeeze(-1), solved.float())
    cut = taken["next"][truncated]
    assert torch.equal(cut["tokens"] == 3, cut["action_mask"])
    assert cut["action_mask"].any(1).all()
    assert (cut["top_log_probs"][cut["action_mask"]] < 0).any(-1).all()
    assert (cut["log_reference"][cut["action_mask"]] > LOG_ZERO).all()
    assert not taken["next", "reward"][~terminated].any()

    fresh = taken[:, 1:][done[:, :-1]]
    assert ((fresh["tokens"] == 3).sum(1) == 3).all()
    assert torch.equal(fresh["tokens"], fresh[GIVEN])
    assert not fresh[STEPS].any()
    following = ~done[:, :-1]
    equal(taken[:, 1:][following], taken["next"][:, :-1][following], (*SEEN, STEPS))
    equal(taken[:, 1:][following], taken[:, :-1][following], (ANSWERS, GIVEN))
    return int(truncated.sum())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_finished_boards_through_a_rollout(temperature: float) -> None:
    torch.manual_seed(0)
    taken = table(4, temperature=temperature).rollout(50, stubborn, break_when_any_done=False)
    assert taken["next", "terminated"].sum() == 3 * 16
    assert finished_boards_are_intact(taken, temperature) == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_finished_boards_through_a_collector_with_one_forward_per_step(temperature: float) -> None:
    counting = Counting(TableDenoiser(TASK.joint, TASK))
    env = table(4, temperature=temperature, denoiser=counting)
    torch.manual_seed(0)
    with collecting(env, stubborn, 4 * 30, 4 * 60) as collector:
        counting.rows.clear()
        batches = []
        for k, batch in enumerate(collector):
            batches.append(batch.clone())
            cut = int(batch["next", "truncated"].sum())
            # The last step of a batch already looks at what follows it; only the first reset is besides.
            assert len(counting.rows) <= 30 + (k == 0)
            assert sum(counting.rows) == 4 * len(counting.rows) + cut
            counting.rows.clear()
    assert finished_boards_are_intact(torch.cat(batches, 1), temperature) == 7


def test_one_forward_per_step_where_rows_end() -> None:
    counting = Counting(TableDenoiser(TASK.joint, TASK))
    env = table(4, denoiser=counting)
    torch.manual_seed(0)
    td, kinds = env.reset(), set()
    assert counting.rows == [4]
    for k in range(40):
        counting.rows.clear()
        taken, td = env.step_and_maybe_reset(stubborn(td))
        cut = int(taken["next", "truncated"].sum())
        assert counting.rows == [4 + cut], f"step {k}"
        kinds.add((bool(taken["next", "terminated"].any()), bool(cut)))
    assert {(True, False), (False, True)} <= kinds
    counting.rows.clear()
    torch.manual_seed(0)
    env.rollout(30, stubborn, break_when_any_done=False)
    assert len(counting.rows) == 31  # and one for the reset


# ---------------------------------------------------------------------- randomness
def given(env: UnmaskTorchEnv, episodes: int) -> torch.Tensor:
    """(episodes, N, L) the answers of consecutive episodes of legal play."""
    out, td = [], env.reset()
    for _ in range(episodes):
        out.append(td[ANSWERS].clone())
        for action in (0, 2, 3):
            _, td = go_on(env, td, [action] * env.batch_size[0])
    return torch.stack(out)


def test_seeds_repeat_and_rows_count_on() -> None:
    a, b = given(table(4, seed=5), 12), given(table(4, seed=5), 12)
    assert torch.equal(a, b)
    assert torch.equal(given(table(1, seed=7), 12)[:, 0], a[:, 2])
    assert not torch.equal(a, given(table(4, seed=50), 12))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_setting_the_seed_after_use_starts_all_streams_again(temperature: float) -> None:
    env = table(3, temperature=temperature)
    first = []
    for _ in range(2):
        env.set_seed(8)
        torch.manual_seed(0)
        first.append(env.rollout(20, stubborn, break_when_any_done=False))
        # Leave finished rows waiting, which must not survive the seed.
        td = env.reset()
        for action in (0, 2, 3):
            td = play(env, td, [action] * 3)
        assert td["done"].all()
    equal(first[0], first[1], (*SEEN, ANSWERS))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_groups_share_instances_and_draw_their_own_symbols(temperature: float) -> None:
    env = table(6, group=3, temperature=temperature)
    td, differ = env.reset(), 0
    seen = []
    for _ in range(10):
        for action in (0, 2, 3):
            for key in (ANSWERS, GIVEN):
                groups = td[key].view(2, 3, 4)
                assert (groups == groups[:, :1]).all()
            seen.append(td[ANSWERS].clone())
            taken, td = go_on(env, td, [action] * 6)
            after = taken["next", "tokens"].view(2, 3, 4)
            differ += int((after != after[:, :1]).any())
    answers = torch.stack(seen)
    assert (answers[:, 0] != answers[:, 3]).any()  # another group, another instance
    assert (differ > 0) == (temperature > 0)


def test_groups_share_instances_where_their_rows_end_apart() -> None:
    """The k-th episode of a row is that of its group, whenever it begins."""
    env = table(2, group=2)
    torch.manual_seed(0)
    taken = env.rollout(150, stubborn, break_when_any_done=False)
    begins = taken[STEPS].squeeze(-1) == 0
    first, last = (taken[ANSWERS][row][begins[row]] for row in range(2))
    fewest = min(len(first), len(last))
    assert fewest >= 15
    assert torch.equal(first[:fewest], last[:fewest])


def test_groups_share_instances_after_playing_on_without_a_reset() -> None:
    """As a loop does that plays on until the slowest of its rows has ended."""
    env = table(2, group=2)
    for _ in range(12):
        td = env.reset()
        assert torch.equal(td[ANSWERS][0], td[ANSWERS][1])
        for actions in ([0, CLUE], [2, 0], [3, 2], [3, 3]):
            td = play(env, td, actions)


def test_a_partial_reset_leaves_the_other_rows_alone() -> None:
    env = table(3, temperature=1.0)
    td = play(env, env.reset(), [0, 2, 3])
    before = td.clone()
    td["_reset"] = torch.tensor([[False], [True], [False]])
    after = env.reset(td, set_state=False)
    others = torch.tensor([0, 2])
    equal(after[others], before[others], (*SEEN, ANSWERS, GIVEN, STEPS))
    assert (after["tokens"][1] == 3).sum() == 3
    assert after[STEPS].flatten().tolist() == [1, 0, 1]
    # And they go on as if nothing had happened: the same symbols come.
    alone = table(3, temperature=1.0)
    td = play(alone, alone.reset(), [0, 2, 3])
    for actions in ([2, 0, 0], [3, 2, 2]):
        after, td = play(env, after, actions), play(alone, td, actions)
        equal(after[others], td[others])
    assert after["terminated"].flatten().tolist() == [True, False, True]


# ---------------------------------------------------------------------- forking
def middle(temperature: float, env: UnmaskTorchEnv | None = None) -> tuple[UnmaskTorchEnv, TensorDict]:
    env = env or table(4, temperature=temperature)
    return env, play(env, env.reset(), [0, 2, 3, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_board_forks_into_many(temperature: float) -> None:
    env, td = middle(temperature)
    forks = env.reset(td[torch.tensor([2, 2, 2, 1])], set_state=True)
    kept = (ANSWERS, GIVEN, STEPS)
    for row in range(3):
        equal(forks[row], td[2], (*SEEN, *kept))
    equal(forks[3], td[1], (*SEEN, *kept))
    assert not forks["done"].any()
    after = play(env, forks, [0, 2, 0, 0])
    assert (after["tokens"][0] != after["tokens"][1]).any()
    assert (after[STEPS] == 2).all()
    equal(after, forks, (ANSWERS, GIVEN))
    if temperature == 0:
        equal(after[0], after[2])
        assert after["tokens"][0, 0] == td["top_symbols"][2, 0, 0]
    for position in (2, 0, 2):
        after = play(env, after, [position if after["action_mask"][row, position] else 0 for row in range(4)])
    whole = ~after["action_mask"].any(1)
    assert whole.any()


def test_forks_draw_symbols_of_their_own() -> None:
    n = 300
    env = table(n, temperature=1.0)
    td = play(env, env.reset(), [0] * n)
    forks = env.reset(td[torch.zeros(n, dtype=torch.long)], set_state=True)
    shares = nn.functional.one_hot(play(env, forks, [2] * n)["tokens"][:, 2], 3).double().mean(0)
    at = td["top_symbols"][0, 2]
    expected = torch.zeros(3, dtype=torch.double).scatter(0, at, td["top_log_probs"][0, 2].double().exp())
    assert (shares - expected).abs().max() < 5 * (expected * (1 - expected) / n).sqrt().max()
    assert (shares > 0).sum() > 1


def test_a_fork_of_a_fork_ends_and_is_rewarded_as_its_instance_says() -> None:
    env, td = middle(0.0)
    forks = env.reset(td[torch.tensor([0, 0, 0, 0])], set_state=True)
    again = env.reset(play(env, forks, [2, 3, 2, 3])[torch.tensor([0, 0, 1, 1])], set_state=True)
    after = play(env, again, [3, 3, 2, 2])
    assert after["terminated"].all()
    answers = td[ANSWERS][0].expand(4, 4)
    assert torch.equal(after[ANSWERS], answers)
    assert torch.equal(after["reward"].squeeze(1), (after["tokens"] == answers).all(1).float())
    fresh = env.reset()
    assert ((fresh["tokens"] == 3).sum(1) == 3).all()


def test_tokens_and_state_suffice_for_a_fork() -> None:
    env, td = middle(0.0)
    forks = env.reset(td.select("tokens", "state"), set_state=True)
    equal(forks, td, (*SEEN, ANSWERS, STEPS))


@pytest.mark.parametrize("name", ["kl_stability", "schedule:steps=3"])
def test_forks_remember_what_references_that_look_back_ask_for(name: str) -> None:
    """A fork in mid-play shows the reference's probabilities that the board itself showed."""
    env = table(4, actions="set", reference=name)
    td = env.reset()
    for position in (0, 2):
        action = torch.zeros(4, 4, dtype=torch.bool)
        action[:, position] = True
        td = env.step(td.clone().set("action", action))["next"]
    forks = env.reset(td[torch.tensor([3, 2, 1, 0])], set_state=True)
    equal(forks, td[torch.tensor([3, 2, 1, 0])])
    assert (td["log_reference"] > LOG_ZERO).any()


def test_mistakes_with_forks() -> None:
    env, td = middle(0.0)
    with pytest.raises(UnmaskError, match="needs tokens and state"):
        env.reset(td.exclude("state"), set_state=True)
    with pytest.raises(UnmaskError, match="needs tokens and state"):
        env.reset(td.select("done"), set_state=True)
    done = play(env, play(env, td, [2, 0, 0, 2]), [3, 3, 2, 3])
    assert done["done"].all()
    with pytest.raises(UnmaskError, match="masked position in every row; a complete board has nothing to play"):
        env.reset(done.exclude("done", "terminated", "truncated"), set_state=True)


# ---------------------------------------------------------------------- policies
def only_legal(taken: TensorDict) -> None:
    assert taken["action_mask"].gather(-1, taken["action"].unsqueeze(-1)).all()


def test_a_masked_actor_takes_legal_actions_only() -> None:
    with collecting(table(8), actor(), 8 * 24, 8 * 48) as collector:
        batches = [batch.clone() for batch in collector]
    taken = torch.cat(batches, 1)
    only_legal(taken)
    assert taken["next", "terminated"].sum() == 8 * 16
    assert finished_boards_are_intact(taken, 0.0) == 0
    allowed = taken["logits"].masked_fill(~taken["action_mask"], -torch.inf).log_softmax(-1)
    expected = allowed.gather(-1, taken["action"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(taken["action_log_prob"], expected)


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_worker_processes_give_whole_legal_data() -> None:
    # Each worker unpickles the factory and loads the packaged denoiser by itself.
    make = functools.partial(UnmaskTorchEnv, "Unmask/Sudoku4x4-v0", 2, seed=1)
    other = functools.partial(UnmaskTorchEnv, "Unmask/Sudoku4x4-v0", 2, seed=100)
    collector = MultiCollector(
        [make, other],
        actor(symbols=4),
        sync=True,
        frames_per_batch=2 * 2 * 20,
        total_frames=2 * 2 * 40,
        auto_register_policy_transforms=False,
    )
    try:
        taken = torch.cat([batch.clone() for batch in collector], -1)
    finally:
        collector.shutdown()
    assert taken.shape == (2, 2, 40)  # workers, rows, steps
    only_legal(taken)
    assert (taken[ANSWERS][0] != taken[ANSWERS][1]).any()
    done = taken["next", "done"].squeeze(-1)
    assert torch.equal(done, taken["next", "terminated"].squeeze(-1))
    assert done.sum() >= 8
    assert (taken["next", "tokens"][done] < 4).all()
    before, after = taken[..., :-1], taken[..., 1:]
    assert torch.equal(after["tokens"][~done[..., :-1]], before["next", "tokens"][~done[..., :-1]])
    fresh = after[done[..., :-1]]
    assert torch.equal(fresh["tokens"], fresh[GIVEN])
    assert (fresh["tokens"] == 4).any(1).all()
    # What a worker collects is what its environment gives for the same actions.
    env = make()
    td = env.reset()
    for at in range(40):
        equal(td, taken[0, :, at], ("tokens", "action_mask", ANSWERS))
        _, td = go_on(env, td, taken["action"][0, :, at].tolist())


# ---------------------------------------------------------------------- regularised rewards
def regularised(n: int, **options) -> TransformedEnv:
    return TransformedEnv(table(n, **options), KLReward(BETA))


def test_rewards_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    with collecting(regularised(8), actor(), 8 * 24, 8 * 24) as collector:
        taken = next(iter(collector)).clone()
    log_g = taken["log_reference"].gather(-1, taken["action"].unsqueeze(-1)).squeeze(-1)
    ratio = taken["action_log_prob"] - log_g
    last = taken["next", "terminated"].squeeze(-1)
    raw = last * (taken["next", "tokens"] == taken[ANSWERS]).all(-1).float()
    torch.testing.assert_close(taken["next", "reward"].squeeze(-1), raw - BETA * ratio)
    # The last step of an episode carries both the task's reward and its share of the KL.
    assert raw.any()
    assert (ratio[last].abs() < 1e-5).all()  # one position left: both are certain
    assert (ratio[~last].abs() > 1e-3).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_returns_have_the_objective_as_their_mean(temperature: float) -> None:
    """J = E[r] - beta * KL, known exactly by enumeration."""
    n, policy = 400, actor(seed=2)

    def log_policy(observation: Observation) -> Categorical:
        with torch.no_grad():
            logits = policy.get_submodule("module.0")(TensorDict(shown(observation)))["logits"]
        return Categorical.of(logits, observation.fillable)

    g = SoftmaxConfidence()
    mean, divergence = exact_return(TASK, TableDenoiser(TASK.joint, TASK), log_policy, g, temperature)
    env = TransformedEnv(table(n, temperature=temperature), Compose(KLReward(BETA), RewardSum()))
    torch.manual_seed(1)
    with collecting(env, policy, n * 24, n * 24) as collector:
        taken = next(iter(collector))
    returns = taken["next", "episode_reward"][taken["next", "done"]]
    assert len(returns) == 8 * n
    agrees(returns.numpy().astype(np.float64), mean - BETA * divergence, at_least=BETA * divergence)


def test_mistakes_with_regularised_rewards() -> None:
    with pytest.raises(UnmaskError, match="beta must be at least 0, not -1"):
        KLReward(-1.0)
    exclusive = regularised(2, reference="margin")
    td = exclusive.reset()
    td["action"] = (td["action_mask"] & (td["log_reference"] < 0)).int().argmax(1)  # open, but not margin's
    td["action_log_prob"] = torch.zeros(2)
    with pytest.raises(UnmaskError, match="so the KL is infinite"):
        exclusive.step(td)
    bare = table(2)
    with pytest.raises(UnmaskError, match="lost its instances"):
        bare.step(bare.reset().select(*SEEN).set("action", torch.zeros(2, dtype=torch.long)))
    plain = regularised(2)
    td = plain.reset().set("action", torch.zeros(2, dtype=torch.long)).set("action_log_prob", torch.zeros(2, 1))
    with pytest.raises(UnmaskError, match=r"action_log_prob must be of shape \(2,\), not \(2, 1\)"):
        plain.step(td)
    with pytest.raises(UnmaskError, match=r"under 'action_log_prob'; build the policy as ProbabilisticActor"):
        regularised(2).rollout(3, uniform)


# ---------------------------------------------------------------------- a user's mistakes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 3}, "num_envs must be a multiple of group; 4 is not one of 3"),
        ({"group": 0}, "num_envs must be a multiple of group; 4 is not one of 0"),
        ({"reference": "oracle"}, "the oracle sees the answers"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0"),
        ({"denoiser": None}, "needs a denoiser; give one"),
    ],
)
def test_mistakes_give_one_clear_line(options: dict, message: str) -> None:
    with pytest.raises(UnmaskError, match=message) as error:
        table(4, **options)
    assert "\n" not in str(error.value)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown reference policy 'margins'; did you mean margin.* known: .*margin"
    ):
        table(2, reference="margins")
    with pytest.raises(
        UnknownNameError, match=r"unknown environment 'Unmask/Sudoku5x5-v0'; did you mean .* known: .*Sudoku4x4"
    ):
        UnmaskTorchEnv("Unmask/Sudoku5x5-v0")


def test_boards_that_are_done_earn_and_cost_nothing() -> None:
    """Played on without a reset, they idle: no KL is taken off, whatever the policy's log-probability."""
    env = regularised(2)
    td = env.reset()
    for position in (0, 2, 3):
        td = td.clone().set("action", torch.full((2,), position)).set("action_log_prob", torch.full((2,), -3.0))
        td = env.step(td)["next"]
    assert td["terminated"].all()
    idle = td.exclude("reward").set("action", torch.zeros(2, dtype=torch.long))
    after = env.step(idle.set("action_log_prob", torch.full((2,), -7.0)))["next"]
    assert after["reward"].flatten().tolist() == [0.0, 0.0]
    assert torch.equal(after["tokens"], td["tokens"])
