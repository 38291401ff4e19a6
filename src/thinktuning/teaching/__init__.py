"""Stage 2 and the splice of stage 3: behaviors, the teacher's prompt, feedback, injection."""

from thinktuning.teaching.behaviors import Behavior, WorkedExample, load_behaviors
from thinktuning.teaching.feedback import feedback_pattern, format_feedback, parse_feedback
from thinktuning.teaching.injection import inject
from thinktuning.teaching.schedule import GammaSchedule, guided_count, select_guided
from thinktuning.teaching.teacher import teacher_messages

__all__ = [
    "Behavior",
    "GammaSchedule",
    "WorkedExample",
    "feedback_pattern",
    "format_feedback",
    "guided_count",
    "inject",
    "load_behaviors",
    "parse_feedback",
    "select_guided",
    "teacher_messages",
]
