"""Estimate of the memory of ``fit``, made before anything large is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lapora.config import KRON_RANK, FitSettings, ModelSettings
from lapora.errors import AdapterError, LaporaError, UsageError, first_line
from lapora.memory.dry_pass import batch_memory, input_owners_of
from lapora.memory.footprint import Footprint, StructureShape, footprint
from lapora.models.adapter import Adapter
from lapora.models.device_map import available_memory, resident_memory
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.meta_model import MetaModel, build_meta_model, first_batch

_ALLOWANCE = {"cpu": 1.25}
_OTHER_ALLOWANCE = 1.2


def allocator_overhead(device: str) -> float:
    """Return the ratio of memory that the allocator holds to that of live tensors, without the weights.

    Measured on a CPU as 1.1 to 1.4, on four real models (docs/scale.md); the value for GPUs is an assumption.
    """
    return _ALLOWANCE.get(device, _OTHER_ALLOWANCE)


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory of a fit, in bytes.

    Attributes:
        device: Type of the target device: ``cpu``, ``cuda`` ...
        weights: Weights, by storage type.
        batch: Rows and tokens of the assumed batch.
        activations: Peak memory of that batch.
        factors: Sums of the curvature, their workspace and file.
        process: Memory of the process at the time of the estimate: Python, its libraries and the rows; 0 if the device
            is not the CPU.
        peak_device: Peak memory on the device; unused memory of the allocator and, on a CPU, the process are included.
        peak_host: Peak memory on the host, if the device is not the CPU.
        free_device: Free memory on the device, or None if unknown.
        free_host: Free memory on the host.
        remedies: Options that would make the fit possible, mildest first; empty if it fits.
    """

    device: str
    weights: dict[str, int]
    batch: tuple[int, int]
    activations: int
    factors: Footprint
    process: int
    peak_device: int
    peak_host: int
    free_device: float | None
    free_host: float
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the fit is possible, or None if the device's memory is unknown."""
        if self.device != "cpu" and self.peak_host > self.free_host:
            return False
        needed = self.peak_device - self.process  # which is in use already
        return None if self.free_device is None else needed <= self.free_device

    def describe(self) -> dict[str, Any]:
        """Return the estimate as JSON values, sizes in bytes."""
        return {
            "device": self.device,
            "weights": self.weights,
            "batch": {"rows": self.batch[0], "tokens": self.batch[1]},
            "activations": self.activations,
            "factors": {"by_layer": self.factors.by_layer, "total": self.factors.sums},
            "workspace": max(self.factors.passing, self.factors.deciding),
            "artifact": self.factors.artifact,
            "allowance": allocator_overhead(self.device),
            "process": self.process,
            "peak": {"device": self.peak_device, "host": self.peak_host},
            "free": {
                "device": None if self.free_device is None else int(self.free_device),
                "host": int(self.free_host),
            },
            "fits": self.fits,
            "remedies": list(self.remedies),
        }


@dataclass(frozen=True)
class _Query:
    """Settings to estimate: the user's, or alternatives."""

    model: ModelSettings
    settings: FitSettings


