"""Model cards, read back with the hub's own reader; only the wire to the hub is cut."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import save_file

from agents import imitation, upo
from agents.cli import main
from agents.evaluate import interval, paired_difference
from agents.imitation import ImitationConfig
from agents.policy import OrderPolicy, PolicyConfig, load_policy
from agents.remask_policy import RemaskPolicy
from agents.upo import UPOConfig
from pretrain.backbone import Backbone
from pretrain.card import MARK
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model, save_model
from tasks import UnmaskError
from tests.agents.test_setup import Misled
from unmask_env import make_process
from unmask_env.denoiser import TableDenoiser
from unmask_env.process import Unmasking
from unmask_env.reference import MaxConfidence

SHAPE = PolicyConfig(copy=False, dim=16, layers=1, defer_above=2.0, num_passes=2)
MISLED = Unmasking(Misled(), TableDenoiser(Misled().joint))
TINY = ["--threads", "1", "--iterations", "1", "--puzzles", "2", "--group", "2", "--minibatches", "1"]


def upo_config(out: Path, **changes: object) -> UPOConfig:
    sizes = {"puzzles": 8, "group": 4, "iterations": 12, "imitation": 0, "lr": 3e-2, "beta": 0.0, "threads": 1}
    return UPOConfig(out=str(out), policy=SHAPE, validation_puzzles=10, **sizes | changes)


def rows(card: ModelCard) -> dict[str, str]:
    """The table of facts."""
    lines = [line for line in card.text.splitlines() if line.startswith("| ") and line.count("|") == 3]
    return dict(line.strip("| ").split(" | ") for line in lines if not line.startswith("| |"))


def settings(card: ModelCard) -> dict[str, object]:
    return json.loads(card.text.partition("```json\n")[2].partition("\n```")[0])


def result(card: ModelCard, name: str) -> list[str]:
    (line,) = [line for line in card.text.splitlines() if line.startswith(f"| {name} |")]
    return line.strip("| ").split(" | ")[1:]


# ---------------------------------------------------------------------- what a run writes
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command, on 6x6 Sudoku."""
    out = tmp_path_factory.mktemp("cards") / "run"
    main(["train", "upo", "--denoiser", "sudoku6-tiny", "--out", str(out), "--validation-puzzles", "20", *TINY])
    return out


@pytest.mark.trains
def test_the_card_of_a_policy_from_the_command_line(run: Path) -> None:
    card = ModelCard.load(run / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "unmask")
    assert {"unmask", "decoding-order", "discrete-diffusion"} <= set(card.data.tags)
    process = make_process("sudoku6", denoiser="sudoku6-tiny")
    facts = rows(card)
    assert facts["task"] == "`sudoku6`"
    assert facts["denoiser"] == "`sudoku6-tiny`"
    assert facts["fingerprint of the denoiser's symbols"] == process.task.fingerprint
    assert facts["reference policy"] == "`softmax_confidence`"
    assert facts["learned from"] == "rewards"
    assert facts["made by"].startswith("upo sudoku6, ")
    assert (facts["seed"], facts["network passes"], facts["actions"]) == ("0", "2", "single")
    assert f"unmask train upo --denoiser sudoku6-tiny --out {run} --validation-puzzles 20" in card.text
    saved = json.loads((run / "run.json").read_text())
    assert settings(card) == {name: value for name, value in saved.items() if name in settings(card)}
    assert {"lr", "beta", "group", "iterations", "policy", "rules"} <= settings(card).keys()
    assert "pushed" not in card.text


