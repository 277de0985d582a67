"""The process that grades answers for :mod:`tasks.grading`: run as a script, it loads math-verify and nothing of ours.

A request is a line of JSON, [readings of a text, answer, seconds]; its reply is one byte, 1 or 0. The kernel ends the
process where that takes longer, so nothing in it can hang.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import signal
import sys
import time

MEMORY = 2**30  # bytes that an answer may take beyond what the loaded process has
SLOW = 0.1  # seconds from which on an answer may have left odd things in sympy's caches
# sympy reads numerals with Python's eval. Nothing else ever gets there: names and calls are refused before.
HARMLESS = re.compile(r"[0-9.\s+\-*/()]*|[0-9.]+e[+-]?[0-9]+|\w+", re.ASCII)


def _arithmetic_alone(parse):
    @functools.wraps(parse)
    def guarded(text, *args, **kwargs):
        if not HARMLESS.fullmatch(text):
            raise ValueError(f"not a number: {text!r}")
        return parse(text, *args, **kwargs)

    return guarded


def _load():
    """What says whether a text holds an answer, by math-verify."""
    import math_verify
    import math_verify.parser
    import sympy.core.cache
    import sympy.parsing.sympy_parser

    logging.disable(logging.CRITICAL)
    parse = functools.partial(math_verify.parse, parsing_timeout=None)
    math_verify.verify(parse("$1$"), parse("1%"), timeout_seconds=None)  # loads grammars and units
    for module in (sympy.parsing.sympy_parser, math_verify.parser):
        module.parse_expr = _arithmetic_alone(module.parse_expr)
    golds = functools.lru_cache(1000)(lambda answer: parse(f"${answer}$"))

    def is_right(readings, answer):
        started = time.process_time()
        try:
            return any(math_verify.verify(golds(answer), parse(text), timeout_seconds=None) for text in readings)
        except Exception:  # the libraries fail in many ways on what is no formula
            return False
        finally:
            if time.process_time() - started > SLOW:
                sympy.core.cache.clear_cache()

    return is_right


def _give_up_rights():
    """No more memory than a grader needs, and no dumps. Ends with the parent alone, not by Ctrl-C in its terminal."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for signal_number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(signal_number, signal.SIG_DFL)  # ends the process, whatever it is doing
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Judge the answers that come in, one line each, until the input ends."""
    sys.path[:] = json.loads(sys.stdin.readline())  # the parent's: its libraries
    is_right = _load()
    _give_up_rights()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.write(1, b"+")  # ready
    for line in sys.stdin:
        readings, answer, seconds = json.loads(line)
        # Processor time, so that a busy machine changes no verdict, and a bound by the clock.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 4 * seconds)
        verdict = is_right(readings, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(1, b"1" if verdict else b"0")


if __name__ == "__main__":
    main()