def estimate(
    model: ModelSettings,
    settings: FitSettings,
    adapter: Adapter,
    *,
    classes: int,
    rows: int,
    length: int,
    columns: int | None = None,
    texts: int = 1,
    answers: Sequence[int] | None = None,
    device_memory: float | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a fit from the configuration of the base model and the adapter's shapes; loads no weights.

    Args:
        model: How to run the adapter; ``device`` may be one that this machine lacks.
        settings: The settings of the curvature.
        adapter: The adapter's files.
        classes: Number of outputs C.
        rows: Number of training rows.
        length: Maximum number of tokens per text; of prompt and longest answer, if whole answers are scored.
        columns: Columns of the exact Fisher; by default the C-1 of softmax.
        texts: Number of texts of a row.
        answers: Tokens of each answer of the row that has the most, if whole answers are scored.
        device_memory: Free bytes of the device, if it is not a device of this machine.

    Raises:
        LaporaError: As ``fit`` would, for files and options.
    """
    device = _device_type(model.device)
    free_host = available_memory()
    estimator = _Estimator(
        adapter=adapter,
        device=device,
        classes=classes,
        rows=rows,
        length=length,
        columns=classes - 1 if columns is None else columns,
        texts=texts,
        answers=tuple(answers or ()),
        free_device=device_memory if device_memory is not None else _free(model.device, device, free_host),
        free_host=free_host,
    )
    query = _Query(model, settings)
    try:
        found = estimator.budget(query)
        if found.fits is not False:
            return found
        return replace(found, remedies=_remedies(query, estimator.budget))
    except LaporaError:
        raise
    except Exception as error:  # raised by the model's own code, which was not written for tensors without data
        raise AdapterError(
            f"{adapter.path}: the memory of a fit cannot be estimated for this model "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


@dataclass(frozen=True, eq=False)
class _Estimator:
    """Inputs common to all queries, and a cache of intermediate results."""

    adapter: Adapter
    device: str
    classes: int
    rows: int
    length: int
    columns: int
    texts: int
    answers: tuple[int, ...]
    free_device: float | None
    free_host: float
    _cache: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def _cached(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def budget(self, query: _Query) -> MemoryEstimate:
        model, settings = query.model, query.settings
        meta_model: MetaModel = self._cached(("meta model", model.quantize), lambda: self._build_meta_model(model))
        layers = find_bayesian_layers(meta_model.model, settings.subset, whole_answers=bool(self.answers))
        columns = self.columns if settings.fisher == "exact" else 1
        predicts = settings.prior_method != "marglik"  # for the training curve
        batch = first_batch(
            meta_model,
            self.rows,
            self.length,
            answers=self.answers,
            texts=self.texts,
            batch_size=model.batch_size,
            bucketed=predicts,
        )
        sequences, tokens = batch.input_ids.shape
        input_owners: dict[str, str] = self._cached(
            ("input owners",), lambda: input_owners_of(meta_model, layers, self.classes)
        )
        activations: int = self._cached(
            ("batch", model.quantize, settings.structure, predicts, len(batch), model.gradient_checkpointing),
            lambda: batch_memory(
                meta_model,
                layers,
                settings.structure,
                batch,
                classes=self.classes,
                directions=columns,
                recompute_blocks=model.gradient_checkpointing,
                input_owners=input_owners if predicts else None,
            ),
        )
        # Not in the dry pass: one dequantized weight, and the attention mask of padded rows.
        activations += meta_model.dequantized + sequences * tokens**2 * meta_model.dtype.itemsize
        sizes = footprint(
            StructureShape(
                structure=settings.structure,
                layers=layers,
                input_owners=input_owners,
                classes=self.classes,
                columns=columns,
                rows=self.rows,
                rank=settings.basis_rank,
                item=8 if meta_model.dtype == torch.float64 else 4,
                offload=settings.offload_factors,
                threads=torch.get_num_threads() if self.device == "cpu" else 1,
            )
        )
        # The process is measured with the libraries imported. Their resident pages differ by hundreds of MiB between
        # machines, with the pages that the system reads ahead.
        process: int = self._cached(("process",), resident_memory) if self.device == "cpu" else 0
        held = sum(meta_model.weights.values()) + process
        on_device, on_host = _peaks(held, self.device, activations, sizes, settings)
        return MemoryEstimate(
            device=self.device,
            weights=meta_model.weights,
            batch=(len(batch), tokens),
            activations=activations,
            factors=sizes,
            process=process,
            peak_device=on_device,
            peak_host=on_host,
            free_device=self.free_device,
            free_host=self.free_host,
        )

    def _build_meta_model(self, model: ModelSettings) -> MetaModel:
        return build_meta_model(self.adapter, model, self.device)


def _peaks(held: int, device: str, activations: int, sizes: Footprint, settings: FitSettings) -> tuple[int, int]:
    """Return the peak memory on the device, and on the host if the device is not the CPU.

    ``held``: the weights and, on a CPU, the process.
    """
    overhead = allocator_overhead(device)
    passing, deciding = activations + sizes.sums + sizes.passing, sizes.sums + sizes.deciding
    second = activations + sizes.second_pass + sizes.bases
    if device == "cpu":
        if settings.offload_factors:
            passing = activations + sizes.host + sizes.passing
        return held + round(overhead * max(passing, deciding, second)), 0
    if settings.offload_factors:
        on_device = activations + max(sizes.passing, sizes.second_pass)
        on_host = max(sizes.host, deciding) + sizes.artifact
        return held + round(overhead * on_device), round(allocator_overhead("cpu") * on_host)
    if settings.structure == "full":
        return held + round(overhead * activations), round(allocator_overhead("cpu") * (sizes.host + sizes.artifact))
    return held + round(overhead * max(passing, deciding, second)), sizes.artifact


def _device_type(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"--device {device}: unknown type of device; use cpu, cuda or auto") from error


def _free(device: str, kind: str, free_host: float) -> float | None:
    if kind == "cpu":
        return free_host
    if kind == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info(torch.device("cuda" if device == "auto" else device))[0])
    return None


def _remedies(query: _Query, estimate_of: Callable[[_Query], MemoryEstimate]) -> tuple[str, ...]:
    """Return options that make the fit possible: each sufficient one, else a combination, mildest first."""
    model, settings = query.model, query.settings

    def possible(changed: _Query) -> MemoryEstimate | None:
        try:
            return estimate_of(changed)
        except UsageError:  # options that cannot be combined
            return None

    def with_model(**changes: Any) -> Callable[[_Query], _Query]:
        return lambda base: replace(base, model=replace(base.model, **changes))

    def with_settings(**changes: Any) -> Callable[[_Query], _Query]:
        return lambda base: replace(base, settings=replace(base.settings, **changes))

    native, kronecker = settings.engine == "native", settings.structure in ("kron", "ekfac")
    mild: list[tuple[str, Callable[[_Query], _Query]]] = []
    if model.batch_size != 1:
        mild.append(("--batch-size 1", with_model(batch_size=1)))
    if native and not model.gradient_checkpointing:
        mild.append(("--gradient-checkpointing", with_model(gradient_checkpointing=True)))
    strong: list[tuple[str, Callable[[_Query], _Query]]] = []
    if native and kronecker and not settings.offload_factors and _device_type(model.device) != "cpu":
        mild.append(("--offload-factors", with_settings(offload_factors=True)))
    if settings.structure in ("full", "lowrank"):
        strong.append(("--structure kron", with_settings(structure="kron", rank=None)))
    if native and kronecker and settings.basis_rank > KRON_RANK:
        strong.append((f"--rank {KRON_RANK}", with_settings(rank=None)))
    if native and kronecker:
        strong.append(("--structure diag", with_settings(structure="diag", rank=None, offload_factors=False)))
    if settings.weight_sharing == "asdl":
        strong.append(
            ("--engine native --weight-sharing expand", with_settings(engine="native", weight_sharing="expand"))
        )
    elif not native:
        strong.append(("--engine native", with_settings(engine="native")))
    if model.quantize in (None, "none"):
        strong.append(("--quantize 4bit", with_model(quantize="4bit")))
    found = [(name, possible(change(query))) for name, change in [*mild, *strong]]
    sufficient = [name for name, estimate in found if estimate and estimate.fits is not False]
    if sufficient:
        return tuple(sufficient)
    names: list[str] = []
    best = estimate_of(query)
    for name, change in [*mild, *[each for each in strong if each[0].startswith("--quantize")]]:
        candidate = change(query)
        estimate = possible(candidate)
        if estimate and estimate.peak_device < best.peak_device and estimate.peak_host <= estimate.free_host:
            query, best = candidate, estimate
            names.append(name)
        if best.fits is not False:
            return (" ".join(names),)
    return ()
