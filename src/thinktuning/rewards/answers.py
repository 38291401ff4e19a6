r"""The answer that a response ends on, and whether it is right.

Mathematics is read from a box and nowhere else, exactly as in training. Letters and yes/no are
asked for in a box too, but small models often say them in loose text, so forms of words are tried,
strongest first: a box; a statement such as "the answer is B", where the last one counts, because
models correct themselves; at last, for letters, a mention, if all mentions name the same letter.
"""

import re
from collections.abc import Iterable
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

from thinktuning.rewards.maths import last_boxed, verify_math
from thinktuning.types import AnswerKind, Outcome

LETTERS = "ABCDEFGHIJ"

# ---------------------------------------------------------------- parts of forms

# "The answer is", "Final answer:", "the correct option is most likely", "the best choice would be
# option", "the answer to the question is the letter", "the answer is not A but".
_ANSWER_IS = (
    r"(?i:\b(?:answer|option|choice|statement)(?:\s+(?:to|for|that|which)\b[^.:;\n]{0,60}?)?"
    r"(?:\s*:|\s+(?:is|(?:would|must|should)\s+be)\b:?(?:\s+(?:most\s+)?\w+ly\b)?"
    r"(?:\s+not\s+\S+\s+but\b)?)\s*(?:(?:option|choice|the\s+letter)\s+)?)"
)

# A stop, "because" or the end of the line.
_STOP = r"[^\S\n]*(?:[^\w\s/]|$|(?:because|since)\b)"

# A lone letter. "A" and "I" are words too, and so count only before a stop; lower-case letters only
# before a full stop, a bracket or the end of the line. "C++" and "B or C" are no letter.
_LETTER = (
    r"""["'“(]{0,2}(?P<answer>[A-Ja-j])(?![\w'+-])"""
    rf"(?:(?<=[B-HJ])|(?<=[AI])(?={_STOP})|(?<=[a-j])(?=[.)]|$))"
    r"(?!\)?\s+(?:or|and)\s+\(?[A-HJ]\b)"
)

# "No" opens many phrases that answer nothing: "no one", "no answer", "no way". So do "true" and
# "false". "Yes" doesn't, but for "yes or no".
_YES_NO = (
    r"""["'“(]{0,2}(?P<answer>(?i:yes(?!\s*(?:or\b|and\b|/)\s*no\b)|"""
    rf"(?:no|true|false)(?!-)(?={_STOP})))\b"
)


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.MULTILINE)


# ------------------------------------------------------------------- the forms

# B; (b); Option B; Answer: B; B. a bus stop; B) a bus stop
_BOXED_LETTER = _form(r"(?i:(?:option|answer:)\s+)?\(?(?P<answer>[A-Ja-j])(?:\s*$|[).:])")

# yes; No.; No, it sinks
_BOXED_YES_NO = _form(_YES_NO)

# All of equal strength: the last one in the text counts.
_LETTER_STATEMENTS = (
    # The answer is B; Answer: (B); the correct option is most likely B
    _form(_ANSWER_IS + _LETTER),
    # (B) is the correct answer; option B is right; A is wet, so B is best. Not: vitamin A is best
    _form(
        r"(?:^|[.;:,!?]\s+|\(|(?i:\b(?:option|choice|answer|so|that)\s+))(?P<answer>[A-J])\)?"
        r"\s+is\s+(?:(?:the\s+)?(?:correct|right|best)|the\s+answer)\b"
    ),
    # B. a bus stop is the correct answer
    _form(
        r"^\(?(?P<answer>[A-J])[).:]\s[^.\n]{1,60}\s+is\s+the\s+(?:correct|right|best)\s+"
        r"(?:answer|option|choice)\b"
    ),
    # I choose B; I'll go with option (B)
    _form(
        r"(?i:\bI(?:'ll|'d|\s+will|\s+would)?\s+(?:choose|pick|select|go with)\s+(?:option\s+)?)"
        + _LETTER
    ),
    # No, it's C; it must be C, the bus stop; therefore, C. Not: therefore, C is wrong
    _form(
        r"(?i:\b(?:it's|it\s+is|it\s+must\s+be|so|therefore|thus),?\s+)" + _LETTER + f"(?={_STOP})"
    ),
    # Nothing else on the line: B; **B**; (B); B.; Option B
    _form(r"^(?:(?i:option)\s+)?" + _LETTER + r"[).]{0,2}[^\S\n]*$"),
)

# Each counts if it names a single letter in the whole text.
_LETTER_MENTIONS = (
    # B) a bus stop; (B) a bus stop; B. a bus stop; B: a bus stop; B - a bus stop
    _form(r"^\(?(?P<answer>[A-J])(?:[).:]|\s+[-–—])\s"),
    # which speaks for (B) and nothing else
    _form(r"\((?P<answer>[A-J])\)"),
)

