"""What the teacher is asked."""

from collections.abc import Sequence

from thinktuning.teaching.behaviors import Behavior
from thinktuning.teaching.feedback import format_feedback

_SYSTEM = """\
You read a question and my answer to it, and you go on thinking for me, in the first person, as if \
you were me. In my reflection I {instructions}.
Reply with exactly three parts and nothing else:
<opinion>correct or incorrect</opinion>
<reason>my reflection on my answer</reason>
<phrase>how I go on from there to the solution, ending with the final answer in the format that my \
answer should have</phrase>"""


def teacher_messages(
    behaviors: Sequence[Behavior], question: str, response: str
) -> list[dict[str, str]]:
    """The teacher's chat: what it is to do, every worked example as a turn, then the real question.

    Args:
        behaviors: The behaviors to show; at least one.
        question: The student's question, without the student's instruction.
        response: What the student wrote.

    Returns:
        Messages with ``role`` and ``content``, the last one the user's.
    """
    instructions = ", or ".join(b.instruction for b in behaviors)
    messages = [{"role": "system", "content": _SYSTEM.format(instructions=instructions)}]
    for behavior in behaviors:
        for example in behavior.examples:
            messages.append(_turn(example.question, example.response))
            messages.append({"role": "assistant", "content": format_feedback(example.feedback)})
    messages.append(_turn(question, response))
    return messages


def _turn(question: str, response: str) -> dict[str, str]:
    return {"role": "user", "content": f"Question: {question}\nMy answer: {response}"}
