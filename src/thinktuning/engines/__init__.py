"""Engines: token ids in, sampled token ids and their logprobs out."""

from thinktuning.engines.base import Completion, Engine, SamplingParams, own_weights
from thinktuning.engines.openai import OpenAIEngine
from thinktuning.engines.seeding import derive_seed
from thinktuning.engines.server import VLLMServerEngine
from thinktuning.engines.transformers import TransformersEngine
from thinktuning.engines.vllm import VLLMEngine

__all__ = [
    "Completion",
    "Engine",
    "OpenAIEngine",
    "SamplingParams",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "derive_seed",
    "own_weights",
]
