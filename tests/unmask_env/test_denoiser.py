"""Denoisers: the exact table against brute force, the frozen backbone, and refusals."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tasks
from pretrain.backbone import Backbone
from pretrain.checkpoint import save_model
from pretrain.train import AUDMConfig, MDMConfig, pretrain
from tasks import IncompatibleDenoiserError, UnmaskError
from tests.oracles import enumeration
from tests.toys import rollout
from unmask_env.denoiser import FrozenDenoiser, TableDenoiser, load_denoiser
from unmask_env.process import Unmasking
from unmask_env.reference import LeftToRight, Margin, MaxConfidence, Threshold
from unmask_env.state import Denoised, Rules


def backbone(task: tasks.Task, **options) -> Backbone:
    torch.manual_seed(0)
    return Backbone(task.vocab_size, task.coordinates.tolist(), dim=16, layers=1, heads=2, **options)


@pytest.mark.parametrize(("vocab", "length"), [(3, 3), (2, 4), (4, 2), (3, 1)])
def test_table_conditionals_equal_brute_force(vocab: int, length: int) -> None:
    joint = enumeration.random_joint(vocab, length, seed=vocab + 10 * length)
    boards = list(itertools.product(range(vocab + 1), repeat=length))  # every partial board
    log_probs = TableDenoiser(joint)(torch.tensor(boards)).log_probs
    assert log_probs.dtype == torch.float32
    expected = torch.stack([enumeration.conditional(joint, list(board)) for board in boards])
    torch.testing.assert_close(log_probs.double().exp(), expected, atol=1e-6, rtol=0)


def test_table_by_hand() -> None:
    # p(00) = 0.5, p(01) = 0.1, p(10) = 0.0, p(11) = 0.4; the table need not be normalised.
    denoiser = TableDenoiser(torch.tensor([[5.0, 1.0], [0.0, 4.0]]))
    p = denoiser(torch.tensor([[2, 2], [0, 2], [1, 2], [2, 1]])).log_probs.exp()
    torch.testing.assert_close(p[0], torch.tensor([[0.6, 0.4], [0.5, 0.5]]))
    torch.testing.assert_close(p[1], torch.tensor([[1.0, 0.0], [5 / 6, 1 / 6]]))
    torch.testing.assert_close(p[2, 1], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(p[3, 0], torch.tensor([0.2, 0.8]))


def test_table_with_an_impossible_context_gives_no_nan() -> None:
    denoiser = TableDenoiser(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    log_probs = denoiser(torch.tensor([[1, 2]])).log_probs
    assert not log_probs.isnan().any()
    assert (log_probs == -math.inf).all()


def test_calls_are_counted_and_batches_agree_with_single_rows() -> None:
    joint = enumeration.random_joint(3, 3, seed=1)
    denoiser = TableDenoiser(joint)
    boards = torch.tensor([[3, 3, 3], [0, 3, 3], [3, 2, 1]])
    together = denoiser(boards).log_probs
    assert denoiser.calls == 1
    apart = torch.cat([denoiser(board[None]).log_probs for board in boards])
    assert denoiser.calls == 4
    torch.testing.assert_close(together, apart)


def test_frozen_backbone_normalises_has_no_gradient_and_counts() -> None:
    task = tasks.get("sudoku4")
    model = backbone(task).train()
    denoiser = load_denoiser(model, task)
    assert isinstance(denoiser, FrozenDenoiser)
    assert not model.training
    tokens = task.heldout(3).tokens
    denoised = denoiser(tokens)
    log_probs, hidden, order_weights = denoised.log_probs, denoised.hidden, denoised.order_weights
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 16))
    torch.testing.assert_close(log_probs, model(tokens).logits.log_softmax(-1))
    assert hidden is not None
    assert order_weights is None  # it learned no order
    assert hidden.shape == (3, 16, denoiser.hidden_dim)
    assert not log_probs.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    assert denoiser.calls == 1


def test_a_denoiser_object_is_returned_as_it_is() -> None:
    task = enumeration.TableTask(enumeration.random_joint(2, 2, seed=0))
    denoiser = TableDenoiser(task.joint, task)
    assert load_denoiser(denoiser, task) is denoiser


def test_incompatible_sizes_are_refused_with_both_sizes() -> None:
    sudoku4, sudoku6 = tasks.get("sudoku4"), tasks.get("sudoku6")
    with pytest.raises(IncompatibleDenoiserError, match=r"sudoku4 has 4 symbols and 16 .* 6 symbols and 36 positions"):
        load_denoiser(backbone(sudoku6), sudoku4)
    with pytest.raises(IncompatibleDenoiserError, match=r"sudoku4 has 4 symbols and 16 .* 6 symbols and 36 positions"):
        load_denoiser("sudoku6-tiny", sudoku4)
    with pytest.raises(IncompatibleDenoiserError, match="3 symbols and 2 positions"):
        TableDenoiser(torch.ones(3, 3), sudoku4)


def test_a_table_holds_probabilities() -> None:
    for joint in (-torch.eye(2), [[2.0, -1.0], [-0.5, 0.5]], torch.zeros(2, 2), torch.full((2, 2), torch.nan)):
        with pytest.raises(
            IncompatibleDenoiserError, match="a joint holds probabilities: finite, none below 0, and not"
        ):
            TableDenoiser(joint)
    with pytest.raises(IncompatibleDenoiserError, match="a joint has one axis of the same size per position"):
        TableDenoiser(torch.tensor(1.0))
    board = torch.tensor([[2, 0]])
    for joint in ([[0.3, 0.1], [0.2, 0.4]], np.array([[0.3, 0.1], [0.2, 0.4]])):
        log_probs = TableDenoiser(joint)(board).log_probs
        torch.testing.assert_close(log_probs[0, 0].exp(), torch.tensor([0.6, 0.4]))


def test_wrong_prediction_unknown_name_and_missing_folder_are_one_clear_line(tmp_path) -> None:
    task = tasks.get("sudoku4")
    with pytest.raises(ValueError, match="predicts 'loo'"):
        backbone(task, predicts="loo")
    with pytest.raises(
        UnmaskError, match=r"unknown denoiser 'sudoku7'; did you mean .* known: .*sudoku6-tiny"
    ) as unknown:
        load_denoiser("sudoku7", task)
    with pytest.raises(UnmaskError, match="the folder does not exist") as missing:
        load_denoiser(tmp_path / "nothing", task)
    assert "\n" not in str(unknown.value) + str(missing.value)


def test_as_many_symbols_are_not_the_same_symbols(tmp_path: Path) -> None:
    """A denoiser of one text does not fit another, although both have as many byte pairs."""
    one, other = (
        tasks.Text(tasks.text.Corpus(*[(words * 40,)] * 3), level="bpe", pieces=258, length=8)
        for words in ("a rose is a rose. ", "the order of time. ")
    )
    config = MDMConfig(task="t", out=str(tmp_path / "run"), steps=1, batch=4, dim=16, layers=1, heads=2)
    pretrain(config, one)
    load_denoiser(tmp_path / "run", one)
    with pytest.raises(IncompatibleDenoiserError, match="trained on other symbols than those of task text"):
        load_denoiser(tmp_path / "run", other)


# ---------------------------------------------------------------------- uniform noise
@pytest.mark.trains
def test_an_absorbing_denoiser_is_asked_what_follows_from_what_is_given(tmp_path: Path) -> None:
    """Trained on an enumerated joint, it predicts what boards hide nearly as well as the exact conditionals."""
    task = enumeration.TableTask(enumeration.random_joint(3, 3, seed=4))
    config = AUDMConfig(
        task="table", out=str(tmp_path / "run"), steps=300, batch=256, dim=32, layers=2, heads=2, lr=1e-2, ema=0.9,
        threads=1, prompt_fraction=1.0, loss="cross_entropy",
    )  # fmt: skip
    denoiser = FrozenDenoiser(pretrain(config, task), task)
    draw = torch.Generator().manual_seed(0)
    clean = task.clean(4000, draw)
    boards = torch.where(torch.rand(clean.shape, generator=draw) < torch.rand(4000, 1, generator=draw), 3, clean)
    found, exact = (
        -one(boards).log_prob_of(clean)[boards == 3].mean() for one in (denoiser, TableDenoiser(task.joint, task))
    )
    assert exact - 0.01 < found < exact + 0.05
    assert exact < 0.8 * math.log(3)
    assert torch.equal(denoiser(boards).log_probs, denoiser(boards).log_probs), "the same noise symbols every time"
    played = rollout(task, denoiser, MaxConfidence(), task.heldout(50))
    assert not (played.state.tokens == 3).any()


# ---------------------------------------------------------------------- large vocabularies
class Letters(tasks.Task):
    """Six positions of 200 symbols."""

    name, symbols, shape = "letters", tuple(f"s{i}" for i in range(200)), (1, 6)

    def sample(self, n: int, generator: torch.Generator) -> tasks.Instances:
        answers = torch.randint(200, (n, 6), generator=generator)
        holes = torch.rand(n, 6, generator=generator) < 0.6
        holes[:, 0] = True
        return tasks.Instances(answers.masked_fill(holes, 200), answers)

    def reward(self, tokens: torch.Tensor, instances: tasks.Instances) -> torch.Tensor:
        return (tokens == instances.answers).float().mean(1)


def letters() -> tuple[Letters, Backbone]:
    model = backbone(Letters())
    torch.nn.init.normal_(model.head.weight)  # far from even
    return Letters(), model


def tensors_of(value: object) -> list[torch.Tensor]:
    """All tensors that are reachable from a dataclass or tuple."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for part in value for t in tensors_of(part)]
    return [t for part in vars(value).values() for t in tensors_of(part)] if hasattr(value, "__dict__") else []


