r"""Masked residues of antibodies and masked atoms of reactions, filled by models that others trained, in every order.

    pip install --no-deps --target runs/packages antiberty==0.1.3 abnumber==0.4.4 rxnmapper==0.4.3
    python benchmarks/sequences.py antibodies --steps 0 --reference softmax_margin:tau=0.3 --instances 1000 \
        --iterations 6 --out benchmarks/results/antibodies.json
    python benchmarks/sequences.py reactions --out benchmarks/results/reactions.json

Antibodies: AntiBERTy (26 M parameters; Ruffolo et al. 2021, arXiv 2112.07782) fills the loops that bind (CDR1, CDR2
and the gene's part of CDR3, all of them hidden) of the human V genes of IMGT that come with abnumber. Reactions:
RXNMapper's ALBERT (Schwaller et al. 2021) fills half of the tokens of amide couplings and esterifications, every acid
of a list with every amine and alcohol. Both packages' weights are read where pip put them and loaded without running
pickled code. An order policy, which sees the model's hidden states, imitates the oracle, or starts at a reference, and
then trains by UPO (reward: the share of hidden tokens that come back right) on a third of the genes or half of the
acids; the table is of the others.
"""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from common import report
from rich.console import Console

from agents import evaluate, imitation, upo
from agents.policy import PolicyConfig
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
SMILES = """C CC CCC CCCC CC(C) CC(C)(C) CCCCC c1ccccc1 Cc1ccccc1 Cc1ccc(cc1) COc1ccc(cc1) Clc1ccc(cc1) Fc1ccc(cc1)
    Brc1ccc(cc1) c1ccncc1 c1ccoc1 c1ccsc1 C1CCCCC1 C1CC1
    | C CC CCC CCCC C(C)C Cc1ccccc1 c1ccccc1 CCO CCOC C1CCCCC1 C1CC1 CC(F)(F)F
    | C CC CCC CCCC C(C)C Cc1ccccc1 CCOC CC(C)C C1CCCCC1 CC=C"""
ACIDS, AMINES, ALCOHOLS = (part.split() for part in SMILES.split("|"))


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


def reactions() -> list[str]:
    """``acid.amine>>amide`` and ``acid.alcohol>>ester`` as SMILES, acid by acid."""
    found = [f"OC(=O){acid}.N{amine}>>O=C(N{amine}){acid}" for acid, amine in itertools.product(ACIDS, AMINES)]
    found += [f"OC(=O){acid}.O{other}>>O=C(O{other}){acid}" for acid, other in itertools.product(ACIDS, ALCOHOLS)]
    return sorted(found, key=lambda line: ACIDS.index(re.match(r"OC\(=O\)(.*?)\.", line)[1]))


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


def distinct(instances: Instances) -> Instances:
    """Each of them once, where it came first."""
    rows = torch.cat([instances.tokens, instances.answers], 1).tolist()
    first = {tuple(row): i for i, row in reversed(list(enumerate(rows)))}
    return instances[torch.tensor(sorted(first.values()))]


def main(
    kind: tyro.conf.Positional[Literal["antibodies", "reactions"]],
    out: Path,
    packages: Path = Path("runs/packages"),
    hide: float | None = None,
    train_hide: float | None = None,
    instances: int = 300,
    train_instances: int = 300,
    steps: int = 150,
    reference: str | None = None,
    iterations: int = 10,
    puzzles: int = 4,
    batch: int = 64,
    seeds: tuple[int, ...] = (0, 1, 2),
    runs: Path = Path("runs/sequences"),
    threads: int | None = None,
) -> None:
    """Args:
    packages: where pip put them. hide: share of the tokens, of antibodies of their loops'. train_hide: the same in
        training. instances: drawn for the table, each kept once. train_instances: played to collect states. steps: of
        imitation; 0: UPO starts at ``reference``. iterations, puzzles: of UPO, and groups in each. batch: states per
        step of imitation.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    folder = packages / MODELS[kind]
    if not folder.exists():
        raise UnmaskError(f"{folder} is missing; the pip command is in this file's first lines")
    if kind == "antibodies":
        genes, tokenizer = list(v_genes(packages).values()), tokenizer_of(folder.parent / "vocab.txt", RESIDUE)
        known = [line for gene in genes[::3] for line in gene]
        new = [line for i, gene in enumerate(genes) if i % 3 for line in gene]
    else:
        folder = next(path for path in folder.iterdir() if path.is_dir())
        lines, tokenizer = reactions(), tokenizer_of(folder / "vocab.txt", ATOM)
        known, new = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    hide = HIDE[kind] if hide is None else hide
    length = Lines(known + new, tokenizer).length
    task = Lines(known, tokenizer, length, hide if train_hide is None else train_hide)
    other = Lines(new, tokenizer, length, hide)
    task.name = other.name = kind
    denoiser = HFDenoiser(folder, task, hidden=True)
    shown = distinct(other.sample(instances, torch.Generator().manual_seed(2**31)))
    process = Unmasking(task, denoiser)
    orders: dict[str, Policy] = {name: evaluate.load_order(name, task, denoiser) for name in ORDERS}
    shape = PolicyConfig(copy=False, layers=2, read_hidden=True, defer_above=2.0)
    for seed in seeds:
        first, second = (runs / f"{kind}-{seed}" / stage for stage in ("imitation", "upo"))
        shared: dict[str, Any] = {"seed": seed, "threads": threads, "resume": "auto", "policy": shape}
        if steps > 0:
            imitate = imitation.ImitationConfig(
                out=str(first), puzzles=train_instances, steps=steps, batch=batch, **shared
            )
            imitation.train(imitate, process)
        start = str(first) if steps > 0 else None
        played = {"iterations": iterations, "puzzles": puzzles}
        practise = upo.UPOConfig(out=str(second), init=start, reference=reference, **played, **shared)
        orders[f"UPO, seed {seed}"] = upo.train(practise, process)
    results = evaluate.compare(process, orders, shown, batch=50, progress=True)
    rivals = [result for result in results[: len(ORDERS)] if result.order != "oracle"]
    best = max(rivals, key=lambda result: float(result.solved.mean()))
    report(
        out,
        lines={"train": len(known), "test": len(new)},
        parameters={"denoiser": parameter_count(denoiser.model)},
        best_heuristic=best.order,
        rows=[result.row() for result in results],
        learned_minus_best={r.order: evaluate.paired_difference(r.solved, best.solved) for r in results[len(ORDERS) :]},
    )
    Console().print(evaluate.table(results, f"{kind}, {len(shown)} sequences, best heuristic {best.order}"))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
