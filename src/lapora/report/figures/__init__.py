"""Figures by matplotlib, readable in grayscale. Imported only when a figure is requested."""

from lapora.report.figures.checkpoints import checkpoint_pictures
from lapora.report.figures.evaluation import evaluation_pictures
from lapora.report.figures.regression import regression_pictures
from lapora.report.figures.style import Picture, save_pictures, to_svg

__all__ = ["Picture", "checkpoint_pictures", "evaluation_pictures", "regression_pictures", "save_pictures", "to_svg"]
