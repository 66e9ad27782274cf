"""Settings of every command, with their defaults; the command line reads both from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lapora.distributed import SINGLE_PROCESS, Processes
from lapora.errors import UsageError

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Quantization = Literal["none", "8bit", "4bit"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Structure = Literal["kron", "ekfac", "diag", "lowrank", "full"]
WeightSharing = Literal["expand", "reduce", "asdl"]
Engine = Literal["native", "asdl", "curvlinops"]
Subset = Literal["lora", "last-layer", "all"]
FisherType = Literal["exact", "mc", "empirical"]
PriorMethod = Literal["auto", "marglik", "adapted", "validation"]
FitPrior = Literal["averaged", "marglik"]
PriorStructure = Literal["scalar", "kind", "layer"]
PriorChoice = Literal["scalar", "kind", "layer", "point"]
Optimizer = Literal["exact", "adam"]
Link = Literal["mc-joint", "mc-indep", "probit", "bridge", "map"]
Method = Literal["constant", "map", "temperature", "mc-dropout", "ensemble", "laplace"]
OnError = Literal["stop", "report"]

Progress = Callable[[int, int], None]
"""Told of rows done and rows in all."""

JOINT_STRUCTURES: tuple[Structure, ...] = ("lowrank", "full")
"""Structures with one basis for all layers; the others have blocks, one for each layer."""

JOINT = "joint"
"""Prefix of the tensors of a posterior whose basis spans all layers."""

BASELESS_STRUCTURES: tuple[Structure, ...] = ("diag",)
"""Structures of blocks in the weights' own coordinates."""

DEFAULT_SAMPLES = 2048
"""Quasi-Monte-Carlo points of the sampling links, for more than two answers."""


@dataclass(frozen=True)
class Placement:
    """How a model larger than a device is spread, by Accelerate.

    Attributes:
        device_map: ``auto``, ``balanced``, ``balanced_low_0`` or ``sequential``.
        max_memory: Bounds for devices and host: ``0=20GiB,cpu=60GiB``.
        offload_dir: Folder for what does not fit in memory, where the base's own files cannot serve.
    """

    device_map: DeviceMap
    max_memory: str | None = None
    offload_dir: Path | None = None


@dataclass(frozen=True)
class ModelSettings:
    """Which adapter, on which base, run how. None means: as ``fit`` recorded it.

    Attributes:
        adapter: Its folder, or its id on the Hub.
        base_model: Folder or Hub id, if not the one that the adapter records.
        quantize: Load the base in 8 or 4 bits.
        dtype: Of the base's weights.
        device: ``auto``, ``cpu``, ``cuda`` ...
        batch_size: Rows per batch; None is a token budget.
        output_dir: Where ``laplace/`` is, if not in the adapter's folder.
        trust_remote_code: Run the code that a base model or tokenizer brings along.
        revision: Branch, tag or commit of an adapter on the Hub.
        fetched: Where an adapter of the Hub was fetched to; set by :func:`lapora.models.adapter.local_model`.
        processes: Those that share the rows, from :func:`lapora.distributed.init_processes`.
        gradient_checkpointing: Keep of a transformer block its input alone, and run it again in the backward pass.
        device_map: Spread the layers of a model larger than a device over devices, host and disk.
        max_memory: With ``device_map``: ``0=20GiB,cpu=60GiB``.
        offload_dir: With ``device_map``: folder for what does not fit in memory.
    """

    adapter: str
    base_model: str | None = None
    quantize: Quantization | None = None
    dtype: Dtype | None = None
    device: str = "auto"
    batch_size: int | None = None
    output_dir: Path | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    fetched: Path | None = None
    processes: Processes = SINGLE_PROCESS
    gradient_checkpointing: bool = False
    device_map: DeviceMap | None = None
    max_memory: str | None = None
    offload_dir: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder that holds the adapter's files; of a Hub id, where they were fetched to."""
        return self.fetched or Path(self.adapter)

    @property
    def spread(self) -> Placement | None:
        """How the layers are spread, or None for one device.

        Raises:
            UsageError: Options of a spread without one, or beside a device.
        """
        if self.device_map is None:
            if self.max_memory is not None or self.offload_dir is not None:
                raise UsageError("--max-memory and --offload-dir go with --device-map")
            return None
        if self.device != "auto":
            raise UsageError(f"--device-map {self.device_map} chooses devices itself: leave --device {self.device} out")
        return Placement(self.device_map, self.max_memory, self.offload_dir)

    @property
    def root(self) -> Path:
        """The folder that holds ``laplace/``."""
        return self.output_dir or self.folder


@dataclass(frozen=True)
class DataSettings:
    """Which rows. None means: as ``fit`` recorded it.

    Attributes:
        task: A built-in task, or the path of a YAML file.
        data_dir: Folder with ``SPLIT.jsonl`` (.json, .csv, .parquet); None reads the Hub.
        split: Its name.
        limit: Only the first so many rows; for ``tune-prior``, how many of the split.
    """

    task: str | None = None
    data_dir: Path | None = None
    split: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class FitSettings:
    """What the posterior is made of.

    Attributes:
        structure: Shape of the curvature.
        weight_sharing: KFAC for shared weights; asdl is the paper's stack.
        engine: Who computes it; two are laplace-torch's.
        subset: Which weights are Bayesian.
        fisher: Which Fisher.
        rank: Rank kept, of kron's wide sides or of lowrank; None keeps kron's sides whole up to
            :data:`WHOLE_WIDTH`, else :data:`WIDE_RANK`, and is :data:`DEFAULT_RANK` for lowrank.
        name: Of the posterior.
        max_length: Tokens per row; None is the task's.
        chat_template: Wrap prompts in the tokenizer's chat template.
        seed: Of whatever is random.
        overwrite: Replace a posterior of that name.
        resume: Go on from what a fit that was ended has saved.
        save_every: Seconds between saves for ``resume``; 0 is every batch.
        offload_factors: Keep Kronecker sums in the host's memory.
        prior_method: Average over the prior precisions that the training rows tolerate, or choose one by marginal
            likelihood.
    """

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
    prior_method: FitPrior = "averaged"


@dataclass(frozen=True)
class PriorSettings:
    """How the prior precision is chosen.

    Attributes:
        name: Of the posterior.
        method: How; auto is validation where the task has rows for it, else the marginal likelihood.
        structure: One precision, or one per kind (A, B, head) or layer.
        optimizer: Of the marginal likelihood; adam is the paper's.
        learning_rate: Of adam, on log δ.
        steps: Of adam.
        link: Link to tune for, by validation.
        seed: Of the half of the validation rows that is taken.
    """

    name: str = "default"
    method: PriorMethod = "auto"
    structure: PriorChoice = "scalar"
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