@pytest.mark.trains
def test_the_results_are_those_of_the_policy(run: Path) -> None:
    card, policy = ModelCard.load(run / "README.md"), load_policy(run)
    process = make_process("sudoku6", denoiser="sudoku6-tiny")
    instances = process.task.heldout(20, "validation")
    played = {name: process.rollout(p, instances) for name, p in (("this policy", policy), ("r", MaxConfidence()))}
    solved = {name: process.task.metrics(one.tokens, instances)["solved"].double() for name, one in played.items()}
    mine, nfe = solved["this policy"], played["this policy"].nfe
    passes = played["this policy"].denoiser_passes + played["this policy"].policy_passes
    low, high = interval(mine)
    assert result(card, "this policy")[0] == f"{100 * float(mine.mean()):.1f} ({100 * low:.1f} to {100 * high:.1f})"
    assert result(card, "this policy")[2:] == [f"{float(x.double().mean()):.2f}" for x in (nfe, passes)]
    (evaluated,) = card.data.eval_results
    assert (evaluated.metric_type, evaluated.dataset_name) == ("solved", "sudoku6")
    assert evaluated.metric_value == float(mine.mean())
    mean, low, high = (100 * value for value in paired_difference(mine, solved["r"]))
    assert f"minus the reference softmax_confidence, by instance: {mean:+.1f} ({low:+.1f} to {high:+.1f})" in card.text


@pytest.mark.trains
def test_from_python_nothing_is_said_that_is_not_known(tmp_path: Path) -> None:
    """The process is given by hand, so the names in the settings are not its."""
    upo.train(upo_config(tmp_path / "run"), MISLED)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    facts = rows(card)
    assert facts["task"] == f"`{MISLED.task.name}`"
    assert "denoiser" not in facts
    assert card.data.license is None, "nobody knows the denoiser's"
    assert not {"env", "denoiser", "out"} & settings(card).keys()
    assert "```bash" not in card.text
    assert "Sudoku" not in card.text
    assert result(card, "the reference softmax_confidence")[0].startswith("0.0 ")
    assert result(card, "this policy")[0].startswith("100.0 ")


@pytest.mark.trains
def test_who_learned_from_both_says_so_and_where_it_began(tmp_path: Path) -> None:
    sizes = {"steps": 4, "batch": 8, "puzzles": 40, "policy": SHAPE, "threads": 1, "validate_every": 0}
    imitation.train(ImitationConfig(out=str(tmp_path / "taught"), **sizes), MISLED)
    card = ModelCard.load(tmp_path / "taught" / "README.md")
    assert (rows(card)["imitates"], rows(card)["learned from"]) == ("`oracle`", "imitation")
    assert "## Results" not in card.text, "it did not validate"
    upo.train(upo_config(tmp_path / "both", init=str(tmp_path / "taught")), MISLED)
    card = ModelCard.load(tmp_path / "both" / "README.md")
    assert rows(card)["learned from"] == "imitation, rewards"
    assert rows(card)["began from"] == f"`{tmp_path / 'taught'}`"
    assert "This policy minus the start, by instance" in card.text
    assert len(result(card, "the start")) == 4


@pytest.mark.trains
def test_a_finished_run_that_is_resumed_keeps_its_results(tmp_path: Path) -> None:
    upo.train(upo_config(tmp_path / "run"), MISLED)
    before = (tmp_path / "run" / "README.md").read_text()
    upo.train(upo_config(tmp_path / "run", resume="must"), MISLED)
    assert (tmp_path / "run" / "README.md").read_text() == before
    assert "## Results" in before


