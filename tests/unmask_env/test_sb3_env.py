"""The stable-baselines3 face, with stable-baselines3's own learner, evaluation, monitor and checker."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import VecMonitor

import tasks
from tasks import UnknownNameError, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint
from tests.oracles.episodes import Counting, agrees, exact_return
from tests.toys import IDS, legal, packaged_denoiser, same, shown
from unmask_env.denoiser import TableDenoiser
from unmask_env.distributions import Categorical
from unmask_env.encoding import LOG_ZERO
from unmask_env.gym_env import UnmaskEnv
from unmask_env.reference import SoftmaxConfidence, require_full_support
from unmask_env.sb3_env import KLRolloutBuffer, SB3VecEnv
from unmask_env.state import Observation
from unmask_env.vector_env import UnmaskVectorEnv

CLUE = 1
TASK = TableTask(random_joint(3, 4, seed=7), clues=(CLUE,))  # 4 positions, 3 symbols
BETA = 0.3


def vector(n: int, **options) -> UnmaskVectorEnv:
    return UnmaskVectorEnv(n, **({"task": TASK, "denoiser": TableDenoiser(TASK.joint, TASK)} | options))


def learner(n: int, n_steps: int, seed: int = 0, envs: UnmaskVectorEnv | None = None, **options) -> MaskablePPO:
    settings = {"n_steps": n_steps, "batch_size": n * n_steps // 2, "n_epochs": 2, "gamma": 1.0, "seed": seed}
    return MaskablePPO("MultiInputPolicy", SB3VecEnv(envs or vector(n)), device="cpu", **settings, **options)


class Keep(BaseCallback):
    """Copies what each rollout stored, before the buffer is flattened for training."""

    def _on_training_start(self) -> None:
        self.rollouts = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        kept = {name: getattr(buffer, name).copy() for name in ("rewards", "log_probs", "action_masks")}
        kept |= {name: value.copy() for name, value in buffer.observations.items()}
        kept["actions"] = buffer.actions[..., 0].astype(int)
        kept["log_ratios"] = np.array(getattr(buffer, "log_ratios", []))
        self.rollouts.append(kept)


# ---------------------------------------------------------------------- conventions
@pytest.mark.parametrize("id", IDS)
def test_their_checker_has_nothing_to_say(id: str) -> None:
    """But for a hint that boxes of two dimensions are flattened."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*unconventional shape")
        check_env(UnmaskEnv(id, denoiser=packaged_denoiser(id)))


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused(mode: AutoresetMode) -> None:
    with pytest.raises(UnmaskError, match=f"needs autoreset_mode SAME_STEP, not {mode.name}"):
        SB3VecEnv(vector(2, autoreset_mode=mode))


def test_seeds_are_consecutive_and_last_for_one_reset() -> None:
    stable, envs = SB3VecEnv(vector(3, temperature=1.0)), vector(3, temperature=1.0)
    assert stable.seed(3) == [3, 4, 5]
    same(stable.reset(), envs.reset(seed=[3, 4, 5])[0])
    same(stable.reset(), envs.reset()[0])  # goes on, as the vector environment does
    stable.seed(3)
    same(stable.reset(), envs.reset(seed=3)[0])


def test_from_an_id_it_is_the_environment_that_make_vec_makes() -> None:
    named = SB3VecEnv("Unmask/Sudoku4x4-v0", num_envs=3, denoiser="sudoku4", split="test", nfe_budget=9)
    made = SB3VecEnv(gymnasium.make_vec("Unmask/Sudoku4x4-v0", num_envs=3, split="test", nfe_budget=9))
    assert (named.num_envs, named.envs.unwrapped.process.horizon) == (3, 9)
    named.seed(4), made.seed(4)
    np.testing.assert_array_equal(named.reset()["tokens"], made.reset()["tokens"])
    assert SB3VecEnv("Unmask/Sudoku4x4-v0").num_envs == 1
    with pytest.raises(
        UnknownNameError, match=r"unknown environment 'Unmask/Sudoku4x5-v0'; did you mean Unmask/Sudoku4x4"
    ):
        SB3VecEnv("Unmask/Sudoku4x5-v0", num_envs=2)
    with pytest.raises(UnmaskError, match="num_envs, split: only with an environment's id; this environment is made"):
        SB3VecEnv(vector(2), num_envs=2, split="test")
    with pytest.raises(UnmaskError, match="takes an environment's id or an UnmaskVectorEnv, not SyncVectorEnv"):
        SB3VecEnv("Unmask/Sudoku4x4-v0", num_envs=2, vectorization_mode="sync")


