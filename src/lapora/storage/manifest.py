"""What a manifest must be: every field that lapora reads, checked by name before anything is computed from it.

Two checksums stand in the manifest itself: of its ``prior``, which ``tune-prior`` rewrites, and of the rest. A
number that was changed by hand or by a failing disk is refused, not believed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args

from lapora._version import __version__
from lapora.config import JOINT_STRUCTURES, FisherType, Quantization, Structure, Subset, WeightSharing
from lapora.errors import PosteriorError
from lapora.posterior.prior import PriorPrecision

FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20
"""Size of a manifest: one of a thousand layers and a hundred thousand tuning rows stays below a tenth of it."""
CHECKSUMS = "checksums"
_AGAIN = "fit again with --overwrite"
_TUNE = "run `lapora tune-prior` to choose it again"
_MAX_DIMENSION = 2**31


class _Wrong(Exception):
    """A field is not what it should be: its name and what is wrong."""


def with_checksums(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its checksums brought up to date."""
    content = json.loads(json.dumps(manifest))
    return {**manifest, CHECKSUMS: {"prior": _checksum(content.get("prior")), "rest": _rest(content)}}


def read_manifest(file: Path, *, validate_prior: bool = True) -> dict[str, Any]:
    """Read and check a manifest.

    Args:
        file: ``posterior.json``.
        validate_prior: Whether a damaged prior is refused; ``tune-prior`` replaces it.

    Raises:
        PosteriorError: It is missing, of another format, or damaged; the file and the field are named.
    """
    manifest = _parse(file)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise PosteriorError(f"{file}: not of format {FORMAT_VERSION}, which lapora {__version__} reads; {_AGAIN}")
    missing = [key for key in _FIELDS if key not in manifest]
    if missing:
        raise PosteriorError(f"{file}: the field {', '.join(missing)} is missing; {_AGAIN}")
    try:
        for key, check in _FIELDS.items():
            check(manifest[key], key)
        _check_parameters(manifest)
    except _Wrong as wrong:
        raise PosteriorError(f"{file}: the field {wrong}; {_AGAIN}") from None
    if manifest[CHECKSUMS].get("rest") != _rest(manifest):
        raise PosteriorError(
            f"{file}: the field {CHECKSUMS}.rest is not that of the other fields: the file was changed or damaged "
            f"since fit wrote it; {_AGAIN}"
        )
    if validate_prior:
        check_prior(file, manifest)
    return manifest


def _parse(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise PosteriorError(f"{file.parent}: no posterior there; make one with `lapora fit`")
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise PosteriorError(f"{file}: more than {MAX_BYTES} bytes is no manifest; {_AGAIN}")
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


def _rest(manifest: Mapping[str, Any]) -> str:
    return _checksum({key: value for key, value in manifest.items() if key not in ("prior", CHECKSUMS)})


def check_prior(file: Path, manifest: Mapping[str, Any]) -> None:
    """Check the ``prior`` of a manifest whose other fields are right.

    Raises:
        PosteriorError: It is damaged, or was changed since it was written.
    """
    prior = manifest["prior"]
    try:
        PriorPrecision.from_manifest(prior).per_layer(manifest["parameters"])
        if not isinstance(prior.get("method"), str):
            raise ValueError("method is missing")
        _or_null(_number)(prior.get("log_marginal_likelihood"), "log_marginal_likelihood")
        validation = prior.get("validation")
        if validation is not None:
            _VALIDATION(validation, "validation")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, _Wrong) as error:
        what = f"no precision for {error}" if isinstance(error, KeyError) else error
        raise PosteriorError(f"{file}: the field prior is damaged ({what}); {_TUNE}") from error
    if manifest[CHECKSUMS].get("prior") != _checksum(prior):
        raise PosteriorError(
            f"{file}: the field prior was changed since it was written ({CHECKSUMS}.prior is another's); {_TUNE}"
        )


_Check = Callable[[Any, str], None]


def _text(value: Any, field: str) -> None:
    if not isinstance(value, str) or not value:
        raise _Wrong(f"{field} is {value!r:.60}, not a text")