# The first that occurs counts, and of it the last one in the text.
_YES_NO_STATEMENTS = (
    # The answer is no; Answer: yes; the statement is false; the answer is a clear yes
    _form(_ANSWER_IS + r"(?:an?\s+(?:\w+\s+)?)?" + _YES_NO),
    # No, because it sinks. Conclusion: no. It is too heavy. Actually, no. I would say no. To answer
    # the question, no.
    _form(r"(?:^|[.!?:]\s+|(?i:\b(?:so|actually|therefore|thus|say|question),?\s+))" + _YES_NO),
)

# What takes back the statement that follows: I don't think that the answer is B; if the answer is
# B.
_DENIED = re.compile(
    r"(?:\b(?:not|if|whether)|n't)\s+"
    r"(?:(?:think|believe|say|that|the|correct)\s+)*$",
    re.IGNORECASE,
)
_DENIED_SPAN = 60

_YES_NO_MEANING = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


# ------------------------------------------------------------------- functions


def judge_version() -> str:
    """Changes with the code that judges, here and in math-verify."""
    folder = Path(__file__).parent
    names = ("answers.py", "maths.py", "verifier_worker.py")
    sources = [(folder / name).read_text(encoding="utf-8") for name in names]
    return blake2b(repr([*sources, version("math-verify")]).encode(), digest_size=8).hexdigest()


def extract_answer(kind: AnswerKind, text: str, options: int = len(LETTERS)) -> str | None:
    r"""The answer that a response ends on.

    Args:
        kind: What an answer is.
        text: The response.
        options: Number of lettered options of a choice, at most 10; later letters are no answer.

    Returns:
        Content of the last ``\boxed{}``; a capital letter; ``yes`` or ``no``; None where there is
        none.
    """
    match kind:
        case AnswerKind.MATH:
            return last_boxed(text) or None
        case AnswerKind.CHOICE:
            return _letter(text, LETTERS[:options])
        case AnswerKind.YES_NO:
            return _yes_no(text)


def judge(
    kind: AnswerKind, response: str, answer: str, finished: bool, options: int = len(LETTERS)
) -> tuple[Outcome, str | None]:
    r"""Compare a response with the gold answer.

    Args:
        kind: What an answer is.
        response: The text to be judged.
        answer: Gold: a number or LaTeX without ``$``; a capital letter; ``yes`` or ``no``.
        finished: False for an answer that hit the length limit: ``cut_off``, whatever it says.
        options: Number of lettered options of a choice, at most 10.

    Returns:
        What was found, and the answer as extracted, also from a response that was cut off.
    """
    extracted = extract_answer(kind, response, options)
    if kind is AnswerKind.MATH:
        return verify_math(response, answer, finished), extracted
    if not finished:
        return Outcome.CUT_OFF, extracted
    if extracted is None:
        return Outcome.NO_ANSWER, None
    return (Outcome.CORRECT if extracted == answer else Outcome.WRONG), extracted


def _letter(text: str, letters: str) -> str | None:
    boxed = _BOXED_LETTER.match(_plain(last_boxed(text) or ""))
    if boxed and boxed["answer"].upper() in letters:
        return boxed["answer"].upper()
    plain = _plain(text)
    found = [a.upper() for a in _statements(plain, _LETTER_STATEMENTS) if a.upper() in letters]
    if found:
        return found[-1]
    for form in _LETTER_MENTIONS:
        mentioned = {m["answer"] for m in form.finditer(plain)}
        if len(mentioned) == 1 and mentioned <= set(letters):
            return mentioned.pop()
    return None


def _yes_no(text: str) -> str | None:
    boxed = _BOXED_YES_NO.match(_plain(last_boxed(text) or ""))
    if boxed:
        return _YES_NO_MEANING[boxed["answer"].lower()]
    plain = _plain(text)
    for form in _YES_NO_STATEMENTS:
        found = _statements(plain, [form])
        if found:
            return _YES_NO_MEANING[found[-1].lower()]
    return None


def _statements(text: str, forms: Iterable[re.Pattern[str]]) -> list[str]:
    """Answers that any of the forms states and nothing denies, in the order of the text."""
    found = [
        (m.start("answer"), m["answer"])
        for form in forms
        for m in form.finditer(text)
        if not _DENIED.search(text[max(0, m.start() - _DENIED_SPAN) : m.start()])
    ]
    return [answer for _, answer in sorted(found)]


def _plain(text: str) -> str:
    r"""Without what only sets the type: Markdown, ``$``, ``\(``, ``\text``, curly apostrophes."""
    text = re.sub(r"\\(?:text|math)[a-z]{0,4}\s*\{([^{}]*)\}", r"\1", text.replace("’", "'"))
    return re.sub(r"\\[()\[\]]|[{}*_`$]|^#+\s*", "", text, flags=re.MULTILINE).strip()
