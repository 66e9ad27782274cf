"""Keyword options of the Python API, made from the settings in :mod:`lapora.config`.

The classes below the line are for type checkers, editors and the documentation. ``make options`` writes them from the
settings, and a test fails where they differ. :func:`takes` gives a function the same names, with their defaults, for
``help`` and completion, and refuses wrong names and values.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, cast, get_args, get_origin, get_type_hints

from lapora import config
from lapora.config import DeclaredOption, options_of
from lapora.distributed import Processes
from lapora.errors import UsageError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes(options: type, *settings: type) -> Callable[[_Function], _Function]:
    """Name the ``**options`` of a function one by one, and refuse wrong names and values.

    Args:
        options: The TypedDict of the options.
        settings: The settings classes whose fields they are.

    Raises:
        TypeError: By the function: a name that it does not have.
        UsageError: By the function: a choice that does not exist, or a number out of bounds.
    """
    hints = get_type_hints(options)
    known: dict[str, DeclaredOption] = {}
    for each in settings:
        known |= {name: option for name, option in options_of(each).items() if name in hints}
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=known[name].default, annotation=hint)
        for name, hint in hints.items()
    ]

    def decorate(function: _Function) -> _Function:
        own = inspect.signature(function)
        first = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        signature = own.replace(parameters=[*first, *named])

        @functools.wraps(function)
        def checked(*arguments: Any, **given: Any) -> Any:
            for name, value in given.items():
                if name not in signature.parameters:
                    near = difflib.get_close_matches(name, signature.parameters, 1, 0.7)
                    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(signature.parameters)}"
                    raise TypeError(f"{function.__name__}() has no option {name!r}{hint}")
                if name in known:
                    _check(known[name], value)
            return function(*arguments, **given)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        about = "\n".join(f"    {name}: {describe(known[name])}" for name in hints)
        checked.__doc__ = f"{inspect.getdoc(function)}\n\nOptions:\n{about}\n"
        return cast("_Function", checked)

    return decorate


def _check(option: DeclaredOption, value: Any) -> None:
    if option.several and isinstance(value, str | Path):
        raise UsageError(f"{option.name}={value!r}: give a list, [{value!r}]")
    if value is None and type(None) not in get_args(option.hint):
        allowed = f"one of {', '.join(option.choices)}" if option.choices else "give a value"
        raise UsageError(f"{option.name}=None: {allowed}")
    for each in value if option.several else [value]:
        if problem := option.problem(each):
            raise UsageError(f"{option.name}={each!r}: {problem}")


def describe(option: DeclaredOption) -> str:
    """Return the help of an option with its bounds and default, in the words of Python."""
    text = re.sub(r"--([a-z][a-z-]*)", lambda found: f"``{found[1].replace('-', '_')}``", option.option.help)
    text = text.replace(" Repeatable.", " A list." if option.several else "")
    if option.option.none:
        text = text.replace(option.option.none, "None")
    if option.option.metavar == "SECONDS":
        text = text.replace(";", " in seconds;")
    if bounds := option.bounds:
        text += f" {bounds.capitalize()}."
    if shown := option.option.shown:
        return f"{text} Default: {shown}."
    return text if option.default in (None, ()) else f"{text} Default: ``{option.default!r}``."


def settings_of(settings: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are fields of one settings class, converted to its types: paths and tuples."""
    known = get_type_hints(settings)
    return {name: _as_setting(value, known[name]) for name, value in options.items() if name in known}


def _as_setting(value: Any, hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_as_setting(each, get_args(hint)[0]) for each in value)
    return Path(value) if value is not None and Path in (hint, *get_args(hint)) else value


# Written by `make options` from lapora/config.py; do not edit below this line.


class ModelOptions(TypedDict, total=False):
    """How to load the adapter and its base.

    Attributes:
        base_model: Base model, if not the one the adapter records.
        quantize: Quantization of the base model: none, 8bit, 4bit.
        dtype: Weight type: float32, bfloat16, float16, float64 or auto (float32 on a CPU, else as saved).
        device: auto (GPU if any), cpu, cuda:1 ... Default: ``'auto'``.
        batch_size: Rows per batch; None: by memory. At least 1.
        output_dir: Folder that holds laplace/, if not ADAPTER.
        trust_remote_code: Run code that comes with the base model or tokenizer. Default: ``False``.
        revision: Branch, tag or commit of an adapter on the Hub.
        processes: Processes that share the rows, from :func:`lapora.distributed.init_processes`. Default: this process.
        gradient_checkpointing: Recompute activations: less memory, more time. Default: ``False``.
        device_map: Spread layers over devices: auto or balanced (evenly), balanced_low_0 (least on GPU 0), sequential.
        max_memory: With ``device_map``: limits, as 0=20GiB,cpu=60GiB.
        offload_dir: With ``device_map``: folder for offloaded weights.
    """

    base_model: str | None
    quantize: config.Quantization | None
    dtype: config.Dtype | None
    device: str
    batch_size: int | None
    output_dir: str | Path | None
    trust_remote_code: bool
    revision: str | None
    processes: Processes
    gradient_checkpointing: bool
    device_map: config.DeviceMap | None
    max_memory: str | None
    offload_dir: str | Path | None


class DataOptions(TypedDict, total=False):
    """Which rows to read.

    Attributes:
        data_dir: Folder with SPLIT.jsonl, .json, .csv or .parquet.
        split: Split to read.
        limit: Use the first N rows only. At least 1.
    """

    data_dir: str | Path | None
    split: str | None
    limit: int | None