def test_of_a_large_vocabulary_the_likeliest_symbols_and_the_entropy_are_those_of_the_whole_forward() -> None:
    task, model = letters()
    tokens = task.sample(20, torch.Generator().manual_seed(0)).tokens
    where = tokens == 200
    denoised = FrozenDenoiser(model, task)(tokens, where)
    log_probs = model(tokens).logits.log_softmax(-1)
    whole = Denoised.of(log_probs)
    values, symbols = log_probs.topk(16, -1)
    for part in (denoised, whole):
        torch.testing.assert_close(part.top_log_probs[where], values[where])
        assert torch.equal(part.top_symbols[where], symbols[where])
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        torch.testing.assert_close(part.entropy[where], entropy[where])
        assert torch.equal(part.best[where], log_probs.argmax(-1)[where])
    assert (denoised.entropy[~where] == 0).all(), "elsewhere nothing was computed"
    assert denoised.log_probs is None
    answers = task.sample(20, torch.Generator().manual_seed(0)).answers
    known = denoised.log_prob_of(answers)
    shown = (denoised.top_symbols == answers.unsqueeze(-1)).any(-1)
    expected = log_probs.gather(-1, answers.unsqueeze(-1)).squeeze(-1).masked_fill(~shown, -torch.inf)
    torch.testing.assert_close(known[where], expected[where])


