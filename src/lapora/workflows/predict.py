"""``lapora predict``: stream JSON lines of rows to JSON lines of predictions, in order."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lapora.config import LONGEST_LINE, ModelSettings, PredictSettings, check_likelihood
from lapora.distributed import Processes
from lapora.errors import DataError, LaporaError, NonFiniteRowError, NumericalError, UsageError
from lapora.models.adapter import CONFIG_FILE, fetch_adapter, is_hub_id
from lapora.models.batches import Batch
from lapora.models.batching import run_batches
from lapora.models.shared_base import BaseCache
from lapora.predictive.moments import LinearisedPredictor
from lapora.storage.manifest import Prior
from lapora.tasks import EncodedExample, parse_json_line
from lapora.workflows.commands import tune_prior_arguments
from lapora.workflows.task_model import Fitted, open_fitted, require_finite

_WINDOW_BATCHES = 4
_DEFAULT_WINDOW = 64


@dataclass(frozen=True)
class _Item:
    """One input line: its name in messages, its ``id``, its adapter, and its token ids or its error."""

    where: str
    identifier: Any
    route: Route | None
    content: EncodedExample | LaporaError


def predict(
    model: ModelSettings,
    settings: PredictSettings,
    lines: Iterable[bytes | Mapping[str, Any] | None],
    note: Callable[[str, list[str]], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Predict one record per input line.

    Args:
        model: The adapter and how to run it.
        settings: Link, samples, what is written, other adapters.
        lines: JSON lines, as bytes, or rows; at None, which marks a pause of the input, pending rows are predicted.
        note: Called if the prior was not tuned on labelled rows, with a message and the arguments of the command that
            tunes it.

    Yields:
        Records, see :meth:`lapora.likelihoods.base.Likelihood.records`, in input order; one window of rows at a time is
        in memory.

    Raises:
        DataError: A line is invalid: at once unless ``on_error="report"`` (the line is named, and previous predictions
            have been yielded), or at the end of the run with ``"report"``.
        NumericalError: The same for a line for which the model returns NaN or infinity.
    """
    if settings.adapters:
        yield from predict_routed(AdapterPool(model, settings), settings, lines)
        return
    fitted = open_fitted(model, settings.name)
    if note is not None and settings.link != "map" and (untuned := _untuned(fitted.prior)):
        note(untuned, tune_prior_arguments(model, settings.name))
    yield from predict_rows(fitted, settings, lines)


def _untuned(prior: Prior) -> str:
    """Return a message about a prior that was not tuned on labelled rows; empty for a tuned one."""
    if prior.method == "marglik":
        return (
            "warning: the prior precision is that of the marginal likelihood, which can make predictions worse than "
            "those of the plain adapter; tune it on labelled rows"
        )
    if prior.averaged is not None and not prior.averaged.n:
        return "note: the prior was not tuned on labelled rows; if there are any"
    return ""


def predict_rows(
    fitted: Fitted, settings: PredictSettings, rows: Iterable[bytes | Mapping[str, Any] | None]
) -> Iterator[dict[str, Any]]:
    """Predict with a loaded adapter; see :func:`predict`.

    Args:
        fitted: The fitted adapter.
        settings: Link, samples, what is written.
        rows: JSON lines, or mappings.

    Yields:
        Records, in input order.

    Raises:
        DataError: A row is invalid; see :func:`predict`.
        NumericalError: The same for a row for which the model returns NaN or infinity.
    """
    yield from predict_routed(SingleAdapter(fitted), settings, rows)


