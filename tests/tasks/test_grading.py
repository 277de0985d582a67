"""Grading in processes of their own: right answers in every form, what would hang or run, and the processes' lives."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks import UnmaskError, grading
from tasks.grading_worker import _arithmetic_alone

math_verify = pytest.importorskip("math_verify")
pytestmark = pytest.mark.slow  # each test starts processes, or waits for a deadline

WAYS = {
    "marked": "48 / 2 = 24 and so on.\n#### {}",
    "bold": "#### **{}**",
    "boxed": "Thus we get $\\boxed{{{}}}$.",
    "alone": "{}",
    "formula": "The answer is ${}$.",
    "display": "Hence\n\\[\nx = \\boxed{{{}}}\n\\]",
    "final": "Final Answer: The final answer is ${}$. I hope it is correct.",
    "parentheses": "so it is \\({}\\)",
}


def golds(seed: int = 0) -> list[str]:
    """Some 300 answers in the forms of MATH and GSM8K."""
    draw = random.Random(seed)

    def n(low: int = 2, high: int = 99) -> int:
        return draw.randint(low, high)

    forms = [
        lambda: f"{n()}",
        lambda: f"-{n()}",
        lambda: f"{n(1000, 999999)}",
        lambda: f"{n()}.{n(10)}",
        lambda: f".{n(10)}",
        lambda: f"{n(1, 9)},{n(100, 999)}",
        lambda: f"{n(1, 9)},\\!{n(100, 999)}",
        lambda: f"\\frac{{{n()}}}{{{n()}}}",
        lambda: f"-\\dfrac{{{n()}}}{{{n()}}}",
        lambda: f"\\frac{n(1, 9)}{n(2, 9)}",
        lambda: f"\\frac{{\\sqrt{{{n()}}}}}{{{n()}}}",
        lambda: f"{n()}\\sqrt[3]{{{n()}}}",
        lambda: f"\\frac{{{n()}\\pi}}{{{n()}}}",
        lambda: f"(-{n()}, {n()})",
        lambda: f"\\left( {n()}, \\frac{{\\pi}}{{{n()}}} \\right)",
        lambda: f"[{n(1, 9)},{n(10)}]",
        lambda: f"(-\\infty,{n(1, 9)})\\cup({n(10)},\\infty)",
        lambda: f"{n()}x^2+{n()}x+{n()}",
        lambda: f"-{n()}x^{n(3, 9)} + x^2 - {n()}",
        lambda: f"x^{n(2, 9)}y^{n(2, 9)}",
        lambda: f"(x-{n()})(x+{n()})",
        lambda: f"\\frac{{x+{n()}}}{{x-{n()}}}",
        lambda: f"{n(2, 9)}^{{{n(1000, 3000)}}}",
        lambda: f"2^{{{n(2, 9)}^{{{n(2, 3)}}}}}",
        lambda: f"{n()}+{n()}i",
        lambda: f"{n()}^\\circ",
        lambda: f"{n()}\\%",
        lambda: f"\\${n()}.{n(10)}",
        lambda: f"\\text{{({draw.choice('ABCDE')})}}",
        lambda: f"\\text{{{draw.choice(['even', 'Monday', 'neither', 'ellipse'])}}}",
        lambda: f"\\begin{{pmatrix}} {n()} & {n()} \\\\ {n()} & -{n()} \\end{{pmatrix}}",
        lambda: f"{n()}, {n(100, 199)}, {n(200, 299)}",
        lambda: f"y = {n()}x + {n()}",
        lambda: f"{n(100, 666)}_{{{n(7, 9)}}}",
        lambda: f"{n()} \\text{{ cents}}",
        lambda: f"{n()}!",
        lambda: f"\\frac{{{n()}!}}{{{n(2, 9)}!}}",
        lambda: f"\\binom{{{n(10, 20)}}}{{{n(1, 9)}}}",
        lambda: f"\\log_{{{n(2, 9)}}} {n(10)}",
        lambda: f"e^{{{n(2, 9)}}}",
        lambda: f"\\{{{n(1, 9)},{n(10)}\\}}",
        lambda: f"{n()}\\cdot 10^{{{n(3, 9)}}}",
        lambda: f"{n(1, 9)} \\le x \\le {n(10)}",
        lambda: f"|x-{n()}|",
        lambda: "p-q",
        lambda: "\\infty",
    ]
    return list(dict.fromkeys(form() for form in forms for _ in range(7)))


@pytest.mark.parametrize("way", WAYS)
def test_every_answer_written_back_is_right(way: str) -> None:
    answers = golds()
    assert len(answers) > 290
    verdicts = grading.grade([(WAYS[way].format(answer), answer) for answer in answers])
    assert [answer for answer, right in zip(answers, verdicts, strict=True) if not right] == []


@pytest.mark.parametrize("way", WAYS)
def test_another_answer_is_wrong(way: str) -> None:
    draw = random.Random(1)
    numbers = [draw.randint(2, 5000) for _ in range(100)]
    asked = [(WAYS[way].format(number + draw.choice((-1, 1, 10))), str(number)) for number in numbers]
    asked += [(WAYS[way].format("x^2+y"), "x^2-y"), (WAYS[way].format("\\frac{1}{3}"), "\\frac{1}{2}")]
    assert not any(grading.grade(asked))


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("The answer is **18**.", "18", True),
        ("**Total:** $18", "18", True),
        ("So he earned $1500!", "1500", True),
        ("3^2+4^2=25, so \\boxed{5}", "5", True),
        ("#### \\frac{6}{8}", "0.75", True),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{4} or rather \\boxed{5}", "5", True),
        ("x" * 5000 + " so it is 5", "5", True),
        ("\\boxed{5} #### 7", "5", False),
        ("2*3", "23", False),
        ("", "", False),
        ("", "5", False),
    ],
)
def test_forms_by_hand(text: str, answer: str, right: bool) -> None:
    assert grading.grade([(text, answer)]) == [right]


BOMBS = [
    "$9^{(9)^{9}}$",
    "9**9**9",
    "$\\binom{999999999}{499999999}$",
    "$(x+y+z)^{99}$",
    "$99999999!$",
    "$9!!!!$",
    "$" + "(" * 1900 + "1" + ")" * 1900 + "$",
    "$" + "{" * 1900 + "1" + "}" * 1900 + "$",
    "$\\sum_{i=1}^{10^9} i^{i}$",
    "$\\prod_{n=1}^{10^{8}} n$",
    "$\\gcd(10^{999999},7)$",
    "$\\sin(10^{10^{10}})$",
    "$\\operatorname{eye}(99999)$",
    "$\\operatorname{zeros}(99999,99999)$",
]
ODD = ["\x00", "\ud800", "\\frac{" * 50, "((((", "5" * 5000, "$" * 3000, "\\boxed{" * 2000, "1e999999999", "\u0665"]


def test_what_would_hang_is_wrong_at_the_deadline_and_others_are_graded_beside_it() -> None:
    asked = [(text, "387420489") for text in BOMBS + ODD]
    started = time.monotonic()
    between = [("it is 7", "7")] * len(asked)
    verdicts = grading.grade([pair for pairs in zip(asked, between, strict=True) for pair in pairs], deadline=0.3)
    assert verdicts == [False, True] * len(asked)
    assert time.monotonic() - started < 1.5 * len(BOMBS) + 5
    started = time.monotonic()
    assert not any(grading.grade([asked[0]] * 100, deadline=0.3)), "the same answer is graded once"
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "code", ["__import__('os').system('touch {0}')", "open('{0}', 'w')", "exec(\"open('{0}','w')\")", "().__class__"]
)
def test_nothing_is_run(tmp_path: Path, code: str) -> None:
    path = tmp_path / "evil"
    for form in ("{}", "${}$", "\\boxed{{{}}}", "#### {}", "$f({})$", "$\\gcd({},2)$", "1+{}", "$\\text{{{}}}$"):
        grading.grade([(form.format(code.format(path)), "5"), ("5", form.format(code.format(path)))])
    assert not path.exists()


def test_only_numerals_reach_the_parser_that_evaluates() -> None:
    parse = _arithmetic_alone(lambda text: text)
    for text in ("12", "-1.5", "1.5e-7", "2**10", "(1+2)/3", "kilo"):
        assert parse(text) == text
    for text in ("exit()", "f(1)", "a.b", "x+1", "'a'", "[1]", "1;2", "lambda:1", "a if b else c", "__import__('os')"):
        with pytest.raises(ValueError, match="not a number"):
            parse(text)


def test_verdicts_do_not_depend_on_the_number_of_processes() -> None:
    answers = golds(2)[::6]
    requests = [json.dumps([[f"${b}$"], a, 2.0]) for a, b in zip(answers, answers[1:] + answers[:1], strict=True)]
    requests += [json.dumps([[f"${a}$"], a, 2.0]) for a in answers]
    verdicts = []
    for size in (1, 3):
        pool = grading._Pool(size)
        pool.ask(requests[:1])
        assert len(pool._workers) == 1, "one answer does not pay for several"
        verdicts.append(pool.ask(requests))
        while len(pool._workers) < size:  # they start while answers wait
            assert pool.ask(requests) == verdicts[-1]
        pool.end()
    assert verdicts[0] == verdicts[1]
    assert sum(verdicts[0]) >= len(answers)


def test_a_process_that_is_killed_is_replaced_and_its_answer_graded() -> None:
    pool = grading._Pool(1)
    assert pool.ask([json.dumps([["5"], "5", 2.0])]) == [True]
    idle = pool._workers[0]
    os.kill(idle.pid, signal.SIGKILL)
    idle.wait()
    assert pool.ask([json.dumps([["5"], "5", 2.0])]) == [True]
    busy = pool._workers[0]
    assert busy.pid != idle.pid
    threading.Timer(0.3, busy.kill).start()
    assert pool.ask([json.dumps([["$(x+y+z)^{99}$", "5"], "5", 1.0]), json.dumps([["5"], "5", 2.0])]) == [False, True]
    assert pool._workers[0].pid != busy.pid
    pool.end()


def test_those_behind_a_bomb_in_the_same_process_are_graded() -> None:
    pool = grading._Pool(1)
    asked = [json.dumps([[form], "5", 0.3]) for form in ("it is 5", "$(x+y+z)^{99}$", "5", "it is 6")] * 3
    asked[2] += " " * 2 * grading.PIPE  # more than a pipe holds
    assert pool.ask(asked) == [True, False, True, False] * 3
    pool.end()


def test_an_interrupted_request_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = grading._Pool(2)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Timer(0.8, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            pool.ask([json.dumps([["$(x+y+z)^{99}$"], "5", 20.0])])
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert pool.ask([json.dumps([["5"], "5", 2.0]), json.dumps([["6"], "5", 2.0])]) == [True, False]
    pool.end()


def test_a_library_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise OSError('broken installation')")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = grading._Pool(1)
    with pytest.raises(
        UnmaskError, match="cannot be graded, as math-verify does not load: OSError: broken installation"
    ):
        pool.ask([json.dumps([["5"], "5", 2.0])])
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnmaskError, match="pip install"):
        grading.grade([("nobody asked whether it is 7321", "7321")])


SCRIPT = """
import multiprocessing, os, sys
from tasks import grading

