"""What an evaluation is going to score: methods, saved posteriors and links, settled before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from torch import Tensor

from lapora.config import EvalSettings, Link, Method, ModelSettings, method_label
from lapora.errors import UsageError
from lapora.posterior.artifact import saved_names
from lapora.workflows.session import open_posterior


@dataclass(frozen=True)
class Plan:
    """What is scored.

    Attributes:
        methods: In the order of the table.
        everything: Whether ``all`` was asked for: what cannot be had is then left out, not refused.
        names: Saved posteriors, at least one.
        links: Links of each posterior.
        tuned_on: By posterior whose prior validation rows chose: the manifest's record of it.
        left_out: Why a method of ``all`` is not scored: lines for people.
    """

    methods: tuple[Method, ...]
    everything: bool
    names: tuple[str, ...]
    links: tuple[Link, ...]
    tuned_on: dict[str, dict[str, Any]]
    left_out: tuple[str, ...] = ()

    @property
    def tuning_digests(self) -> frozenset[str]:
        """Digests of all rows that chose a prior."""
        return frozenset(digest for record in self.tuned_on.values() for digest in record["rows"])


@dataclass(frozen=True, eq=False)
class Prediction:
    """One method's probabilities of a set of rows.

    Attributes:
        method: Which.
        log_p: ``(N, C)`` log-probabilities, float64.
        name: The posterior, of ``laplace``.
        link: Its link.
        details: What else the record says of it.
        mutual_information: ``(N,)`` nats, where the method is an average over models.
    """

    method: str
    log_p: Tensor
    name: str | None = None
    link: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    mutual_information: Tensor | None = None

    @property
    def label(self) -> str:
        """Its name for people."""
        return method_label(self.method, self.name, self.link)

    def identity(self) -> dict[str, Any]:
        """The record's first fields."""
        named = {key: value for key, value in (("name", self.name), ("link", self.link)) if value is not None}
        return {"method": self.method, **named, **self.details}


def make_plan(model: ModelSettings, settings: EvalSettings) -> Plan:
    """Settle what is scored.

    Raises:
        UsageError: Nothing to score, or options that contradict each other.
        PosteriorError: A posterior is missing, damaged, or of other weights.
    """
    everything = "all" in settings.methods
    methods = cast("tuple[Method, ...]", get_args(Method) if everything else _unique(settings.methods))
    if settings.ensemble and "ensemble" not in methods:
        methods = (*methods, "ensemble")
    if (settings.temperature_split or settings.temperature_oracle) and "temperature" not in methods:
        methods = (*methods, "temperature")
    if not methods:
        raise UsageError("nothing to evaluate; give --methods")
    if "ensemble" in methods and not settings.ensemble and not everything:
        raise UsageError("--methods ensemble needs --ensemble PATH: another adapter, or a folder of checkpoints")
    left_out: tuple[str, ...] = ()
    if not settings.ensemble:
        if everything:
            left_out = ("left out: ensemble: no --ensemble PATH was given, another adapter or a folder of checkpoints",)
        methods = tuple(method for method in methods if method != "ensemble")
    if settings.ood and len(settings.ood_data_dirs) not in (0, 1, len(settings.ood)):
        raise UsageError(
            f"{len(settings.ood_data_dirs)} --ood-data-dir for {len(settings.ood)} --ood: give one for all, "
            "or one for each in the same order"
        )
    if settings.ood_data_dirs and not settings.ood:
        raise UsageError("--ood-data-dir without --ood TASK: name the task of those rows")
    names = _unique(settings.names) or (tuple(saved_names(model.root)) if everything else ()) or ("default",)
    links: tuple[Link, ...] = _unique(settings.links) or (
        tuple(link for link in get_args(Link) if link != "map") if everything else ("mc-joint",)
    )
    tuned_on = {}
    for name in names:
        _, posterior = open_posterior(model, name)
        record = posterior.manifest["prior"].get("validation")
        if record:
            tuned_on[name] = record
    order = [method for method in get_args(Method) if method in methods]
    return Plan(tuple(order), everything, names, links, tuned_on, left_out)


def _unique(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))
