"""What ThinkTuning is compared with: training on gold solutions, and on own ones that are right."""

from thinktuning.baselines.sft import SFTModule
from thinktuning.baselines.star import STaRDataModule, STaRModule

__all__ = ["SFTModule", "STaRDataModule", "STaRModule"]
