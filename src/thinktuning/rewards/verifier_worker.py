"""The verifier's worker: one JSON pair [boxed, answer] per line in, one outcome per line out."""

import json
import logging
import signal
import sys

from math_verify import parse, verify


def compare(boxed: str, answer: str) -> str:
    """Compare with math-verify; its own timeouts are off, the parent kills a worker that hangs."""
    found = parse(f"\\boxed{{{boxed}}}", parsing_timeout=None)
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not found:
        return "no_answer"
    return "correct" if verify(gold, found, timeout_seconds=None) else "wrong"


def main(seconds: float = 0.0) -> None:
    """Answer until the input ends.

    Args:
        seconds: A comparison that takes longer ends this process, more than the parent allows; 0:
            it may take any time. A parent that was killed can't end it, and it would go on for
            ever.
    """
    logging.disable(logging.WARNING)  # it warns at every call that its own timeouts are off
    # The system's own handler: one of Python's would wait for the end of a long multiplication.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        outcome = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(outcome, flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