def test_rollouts_of_a_large_vocabulary_are_those_of_the_dense_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = letters()
    instances = task.sample(30, torch.Generator().manual_seed(1))
    for policy, rules in (
        (MaxConfidence(), Rules()),
        (Threshold(0.3), Rules("set")),
        (Threshold(0.3), Rules("set", block_length=2)),
    ):
        compact = rollout(task, FrozenDenoiser(model, task), policy, instances, rules=rules)
        with monkeypatch.context() as patched:
            for module in ("state", "process", "denoiser"):
                patched.setattr(f"unmask_env.{module}.WHOLE", 200)
            dense = rollout(task, FrozenDenoiser(model, task), policy, instances, rules=rules)
        assert torch.equal(compact.tokens, dense.tokens)
        assert torch.equal(compact.nfe, dense.nfe)


def test_no_tensor_with_a_vocabulary_axis_outlives_the_forward() -> None:
    task, model = letters()
    instances = task.sample(4, torch.Generator().manual_seed(2))
    played = rollout(task, FrozenDenoiser(model, task), MaxConfidence(), instances, record=True)
    found = tensors_of(played.steps)
    assert len(found) > 20
    assert not [t.shape for t in found if 200 in t.shape or 201 in t.shape]


def test_sampled_filling_of_a_large_vocabulary_draws_among_the_shown_symbols() -> None:
    task, model = letters()
    process = Unmasking(task, FrozenDenoiser(model, task), temperature=1.0)
    board = torch.full((1, 6), 200)
    seen = process.observe(process.reset(tasks.Instances(board, board * 0)))
    n = 20_000
    many = seen[torch.zeros(n, dtype=torch.long)]
    drawn = many.denoised.draw(1.0, torch.rand(n, 6, generator=torch.Generator().manual_seed(0)))[:, 0]
    shown, chance = seen.top_symbols[0, 0], seen.top_log_probs[0, 0].softmax(-1)
    frequency = (drawn.unsqueeze(1) == shown).double().mean(0)
    assert float(frequency.sum()) == 1.0
    assert ((frequency - chance).abs() <= 5 * (chance * (1 - chance) / n).sqrt() + 1e-9).all()


