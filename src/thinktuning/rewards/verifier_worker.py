"""The verifier's worker: one JSON pair [boxed, answer] per line in, one outcome per line out."""

import json
import logging
import sys

from math_verify import parse, verify


def compare(boxed: str, answer: str) -> str:
    """Compare with math-verify; its own timeouts are off, the parent kills a worker that hangs."""
    found = parse(f"\\boxed{{{boxed}}}", parsing_timeout=None)
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not found:
        return "no_answer"
    return "correct" if verify(gold, found, timeout_seconds=None) else "wrong"


def main() -> None:
    """Answer until the input ends."""
    logging.disable(logging.WARNING)  # it warns at every call that its own timeouts are off
    print("ready", flush=True)
    for line in sys.stdin:
        print(compare(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