class CurvatureOptions(TypedDict, total=False):
    """Curvature, weights and name of the posterior.

    Attributes:
        structure: Curvature: kron (KFAC), ekfac (better eigenvalues), diag, lowrank (over all layers) or full. Default:
            ``'kron'``.
        weight_sharing: KFAC over tokens: expand (each an example), reduce (summed by row) or asdl (paper). Default:
            ``'expand'``.
        engine: Curvature backend: native, or laplace-torch with asdl or curvlinops. Default: ``'native'``.
        subset: Weights of the posterior: lora, last-layer or all (both). Default: ``'lora'``.
        fisher: Fisher estimator: exact (C-1 backward passes), mc (sampled labels) or empirical. Default: ``'exact'``.
        rank: Rank of kron's and ekfac's factors (by default 32; full: all) or of lowrank (400). At least 1.
        name: Name of the posterior. Default: ``'default'``.
        max_length: Maximum tokens per row. At least 1. Default: the task's.
        chat_template: Wrap prompts in the tokenizer's chat template. Default: ``False``.
        unlabelled: Accept training rows without labels. Default: ``False``.
        seed: Random seed. At least 0, at most 9.22337e+18. Default: ``0``.
        overwrite: Replace an existing posterior of this name. Default: ``False``.
        resume: Resume an interrupted fit from its last checkpoint. Default: ``False``.
        save_every: Checkpoint interval in seconds; 0: every batch. At least 0. Default: ``60.0``.
        offload_factors: Keep curvature factors in host memory, not on the GPU. Default: ``False``.
        prior_method: Prior after a fit: averaged (over the precisions that the training rows tolerate) or marglik (one
            precision, by marginal likelihood). Default: ``'averaged'``.
    """

    structure: config.Structure
    weight_sharing: config.WeightSharing
    engine: config.Engine
    subset: config.Subset
    fisher: config.FisherType
    rank: int | Literal["full"] | None
    name: str
    max_length: int | None
    chat_template: bool
    unlabelled: bool
    seed: int
    overwrite: bool
    resume: bool
    save_every: float
    offload_factors: bool
    prior_method: config.FitPrior


class FitOptions(CurvatureOptions, DataOptions, ModelOptions, total=False):
    """Options of :func:`lapora.api.fit`."""


class CalibrateOptions(FitOptions, total=False):
    """Options of :func:`lapora.api.calibrate`.

    Attributes:
        link: Link to tune for: mc-joint (mean softmax), mc-indep (no covariance), probit, bridge (Laplace bridge).
            Default: ``'mc-joint'``.
    """

    link: config.Link


class PriorOptions(DataOptions, ModelOptions, total=False):
    """Options of :func:`lapora.api.tune_prior`, beside those of rows and model.

    Attributes:
        name: Name of the posterior. Default: ``'default'``.
        method: auto (average over precisions), validation (best NLL on held-out rows), marglik (marginal likelihood) or
            adapted (marglik, linearized). Default: ``'auto'``.
        structure: scalar, kind (lora_A, lora_B, head), layer or point (scalar, not averaged). Default: ``'scalar'``.
        optimizer: For marglik: exact (root finding) or adam (as in the paper). Default: ``'exact'``.
        learning_rate: Learning rate of adam. At least 0. Default: ``0.1``.
        steps: Steps of adam. At least 1. Default: ``1000``.
        link: Link to tune for: mc-joint (mean softmax), mc-indep (no covariance), probit, bridge (Laplace bridge).
            Default: ``'mc-joint'``.
        seed: Random seed. At least 0, at most 9.22337e+18. Default: ``0``.
    """

    name: str
    method: config.PriorMethod
    structure: config.PriorChoice
    optimizer: config.Optimizer
    learning_rate: float
    steps: int
    link: config.Link
    seed: int


class EvalOptions(DataOptions, ModelOptions, total=False):
    """Options of :func:`lapora.api.evaluate`, beside those of rows and model.

    Attributes:
        methods: constant (label frequencies), map (plain adapter), temperature, mc-dropout, ensemble, laplace or all. A
            list. Default: ``('constant', 'map', 'laplace')``.
        names: Posterior to score. A list. Default: default.
        links: mc-joint (mean softmax), mc-indep (no covariance), probit, bridge (Laplace bridge) or map (plain
            adapter). A list. Default: mc-joint.
        samples: Sample points of the mc links. At least 2. Default: ``2048``.
        seed: Random seed. At least 0, at most 9.22337e+18. Default: ``0``.
        dropout_samples: Forward passes of mc-dropout. At least 2. Default: ``20``.
        ensemble: Adapter, or folder of checkpoints. A list.
        temperature_split: Split for temperature. Default: rows of tune-prior.
        temperature_oracle: Add the temperature fitted on the scored rows. Default: ``False``.
        interval: Regression: probability of the intervals scored. Above 0, at most 1. Default: 0.9.
        ood: Out-of-distribution task. A list.
        ood_data_dirs: Folder of the ``ood`` rows. A list.
        coverage: Print the threshold that keeps this share of rows. Above 0, at most 1.
    """

    methods: Sequence[config.Method | Literal["all"]]
    names: Sequence[str]
    links: Sequence[config.Link]
    samples: int
    seed: int
    dropout_samples: int
    ensemble: Sequence[str | Path]
    temperature_split: str | None
    temperature_oracle: bool
    interval: float | None
    ood: Sequence[str]
    ood_data_dirs: Sequence[str | Path]
    coverage: float | None


class LinkOptions(TypedDict, total=False):
    """How logits become probabilities, in ``predict``.

    Attributes:
        link: Probabilities from logits: mc-joint (mean softmax), mc-indep (no covariance), probit, bridge (Laplace
            bridge) or map (plain adapter). Default: ``'mc-joint'``.
        samples: Sample points of the mc links. At least 2. Default: ``2048``.
        seed: Random seed. At least 0, at most 9.22337e+18. Default: ``0``.
    """

    link: config.Link
    samples: int
    seed: int
