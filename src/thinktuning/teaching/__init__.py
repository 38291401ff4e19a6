"""Stage 2 and the splice of stage 3: behaviors, the teacher's prompt, feedback, injection."""

from thinktuning.teaching.behaviors import (
    Behavior,
    WorkedExample,
    count_occurrences,
    load_behaviors,
)
from thinktuning.teaching.cache import CachedTeacher
from thinktuning.teaching.feedback import (
    FeedbackForm,
    format_feedback,
    in_script_of,
    parse_feedback,
)
from thinktuning.teaching.injection import inject
from thinktuning.teaching.schedule import GammaSchedule, guided_count, select_guided
from thinktuning.teaching.teacher import (
    Chat,
    Reply,
    ReplyParams,
    Teacher,
    ask_in_form,
    teacher_chat,
)

__all__ = [
    "Behavior",
    "CachedTeacher",
    "Chat",
    "FeedbackForm",
    "GammaSchedule",
    "Reply",
    "ReplyParams",
    "Teacher",
    "WorkedExample",
    "ask_in_form",
    "count_occurrences",
    "format_feedback",
    "guided_count",
    "in_script_of",
    "inject",
    "load_behaviors",
    "parse_feedback",
    "select_guided",
    "teacher_chat",
]
