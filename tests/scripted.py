"""A teacher who always says the same: its verdict is the truth, its continuation a fixed phrase."""

import re
from collections.abc import Sequence

from thinktuning.engines import Completion, Engine, SamplingParams

REPLY = "<opinion>correct</opinion>\n<reason>{reason}</reason>\n<phrase>{phrase}</phrase>"


class ScriptedTeacher(Engine):
    """An engine that ignores the weights and writes a reply from a script.

    It reads the student's answer out of the prompt and repeats its last box.

    Args:
        reason: Its reflection.
        phrase: Ends every reply; ``{box}`` in it is the student's own box.
    """

    def __init__(
        self, reason: str = "Wait, let me check.", phrase: str = "It stays. {box}"
    ) -> None:
        self.reason = reason
        self.phrase = phrase

    def load_weights(self, model, tokenizer=None) -> None:
        self.tokenizer = tokenizer

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> list[list[Completion]]:
        return [[self._reply(prompt, params)] for prompt in prompts]

    def _reply(self, prompt: Sequence[int], params: SamplingParams) -> Completion:
        text = self.tokenizer.decode(list(prompt))
        boxes = re.findall(r"\\boxed{[^}]*}", text.rsplit("My answer:", 1)[-1])
        box = boxes[-1] if boxes else ""
        reply = REPLY.format(reason=self.reason, phrase=self.phrase.replace("{box}", box))
        ids = self.tokenizer.encode(reply, add_special_tokens=False)
        ids = (*ids, self.tokenizer.eos_token_id)
        return Completion(ids, (0.0,) * len(ids), "stop")
