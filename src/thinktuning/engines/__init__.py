"""Engines: token ids in, sampled token ids and their logprobs out."""

from thinktuning.engines.base import Completion, Engine, SamplingParams
from thinktuning.engines.seeding import derive_seed
from thinktuning.engines.transformers import TransformersEngine

__all__ = ["Completion", "Engine", "SamplingParams", "TransformersEngine", "derive_seed"]
