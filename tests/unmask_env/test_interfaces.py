"""The interfaces agree; the Gymnasium ones also with Gymnasium's conventions and its own vector env."""

import itertools
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import unmask_env
from tasks import Instances, UnknownNameError, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint
from tests.oracles.episodes import Counting, agrees, exact_return
from tests.toys import IDS, legal, packaged_denoiser, same, sweep
from tests.toys import observation as observation_of
from unmask_env import registration
from unmask_env.denoiser import TableDenoiser
from unmask_env.encoding import LOG_ZERO, decode
from unmask_env.gym_env import UnmaskEnv
from unmask_env.reference import Oracle, SoftmaxMargin, TopK, reference
from unmask_env.sb3_env import SB3VecEnv
from unmask_env.state import InvalidActionError
from unmask_env.torchrl_env import UnmaskTorchEnv
from unmask_env.vector_env import RegularisedReward, UnmaskVectorEnv

SUDOKU = "Unmask/Sudoku6x6-v0"
MODES = list(AutoresetMode)
CLUE = 1  # the position that every instance of the small board shows
TABLE = "Test/Table-v0"  # 4 positions, 3 symbols, correlated; position 1 is a clue


@pytest.fixture(autouse=True)
def small_board():
    task = TableTask(random_joint(3, 4, seed=7), clues=(CLUE,))
    unmask_env.register(TABLE, task, TableDenoiser(task.joint, task))
    yield
    registration._REGISTERED.pop(TABLE)
    gym.registry.pop(TABLE)


def vector(num_envs: int, mode: AutoresetMode = AutoresetMode.SAME_STEP, id: str = TABLE, **options) -> UnmaskVectorEnv:
    return gym.make_vec(id, num_envs=num_envs, autoreset_mode=mode, **options)


def single(id: str = TABLE, **options) -> UnmaskEnv:
    return gym.make(id, **options).unwrapped


def same_end(shown: dict, last: dict) -> None:
    """The last observation of a single environment, whose mask is all ones, is ``last``, which keeps the mask."""
    assert shown["action_mask"].all()
    same(shown | {"action_mask": np.asarray(last["action_mask"])}, last)


# ---------------------------------------------------------------------- conventions
@pytest.mark.parametrize("id", sweep(IDS, "Unmask/Sudoku4x4-v0".__eq__))
def test_check_env_without_a_warning(id: str) -> None:
    denoiser = packaged_denoiser(id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(id, denoiser=denoiser).unwrapped)


