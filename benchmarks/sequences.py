r"""Masked residues of antibodies and masked atoms of reactions, filled by models that others trained, in every order.

    pip install --no-deps --target runs/packages antiberty==0.1.3 abnumber==0.4.4 rxnmapper==0.4.3
    python benchmarks/sequences.py antibodies --instances 1000 --seeds --out benchmarks/results/antibodies.json
    python benchmarks/sequences.py reactions --labels boards --instances 150 \
        --out benchmarks/results/reactions-test.json

Antibodies: AntiBERTy (26 M parameters; Ruffolo et al. 2021, arXiv 2112.07782) fills the loops that bind (CDR1, CDR2
and the gene's part of CDR3, all of them hidden) of the human V genes of IMGT that come with abnumber. Reactions:
RXNMapper's ALBERT (Schwaller et al. 2021) fills half of the tokens of amide couplings and esterifications, every acid
of a list with every amine and alcohol. Both packages' weights are read where pip put them and loaded without running
pickled code. Rewarded is the share of hidden tokens that come back right. A policy of one narrow block, which sees the
model's hidden states, learns by policy iteration, once for each of ``--seeds``. The table has no acid, amine or alcohol
that was trained on; of antibodies a third of the genes is for training, and the table is of the others. Intervals are
over acids, or genes' sequences, drawn with replacement.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from common import report
from rich.console import Console
from torch import Tensor

from agents import evaluate, policy_iteration
from agents.belief import BeliefFills
from agents.policy import PolicyConfig
from agents.policy_iteration import PolicyIterationConfig
from pretrain.backbone import parameter_count
from tasks import Instances, Lines, UnmaskError
from unmask_env.language_models import HFDenoiser
from unmask_env.process import Unmasking
from unmask_env.reference import Policy

ORDERS = ("random", "left_to_right", "max_confidence", "margin", "entropy", "oracle")
MODELS = {"antibodies": "antiberty/trained_models/AntiBERTy_md_smooth", "reactions": "rxnmapper/models/transformers"}
HIDE = {"antibodies": 1.0, "reactions": 0.5}
LOOPS = (range(27, 39), range(56, 66), range(105, 118))  # CDR1, CDR2, CDR3 in IMGT's numbering
RESIDUE = r"[A-Z]"
ATOM = r"\[[^\]]+]|Br?|Cl?|>>|%[0-9]{2}|[NOSPFIbcnosp()\.=#\-+\\/:~@?>*$0-9]"  # RXNMapper's
SMILES = """C CC CCC CCCC CCCCC CCCCCC C(C)C C(C)(C)C CC(C)C CCC(C)C C1CC1 C1CCC1 C1CCCC1 C1CCCCC1 CC1CCCCC1 C1CCOCC1
    C=C C=CC CC=C COC CCOC CCl CBr C(F)(F)F CC#N c1ccccc1 Cc1ccccc1 CCc1ccccc1 c1ccc(C)cc1 c1ccc(OC)cc1 c1ccc(F)cc1
    c1ccc(Cl)cc1 c1ccc(Br)cc1 c1ccc(C#N)cc1 c1cccc(C)c1 c1cccc(Cl)c1 c1ccccc1C c1ccccc1F c1ccncc1 c1cccnc1 c1ccoc1
    c1ccsc1 c1ccco1 c1cccs1 c1ccc2ccccc2c1
    | C CC CCC CCCC C(C)C Cc1ccccc1 c1ccccc1 CCO CCOC C1CCCCC1 C1CC1 CC(F)(F)F
    | C CC CCC CCCC C(C)C Cc1ccccc1 CCOC CC(C)C C1CCCCC1 CC=C"""
ACIDS, AMINES, ALCOHOLS = (part.split() for part in SMILES.split("|"))
SPLITS = {"train": (0, 0, 2), "test": (1, 3, 4), "validation": (2, 1, 4)}  # of acids 3 i + a; of the others c i + b


def v_genes(packages: Path) -> dict[str, list[str]]:
    """Per human V gene of all chains its alleles, with tabs around the loops (CDRs), those of new loops alone."""
    text = (packages / "abnumber" / "germlines.py").read_text(encoding="utf-8")
    named = (node for node in ast.parse(text).body if isinstance(node, ast.Assign))
    tree = next(node for node in named if node.targets[0].id == "HUMAN_IMGT_IG_V")  # type: ignore[attr-defined]
    genes: dict[str, list[str]] = {}
    seen = set()
    for chain in ast.literal_eval(tree.value).values():
        numbers = [int(re.findall("[0-9]+", position)[0]) for position in chain["positions"]]
        loops = [any(number in loop for loop in LOOPS) for number in numbers]
        for allele, gapped in sorted(chain["aligned_sequences"].items()):
            residues = [pair for pair in zip(gapped, loops, strict=True) if pair[0] != "-"]
            parts = ["".join(letter for letter, _ in part) for _, part in itertools.groupby(residues, lambda p: p[1])]
            if tuple(parts[1::2]) not in seen:
                seen.add(tuple(parts[1::2]))
                genes.setdefault(allele.partition("*")[0], []).append("\t".join(parts))
    return genes


def reactions(split: str) -> list[str]:
    """``acid.amine>>amide`` and ``acid.alcohol>>ester`` as SMILES, in a mixed order; no molecule is in two splits."""
    first, second, stride = SPLITS[split]
    found = []
    for acid in ACIDS[first::3]:
        found += [f"OC(=O){acid}.N{amine}>>O=C(N{amine}){acid}" for amine in AMINES[second::stride]]
        found += [f"OC(=O){acid}.O{other}>>O=C(O{other}){acid}" for other in ALCOHOLS[second::stride]]
    return random.Random(0).sample(found, len(found))


def over_clusters(values: Tensor, clusters: Sequence[str]) -> tuple[float, float, float]:
    """The mean of ``values`` (n,), and its 95 % interval over clusters drawn with replacement."""
    names = sorted(set(clusters))
    member = torch.tensor([[name == cluster for cluster in clusters] for name in names], dtype=values.dtype)  # (G, n)
    sums, sizes = member @ values, member.sum(1)
    drawn = torch.randint(len(names), (10_000, len(names)), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return float(values.mean()), low, high


def tokenizer_of(vocabulary: Path, token: str) -> Any:
    import tokenizers
    import transformers

    words = vocabulary.read_text(encoding="utf-8").splitlines()
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(token), "isolated")
    ends = [("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))]
    plain.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def read(kind: str, packages: Path, split: str) -> tuple[Path, Any, list[str], list[str]]:
    """The folder of the model, its tokenizer, and the lines to train on and those of the table."""
    folder = packages / MODELS[kind]
    if not folder.exists():
        raise UnmaskError(f"{folder} is missing; the pip command is in this file's first lines")
    if kind == "reactions":
        folder = next(path for path in folder.iterdir() if path.is_dir())
        return folder, tokenizer_of(folder / "vocab.txt", ATOM), reactions("train"), reactions(split)
    genes = list(v_genes(packages).values())
    known = [line for gene in genes[::3] for line in gene]
    new = [line for i, gene in enumerate(genes) if i % 3 for line in gene]
    return folder, tokenizer_of(folder.parent / "vocab.txt", RESIDUE), known, new


def as_safetensors(folder: Path, into: Path) -> Path:
    """The model with its weights in the one form that denoisers are read from, converted once; transformers reads the
    old form without running what it pickles."""
    if not into.exists():
        transformers.AutoModelForMaskedLM.from_pretrained(folder, weights_only=True).save_pretrained(into)
        for file in [*folder.glob("*.txt"), *folder.glob("*token*.json")]:
            shutil.copy(file, into)
    return into


def clusters_of(kind: str, task: Lines, tokenizer: Any, shown: Instances) -> list[str]:
    """Of each instance its acid, or its whole sequence."""
    special = set(tokenizer.all_special_tokens)
    texts = ["".join(t for i in row if (t := task.symbols[i]) not in special) for row in shown.answers.tolist()]
    return [re.match(r"OC\(=O\)(.*?)\.", text)[1] for text in texts] if kind == "reactions" else texts


def distinct(instances: Instances) -> Instances:
    """Each of them once, where it came first."""
    rows = torch.cat([instances.tokens, instances.answers], 1).tolist()
    first = {tuple(row): i for i, row in reversed(list(enumerate(rows)))}
    return instances[torch.tensor(sorted(first.values()))]


def main(
    kind: tyro.conf.Positional[Literal["antibodies", "reactions"]],
    out: Path,
    packages: Path = Path("runs/packages"),
    split: Literal["test", "validation"] = "test",
    hide: float | None = None,
    instances: int = 300,
    iterations: int = 3,
    puzzles: int = 60,
    steps: int = 100,
    labels: Literal["boards", "values"] = "values",
    retries: int = 4,
    candidates: int = 6,
    levels: int = 3,
    dim: int = 32,
    passes: int = 1,
    seeds: tuple[int, ...] = (0, 1, 2),
    runs: Path = Path("runs/sequences"),
    threads: int | None = None,
) -> None:
    """Args:
    packages: where pip put them. split: of reactions. hide: share of the tokens, of antibodies of their loops'.
        instances: drawn for the table, each kept once. iterations, puzzles, steps, labels, retries, candidates, levels:
        of policy iteration. dim, passes: of the policy.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    folder, tokenizer, known, new = read(kind, packages, split)
    hide = HIDE[kind] if hide is None else hide
    length = Lines(known + new, tokenizer).length
    task, other = Lines(known, tokenizer, length, hide), Lines(new, tokenizer, length, hide)
    task.name = other.name = kind
    denoiser = HFDenoiser(as_safetensors(folder, runs / f"{kind}-model"), task, hidden=True)
    shown = distinct(other.sample(instances, torch.Generator().manual_seed(2**31)))
    clusters = clusters_of(kind, other, tokenizer, shown)
    process = Unmasking(task, denoiser)
    orders: dict[str, Policy] = {name: evaluate.load_order(name, task, denoiser) for name in ORDERS}
    shape = PolicyConfig(copy=False, dim=dim, layers=1, num_passes=passes, read_hidden=True)
    policy = None
    for seed in seeds:
        folder = runs / f"{kind}-{seed}"
        shared: dict[str, Any] = {"out": str(folder), "seed": seed, "threads": threads, "resume": "auto"}
        shared |= {"iterations": iterations, "puzzles": puzzles, "steps": steps, "validate_every": 0}
        shared |= {"labels": labels, "levels": levels}
        shared |= {"retries": retries} if labels == "boards" else {"candidates": candidates}
        policy = policy_iteration.train(PolicyIterationConfig(policy=shape, **shared), process)
        orders |= {f"its belief fills, seed {seed}": BeliefFills(policy), f"learned, seed {seed}": policy}
    results = evaluate.compare(process, orders, shown, batch=50, progress=True)
    rivals = [result for result in results[: len(ORDERS)] if result.order != "oracle"]
    best = max(rivals, key=lambda result: float(result.solved.mean()))
    report(
        out,
        split=split,
        lines={"train": len(known), split: len(new)},
        clusters=len(set(clusters)),
        parameters={"denoiser": parameter_count(denoiser.model), "policy": parameter_count(policy) if policy else 0},
        best_heuristic=best.order,
        rows=[result.row() | {"over_clusters": over_clusters(result.solved, clusters)} for result in results],
        minus_best={r.order: over_clusters(r.solved - best.solved, clusters) for r in results if r is not best},
    )
    Console().print(evaluate.table(results, f"{kind}, {len(shown)} sequences, best heuristic {best.order}"))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
