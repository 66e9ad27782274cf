"""The memory that ``fit`` will need, reckoned before anything large is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lapora.config import TOKEN_BUDGET, FitSettings, ModelSettings
from lapora.errors import AdapterError, LaporaError, UsageError, first_line
from lapora.memory.dry_pass import batch_memory, leaders_of
from lapora.memory.footprint import Footprint, StructureShape, footprint
from lapora.models.adapter import Adapter
from lapora.models.device_map import available_memory
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.meta_model import MetaModel, build_meta_model

_ALLOWANCE = {"cpu": 1.6}
_OTHER_ALLOWANCE = 1.2


def allocator_overhead(device: str) -> float:
    """What memory a process holds for each byte of its tensors, the weights left out.

    On a CPU it was 1.52 to 1.57 in four fits of a real encoder; that of a GPU's caching allocator is a guess.
    """
    return _ALLOWANCE.get(device, _OTHER_ALLOWANCE)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a fit takes.

    Attributes:
        device: Where the model is to run: ``cpu``, ``cuda`` ...
        weights: By the type in which they are held.
        batch: Rows and tokens of the batch reckoned with.
        activations: What that batch holds at most.
        factors: The curvature's sums, and its workspace and file.
        peak_device: The most on the device at a time, with what its allocator holds unused.
        peak_host: The most on the host at a time, for a device that is not the CPU.
        free_device: What is free there; None where it is not known.
        free_host: What is free on the host.
        remedies: What would make it fit, the mildest first; empty where it fits.
    """

    device: str
    weights: dict[str, int]
    batch: tuple[int, int]
    activations: int
    factors: Footprint
    peak_device: int
    peak_host: int
    free_device: float | None
    free_host: float
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the device's memory is not known."""
        if self.device != "cpu" and self.peak_host > self.free_host:
            return False
        return None if self.free_device is None else self.peak_device <= self.free_device

    def describe(self) -> dict[str, Any]:
        """For JSON: sizes in bytes."""
        return {
            "device": self.device,
            "weights": self.weights,
            "batch": {"rows": self.batch[0], "tokens": self.batch[1]},
            "activations": self.activations,
            "factors": {"by_layer": self.factors.by_layer, "total": self.factors.sums},
            "workspace": max(self.factors.passing, self.factors.deciding),
            "artifact": self.factors.artifact,
            "allowance": allocator_overhead(self.device),
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
    """What is reckoned: the user's settings, or others to be tried."""

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
    device_memory: float | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a fit from the configuration of the base model and the adapter's shapes; loads no weights.

    Args:
        model: How to run the adapter; ``device`` may be one that this machine lacks.
        settings: The settings of the curvature.
        adapter: The adapter's files.
        classes: Number of answers C.
        rows: Number of training rows.
        length: Maximum number of tokens per row.
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
        free_device=device_memory if device_memory is not None else _free(model.device, device, free_host),
        free_host=free_host,
    )
    question = _Query(model, settings)
    try:
        found = estimator.budget(question)
        if found.fits is not False:
            return found
        return replace(found, remedies=_remedies(question, estimator.budget))
    except LaporaError:
        raise
    except Exception as error:  # raised by the model's own code, which was not written for tensors without data
        raise AdapterError(
            f"{adapter.path}: the memory of a fit cannot be estimated for this model "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


@dataclass(frozen=True, eq=False)
class _Estimator:
    """What does not change from question to question, and what has been found out once."""

    adapter: Adapter
    device: str
    classes: int
    rows: int
    length: int
    free_device: float | None
    free_host: float
    _known: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def _once(self, key: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]

    def budget(self, question: _Query) -> MemoryEstimate:
        model, settings = question.model, question.settings
        skeleton: MetaModel = self._once(("skeleton", model.quantize), lambda: self._skeleton(model))
        layers = find_bayesian_layers(skeleton.model, settings.subset)
        columns = self.classes - 1 if settings.fisher == "exact" else 1
        batch = min(self.rows, model.batch_size or max(1, TOKEN_BUDGET // self.length)), self.length
        activations: int = self._once(
            ("batch", settings.structure, batch, model.gradient_checkpointing),
            lambda: batch_memory(
                skeleton,
                layers,
                settings.structure,
                batch,
                classes=self.classes,
                directions=columns,
                recompute_blocks=model.gradient_checkpointing,
            ),
        )
        # Beside what is seen: an unpacked weight, and a mask of padding.
        activations += skeleton.dequantized + batch[0] * self.length**2 * skeleton.dtype.itemsize
        sizes = footprint(
            StructureShape(
                structure=settings.structure,
                layers=layers,
                leaders=self._once(("leaders",), lambda: leaders_of(skeleton, layers, self.classes)),
                classes=self.classes,
                columns=columns,
                rows=self.rows,
                rank=settings.rank,
                item=8 if skeleton.dtype == torch.float64 else 4,
                offload=settings.offload_factors,
                threads=torch.get_num_threads() if self.device == "cpu" else 1,
            )
        )
        device, host = _peaks(sum(skeleton.weights.values()), self.device, activations, sizes, settings)
        return MemoryEstimate(
            self.device, skeleton.weights, batch, activations, sizes, device, host, self.free_device, self.free_host
        )

    def _skeleton(self, model: ModelSettings) -> MetaModel:
        return build_meta_model(self.adapter, model, self.device)


def _peaks(weights: int, device: str, activations: int, sizes: Footprint, settings: FitSettings) -> tuple[int, int]:
    """The most on the device and, for another than the CPU, on the host."""
    more = allocator_overhead(device)
    passing, deciding = activations + sizes.sums + sizes.passing, sizes.sums + sizes.deciding
    if device == "cpu":
        if settings.offload_factors:
            passing = activations + sizes.host + sizes.passing
        return weights + round(more * max(passing, deciding)), 0
    if settings.offload_factors:
        on_host = max(sizes.host, deciding) + sizes.artifact
        return weights + round(more * (activations + sizes.passing)), round(allocator_overhead("cpu") * on_host)
    if settings.structure == "full":
        return weights + round(more * activations), round(allocator_overhead("cpu") * (sizes.host + sizes.artifact))
    return weights + round(more * max(passing, deciding)), sizes.artifact


def _device_type(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"--device {device}: no such kind of device") from error


def _free(device: str, kind: str, free_host: float) -> float | None:
    if kind == "cpu":
        return free_host
    if kind == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info(torch.device("cuda" if device == "auto" else device))[0])
    return None


def _remedies(question: _Query, asked: Callable[[_Query], MemoryEstimate]) -> tuple[str, ...]:
    """Options that make it fit: each that does so alone, else those that do so together, the mildest first."""
    model, settings = question.model, question.settings

    def with_model(**changes: Any) -> Callable[[_Query], _Query]:
        return lambda it: replace(it, model=replace(it.model, **changes))

    def with_settings(**changes: Any) -> Callable[[_Query], _Query]:
        return lambda it: replace(it, settings=replace(it.settings, **changes))

    mild: list[tuple[str, Callable[[_Query], _Query]]] = []
    if model.batch_size != 1:
        mild.append(("--batch-size 1", with_model(batch_size=1)))
    if not model.gradient_checkpointing:
        mild.append(("--gradient-checkpointing", with_model(gradient_checkpointing=True)))
    strong: list[tuple[str, Callable[[_Query], _Query]]] = []
    if settings.structure in ("kron", "ekfac") and not settings.offload_factors and _device_type(model.device) != "cpu":
        mild.append(("--offload-factors", with_settings(offload_factors=True)))
    if settings.structure in ("full", "lowrank"):
        strong.append(("--structure kron", with_settings(structure="kron", rank=None)))
    if settings.structure in ("kron", "ekfac") and (settings.rank is None or settings.rank > 64):
        strong.append(("--structure kron --rank 64", with_settings(structure="kron", rank=64)))
    if settings.structure in ("kron", "ekfac"):
        strong.append(("--structure diag", with_settings(structure="diag", rank=None, offload_factors=False)))
    if model.quantize in (None, "none"):
        strong.append(("--quantize 4bit", with_model(quantize="4bit")))
    alone = [name for name, change in [*mild, *strong] if asked(change(question)).fits is not False]
    if alone:
        return tuple(alone)
    names: list[str] = []
    least = asked(question)
    for name, change in [*mild, *[each for each in strong if each[0].startswith("--quantize")]]:
        candidate = change(question)
        found = asked(candidate)
        if found.peak_device < least.peak_device and found.peak_host <= found.free_host:
            question, least = candidate, found
            names.append(name)
        if least.fits is not False:
            return (" ".join(names),)
    return ()