def predict_routed(
    routes: AdapterSelector, settings: PredictSettings, rows: Iterable[bytes | Mapping[str, Any] | None]
) -> Iterator[dict[str, Any]]:
    """Predict each row with the adapter selected for it; see :func:`predict`."""
    index = failed = 0
    size = (routes.batch_rows or _DEFAULT_WINDOW // _WINDOW_BATCHES) * _WINDOW_BATCHES * routes.processes.count
    with (
        open_predictor(routes, settings) as opened,
        closing(routes.processes.broadcast_stream(_windows(rows, size))) as windows,
    ):
        for window in windows:
            items: list[_Item] = []
            for number, line in window:
                item = _read(routes, number, line)
                items.append(item)
                if settings.on_error != "report" and isinstance(item.content, LaporaError):
                    break  # later rows are not predicted
            for item, found in zip(items, _predict_window(routes, opened, settings, items), strict=True):
                head: dict[str, Any] = {"index": index}
                if item.identifier is not None:
                    head["id"] = item.identifier
                if item.route is not None and item.route.adapter is not None:
                    head["adapter"] = item.route.adapter
                if isinstance(found, LaporaError):
                    if settings.on_error != "report":
                        raise found
                    failed += 1
                    yield head | {"error": str(found)}
                else:
                    yield head | found
                index += 1
            routes.rest()
    if failed:
        lines, each = ("line", "it") if failed == 1 else ("lines", "each")
        raise DataError(f"{failed} bad {lines}; {each} is reported in place of its prediction")


_Line = bytes | Mapping[str, Any]


def _windows(lines: Iterable[_Line | None], size: int) -> Generator[list[tuple[int, _Line]]]:
    """Yield windows of lines with their numbers, from 1; blank lines are skipped but counted in line numbers."""
    window: list[tuple[int, _Line]] = []
    number = 0
    for line in lines:
        if line is not None:
            number += 1
            if not isinstance(line, bytes) or line.strip(b" \t\r\n\xef\xbb\xbf"):
                window.append((number, line))
        if window and (line is None or len(window) == size):
            yield window
            window = []
    if window:
        yield window


def _read(routes: AdapterSelector, number: int, line: _Line) -> _Item:
    where = f"line {number}" if isinstance(line, bytes) else f"row {number - 1}"
    identifier = route = None
    try:
        if isinstance(line, bytes) and len(line) > LONGEST_LINE:
            raise DataError(f"{where}: longer than {LONGEST_LINE} bytes, the maximum length of a line")
        row = parse_json_line(line, where) if isinstance(line, bytes) else line
        identifier = _identifier(row.get("id"), where)
        route = routes.of(row, where)
        example = route.fitted.render(row, index=number - 1, where=where)
        return _Item(where, identifier, route, route.fitted.model.encode([example])[0])
    except LaporaError as error:
        return _Item(where, identifier, route, error)


def _identifier(value: Any, where: str) -> Any:
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        raise DataError(f"{where}: its id is {kind}; use a text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if value is None or isinstance(value, str | int | float) else str(value)  # dates of Parquet files


def _predict_window(
    routes: AdapterSelector, opened: OpenPredictor, settings: PredictSettings, items: Sequence[_Item]
) -> list[dict[str, Any] | LaporaError]:
    """Return the record or error of each line of a window, in order; rows are grouped by adapter."""
    answers: list[dict[str, Any] | LaporaError] = []
    turns: dict[int, tuple[Fitted, list[tuple[int, EncodedExample]]]] = {}
    for position, item in enumerate(items):
        if isinstance(item.content, LaporaError):
            answers.append(item.content)
        else:
            assert item.route is not None
            answers.append({})
            fitted = item.route.fitted
            turns.setdefault(id(fitted), (fitted, []))[1].append((position, item.content))
    found: dict[int, dict[str, Any] | LaporaError] = {}
    with routes.processes.raise_together():
        for fitted, readable in turns.values():
            good = routes.processes.shard(readable)
            for position, record in _predict_turn(fitted, opened.of(fitted), settings, good):
                if isinstance(record, NonFiniteRowError):
                    found[position] = NumericalError(f"{items[position].where}: {record.reason}")
                else:
                    found[position] = record
    for each in routes.processes.all_gather(found):
        for position, answered in each.items():
            answers[position] = answered
    return answers


def _predict_turn(
    fitted: Fitted,
    predictor: LinearisedPredictor,
    settings: PredictSettings,
    good: Sequence[tuple[int, EncodedExample]],
) -> Iterator[tuple[int, dict[str, Any] | NonFiniteRowError]]:
    """Yield positions and records of one adapter's rows, batch by batch."""

    def answer(batch: Batch) -> Sequence[dict[str, Any] | NonFiniteRowError]:
        try:
            return _records(fitted, settings, predictor, batch, [good[row][1].choices for row in batch.rows])
        except NonFiniteRowError:  # predict the other rows of the batch
            return [_alone(fitted, settings, predictor, good[row][1]) for row in batch.rows]

    for batch, records in run_batches(fitted.model.batches([coded for _, coded in good]), answer):
        for row, record in zip(batch.rows, records, strict=True):
            position, coded = good[row]
            if coded.truncated and not isinstance(record, NonFiniteRowError):
                record = {**record, "truncated": True}
            yield position, record


def _alone(
    fitted: Fitted, settings: PredictSettings, predictor: LinearisedPredictor, coded: EncodedExample
) -> dict[str, Any] | NonFiniteRowError:
    (batch,) = fitted.model.batches([coded])
    try:
        return _records(fitted, settings, predictor, batch, [coded.choices])[0]
    except NonFiniteRowError as error:
        return error


def _records(
    fitted: Fitted,
    settings: PredictSettings,
    predictor: LinearisedPredictor,
    batch: Batch,
    own_choices: Sequence[tuple[str, ...]],
) -> list[dict[str, Any]]:
    """Return the records of a batch; ``own_choices`` are the rows' own answers, or empty."""
    found = predictor.moments_under_each_prior(batch)
    for each in found:
        require_finite(each.covariance, batch)
    return fitted.model.likelihood.records(found, fitted.average.averaging, settings, batch.texts, own_choices)


_MOST_BASES = 4


@dataclass(frozen=True)
class Route:
    """The adapter that predicts a row.

    Attributes:
        fitted: The fitted adapter.
        adapter: Its name, or None if there is only one adapter.
    """

    fitted: Fitted
    adapter: str | None = None


class AdapterSelector(Protocol):
    """Selects the adapter of a row.

    Attributes:
        processes: The processes that share the rows.
        batch_rows: Rows per batch, or None for a token budget.
    """

    processes: Processes
    batch_rows: int | None

    def of(self, row: Mapping[str, Any], where: str) -> Route:
        """Return the adapter of a row.

        Raises:
            LaporaError: There is no such adapter, or it cannot be used.
        """

    def attach(self, fitted: Fitted) -> None:
        """Attach an adapter to its base."""

    def rest(self) -> None:
        """Evict least recently used adapters; called between windows of rows."""


class SingleAdapter:
    """Selects one adapter for all rows."""

    def __init__(self, fitted: Fitted) -> None:
        self.processes = fitted.model.processes
        self.batch_rows = fitted.model.batch_size.rows
        self._route = Route(fitted)

    def of(self, row: Mapping[str, Any], where: str) -> Route:
        """Return the adapter."""
        return self._route

    def attach(self, fitted: Fitted) -> None:
        """Do nothing: the adapter is always attached."""

    def rest(self) -> None:
        """Do nothing: the adapter is kept."""


class AdapterPool:
    """Selects the adapter that a row names; an adapter is loaded at its first row.

    Args:
        model: ADAPTER, the default for rows without a name, and how all adapters are run.
        settings: The other adapters, the field with the name, the number of adapters kept in memory.

    Raises:
        UsageError: Two adapters have the same name, or a folder has no adapters.
        AdapterError: An adapter on the Hub cannot be downloaded.
        PosteriorError: ADAPTER has no posterior, or that of another adapter or base.
    """

    def __init__(self, model: ModelSettings, settings: PredictSettings) -> None:
        self.processes = model.processes
        self.batch_rows = model.batch_size
        self._settings = settings
        self._bases = BaseCache(_MOST_BASES)
        self._open: dict[str, Fitted] = {}
        self._broken: dict[str, LaporaError] = {}
        self._default = Path(model.adapter).resolve().name
        own_place = _place(model.output_dir, self._default)
        alone = own_place is None or not own_place.is_dir()  # it was fitted alone, not with others by one command
        self._models = {self._default: model if alone else replace(model, output_dir=own_place)}
        for name, location, folder in named_adapters(settings.adapters):
            if name == self._default and location.resolve() == Path(model.adapter).resolve():
                continue  # ADAPTER itself, in a folder of adapters
            if name in self._models:
                raise UsageError(f"--adapter: two adapters are called {name}; give one another name with NAME=FOLDER")
            self._models[name] = replace(
                model,
                adapter=str(location),
                revision=None,
                fetched=None,
                output_dir=_place(model.output_dir, folder),
            )
        self._fitted(self._default)

    @property
    def names(self) -> list[str]:
        """Names of the adapters; the first is the default."""
        return list(self._models)

    def of(self, row: Mapping[str, Any], where: str) -> Route:
        """Return the adapter that the row's field names."""
        field = self._settings.adapter_field
        name = row.get(field, self._default)
        if not isinstance(name, str) or name not in self._models:
            known = ", ".join(list(self._models)[:8]) + (" ..." if len(self._models) > 8 else "")
            raise DataError(f"{where}: its {field} is {name!r:.80}; there are {known}")
        try:
            return Route(self._fitted(name), name)
        except LaporaError as error:
            self._broken.setdefault(name, _bare(error))
            raise

    def attach(self, fitted: Fitted) -> None:
        """Attach the adapter to its base."""
        self._bases.attach(fitted.model.loaded)

    def rest(self) -> None:
        """Evict the least recently used adapters beyond the maximum number."""
        while len(self._open) > self._settings.adapters_kept:
            name = next(iter(self._open))
            self._bases.evict(self._open.pop(name).model.loaded)

    def _fitted(self, name: str) -> Fitted:
        if name in self._broken:
            raise copy.copy(self._broken[name])
        fitted = self._open.pop(name, None)
        if fitted is None:
            fitted = open_fitted(self._models[name], self._settings.name, load=self._bases.load)
        self._open[name] = fitted  # the most recently used adapter is last
        return fitted


def _place(output_dir: Path | None, folder: str) -> Path | None:
    """Return the folder to which ``fit`` of several adapters writes the posterior of one."""
    return None if output_dir is None else output_dir / folder


def _bare(error: LaporaError) -> LaporaError:
    """Return the error without traceback and context, whose frames would keep tensors alive."""
    bare = copy.copy(error).with_traceback(None)
    bare.__cause__ = bare.__context__ = None
    return bare


def named_adapters(given: Sequence[str]) -> Iterator[tuple[str, Path, str]]:
    """Yield name, location and folder name of each adapter of ``[NAME=]LOCATION``.

    A location is an adapter, a Hub id, or a folder of adapters.

    Raises:
        UsageError: There is no adapter at a location.
        AdapterError: An adapter on the Hub cannot be downloaded.
    """
    for each in given:
        name, separator, location = each.partition("=")
        if "/" in name or os.sep in name or Path(each).exists():  # a path with "=" in it
            name, separator, location = "", "", each
        if is_hub_id(location):
            yield name or location, fetch_adapter(location), Path(location).name
            continue
        path = Path(location)
        if (path / CONFIG_FILE).is_file() or separator:
            yield name or path.resolve().name, path, path.resolve().name
            continue
        inside = sorted(file.parent for file in path.glob(f"*/{CONFIG_FILE}"))
        if not inside:
            raise UsageError(f"--adapter {each}: neither an adapter nor a folder of adapters")
        yield from ((folder.name, folder, folder.name) for folder in inside)


class OpenPredictor:
    """Holds the predictor of the last requested adapter: a base has one adapter attached at a time."""

    def __init__(self, routes: AdapterSelector, settings: PredictSettings) -> None:
        self._routes = routes
        self._settings = settings
        self._fitted: Fitted | None = None
        self._predictor: LinearisedPredictor | None = None

    def of(self, fitted: Fitted) -> LinearisedPredictor:
        """Return the adapter's predictor; another adapter's is closed."""
        if self._fitted is not fitted:
            self.close()
        self._routes.attach(fitted)  # reading another row may have attached another adapter
        if self._predictor is None:
            likelihood, settings = fitted.model.likelihood, self._settings
            check_likelihood(likelihood.name, settings)
            predictor = fitted.predictor(
                every_class=likelihood.needs_every_output(settings.link) or settings.logits,
                map_only=settings.link == "map" and not settings.logits,
            )
            self._predictor, self._fitted = predictor.__enter__(), fitted
        return self._predictor

    def close(self) -> None:
        """Close the predictor, which removes its hooks from the model."""
        if self._predictor is not None:
            self._predictor.__exit__(None, None, None)
        self._predictor = self._fitted = None


@contextmanager
def open_predictor(routes: AdapterSelector, settings: PredictSettings) -> Iterator[OpenPredictor]:
    """Yield an :class:`OpenPredictor` that is closed at the end of the context."""
    opened = OpenPredictor(routes, settings)
    try:
        yield opened
    finally:
        opened.close()
