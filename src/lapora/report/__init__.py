"""Tables for the terminal, the HTML report and its figures, the section of a model card."""

from lapora.report.page import write_page
from lapora.report.tables import (
    print_checkpoints,
    print_comparison,
    print_evaluation,
    print_posterior,
    print_reliability,
    print_tasks,
)

__all__ = [
    "print_checkpoints",
    "print_comparison",
    "print_evaluation",
    "print_posterior",
    "print_reliability",
    "print_tasks",
    "write_page",
]
