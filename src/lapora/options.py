"""Keyword arguments of the Python API: the fields of the settings in :mod:`lapora.config`, each of them optional.

A type checker reads them from the classes here; ``help`` and completion get them, with the settings' defaults, from
:func:`takes`, which also refuses a name or a choice that does not exist. A test holds the classes against the settings.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, cast, get_args, get_origin, get_type_hints

from lapora.config import (
    DeviceMap,
    Dtype,
    Engine,
    FisherType,
    Link,
    Method,
    Optimizer,
    PriorMethod,
    PriorStructure,
    Quantization,
    Structure,
    Subset,
    WeightSharing,
)
from lapora.distributed import Processes
from lapora.errors import UsageError


class ModelOptions(TypedDict, total=False):
    """How the adapter is loaded and run, and where ``laplace/`` is: :class:`lapora.config.ModelSettings`."""

    base_model: str | None
    quantize: Quantization | None
    dtype: Dtype | None
    device: str
    batch_size: int | None
    output_dir: str | Path | None
    trust_remote_code: bool
    revision: str | None
    processes: Processes
    gradient_checkpointing: bool
    device_map: DeviceMap | None
    max_memory: str | None
    offload_dir: str | Path | None


class DataOptions(TypedDict, total=False):
    """Which rows of the task: :class:`lapora.config.DataSettings`."""

    data_dir: str | Path | None
    split: str | None
    limit: int | None


class CurvatureOptions(TypedDict, total=False):
    """What the posterior is made of: :class:`lapora.config.FitSettings`."""

    structure: Structure
    weight_sharing: WeightSharing
    engine: Engine
    subset: Subset
    fisher: FisherType
    rank: int | None
    name: str
    max_length: int | None
    chat_template: bool
    seed: int
    overwrite: bool
    resume: bool
    save_every: float
    offload_factors: bool


class FitOptions(CurvatureOptions, DataOptions, ModelOptions, total=False):
    """All that ``fit`` may be told."""


class PriorOptions(DataOptions, ModelOptions, total=False):
    """All that ``tune_prior`` may be told: fields of :class:`lapora.config.PriorSettings`, the rows, the model."""

    name: str
    method: PriorMethod
    structure: PriorStructure
    optimizer: Optimizer
    learning_rate: float
    steps: int
    link: Link
    seed: int


class EvalOptions(DataOptions, ModelOptions, total=False):
    """All that ``evaluate`` may be told: fields of :class:`lapora.config.EvalSettings`, the rows, the model."""

    methods: Sequence[Method | Literal["all"]]
    names: Sequence[str]
    links: Sequence[Link]
    samples: int
    seed: int
    dropout_samples: int
    ensemble: Sequence[str | Path]
    temperature_split: str | None
    temperature_oracle: bool
    ood: Sequence[str]
    ood_data_dirs: Sequence[str | Path]
    coverage: float | None


class LinkOptions(TypedDict, total=False):
    """How logit moments become probabilities: these fields of :class:`lapora.config.PredictSettings`."""

    link: Link
    samples: int
    seed: int


_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes(options: type, *settings: type) -> Callable[[_Function], _Function]:
    """Name a function's ``**options`` one by one, and refuse what is none of them.

    Args:
        options: The class of the options.
        settings: The dataclasses whose fields they are, for the defaults.

    Raises:
        TypeError: When the function is called with a name that it does not have.
        UsageError: When it is called with a choice that does not exist.
    """
    hints = get_type_hints(options)
    defaults = {field.name: field.default for each in settings for field in fields(each)}
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
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
                    near = difflib.get_close_matches(name, signature.parameters, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(signature.parameters)}"
                    raise TypeError(f"{function.__name__}() has no option {name!r}{hint}")
                if name in hints:
                    _refuse_unknown_choice(name, value, hints[name])
            return function(*arguments, **given)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return cast("_Function", checked)

    return decorate


def _refuse_unknown_choice(name: str, value: Any, hint: Any) -> None:
    several = get_origin(hint) is Sequence
    if several and isinstance(value, str | Path):
        raise UsageError(f"{name}={value!r}: give a list, [{value!r}]")
    choices = _choices(get_args(hint)[0] if several else hint)
    for each in value if several else [value]:
        if choices and each not in choices:
            raise UsageError(f"{name}={each!r}: one of {', '.join(str(choice) for choice in choices)}")


def _choices(hint: Any) -> tuple[Any, ...]:
    """What a union of Literals and None allows; nothing where anything of a type will do."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if hint is type(None):
        return (None,)
    parts = [_choices(part) for part in get_args(hint)]
    return tuple(choice for part in parts for choice in part) if parts and all(parts) else ()


def settings_of(settings: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of one dataclass, in its types: paths and tuples."""
    known = get_type_hints(settings)
    return {name: _as_setting(value, known[name]) for name, value in options.items() if name in known}


def _as_setting(value: Any, hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_as_setting(each, get_args(hint)[0]) for each in value)
    return Path(value) if value is not None and Path in (hint, *get_args(hint)) else value
