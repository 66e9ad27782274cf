"""Commands suggested in messages, complete with the options of this run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lapora.config import ModelSettings, PredictSettings

_MODEL_OPTIONS = (
    "output_dir",
    "base_model",
    "revision",
    "trust_remote_code",
    "device_map",
    "max_memory",
    "offload_dir",
)


def model_arguments(model: ModelSettings, name: str = PredictSettings.name) -> list[str]:
    """Return the options that another command needs to find this model and posterior.

    Options recorded by ``fit`` (quantization, dtype, the adapter's own base) are omitted.
    """
    found = [] if name == PredictSettings.name else ["--name", name]
    for field in _MODEL_OPTIONS:
        value = getattr(model, field)
        if value is not None and value is not False:
            flag = "--" + field.replace("_", "-")
            found += [flag] if value is True else [flag, str(value)]
    return found


def tune_prior_arguments(model: ModelSettings, name: str) -> list[str]:
    """Return the arguments of ``lapora`` that tune the prior of a posterior."""
    return ["tune-prior", model.adapter, *model_arguments(model, name)]


def command_line(arguments: Sequence[str], program: Sequence[str] = ("lapora",)) -> str:
    """Return a command quoted for a shell; the output of ``predict`` is redirected to a file."""
    typed = shlex.join([*program, *arguments])
    return f"{typed} > predictions.jsonl" if arguments[0] == "predict" else typed
