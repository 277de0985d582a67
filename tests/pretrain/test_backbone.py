"""The backbone: shapes, what its coordinates share, and its initialisation."""

import itertools
import math

import pytest
import torch

import tasks
from pretrain.backbone import Backbone, Block, CoordinateEmbedding, Reader, parameter_count, rotations, turn


def tiny(coordinates: list[list[int]], vocab_size: int = 5, seed: int = 0, **sizes: int) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(vocab_size, coordinates, **{"dim": 16, "layers": 2, "heads": 4, **sizes}).eval()


GRID = [[r, c] for r in range(2) for c in range(3)]


def tokens(n: int, length: int, symbols: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, symbols, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "coordinates", "vocab_size"), [(3, GRID, 5), (1, [[i] for i in range(7)], 2)])
def test_output_shapes(n, coordinates, vocab_size):
    model = tiny(coordinates, vocab_size)
    output = model(tokens(n, len(coordinates), vocab_size + 1))
    assert output.logits.shape == (n, len(coordinates), vocab_size), "the mask is never predicted"
    assert output.hidden.shape == (n, len(coordinates), 16)
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, model.head(output.hidden))
    assert (model.length, model.mask_id, model.predicts) == (len(coordinates), vocab_size, "denoiser")


def test_parameter_count_by_hand():
    d, v = 16, 5
    block = 3 * d * d + d * d + 2 * 4 * d * d + 2 * 2 * d  # attention, its output, the MLP, two norms
    expected = (v + 1) * d + (2 + 3) * d + 2 * block + 2 * d + (d * v + v)
    assert parameter_count(tiny(GRID)) == expected


def test_positions_share_the_embeddings_of_their_coordinates():
    embedding = CoordinateEmbedding(GRID, 8)
    positions = embedding().view(2, 3, 8)
    rows, columns = (table.weight for table in embedding.tables)
    torch.testing.assert_close(positions, rows[:, None] + columns[None])
    assert rows.shape == (2, 8)
    assert columns.shape == (3, 8)
    # One step on the position (0, 0) moves its whole row and column, and nothing else.
    positions[0, 0].sum().backward()
    with torch.no_grad():
        for table in embedding.tables:
            table.weight -= table.weight.grad
    moved = (embedding().view(2, 3, 8) - positions).abs().sum(2) > 0
    assert moved.tolist() == [[True, True, True], [True, False, False]]


def test_positions_with_equal_coordinates_are_interchangeable():
    model = tiny([[0], [0], [1]])
    x = torch.tensor([[1, 3, 5]])
    swapped = model(x[:, [1, 0, 2]]).logits[:, [1, 0, 2]]
    torch.testing.assert_close(swapped, model(x).logits)
    distinct = tiny([[0], [1], [2]])
    assert not torch.allclose(distinct(x[:, [1, 0, 2]]).logits[:, [1, 0, 2]], distinct(x).logits, atol=1e-3)


def test_only_the_coordinates_tell_positions_apart():
    """Permuting the positions together with their coordinates permutes the output."""
    order = [4, 0, 5, 2, 1, 3]
    model, permuted = tiny(GRID), tiny([GRID[i] for i in order], seed=1)
    permuted.load_state_dict(model.state_dict())
    x = tokens(4, 6, 6)
    torch.testing.assert_close(permuted(x[:, order]).logits, model(x).logits[:, order])


def test_every_position_sees_every_other_and_rows_do_not_mix():
    model = tiny(GRID)
    x = tokens(2, 6, 5)
    before = model(x).logits
    for changed in range(6):
        y = x.clone()
        y[0, changed] = 5
        difference = (model(y).logits - before).abs().amax(2)
        assert (difference[0] > 1e-6).all(), f"all positions depend on {changed}"
        torch.testing.assert_close(model(y).logits[1], before[1])