ASKED = [("it is 5", "5"), ("it is 6", "5")]

def ask(queue):
    queue.put((os.getpid(), grading.grade(ASKED), [worker.pid for worker in grading._pool._workers]))

if __name__ == "__main__":
    assert grading.grade(ASKED) == [True, False]
    pids = {worker.pid for worker in grading._pool._workers}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=ask, args=(queue,), daemon=True)
        child.start()
        _, verdicts, others = queue.get()
        child.join()
        assert verdicts == [True, False] and not pids & set(others), method
        assert grading.grade(ASKED[::-1]) == [False, True]
    print(*pids, flush=True)
    sys.stdin.read()
"""


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("killed", [True, False])
def test_processes_of_its_own_for_every_child_and_none_outlives_its_parent(tmp_path: Path, killed: bool) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids, parent.stderr.read()
        assert not any(map(_gone, pids))
        if killed:
            parent.kill()
        assert "Traceback" not in parent.communicate()[1]
    until = time.monotonic() + 20
    while not all(map(_gone, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(map(_gone, pids))


def ordinary(seed: int) -> list[tuple[str, str]]:
    """400 answers, half of them wrong."""
    draw, asked = random.Random(seed), []
    for answer in golds(seed)[:200]:
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        asked.append((f"First {a} + {b} = {a + b}. Then $x = {a}$.\nThe answer is ${answer}$.", answer))
        asked.append((f"{a} * {b} = {a * b}, which she halves: {a * b / 2}", str(draw.randint(2, 999))))
    return asked


def test_grading_takes_little_longer_than_the_library_alone() -> None:
    def alone(asked: list[tuple[str, str]]) -> list[bool]:
        none = {"parsing_timeout": None}
        return [
            math_verify.verify(
                math_verify.parse(f"${answer}$", **none), math_verify.parse(text, **none), timeout_seconds=None
            )
            for text, answer in asked
        ]

    shares = []
    logging.disable(logging.CRITICAL)  # of the library, whose timeouts are off
    try:
        for seed in range(8):  # the first time both read their grammars; others may want the processors
            asked = ordinary(seed)
            started = time.perf_counter()
            verdicts = alone(asked)
            between = time.perf_counter()
            assert grading.grade(asked) == verdicts
            shares.append((time.perf_counter() - between) / (between - started))
            if shares[-1] < 1.3:
                break
    finally:
        logging.disable(logging.NOTSET)
    assert min(shares) < 1.3


def test_what_was_judged_is_not_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ordinary(9)
    verdicts = grading.grade(asked)
    monkeypatch.setattr(grading._pool, "ask", lambda requests: pytest.fail("asked again"))
    assert grading.grade(asked[::-1]) == verdicts[::-1]
    assert len(grading._judged) <= grading.KEPT
