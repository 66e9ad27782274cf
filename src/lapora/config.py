"""Settings of every command. An option is declared here once: name, type, default, help, bounds and panel.

The command line (:mod:`lapora.cli.arguments`), the Python API (:mod:`lapora.options`) and their reference pages are
made from these classes. To add an option, add a field with an :class:`Option` and run ``make options docs-reference``.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

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
LikelihoodName = Literal["categorical", "preference", "gaussian", "bernoulli", "multilabel"]
Method = Literal["constant", "map", "temperature", "mc-dropout", "ensemble", "laplace"]
OnError = Literal["stop", "report"]
Remainder = Literal["mean", "none"]

Progress = Callable[[int, int], None]
"""Progress callback: rows done, rows in total."""

JOINT_STRUCTURES: tuple[Structure, ...] = ("lowrank", "full")
"""Structures with one basis for all layers; the others have one block per layer."""

JOINT = "joint"
"""Prefix of the tensors of a posterior whose basis spans all layers."""

BASELESS_STRUCTURES: tuple[Structure, ...] = ("diag",)
"""Structures whose blocks are diagonal in the coordinates of the weights."""

DEFAULT_RANK = 400
"""Default rank of ``--structure lowrank``: real adapters need it to come within 0.01 of ``full`` in NLL."""

KRON_RANK = 32
"""Default rank of Kronecker factors; wider ones keep the mean of their remaining eigenvalues."""

COMPLETE = sys.maxsize
"""Rank of complete bases."""

ENOUGH_ROWS = 20
"""Minimum number of rows for a comparison: with fewer, the coverage of a bootstrap interval is too low."""

DEFAULT_SAMPLES = 2048
"""Default number of quasi-Monte-Carlo points of the sampling links; used for more than two answers."""

DEFAULT_INTERVAL = 0.9
"""Probability of the central intervals of a regression."""

TOKEN_BUDGET = 2048
"""Tokens per batch, padding included, that ``--batch-size auto`` starts with."""

MOST_TOKENS = 2**17
"""Maximum tokens per batch of ``--batch-size auto``: larger batches are no faster on any device."""

LONGEST_LINE = 16 * 2**20
"""Maximum length of an input line of ``predict``, in bytes; longer lines are rejected without being stored."""


FITTED, PRIOR, PREDICTIONS, SCORES = "What is fitted", "Prior", "Predictions", "What is scored"
CHECKPOINTS = "Checkpoints (with --checkpoints)"
DATA, MODEL, OUTPUT, ADVANCED = "Data", "Model", "Output", "Advanced"
PANELS = (FITTED, PRIOR, PREDICTIONS, SCORES, CHECKPOINTS, DATA, MODEL, OUTPUT, ADVANCED)
"""Panels of ``--help``, in the order in which they are shown."""

ONE_PANEL = 10
"""Commands with no more options than this show them in one panel."""


@dataclass(frozen=True)
class Option:
    """Declaration of an option, beside its type: ``rank: Annotated[int | None, Option("Rank.", min=1)] = None``.

    Attributes:
        help: Noun phrase or imperative that names every choice.
        panel: Panel of ``--help``, one of :data:`PANELS`.
        flag: Flag, if not the field's name; without dashes, a positional argument.
        also: Further flags.
        metavar: Placeholder of the value, such as ``N`` or ``SECONDS``.
        min: Smallest value.
        max: Largest value.
        above: Value that must be exceeded.
        none: Word on the command line for None.
        shown: What to show as the default, where the value itself says too little.
        commas: Whether one flag may give several values, separated by commas.
        synonyms: Other names of choices, for "did you mean".
        command_line: Whether the command line has the option.
        keyword: Whether the Python API has the option among its keyword options.
    """

    help: str
    panel: str = ADVANCED
    flag: str | None = None
    also: tuple[str, ...] = ()
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    above: float | None = None
    none: str | None = None
    shown: str | None = None
    commas: bool = False
    synonyms: Mapping[str, str] = field(default_factory=dict)
    command_line: bool = True
    keyword: bool = True


@dataclass(frozen=True)
class DeclaredOption:
    """An option with its name, type and default.

    Attributes:
        name: Name of the field.
        hint: Its type.
        option: Its declaration.
        default: Its default, or ``dataclasses.MISSING``.
    """

    name: str
    hint: Any
    option: Option
    default: Any = MISSING

    @property
    def flag(self) -> str:
        """The flag, or the placeholder of a positional argument."""
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def several(self) -> bool:
        """Whether the option takes several values."""
        return get_origin(self.hint) in (tuple, list)

    @property
    def words(self) -> tuple[str, ...]:
        """Words that may stand in place of a number."""
        words = [word for part in get_args(self.hint) if get_origin(part) is Literal for word in get_args(part)]
        return tuple(filter(None, [self.option.none, *(words if self.kind is int else [])]))

    @property
    def kind(self) -> Any:
        """The type of one value, without None."""
        kinds = [each for each in get_args(self.hint) if each not in (NoneType, Ellipsis)]
        return kinds[0] if kinds and get_origin(self.hint) is not Literal else self.hint

    @property
    def default_text(self) -> str:
        """The default as help and documentation show it; empty where there is none to show."""
        if self.option.shown:
            return self.option.shown
        if self.default is None:
            return self.option.none or ""
        if self.default is MISSING or self.default is False or self.default in ((), ""):
            return ""
        if isinstance(self.default, tuple):
            return ", ".join(map(str, self.default))
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of one that has a fixed set; None is left out."""
        return _choices(self.kind)

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with one value, or None."""
        option = self.option
        if value is None:
            return None
        if self.choices and value not in self.choices:
            return f"one of {', '.join(self.choices)}{self._suggestion(str(value))}"
        if self.kind is int and isinstance(value, str) and value not in self.words:
            return f"{', '.join(self.words)}, or a positive number"
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, above, high = option.min, option.above, option.max
            outside = [low is not None and not value >= low, above is not None and not value > above]
            if any(outside) or (high is not None and not value <= high):
                return self.bounds
        return None

    @property
    def bounds(self) -> str:
        """The bounds of a number; empty without any."""
        option = self.option
        parts = [
            f"at least {option.min:g}" if option.min is not None else "",
            f"above {option.above:g}" if option.above is not None else "",
            f"at most {option.max:g}" if option.max is not None else "",
        ]
        return ", ".join(filter(None, parts))

    def _suggestion(self, value: str) -> str:
        names = {**{choice: choice for choice in self.choices}, **self.option.synonyms}
        near = difflib.get_close_matches(value.lower(), names, 1)
        return f" (did you mean {names[near[0]]}?)" if near else ""


def _choices(hint: Any) -> tuple[str, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = [_choices(part) for part in get_args(hint)]
    return tuple(choice for part in parts for choice in part) if parts and all(parts) else ()


def declared(name: str, hint: Any, default: Any = MISSING) -> DeclaredOption | None:
    """Read ``Annotated[type, Option(...)]``; None without an :class:`Option`."""
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Option):
            return DeclaredOption(name, get_args(hint)[0], extra, default)
    return None


@functools.cache
def options_of(settings: type) -> dict[str, DeclaredOption]:
    """Return the options of a settings class, by field."""
    hints = get_type_hints(settings, include_extras=True)
    found = (declared(each.name, hints[each.name], each.default) for each in fields(settings))
    return {each.name: each for each in found if each is not None}


_SIGMOID_LINKS: tuple[Link, ...] = ("mc-joint", "mc-indep", "probit", "map")

LINKS: dict[LikelihoodName, tuple[Link, ...]] = {
    "categorical": get_args(Link),
    "preference": _SIGMOID_LINKS,
    "gaussian": ("mc-joint", "map"),
    "bernoulli": _SIGMOID_LINKS,
    "multilabel": _SIGMOID_LINKS,
}
"""Links of each likelihood."""

WITH_ANSWERS: tuple[LikelihoodName, ...] = ("categorical", "preference", "bernoulli")
"""Likelihoods whose prediction is one distribution over answers, with a confidence."""

_LIKELIHOODS_OF: dict[str, tuple[LikelihoodName, ...]] = {
    "abstain_below": WITH_ANSWERS,
    "coverage": WITH_ANSWERS,
    "interval": ("gaussian",),
    "penalty": ("preference",),
    "unlabelled": (*WITH_ANSWERS, "multilabel"),
}
"""Options of some likelihoods."""

_CATEGORICAL_ONLY = {"engine": ("asdl", "curvlinops"), "weight_sharing": ("asdl",), "method": ("adapted",)}


def check_likelihood(likelihood: LikelihoodName, settings: Any) -> None:
    """Refuse options and links that a likelihood does not have.

    Args:
        likelihood: The task's likelihood.
        settings: Settings of a command.

    Raises:
        UsageError: An option or link belongs to other likelihoods; both are named.
    """
    kind: Any = type(settings)
    for name, option in options_of(kind).items():
        value, does_not_go = getattr(settings, name), f"does not go with likelihood {likelihood}"
        others = _LIKELIHOODS_OF.get(name)
        if others and likelihood not in others and value != option.default:
            raise UsageError(f"{option.flag} {does_not_go}, but with {', '.join(others)}")
        if likelihood != "categorical" and value in _CATEGORICAL_ONLY.get(name, ()):
            raise UsageError(f"{option.flag} {value} {does_not_go}, but with categorical")
        for link in (value if option.several else [value]) if option.kind == Link else ():
            if link not in LINKS[likelihood]:
                raise UsageError(f"--link {link} {does_not_go}: use {' or '.join(LINKS[likelihood])}")


LAPLACE_LINKS = "mc-joint (mean softmax), mc-indep (no covariance), probit, bridge (Laplace bridge)"
_LINKS = f"{LAPLACE_LINKS} or map (plain adapter)."
_LINK_SYNONYMS = {"mc": "mc-joint", "joint": "mc-joint", "sampling": "mc-joint", "indep": "mc-indep"}
_PRIOR_SYNONYMS = {
    "evidence": "marglik",
    "marginal-likelihood": "marglik",
    "ml": "marglik",
    "val": "validation",
    "grid": "validation",
}


@dataclass(frozen=True)
class Placement:
    """How Accelerate spreads a model that is larger than a device.

    Attributes:
        device_map: ``auto``, ``balanced``, ``balanced_low_0`` or ``sequential``.
        max_memory: Memory limits of devices and host: ``0=20GiB,cpu=60GiB``.
        offload_dir: Folder for weights that do not fit in memory and cannot be read from the base model's files.
    """

    device_map: DeviceMap
    max_memory: str | None = None
    offload_dir: Path | None = None


@dataclass(frozen=True)
class ModelSettings:
    """How to load the adapter and its base. None means the value recorded by ``fit``.

    ``fetched`` is no option: the folder to which an adapter on the Hub was downloaded, set by
    :func:`lapora.models.adapter.local_model`.
    """

    adapter: Annotated[str, Option("Folder or Hub id of a PEFT LoRA adapter.", flag="ADAPTER", keyword=False)]
    base_model: Annotated[
        str | None,
        Option("Base model, if not the one the adapter records.", MODEL, metavar="MODEL"),
    ] = None
    quantize: Annotated[
        Quantization | None,
        Option(
            "Quantization of the base model: none, 8bit, 4bit.",
            MODEL,
            metavar="BITS",
            synonyms={"8": "8bit", "int8": "8bit", "4": "4bit", "int4": "4bit", "nf4": "4bit", "no": "none"},
        ),
    ] = None
    dtype: Annotated[
        Dtype | None,
        Option(
            "Weight type: float32, bfloat16, float16, float64 or auto (float32 on a CPU, else as saved).",
            MODEL,
            metavar="DTYPE",
            synonyms={
                "fp16": "float16",
                "half": "float16",
                "bf16": "bfloat16",
                "fp32": "float32",
                "float": "float32",
                "double": "float64",
            },
        ),
    ] = None
    device: Annotated[str, Option("auto (GPU if any), cpu, cuda:1 ...", MODEL, metavar="DEVICE")] = "auto"
    batch_size: Annotated[
        int | None,
        Option("Rows per batch; auto: by memory.", MODEL, metavar="N", none="auto", min=1),
    ] = None
    output_dir: Annotated[Path | None, Option("Folder that holds laplace/, if not ADAPTER.", OUTPUT, metavar="DIR")] = (
        None
    )
    trust_remote_code: Annotated[bool, Option("Run code that comes with the base model or tokenizer.")] = False
    revision: Annotated[str | None, Option("Branch, tag or commit of an adapter on the Hub.", MODEL, metavar="REV")] = (
        None
    )
    fetched: Path | None = None
    processes: Annotated[
        Processes,
        Option(
            "Processes that share the rows, from :func:`lapora.distributed.init_processes`.",
            command_line=False,
            shown="this process",
        ),
    ] = SINGLE_PROCESS
    gradient_checkpointing: Annotated[bool, Option("Recompute activations: less memory, more time.")] = False
    device_map: Annotated[
        DeviceMap | None,
        Option(
            "Spread layers over devices: auto or balanced (evenly), balanced_low_0 (least on GPU 0), sequential.",
            metavar="MAP",
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        Option("With --device-map: limits, as 0=20GiB,cpu=60GiB.", metavar="LIMITS"),
    ] = None
    offload_dir: Annotated[Path | None, Option("With --device-map: folder for offloaded weights.", metavar="DIR")] = (
        None
    )

    @property
    def folder(self) -> Path:
        """The folder that holds the adapter's files; of a Hub id, the folder of the download."""
        return self.fetched or Path(self.adapter)

    @property
    def placement(self) -> Placement | None:
        """How the layers are spread, or None for one device.

        Raises:
            UsageError: ``max_memory`` or ``offload_dir`` without ``device_map``, or ``device_map`` with a device.
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
    """Which rows to read. None means the value recorded by ``fit``."""

    task: Annotated[
        str | None,
        Option("Built-in task (see lapora tasks), or a YAML file.", DATA, flag="--data", metavar="TASK", keyword=False),
    ] = None
    data_dir: Annotated[
        Path | None,
        Option("Folder with SPLIT.jsonl, .json, .csv or .parquet.", DATA, metavar="DIR"),
    ] = None
    split: Annotated[str | None, Option("Split to read.", DATA, metavar="SPLIT")] = None
    limit: Annotated[int | None, Option("Use the first N rows only.", DATA, metavar="N", min=1)] = None


@dataclass(frozen=True)
class FitSettings:
    """Curvature, weights and name of a posterior, and how a fit runs."""

    structure: Annotated[
        Structure,
        Option(
            "Curvature: kron (KFAC), ekfac (better eigenvalues), diag, lowrank (over all layers) or full.",
            FITTED,
            metavar="NAME",
            synonyms={
                "kfac": "kron",
                "k-fac": "kron",
                "kronecker": "kron",
                "diagonal": "diag",
                "low-rank": "lowrank",
                "low_rank": "lowrank",
                "dense": "full",
            },
        ),
    ] = "kron"
    weight_sharing: Annotated[
        WeightSharing,
        Option(
            "KFAC over tokens: expand (each an example), reduce (summed by row) or asdl (paper).",
            FITTED,
            metavar="NAME",
        ),
    ] = "expand"
    engine: Annotated[
        Engine,
        Option(
            "Curvature backend: native, or laplace-torch with asdl or curvlinops.",
            FITTED,
            metavar="NAME",
            synonyms={"lapora": "native", "laplace": "curvlinops"},
        ),
    ] = "native"
    subset: Annotated[
        Subset,
        Option(
            "Weights of the posterior: lora, last-layer or all (both).",
            FITTED,
            metavar="NAME",
            synonyms={"head": "last-layer", "llla": "last-layer", "adapter": "lora"},
        ),
    ] = "lora"
    fisher: Annotated[
        FisherType,
        Option(
            "Fisher estimator: exact (C-1 backward passes), mc (sampled labels) or empirical.",
            FITTED,
            metavar="NAME",
            synonyms={"sampled": "mc", "monte-carlo": "mc", "ggn": "exact", "true": "exact", "ef": "empirical"},
        ),
    ] = "exact"
    rank: Annotated[
        int | Literal["full"] | None,
        Option(
            f"Rank of kron's and ekfac's factors (by default {KRON_RANK}; full: all) or of lowrank ({DEFAULT_RANK}).",
            FITTED,
            metavar="N",
            min=1,
        ),
    ] = None
    name: Annotated[str, Option("Name of the posterior.", OUTPUT, metavar="NAME")] = "default"
    max_length: Annotated[
        int | None, Option("Maximum tokens per row.", DATA, metavar="N", min=1, shown="the task's")
    ] = None
    chat_template: Annotated[bool, Option("Wrap prompts in the tokenizer's chat template.", DATA)] = False
    unlabelled: Annotated[bool, Option("Accept training rows without labels.", DATA)] = False
    seed: Annotated[int, Option("Random seed.", metavar="N", min=0, max=2**63 - 1)] = 0
    overwrite: Annotated[bool, Option("Replace an existing posterior of this name.", OUTPUT)] = False
    resume: Annotated[bool, Option("Resume an interrupted fit from its last checkpoint.", OUTPUT)] = False
    save_every: Annotated[
        float,
        Option("Checkpoint interval; 0: every batch.", OUTPUT, metavar="SECONDS", min=0),
    ] = 60.0
    offload_factors: Annotated[bool, Option("Keep curvature factors in host memory, not on the GPU.")] = False
    prior_method: Annotated[
        FitPrior,
        Option(
            "Prior after a fit: averaged (over the precisions that the training rows tolerate) or marglik (one "
            "precision, by marginal likelihood).",
            command_line=False,
        ),
    ] = "averaged"

    @property
    def basis_rank(self) -> int:
        """Rank of the bases, :data:`COMPLETE` if they are not truncated."""
        if self.rank == "full" or self.engine != "native" or self.structure in ("diag", "full"):
            return COMPLETE
        return self.rank or (DEFAULT_RANK if self.structure == "lowrank" else KRON_RANK)


@dataclass(frozen=True)
class PriorSettings:
    """How to choose the prior precision."""

    name: Annotated[str, Option("Name of the posterior.", OUTPUT, metavar="NAME")] = "default"
    method: Annotated[
        PriorMethod,
        Option(
            "auto (average over precisions), validation (best NLL on held-out rows), marglik (marginal likelihood) or "
            "adapted (marglik, linearized).",
            PRIOR,
            metavar="NAME",
            synonyms=_PRIOR_SYNONYMS,
        ),
    ] = "auto"
    structure: Annotated[
        PriorChoice,
        Option(
            "scalar, kind (lora_A, lora_B, head), layer or point (scalar, not averaged).",
            PRIOR,
            flag="--prior",
            metavar="NAME",
            synonyms={"one": "scalar", "single": "scalar", "layerwise": "layer", "per-layer": "layer"},
        ),
    ] = "scalar"
    optimizer: Annotated[
        Optimizer,
        Option("For marglik: exact (root finding) or adam (as in the paper).", PRIOR, metavar="NAME"),
    ] = "exact"
    learning_rate: Annotated[float, Option("Learning rate of adam.", PRIOR, flag="--lr", metavar="RATE", min=0)] = 0.1
    steps: Annotated[int, Option("Steps of adam.", PRIOR, metavar="N", min=1)] = 1000
    link: Annotated[
        Link,
        Option(f"Link to tune for: {LAPLACE_LINKS}.", PRIOR, metavar="NAME", synonyms=_LINK_SYNONYMS),
    ] = "mc-joint"
    seed: Annotated[int, Option("Random seed.", metavar="N", min=0, max=2**63 - 1)] = 0


@dataclass(frozen=True)
class EvalSettings:
    """Which methods to score, and how."""

    methods: Annotated[
        tuple[Method | Literal["all"], ...],
        Option(
            "constant (label frequencies), map (plain adapter), temperature, mc-dropout, ensemble, laplace or all. "
            "Repeatable.",
            SCORES,
            also=("--method",),
            metavar="NAME",
            commas=True,
            synonyms={"dropout": "mc-dropout", "ts": "temperature", "la": "laplace", "ensembles": "ensemble"},
        ),
    ] = ("constant", "map", "laplace")
    names: Annotated[
        tuple[str, ...], Option("Posterior to score. Repeatable.", SCORES, "--name", metavar="NAME", shown="default")
    ] = ()
    links: Annotated[
        tuple[Link, ...],
        Option(
            f"{_LINKS} Repeatable.",
            SCORES,
            flag="--link",
            metavar="NAME",
            shown="mc-joint",
            synonyms=_LINK_SYNONYMS,
        ),
    ] = ()
    samples: Annotated[int, Option("Sample points of the mc links.", metavar="N", min=2)] = DEFAULT_SAMPLES
    seed: Annotated[int, Option("Random seed.", metavar="N", min=0, max=2**63 - 1)] = 0
    dropout_samples: Annotated[int, Option("Forward passes of mc-dropout.", SCORES, metavar="N", min=2)] = 20
    ensemble: Annotated[
        tuple[Path, ...],
        Option("Adapter, or folder of checkpoints. Repeatable.", SCORES, metavar="PATH"),
    ] = ()
    temperature_split: Annotated[
        str | None,
        Option("Split for temperature.", SCORES, metavar="SPLIT", shown="rows of tune-prior"),
    ] = None
    temperature_oracle: Annotated[bool, Option("Add the temperature fitted on the scored rows.", SCORES)] = False
    interval: Annotated[
        float | None,
        Option("Regression: probability of the intervals scored.", SCORES, metavar="P", above=0, max=1, shown="0.9"),
    ] = None
    ood: Annotated[tuple[str, ...], Option("Out-of-distribution task. Repeatable.", DATA, metavar="TASK")] = ()
    ood_data_dirs: Annotated[
        tuple[Path, ...],
        Option("Folder of the --ood rows. Repeatable.", DATA, flag="--ood-data-dir", metavar="DIR"),
    ] = ()
    coverage: Annotated[
        float | None,
        Option("Print the threshold that keeps this share of rows.", SCORES, metavar="SHARE", above=0, max=1),
    ] = None


@dataclass(frozen=True)
class CheckpointSettings:
    """How ``lapora eval --checkpoints`` fits the checkpoints of a training run."""

    fit_split: Annotated[str, Option("Split the checkpoints were trained on.", CHECKPOINTS, metavar="SPLIT")] = "train"
    fit_limit: Annotated[int | None, Option("Maximum number of rows to fit on.", CHECKPOINTS, metavar="N", min=1)] = (
        None
    )
    max_length: Annotated[
        int | None, Option("Maximum tokens per row.", CHECKPOINTS, metavar="N", min=1, shown="the task's")
    ] = None
    chat_template: Annotated[bool, Option("Wrap prompts in the tokenizer's chat template.", CHECKPOINTS)] = False
    prior_method: Annotated[
        PriorMethod,
        Option(
            "Method of tune-prior: auto, marglik or validation; adapted is refused.",
            CHECKPOINTS,
            metavar="NAME",
            synonyms=_PRIOR_SYNONYMS,
        ),
    ] = "auto"


@dataclass(frozen=True)
class PredictSettings:
    """How logits become probabilities, what is written, and which adapters predict."""

    name: Annotated[str, Option("Name of the posterior.", PREDICTIONS, metavar="NAME")] = "default"
    link: Annotated[
        Link, Option(f"Probabilities from logits: {_LINKS}", PREDICTIONS, metavar="NAME", synonyms=_LINK_SYNONYMS)
    ] = "mc-joint"
    samples: Annotated[int, Option("Sample points of the mc links.", metavar="N", min=2)] = DEFAULT_SAMPLES
    seed: Annotated[int, Option("Random seed.", metavar="N", min=0, max=2**63 - 1)] = 0
    logits: Annotated[bool, Option("Add the mean and covariance of the logits.", OUTPUT, keyword=False)] = False
    on_error: Annotated[
        OnError | None,
        Option(
            "Invalid row: stop, or report it and continue (default on a terminal).",
            OUTPUT,
            metavar="ACTION",
            shown="stop",
            synonyms={"skip": "report", "continue": "report", "fail": "stop", "raise": "stop"},
        ),
    ] = None
    abstain_below: Annotated[
        float | None, Option("Mark rows of lower confidence.", OUTPUT, metavar="P", min=0, max=1)
    ] = None
    interval: Annotated[
        float | None,
        Option("Regression: probability of intervals.", OUTPUT, metavar="P", above=0, max=1, shown="0.9"),
    ] = None
    penalty: Annotated[
        float | None,
        Option("Reward models: add reward - K deviations.", OUTPUT, metavar="K", min=0),
    ] = None
    adapters: Annotated[
        tuple[str, ...],
        Option(
            "Another adapter, or a folder of them. Repeatable.",
            MODEL,
            flag="--adapter",
            metavar="[NAME=]DIR",
        ),
    ] = ()
    adapter_field: Annotated[str, Option("Field of a row that names its adapter.", MODEL, metavar="FIELD")] = "adapter"
    adapters_kept: Annotated[int, Option("Number of adapters kept in memory.", MODEL, metavar="N", min=1)] = 16


@dataclass(frozen=True)
class PushSettings:
    """What ``lapora push`` uploads, and where to."""

    repository: Annotated[str, Option("OWNER/NAME on the Hub; created if missing.", flag="REPO")]
    name: Annotated[str, Option("Name of the posterior.", OUTPUT, metavar="NAME")] = "default"
    private: Annotated[bool, Option("Create the repository as private, if it does not exist.", OUTPUT)] = False
    revision: Annotated[str | None, Option("Branch of REPO to commit to.", OUTPUT, metavar="BRANCH")] = None
    scores: Annotated[
        Path | None,
        Option("File of eval --output, for the model card.", OUTPUT, metavar="FILE"),
    ] = None


def method_label(method: str, name: str | None = None, link: str | None = None) -> str:
    """Return the name of a method in tables, pictures and gates: ``laplace default (mc-joint)``."""
    return " ".join(part for part in (method, name, f"({link})" if link else None) if part)
