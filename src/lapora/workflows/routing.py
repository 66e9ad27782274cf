"""Which adapter answers a row: one for all, or the one that a field of the row names, all on the same base models."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lapora.config import ModelSettings, PredictSettings
from lapora.errors import DataError, LaporaError, UsageError
from lapora.model.adapter import CONFIG_FILE
from lapora.model.bases import SharedBases
from lapora.model.hub import fetch_adapter, is_hub_id
from lapora.predictive.links import needs_every_class
from lapora.predictive.predictor import LinearisedPredictor
from lapora.processes import Processes
from lapora.workflows.session import Session, open_session

_MOST_BASES = 4


@dataclass(frozen=True)
class Route:
    """Where a row goes.

    Attributes:
        session: The fitted adapter.
        adapter: Its name, or None where there is one adapter alone.
    """

    session: Session
    adapter: str | None = None


class Routes(Protocol):
    """Knows the adapter of a row.

    Attributes:
        processes: Those that share the rows.
        batch_rows: Rows of a batch, or None for a budget of tokens.
    """

    processes: Processes
    batch_rows: int | None

    def of(self, row: Mapping[str, Any], where: str) -> Route:
        """The adapter of a row.

        Raises:
            LaporaError: There is no such adapter, or it cannot be used.
        """

    def put_on(self, session: Session) -> None:
        """Make the model ready to run a session's adapter."""

    def rest(self) -> None:
        """No row is under way: what will hardly be needed may go."""


class OneRoute:
    """All rows go to one adapter."""

    def __init__(self, session: Session) -> None:
        self.processes = session.processes
        self.batch_rows = session.batch_size.rows
        self._route = Route(session)

    def of(self, row: Mapping[str, Any], where: str) -> Route:
        """The one there is."""
        return self._route

    def put_on(self, session: Session) -> None:
        """It is on."""

    def rest(self) -> None:
        """Nothing may go."""


class AdapterRoutes:
    """Rows go to the adapter that they name; adapters are opened when the first row asks for them.

    Args:
        model: ADAPTER, which answers rows that name none, and how all of them are run.
        settings: The other adapters, the field, how many stay open.

    Raises:
        UsageError: Two adapters of one name, or a folder without any.
        AdapterError: One on the Hub cannot be fetched.
        PosteriorError: ADAPTER has no posterior, or one of something else.
    """

    def __init__(self, model: ModelSettings, settings: PredictSettings) -> None:
        self.processes = model.processes
        self.batch_rows = model.batch_size
        self._settings = settings
        self._bases = SharedBases(_MOST_BASES)
        self._open: dict[str, Session] = {}
        self._broken: dict[str, LaporaError] = {}
        self._default = Path(model.adapter).name
        own_place = _place(model.output_dir, self._default)
        alone = own_place is None or not own_place.is_dir()  # fitted by itself, not as one of several
        self._models = {self._default: model if alone else replace(model, output_dir=own_place)}
        for name, location, folder in named_adapters(settings.adapters):
            if name in self._models:
                raise UsageError(f"--adapter: two adapters are called {name}; give one another name with NAME=FOLDER")
            self._models[name] = replace(
                model,
                adapter=str(location),
                revision=None,
                fetched=None,
                output_dir=_place(model.output_dir, folder),
            )
        self._session(self._default)

    @property
    def names(self) -> list[str]:
        """Of the adapters; the first answers rows that name none."""
        return list(self._models)

    def of(self, row: Mapping[str, Any], where: str) -> Route:
        """The adapter that the row's field names."""
        field = self._settings.adapter_field
        name = row.get(field, self._default)
        if not isinstance(name, str) or name not in self._models:
            known = ", ".join(list(self._models)[:8]) + (" ..." if len(self._models) > 8 else "")
            raise DataError(f"{where}: its {field} is {name!r:.80}; there are {known}")
        try:
            return Route(self._session(name), name)
        except LaporaError as error:
            self._broken.setdefault(name, _bare(error))
            raise

    def put_on(self, session: Session) -> None:
        """Put the session's adapter on its base."""
        self._bases.put_on(session.loaded)

    def rest(self) -> None:
        """Close the adapters that were not asked for longest."""
        while len(self._open) > self._settings.adapters_kept:
            name = next(iter(self._open))
            self._bases.forget(self._open.pop(name).loaded)

    def _session(self, name: str) -> Session:
        if name in self._broken:
            raise copy.copy(self._broken[name])
        session = self._open.pop(name, None)
        if session is None:
            session = open_session(self._models[name], self._settings.name, bases=self._bases)
        self._open[name] = session  # the last asked for stands last
        return session


def _place(output_dir: Path | None, folder: str) -> Path | None:
    """Where ``fit`` of several adapters puts the posterior of one."""
    return None if output_dir is None else output_dir / folder


def _bare(error: LaporaError) -> LaporaError:
    """The error without the frames it came through, which hold whatever was at work there."""
    bare = copy.copy(error).with_traceback(None)
    bare.__cause__ = bare.__context__ = None
    return bare


def named_adapters(given: Sequence[str]) -> Iterator[tuple[str, Path, str]]:
    """Names, locations and folders' names of ``[NAME=]LOCATION``: an adapter, one on the Hub, or a folder of adapters.

    Raises:
        UsageError: No adapter there.
        AdapterError: The Hub has none.
    """
    for each in given:
        name, separator, location = each.rpartition("=")
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
    """The predictor of the session that was asked for last: the model has one adapter on it at a time."""

    def __init__(self, routes: Routes, settings: PredictSettings) -> None:
        self._routes = routes
        self._every_class = needs_every_class(settings.link) or settings.logits
        self._map_only = settings.link == "map" and not settings.logits
        self._session: Session | None = None
        self._predictor: LinearisedPredictor | None = None

    def of(self, session: Session) -> LinearisedPredictor:
        """The session's predictor; another session's is closed."""
        if self._session is not session:
            self.close()
        self._routes.put_on(session)  # a row that was read meanwhile may have put on another
        if self._predictor is None:
            predictor = session.predictor(every_class=self._every_class, map_only=self._map_only)
            self._predictor, self._session = predictor.__enter__(), session
        return self._predictor

    def close(self) -> None:
        """Leave the model as it is without a predictor."""
        if self._predictor is not None:
            self._predictor.__exit__(None, None, None)
        self._predictor = self._session = None


@contextmanager
def open_predictor(routes: Routes, settings: PredictSettings) -> Iterator[OpenPredictor]:
    """An :class:`OpenPredictor` that is closed in the end."""
    opened = OpenPredictor(routes, settings)
    try:
        yield opened
    finally:
        opened.close()
