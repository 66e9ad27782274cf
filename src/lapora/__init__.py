"""Calibrated probabilities for LoRA fine-tuned language models, by the Laplace approximation.

The functions are those of :mod:`lapora.api`. They are imported at first use, because they import torch.
"""

from typing import TYPE_CHECKING, Any

from lapora._version import __version__

if TYPE_CHECKING:
    from lapora.api import (
        Predictor,
        RoutedPredictor,
        RowPrediction,
        calibrate,
        evaluate,
        fit,
        fit_model,
        load,
        load_many,
        tune_prior,
    )

__all__ = [
    "Predictor",
    "RoutedPredictor",
    "RowPrediction",
    "__version__",
    "calibrate",
    "evaluate",
    "fit",
    "fit_model",
    "load",
    "load_many",
    "tune_prior",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lapora' has no attribute {name!r}")
    from lapora import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
