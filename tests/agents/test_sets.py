"""Policies over sets: laws by enumeration, starting points, gradients, and that every learner trains them."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import tasks
from agents import imitation, upo
from agents.imitation import ImitationConfig, States
from agents.learner import PolicyShape, SB3PPOConfig, TorchRLGRPOConfig, TorchRLPPOConfig, make_reference
from agents.policy import ONCE, WARY, OrderPolicy, load_policy, new_policy
from agents.upo import UPOConfig
from pretrain.checkpoint import CheckpointError, save_model
from tasks import Instances, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint
from unmask_env import core, parallel, set_laws
from unmask_env.core import Denoised, Observation, Rules
from unmask_env.denoiser import TableDenoiser, load_denoiser
from unmask_env.reference import Oracle

L, V = 3, 3
SET, REMASK = Rules("set", nfe_budget=8), Rules("set+remask", nfe_budget=8)


def policy_of(law: str, base: str = "none", jiggle: bool = True) -> OrderPolicy:
    torch.manual_seed(0)
    policy = OrderPolicy(V, [[i] for i in range(L)], base=base, dim=8, layers=1, heads=2, sure=2.0, sets=law)
    if jiggle:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape))
    return policy.eval()


def observation(n: int = 5, remask: bool = False) -> Observation:
    g = torch.Generator().manual_seed(1)
    is_open = torch.rand(n, L, generator=g) < 0.6
    is_open[0] = True
    tokens = torch.randint(V, (n, L), generator=g).masked_fill(is_open, V)
    log_probs = torch.randn(n, L, V, generator=g).log_softmax(-1)
    if not remask:
        return Observation(tokens, is_open, Denoised(log_probs))
    return Observation(tokens, is_open, Denoised(log_probs), ~is_open, torch.randint(3, (n, L), generator=g))


def every_set(entries: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=entries)))


@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize("law", ["bernoulli", "plackett_luce"])
@torch.no_grad()
def test_probabilities_of_all_sets_sum_to_one(law: str, remask: bool) -> None:
    policy, seen = policy_of(law), observation(remask=remask)
    sets = every_set(seen.choices.shape[1])
    each = torch.stack([policy.log_prob_of(seen, s.expand(len(seen.tokens), -1)) for s in sets])
    torch.testing.assert_close(each.logsumexp(0), torch.zeros(len(seen.tokens)), atol=2e-4, rtol=0)


@torch.no_grad()
def test_a_policy_tells_what_was_given_from_what_play_filled_in() -> None:
    policy, seen = policy_of("bernoulli"), observation(remask=True)
    nothing = dataclasses.replace(seen, reopenable=torch.zeros_like(seen.open))
    rows = seen.reopenable.any(1)
    assert rows.any()
    filled, given = (policy.log_odds(o)[rows, :L] for o in (seen, nothing))
    assert (filled - given).abs().amax(1).min() > 1e-4
    plain = dataclasses.replace(seen, reopenable=None, reopened=None)
    nothing = dataclasses.replace(nothing, reopened=torch.zeros_like(seen.tokens))
    assert torch.equal(policy.log_odds(plain), policy.log_odds(nothing)[:, :L]), "as where nothing may be opened again"


@torch.no_grad()
def test_a_policy_remembers_what_it_opened_again_up_to_three_times() -> None:
    policy, seen = policy_of("bernoulli"), observation(remask=True)

    def odds(times: int) -> torch.Tensor:
        counts = torch.zeros_like(seen.tokens)
        counts[:, 2] = times
        return policy.log_odds(dataclasses.replace(seen, reopened=counts))

    assert (odds(1) - odds(0)).abs().min() > 1e-6, "the whole board is read with it"
    assert torch.equal(odds(3), odds(4))
    assert not torch.equal(odds(2), odds(3))
    policy.recall.zero_()
    before = odds(0)
    policy.wary.fill_(2.0)
    expected = torch.zeros_like(before)
    expected[:, 2] = 2.0 * 3
    torch.testing.assert_close(odds(0) - odds(3), expected, msg="by hand: the odds of closing it fall by so much each")


@torch.no_grad()
def test_a_doubter_says_what_to_open_again_and_leaves_closing_alone(tmp_path) -> None:
    policy, seen = policy_of("bernoulli"), observation(remask=True)
    fresh = dataclasses.replace(seen, reopened=torch.zeros_like(seen.tokens))
    plain = policy.log_odds(dataclasses.replace(seen, reopenable=None, reopened=None))
    policy.begin_doubting()
    assert policy.wary == WARY, "whatever it was"
    before = policy.log_odds(fresh)
    assert torch.equal(before[:, :L], plain)
    for parameter in policy.doubter.parameters():
        parameter.add_(0.5)
    after = policy.log_odds(fresh)
    assert torch.equal(after[:, :L], plain)
    assert (after[:, L:] - before[:, L:]).abs().min() > 1e-3
    # What was opened again once is neither closed nor opened once more as easily: by hand.
    policy.doubter.recall.zero_()
    twice = fresh.tokens.new_full(fresh.tokens.shape, 2)
    expected = policy.log_odds(fresh) - 2 * torch.tensor([float(policy.wary)] * L + [ONCE] * L)
    torch.testing.assert_close(policy.log_odds(dataclasses.replace(fresh, reopened=twice)), expected)
    save_model(policy, tmp_path)
    loaded = load_policy(tmp_path, actions="set+remask")
    assert torch.equal(loaded.log_odds(seen), policy.log_odds(seen))
    assert loaded.doubter.doubter is None
    own = loaded.doubter
    assert own.readings == 2 * loaded.readings, "nothing but its own time is at stake"
    loaded.begin_doubting()
    assert loaded.doubter is own, "it has one already"


def test_from_a_policy_only_the_doubter_is_trained(tmp_path) -> None:
    task, denoiser = board()
    small = ImitationConfig(
        out=str(tmp_path / "first"), rules=SET, puzzles=50, steps=5, batch=8, shape=PolicyShape(copy=False, dim=16)
    )
    imitation.train(small, task, denoiser)
    again = dataclasses.replace(small, out=str(tmp_path / "second"), init=small.out, rules=REMASK)
    with pytest.warns(UserWarning, match="no board of 50 puzzles came to hold a wrong symbol"):
        policy = imitation.train(again, task, denoiser)
    first = load_policy(small.out, actions="set").state_dict()
    own = policy.state_dict()
    assert all(torch.equal(own[name], value) for name, value in first.items())
    assert any(not torch.equal(own[f"doubter.{name}"], value) for name, value in first.items())
    assert sum(name.startswith("doubter.") for name in own) == len(first), "one doubter, without one of its own"

    one = dataclasses.replace(small, out=str(tmp_path / "one"), rules=REMASK)
    with pytest.warns(UserWarning, match="no board of 50"):
        imitation.train(one, task, denoiser)
    both = dataclasses.replace(again, out=str(tmp_path / "both"), init=one.out)
    with pytest.raises(UnmaskError, match="opens positions again with the network that closes them"):
        imitation.train(both, task, denoiser)
    budget = dataclasses.replace(one, out=str(tmp_path / "budget"), rules=Rules("set+remask", remask_budget=2))
    with pytest.raises(UnmaskError, match="does not count a remask_budget"):
        imitation.train(budget, task, denoiser)


@torch.no_grad()
def test_a_new_policy_is_its_base() -> None:
    policy, seen = policy_of("bernoulli", "soft_threshold", jiggle=False), observation(remask=True)
    base = parallel.SoftThreshold().log_inclusion(seen)
    torch.testing.assert_close(policy.log_inclusion(seen), base)
    torch.testing.assert_close(set_laws.independent_kl(policy.log_inclusion(seen), base, seen.choices), torch.zeros(5))


@torch.no_grad()
def test_the_most_likely_set_follows_the_threshold_and_is_never_empty() -> None:
    policy, seen = policy_of("bernoulli"), observation()
    chance = policy.log_inclusion(seen).exp()
    sizes = []
    for threshold in (0.05, 0.5, 0.95, 0.9999):
        policy.threshold = threshold
        chosen = policy.sample(seen, None)
        best = chance.masked_fill(~seen.open, -1.0).argmax(1)
        for row in range(len(chosen)):
            if seen.open[row].any():
                assert chosen[row, best[row]]
            likely = chance[row] > threshold
            likely[best[row]] |= bool(seen.open[row].any())
            assert torch.equal(chosen[row], likely & seen.choices[row])
        sizes.append(int(chosen.sum()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


@torch.no_grad()
def test_one_sure_mistake_opens_all_that_are_suspected_and_holds_the_rest(monkeypatch) -> None:
    """By hand. Rows: sure of a mistake and suspicious of another; suspicious alone; sure of what may not be opened."""
    policy = policy_of("bernoulli")
    policy.length = 5
    is_open = torch.tensor([[True, True, False, False, False]] * 3)
    again = torch.tensor([[False, False, True, True, True]] * 2 + [[False, False, False, True, True]])
    seen = Observation(is_open.long(), is_open, Denoised(torch.zeros(3, 5, 3)), again, torch.zeros(3, 5).long())
    reopen = torch.tensor([[0.9, 0.9, 0.55, 0.3, 0.2], [0.9, 0.9, 0.45, 0.3, 0.2], [0.9, 0.9, 0.9, 0.4, 0.1]])
    odds = torch.cat([torch.tensor([[0.8, 0.9, 0.99, 0.99, 0.99]] * 3), reopen], 1).logit()
    monkeypatch.setattr(policy, "log_odds", lambda _: odds)
    chosen = policy.sample(seen, None).int().tolist()
    assert chosen[0] == [0, 1, 0, 0, 0, 0, 0, 1, 1, 0], "of what is open, the likeliest alone"
    assert chosen[1] == chosen[2] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    # What a budget leaves goes to the likeliest; where it leaves nothing, play goes on as if nothing were suspected.
    memory = core.Memory(torch.zeros(3, dtype=torch.long), torch.ones(3, 5), None, torch.tensor([1, 5, 0]))
    chosen = policy.sample(dataclasses.replace(seen, memory=memory), None).int().tolist()
    assert chosen[0] == [0, 1, 0, 0, 0, 0, 0, 1, 0, 0]
    memory = memory._replace(reopenings=torch.zeros(3, dtype=torch.long))
    chosen = policy.sample(dataclasses.replace(seen, memory=memory), None).int().tolist()
    assert chosen[0] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_a_doubter_keeps_to_a_remask_budget() -> None:
    """It would open more: where nothing is left to open, what asked for more would be illegal and asked for again."""
    task = tasks.get("sudoku4")
    denoiser, instances = load_denoiser("sudoku4", task), task.heldout(20)
    policy = new_policy(PolicyShape(), task, denoiser, 0, "soft_threshold", sets=True)
    policy.reopening = 0.0  # whatever may be opened again is
    for budget in (0, 2):
        rules = Rules("set+remask", remask_budget=budget, nfe_budget=12)
        played = core.rollout(task, denoiser, policy, instances, rules=rules, record=True)
        opened = torch.stack([step.observation.reopened.sum(1) for step in played.steps]).amax(0)
        assert set(opened.tolist()) <= {0, budget}, "boards that one forward fills open nothing"
        assert int(opened.max()) == budget
        assert not played.state.open.any(), "nothing illegal was asked for, over and over"


def test_closing_is_no_part_of_what_a_doubter_learns(monkeypatch) -> None:
    policy, seen = policy_of("bernoulli"), observation(remask=True)
    generator = torch.Generator().manual_seed(0)
    odds = torch.randn(5, 2 * L, generator=generator)
    others = torch.cat([torch.randn(5, L, generator=generator), odds[:, L:]], 1)
    answers = torch.randint(V, (5, L), generator=generator)

    def loss(odds: torch.Tensor, **options: object) -> float:
        monkeypatch.setattr(policy, "read_log_odds", lambda *_: odds)
        return float(imitation.imitation_loss_of_sets(policy, seen, answers, **options).detach())

    assert loss(odds, closes=False) == loss(others, closes=False)
    assert loss(odds, closes=False) != loss(odds.flip(1), closes=False)
    right = torch.where(seen.open, answers, seen.tokens)  # no mistake on the board, so closing can be learned
    answers = right
    assert loss(odds) != loss(others)


def board() -> tuple[TableTask, TableDenoiser]:
    task = TableTask(random_joint(V, L, seed=4))
    return task, TableDenoiser(task.joint, task)


def test_the_gradient_of_upo_over_sets_is_that_of_the_enumerated_objective() -> None:
    """One forward closes everything or not: on a budget of one, E[r] is a sum over sets, and so is its gradient."""
    task, denoiser = board()
    policy, rules = policy_of("bernoulli"), Rules("set", nfe_budget=1)
    empty = torch.full((1, L), V)
    seen = Observation(empty, empty == V, denoiser(empty))
    start = Instances(empty, core.fill(seen.denoised.log_probs))
    symbols, sure = core.fill(seen.denoised.log_probs), seen.denoised.log_probs.max(-1).values
    expected = torch.zeros(())
    for s in every_set(L):
        after = core.step(task, core.begin(start, V), symbols, s[None], rules, sure)
        expected = expected + policy.log_prob_of(seen, s[None]).exp().sum() * after.reward.sum()
    assert float(expected.detach()) > 0
    exact = torch.autograd.grad(expected, list(policy.parameters()), allow_unused=True)

    config = UPOConfig(out="unused", rules=rules)
    played = core.rollout(
        task, denoiser, policy, start.repeat(20_000), rules=rules,
        order_generator=torch.Generator().manual_seed(0), record=True,
    )  # fmt: skip
    batch = upo.flatten(played, upo.group_advantage(played.reward, 20_000, config.normalise))
    loss, _ = upo.upo_loss(upo.Tempered(policy, 1.0), parallel.SoftThreshold(), batch, "none", 0.0, 0.2)
    found = torch.autograd.grad(-loss, list(policy.parameters()), allow_unused=True)
    flat = [torch.cat([g.flatten() for g in part if g is not None]) for part in (exact, found)]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < 0.15
    assert float(torch.nn.functional.cosine_similarity(*flat, dim=0)) > 0.99


def test_divergences_over_sets_against_sums_over_all_sets() -> None:
    seen, reference = observation(), parallel.SoftThreshold(0.5, 0.3)
    policy = policy_of("bernoulli")
    with torch.no_grad():
        total = torch.zeros(5)
        for s in every_set(L):
            action = s.expand(5, -1)
            log_p, log_q = policy.log_prob_of(seen, action), reference.log_prob_of(seen, action)
            total += torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
        torch.testing.assert_close(upo.set_divergence(policy, reference, seen, "step_kl"), total, atol=1e-4, rtol=1e-4)
        rule = parallel.Threshold(0.5)
        wanted = -policy.log_prob_of(seen, rule.sample(seen, None))
        torch.testing.assert_close(upo.set_divergence(policy, rule, seen, "cross_entropy"), wanted)


SMALL = {"iterations": 2, "env": "Unmask/Sudoku4x4-v0", "beta": 1e-3, "threads": 1}


@pytest.mark.parametrize("rules", [Rules("set", speed=1.0, nfe_budget=16), Rules("set+remask", nfe_budget=16)], ids=str)
@pytest.mark.parametrize("learner", ["upo", "plackett_luce", "ppo-sb3", "ppo-torchrl", "grpo-torchrl"])
def test_every_learner_trains_them(learner: str, rules: Rules, tmp_path) -> None:
    from agents import sb3_ppo, torchrl_ppo

    common = SMALL | {"rules": rules, "out": str(tmp_path)}
    if learner in ("upo", "plackett_luce"):
        law = "bernoulli" if learner == "upo" else learner
        trained = upo.train(UPOConfig(puzzles=4, group=4, shape=PolicyShape(law=law), **common))
    elif learner == "ppo-sb3":
        trained = sb3_ppo.train(SB3PPOConfig(boards=8, steps=8, **common))
    elif learner == "ppo-torchrl":
        trained = torchrl_ppo.train(TorchRLPPOConfig(boards=8, steps=8, **common))
    else:
        trained = torchrl_ppo.train(TorchRLGRPOConfig(puzzles=2, group=4, steps=16, **common))
    task = tasks.get("sudoku4")
    loaded = load_policy(tmp_path, task, actions=rules.actions)
    fresh = new_policy(
        PolicyShape(law=loaded.sets), task, load_denoiser("sudoku4", task), 0, "soft_threshold", sets=True
    )
    moved = [not torch.equal(a, b) for a, b in zip(loaded.parameters(), fresh.parameters(), strict=True)]
    assert any(moved)
    assert all(p.isfinite().all() for p in trained.parameters())


def test_both_libraries_see_the_law_of_the_policy() -> None:
    from gymnasium import spaces

    from agents.critic import new_critic
    from agents.sb3_ppo import OrderActorCritic
    from agents.torchrl_ppo import SHOWN, make_actor
    from unmask_env.gym_env import arrays
    from unmask_env.vector import UnmaskVectorEnv

    task, denoiser = board()
    policy = policy_of("bernoulli")
    envs = UnmaskVectorEnv(6, task=task, denoiser=denoiser, actions="set+remask")
    envs.reset(seed=0)
    envs.step(np.eye(6, 2 * L, dtype=np.int8) * (np.arange(2 * L) < L))
    envs.step(np.eye(6, 2 * L, k=L, dtype=np.int8))  # open it again
    view = envs._look.view
    assert view["reopened"].sum() > 0
    action = torch.rand(6, 2 * L, generator=torch.Generator().manual_seed(0)) < 0.5
    action &= view["action_mask"]
    from unmask_env.boards import read

    wanted = policy.log_prob_of(read(view, V), action)
    actor_critic = OrderActorCritic(
        envs.single_observation_space, envs.single_action_space, lambda _: 1e-3, policy, new_critic(task, 0)
    )
    assert isinstance(envs.single_action_space, spaces.MultiBinary)
    shown = {key: torch.as_tensor(value) for key, value in arrays(view).items()}
    _, log_prob, _ = actor_critic.evaluate_actions(shown, action.float(), torch.as_tensor(envs.action_masks()))
    torch.testing.assert_close(log_prob, wanted, atol=1e-4, rtol=1e-4)
    from tensordict import TensorDict

    law = make_actor(policy).get_dist(TensorDict({key: view[key] for key in SHOWN}, batch_size=[6]))
    torch.testing.assert_close(law.log_prob(action), wanted, atol=1e-4, rtol=1e-4)
    assert law.sample().dtype == torch.bool
    assert not (law.sample() & ~view["action_mask"]).any()
    assert torch.equal(law.deterministic_sample, (policy.log_odds(read(view, V)) > 0) & view["action_mask"])


def test_boards_to_learn_opening_again_on_show_mistakes_and_what_was_opened() -> None:
    task = tasks.get("sudoku6")
    denoiser, states = load_denoiser("sudoku6-tiny", task), States(task)
    instances = task.heldout(40, "validation")
    player = load_policy("sudoku6-tiny-sets", task, denoiser, "set+remask")
    rules, generator = Rules("set+remask"), torch.Generator().manual_seed(11)  # draws a low threshold
    states.collect_sets(task, denoiser, instances, rules, generator, player)
    holes, closed = states.given == task.mask_id, states.tokens != task.mask_id
    wrong = (states.tokens != states.answers) & closed
    assert 0.05 < wrong.any(1).float().mean() < 0.95
    assert torch.equal(states.stuck, wrong.any(1))
    assert states.reopened.sum() > 10
    assert states.reopened[~holes].sum() == 0


@torch.no_grad()
def test_a_tutor_opens_its_share_of_the_wrong_symbols_and_closes_nothing_beside(monkeypatch) -> None:
    answers = torch.zeros(300, 6, dtype=torch.long)
    tokens = torch.tensor([[0, 0, 1, 1, 1, 2]]).repeat(300, 1)  # two right, three wrong, one open
    is_open = tokens == 2
    seen = Observation(tokens, is_open, Denoised(torch.zeros(300, 6, 2)), ~is_open, torch.zeros_like(tokens))
    player, generator = parallel.FixedK(), torch.Generator().manual_seed(0)
    rates = torch.tensor([0.0, 0.3, 1.0]).repeat_interleave(100).unsqueeze(1)
    monkeypatch.setattr(imitation, "STRAY", 0.0)
    tutored = imitation._Tutored(player, None, Oracle(answers), rates, generator)
    close, again = tutored.sample(seen, None).split(6, 1)
    assert not again[:, :2].any()
    none, some, every = again[:, 2:5].split(100)
    assert not none.any()
    assert every.all()
    assert 0.2 < some.float().mean() < 0.4
    assert torch.equal(close[:, 5], ~again.any(1))


@torch.no_grad()
def test_a_tutored_player_opens_again_what_it_would(monkeypatch) -> None:
    tokens = torch.tensor([[0, 0, 0, 2]])
    seen = Observation(tokens, tokens == 2, Denoised(torch.zeros(1, 4, 2)), tokens != 2, torch.zeros_like(tokens))
    player = policy_of("bernoulli")
    monkeypatch.setattr(player, "sample", lambda *_: torch.tensor([[0, 0, 0, 1, 0, 1, 0, 0]], dtype=torch.bool))
    monkeypatch.setattr(imitation, "STRAY", 0.0)
    answers, generator = Oracle(torch.zeros(1, 4, dtype=torch.long)), torch.Generator().manual_seed(0)
    tutored = imitation._Tutored(player, None, answers, torch.zeros(1, 1), generator)
    assert tutored.sample(seen, None).int().tolist() == [[0, 0, 0, 0, 0, 1, 0, 0]]


def test_counts_of_opening_again_follow_a_board_into_its_guises() -> None:
    task = tasks.get("sudoku6")
    instances = task.heldout(20, "validation")
    states = States(task)
    states.tokens, states.answers, states.given = instances.tokens, instances.answers, instances.tokens
    states.reopened = instances.answers  # 0 to 5 times, by symbol: more than three are three
    states.stuck = torch.ones(20, dtype=torch.bool)
    boards, given, reopened = states.sample(task, 64, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(given, boards.tokens)
    assert not (reopened == boards.answers.clamp(max=3)).all(), "symbols have other names now"
    for row in range(64):
        times = [reopened[row][boards.answers[row] == symbol].unique().tolist() for symbol in range(6)]
        assert sorted(times) == [[0], [1], [2], [3], [3], [3]]


@pytest.mark.filterwarnings("ignore:no board of 400")  # whatever is closed here may be right
def test_imitation_learns_what_is_right_and_what_is_wrong(tmp_path) -> None:
    task, denoiser = board()
    config = ImitationConfig(
        out=str(tmp_path),
        rules=REMASK,
        puzzles=400,
        steps=60,
        batch=64,
        shape=PolicyShape(copy=False, dim=16, layers=1),
    )
    policy = imitation.train(config, task, denoiser)
    states = States(task)
    instances = task.sample(400, torch.Generator().manual_seed(5))
    states.collect_sets(task, denoiser, instances, REMASK, torch.Generator().manual_seed(6))
    is_open = states.tokens == V
    again = ~is_open & (states.given == V)
    assert (states.given[~is_open & ~again] == states.tokens[~is_open & ~again]).all()
    seen = Observation(states.tokens, is_open, denoiser(states.tokens), again, states.reopened)
    with torch.no_grad():
        trained = imitation.imitation_loss_of_sets(policy, seen, states.answers)
        untrained = imitation.imitation_loss_of_sets(
            new_policy(config.shape, task, denoiser, 0, gate=1.0, sets=True), seen, states.answers
        )
    assert float(trained) < 0.8 * float(untrained)
    with pytest.raises(UnmaskError, match="over sets the oracle is what can be imitated, not margin"):
        imitation.train(dataclasses.replace(config, reference="margin", out=str(tmp_path / "b")), task, denoiser)


def test_what_does_not_go_with_sets(tmp_path) -> None:
    task, denoiser = board()
    single = tmp_path / "single"
    save_model(OrderPolicy(V, [[0], [1], [2]], dim=8, layers=1, heads=2), single)
    with pytest.raises(CheckpointError, match="chooses single positions; it cannot play with actions 'set'"):
        load_policy(single, task, denoiser, "set")
    sets = tmp_path / "sets"
    save_model(policy_of("bernoulli"), sets)
    with pytest.raises(CheckpointError, match="chooses sets; it cannot play with actions 'single'"):
        load_policy(sets, task, denoiser)
    config = UPOConfig(out=str(tmp_path / "out"), rules=SET, iterations=1)
    for options, message in (
        ({"temperature": 0.8}, "policies over sets are sampled at temperature 1, not 0.8"),
        ({"regulariser": "terminal_kl"}, "terminal_kl enumerates single positions"),
        ({"regulariser": "step_kl", "shape": PolicyShape(law="plackett_luce")}, "has no closed form"),
        ({"reference": "margin"}, "unknown set reference 'margin'"),
        ({"reference": "threshold", "regulariser": "step_kl"}, "the KL to the deterministic reference threshold"),
    ):
        with pytest.raises(UnmaskError, match=message):
            upo.train(dataclasses.replace(config, **options), task, denoiser)
    from agents import sb3_ppo

    law = SB3PPOConfig(out=str(tmp_path / "o"), rules=SET, shape=PolicyShape(law="plackett_luce"))
    with pytest.raises(UnmaskError, match="know no Plackett-Luce sets"):
        sb3_ppo.train(law, task, denoiser)
    assert isinstance(make_reference(dataclasses.replace(config, reference="factor")), parallel.Factor)
