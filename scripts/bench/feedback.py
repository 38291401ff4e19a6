"""How many of a teacher's replies parse: free, constrained, and constrained with a final box.

    python scripts/bench/feedback.py --data path/to/gsm8k/train.jsonl [--engine vllm]

The student answers every question once, with one worked example; the teacher, the same model, is
shown the four behaviors and decodes greedily.
"""

import argparse
import json
import time

from rich.console import Console
from rich.table import Table

from thinktuning.data import load_questions
from thinktuning.engines import Engine, SamplingParams, TransformersEngine, VLLMEngine, derive_seed
from thinktuning.policy import (
    completion_text,
    end_of_turn_ids,
    load_model,
    load_tokenizer,
    render_prompt,
)
from thinktuning.provenance import provenance
from thinktuning.teaching import (
    FeedbackForm,
    Reply,
    ReplyParams,
    ask_in_form,
    load_behaviors,
    parse_feedback,
    teacher_chat,
)

BEHAVIORS = ["self_conflict", "self_agreement", "self_critique", "self_consultancy"]
_INSTRUCTION = "\n\nReason step by step and put the final answer inside \\boxed{}."
EXAMPLE = [
    {"role": "system", "content": "You solve word problems in a few short steps."},
    {
        "role": "user",
        "content": "Mia has 3 boxes with 8 pencils each. She gives 5 pencils away. How many are "
        "left?" + _INSTRUCTION,
    },
    {
        "role": "assistant",
        "content": "Mia has 3 * 8 = 24 pencils. After giving 5 away she has 24 - 5 = 19 pencils. "
        "The final answer is \\boxed{19}.",
    },
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="questions in GSM8K's form")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="vllm")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256, help="limit of a reply")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    engine: Engine = TransformersEngine(16) if arguments.engine == "transformers" else VLLMEngine()
    engine.load_weights(model, tokenizer)
    questions = [q.text for q in load_questions(arguments.data, "train")[: arguments.questions]]
    prompts = [
        render_prompt(tokenizer, [*EXAMPLE, {"role": "user", "content": q + _INSTRUCTION}])
        for q in questions
    ]
    stop_ids = end_of_turn_ids(tokenizer, model.generation_config)
    seeds = [[derive_seed(arguments.seed, i)] for i in range(len(prompts))]
    groups = engine.sample(prompts, seeds, SamplingParams(160, stop_ids, 0.7))
    behaviors = load_behaviors(BEHAVIORS)
    chats = [
        teacher_chat(behaviors, q, completion_text(tokenizer, c.token_ids))
        for q, (c,) in zip(questions, groups, strict=True)
    ]
    table = Table("replies", "parsed", "closed in a second request", "seconds")
    for name in ("free", "constrained", "constrained, boxed"):
        started = time.perf_counter()
        if name == "free":
            replies = engine.reply(chats, ReplyParams(arguments.tokens, 3072))
        else:
            form = FeedbackForm(arguments.tokens, boxed=name.endswith("boxed"))
            replies = ask_in_form(engine, chats, form, max_prompt_tokens=3072)
        seconds = time.perf_counter() - started
        _report(table, name, replies, seconds)
    console = Console()
    console.print(table)
    console.print(vars(arguments) | provenance())


def _report(table: Table, name: str, replies: list[Reply], seconds: float) -> None:
    parsed = sum(parse_feedback(r.text) is not None for r in replies)
    closed = sum(r.closed for r in replies)
    total = len(replies)
    print(json.dumps({"replies": name, "parsed": parsed, "closed": closed, "total": total}))
    table.add_row(name, f"{parsed} of {total}", str(closed), f"{seconds:.0f}")


if __name__ == "__main__":
    main()