# ---------------------------------------------------------------------- several passes
def recurrent(task: tasks.Task, sharpness: float = 1.0, num_passes: int = 3) -> Backbone:
    """The larger ``sharpness``, the surer it is."""
    torch.manual_seed(1)
    model = backbone(task, num_passes=num_passes)
    with torch.no_grad():
        model.head.weight.mul_(sharpness)
    return model


def by_hand(model: Backbone, tokens: torch.Tensor, most: int, always: bool = False) -> tuple[torch.Tensor, list[int]]:
    """(N, L, V) probabilities after the passes that each row takes, and how many they are, one row at a time."""
    probabilities, counts = [], []
    for row in tokens:
        masked = row == model.mask_id
        belief = model.head(model.trunk(row[None])).softmax(-1)
        sure = not masked.any() or (not always and float(belief[0, masked].max()) >= 0.97)
        for _ in range(0 if sure else most - 1):
            embedding = torch.where(masked[:, None], belief[0] @ model.symbols.weight[:-1], model.symbols(row))
            x = (embedding + model.positions())[None]
            for block in model.blocks:
                x = block(x)
            belief = model.head(model.norm(x)).softmax(-1)
        probabilities.append(belief[0].detach())
        counts.append(1 if sure else most)
    return torch.stack(probabilities), counts


def mixed_boards(task: tasks.Task) -> torch.Tensor:
    """Some complete, some nearly empty."""
    instances = task.heldout(40)
    share = torch.linspace(0, 1, 40).unsqueeze(1)
    given = torch.rand(instances.tokens.shape, generator=torch.Generator().manual_seed(0)) < share
    tokens = torch.where(given, instances.answers, instances.tokens)
    tokens[-1] = instances.answers[-1]
    return tokens


@pytest.mark.parametrize("options", [{}, {"passes": 5}, {"passes": 2, "read": "always"}, {"passes": 1}])
@torch.no_grad()
def test_adaptive_passes_are_those_of_a_loop_by_hand(options: dict) -> None:
    task = tasks.get("sudoku4")
    model = recurrent(task, sharpness=4.0)
    tokens = mixed_boards(task)
    denoiser = FrozenDenoiser(model, task, **options)
    denoised = denoiser(tokens)
    most, always = options.get("passes", 3), options.get("read") == "always"
    expected, counts = by_hand(model, tokens, most, always)
    torch.testing.assert_close(denoised.log_probs.exp(), expected, rtol=1e-4, atol=1e-5)
    if most > 1:
        assert denoised.passes.tolist() == counts
        assert denoised.passes.dtype == torch.int64
        assert set(counts) == {1, most}, "the boards need both"
    else:
        assert denoised.passes is None
    assert denoiser.calls == 1, "a call is one forward"
    torch.testing.assert_close(model.logits(denoised.hidden).softmax(-1), denoised.log_probs.exp())


def test_rows_do_not_depend_on_their_batch() -> None:
    task = tasks.get("sudoku4")
    denoiser = FrozenDenoiser(recurrent(task, sharpness=4.0), task)
    tokens = mixed_boards(task)
    together = denoiser(tokens)
    for row in range(len(tokens)):
        alone = denoiser(tokens[row : row + 1])
        torch.testing.assert_close(alone.log_probs, together.log_probs[row : row + 1], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.passes, together.passes[row : row + 1])


def test_only_unsure_rows_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.get("sudoku4")
    model = recurrent(task, sharpness=4.0)
    denoiser, tokens, rows = FrozenDenoiser(model, task), mixed_boards(task), []
    passes = model.passes

    def counted(x: torch.Tensor, *arguments: object) -> object:
        rows.append(x)
        return passes(x, *arguments)

    monkeypatch.setattr(model, "passes", counted)
    denoised = denoiser(tokens)
    assert torch.equal(torch.cat(rows), tokens[denoised.passes == 3])
    rows.clear()
    denoiser(tokens[denoised.passes == 1])
    assert not rows