def _digest(value: Any, field: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{32,128}", value):
        raise _Wrong(f"{field} is {value!r:.60}, not a digest")


def _among(values: tuple[Any, ...]) -> _Check:
    def check(value: Any, field: str) -> None:
        if value not in values:
            raise _Wrong(f"{field} is {value!r:.60}, not one of {', '.join(map(str, values))}")

    return check


def _number(value: Any, field: str) -> None:
    # A comparison, since a whole number may be too long to become a float; NaN fails it too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise _Wrong(f"{field} is {value!r:.60}, not a finite number")


def _whole(least: int, most: int = 2**63) -> _Check:
    def check(value: Any, field: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < most:
            raise _Wrong(f"{field} is {value!r:.60}, not a whole number from {least}")

    return check


def _or_null(inner: _Check) -> _Check:
    def check(value: Any, field: str) -> None:
        if value is not None:
            inner(value, field)

    return check


def _mapping(*keys: str, **checks: _Check) -> _Check:
    def check(value: Any, field: str) -> None:
        if not isinstance(value, dict):
            raise _Wrong(f"{field} is {value!r:.60}, not an object")
        for key in (*keys, *checks):
            if key not in value:
                raise _Wrong(f"{field}.{key} is missing")
        for key, inner in checks.items():
            inner(value[key], f"{field}.{key}")

    return check


def _list_of(inner: _Check, least: int = 0) -> _Check:
    def check(value: Any, field: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            raise _Wrong(f"{field} is {value!r:.60}, not a list of {least} or more")
        for index, item in enumerate(value):
            inner(item, f"{field}[{index}]")

    return check


def _share(value: Any, field: str) -> None:
    _number(value, field)
    if not 0 <= value <= 1 + 1e-6:
        raise _Wrong(f"{field} is {value!r}, not between 0 and 1")


def _non_negative(value: Any, field: str) -> None:
    _number(value, field)
    if value < 0:
        raise _Wrong(f"{field} is {value!r}, not 0 or more")


def _log_likelihood(value: Any, field: str) -> None:
    _number(value, field)
    if value > 0:
        raise _Wrong(f"{field} is {value!r}: a log-likelihood of labels is not above 0")


def _shape(value: Any, field: str) -> None:
    _list_of(_whole(1, _MAX_DIMENSION))(value, field)


def _matrix_shape(value: Any, field: str) -> None:
    _shape(value, field)
    if len(value) != 2:
        raise _Wrong(f"{field} is {value!r:.60}, not two numbers")


def _tensors(value: Any, field: str) -> None:
    if not isinstance(value, dict) or not value:
        raise _Wrong(f"{field} is {value!r:.60}, not an object of tensors")
    entry = _mapping(shape=_list_of(_whole(0, _MAX_DIMENSION)), dtype=_text, blake2b=_digest)
    for name, described in value.items():
        entry(described, f"{field}.{name}")


def _answers(value: Any, field: str) -> None:
    _mapping(choices=_list_of(_text, 2), token_ids=_or_null(_list_of(_whole(0))))(value, field)
    for key in ("choices", "token_ids"):
        items = value[key]
        if items is not None and len(set(items)) != len(items):
            raise _Wrong(f"{field}.{key} names one answer twice")
    if value["token_ids"] is not None and len(value["token_ids"]) != len(value["choices"]):
        raise _Wrong(f"{field}.token_ids has {len(value['token_ids'])} for {len(value['choices'])} choices")


_FIELDS: dict[str, _Check] = {
    "adapter": _digest,
    "base_model": _mapping(
        "revision", name=_text, quantization=_among(get_args(Quantization)), dtype=_text, fingerprint=_digest
    ),
    "task": _mapping(task=_text),
    "data": _mapping(split=_text, n=_whole(1), fingerprint=_digest, max_length=_whole(1)),
    "structure": _among(get_args(Structure)),
    "weight_sharing": _among(get_args(WeightSharing)),
    "fisher": _among(get_args(FisherType)),
    "subset": _among(get_args(Subset)),
    "parameters": _list_of(
        _mapping(name=_text, shape=_matrix_shape, role=_among(("A", "B", "head")), squared_norm=_non_negative), 1
    ),
    "log_likelihood": _or_null(_log_likelihood),
    "tensors": _tensors,
    "prior": _mapping(),
    "answers": _answers,
    CHECKSUMS: _mapping(),
}


_OPTIONAL: dict[str, _Check] = {
    "adapter_config": _mapping(),
    "tokenizer": _digest,
    "libraries": _mapping(),
    "kept": _share,
    "rank": _or_null(_whole(1)),
}

_SCORES = {"nll": _number, "ece": _number, "accuracy": _number}
_VALIDATION = _mapping(
    split=_text,
    n=_whole(1),
    link=_text,
    scheme=_text,
    rows=_list_of(_text),
    curve=_list_of(_mapping(precision=_number, **_SCORES), 1),
    map=_mapping(**_SCORES),
)


def _check_parameters(manifest: Mapping[str, Any]) -> None:
    parameters = manifest["parameters"]
    names = [parameter["name"] for parameter in parameters]
    if len(set(names)) != len(names):
        raise _Wrong("parameters names one matrix twice")
    joint = manifest["structure"] in JOINT_STRUCTURES
    known = set(names)
    for index, parameter in enumerate(parameters):
        field = f"parameters[{index}]"
        leader = parameter.get("input_of")
        if not joint and not (isinstance(leader, str) and leader in known):
            raise _Wrong(f"{field}.input_of is {leader!r:.60}, which names no parameter")
        if "kept" in parameter:
            _share(parameter["kept"], f"{field}.kept")
    for key, check in _OPTIONAL.items():
        if key in manifest:
            check(manifest[key], key)
    _or_null(_text)(manifest["data"].get("data_dir"), "data.data_dir")
    digests = manifest["base_model"].get("digests", {})
    _mapping()(digests, "base_model.digests")
    for key, value in digests.items():
        _digest(value, f"base_model.digests.{key}")
