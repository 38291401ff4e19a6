"""Evaluation: benchmarks, prompting strategies, and what came of them."""
