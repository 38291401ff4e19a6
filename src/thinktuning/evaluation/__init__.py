"""Evaluation: benchmarks, prompting strategies, and what came of them."""

from thinktuning.evaluation.data import BenchmarkDataModule
from thinktuning.evaluation.module import EvaluationModule

__all__ = ["BenchmarkDataModule", "EvaluationModule"]
