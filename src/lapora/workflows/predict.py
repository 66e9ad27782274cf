"""``lapora predict``: JSON lines in, JSON lines out, in order, batch by batch."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from lapora.config import LONGEST_LINE, ModelSettings, PredictSettings
from lapora.errors import DataError, LaporaError, NonFiniteRowError, NumericalError
from lapora.model.batch_feed import run_batches
from lapora.model.batches import Batch
from lapora.predictive.links import log_probabilities
from lapora.predictive.predictor import LinearisedPredictor
from lapora.tasks import EncodedExample, parse_json_line, render
from lapora.workflows.naming import refuse_infinite
from lapora.workflows.routing import AdapterRoutes, OneRoute, OpenPredictor, Route, Routes, open_predictor
from lapora.workflows.session import Session, open_session

_WINDOW_BATCHES = 4
_DEFAULT_WINDOW = 64


@dataclass(frozen=True)
class _Item:
    """One input line: what messages call it, its ``id``, its adapter, and its token ids or what is wrong with it."""

    where: str
    identifier: Any
    route: Route | None
    content: EncodedExample | LaporaError


def predict(model: ModelSettings, settings: PredictSettings, lines: Iterable[bytes | None]) -> Iterator[dict[str, Any]]:
    """Predict one record per input line.

    Args:
        model: The adapter and how to run it.
        settings: Link, samples, what is written, other adapters.
        lines: JSON lines, as bytes; None says that no more will come for a while, and what came is answered.

    Yields:
        The records of the interface, in input order; a window of rows at a time is in memory.

    Raises:
        DataError: A bad line with ``on_error="stop"`` (the line is named, and what came before has been
            yielded), or at the end of the run with ``"report"``.
        NumericalError: The same for a line of which the model makes NaN or infinity.
    """
    if settings.adapters:
        yield from predict_routed(AdapterRoutes(model, settings), settings, lines)
    else:
        yield from predict_rows(open_session(model, settings.name), settings, lines)


def predict_rows(
    session: Session, settings: PredictSettings, rows: Iterable[bytes | Mapping[str, Any] | None]
) -> Iterator[dict[str, Any]]:
    """Predict with an open session; see :func:`predict`.

    Args:
        session: The fitted adapter.
        settings: Link, samples, what is written.
        rows: JSON lines, or the objects themselves.

    Yields:
        The records of the interface, in input order.

    Raises:
        DataError: A bad row; see :func:`predict`.
        NumericalError: The same for a row of which the model makes NaN or infinity.
    """
    yield from predict_routed(OneRoute(session), settings, rows)


def predict_routed(
    routes: Routes, settings: PredictSettings, rows: Iterable[bytes | Mapping[str, Any] | None]
) -> Iterator[dict[str, Any]]:
    """Predict each row with the adapter that the routes know of; see :func:`predict`."""
    index = failed = 0
    size = (routes.batch_rows or _DEFAULT_WINDOW // _WINDOW_BATCHES) * _WINDOW_BATCHES * routes.processes.count
    with (
        open_predictor(routes, settings) as opened,
        closing(routes.processes.relay(_windows(rows, size))) as windows,
    ):
        for window in windows:
            items: list[_Item] = []
            for number, line in window:
                item = _read(routes, number, line)
                items.append(item)
                if settings.on_error == "stop" and isinstance(item.content, LaporaError):
                    break  # what follows is not answered any more
            for item, found in zip(items, _predict_window(routes, opened, settings, items), strict=True):
                head: dict[str, Any] = {"index": index}
                if item.identifier is not None:
                    head["id"] = item.identifier
                if item.route is not None and item.route.adapter is not None:
                    head["adapter"] = item.route.adapter
                if isinstance(found, LaporaError):
                    if settings.on_error == "stop":
                        raise found
                    failed += 1
                    yield head | {"error": str(found)}
                else:
                    yield head | found
                index += 1
            routes.rest()
    if failed:
        raise DataError(f"{failed} bad lines; each is reported where its prediction would stand")


_Line = bytes | Mapping[str, Any]


def _windows(lines: Iterable[_Line | None], size: int) -> Generator[list[tuple[int, _Line]]]:
    """Lines with their numbers, from 1, some at a time; blank lines are counted, and are nobody's row."""
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


