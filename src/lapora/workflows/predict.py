"""``lapora predict``: JSON lines in, JSON lines out, in order, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from lapora.config import ModelSettings, PredictSettings
from lapora.errors import DataError
from lapora.predictive.links import log_probabilities, needs_every_class
from lapora.predictive.moments import LogitMoments
from lapora.predictive.predictor import LinearisedPredictor
from lapora.tasks import EncodedExample, parse_json_line, render
from lapora.workflows.session import Session, open_session

_WINDOW_BATCHES = 4
_DEFAULT_WINDOW = 64


def predict(model: ModelSettings, settings: PredictSettings, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Predict one record per input line.

    Args:
        model: The adapter and how to run it.
        settings: Link, samples, what is written.
        lines: JSON lines, as bytes.

    Yields:
        The records of the interface, in input order; a window of rows at a time is in memory.

    Raises:
        DataError: A bad line with ``on_error="stop"`` (the line is named, and what came before has been
            yielded), or at the end of the run with ``"report"``.
    """
    session = open_session(model, settings.name)
    failed = 0
    with session.predictor(
        every_class=needs_every_class(settings.link) or settings.logits,
        map_only=settings.link == "map" and not settings.logits,
    ) as predictor:
        for window in _windows(lines, (model.batch_size or _DEFAULT_WINDOW // _WINDOW_BATCHES) * _WINDOW_BATCHES):
            read = [_read(session, index, line) for index, line in window]
            bad = next((i for i, item in enumerate(read) if isinstance(item[1], DataError)), None)
            stop = settings.on_error == "stop" and bad is not None
            kept = read[:bad] if stop else read
            yield from _predict_window(session, predictor, settings, window[0][0], kept)
            if stop and bad is not None:
                raise cast(DataError, read[bad][1])
            failed += sum(isinstance(item[1], DataError) for item in kept)
    if failed:
        raise DataError(f"{failed} bad lines; each is reported where its prediction would stand")


def _windows(lines: Iterable[bytes], size: int) -> Iterator[list[tuple[int, bytes]]]:
    window: list[tuple[int, bytes]] = []
    index = 0
    for line in lines:
        if not line.strip():
            continue  # blank lines are nobody's row
        window.append((index, line))
        index += 1
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def _read(session: Session, index: int, line: bytes) -> tuple[Any, EncodedExample | DataError]:
    """A line's ``id`` and its token ids, or what is wrong with it."""
    where = f"line {index + 1}"
    identifier = None
    try:
        row = parse_json_line(line, where)
        identifier = row.get("id")
        example = render(
            session.task,
            row,
            kind=session.loaded.kind,
            index=index,
            labels="ignore",
            choices=session.choices,
            where=where,
        )
        return identifier, session.encode([example])[0]
    except DataError as error:
        return identifier, error


def _predict_window(
    session: Session,
    predictor: LinearisedPredictor,
    settings: PredictSettings,
    first: int,
    items: list[tuple[Any, Any]],
) -> Iterator[dict[str, Any]]:
    good = [position for position, (_, coded) in enumerate(items) if not isinstance(coded, DataError)]
    records: dict[int, dict[str, Any]] = {}
    for batch in session.batches([items[position][1] for position in good]):
        moments = predictor.moments(batch)
        for row, record in zip(batch.rows, _records(session, settings, moments), strict=True):
            records[good[row]] = record
    for position, (identifier, coded) in enumerate(items):
        head: dict[str, Any] = {"index": first + position}
        if identifier is not None:
            head["id"] = identifier
        if isinstance(coded, DataError):
            yield head | {"error": str(coded)}
        else:
            yield head | records[position] | ({"truncated": True} if coded.truncated else {})


def _records(session: Session, settings: PredictSettings, moments: LogitMoments) -> Iterator[dict[str, Any]]:
    log_p = log_probabilities(settings.link, moments, samples=settings.samples, seed=settings.seed)
    log_map = log_probabilities("map", moments)
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
        yield record
