"""Damaged, truncated, edited and absurd posteriors: refused with the file and the field, never believed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lapora.config import PredictSettings, PriorSettings
from lapora.errors import LaporaError, NumericalError, PosteriorError
from lapora.storage.manifest import with_checksums
from lapora.storage.saved import SavedPosterior
from lapora.workflows.predict import predict
from lapora.workflows.tune_prior import tune_prior
from tiny_adapter import fit_tiny, json_lines, make_adapter, model_of

STRUCTURES = {"kron": {}, "ekfac": {}, "diag": {}, "lowrank": {"rank": 4}, "full": {}, "sketched": {"rank": 2}}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = make_adapter(tmp_path_factory.mktemp("tiny"))
    for name, options in STRUCTURES.items():
        fit_tiny(folder, name=name, structure="kron" if name == "sketched" else name, **options)
    return folder


@pytest.fixture
def copied(originals, tmp_path) -> Path:
    folder = tmp_path / "kron"
    shutil.copytree(originals / "adapter" / "laplace" / "kron", folder)
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "posterior.json").read_text()), load_file(folder / "factors.safetensors")


def write(folder: Path, manifest: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """As a careful forger writes it: every checksum made to fit."""
    if tensors is not None:
        save_file(tensors, folder / "factors.safetensors")
        for name, tensor in tensors.items():
            manifest["tensors"][name] = {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "blake2b": hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).hexdigest(),
            }
    (folder / "posterior.json").write_text(json.dumps(with_checksums(manifest)))


def refusal(folder: Path) -> str:
    with pytest.raises((PosteriorError, NumericalError)) as caught:
        SavedPosterior(folder).gaussian()
    message = str(caught.value)
    assert caught.value.exit_status in (4, 6) and "\n" not in message and str(folder) in message
    return message


def put(manifest: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place: Any = manifest
    for key in parents:
        place = place[key]
    place[last] = value


WRONG = [
    ("format_version", 2, "not of format 1"),
    ("format_version", True, "not of format 1"),
    ("adapter", 7, "field adapter"),
    ("adapter", "xyz", "field adapter"),
    ("base_model", None, "field base_model"),
    ("base_model/quantization", "3bit", "field base_model.quantization"),
    ("base_model/name", ["a"], "field base_model.name"),
    ("task", "boolq", "field task"),
    ("task/task", None, "field task.task"),
    ("data/n", 0, "field data.n"),
    ("data/n", 1.5, "field data.n"),
    ("data/max_length", -4, "field data.max_length"),
    ("data/fingerprint", "", "field data.fingerprint"),
    ("structure", "block", "field structure"),
    ("weight_sharing", 1, "field weight_sharing"),
    ("fisher", "true", "field fisher"),
    ("subset", {}, "field subset"),
    ("parameters", [], "field parameters"),
    ("parameters", {"a": 1}, "field parameters"),
    ("parameters/0/name", 4, "field parameters[0].name"),
    ("parameters/0/shape", [3], "field parameters[0].shape"),
    ("parameters/0/shape", [3, 0], "field parameters[0].shape[1]"),
    ("parameters/0/shape", [3, -16], "field parameters[0].shape[1]"),
    ("parameters/0/shape", [3, 2**40], "field parameters[0].shape[1]"),
    ("parameters/0/shape", [True, 16], "field parameters[0].shape[0]"),
    ("parameters/1/role", "C", "field parameters[1].role"),
    ("parameters/1/squared_norm", -1.0, "field parameters[1].squared_norm"),
    ("parameters/1/squared_norm", "1", "field parameters[1].squared_norm"),
    ("parameters/1/squared_norm", 10**400, "field parameters[1].squared_norm"),
    ("parameters/1/input_of", ["a"], "field parameters[1].input_of"),
    ("parameters/1/kept", 1.5, "field parameters[1].kept"),
    ("parameters/1/input_of", "nobody", "field parameters[1].input_of"),
    ("kept", -0.5, "field kept"),
    ("rank", 0, "field rank"),
    ("adapter_config", "x", "field adapter_config"),
    ("tokenizer", "x", "field tokenizer"),
    ("libraries", [], "field libraries"),
    ("data/data_dir", 7, "field data.data_dir"),
    ("log_likelihood", 3.0, "field log_likelihood"),
    ("log_likelihood", "no", "field log_likelihood"),
    ("tensors", {}, "field tensors"),
    ("tensors", [], "field tensors"),
    ("answers/choices", ["yes"], "field answers.choices"),
    ("answers/choices", ["yes", "yes"], "field answers.choices"),
    ("answers/token_ids", [1], "field answers.token_ids"),
    ("answers/token_ids", [-1, 2], "field answers.token_ids"),
    ("prior", 1.0, "field prior"),
    ("prior/precision", 0, "field prior"),
    ("prior/precision", -1.0, "field prior"),
    ("prior/precision", "1", "field prior"),
    ("prior/precision", {"A": 1.0}, "field prior"),
    ("prior/structure", "layer", "field prior"),
    ("prior/structure", "row", "field prior"),
    ("prior/method", None, "field prior"),
    ("prior/log_marginal_likelihood", "x", "field prior"),
    ("prior/validation", {"rows": 4}, "field prior"),
    ("checksums", [], "field checksums"),
]


@pytest.mark.parametrize(("path", "value", "words"), WRONG, ids=[f"{path}={value!r:.20}" for path, value, _ in WRONG])
def test_a_wrong_field_is_named_even_where_the_checksums_fit(copied, path, value, words):
    manifest, _ = read(copied)
    if path == "checksums":
        (copied / "posterior.json").write_text(json.dumps(manifest | {"checksums": value}))
    else:
        put(manifest, path, value)
        write(copied, manifest)
    message = refusal(copied)
    assert words in message and "posterior.json" in message


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_missing_field_is_named(originals, tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(originals / "adapter" / "laplace" / name, folder)
    manifest, _ = read(folder)
    for key in manifest:
        rest = {other: value for other, value in manifest.items() if other != key}
        (folder / "posterior.json").write_text(json.dumps(rest))
        assert key in refusal(folder) or key not in (
            *("adapter", "base_model", "task", "data", "structure", "parameters", "prior", "answers", "checksums"),
        )


def test_a_number_changed_by_hand_is_refused(copied):
    manifest, _ = read(copied)
    manifest["parameters"][0]["squared_norm"] *= 1.0001
    (copied / "posterior.json").write_text(json.dumps(manifest))
    assert "checksums.rest" in refusal(copied) and "fit again" in refusal(copied)


def test_a_prior_changed_by_hand_is_refused_and_tuned_again(originals):
    folder = originals / "adapter" / "laplace" / "kron"
    manifest, _ = read(folder)
    right = copy.deepcopy(manifest["prior"])
    for changed in (manifest["prior"]["precision"] * 2, -1.0, None):
        manifest["prior"]["precision"] = changed
        (folder / "posterior.json").write_text(json.dumps(manifest))
        assert "tune-prior" in refusal(folder)
        tune_prior(model_of(originals), settings=PriorSettings(name="kron", method="marglik"))
        assert SavedPosterior(folder).content["prior"] == right


def test_what_is_written_otherwise_but_says_the_same_is_read(copied):
    manifest, _ = read(copied)
    reordered = dict(reversed(manifest.items()))
    (copied / "posterior.json").write_text(json.dumps(reordered, indent=7, ensure_ascii=True) + "\n\n")
    assert SavedPosterior(copied).content == manifest


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"format_version": 1}', b'{"format_version": NaN}'),
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"7" * 6000,
        b" " * (64 * 2**20 + 1),
    ],
    ids=lambda content: f"{content[:12]!r}x{len(content)}",
)
def test_what_is_no_manifest(copied, content):
    (copied / "posterior.json").write_bytes(content)
    assert "posterior.json" in refusal(copied)


def test_missing_files_and_folders_in_their_place(copied):
    (copied / "factors.safetensors").unlink()
    assert "factors.safetensors" in refusal(copied)
    (copied / "factors.safetensors").mkdir()
    assert "factors.safetensors" in refusal(copied)
    (copied / "posterior.json").unlink()
    assert "no posterior there" in refusal(copied)
    (copied / "posterior.json").mkdir()
    assert "no posterior there" in refusal(copied)


def damage_eigenvalues(value: float):
    def damage(tensors: dict[str, torch.Tensor]) -> str:
        name = next(name for name in tensors if name.endswith("eigenvalues"))
        tensors[name].view(-1)[0] = value
        return name

    return damage


def damage_basis(factor: float):
    def damage(tensors: dict[str, torch.Tensor]) -> str:
        name = next(name for name in tensors if name.endswith("basis"))
        tensors[name] = tensors[name] * factor
        return name

    return damage


FORGED = {
    "NaN eigenvalue": (damage_eigenvalues(float("nan")), ("kron", "ekfac", "diag", "lowrank", "full"), 6),
    "infinite eigenvalue": (damage_eigenvalues(float("inf")), ("kron", "ekfac", "diag", "lowrank", "full"), 6),
    "negative eigenvalue": (damage_eigenvalues(-1e-3), ("kron", "ekfac", "diag", "lowrank", "full"), 6),
    "a basis of another length": (damage_basis(1.01), ("kron", "ekfac", "sketched"), 6),
    "NaN in a basis": (damage_basis(float("nan")), ("kron", "ekfac", "lowrank", "full", "sketched"), 6),
}
CASES = [(fault, name) for fault, (_, names, _) in FORGED.items() for name in names]


@pytest.mark.parametrize(("fault", "name"), CASES)
def test_factors_that_are_no_curvature_are_refused_though_every_checksum_fits(originals, tmp_path, fault, name):
    folder = tmp_path / name
    shutil.copytree(originals / "adapter" / "laplace" / name, folder)
    damage, _, status = FORGED[fault]
    manifest, tensors = read(folder)
    tensor = damage(tensors)
    write(folder, manifest, tensors)
    with pytest.raises(NumericalError, match=tensor.replace(".", r"\.")) as caught:
        SavedPosterior(folder).gaussian()
    assert caught.value.exit_status == status and "factors.safetensors" in str(caught.value)


@pytest.mark.parametrize("name", STRUCTURES)
def test_shapes_and_types_that_do_not_fit(originals, tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(originals / "adapter" / "laplace" / name, folder)
    manifest, tensors = read(folder)
    for tensor in [each for each in tensors if not each.startswith(("linear_model", "training_rows"))]:
        whole = tensors[tensor]
        longer = torch.cat([whole, whole])
        changes = [whole[1:].contiguous(), whole.unsqueeze(0), longer]
        for changed in changes:
            write(folder, copy.deepcopy(manifest), {**tensors, tensor: changed})
            assert "factors" in refusal(folder)
        without = {key: value for key, value in tensors.items() if key != tensor}
        forged = copy.deepcopy(manifest)
        del forged["tensors"][tensor]
        write(folder, forged, without)
        refusal(folder)


def test_factors_of_another_posterior_are_refused(originals, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(originals / "adapter" / "laplace" / "kron", folder)
    shutil.copy(originals / "adapter" / "laplace" / "ekfac" / "factors.safetensors", folder)
    assert "is damaged" in refusal(folder)


def test_a_fit_that_replaces_it_meanwhile_is_not_called_damage(originals, tmp_path):
    folder = tmp_path / "kron"
    shutil.copytree(originals / "adapter" / "laplace" / "kron", folder)
    opened = SavedPosterior(folder)
    shutil.rmtree(folder)
    shutil.copytree(originals / "adapter" / "laplace" / "diag", folder)
    with pytest.raises(PosteriorError, match="replaced it while it was read; run the command again"):
        opened.gaussian()


def test_a_reader_between_the_two_renames_of_a_replacement_goes_on(originals, tmp_path):
    folder, previous = tmp_path / "kron", tmp_path / ".kron.previous"
    shutil.copytree(originals / "adapter" / "laplace" / "kron", folder)
    opened = SavedPosterior(folder)
    folder.rename(previous)
    opened.gaussian()  # its folder has another name meanwhile
    opened = SavedPosterior(folder)
    previous.rename(folder)  # the same again was written, and the old one has gone
    opened.gaussian()
    folder.rename(previous)
    opened = SavedPosterior(folder)
    shutil.rmtree(previous)
    shutil.copytree(originals / "adapter" / "laplace" / "diag", folder)
    with pytest.raises(PosteriorError, match="replaced it while it was read; run the command again"):
        opened.gaussian()


# Fuzzing: whatever is done to the files, a refusal in one line, or exactly what was there before.


def mutate_bytes(content: bytes, source: random.Random) -> bytes:
    data = bytearray(content)
    kind = source.randrange(5)
    place = source.randrange(len(data))
    if kind == 0:
        data[place] ^= 1 << source.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        del data[place : place + source.randint(1, 64)]
    elif kind == 3:
        data[place:place] = source.randbytes(source.randint(1, 64))
    else:
        for _ in range(source.randint(2, 20)):
            data[source.randrange(len(data))] = source.randrange(256)
    return bytes(data)


KINDS = ["manifest bytes", "manifest fields", "fields with fitting checksums", "factor bytes", "header"]
ABSURD = [None, True, 0, -1, 1, 2**63, 1e308, -1e-300, "", "x", [], {}, [0], {"a": 1}, "lora", [[1, 2]], 0.1]


def mutate_manifest(manifest: dict[str, Any], source: random.Random) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(changed)
    for _ in range(source.choice([1, 1, 1, 2, 4])):
        holder, key = source.choice(places)
        try:
            kind = source.randrange(4)
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder[key], int | float):
                holder[key] = holder[key] * source.choice([2, -1, 0, 1.0001, 1e30]) + source.choice([0, 1])
            elif kind == 2 and isinstance(holder, dict):
                holder[f"{key}x"] = holder.pop(key)
            else:
                holder[key] = source.choice(ABSURD)
        except (KeyError, IndexError):
            continue
    return changed


def mutated(original: Path, folder: Path, source: random.Random) -> str:
    """Write a mutation of ``original`` into ``folder``; says which kind."""
    manifest = (original / "posterior.json").read_bytes()
    factors = (original / "factors.safetensors").read_bytes()
    kind = source.choice(
        ["manifest bytes", "manifest fields", "fields with fitting checksums", "factor bytes", "header"]
    )
    if kind == "manifest bytes":
        manifest = mutate_bytes(manifest, source)
    elif kind == "manifest fields":
        manifest = json.dumps(mutate_manifest(json.loads(manifest), source)).encode()
    elif kind == "fields with fitting checksums":
        content = with_checksums(mutate_manifest(json.loads(manifest), source))
        manifest = json.dumps(content).encode()
    elif kind == "factor bytes":
        factors = mutate_bytes(factors, source)
    else:
        size = 8 + int.from_bytes(factors[:8], "little")
        factors = mutate_bytes(factors[:size], source) + factors[size:]
    folder.mkdir(exist_ok=True)
    (folder / "posterior.json").write_bytes(manifest)
    (folder / "factors.safetensors").write_bytes(factors)
    return kind


def judge(original: Path, folder: Path, kind: str) -> str:
    """``refused``, ``same``, or for forged checksums ``believed``: a value in range that someone vouches for."""
    try:
        saved = SavedPosterior(folder)
        gaussian = saved.gaussian()
        spectra = saved.spectra()
        saved.prior.precisions.per_layer(saved.content["parameters"])
    except LaporaError as error:
        assert error.exit_status in (4, 6) and "\n" not in str(error) and str(folder) in str(error), error
        return "refused"
    if kind == "fields with fitting checksums":
        return "believed"
    first = SavedPosterior(original)
    assert saved.content == first.content
    for one, other in zip(spectra, first.spectra(), strict=True):
        np.testing.assert_array_equal(one.values, other.values)
    there, here = gaussian.tensors(), first.gaussian().tensors()
    assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in there)
    return "same"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(STRUCTURES)))
def test_mutated_files_are_refused_or_say_the_same(originals, tmp_path, seed, name):
    original = originals / "adapter" / "laplace" / name
    judge(original, tmp_path / "mutated", mutated(original, tmp_path / "mutated", random.Random(seed)))


@pytest.mark.slow
def test_four_thousand_mutated_artifacts(originals, tmp_path):
    """No traceback and no changed number; those that pass predict the same bytes as the original."""
    source = random.Random(7)
    adapter = originals / "adapter" / "laplace" / "mutated"
    lines = json_lines(4)
    expected = {name: list(predict(model_of(originals), PredictSettings(name=name), lines)) for name in STRUCTURES}
    counts: dict[tuple[str, str], int] = {}
    for _ in range(int(os.environ.get("LAPORA_MUTATIONS", "4000"))):
        name = source.choice(sorted(STRUCTURES))
        original = originals / "adapter" / "laplace" / name
        shutil.rmtree(adapter, ignore_errors=True)
        kind = mutated(original, adapter, source)
        outcome = judge(original, adapter, kind)
        counts[kind, outcome] = counts.get((kind, outcome), 0) + 1
        if outcome == "same":
            assert list(predict(model_of(originals), PredictSettings(name="mutated"), lines)) == expected[name]
        if outcome == "believed":  # right, refused by something further on, or predicted with: no traceback
            try:
                list(predict(model_of(originals), PredictSettings(name="mutated"), lines))
            except LaporaError as error:
                assert "\n" not in str(error)
    shutil.rmtree(adapter, ignore_errors=True)
    print(json.dumps({f"{kind}: {outcome}": count for (kind, outcome), count in sorted(counts.items())}, indent=1))
    assert sum(counts.values()) < 4000 or sum(n for (_, outcome), n in counts.items() if outcome == "refused") > 2000