@pytest.mark.parametrize("actions", ["set", "set+remask"])
def test_environments_over_sets_pass_gymnasiums_checks(actions: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(TABLE, actions=actions).unwrapped)
    env = gym.make(TABLE, actions=actions)
    obs, info = env.reset(seed=0)
    env.action_space.seed(0)
    ended = False
    for _ in range(20):
        assert env.observation_space.contains(obs)
        action = env.action_space.sample(mask=info["action_mask"])
        assert not (action & ~obs["action_mask"].astype(bool)).any()
        obs, _, terminated, truncated, info = env.step(action)
        assert not info["illegal"]
        if terminated or truncated:
            ended = True
            obs, info = env.reset()
    assert ended


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"on_illegal": "terminate"}])
def test_check_env_with_options(options: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(single(**options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_illegal", ["noop", "terminate"])
def test_observations_lie_in_the_spaces_and_the_three_masks_agree(mode: AutoresetMode, on_illegal: str) -> None:
    envs, rng = vector(3, mode, on_illegal=on_illegal), np.random.default_rng(0)
    obs, info = envs.reset(seed=0)
    for _ in range(30):
        assert envs.observation_space.contains(obs)
        for row in range(3):
            assert envs.single_observation_space.contains({name: value[row] for name, value in obs.items()})
        masks = envs.action_masks()
        assert masks.dtype == bool
        assert info["action_mask"].dtype == np.int8
        np.testing.assert_array_equal(obs["action_mask"], masks)
        np.testing.assert_array_equal(info["action_mask"], masks)
        assert masks.any(1).all()
        obs, _, terminated, truncated, info = envs.step(rng.integers(4, size=3))
        if mode == AutoresetMode.DISABLED and (terminated | truncated).any():
            obs, info = envs.reset(options={"reset_mask": terminated | truncated})
        for final in info.get("final_obs", []):
            assert final is None or envs.single_observation_space.contains(final)


def test_single_masks_agree_and_top_symbols_are_the_denoisers() -> None:
    env = single()
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert env.action_masks().tolist() == [True, False, True, True]
    np.testing.assert_array_equal(obs["action_mask"], env.action_masks())
    np.testing.assert_array_equal(info["action_mask"], env.action_masks())
    assert obs["action_mask"].dtype == info["action_mask"].dtype == np.int8
    expected = env.process.denoiser(torch.from_numpy(obs["tokens"])[None]).log_probs[0]
    values, symbols = expected.sort(-1, descending=True)
    np.testing.assert_allclose(obs["top_log_probs"], values.clamp(min=-20))
    is_open = env.action_masks()
    np.testing.assert_array_equal(obs["top_symbols"][is_open], symbols.numpy()[is_open])
    assert obs["top_log_probs"][CLUE].tolist() == [0, -20, -20]  # a certain position, clipped


def test_observations_and_infos_share_no_memory() -> None:
    for env, action in ((single(), 0), (vector(2), np.array([0, 0]))):
        kept = [env.reset(seed=0)]
        for chosen in (action, action + 2, action + 3):
            obs, *_, info = env.step(chosen)
            kept.append((obs, info))
        copies = [{name: value.copy() for name, value in obs.items()} for obs, _ in kept]
        for (obs, info), other in itertools.pairwise(kept):
            for name in obs:
                assert not np.shares_memory(obs[name], other[0][name])
            assert not np.shares_memory(info["action_mask"], obs["action_mask"])
        kept[-1][0]["tokens"][:] = 0
        kept[-1][0]["action_mask"][:] = 0
        env.reset(seed=0)
        for (obs, _), copy in zip(kept[:-1], copies[:-1], strict=True):
            for name in obs:
                np.testing.assert_array_equal(obs[name], copy[name])


def test_writing_to_an_observation_does_not_change_the_state() -> None:
    env = single()
    obs, info = env.reset(seed=0)
    obs["tokens"][:], obs["action_mask"][:], info["action_mask"][:] = 0, 0, 0
    assert env.action_masks().tolist() == [True, False, True, True]
    assert env.step(0)[0]["tokens"][2] == 3


def test_answers_never_show() -> None:
    # Two instances with the same clues and different answers: everything but the reward must be the same.
    tokens = torch.tensor([[3, 0, 3, 3], [3, 0, 3, 3]])
    answers = torch.tensor([[0, 0, 0, 0], [2, 0, 1, 2]])
    seen = []
    for row in range(2):
        env = single(render_mode="rgb_array")
        obs, info = env.reset(seed=0, options={"instances": Instances(tokens[[row]], answers[[row]])})
        episode = [obs, info, env.render()]
        for position in (0, 2):
            obs, *_, info = env.step(position)
            episode += [obs, info, env.render()]
        seen.append(episode)
    np.testing.assert_equal(seen[0], seen[1])
    task = registration.lookup(TABLE).task
    many, _ = vector(64).reset(seed=0)
    holes = many["tokens"] == task.mask_id
    np.testing.assert_array_equal(holes, np.tile([True, False, True, True], (64, 1)))


# ---------------------------------------------------------------------- single and vector agree
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(
    ("id", "options", "steps"),
    sweep([(TABLE, {}, 60), (SUDOKU, {"denoiser": "sudoku6-tiny"}, 60)], lambda id, *_: id == TABLE),
)
def test_single_and_vector_agree_step_for_step(id: str, options: dict, steps: int, n: int, temperature: float) -> None:
    """Random actions, one in eight of them any position (often illegal), over several episodes."""
    options = options | {"temperature": temperature}
    envs, rng, seed = vector(n, id=id, **options), np.random.default_rng(n), 11
    alone = [single(id, **options) for _ in range(n)]
    many, infos = envs.reset(seed=seed)
    current = []
    for i, env in enumerate(alone):
        obs, info = env.reset(seed=seed + i)
        same(obs, {name: value[i] for name, value in many.items()})
        current.append(info["action_mask"])
        assert infos["nfe"][i] == info["nfe"] == 0
    finished = 0
    for _ in range(steps):
        actions = legal(np.array(current), rng)
        wild = rng.random(n) < 1 / 8
        actions[wild] = rng.integers(envs.single_action_space.n, size=n)[wild]
        many, rewards, terminated, truncated, infos = envs.step(actions)
        for i, env in enumerate(alone):
            obs, reward, ended, cut, info = env.step(int(actions[i]))
            assert (reward, ended, cut) == (rewards[i], terminated[i], truncated[i])
            assert info["illegal"] == infos["illegal"][i]
            if ended or cut:
                finished += 1
                same_end(obs, infos["final_obs"][i])
                assert info["action_mask"].all()
                assert env.action_masks().all()
                assert infos["_final_obs"][i]
                assert infos["_final_info"][i]
                metrics = env.task.metrics(env.state.tokens, env.state.instances)
                for name in [*metrics, "nfe", "illegal"]:
                    assert infos["final_info"][name][i] == info[name]
                    assert infos["final_info"][f"_{name}"][i]
                obs, info = env.reset()
            same(obs, {name: value[i] for name, value in many.items()})
            np.testing.assert_array_equal(env.action_masks(), envs.action_masks()[i])
            assert info["nfe"] == infos["nfe"][i]
            current[i] = info["action_mask"]
    assert finished >= n


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_illegal", ["noop", "terminate"])
@pytest.mark.parametrize("temperature", sweep([0.0, 1.0], bool))
def test_gymnasiums_own_vector_env_gives_the_same(mode: AutoresetMode, on_illegal: str, temperature: float) -> None:
    """Against SyncVectorEnv over the single env, in the same autoreset mode."""
    options = {"on_illegal": on_illegal, "temperature": temperature}
    envs = vector(3, mode, **options)
    theirs = gym.vector.SyncVectorEnv([lambda: gym.make(TABLE, **options)] * 3, autoreset_mode=mode)
    rng = np.random.default_rng(1)
    ours, other = envs.reset(seed=3)[0], theirs.reset(seed=3)[0]
    for _ in range(60):
        actions = rng.integers(4, size=3)
        ours, *outcome, info = envs.step(actions)
        other, *expected, their_info = theirs.step(actions)
        for a, b in zip(outcome, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        done = outcome[1] | outcome[2]
        same(ours, other)  # finished rows included: both show an all-ones mask
        np.testing.assert_array_equal(info["action_mask"], their_info["action_mask"])
        assert ("final_obs" in info) == ("final_obs" in their_info)
        if "final_obs" in info:
            np.testing.assert_array_equal(info["_final_obs"], their_info["_final_obs"])
            for row in np.flatnonzero(done):
                same_end(their_info["final_obs"][row], info["final_obs"][row])
                for name in ("reward", "nfe"):
                    assert info["final_info"][name][row] == their_info["final_info"][name][row]
        if mode == AutoresetMode.DISABLED and done.any():
            ours, other = (e.reset(options={"reset_mask": done.copy()})[0] for e in (envs, theirs))
            same(ours, other)


def test_make_vec_can_also_wrap_single_environments() -> None:
    theirs = gym.make_vec(TABLE, num_envs=2, vectorization_mode="sync")
    same(theirs.reset(seed=3)[0], vector(2).reset(seed=3)[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_episode_depends_on_its_seed_only(temperature: float) -> None:
    """Seed 42 as row 0 of 1, row 0 of 5 and row 2 of 3 (seeded 40), under different neighbours' actions."""
    episodes = []
    for n, row, seed in ((1, 0, 42), (5, 0, 42), (3, 2, 40)):
        envs, neighbours, own = vector(n, temperature=temperature), np.random.default_rng(n), np.random.default_rng(0)
        obs, _ = envs.reset(seed=seed)
        seen = [obs["tokens"][row]]
        for _ in range(80):
            actions = neighbours.integers(4, size=n)
            actions[row] = legal(obs["action_mask"][row : row + 1], own)[0]
            obs, reward, *_ = envs.step(actions)
            seen.append(np.append(obs["tokens"][row], reward[row]))
        episodes.append(seen)
    np.testing.assert_equal(episodes[1], episodes[0])
    np.testing.assert_equal(episodes[2], episodes[0])


def test_reset_with_a_seed_repeats_and_without_one_goes_on() -> None:
    for env in (single(SUDOKU, denoiser="sudoku6-tiny"), vector(2, id=SUDOKU, denoiser="sudoku6-tiny")):
        first, onward, again = env.reset(seed=9)[0], env.reset()[0], env.reset(seed=9)[0]
        np.testing.assert_array_equal(first["tokens"], again["tokens"])
        assert (first["tokens"] != onward["tokens"]).any()


def test_seeds_may_be_given_one_by_one() -> None:
    envs = vector(2, id=SUDOKU, denoiser="sudoku6-tiny")
    chosen = envs.reset(seed=[8, 5])[0]["tokens"]
    np.testing.assert_array_equal(chosen[0], envs.reset(seed=8)[0]["tokens"][0])
    np.testing.assert_array_equal(chosen[1], envs.reset(seed=5)[0]["tokens"][0])
    with pytest.raises(UnmaskError, match="2 rows need 2 seeds, not 3"):
        envs.reset(seed=[1, 2, 3])


@pytest.mark.parametrize("seed", [1.5, "1", True, -1, 2**63, [0, 1.0], [0, None], [0, "1"], {}], ids=repr)
def test_what_is_no_seed_is_refused_alike(seed) -> None:
    for env in (single(), vector(2)):
        before = env.reset(seed=3)[0]
        with pytest.raises(
            UnmaskError, match=r"^seed must be a whole number of at least 0 and below 2\*\*63|1 rows need"
        ):
            env.reset(seed=seed)
        same(env.reset(seed=3)[0], before)
    for used in (lambda: SB3VecEnv(vector(2)).seed(seed), lambda: UnmaskTorchEnv(TABLE, 2, seed=seed)):
        with pytest.raises(UnmaskError, match=r"^seed must be a whole number of at least 0 and below 2\*\*63"):
            used()


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64, np.uint64])
def test_seeds_of_numpy_are_seeds(kind: type) -> None:
    for env in (single(), vector(2)):
        same(env.reset(seed=kind(7))[0], env.reset(seed=7)[0])
    torch.testing.assert_close(*(UnmaskTorchEnv(TABLE, 2, seed=seed).reset()["tokens"] for seed in (kind(7), 7)))


def test_unknown_options_are_named() -> None:
    whole, empty = torch.tensor([[0, 0, 0, 0]]), torch.tensor([[3, 3, 3, 3]])
    for env in (single(), vector(1)):
        with pytest.raises(UnmaskError, match=r"reset takes no option instance, 1; known: index, instances"):
            env.reset(options={"instance": Instances(empty, whole), 1: 2})
        for options in (["instances"], "instances", 3):
            with pytest.raises(UnmaskError, match="options must be a dictionary with index and instances"):
                env.reset(options=options)
        for given in (empty, Instances(empty, None), Instances(empty, whole[:, :3]), Instances(empty[0], whole[0])):
            with pytest.raises(UnmaskError, match="must hold 1 instances of length 4, as tasks"):
                env.reset(options={"instances": given})
        for given in (Instances(empty.float(), whole), Instances(empty + 1, whole), Instances(empty, whole - 1)):
            with pytest.raises(UnmaskError, match="must hold int64 tokens from 0 to 3, which is a mask"):
                env.reset(options={"instances": given})
    with pytest.raises(UnmaskError, match="reset takes no option reset_mask; known: index, instances"):
        single().reset(options={"reset_mask": np.array([True])})


def test_unseeded_first_reset_plays() -> None:
    for env in (single(), vector(2)):
        assert env.observation_space.contains(env.reset()[0])


# ---------------------------------------------------------------------- four interfaces, one environment
PLAYED = [
    (TABLE, 0.0, 50, {}),
    (TABLE, 1.0, 50, {}),
    *((id, 0.0, 6 if "9x9" in id or "FreeText" in id else 40, {}) for id in IDS),
    (TABLE, 1.0, 50, {"actions": "set"}),
    (TABLE, 1.0, 50, {"actions": "set+remask", "remask_budget": 3}),
    (SUDOKU, 0.0, 40, {"actions": "set", "block_length": 9, "nfe_budget": 18}),
    (SUDOKU, 0.0, 40, {"actions": "set+remask", "remask_budget": 5, "nfe_budget": 18}),
]


@pytest.mark.parametrize("on_illegal", sweep(["noop", "terminate"], "terminate".__eq__))
@pytest.mark.parametrize(("id", "temperature", "steps", "rules"), sweep(PLAYED, lambda id, *_: id == TABLE))
def test_four_interfaces_agree(id: str, temperature: float, steps: int, rules: dict, on_illegal: str) -> None:
    """The same seeds and actions: legal ones, and now and then any. Where there is time, the last row insists on a
    closed position until it is truncated."""
    n, seed, rng = 3, 11, np.random.default_rng(5)
    denoiser = "sudoku6-tiny" if id == SUDOKU else packaged_denoiser(id)
    options = {"denoiser": denoiser, "temperature": temperature, "on_illegal": on_illegal} | rules
    alone = [single(id, **options) for _ in range(n)]
    envs = vector(n, id=id, **options)
    stable = SB3VecEnv(vector(n, id=id, **options))
    rl = UnmaskTorchEnv(id, n, seed=seed, **options)

    stable.seed(seed)
    current = [env.reset(seed=seed + i)[0] for i, env in enumerate(alone)]
    many, theirs, td = envs.reset(seed=seed)[0], stable.reset(), rl.reset()
    insist = on_illegal == "noop" and steps >= rules.get("nfe_budget", 2 * envs.task.length)
    ended = cut = illegal = 0
    for _ in range(steps):
        for i in range(n):
            for other in (many, theirs, td):
                same(current[i], {name: np.asarray(other[name][i]) for name in current[i]})
        masks = np.array([env.action_masks() for env in alone])
        np.testing.assert_array_equal(envs.action_masks(), masks)
        np.testing.assert_array_equal(stable.env_method("action_masks"), masks)
        if rules:
            assert masks[:, ::2].all()  # any entry may be out
            masks = masks[:, 1::2]
        np.testing.assert_array_equal(td["action_mask"], masks)

        wild = rng.random(n) < 1 / 10
        if rules:
            actions = (rng.random(masks.shape) < 0.4) & (masks | wild[:, None])
            actions[-1] |= insist & (np.arange(masks.shape[1]) == masks[-1].argmin())
            actions = actions.astype(np.int8)
        else:
            actions = legal(masks, rng)
            actions[wild] = rng.integers(masks.shape[1], size=n)[wild]
            if insist:
                actions[-1] = masks[-1].argmin()

        many, rewards, terminated, truncated, infos = envs.step(actions)
        theirs, their_rewards, dones, their_infos = stable.step(actions)
        td["action"] = torch.from_numpy(actions).bool() if rules else torch.from_numpy(actions)
        taken, td = rl.step_and_maybe_reset(td)
        after = taken["next"]
        for i, env in enumerate(alone):
            obs, reward, end, stop, info = env.step(actions[i])
            assert (reward, end, stop) == (rewards[i], terminated[i], truncated[i])
            assert (reward, end or stop) == (their_rewards[i], dones[i])
            assert (reward, end, stop) == tuple(after[key][i].item() for key in ("reward", "terminated", "truncated"))
            assert bool(after["done"][i]) == (end or stop)
            last = {name: after[name][i].numpy() for name in obs}
            illegal += info["illegal"]
            if end or stop:
                ended, cut = ended + end, cut + stop
                for other in (infos["final_obs"][i], their_infos[i]["terminal_observation"], last):
                    same_end(obs, other)
                assert their_infos[i]["TimeLimit.truncated"] == stop
                for name in [*env.task.metrics(env.state.tokens, env.state.instances), "nfe"]:
                    assert info[name] == infos["final_info"][name][i] == their_infos[i][name]
                obs, _ = env.reset()
            else:
                same(obs, last)
                assert their_infos[i] == {}
            current[i] = obs
    if "FreeText" not in id:  # where nearly every position is open, a random one is hardly ever closed
        assert illegal
    if steps > 6:
        assert ended >= 2
    assert bool(cut) == insist


# ---------------------------------------------------------------------- autoreset
def finish(envs: UnmaskVectorEnv, row: int = 0) -> tuple:
    """Play until ``row`` alone is complete: the others repeat an illegal no-op. Returns the last step."""
    actions = np.full(envs.num_envs, CLUE)
    for position in (0, 2, 3):
        actions[row] = position
        result = envs.step(actions)
    return result


def test_same_step_hands_out_the_finished_board_and_its_metrics() -> None:
    envs = vector(3)
    envs.reset(seed=0)
    obs, reward, terminated, truncated, info = finish(envs, row=1)
    assert terminated.tolist() == [False, True, False]
    assert not truncated.any()
    assert obs["tokens"][1, [0, 2, 3]].tolist() == [3, 3, 3]  # a new episode
    assert info["nfe"].tolist() == [3, 0, 3]
    assert info["_final_obs"].tolist() == info["_final_info"].tolist() == [False, True, False]
    final = info["final_obs"][1]
    assert (final["tokens"] < 3).all()
    assert not final["action_mask"].any()
    assert not final["top_symbols"].any()
    assert not final["top_log_probs"].any()
    assert info["final_obs"][0] is None
    assert info["final_info"]["reward"][1] == reward[1]
    assert info["final_info"]["_reward"].tolist() == [False, True, False]
    assert info["final_info"]["nfe"][1] == 3


def test_next_step_shows_the_finished_board_then_ignores_the_action() -> None:
    envs = vector(3, AutoresetMode.NEXT_STEP, on_illegal="raise", temperature=1.0)
    first, _ = envs.reset(seed=0)
    for position in (0, 2):
        envs.step(np.array([position, position, position]))
    shown, reward, terminated, _, info = envs.step(np.array([3, 3, 3]))
    assert terminated.all()
    assert (shown["tokens"] < 3).all()
    assert (shown["tokens"][:, CLUE] == first["tokens"][:, CLUE]).all()
    assert (shown["action_mask"] == 1).all()
    assert envs.action_masks().all()
    assert not shown["top_log_probs"].any()
    assert "final_obs" not in info
    assert info["_reward"].all()
    np.testing.assert_array_equal(info["reward"], reward)
    # Row actions are ignored now, even illegal or nonsensical ones under on_illegal="raise".
    begun, reward, terminated, truncated, info = envs.step(np.array([CLUE, 0, 99]))
    assert (begun["tokens"][:, [0, 2, 3]] == 3).all()
    assert (begun["tokens"][:, CLUE] < 3).all()
    for quiet in (reward, terminated, truncated, info["illegal"]):
        assert not quiet.any()
    assert info["nfe"].tolist() == [0, 0, 0]
    assert begun["action_mask"].tolist() == [[1, 0, 1, 1]] * 3


def test_next_step_restarts_a_truncated_row_too() -> None:
    envs = vector(2, AutoresetMode.NEXT_STEP)
    first = envs.reset(seed=0)[0]
    for _ in range(8):
        obs, _, _, truncated, _ = envs.step(np.array([CLUE, CLUE]))
    assert truncated.all()
    np.testing.assert_array_equal(obs["tokens"], first["tokens"])
    assert (obs["action_mask"] == 1).all()
    assert (obs["top_log_probs"] < 0).any()  # a truncated board still has its denoiser's word
    obs, reward, terminated, truncated, info = envs.step(np.array([0, 0]))
    assert not (terminated | truncated).any()
    assert not reward.any()
    assert info["nfe"].tolist() == [0, 0]
    assert obs["action_mask"].tolist() == [[1, 0, 1, 1]] * 2


def test_disabled_raises_on_finished_rows_and_resets_only_the_masked() -> None:
    envs = vector(3, AutoresetMode.DISABLED)
    envs.reset(seed=0)
    before, _, terminated, _, info = finish(envs, row=2)
    assert terminated.tolist() == [False, False, True]
    assert info["_reward"].tolist() == [False, False, True]
    assert (before["action_mask"][2] == 1).all()
    with pytest.raises(UnmaskError, match=r"rows \[2\] are finished; reset them"):
        envs.step(np.zeros(3, dtype=int))
    after, info = envs.reset(options={"reset_mask": np.array([False, False, True])})
    for name in after:
        np.testing.assert_array_equal(after[name][:2], before[name][:2])
    assert after["tokens"][2].tolist().count(3) == 3
    assert info["nfe"].tolist() == [3, 3, 0]
    envs.step(np.zeros(3, dtype=int))


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_a_reset_leaves_the_flags_of_the_step_before_alone(mode: AutoresetMode) -> None:
    envs = vector(2, mode)
    envs.reset(seed=0)
    *_, terminated, _, _ = finish(envs)
    assert terminated.tolist() == [True, False]
    envs.reset()
    assert terminated.tolist() == [True, False]


def test_the_terminated_flags_may_be_the_reset_mask() -> None:
    """Rows that begin anew are filled as their new boards say, not as the boards before them did."""
    envs, rng = vector(8, AutoresetMode.DISABLED), np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)
    for _ in range(30):
        before, actions, rows = obs, legal(obs["action_mask"], rng), np.arange(8)
        idle = rng.random(8) < 0.2  # so that the rows do not all end together
        obs, _, terminated, _, _ = envs.step(np.where(idle, CLUE, actions))
        rows, actions = rows[~idle], actions[~idle]
        np.testing.assert_array_equal(obs["tokens"][rows, actions], before["top_symbols"][rows, actions, 0])
        if terminated.any():
            obs, _ = envs.reset(options={"reset_mask": terminated})


@pytest.mark.parametrize("mask", [[True, False], np.array([1, 0]), np.array([True]), np.array([False, False])])
def test_malformed_reset_masks_are_refused(mask) -> None:
    envs = vector(2, AutoresetMode.DISABLED)
    envs.reset(seed=0)
    with pytest.raises(UnmaskError, match=r"reset_mask.*bool array of shape \(2,\) with a True"):
        envs.reset(options={"reset_mask": mask})


@pytest.mark.parametrize("mode", MODES)
def test_one_denoiser_call_per_vector_step(mode: AutoresetMode) -> None:
    """Finished rows of every kind (complete, truncated, mixed) included."""
    envs, rng = vector(4, mode), np.random.default_rng(0)
    denoiser = envs.process.denoiser
    envs.reset(seed=0)
    ends, cuts = 0, 0
    for k in range(60):
        before = denoiser.calls
        # Rows 0 and 1 play legally; rows 2 and 3 insist on the clue and are truncated.
        actions = np.append(legal(envs.action_masks()[:2], rng), [CLUE, CLUE])
        _, _, terminated, truncated, _ = envs.step(actions)
        assert denoiser.calls == before + 1, f"step {k}"
        ends, cuts = ends + terminated.sum(), cuts + truncated.sum()
        if mode == AutoresetMode.DISABLED and (terminated | truncated).any():
            before = denoiser.calls
            envs.reset(options={"reset_mask": terminated | truncated})
            assert denoiser.calls == before + 1
    assert ends > 10
    assert cuts > 4


def test_at_most_one_denoiser_call_per_single_step() -> None:
    env = single()
    denoiser = env.process.denoiser
    before = denoiser.calls
    env.reset(seed=0)
    env.step(0)
    env.step(2)
    assert denoiser.calls == before + 3
    env.step(3)  # complete: there is nothing left to ask
    assert denoiser.calls == before + 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("limit", [None, 2])
def test_last_observations_in_the_same_step_are_the_finished_boards(temperature: float, limit: int | None) -> None:
    """Beside the next board, and with features where a learner still needs the value: on truncated ones."""
    envs, rng = vector(4, temperature=temperature, max_episode_steps=limit), np.random.default_rng(0)
    before, _ = envs.reset(seed=0)
    ends = 0
    for k in range(24):
        actions = legal(before["action_mask"], rng)
        after, _, terminated, truncated, info = envs.step(actions)
        assert (terminated.any(), truncated.any()) == (
            (limit is None) and k % 3 == 2,
            (limit is not None) and k % 2 == 1,
        )
        for row in np.flatnonzero(terminated | truncated):
            ends += 1
            last = info["final_obs"][row]
            rest = np.arange(4) != actions[row]
            np.testing.assert_array_equal(last["tokens"][rest], before["tokens"][row][rest])
            assert last["tokens"][actions[row]] < 3
            if temperature == 0:
                assert last["tokens"][actions[row]] == before["top_symbols"][row, actions[row], 0]
            assert last["action_mask"].sum() == (last["tokens"] == 3).sum() == (0 if limit is None else 1)
            if limit is None:
                assert not last["top_log_probs"].any()
                assert (last["log_reference"] == LOG_ZERO).all()
            else:
                left = np.flatnonzero(last["action_mask"])
                assert (last["top_log_probs"][left] < 0).any()
                np.testing.assert_allclose(last["log_reference"][left], 0, atol=1e-6)  # the only choice
            assert after["tokens"][row].tolist().count(3) == 3
        before = after
    assert ends == (32 if limit is None else 48)


@pytest.mark.parametrize(
    "mode",
    [
        *MODES,
    ],
)
def test_a_board_ended_by_an_illegal_action_is_blank_in_every_mode(mode: AutoresetMode) -> None:
    """As the single face shows it: the denoiser was not asked, so neither was the reference."""
    env, envs = single(on_illegal="terminate"), vector(1, mode, on_illegal="terminate")
    env.reset(seed=0)
    envs.reset(seed=0)
    expected = env.step(CLUE)[0]
    shown, *_, info = envs.step(np.array([CLUE]))
    last = (
        info["final_obs"][0] if mode == AutoresetMode.SAME_STEP else {name: value[0] for name, value in shown.items()}
    )
    for name in ("tokens", "top_symbols", "top_log_probs", "log_reference"):
        np.testing.assert_array_equal(last[name], expected[name], err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_the_forward_holds_each_board_once(mode: AutoresetMode) -> None:
    """In the same step a truncated board rides beside the one that follows it; complete boards do not."""
    counting = Counting(registration.lookup(TABLE).denoiser)
    envs, rng = vector(4, mode, denoiser=counting), np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)
    kinds = set()
    for k in range(60):
        counting.rows.clear()
        actions = np.append(legal(obs["action_mask"][:3], rng), CLUE)
        obs, _, terminated, truncated, _ = envs.step(actions)
        riding = int(truncated.sum()) if mode == AutoresetMode.SAME_STEP else 0
        assert counting.rows == [4 + riding], f"step {k}"
        kinds.add((bool(terminated.any()), bool(truncated.any())))
        if mode == AutoresetMode.DISABLED and (terminated | truncated).any():
            obs, _ = envs.reset(options={"reset_mask": terminated | truncated})
            assert counting.rows[1:] == [4]
    assert {(True, False), (False, True)} <= kinds


def test_one_forward_of_one_board_per_single_step() -> None:
    counting = Counting(registration.lookup(TABLE).denoiser)
    env = single(denoiser=counting)
    for plays in ([0, 2, 3], [CLUE] * 8):
        env.reset(seed=0)
        counting.rows.clear()
        for action in plays:
            *_, terminated, truncated, _ = env.step(action)
        assert terminated or truncated
        # A complete board has nothing left to ask; a truncated one still has a value.
        assert counting.rows == [1] * (len(plays) - terminated)


# ---------------------------------------------------------------------- episode ends
def test_illegal_noops_truncate_after_two_lengths_with_features_in_the_final_observation() -> None:
    env, envs = single(), vector(2)
    start, _ = env.reset(seed=0)
    envs.reset(seed=0)
    for k in range(1, 9):
        obs, reward, terminated, truncated, info = env.step(CLUE)
        _, rewards, _, cut, infos = envs.step(np.array([CLUE, CLUE]))
        assert (reward, terminated, truncated) == (0.0, False, k == 8)
        assert cut.tolist() == [k == 8] * 2
        assert not rewards.any()
        assert info["illegal"] is True
        assert infos["illegal"].all()
    same_end(obs, start)
    for row in range(2):
        final = infos["final_obs"][row]
        assert final["action_mask"].tolist() == [1, 0, 1, 1]
        assert (final["top_log_probs"][0] < 0).any()
    same(infos["final_obs"][0], start)
    assert info["nfe"] == 8
    assert info["reward"] == 0.0
    assert infos["final_info"]["reward"].tolist() == [0, 0]


class Endless:
    """A sequence as Python once had them, which never ends: numpy would read it until the memory is full."""

    def __getitem__(self, index: int) -> int:
        return 0


@pytest.mark.parametrize(
    "odd", [Endless(), object(), {0: 1}, iter([0]), torch.ones((), requires_grad=True), np.ma.masked, 2**64]
)
def test_what_numpy_would_stumble_over_is_no_action(odd) -> None:
    env, envs = single(), vector(2)
    for made in (env, envs):
        made.reset(seed=0)
    for call in (lambda: env.step(odd), lambda: envs.step(odd), lambda: envs.step([odd, odd])):
        with pytest.raises(InvalidActionError):
            call()


def test_illegal_actions_terminate_or_raise_as_told() -> None:
    env = single(on_illegal="terminate")
    env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step(CLUE)
    assert (reward, terminated, truncated, info["illegal"]) == (0.0, True, False, True)
    assert obs["tokens"].tolist().count(3) == 3
    for env, action in ((single(on_illegal="raise"), CLUE), (vector(2, on_illegal="raise"), np.array([0, CLUE]))):
        env.reset(seed=0)
        with pytest.raises(InvalidActionError, match=r"may not be filled now; those that may are \[0, 2, 3\]"):
            env.step(action)


def test_given_instances_are_played() -> None:
    given = Instances(torch.tensor([[3, 0, 3, 2], [1, 3, 3, 3]]), torch.tensor([[1, 0, 1, 2], [1, 2, 0, 0]]))
    obs, _ = vector(2).reset(seed=0, options={"instances": given})
    assert obs["tokens"].tolist() == given.tokens.tolist()
    env = single()
    obs, _ = env.reset(options={"instances": given[:1]})
    assert obs["action_mask"].tolist() == [1, 0, 1, 0]
    with pytest.raises(UnmaskError, match="must hold 1 instances of length 4"):
        env.reset(options={"instances": given})


def test_an_instance_without_a_hole_is_refused() -> None:
    """Otherwise its episode would never end: there is no position to fill, so no last one either."""
    whole = torch.tensor([[0, 0, 0, 0]])
    for env in (single(), vector(1)):
        with pytest.raises(UnmaskError, match="at least one mask"):
            env.reset(seed=0, options={"instances": Instances(whole, whole)})


def test_greedy_solves_a_sudoku_and_is_rewarded_once() -> None:
    """sudoku6-tiny by max-confidence: nearly every puzzle is solved, and the reward comes with the last cell."""
    envs = vector(16, id=SUDOKU, denoiser="sudoku6-tiny")
    obs, _ = envs.reset(seed=0)
    solved = np.full(16, np.nan)
    for _ in range(36):
        confidence = np.where(obs["action_mask"] == 1, obs["top_log_probs"][..., 0], -np.inf)
        obs, reward, terminated, _, info = envs.step(confidence.argmax(1))
        assert not reward[~terminated].any()
        for row in np.flatnonzero(terminated & np.isnan(solved)):
            solved[row] = reward[row]
            assert info["final_info"]["solved"][row] == info["final_info"]["valid"][row] == reward[row]
    assert np.nanmean(solved) >= 0.8
    assert not np.isnan(solved).any()


# ---------------------------------------------------------------------- references
@pytest.mark.parametrize("name", ["margin", "softmax_margin", "left_to_right", "top_k"])
def test_the_reference_may_be_chosen_by_name(name: str) -> None:
    order, task = reference(name), registration.lookup(TABLE).task
    denoiser, rng = TableDenoiser(task.joint, task), np.random.default_rng(0)
    for env in (gym.make(TABLE, reference=name).unwrapped, gym.make(TABLE, reference=order).unwrapped):
        obs, info = env.reset(seed=0)
        for _ in range(2):
            tokens, is_open = torch.from_numpy(obs["tokens"])[None], torch.from_numpy(env.action_masks())[None]
            expected = order(observation_of(tokens, is_open, denoiser(tokens))).log_probs[0].clamp(min=LOG_ZERO)
            np.testing.assert_allclose(obs["log_reference"], expected, atol=1e-5)
            np.testing.assert_array_equal(info["log_reference"], obs["log_reference"])
            obs, *_, info = env.step(legal(obs["action_mask"][None], rng)[0])


# ---------------------------------------------------------------------- regularised rewards
BETA = 0.3


def sampled(log_prob: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One position per row of (N, L) log-probabilities, and its log-probability."""
    actions = (log_prob + rng.gumbel(size=log_prob.shape)).argmax(1)
    return actions, np.take_along_axis(log_prob, actions[:, None], 1)[:, 0]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_regularised_rewards_are_those_of_the_definition(mode: AutoresetMode) -> None:
    envs, plain, rng = RegularisedReward(vector(3, mode), BETA), vector(3, mode), np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)
    plain.reset(seed=0)
    ends = 0
    for _ in range(30):
        uniform = np.where(obs["action_mask"], -np.log(obs["action_mask"].sum(1, keepdims=True)), -np.inf)
        actions, log_prob = sampled(uniform, rng)
        log_g = obs["log_reference"][np.arange(3), actions]
        obs, reward, terminated, _, info = envs.step(actions, log_prob)
        raw = plain.step(actions)[1]
        np.testing.assert_allclose(reward, raw - BETA * (log_prob - log_g), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(info["task_reward"], raw)
        ends += raw[terminated].sum()
        if mode == AutoresetMode.DISABLED and terminated.any():
            options = {"reset_mask": terminated.copy()}
            obs, _ = envs.reset(options=options)
            plain.reset(options=options)
    assert ends > 0  # the last step carries both the task's reward and its share of the KL


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_regularised_returns_have_the_objective_as_their_mean(temperature: float) -> None:
    """J = E[r] - beta * KL, known exactly by enumeration."""
    n, rng = 500, np.random.default_rng(1)
    envs = RegularisedReward(vector(n, temperature=temperature), BETA)
    unwrapped, policy = envs.unwrapped, SoftmaxMargin(0.5)
    mean, divergence = exact_return(
        unwrapped.task, unwrapped.process.denoiser, policy, unwrapped.streams.reference, temperature
    )
    assert 0.05 < mean < 0.95
    obs, _ = envs.reset(seed=0)
    returns = []
    for _ in range(8):
        total = np.zeros(n)
        for _ in range(3):
            seen = decode({key: torch.from_numpy(value) for key, value in obs.items()}, 3)
            actions, log_prob = sampled(policy(seen).log_probs.numpy(), rng)
            obs, reward, terminated, _, _ = envs.step(actions, log_prob)
            total += reward
        assert terminated.all()
        returns.append(total)
    agrees(np.concatenate(returns), mean - BETA * divergence, at_least=BETA * divergence)


def test_mistakes_with_regularised_rewards() -> None:
    with pytest.raises(UnmaskError, match="KL to the deterministic reference margin is infinite"):
        RegularisedReward(vector(2, reference="margin"), BETA)
    with pytest.raises(UnmaskError, match="beta must be at least 0, not -1"):
        RegularisedReward(vector(2), -1.0)
    for beta in (float("inf"), 1e308, float("nan"), "x", None, True):
        with pytest.raises(UnmaskError, match="beta must be a number of at"):
            RegularisedReward(vector(2), beta)
    early = RegularisedReward(vector(2), BETA)
    with pytest.raises(UnmaskError, match=r"call reset\(\) before step"):
        early.step(np.zeros(2, dtype=np.int64), np.zeros(2))
    with pytest.raises(UnmaskError, match="SAME_STEP or DISABLED, not NEXT_STEP"):
        RegularisedReward(vector(2, AutoresetMode.NEXT_STEP), BETA)


def test_regularised_rewards_need_actions_and_a_log_probability_per_row() -> None:
    envs = RegularisedReward(vector(2), BETA)
    envs.reset(seed=0)
    with pytest.raises(InvalidActionError, match="actions must be 2 integers, not float64"):
        envs.step(np.zeros(2), np.zeros(2))
    with pytest.raises(UnmaskError, match=r"log_prob must be of shape \(2,\), not \(2, 1\)"):
        envs.step(np.zeros(2, int), np.zeros((2, 1)))
    for wrong in (np.nan, -np.inf, np.inf, 1.0):
        with pytest.raises(UnmaskError, match="log_prob must be finite and at most 0"):
            envs.step(np.zeros(2, int), np.array([-1.0, wrong]))
    trained = torch.full((2,), -1.0, requires_grad=True)  # as it comes out of a training loop
    legal = envs.reset(seed=0)[0]["action_mask"].argmax(1)
    again = RegularisedReward(vector(2), BETA)
    again.reset(seed=0)
    rewards = [run.step(legal, given)[1] for run, given in ((envs, trained), (again, np.full(2, -1.0)))]
    np.testing.assert_array_equal(*rewards)


def test_an_action_that_the_reference_excludes_is_refused() -> None:
    envs = RegularisedReward(vector(2, reference=TopK(1)), BETA)
    obs, _ = envs.reset(seed=0)
    best = obs["log_reference"].argmax(1)
    obs, *_ = envs.step(best, np.zeros(2))
    excluded = (obs["action_mask"] - (obs["log_reference"] == 0)).argmax(1)
    with pytest.raises(UnmaskError, match="infinite"):
        envs.step(excluded, np.zeros(2))


# ---------------------------------------------------------------------- rendering through the interfaces
def test_render_modes() -> None:
    env = single(SUDOKU, denoiser="sudoku6-tiny", render_mode="ansi")
    obs, _ = env.reset(seed=0)
    assert env.render() == env.task.draw(torch.from_numpy(obs["tokens"]))
    envs = vector(2, id=SUDOKU, denoiser="sudoku6-tiny", render_mode="rgb_array")
    envs.reset(seed=0)
    frames = envs.render()
    assert len(frames) == 2
    assert all(f.dtype == np.uint8 and f.ndim == 3 and f.shape[2] == 3 for f in frames)
    assert (frames[0] != frames[1]).any()
    assert vector(1).render() is None


# ---------------------------------------------------------------------- a user's mistakes
SMALL = {"task": "sudoku6", "denoiser": "sudoku6-tiny"}
BOTH = pytest.mark.parametrize("interface", [UnmaskEnv, UnmaskVectorEnv])


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SMALL | {"reference": "oracle"}, "the oracle sees the answers, which an observation never shows"),
        (
            SMALL | {"reference": "oracle_sets", "actions": "set"},
            "the oracle sees the answers, which an observation never shows",
        ),
        (SMALL | {"reference": Oracle()}, "the oracle sees the answers, which an observation never shows"),
        ({"task": "sudoku6"}, "needs a denoiser; give one"),
        ({"denoiser": "sudoku6-tiny"}, "needs a task; give one"),
        (SMALL | {"render_mode": "human"}, r"render_mode must be one of \['ansi', 'rgb_array'\], not 'human'"),
        (SMALL | {"on_illegal": "ignore"}, "on_illegal must be noop or terminate or raise, not 'ignore'"),
        (SMALL | {"temperature": -1.0}, "temperature must be a number of at least 0, not -1.0"),
        ({"task": "sudoku4", "denoiser": "sudoku6-tiny"}, "4 symbols and 16 positions; .* 6 symbols and 36 positions"),
        ({"task": "sudoku6", "denoiser": "sudoku7"}, "unknown denoiser 'sudoku7'"),
    ],
)
def test_mistakes_give_one_clear_line(interface, options: dict, message: str) -> None:
    with pytest.raises(UnmaskError, match=message) as error:
        interface(**options)
    assert "\n" not in str(error.value)


ALL = pytest.mark.parametrize("interface", [UnmaskEnv, UnmaskVectorEnv, UnmaskTorchEnv])


@ALL
@pytest.mark.parametrize(
    "device", ["cuda:9", "gpu", "meta", "mps", "", 0, None, 1.5, torch.device("cuda", 9)], ids=repr
)
def test_devices_that_are_not_there_are_refused_alike(interface, device) -> None:
    with pytest.raises(UnmaskError, match=r"unknown device .*; use cpu, cuda or cuda:N|CUDA devices, so no cuda:9"):
        interface(**SMALL, device=device)


@ALL
def test_unknown_keywords_are_refused_in_pythons_words(interface) -> None:
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'frameskip'"):
        interface(**SMALL, frameskip=4)


@BOTH
def test_unknown_references_list_the_known_ones(interface) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown reference policy 'margins'; did you mean margin.* known: .*margin"
    ):
        interface(**SMALL, reference="margins")


@BOTH
def test_unknown_tasks_list_the_known_ones(interface) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown task 'sudoku5'; did you mean .* known: .*sudoku6"):
        interface(task="sudoku5", denoiser="sudoku6-tiny")


@BOTH
def test_a_ready_made_denoiser_of_the_wrong_size_is_refused_too(interface) -> None:
    with pytest.raises(UnmaskError, match=r"4 symbols and 16 positions; .* 3 symbols and 4 positions"):
        interface(task="sudoku4", denoiser=TableDenoiser(random_joint(3, 4, seed=0)))


def test_mistakes_of_the_vector_interface() -> None:
    with pytest.raises(UnmaskError, match="num_envs must be a whole number of at least 1, not 0"):
        UnmaskVectorEnv(0, **SMALL)
    with pytest.raises(UnmaskError, match="autoreset_mode must be SAME_STEP, NEXT_STEP or DISABLED, not 'sometimes'"):
        UnmaskVectorEnv(1, **SMALL, autoreset_mode="sometimes")
    for num_envs in (1.5, "2", True, None):
        with pytest.raises(UnmaskError, match="num_envs must be a whole number of at least 1, not"):
            UnmaskVectorEnv(num_envs, **SMALL)
    with pytest.raises(UnmaskError, match="a reference is a name or a Policy, not int"):
        UnmaskVectorEnv(1, **SMALL, reference=5)
    for mode in MODES:
        assert vector(1, mode.name).autoreset_mode == vector(1, mode.value).metadata["autoreset_mode"] == mode


def test_step_before_reset_says_so() -> None:
    for env, action, error in ((single(), 0, ResetNeeded), (vector(2), np.array([0, 0]), UnmaskError)):
        with pytest.raises(error, match=r"call reset\(\)"):
            env.step(action)