def test_the_card_of_a_denoiser(tmp_path: Path) -> None:
    small = ["--steps", "6", "--dim", "8", "--layers", "1", "--heads", "2", "--batch", "4", "--log-every", "3"]
    main(["pretrain", "mdm", "--task", "sudoku4", "--out", str(tmp_path / "d"), *small, "--threads", "1", "--half"])
    card = ModelCard.load(tmp_path / "d" / "README.md")
    model = load_model(Backbone, tmp_path / "d", PACKAGED_DENOISERS, "denoiser")
    facts = rows(card)
    assert (card.data.license, card.data.library_name) == ("mit", "unmask")
    assert facts["task"] == "`sudoku4`"
    assert facts["fingerprint of its symbols"] == model.fingerprint
    assert facts["objective"] == "`MDM`, 6 steps"
    assert facts["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert facts["stored in"] == "float16"
    assert facts["training loss when last logged, per pass"].endswith(" nats per position")
    assert f"unmask pretrain mdm --task sudoku4 --out {tmp_path / 'd'} --steps 6" in card.text


# ---------------------------------------------------------------------- saved again, and pushed
@pytest.mark.trains
def test_a_model_that_is_saved_as_it_was_loaded_keeps_its_card(run: Path, tmp_path: Path) -> None:
    policy = load_policy(run)
    policy.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_text() == (run / "README.md").read_text()
    with torch.no_grad():
        policy.head.belief_weight += 1
    policy.save_pretrained(tmp_path / "same")
    card = ModelCard.load(tmp_path / "same" / "README.md")
    assert "## Results" not in card.text
    assert "What made these weights was not recorded." in card.text
    assert rows(card)["learned from"] == "rewards"
    assert card.data.license is None


def test_packaged_models_have_cards_of_the_hubs_form(tmp_path: Path) -> None:
    policy = load_policy("sudoku6-tiny-rewards")
    save_model(policy, tmp_path / "half", half=True)
    policy.save_pretrained(tmp_path / "whole")
    for folder in ("half", "whole"):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert (card.data.license, card.data.library_name) == ("mit", "unmask")
        assert "it fails on 24, the best heuristic (entropy) on 75" in card.text


@pytest.mark.trains
def test_a_card_that_a_person_wrote_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    policy = load_policy(run)
    policy.save_pretrained(tmp_path)
    save_model(policy, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    load_policy(tmp_path).save_pretrained(tmp_path / "copy")  # it goes with the weights, with a front matter
    card = ModelCard.load(tmp_path / "copy" / "README.md")
    assert card.data.library_name == "unmask"
    assert card.text.strip() == f"{MARK}\n\n# Mine"
    load_policy(run).save_pretrained(tmp_path / "copy")
    assert "# Mine" not in (tmp_path / "copy" / "README.md").read_text()


@pytest.mark.trains
@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n# Mine\n", "---\nodd"])
def test_front_matter_that_cannot_be_read_is_not_carried_on(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    save_model(load_policy(run), tmp_path)
    load_policy(tmp_path).save_pretrained(tmp_path / "copy")
    assert ModelCard.load(tmp_path / "copy" / "README.md").data.library_name == "unmask"


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What would have been uploaded, by name."""
    files: dict[str, bytes] = {}

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, **_: object) -> str:
        files.update({f"{repo_id}/{file.name}": file.read_bytes() for file in Path(folder_path).iterdir()})
        return "commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: huggingface_hub.RepoUrl(f"me/{repo_id[3:]}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return files


def packaged_denoiser() -> Backbone:
    return load_model(Backbone, "sudoku4", PACKAGED_DENOISERS, "denoiser")


@pytest.mark.parametrize("load", [lambda: load_policy("sudoku6-tiny-sets-rewards"), packaged_denoiser])
def test_what_is_pushed(load: Callable, uploaded: dict[str, bytes], tmp_path: Path) -> None:
    model = load()
    model.push_to_hub("me/rule", model_card_kwargs={"license": "apache-2.0"})
    assert uploaded.keys() == {f"me/rule/{name}" for name in ("README.md", "config.json", "model.safetensors")}
    for name, content in uploaded.items():
        (tmp_path / Path(name).name).write_bytes(content)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "unmask")
    assert "has been pushed" not in card.content
    assert "| order |" in card.text or "held-out" in card.text
    again = type(model).from_pretrained(tmp_path)
    for mine, own in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, own)


@pytest.mark.trains
def test_a_run_is_pushed_with_its_card(run: Path, uploaded: dict[str, bytes]) -> None:
    load_policy(run).push_to_hub("me/rule")
    assert uploaded["me/rule/README.md"] == (run / "README.md").read_bytes()


@pytest.mark.trains
@pytest.mark.parametrize("kind", [OrderPolicy, RemaskPolicy, Backbone])
def test_pickles_and_missing_weights_are_refused(kind: type, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"model\.safetensors is missing"):
        kind._load_as_pickle(None, "pytorch_model.bin", "cpu", True)
    if kind is OrderPolicy:
        short = {key: value for key, value in load_policy(run).state_dict().items() if key != "head.belief_weight"}
        (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
        save_file(short, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match="belief_weight"):
            kind.from_pretrained(tmp_path)