def _read(routes: Routes, number: int, line: _Line) -> _Item:
    where = f"line {number}" if isinstance(line, bytes) else f"row {number - 1}"
    identifier = route = None
    try:
        if isinstance(line, bytes) and len(line) > LONGEST_LINE:
            raise DataError(f"{where}: longer than {LONGEST_LINE} bytes, which is no row")
        row = parse_json_line(line, where) if isinstance(line, bytes) else line
        identifier = _identifier(row.get("id"), where)
        route = routes.of(row, where)
        session = route.session
        example = render(
            session.task,
            row,
            kind=session.loaded.kind,
            index=number - 1,
            labels="ignore",
            choices=session.choices,
            where=where,
        )
        return _Item(where, identifier, route, session.encode([example])[0])
    except LaporaError as error:
        return _Item(where, identifier, route, error)


def _identifier(value: Any, where: str) -> Any:
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        raise DataError(f"{where}: its id is {kind}; use a text or a number")
    return value


def _predict_window(
    routes: Routes, opened: OpenPredictor, settings: PredictSettings, items: Sequence[_Item]
) -> list[dict[str, Any] | LaporaError]:
    """What is answered to each line of a window, in order; each adapter has its turn."""
    answers: list[dict[str, Any] | LaporaError] = []
    turns: dict[int, tuple[Session, list[tuple[int, EncodedExample]]]] = {}
    for position, item in enumerate(items):
        if isinstance(item.content, LaporaError):
            answers.append(item.content)
        else:
            assert item.route is not None
            answers.append({})
            session = item.route.session
            turns.setdefault(id(session), (session, []))[1].append((position, item.content))
    found: dict[int, dict[str, Any] | LaporaError] = {}
    with routes.processes.in_step():
        for session, readable in turns.values():
            good = routes.processes.share(readable)
            for position, record in _predict_turn(session, opened.of(session), settings, good):
                if isinstance(record, NonFiniteRowError):
                    found[position] = NumericalError(f"{items[position].where}: {record.reason}")
                else:
                    found[position] = record
    for each in routes.processes.gather(found):
        for position, answered in each.items():
            answers[position] = answered
    return answers


def _predict_turn(
    session: Session,
    predictor: LinearisedPredictor,
    settings: PredictSettings,
    good: Sequence[tuple[int, EncodedExample]],
) -> Iterator[tuple[int, dict[str, Any] | NonFiniteRowError]]:
    """Positions and records of one adapter's rows, as batches are done."""

    def answer(batch: Batch) -> Sequence[dict[str, Any] | NonFiniteRowError]:
        try:
            return _records(session, settings, predictor, batch)
        except NonFiniteRowError:  # the others are answered all the same
            return [_alone(session, settings, predictor, good[row][1]) for row in batch.rows]

    for batch, records in run_batches(session.batches([coded for _, coded in good]), answer):
        for row, record in zip(batch.rows, records, strict=True):
            position, coded = good[row]
            if coded.truncated and not isinstance(record, NonFiniteRowError):
                record = {**record, "truncated": True}
            yield position, record


def _alone(
    session: Session, settings: PredictSettings, predictor: LinearisedPredictor, coded: EncodedExample
) -> dict[str, Any] | NonFiniteRowError:
    (batch,) = session.batches([coded])
    try:
        return _records(session, settings, predictor, batch)[0]
    except NonFiniteRowError as error:
        return error


def _records(
    session: Session, settings: PredictSettings, predictor: LinearisedPredictor, batch: Batch
) -> list[dict[str, Any]]:
    moments = predictor.moments(batch)
    refuse_infinite(moments.covariance, batch)
    log_p = log_probabilities(settings.link, moments, samples=settings.samples, seed=settings.seed)
    log_map = log_probabilities("map", moments)
    records = []
    for row in range(len(log_p)):
        p = log_p[row].exp()
        best = int(p.argmax())
        record: dict[str, Any] = {
            "prediction": session.choices[best],
            "confidence": float(p[best]),
            "entropy": float(-(p * log_p[row]).nan_to_num(0.0).sum()),
            "probabilities": dict(zip(session.choices, p.tolist(), strict=True)),
            "map_probabilities": dict(zip(session.choices, log_map[row].exp().tolist(), strict=True)),
        }
        if settings.logits:
            record["logits"] = {
                "mean": moments.mean[row].double().tolist(),
                "covariance": moments.covariance[row].tolist(),
            }
        if settings.abstain_below is not None:
            record["abstained"] = record["confidence"] < settings.abstain_below
        records.append(record)
    return records
