"""Callbacks: the two stages of guidance, and what a user sees."""

from thinktuning.callbacks.answers import AnswerLog
from thinktuning.callbacks.audit import AuditLog
from thinktuning.callbacks.base import RolloutCallback, StageObserver
from thinktuning.callbacks.behaviors import BehaviorRates
from thinktuning.callbacks.checkpoint import RolloutCheckpoint
from thinktuning.callbacks.guidance import TeacherGuidance
from thinktuning.callbacks.injection import BehaviorInjection
from thinktuning.callbacks.progress import RolloutProgress
from thinktuning.callbacks.records import RecordLog
from thinktuning.callbacks.resume import ResumeCheck
from thinktuning.callbacks.samples import SampleLog

__all__ = [
    "AnswerLog",
    "AuditLog",
    "BehaviorInjection",
    "BehaviorRates",
    "RecordLog",
    "ResumeCheck",
    "RolloutCallback",
    "RolloutCheckpoint",
    "RolloutProgress",
    "SampleLog",
    "StageObserver",
    "TeacherGuidance",
]