def test_options_choose_the_instances_of_one_reset() -> None:
    stable = SB3VecEnv("Unmask/Sudoku4x4-v0", num_envs=2, split="test")
    heldout = tasks.get("sudoku4").heldout().tokens.numpy()
    stable.set_options([{"index": 7}, {"index": 0}])
    np.testing.assert_array_equal(stable.reset()["tokens"], heldout[[7, 0]])
    stable.set_options({"index": 5})
    np.testing.assert_array_equal(stable.reset()["tokens"], heldout[[5, 5]])
    assert not (stable.reset()["tokens"] == heldout[[5, 5]]).all(), "of one reset only"
    for options, message in (
        ([{"index": 7}, {}], "takes an index for each of the 2 environments, or for none"),
        ({"instances": None}, "reset takes no option instances; known: index"),
        ({"index": -1}, "must be a whole number from 0 to [0-9]+, not -1"),
    ):
        stable.set_options(options)
        with pytest.raises(UnmaskError, match=message):
            stable.reset()


def test_what_they_ask_of_each_environment() -> None:
    stable = SB3VecEnv(vector(3))
    stable.reset()
    assert is_masking_supported(stable)
    np.testing.assert_array_equal(get_action_masks(stable), [[True, False, True, True]] * 3)
    assert len(stable.env_method("action_masks", indices=[0, 2])) == 2
    assert stable.get_attr("task", indices=1) == [TASK]
    assert not stable.has_attr("nonsense")
    with pytest.raises(UnmaskError, match="per row there are action_masks, not 'reset'"):
        stable.env_method("reset")


# ---------------------------------------------------------------------- the ends of episodes
@pytest.mark.parametrize("limit", [None, 2])
def test_terminal_observations_are_the_finished_boards(limit: int | None) -> None:
    stable, rng = SB3VecEnv(vector(4, max_episode_steps=limit)), np.random.default_rng(0)
    stable.seed(0)
    before, ends = stable.reset(), 0
    for _ in range(24):
        actions = legal(before["action_mask"], rng)
        after, _, dones, infos = stable.step(actions)
        for row in np.flatnonzero(dones):
            ends += 1
            last = infos[row]["terminal_observation"]
            expected = before["tokens"][row].copy()
            expected[actions[row]] = before["top_symbols"][row, actions[row], 0]
            np.testing.assert_array_equal(last["tokens"], expected)
            assert infos[row]["TimeLimit.truncated"] is (limit is not None)
            assert (last["tokens"] == 3).sum() == last["action_mask"].sum() == (0 if limit is None else 1)
            left = last["action_mask"] == 1
            assert (last["log_reference"][~left] == LOG_ZERO).all()
            if limit is not None:  # what is left has features, for the value of the board
                assert (last["top_log_probs"][left] < 0).any()
                assert (last["log_reference"][left] > LOG_ZERO).all()
            assert after["tokens"][row].tolist().count(3) == 3
        before = after
    assert ends == 4 * 24 // (limit or 3)


def test_illegal_noops_truncate_with_features() -> None:
    stable = SB3VecEnv(vector(2))
    start = stable.reset()
    for k in range(1, 9):
        _, _, dones, infos = stable.step(np.array([CLUE, CLUE]))
        assert dones.tolist() == [k == 8] * 2
    for row in range(2):
        assert infos[row]["TimeLimit.truncated"] is True
        same(infos[row]["terminal_observation"], {name: value[row] for name, value in start.items()})