def test_passes_survive_joining_and_choosing_rows() -> None:
    task = tasks.get("sudoku4")
    denoised = FrozenDenoiser(recurrent(task, sharpness=4.0), task)(mixed_boards(task))
    rows = torch.tensor([39, 0, 7])
    assert torch.equal(denoised[rows].passes, denoised.passes[rows])
    assert torch.equal(denoised.without_hidden().passes, denoised.passes)
    both = Denoised.join([denoised[rows], denoised], torch.cat)
    assert torch.equal(both.passes, torch.cat([denoised.passes[rows], denoised.passes]))
    played = rollout(task, FrozenDenoiser(recurrent(task), task), MaxConfidence(), task.heldout(5), record=True)
    assert all(step.observation.denoised.passes.shape == (5,) for step in played.steps)


@torch.no_grad()
def test_several_passes_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the whole computation, some rows at a time and without a vocabulary axis in the end."""
    task = Letters()
    model = recurrent(task, sharpness=10.0)
    tokens = task.sample(20, torch.Generator().manual_seed(0)).tokens
    where = tokens == 200
    expected, counts = by_hand(model, tokens, 3)
    monkeypatch.setattr("unmask_env.denoiser.CHUNK", 3 * 6 * 200)
    denoised = FrozenDenoiser(model, task)(tokens, where)
    assert denoised.passes.tolist() == counts
    assert set(counts) == {1, 3}
    values = expected.log().topk(16, -1).values
    torch.testing.assert_close(denoised.top_log_probs[where], values[where], rtol=1e-3, atol=1e-3)
    assert not [t.shape for t in tensors_of(denoised) if 200 in t.shape]


def test_names_say_how_a_recurrent_denoiser_reads(tmp_path: Path) -> None:
    task = tasks.get("sudoku4")
    save_model(recurrent(task), tmp_path / "several")
    save_model(backbone(task), tmp_path / "one:each")
    name = str(tmp_path / "several")
    for text, passes, read in (
        ("", 3, "unsure"),
        (":passes=6", 6, "unsure"),
        (":read=always", 3, "always"),
        (":passes=1,read=unsure", 1, "unsure"),
    ):
        denoiser = load_denoiser(name + text, task)
        assert (denoiser.passes, denoiser.read) == (passes, read)
    assert load_denoiser(str(tmp_path / "one:each"), task).passes == 1, "a folder may have a colon in its name"
    for text, message in (
        (":passes=0", "passes must be a whole number of at least 1, not 0"),
        (":passes=x", "passes must be a whole number, not 'x'"),
        (":read=never", "read must be unsure or always, not 'never'"),
        (":depth=2", "takes passes, read; not depth"),
        (":6", "takes passes, read; not source"),
    ):
        with pytest.raises(UnmaskError, match=message) as caught:
            load_denoiser(name + text, task)
        assert "\n" not in str(caught.value)
    with pytest.raises(IncompatibleDenoiserError, match="trained to read once, so it takes no 2 passes"):
        load_denoiser("sudoku4:passes=2", task)


@pytest.mark.slow
def test_the_packaged_recurrent_denoiser_beats_the_one_it_started_from() -> None:
    """200 validation puzzles by margin, with hardly more passes than forwards."""
    task = tasks.get("sudoku6")
    instances = task.heldout(200, "validation")
    failures = {}
    for name in ("sudoku6-tiny", "sudoku6-recurrent"):
        played = rollout(task, load_denoiser(name, task), Margin(), instances, record=True)
        failures[name] = int((played.reward < 1).sum())
    assert failures["sudoku6-recurrent"] < failures["sudoku6-tiny"] / 2
    passes = sum((step.observation.denoised.passes * step.alive).sum().item() for step in played.steps)
    forwards = int(played.nfe.sum())
    assert forwards < passes < 1.05 * forwards


@pytest.mark.slow
def test_the_packaged_recurrent_denoiser_of_4x4_fills_in_any_order_where_it_always_reads() -> None:
    """Left to right, 200 validation puzzles: one pass fails on about a quarter."""
    task = tasks.get("sudoku4")
    instances = task.heldout(200, "validation")
    failures = [
        int((rollout(task, load_denoiser(name, task), LeftToRight(), instances).reward < 1).sum())
        for name in ("sudoku4", "sudoku4-recurrent:read=always")
    ]
    assert failures[0] > 30
    assert failures[1] < 5
