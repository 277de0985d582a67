"""benchmarks/speed.py at a tiny size: what it counts, and that its computed work is that of a counter."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers", reason="needs the extra text")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import cache  # noqa: E402
import memory  # noqa: E402
import speed  # noqa: E402

from unmask_env.denoiser import load_denoiser  # noqa: E402
from unmask_env.families import FAMILIES, configure  # noqa: E402
from unmask_env.process import Unmasking  # noqa: E402
from unmask_env.state import Rules  # noqa: E402

SMALL = {"vocab_size": 300, "embedding_size": 300, "mask_token_id": 299, "d_model": 32, "n_layers": 2, "n_heads": 4}
SMALL = memory.PUBLISHED | SMALL | {"n_kv_heads": 4, "mlp_hidden_size": 48}


@pytest.mark.slow
def test_every_rule_with_every_cache(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = {"vocab_size": 300, "prompt": 8, "answer": 8, "block": 4, "width": 32, "layers": 1, "repeats": 1}
    found = speed.main(**sizes, out=tmp_path / "speed.json")
    assert "random weights: the text that is timed means nothing" in capsys.readouterr().out
    assert (tmp_path / "speed.json").is_file()
    rows = {(row["order"], row["cache"]): row for row in found["rows"]}
    assert rows.keys() == {(order, name) for order in (*speed.RULES, "policy") for name in speed.CACHES}
    for row in rows.values():
        assert row["tokens_per_forward"] == round(8 / row["forwards"], 2)
        assert row["tokens_per_cpu_second"] > 0
        assert row["of_bare"] > 0
        assert row["bare_forward_ms"] > 0 <= row["deciding_ms"]
    assert all(rows["fixed_k:k=4,score=confidence", name]["forwards"] == 2 for name in speed.CACHES)
    shares = found["llada_8b_computed_not_measured"]["768 positions"]
    assert 0 < shares["policy_share_none"] < shares["policy_share_dual"] < 0.01


def test_the_computed_work_is_what_a_counter_counts(tmp_path: Path) -> None:
    """A forward of the whole, and with ``dual`` one of the block alone, of which two masks are filled. What the process
    adds, such as angles of positions, is below a thousandth of it."""
    plan = speed.planned(24, 8, SMALL)
    model = transformers.LlamaForCausalLM(configure(FAMILIES["llada"], SMALL, "llada"))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=cache.COUNTED) as counter:
        model.lm_head(model.base_model(torch.zeros(1, 24, dtype=torch.long)).last_hidden_state[:, -8:])
    assert plan["denoiser_none"] == counter.get_total_flops() / 1e9

    speed.checkpoint(tmp_path, SMALL)
    task = speed.Continued(299, 16, 8)
    process = Unmasking(task, load_denoiser(f"hf:{tmp_path},cache=dual", task), Rules("set", block_length=8))
    state = process.reset(task.sample(1, torch.Generator().manual_seed(0)))
    seen = process.observe(state)
    state, _ = process.step(state, seen, speed.reference("fixed_k:k=2,score=confidence")(seen).mode())
    with FlopCounterMode(display=False, custom_mapping=cache.COUNTED) as counter:
        process.observe(state)
    filled = 2 * 2 * SMALL["d_model"] * SMALL["vocab_size"]
    twice = 4 * 8 * 8 * SMALL["d_model"] * SMALL["n_layers"]  # attention masks the block's old keys, but counts them
    assert counter.get_total_flops() == pytest.approx(1e9 * plan["denoiser_dual"] - filled + twice, rel=1e-3)


def test_the_bare_forwards_are_those_of_the_process(tmp_path: Path) -> None:
    speed.checkpoint(tmp_path, SMALL)
    task = speed.Continued(299, 16, 8)
    process = Unmasking(task, load_denoiser(f"hf:{tmp_path}", task), Rules("set", block_length=4))
    instances = task.sample(1, torch.Generator().manual_seed(0))
    played = process.rollout(speed.reference("fixed_k:k=2,score=confidence"), instances, record=True)
    counts = []
    for run in (
        speed.bare_forwards(process, [step.observation for step in played.steps]),
        lambda: process.rollout(speed.reference("fixed_k:k=2,score=confidence"), instances),
    ):
        with FlopCounterMode(display=False, custom_mapping=cache.COUNTED) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(counts[1], rel=1e-3)
