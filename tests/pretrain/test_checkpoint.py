"""Files: what is written comes back exactly, and whatever is not a checkpoint is refused in one line."""

import json
import math
import os
import shutil
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.backbone import Backbone
from pretrain.checkpoint import (
    PACKAGED_DENOISERS,
    CheckpointError,
    load_model,
    load_state,
    packaged,
    save_model,
    save_state,
    step_generator,
)
from tasks import UnknownNameError, UnmaskError

COORDINATES = [[0, 0], [0, 1], [1, 0], [1, 1]]


def tiny(seed: int = 0, **sizes: int) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(3, COORDINATES, **{"dim": 8, "layers": 1, "heads": 2, **sizes})


def load(name: str | Path) -> Backbone:
    return load_model(Backbone, name, PACKAGED_DENOISERS, "denoiser")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint, for tests to damage."""
    save_model(tiny(), tmp_path / "model")
    return tmp_path / "model"


def assert_one_line(caught: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# ---------------------------------------------------------------------- models
def test_a_model_comes_back_exactly(tmp_path):
    model = tiny()
    save_model(model, tmp_path / "a" / "b")
    loaded = load(tmp_path / "a" / "b")
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[key], value)
    x = torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b"]
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_half_precision_rounds_to_float16_and_loads_as_float32(tmp_path):
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_model(model, tmp_path / "half", half=True)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = load(tmp_path / "half").state_dict()
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), "saving leaves the model as it was"
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], value.half().float())
        torch.testing.assert_close(loaded[key], value, rtol=2**-11, atol=2**-24)
    assert any(not torch.equal(loaded[key], before[key]) for key in before)


def test_saving_again_replaces_the_model(folder):
    other = tiny(seed=1, dim=16)
    save_model(other, folder)
    assert torch.equal(load(folder).head.weight, other.head.weight)


def test_a_saved_model_is_what_the_hub_mixin_reads(folder):
    assert torch.equal(Backbone.from_pretrained(folder).head.weight, tiny().head.weight)


@pytest.mark.parametrize("name", packaged(PACKAGED_DENOISERS))
def test_packaged_denoisers_load_by_name(name):
    model = load(name)
    if model.noise == "mask":
        logits = model(torch.full((1, model.length), model.mask_id)).logits
    else:
        noise = model.process.noise(1, torch.Generator().manual_seed(0))
        logits = model(noise, torch.tensor([[0.5]]), torch.ones_like(noise, dtype=torch.bool)).logits
    assert logits.shape == (1, model.length, model.vocab_size)
    assert torch.isfinite(logits).all()


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    save_model(tiny(), tmp_path / "one")
    save_model(tiny(), tmp_path / "two")
    assert packaged(tmp_path) == ["one", "two"]
    with pytest.raises(UnknownNameError) as caught:
        load_model(Backbone, "three", tmp_path, "denoiser")
    assert_one_line(caught, "unknown denoiser 'three'; known: one, two")


@pytest.mark.parametrize("name", ["{tmp}/nowhere", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_missing_folder(tmp_path, name):
    name = name.format(tmp=tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(name)
    assert_one_line(caught, f"no denoiser at {name}: the folder does not exist")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file(folder, file):
    (folder / file).unlink()
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert_one_line(caught, str(folder), f"{file} is missing")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert_one_line(caught, str(path), "truncated or not safetensors")


def test_a_pickle_is_not_read(folder):
    torch.save(tiny().state_dict(), folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert_one_line(caught, "truncated or not safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b"vocab_size: 3\ndim: 8\n", b"\xff\xfe\x00\x01"])
def test_a_config_that_is_not_json(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    said = f"cannot read {folder}/config.json as UTF-8" if content[:1] == b"\xff" else "config.json is not JSON"
    assert_one_line(caught, said)


@pytest.mark.parametrize(
    "config",
    [
        [],
        "text",
        {},
        {"architectures": ["BertModel"], "hidden_size": 8},
        {"vocab_size": "three", "coordinates": COORDINATES},
        {"vocab_size": 3, "coordinates": []},
        {"vocab_size": 3, "coordinates": [[0, 0], [1]]},
        {"vocab_size": -3, "coordinates": COORDINATES},
    ],
)
def test_a_config_of_another_kind(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert_one_line(caught, str(folder), "no denoiser")


@pytest.mark.parametrize("changed", [{"dim": 16}, {"layers": 2}, {"vocab_size": 4}, {"coordinates": COORDINATES[:2]}])
def test_tensors_that_do_not_match_the_config(folder, changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert_one_line(caught, str(folder), "tensor", "differs")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_missing_and_extra_tensors(folder, change):
    stored = load_file(folder / "model.safetensors")
    if change == "missing":
        del stored["head.bias"]
    else:
        stored["surprise"] = torch.zeros(1)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert_one_line(caught, "head.bias" if change == "missing" else "surprise")


# ---------------------------------------------------------------------- the hub, from its cache, without a network
@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline hub cache that holds the snapshot of ``owner/name``; the snapshot's folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repository, revision = tmp_path / "hub" / "models--owner--name", "0" * 40
    snapshot = repository / "snapshots" / revision
    save_model(tiny(), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return snapshot


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"layers": ' + "1" * 5000 + "}", "{" * 3000, '{"a":' * 100_000, "\ud800", "NaN"],
    ids=["brackets", "digits", "braces", "deep", "surrogate", "number"],
)
def test_a_config_beyond_reading(folder, content):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert_one_line(caught, str(folder / "config.json"))


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 10**6},
        {"layers": -1},
        {"layers": None},
        {"layers": True},
        {"layers": 1.5},
        {"dim": 10**9},
        {"dim": 2**80},
        {"vocab_size": 10**12},
        {"heads": 0},
        {"heads": 1.0},
        {"num_passes": 1.5},
        {"coordinates": [[10**15, 0]] * 4},
        {"coordinates": None},
        {"coordinates": [[0], [0, 1]]},
        {"coordinates": [["a", "b"]]},
        {"num_passes": 10**9},
        {"order": {}},
        {"fingerprint": []},
    ],
    ids=str,
)
def test_crafted_sizes_are_refused_at_once(folder, change):
    """Nothing of such a size is ever made."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    started = time.perf_counter()
    if change == {"fingerprint": []} or change == {"layers": True}:  # what they say fits
        load(folder)
    else:
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert_one_line(caught, "denoiser")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "weight",
    [torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(3), torch.tensor(True), torch.tensor(1 + 1j)],
    ids=["nan", "infinite", "integers", "bools", "complex"],
)
def test_weights_that_are_no_finite_numbers(folder, weight):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = weight.expand(weights[name].shape).contiguous()
    save_file(weights, path)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert_one_line(caught, name, "finite")


