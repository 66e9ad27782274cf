"""The manifest of a posterior, ``posterior.json``: typed fields, reading and validation.

Two checksums are part of the file: one of ``prior``, which ``tune-prior`` rewrites, and one of all other fields, so
that a number changed by hand or by a failing disk is refused. Reading needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta, Struct

from lapora._version import __version__
from lapora.config import (
    JOINT_STRUCTURES,
    Engine,
    FisherType,
    PriorStructure,
    Quantization,
    Remainder,
    Structure,
    Subset,
    WeightSharing,
)
from lapora.errors import PosteriorError, listed
from lapora.posterior.averaging import Averaged, TrainingCurve
from lapora.posterior.prior import PriorPrecision

FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20
"""Maximum size of a manifest; one of 1,000 layers and 100,000 tuning rows has less than a tenth of it."""
CHECKSUMS = "checksums"
_AGAIN = "fit again with --overwrite"
_TUNE = "run `lapora tune-prior` to choose it again"

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{32,128}$")]
Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, lt=2**62)]
Dimension = Annotated[int, Meta(ge=1, lt=2**31)]
Number = Annotated[float, Meta(gt=-1e300, lt=1e300)]
Share = Annotated[float, Meta(ge=0.0, le=1.0 + 1e-6)]
Role = str


class BaseModel(Struct, frozen=True, kw_only=True):
    """The base model that the adapter was fitted on.

    Attributes:
        name: Path or Hub id.
        revision: Its revision, or None.
        quantization: ``none``, ``8bit`` or ``4bit``.
        dtype: Element type of the unquantized weights.
        fingerprint: Digest of a sample of every tensor.
        digests: Digest of all weights, by element type.
    """

    name: Text
    revision: str | None
    quantization: Quantization
    dtype: Text
    fingerprint: Digest
    digests: dict[str, Digest] = {}


class Answers(Struct, frozen=True, kw_only=True):
    """The answers of the task.

    Attributes:
        choices: Their texts; empty where each row has its own.
        token_ids: Their tokens, for a causal model whose answers are single tokens; else None.
        score: ``sum``, ``per_token`` or ``per_byte``, for a causal model whose whole answers are scored; else None.
    """

    choices: list[Text]
    token_ids: list[Annotated[int, Meta(ge=0, lt=2**62)]] | None
    score: Literal["sum", "per_token", "per_byte"] | None = None

    @property
    def causal(self) -> bool:
        """Whether they are answers of a causal model."""
        return self.token_ids is not None or self.score is not None

    def describe(self) -> str:
        """Return their texts."""
        return ", ".join(self.choices) if self.choices else "answers of each row"


class Data(Struct, frozen=True, kw_only=True):
    """The training rows that the posterior was fitted to.

    Attributes:
        split: Name of the split.
        n: Number of rows.
        fingerprint: Digest of prompts, answers and labels.
        max_length: Maximum number of tokens of a row.
        data_dir: Folder of the split's file, or None for the Hub.
        limit: Requested maximum number of rows, or None.
        chat_template: Whether prompts were wrapped in the tokenizer's chat template.
    """

    split: Text
    n: Count
    fingerprint: Digest
    max_length: Count
    data_dir: Text | None = None
    limit: int | None = None
    chat_template: bool = False


class _Parameter(Struct, frozen=True, kw_only=True):
    name: Text
    shape: Annotated[list[Dimension], Meta(min_length=2, max_length=2)]
    role: Annotated[str, Meta(pattern="^(A|B|head)$")]
    squared_norm: Annotated[float, Meta(ge=0.0, lt=1e300)]
    input_of: Any = None
    kept: Share = 1.0


class _Tensor(Struct, frozen=True, kw_only=True):
    shape: list[Annotated[int, Meta(ge=0, lt=2**31)]]
    dtype: Text
    blake2b: Digest


class Scores(Struct, frozen=True):
    """Scores of one set of rows: NLL in nats per row and, for answers, expected calibration error and accuracy."""

    nll: Number
    ece: Number | None = None
    accuracy: Number | None = None


class EvidencePoint(Scores, frozen=True, kw_only=True):
    """Scores at the prior that the marginal likelihood chooses."""

    structure: PriorStructure
    precision: float | dict[str, float]


class CurvePoint(Scores, frozen=True, kw_only=True):
    """Scores at one prior precision δ."""

    precision: Number


class Validation(Struct, frozen=True, kw_only=True):
    """Record of a prior precision chosen on validation rows.

    Attributes:
        split: Split of the rows.
        n: Number of rows.
        link: Link that the prior was tuned for.
        scheme: Search scheme of a prior with several precisions.
        rows: Digests of the rows, which are excluded from evaluation.
        curve: Scores on the grid of precisions.
        map: Scores of MAP.
        seed: Random seed of the choice of the rows.
        least_nll: Interpolated minimum of the curve.
        marglik: Scores at the prior that the marginal likelihood chooses.
    """

    split: Text
    n: Count
    link: Text
    scheme: Text
    rows: list[Text]
    curve: Annotated[list[CurvePoint], Meta(min_length=1)]
    map: Scores
    seed: int = 0
    least_nll: Number | None = None
    marglik: EvidencePoint | None = None


class Prior(Struct, frozen=True, kw_only=True):
    """The current prior.

    Attributes:
        structure: ``scalar``, ``kind`` or ``layer``.
        precision: δ, or one for each group.
        method: How it was chosen.
        log_marginal_likelihood: In nats, or None without labels.
        effective_parameters: ``Σ λ / (λ + δ)``.
        at_bound: End of the search interval that was reached, by group.
        validation: Record of a choice on validation rows.
        averaged: Grid and weights, if predictions average over prior precisions and temperatures.
        noise_scale: s of a regression's noise, if predictions do not average over it.
    """

    structure: PriorStructure
    precision: float | dict[str, float]
    method: str
    log_marginal_likelihood: Number | None = None
    effective_parameters: float | None = None
    at_bound: dict[str, str] | None = None
    validation: Validation | None = None
    averaged: Averaged | None = None
    noise_scale: Annotated[float, Meta(gt=0.0, lt=1e300)] = 1.0

    @property
    def precisions(self) -> PriorPrecision:
        """δ of every group of layers."""
        return PriorPrecision.from_manifest({"structure": self.structure, "precision": self.precision})


class Manifest(Struct, frozen=True, kw_only=True):
    """All fields of a manifest but ``prior``, ``tensors`` and the checksums.

    Attributes:
        adapter: SHA-256 of the adapter's weights.
        base_model: The base model.
        task: The task, in the form of its YAML file.
        answers: The answers.
        data: The training rows.
        structure: Structure of the curvature.
        weight_sharing: ``expand``, ``reduce`` or ``asdl``.
        fisher: Fisher estimator.
        subset: Which weights are Bayesian.
        parameters: Name, shape, role and squared norm of every Bayesian weight, in order.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or None if a row has no label.
        training_curve: NLL on training rows over the prior precision, or None without labels.
        noise_variance: Residual variance of each output of a regression on the training rows; else None.
        engine: Curvature backend.
        rank: Rank of the bases, or None if they are complete.
        kept: Share of the curvature's trace within the basis.
        remainder: Curvature in the directions outside a basis: ``mean`` of the remaining eigenvalues, or ``none``
            (version 0.1), where these directions have the prior alone.
        seed: Random seed.
        adapter_config: Adapter settings that affect the forward pass.
        tokenizer: Digest of the tokenizer.
        libraries: Versions of the libraries.
        lapora_version: Version that wrote it.
        format_version: Version of the format.
    """

    format_version: int
    lapora_version: str | None = None
    libraries: dict[str, Any] | None = None
    adapter: Digest
    adapter_config: dict[str, Any] | None = None
    tokenizer: Digest | None = None
    base_model: BaseModel
    task: dict[str, Any]
    answers: Answers
    data: Data
    structure: Structure
    weight_sharing: WeightSharing
    engine: Engine = "native"
    fisher: FisherType
    subset: Subset
    rank: Count | None = None
    kept: Share = 1.0
    remainder: Remainder = "none"
    seed: int = 0
    parameters: list[dict[str, Any]]
    log_likelihood: Number | None
    training_curve: TrainingCurve | None = None
    noise_variance: list[Annotated[float, Meta(gt=0.0, lt=1e300)]] | None = None

    @property
    def residuals(self) -> int:
        """Number of residuals of a regression; 0 for other likelihoods."""
        return self.data.n * len(self.noise_variance or ())

    @property
    def joint(self) -> bool:
        """Whether one basis spans all layers, which then share one prior precision."""
        return self.structure in JOINT_STRUCTURES


class _Checked(Struct, frozen=True, kw_only=True):
    """Fields that are validated besides those of :class:`Manifest`."""

    parameters: Annotated[list[_Parameter], Meta(min_length=1)]
    tensors: Annotated[dict[str, _Tensor], Meta(min_length=1)]
    prior: dict[str, Any]
    checksums: dict[str, Any]


class _Wrong(Exception):
    """A field is invalid; the message has its name and the problem."""


def to_content(manifest: Manifest, prior: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON content of a new manifest."""
    return {**msgspec.to_builtins(manifest), "prior": dict(prior)}