def test_initialisation_depends_on_fan_in():
    torch.manual_seed(0)
    model = Backbone(9, [[i] for i in range(50)], dim=128, layers=8, heads=4)
    block = model.blocks[3]
    for weight, std in [
        (block.qkv.weight, 128**-0.5),
        (block.up.weight, 128**-0.5),
        (block.out.weight, 128**-0.5 / 4),  # sqrt(2 * 8 layers) = 4
        (block.down.weight, 512**-0.5 / 4),
        (model.positions.tables[0].weight, 0.1),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert not model.head.bias.any()


@pytest.mark.parametrize("name", sorted({*tasks.names()} - {"lines", "math", "free_text"}))  # tokenizers; text
def test_it_fits_the_registered_tasks(name):
    task = tasks.get(name)
    model = tiny(task.coordinates.tolist(), task.vocab_size)
    instances = task.heldout(2)
    assert model(instances.tokens).logits.shape == (2, task.length, task.vocab_size)


# ---------------------------------------------------------------------- distances
def test_rotary_attention_sees_distances_and_not_places() -> None:
    """The same states further along the line attend in the same way; mirrored they do not."""
    torch.manual_seed(0)
    block = Block(16, 2).eval()
    x, rotation = torch.randn(1, 6, 16), rotations(9, 8, torch.device("cpu"))
    with torch.no_grad():
        here, there = (block(x, rotation=rotation[:, s : s + 6]) for s in (0, 3))
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(block(x.flip(1), rotation=rotation[:, :6]).flip(1), here, atol=1e-3)
        assert torch.allclose(block(x.flip(1)).flip(1), block(x), atol=1e-5), "without it, order is invisible"


def test_rotation_by_hand() -> None:
    """Position p turns channels j and j + 3 of 6 by p / 10000^(2 j / 6)."""
    x, rotation = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), rotations(4, 6, torch.device("cpu"))
    found = turn(x, rotation)
    for p, j in itertools.product(range(4), range(3)):
        angle, a, b = p / 10_000 ** (2 * j / 6), float(x[p, j]), float(x[p, j + 3])
        assert float(found[p, j]) == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
        assert float(found[p, j + 3]) == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-5)


def test_rotary_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = Backbone(5, [[i] for i in range(6)], 16, 2, 2, rotary=True).eval()
    tokens = torch.randint(6, (3, 6))
    assert torch.allclose(model(tokens).logits, model.bfloat16()(tokens).logits.float(), atol=0.1)


@pytest.mark.parametrize("block_length", [1, 2, 3])
def test_blocks_in_one_pass_with_rotary(block_length: int) -> None:
    """As without: block b sees the clean blocks before it at their distances."""
    torch.manual_seed(0)
    model = Backbone(5, [[i] for i in range(6)], 16, 2, 2, rotary=True, block_length=block_length).eval()
    clean, noisy = torch.randint(5, (3, 6)), torch.randint(6, (3, 6))
    with torch.no_grad():
        together = model.predict_blocks(noisy, clean)
        for start in range(0, 6, block_length):
            mixed = torch.cat(
                [clean[:, :start], noisy[:, start : start + block_length], clean[:, start + block_length :]], 1
            )
            rows = slice(start, start + block_length)
            torch.testing.assert_close(together[:, rows], model(mixed).logits[:, rows], rtol=1e-4, atol=1e-5)


def test_rotary_needs_pairs_of_channels() -> None:
    with pytest.raises(ValueError, match="multiple of 2 heads"):
        Backbone(5, [[0], [1]], dim=6, layers=1, heads=2, rotary=True)


# ---------------------------------------------------------------------- several passes
def recurrent(num_passes: int, **sizes: int) -> tuple[Backbone, Backbone]:
    """One with a single pass and one with several, with the same weights."""
    return tiny(GRID, **sizes), tiny(GRID, num_passes=num_passes, **sizes)


def test_the_first_pass_is_that_of_the_model_with_one() -> None:
    one, several = recurrent(3)
    assert one.state_dict().keys() == several.state_dict().keys()
    x = tokens(4, 6, 6)
    expected = one(x)
    beliefs, _ = several.passes(x)
    assert torch.equal(beliefs[0], expected.logits.log_softmax(-1)), "to the bit"
    assert torch.equal(several.trunk(x), expected.hidden)
    assert torch.equal(several.passes(x, num_passes=1)[1], expected.hidden)
    assert not torch.allclose(beliefs[1], beliefs[0], atol=1e-3)


