"""Many adapters on one base, for a service: each row is answered by the adapter that it names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from lapora.api import RowPrediction
from lapora.config import ModelSettings, PredictSettings
from lapora.model.hub import local_model
from lapora.options import LinkOptions, ModelOptions, settings_of, takes
from lapora.workflows.predict import predict_routed
from lapora.workflows.routing import AdapterRoutes


class RoutedPredictor:
    """Adapters of one base, opened when they are first asked for; made by :func:`load_many`."""

    def __init__(self, routes: AdapterRoutes, name: str) -> None:
        self._routes = routes
        self._name = name

    @property
    def adapters(self) -> list[str]:
        """The names that rows may give; the first answers rows that give none."""
        return self._routes.names

    @takes(LinkOptions, PredictSettings)
    def predict(
        self, rows: Iterable[Mapping[str, Any]], *, logits: bool = False, **options: Unpack[LinkOptions]
    ) -> list[RowPrediction]:
        """Predict rows, in order.

            >>> predictor = lapora.load_many("adapter", ["other=adapter"])
            >>> rows = [{"story": "the cows are in the barn ?"}, {"story": "anna is quiet ?", "adapter": "other"}]
            >>> [sorted(answer.probabilities) for answer in predictor.predict(rows)]
            [['no', 'yes'], ['no', 'yes']]

        Args:
            rows: Rows with their task's fields and, in ``adapter``, a name.
            logits: Give the logits' mean and covariance too.
            options: Link, points of the sampling links, seed: :class:`lapora.options.LinkOptions`.

        Raises:
            DataError: A row lacks a field, or names an adapter that is none; the message names the row, from 0.
            AdapterError, PosteriorError: The adapter that a row names cannot be used.
            NumericalError: The model makes NaN or infinity of a row.
        """
        settings = PredictSettings(name=self._name, logits=logits, **options)
        return [RowPrediction.of(record) for record in predict_routed(self._routes, settings, rows)]


@takes(ModelOptions, ModelSettings)
def load_many(
    adapter: str | Path,
    adapters: Sequence[str | Path],
    *,
    name: str = "default",
    adapter_field: str = "adapter",
    adapters_kept: int = 16,
    **options: Unpack[ModelOptions],
) -> RoutedPredictor:
    """Load fitted adapters on the base models that they share; ``lapora predict --adapter``.

        >>> lapora.load_many("adapter", ["other=adapter"]).adapters
        ['adapter', 'other']

    Args:
        adapter: Answers rows that name none.
        adapters: The others: folders, ``NAME=FOLDER``, ids on the Hub, or folders of adapters.
        name: Of their posteriors.
        adapter_field: The field in which rows name their adapter.
        adapters_kept: How many stay in memory between calls.
        options: Base model, type, device, batch size: :class:`lapora.options.ModelOptions`.

    Raises:
        UsageError: Two adapters of one name, or a folder without any.
        AdapterError: ADAPTER cannot be loaded.
        PosteriorError: It has no posterior, or one of something else.
    """
    model = local_model(ModelSettings(str(adapter), **settings_of(ModelSettings, options)))
    settings = PredictSettings(
        name=name,
        adapters=tuple(map(str, adapters)),
        adapter_field=adapter_field,
        adapters_kept=adapters_kept,
    )
    return RoutedPredictor(AdapterRoutes(model, settings), name)