def with_checksums(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with updated checksums."""
    plain = json.loads(json.dumps(content))
    return {**content, CHECKSUMS: {"prior": _checksum(plain.get("prior")), "rest": _rest(plain)}}


def without_paths(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content without folders of this machine, for a repository."""
    return with_checksums({**content, "data": {**content["data"], "data_dir": None}})


def digest_of(content: Mapping[str, Any]) -> str:
    """Return a digest of manifest, factors and prior, the same wherever the posterior is."""
    return _checksum(without_paths(content)[CHECKSUMS])


def read_content(file: Path, *, validate_prior: bool = True) -> dict[str, Any]:
    """Read the JSON content of a manifest and check it.

    Args:
        file: ``posterior.json``.
        validate_prior: Refuse a damaged prior; ``tune-prior`` replaces it.

    Raises:
        PosteriorError: The file is missing, has another format, or is damaged; file and field are named.
    """
    content = _parse(file)
    version = content.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise PosteriorError(f"{file}: not of format {FORMAT_VERSION}, which lapora {__version__} reads; {_AGAIN}")
    try:
        _check_fields(content)
    except _Wrong as wrong:
        raise PosteriorError(f"{file}: the field {wrong}; {_AGAIN}") from None
    if content[CHECKSUMS].get("rest") != _rest(content):
        raise PosteriorError(
            f"{file}: the field {CHECKSUMS}.rest does not match the other fields: the file was changed or damaged "
            f"since fit wrote it; {_AGAIN}"
        )
    if validate_prior:
        read_prior(file, content)
    return content


def typed(content: Mapping[str, Any]) -> Manifest:
    """Return the fields of checked content."""
    return msgspec.convert(content, Manifest)


def read_prior(file: Path, content: Mapping[str, Any]) -> Prior:
    """Return the prior of checked content.

    Raises:
        PosteriorError: It is damaged, or was changed since it was written.
    """
    try:
        prior = _converted(content["prior"], Prior)
        prior.precisions.per_layer(content["parameters"])
        if prior.averaged is not None:
            prior.averaged.check()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, _Wrong) as error:
        what = f"no precision for {error}" if isinstance(error, KeyError) else error
        raise PosteriorError(f"{file}: the field prior is damaged ({what}); {_TUNE}") from error
    if content[CHECKSUMS].get("prior") != _checksum(content["prior"]):
        raise PosteriorError(
            f"{file}: the field prior was changed since it was written ({CHECKSUMS}.prior does not match); {_TUNE}"
        )
    return prior


