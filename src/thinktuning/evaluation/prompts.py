"""Prompt text of an evaluation: how an item is put to a model."""

from dataclasses import dataclass
from string import ascii_uppercase

from thinktuning.evaluation.records import Item
from thinktuning.types import AnswerKind


@dataclass(frozen=True)
class PromptTexts:
    r"""What stands around a question.

    Attributes:
        system: Message that is always sent, since a template's default may say anything.
        math: Instruction behind a question whose answer is a number or LaTeX.
        choice: Instruction behind lettered options.
        yes_no: Instruction behind a question whose answer is yes or no.
    """

    system: str = "You are a careful solver of problems."
    math: str = r"Reason step by step, and put your final answer inside \boxed{}."
    choice: str = r"Reason step by step, and put the letter of the right option inside \boxed{}."
    yes_no: str = r"Reason step by step, and end with \boxed{yes} or \boxed{no}."

    def question(self, item: Item) -> str:
        """The first user message: question, options one a line, instruction."""
        parts = [item.question]
        if item.choices is not None:
            lettered = zip(ascii_uppercase, item.choices, strict=False)
            parts.append("\n".join(f"{letter}. {choice}" for letter, choice in lettered))
        instructions = {
            AnswerKind.MATH: self.math,
            AnswerKind.CHOICE: self.choice,
            AnswerKind.YES_NO: self.yes_no,
        }
        return "\n\n".join([*parts, instructions[item.kind]])
