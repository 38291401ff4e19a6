"""What a run will need, from its configuration and the model's config.json alone."""

from thinktuning.plan.job import Job, PlanOptions, read_job
from thinktuning.plan.memory import Plan, make_plan
from thinktuning.plan.report import print_plan

__all__ = ["Job", "Plan", "PlanOptions", "make_plan", "print_plan", "read_job"]