@torch.no_grad()
def test_later_passes_by_hand() -> None:
    """Masks give way to the expected embedding of the last belief; what is visible stays."""
    _, model = recurrent(3)
    x = tokens(4, 6, 6)
    logits = model.head(model.trunk(x))
    expected = [logits.log_softmax(-1)]
    for _ in range(2):
        embedding = model.positions() + model.symbols(x)
        for row, position in (x == 5).nonzero().tolist():
            belief = expected[-1][row, position].exp()
            mean = sum(belief[v] * model.symbols.weight[v] for v in range(5))
            embedding[row, position] = model.positions()[position] + mean
        for block in model.blocks:
            embedding = block(embedding)
        expected.append(model.head(model.norm(embedding)).log_softmax(-1))
    beliefs, hidden = model.passes(x)
    torch.testing.assert_close(beliefs, expected)
    torch.testing.assert_close(model(x).logits, expected[-1])
    assert torch.equal(model(x).hidden, hidden)
    resumed, states = model.passes(x, 2, beliefs[0].exp())
    assert torch.equal(resumed[-1], beliefs[-1]), "from the first belief on"
    assert torch.equal(states, hidden)


def test_a_board_without_masks_is_read_the_same_in_every_pass() -> None:
    _, model = recurrent(3)
    first, second, third = model.passes(tokens(4, 6, 5))[0]
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_the_gradient_of_the_last_pass_reaches_the_first() -> None:
    """Only the first pass sees the mask's embedding, and only later ones the table of symbols at masked positions."""
    _, model = recurrent(2)
    blank = torch.full((2, 6), 5)
    model.passes(blank)[0][-1][..., 0].sum().backward()
    gradient = model.symbols.weight.grad.abs().sum(1)
    assert gradient[5] > 0, "through the belief"
    assert (gradient[:5] > 0).all()
    model.zero_grad()
    model.passes(blank)[0][0][..., 0].sum().backward()
    assert (model.symbols.weight.grad[:5] == 0).all()


def test_a_reader_copied_from_a_recurrent_denoiser_goes_on_where_it_stopped() -> None:
    _, model = recurrent(2)
    reader = Reader(5, GRID, 16, 2, 4, num_passes=2)
    reader.copy_from(model)
    x = tokens(4, 6, 6)
    masked = x == 5
    beliefs, _ = model.passes(x, num_passes=4)
    read, _ = reader(reader.embed(x, masked), beliefs[1].exp(), masked)
    torch.testing.assert_close(read, beliefs[2:])


@pytest.mark.parametrize(
    "settings",
    [{"num_passes": 0}, {"noise": "uniform"}, {"block_length": 2}, {"order": "positions"}, {"order": "context"}],
)
def test_several_passes_are_refused_where_they_make_no_sense(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="num_passes must be at least 1, and 1 with uniform noise, an order or blocks"):
        Backbone(5, GRID, 16, 1, 2, **{"num_passes": 2, **settings})


@pytest.mark.parametrize(("hidden_dim", "size"), [(64, 1.0), (1024, 30.0)])
def test_hidden_states_begin_as_large_as_the_embeddings_that_they_are_added_to(hidden_dim: int, size: float) -> None:
    """Of any number of channels and any size: larger ones would drown the symbols."""
    torch.manual_seed(0)
    reader, masked = Reader(9, [[i] for i in range(16)], 32, 1, 4, hidden_dim=hidden_dim), torch.ones(8, 16) > 0
    with torch.no_grad():
        known = reader.embed(None, masked, size * torch.randn(8, 16, hidden_dim)) - reader.positions()
        symbols = reader.symbols(torch.arange(9))
    assert float(known.std()) == pytest.approx(float(symbols.std()), rel=0.2)