def _parse(file: Path) -> dict[str, Any]:
    if not file.is_file():
        there = (each.parent.name for each in file.parent.parent.glob(f"*/{file.name}"))
        names = listed(sorted(name for name in there if not name.startswith(".")))
        raise PosteriorError(
            f"{file.parent}: no posterior there; "
            + (f"--name may be {names}, or make one" if names else "make one")
            + " with `lapora fit`"
        )
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise PosteriorError(f"{file}: larger than {MAX_BYTES} bytes, the maximum size of a manifest; {_AGAIN}")
        manifest = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise PosteriorError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise PosteriorError(f"{file}: damaged: not JSON ({error}); {_AGAIN}") from error
    if not isinstance(manifest, dict):
        raise PosteriorError(f"{file}: damaged: not a JSON object; {_AGAIN}")
    return manifest


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _checksum(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _rest(content: Mapping[str, Any]) -> str:
    return _checksum({key: value for key, value in content.items() if key not in ("prior", CHECKSUMS)})


def _converted(content: Any, kind: type[Any]) -> Any:
    """Convert JSON content to a type; errors name the field (``data.n``) and the value there."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").removeprefix(".")
        missing = re.fullmatch(r"Object missing required field `(\w+)`", message)
        if missing:
            raise _Wrong(f"{field + '.' if field else ''}{missing[1]} is missing") from None
        found = _value_at(content, field)
        raise _Wrong(f"{field or 'itself'} is {found!r:.60}: {message[:1].lower()}{message[1:]}") from None


def _value_at(content: Any, field: str) -> Any:
    for key in re.findall(r"[^.\[\]]+", field):
        try:
            content = content[int(key)] if isinstance(content, Sequence) else content[key]
        except (KeyError, IndexError, ValueError, TypeError):
            return content
    return content


def _check_fields(content: Mapping[str, Any]) -> None:
    fields: Manifest = _converted(content, Manifest)
    checked: _Checked = _converted(content, _Checked)
    if not isinstance(fields.task.get("task"), str) or not fields.task["task"]:
        raise _Wrong(f"task.task is {fields.task.get('task')!r:.60}, not a text")
    names = {parameter.name for parameter in checked.parameters}
    if len(names) != len(checked.parameters):
        raise _Wrong("parameters has a name twice")
    for index, parameter in enumerate(checked.parameters):
        leader = parameter.input_of
        if not fields.joint and not (isinstance(leader, str) and leader in names):
            raise _Wrong(f"parameters[{index}].input_of is {leader!r:.60}, which names no parameter")
    count = len(fields.answers.choices)
    if fields.noise_variance is None:  # a density may exceed 1, and a regression may have one output
        if fields.log_likelihood is not None and fields.log_likelihood > 0:
            raise _Wrong(f"log_likelihood is {fields.log_likelihood!r}: expected a number <= 0")
        if count < 2 and (count or fields.answers.score is None):
            raise _Wrong(f"answers.choices is {fields.answers.choices!r:.60}: expected at least two")
    for key, items in (("choices", fields.answers.choices), ("token_ids", fields.answers.token_ids)):
        if items is not None and len(set(items)) != len(items):
            raise _Wrong(f"answers.{key} has an answer twice")
    token_ids, choices = fields.answers.token_ids, fields.answers.choices
    if token_ids is not None and len(token_ids) != len(choices):
        raise _Wrong(f"answers.token_ids has {len(token_ids)} for {len(choices)} choices")
