"""Settings of every command, with their defaults; the command line reads both from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lapora.processes import ALONE, Processes

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Quantisation = Literal["none", "8bit", "4bit"]
Structure = Literal["kron", "ekfac", "diag", "lowrank", "full"]
WeightSharing = Literal["expand", "reduce", "asdl"]
Engine = Literal["native", "asdl", "curvlinops"]
Subset = Literal["lora", "last-layer", "all"]
FisherType = Literal["exact", "mc", "empirical"]
PriorMethod = Literal["auto", "marglik", "adapted", "validation"]
PriorStructure = Literal["scalar", "kind", "layer"]
Optimizer = Literal["exact", "adam"]
Link = Literal["mc-joint", "mc-indep", "probit", "bridge", "map"]
Method = Literal["constant", "map", "temperature", "mc-dropout", "ensemble", "laplace"]
OnError = Literal["stop", "report"]

Progress = Callable[[int, int], None]
"""Told of rows done and rows in all."""

DEFAULT_SAMPLES = 2048
"""Quasi-Monte-Carlo points of the sampling links, for more than two answers."""


@dataclass(frozen=True)
class ModelSettings:
    """Which adapter, on which base, run how. None means: as ``fit`` recorded it."""

    adapter: str
    base_model: str | None = None
    quantize: Quantisation | None = None
    dtype: Dtype | None = None
    device: str = "auto"
    batch_size: int | None = None
    output_dir: Path | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    fetched: Path | None = None
    processes: Processes = ALONE
    gradient_checkpointing: bool = False

    @property
    def folder(self) -> Path:
        """The folder that holds the adapter's files; of a Hub id, where they were fetched to."""
        return self.fetched or Path(self.adapter)

    @property
    def root(self) -> Path:
        """The folder that holds ``laplace/``."""
        return self.output_dir or self.folder


@dataclass(frozen=True)
class DataSettings:
    """Which rows. None means: as ``fit`` recorded it."""

    task: str | None = None
    data_dir: Path | None = None
    split: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class FitSettings:
    """What the curvature is made of."""

    structure: Structure = "kron"
    weight_sharing: WeightSharing = "expand"
    engine: Engine = "native"
    subset: Subset = "lora"
    fisher: FisherType = "exact"
    rank: int | None = None
    name: str = "default"
    max_length: int | None = None
    chat_template: bool = False
    seed: int = 0
    overwrite: bool = False
    resume: bool = False
    save_every: float = 60.0
    offload_factors: bool = False


@dataclass(frozen=True)
class PriorSettings:
    """How the prior precision is chosen."""

    name: str = "default"
    method: PriorMethod = "auto"
    structure: PriorStructure = "scalar"
    optimizer: Optimizer = "exact"
    learning_rate: float = 0.1
    steps: int = 1000
    link: Link = "mc-joint"
    seed: int = 0


@dataclass(frozen=True)
class EvalSettings:
    """What is scored beside what.

    Attributes:
        methods: Which; ``all`` is every one that there is, and every saved posterior and link unless named.
        names: Saved posteriors; empty means ``default``, or under ``all`` every one.
        links: Links of each; empty means mc-joint, or under ``all`` every one.
        samples: Points of the sampling links.
        seed: Of whatever is random.
        dropout_samples: Passes of MC dropout.
        ensemble: Other adapters, or folders of checkpoints, to average with ADAPTER.
        temperature_split: Split that the temperature is fitted on; None means the rows that tuned the prior.
        temperature_oracle: Add the temperature fitted on the scored rows themselves.
        ood: Tasks of other data.
        ood_data_dirs: Their folders: one for all, or one for each.
        coverage: Share of rows to keep, for which a threshold is wanted.
    """

    methods: tuple[Method | Literal["all"], ...] = ("constant", "map", "laplace")
    names: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()
    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    dropout_samples: int = 20
    ensemble: tuple[Path, ...] = ()
    temperature_split: str | None = None
    temperature_oracle: bool = False
    ood: tuple[str, ...] = ()
    ood_data_dirs: tuple[Path, ...] = ()
    coverage: float | None = None


@dataclass(frozen=True)
class PredictSettings:
    """How logit moments become probabilities, what is written, and which adapters answer.

    Attributes:
        name: Of the posterior.
        link: How moments become probabilities.
        samples: Points of the sampling links.
        seed: Their scrambling.
        logits: Write the logits' mean and covariance.
        on_error: What a bad line does.
        abstain_below: Mark rows of less confidence.
        adapters: Further adapters, ``[NAME=]LOCATION`` each, for rows that name them.
        adapter_field: The field in which rows do so.
        adapters_kept: How many adapters stay open between windows.
    """

    name: str = "default"
    link: Link = "mc-joint"
    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    logits: bool = False
    on_error: OnError = "stop"
    abstain_below: float | None = None
    adapters: tuple[str, ...] = ()
    adapter_field: str = "adapter"
    adapters_kept: int = 16


DEFAULT_RANK = 400
"""Rank of ``--structure lowrank``: what real adapters needed to come within 0.01 in NLL of ``full``."""

WHOLE_WIDTH = 1024
"""Sides of a Kronecker block up to this width are kept whole, unless a rank is asked for."""

WIDE_RANK = 256
"""Rank kept of wider sides: on real adapters of width 384, rank 128 came within 0.001 in NLL of the whole."""

TOKEN_BUDGET = 2048
"""Tokens per batch, padding included, that ``--batch-size auto`` begins with."""

MOST_TOKENS = 2**17
"""Tokens per batch beyond which ``--batch-size auto`` does not grow: larger ones are no faster on any device."""

LONGEST_LINE = 16 * 2**20
"""Bytes of an input line of ``predict``; a longer one is no row, and not held in memory."""


def method_label(method: str, name: str | None = None, link: str | None = None) -> str:
    """How tables, pictures and gates name a method: ``laplace default (mc-joint)``."""
    return " ".join(part for part in (method, name, f"({link})" if link else None) if part)
