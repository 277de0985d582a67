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

import argparse
import ast
import itertools
import re
from pathlib import Path
from typing import Any

import torch
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
ACIDS = [
    "C",
    "CC",
    "CCC",
    "CCCC",
    "CC(C)",
    "CC(C)(C)",
    "CCCCC",
    "c1ccccc1",
    "Cc1ccccc1",
    "Cc1ccc(cc1)",
    "COc1ccc(cc1)",
    "Clc1ccc(cc1)",
    "Fc1ccc(cc1)",
    "Brc1ccc(cc1)",
    "c1ccncc1",
    "c1ccoc1",
    "c1ccsc1",
    "C1CCCCC1",
    "C1CC1",
]
AMINES = ["C", "CC", "CCC", "CCCC", "C(C)C", "Cc1ccccc1", "c1ccccc1", "CCO", "CCOC", "C1CCCCC1", "C1CC1", "CC(F)(F)F"]
ALCOHOLS = ["C", "CC", "CCC", "CCCC", "C(C)C", "Cc1ccccc1", "CCOC", "CC(C)C", "C1CCCCC1", "CC=C"]


def v_genes(packages: Path) -> dict[str, list[str]]:
    """Per human V gene of all chains its alleles, with tabs around the loops (CDRs), those of new loops alone."""
    text = (packages / "abnumber" / "germlines.py").read_text(encoding="utf-8")
    tree = next(
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "HUMAN_IMGT_IG_V"  # type: ignore[attr-defined]
    )
    genes: dict[str, list[str]] = {}
    seen = set()
    for chain in ast.literal_eval(tree.value).values():
        loops = [
            any(int(re.findall("[0-9]+", position)[0]) in loop for loop in LOOPS) for position in chain["positions"]
        ]
        for allele, gapped in sorted(chain["aligned_sequences"].items()):
            residues = [pair for pair in zip(gapped, loops, strict=True) if pair[0] != "-"]
            parts = ["".join(letter for letter, _ in part) for _, part in itertools.groupby(residues, lambda p: p[1])]
            if tuple(parts[1::2]) not in seen:
                seen.add(tuple(parts[1::2]))
                genes.setdefault(allele.partition("*")[0], []).append("\t".join(parts))
    return genes


def reactions() -> list[str]:
    """``acid.amine>>amide`` and ``acid.alcohol>>ester`` as SMILES, acid by acid."""
    found = []
    for acid, amine in itertools.product(ACIDS, AMINES):
        found.append(f"OC(=O){acid}.N{amine}>>O=C(N{amine}){acid}")
    for acid, alcohol in itertools.product(ACIDS, ALCOHOLS):
        found.append(f"OC(=O){acid}.O{alcohol}>>O=C(O{alcohol}){acid}")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(MODELS))
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="where pip put them")
    parser.add_argument("--hide", type=float, default=None, help="share of the tokens, of antibodies of their loops'")
    parser.add_argument("--train-hide", type=float, default=None, help="the same in training; default: as --hide")
    parser.add_argument("--instances", type=int, default=300, help="drawn for the table, each kept once")
    parser.add_argument("--train-instances", type=int, default=300, help="played to collect states")
    parser.add_argument("--steps", type=int, default=150, help="of imitation; 0: UPO starts at --reference")
    parser.add_argument("--reference", help="of UPO, as in softmax_margin:tau=0.3")
    parser.add_argument("--iterations", type=int, default=10, help="of UPO")
    parser.add_argument("--puzzles", type=int, default=4, help="groups per iteration")
    parser.add_argument("--batch", type=int, default=64, help="states per step of imitation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/sequences"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = args.packages / MODELS[args.kind]
    if not folder.exists():
        raise UnmaskError(f"{folder} is missing; the pip command is in this file's first lines")
    if args.kind == "antibodies":
        genes, tokenizer = list(v_genes(args.packages).values()), tokenizer_of(folder.parent / "vocab.txt", RESIDUE)
        known = [line for gene in genes[::3] for line in gene]
        new = [line for i, gene in enumerate(genes) if i % 3 for line in gene]
    else:
        folder = next(path for path in folder.iterdir() if path.is_dir())
        lines, tokenizer = reactions(), tokenizer_of(folder / "vocab.txt", ATOM)
        known, new = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    hide = HIDE[args.kind] if args.hide is None else args.hide
    length = Lines(known + new, tokenizer).length
    task = Lines(known, tokenizer, length, hide if args.train_hide is None else args.train_hide)
    other = Lines(new, tokenizer, length, hide)
    task.name = other.name = args.kind
    denoiser = HFDenoiser(folder, task, hidden=True)
    instances = distinct(other.sample(args.instances, torch.Generator().manual_seed(2**31)))
    process = Unmasking(task, denoiser)
    orders: dict[str, Policy] = {name: evaluate.load_order(name, task, denoiser) for name in ORDERS}
    for seed in args.seeds:
        first, second = (args.runs / f"{args.kind}-{seed}" / stage for stage in ("imitation", "upo"))
        shared: dict[str, Any] = {"seed": seed, "threads": args.threads}
        shape = PolicyConfig(copy=False, layers=2, read_hidden=True, defer_above=2.0)
        if args.steps > 0:
            imitate = imitation.ImitationConfig(
                out=str(first),
                puzzles=args.train_instances,
                steps=args.steps,
                batch=args.batch,
                policy=shape,
                resume="auto",
                **shared,
            )
            imitation.train(imitate, process)
        practise = upo.UPOConfig(
            out=str(second),
            init=str(first) if args.steps > 0 else None,
            reference=args.reference,
            policy=shape,
            iterations=args.iterations,
            puzzles=args.puzzles,
            replay_fraction=0.0,
            resume="auto",
            **shared,
        )
        orders[f"UPO, seed {seed}"] = upo.train(practise, process)
    results = evaluate.compare(process, orders, instances, batch=50, progress=True)
    best = max(
        (result for result in results[: len(ORDERS)] if result.order != "oracle"),
        key=lambda result: float(result.solved.mean()),
    )
    report(
        args.out,
        lines={"train": len(known), "test": len(new)},
        parameters={"denoiser": parameter_count(denoiser.model)},
        best_heuristic=best.order,
        rows=[result.row() for result in results],
        learned_minus_best={r.order: evaluate.paired_difference(r.solved, best.solved) for r in results[len(ORDERS) :]},
    )
    Console().print(evaluate.table(results, f"{args.kind}, {len(instances)} sequences, best heuristic {best.order}"))


if __name__ == "__main__":
    main()
