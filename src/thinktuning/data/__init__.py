"""Questions: sources, prompt text, a resumable loader, and the data module around them."""

from thinktuning.data.gsm8k import GSM8KDataModule
from thinktuning.data.loader import PromptLoader
from thinktuning.data.sources import Question, load_questions, parse_gold

__all__ = [
    "GSM8KDataModule",
    "PromptLoader",
    "Question",
    "load_questions",
    "parse_gold",
]