def test_a_model_on_the_hub(hub):
    loaded = load("owner/name")
    assert not loaded.training
    assert torch.equal(loaded.head.weight, tiny().head.weight)


def test_a_model_that_is_not_on_the_hub(hub):
    with pytest.raises(CheckpointError) as caught:
        load("owner/other")
    assert_one_line(caught, "no denoiser at owner/other", "not a folder")
    with pytest.raises(CheckpointError) as caught:
        load("runs/no spaces")
    assert_one_line(caught, "no denoiser at runs/no spaces")


def test_a_hub_model_without_safetensors_is_refused_even_if_it_has_a_pickle(hub):
    (hub / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), hub / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        load("owner/name")
    assert_one_line(caught, "owner/name")


def test_a_hub_model_with_other_tensors_is_refused(hub):
    stored = load_file(hub / "model.safetensors")
    del stored["head.weight"]
    save_file(stored, hub / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load("owner/name")
    assert_one_line(caught, "head.weight")


def test_a_hub_model_of_another_kind_is_refused(hub):
    (hub / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(CheckpointError) as caught:
        load("owner/name")
    assert_one_line(caught, "no denoiser")


# ---------------------------------------------------------------------- training states
def trained(steps: int, model: Backbone, optimizer: torch.optim.Optimizer) -> None:
    for step in range(steps):
        x = torch.randint(0, 4, (5, 4), generator=step_generator("cpu", 0, step))
        optimizer.zero_grad()
        model(x).logits.square().mean().backward()
        optimizer.step()


def assert_same(one: object, other: object) -> None:
    """Equal types, keys and values; tensors to the bit; tuples are read back as lists."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert type(one) is type(other)
        assert one == other or (math.isnan(one) and math.isnan(other))


def test_nested_states_come_back_to_the_bit(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "tensors": {
            "shared": [shared, shared, shared[2:]],
            "not contiguous": torch.arange(6).view(2, 3).T,
            "specials": torch.tensor([math.nan, math.inf, -0.0, 1e-45]),
            "bfloat16": torch.tensor([1.1, 2.2]).bfloat16(),
            "float64": torch.tensor(1 / 3, dtype=torch.float64),
            "bool": torch.tensor([True, False]),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "empty": torch.zeros(0, 3),
        },
        "integer keys": {0: {"step": torch.tensor(3.0)}, 17: "x", -1: None},
        "plain": [1, 2.5, 0.1 + 0.2, "text", True, None, math.inf, math.nan, [], {}],
        "named like the format": {"tensor": "0", "pairs": [], "list": {}, "value": {"value": 1}},
    }
    save_state(tmp_path / "state.safetensors", state)
    assert_same(state, load_state(tmp_path / "state.safetensors"))


def test_a_state_without_tensors(tmp_path):
    save_state(tmp_path / "s", {"step": 3})
    assert load_state(tmp_path / "s") == {"step": 3}


def test_adamw_goes_on_exactly_from_its_saved_state(tmp_path):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(3, model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_state(tmp_path / "state", state)
    loaded = load_state(tmp_path / "state")
    assert_same(state, loaded)
    assert set(loaded["optimizer"]["state"]) == set(range(len(list(model.parameters()))))

    other = tiny(seed=5)
    resumed = torch.optim.AdamW(other.parameters(), lr=1.0)
    other.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    trained(3, model, optimizer)
    trained(3, other, resumed)
    assert_same(model.state_dict(), other.state_dict())
    assert_same(optimizer.state_dict()["state"], resumed.state_dict()["state"])


def test_a_saved_state_does_not_follow_the_live_tensors(tmp_path):
    weight = torch.ones(3)
    save_state(tmp_path / "s", {"weight": weight})
    weight.zero_()
    assert load_state(tmp_path / "s")["weight"].tolist() == [1, 1, 1]


def test_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_state(tmp_path / "none")
    assert_one_line(caught, "nothing to resume", str(tmp_path / "none"))


def test_saving_writes_to_one_name_that_the_next_save_takes_over(tmp_path):
    """Whatever the moment of a kill, nothing is left for ever: no file with a name of its own is written."""
    seen: set[str] = set()
    saved = threading.Event()

    def watch() -> None:
        while not saved.is_set():
            seen.update(path.name for path in tmp_path.iterdir())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        save_state(tmp_path / "state", {"a": torch.zeros(4_000_000)})
    saved.set()
    watcher.join()
    assert seen <= {"state", ".state.tmp"}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_state(tmp_path, keep):
    path = tmp_path / "state"
    save_state(path, {"a": torch.arange(100.0), "b": {1: torch.ones(3)}})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError) as caught:
        load_state(path)
    assert_one_line(caught, f"{path} is truncated or not a training state")


def test_foreign_states(folder, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copy(folder / "model.safetensors", foreign)
    with pytest.raises(CheckpointError) as caught:
        load_state(foreign)
    assert_one_line(caught, f"{foreign} is a safetensors file but not a training state")
    foreign.write_text(json.dumps({"step": 3}))
    with pytest.raises(CheckpointError) as caught:
        load_state(foreign)
    assert_one_line(caught, "not a training state")
    torch.save({"step": 3}, foreign)
    with pytest.raises(CheckpointError):
        load_state(foreign)
    save_file({"a": torch.ones(1)}, foreign, metadata={"unmask_state": json.dumps({"odd": 1})})
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(foreign)


@pytest.mark.parametrize(
    "packed",
    [
        "[" * 100000,
        "1" * 5000,
        '{"pairs": [[1]]}',
        '{"pairs": "xx"}',
        '{"pairs": [[[], {"value": 1}]]}',
        "[]",
        "null",
        '{"tensor": "9"}',
        '{"tensor": []}',
        '{"list": 3}',
        "{}",
    ],
)
def test_states_whose_description_is_damaged(packed, tmp_path):
    save_file({"0": torch.ones(2)}, tmp_path / "state.safetensors", {"unmask_state": packed})
    with pytest.raises(CheckpointError) as caught:
        load_state(tmp_path / "state.safetensors")
    assert_one_line(caught, "training state")


def test_checkpoint_errors_are_the_users_errors():
    assert issubclass(CheckpointError, UnmaskError)


# ---------------------------------------------------------------------- generators
def test_a_step_generator_depends_on_its_key_alone():
    def draws(*key: int) -> list[float]:
        return torch.rand(4, generator=step_generator("cpu", *key)).tolist()

    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 2, 3), (3, 2, 1), (12, 3, 0), (1, 23, 0), (2**40, 0, 0)]
    streams = {key: draws(*key) for key in keys}
    assert len({tuple(stream) for stream in streams.values()}) == len(keys)
    torch.rand(100)  # the global generator plays no part
    for key in reversed(keys):
        assert draws(*key) == streams[key]
    seeds = {step_generator("cpu", seed, step, 0).initial_seed() for seed in range(30) for step in range(100)}
    assert len(seeds) == 3000


def test_a_folder_whose_name_is_not_utf8_is_told(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shutil.copytree(PACKAGED_DENOISERS / "sudoku4", odd)
    with pytest.raises(CheckpointError, match="whose name is not UTF-8; rename it"):
        load_model(Backbone, odd, PACKAGED_DENOISERS, "denoiser")
