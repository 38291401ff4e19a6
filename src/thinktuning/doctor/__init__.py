"""A set-up, checked part by part without training."""

from thinktuning.doctor.examination import examine, is_healthy
from thinktuning.doctor.finding import Finding, Status
from thinktuning.doctor.report import print_findings

__all__ = ["Finding", "Status", "examine", "is_healthy", "print_findings"]
