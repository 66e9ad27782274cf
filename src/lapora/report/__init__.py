"""What people read: tables for a terminal, and a page."""

from lapora.report.comparison import print_comparison
from lapora.report.evaluation import print_checkpoints, print_evaluation, print_reliability
from lapora.report.overview import print_manifest, print_tasks
from lapora.report.page import write_page

__all__ = [
    "print_checkpoints",
    "print_comparison",
    "print_evaluation",
    "print_manifest",
    "print_reliability",
    "print_tasks",
    "write_page",
]