def test_one_forward_per_step() -> None:
    counting = Counting(TableDenoiser(TASK.joint, TASK))
    stable, rng = SB3VecEnv(vector(4, denoiser=counting)), np.random.default_rng(0)
    obs, kinds = stable.reset(), set()
    for _ in range(60):
        counting.rows.clear()
        obs, _, dones, infos = stable.step(np.append(legal(obs["action_mask"][:3], rng), CLUE))
        cut = [infos[row]["TimeLimit.truncated"] for row in np.flatnonzero(dones)]
        assert counting.rows == [4 + sum(cut)]
        kinds |= set(cut)
    assert kinds == {False, True}


# ---------------------------------------------------------------------- learning
@pytest.mark.trains
def test_their_learner_takes_legal_actions_only_and_one_forward_each() -> None:
    counting = Counting(TableDenoiser(TASK.joint, TASK))
    model, keep = learner(8, 16, envs=vector(8, denoiser=counting)), Keep()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="tensorboard.*")
        model.learn(256, callback=keep)
    assert len(keep.rollouts) == 2
    assert counting.rows == [8] * (1 + 2 * 16)
    for kept in keep.rollouts:
        assert np.take_along_axis(kept["action_mask"], kept["actions"][..., None], -1).all()
        np.testing.assert_array_equal(kept["action_masks"].reshape(kept["action_mask"].shape), kept["action_mask"])
        assert set(np.unique(kept["rewards"])) == {0.0, 1.0}
    assert any((a["log_probs"] != b["log_probs"]).any() for a, b in [keep.rollouts])


def test_their_evaluation_gives_the_tasks_reward() -> None:
    """The mean of a fixed policy's reward, through their monitor, is that of the enumeration."""
    model = learner(4, 8)
    monitored = VecMonitor(SB3VecEnv(vector(16)))
    monitored.seed(0)
    rewards, lengths = evaluate_policy(model, monitored, 400, deterministic=False, return_episode_rewards=True)
    assert lengths == [3] * 400
    expected, _ = exact_return(TASK, TableDenoiser(TASK.joint, TASK), log_policy(model), log_policy(model), 0.0)
    agrees(np.array(rewards), expected)
    assert evaluate_policy(model, monitored, 32)[0] <= 1


def test_their_monitor_counts_episodes() -> None:
    monitored, rng = VecMonitor(SB3VecEnv(vector(2))), np.random.default_rng(0)
    obs = monitored.reset()
    for k in range(1, 7):
        obs, rewards, dones, infos = monitored.step(legal(obs["action_mask"], rng))
        for row in range(2):
            assert dones[row] == (k % 3 == 0) == ("episode" in infos[row])
            if dones[row]:
                assert (infos[row]["episode"]["r"], infos[row]["episode"]["l"]) == (rewards[row], 3)


# ---------------------------------------------------------------------- regularised rewards
def log_policy(model: MaskablePPO):
    """The policy's log-probabilities of an observation, as :func:`exact_return` asks for them."""

    def of(observation: Observation) -> Categorical:
        view = shown(observation)  # with the default reference
        with torch.no_grad():
            distribution = model.policy.get_distribution(view, action_masks=observation.fillable.numpy())
        logits = distribution.distribution.logits
        return Categorical.of(logits, observation.fillable)

    return of


def sharpen(model: MaskablePPO) -> None:
    """The first policy is nearly uniform; this one has preferences of its own."""
    with torch.no_grad():
        model.policy.action_net.weight.mul_(100)


@pytest.mark.trains
def test_stored_rewards_are_those_of_the_definition() -> None:
    plain, keep = Keep(), Keep()
    learner(4, 12).learn(48, callback=plain)
    learner(4, 12, rollout_buffer_class=KLRolloutBuffer, rollout_buffer_kwargs={"beta": BETA}).learn(48, callback=keep)
    (raw,), (kept,) = plain.rollouts, keep.rollouts
    np.testing.assert_array_equal(raw["actions"], kept["actions"])  # the same seed: the same first rollout
    log_g = np.take_along_axis(kept["log_reference"], kept["actions"][..., None], -1)[..., 0]
    assert (log_g > -50).all()
    ratio = kept["log_probs"] - log_g
    np.testing.assert_allclose(kept["log_ratios"], ratio, rtol=1e-6)
    np.testing.assert_allclose(kept["rewards"], raw["rewards"] - BETA * ratio, rtol=1e-5, atol=1e-6)
    # The last step of an episode carries both the task's reward and its share of the KL.
    last = np.arange(12) % 3 == 2
    assert raw["rewards"][last].any()
    assert not raw["rewards"][~last].any()
    assert (np.abs(ratio[last]) < 1e-5).all()  # one position left: both are certain
    assert (np.abs(ratio[~last]) > 1e-3).any()


@pytest.mark.trains
def test_stored_returns_have_the_objective_as_their_mean() -> None:
    """J = E[r] - beta * KL, known exactly by enumeration."""
    options = {"rollout_buffer_class": KLRolloutBuffer, "rollout_buffer_kwargs": {"beta": BETA}}
    model, keep = learner(400, 24, **options, learning_rate=0.0), Keep()
    sharpen(model)
    g = SoftmaxConfidence()
    mean, divergence = exact_return(TASK, TableDenoiser(TASK.joint, TASK), log_policy(model), g, 0.0)
    model.learn(400 * 24, callback=keep)
    rewards = keep.rollouts[0]["rewards"].reshape(8, 3, 400).sum(1)
    agrees(rewards.ravel(), mean - BETA * divergence, at_least=BETA * divergence)
    ratios = keep.rollouts[0]["log_ratios"].reshape(8, 3, 400).sum(1)
    agrees(ratios.ravel(), divergence, at_least=divergence)


@pytest.mark.trains
def test_the_ratios_are_those_since_the_last_reset() -> None:
    model = learner(4, 6, rollout_buffer_class=KLRolloutBuffer, rollout_buffer_kwargs={"beta": BETA})
    model.learn(48)
    assert np.array(model.rollout_buffer.log_ratios).shape == (6, 4)


def test_mistakes_with_the_buffer() -> None:
    with pytest.raises(UnmaskError, match=r"beta must be at least 0, not -0\.1"):
        learner(4, 6, rollout_buffer_class=KLRolloutBuffer, rollout_buffer_kwargs={"beta": -0.1})


def test_a_deterministic_reference_is_refused_by_the_buffer() -> None:
    margin = vector(4, reference="margin")
    with pytest.raises(UnmaskError, match="infinite"):
        require_full_support(margin.streams.reference)
    options = {"rollout_buffer_class": KLRolloutBuffer, "rollout_buffer_kwargs": {"beta": BETA}}
    with pytest.raises(UnmaskError, match="infinite"):
        learner(4, 6, envs=margin, **options).learn(24)


# ---------------------------------------------------------------------- sets
@pytest.mark.trains
@pytest.mark.parametrize("actions", ["set", "set+remask"])
def test_maskable_ppo_learns_over_sets_with_rewards_less_the_divergence(actions: str) -> None:
    """Stored rewards are r - beta * (log pi(S|s) - log g(S|s)), with the Bernoulli law of the reference by hand."""
    envs = vector(8, actions=actions)
    model = learner(8, 6, envs=envs, rollout_buffer_class=KLRolloutBuffer, rollout_buffer_kwargs={"beta": BETA})
    seen = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            seen.append(self.locals["rewards"].copy())
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.model.rollout_buffer
            mask, log_b = buffer.observations["action_mask"], buffer.observations["log_reference"].astype(np.float64)
            chosen = buffer.actions.reshape(mask.shape).astype(bool)
            assert not (chosen & (mask == 0)).any()
            each = np.where(chosen, log_b, np.log1p(-np.exp(np.minimum(log_b, -1e-12))))
            log_g = np.where(mask == 1, each, 0.0).sum(-1)
            expected = np.array(seen) - BETA * (buffer.log_probs - log_g)
            np.testing.assert_allclose(buffer.rewards, expected, atol=1e-3)

    model.learn(8 * 6, callback=Watch())
    assert len(seen) == 6
