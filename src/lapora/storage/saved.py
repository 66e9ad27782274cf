"""A saved posterior: ``ADAPTER/laplace/NAME/posterior.json`` and ``factors.safetensors``.

The manifest is readable JSON; the factors file contains the tensors. There is no pickle. A folder is written under
a temporary name and renamed, so that a kill at any moment leaves the old posterior or the new one.
Reading the manifest and the eigenvalues needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lapora.config import JOINT, ModelSettings
from lapora.errors import NumericalError, PosteriorError, UsageError, first_line
from lapora.models.adapter import Adapter, read_adapter
from lapora.posterior.marglik import Spectrum
from lapora.storage.files import fsync_path, os_error_reason, remove_path, write_json
from lapora.storage.manifest import (
    CHECKSUMS,
    FORMAT_VERSION,
    Manifest,
    Prior,
    digest_of,
    read_content,
    read_prior,
    to_content,
    typed,
    with_checksums,
)

if TYPE_CHECKING:
    from lapora.posterior.gaussian import Posterior

__all__ = ["FORMAT_VERSION", "SavedPosterior", "open_posterior", "posterior_folder", "saved_names", "write_posterior"]

MANIFEST_FILE = "posterior.json"
FACTORS_FILE = "factors.safetensors"
_LOOKS = 3
"""Attempts to read the manifest while it is being replaced."""


def posterior_folder(root: Path, name: str) -> Path:
    """Return the folder of an adapter's posterior, ``ADAPTER/laplace/NAME``.

    Raises:
        UsageError: The name is not a plain file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(f"--name {name!r}: letters, digits, '.', '_' and '-' only")
    return root / "laplace" / name


def open_posterior(model: ModelSettings, name: str) -> tuple[Adapter, SavedPosterior]:
    """Read the adapter's files and a posterior's manifest, without checking that they belong together.

    Raises:
        AdapterError: There is no adapter.
        PosteriorError: There is no such posterior, or it is damaged.
    """
    return read_adapter(model.folder), SavedPosterior(posterior_folder(model.root, name))


def previous_folder(folder: Path) -> Path:
    """Return the folder of the old posterior between the two renames that replace it."""
    return folder.with_name(f".{folder.name}.previous")


def posterior_exists(folder: Path) -> bool:
    """Return whether a posterior exists, including one whose replacement was interrupted."""
    return folder.exists() or previous_folder(folder).exists()


def refuse_to_replace(folder: Path, *, overwrite: bool) -> None:
    """Refuse to replace a posterior unless asked to.

    Raises:
        PosteriorError: The posterior exists, and ``overwrite`` is not set.
    """
    if posterior_exists(folder) and not overwrite:
        raise PosteriorError(f"{folder}: exists already; give --overwrite, or another --name")


_ESTIMATE = 0.9
"""Share of the estimated size that a posterior has at least."""


def refuse_full_disk(folder: Path, size: float) -> None:
    """Check that the disk has room for a posterior before it is fitted.

    Args:
        folder: The posterior's folder, which need not exist.
        size: Estimated size in bytes.

    Raises:
        PosteriorError: It has not.
    """
    place = next((each for each in folder.absolute().parents if each.is_dir()), None)
    try:
        free = shutil.disk_usage(place or folder).free
    except OSError:
        return
    if size * _ESTIMATE > free:
        raise PosteriorError(
            f"{folder}: the posterior takes about {size / 2**20:.1f} MiB, and {free / 2**20:.1f} are free: free some "
            "disk space, or give another place with --output-dir"
        )


TRAINING_ROWS = "training_rows"
"""Tensor of the digests of the rows that ``fit`` read, ``(N,)`` int64."""


def write_posterior(
    folder: Path,
    manifest: Manifest,
    prior: Mapping[str, Any],
    posterior: Posterior,
    training_rows: Sequence[str] = (),
) -> None:
    """Write a posterior, replacing an existing one.

    The files are written under a temporary name and flushed to the disk before the renames. The caller must hold
    :func:`lapora.storage.files.write_lock`.

    Args:
        folder: The posterior's folder.
        manifest: The manifest without prior.
        prior: The manifest's ``prior``.
        posterior: The factors.
        training_rows: Digests of the rows that ``fit`` read, 16 hexadecimal digits each.

    Raises:
        PosteriorError: The folder cannot be written; an existing posterior is unchanged.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in posterior.tensors().items()}
    if training_rows:
        digests = [int.from_bytes(bytes.fromhex(each), "big", signed=True) for each in training_rows]
        tensors[TRAINING_ROWS] = torch.tensor(digests)
    described = {
        key: {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "blake2b": _digest(value),
        }
        for key, value in tensors.items()
    }
    fresh, previous = folder.with_name(f".{folder.name}.new"), previous_folder(folder)
    try:
        remove_path(fresh)  # left by a killed fit
        fresh.mkdir(parents=True)
        save_file(tensors, fresh / FACTORS_FILE)
        fsync_path(fresh / FACTORS_FILE)
        content = {**to_content(manifest, prior), "tensors": described}
        write_json(fresh / MANIFEST_FILE, with_checksums(content))
        if folder.exists():
            remove_path(previous)
            folder.rename(previous)
        fresh.rename(folder)
        fsync_path(folder.parent)
        remove_path(previous)
    except (OSError, SafetensorError) as error:
        if not folder.exists() and previous.exists():
            with contextlib.suppress(OSError):  # readers find it under its other name too
                previous.rename(folder)
        raise PosteriorError(
            f"{folder}: cannot be written ({os_error_reason(error)}); an existing posterior is unchanged"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _digest(value: Any) -> str:
    return hashlib.blake2b(value.numpy().tobytes(), digest_size=16).hexdigest()


class SavedPosterior:
    """A saved posterior with a validated manifest; tensors are read and validated on access.

    Args:
        folder: ``ADAPTER/laplace/NAME``.
        validate_prior: Whether a damaged prior is refused; ``tune-prior`` replaces it.

    Raises:
        PosteriorError: The posterior is missing, has another format, or is damaged.
    """

    def __init__(self, folder: Path, *, validate_prior: bool = True) -> None:
        self._named = folder
        for attempt in range(_LOOKS):
            self.folder = folder
            if not folder.exists() and previous_folder(folder).exists():
                self.folder = previous_folder(folder)  # a fit was killed between its two renames
            try:
                self._content = read_content(self.folder / MANIFEST_FILE, validate_prior=validate_prior)
                break
            except PosteriorError:
                if attempt == _LOOKS - 1 or (self.folder / MANIFEST_FILE).is_file():
                    raise
                time.sleep(0.01)  # a fit may be between its two renames

    @property
    def name(self) -> str:
        """Name of the posterior."""
        return self._named.name

    @property
    def content(self) -> dict[str, Any]:
        """The manifest's JSON content."""
        return self._content

    @property
    def tensors(self) -> dict[str, Any]:
        """Shape, dtype and digest of every tensor of the factors file."""
        return dict(self._content["tensors"])

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest's fields."""
        return typed(self._content)

    @property
    def digest_without_prior(self) -> str:
        """Digest of manifest and factors, equal for posteriors that differ in their prior alone."""
        return str(self._content[CHECKSUMS]["rest"])

    @property
    def digest(self) -> str:
        """Digest of manifest, factors and prior, the same wherever the posterior is."""
        return digest_of(self._content)

    @property
    def prior(self) -> Prior:
        """The current prior.

        Raises:
            PosteriorError: It is damaged.
        """
        return read_prior(self.folder / MANIFEST_FILE, self._content)

    def rewrite_manifest(self, changes: Mapping[str, Any]) -> None:
        """Replace fields of the manifest atomically; the factors are not changed.

        Raises:
            PosteriorError: The manifest cannot be written; the old one is unchanged.
        """
        content = with_checksums({**self._content, **changes})
        try:
            write_json(self.folder / MANIFEST_FILE, content)
        except OSError as error:
            raise PosteriorError(
                f"{self.folder}: cannot be written ({os_error_reason(error)}); the old manifest is unchanged"
            ) from error
        self._content = content
        self.__dict__.pop("manifest", None)

    def prior_is_sound(self) -> bool:
        """Return whether the prior is valid and unchanged since ``fit`` or ``tune-prior`` wrote it."""
        try:
            return bool(self.prior)
        except PosteriorError:
            return False

    def mismatch(self, differences: Sequence[str]) -> PosteriorError:
        """Return the error for a posterior of another adapter, base model or task."""
        return PosteriorError(
            f"{self.folder}: fitted to something else: {'; '.join(differences)}; give what it was fitted to, or fit "
            "again with --overwrite"
        )

    def spectra(self) -> list[Spectrum]:
        """Return the eigenvalues with multiplicities of each layer in order, or of all layers together.

        Raises:
            PosteriorError: As for :meth:`arrays`; or the eigenvalues do not have the shape of the bases.
            NumericalError: As for :meth:`arrays`.
        """
        bases = self._bases()
        arrays = self._with_remainder(self.arrays([f"{name}.eigenvalues" for name in bases]))
        try:
            return [Spectrum.of(arrays[f"{name}.eigenvalues"], shapes) for name, shapes in bases.items()]
        except (ValueError, IndexError) as error:
            raise PosteriorError(
                f"{self.folder / MANIFEST_FILE}: tensors do not match the factors ({error}); fit again with --overwrite"
            ) from error

    def _bases(self) -> dict[str, list[Any]]:
        """Return the shapes ``(d, k)`` of each layer's bases, or of the joint basis; None is the identity."""
        shapes = {name: each["shape"] for name, each in self.tensors.items()}
        if self.manifest.joint:
            return {JOINT: [shapes.get(f"{JOINT}.basis", [])[::-1]]}
        return {
            each["name"]: [
                shapes.get(f"{each['name']}.gradient_basis"),
                shapes.get(f"{each['input_of']}.input_basis"),
            ]
            for each in self.manifest.parameters
        }

    def _with_remainder(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Append the eigenvalue 0 for the directions outside each basis, if the file has none (version 0.1)."""
        if self.manifest.remainder == "mean":
            return arrays
        for name, bases in self._bases().items():
            values = arrays.get(f"{name}.eigenvalues")
            if values is not None and values.ndim == len(bases):
                others = [bool(shape) and len(shape) == 2 and shape[1] < shape[0] for shape in bases]
                arrays[f"{name}.eigenvalues"] = np.pad(values, [(0, int(each)) for each in others])
        return arrays

    def arrays(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Read tensors and check them against the manifest.

        Raises:
            PosteriorError: The factors file is missing or damaged, or does not belong to the manifest.
            NumericalError: A tensor contains NaN or infinity.
        """
        try:
            return self._arrays(names)
        except PosteriorError:  # perhaps a fit replaced the posterior between the reading of the two files
            try:
                now = SavedPosterior(self._named, validate_prior=False)
            except PosteriorError:
                now = self
            if now.tensors != self.tensors:
                raise PosteriorError(
                    f"{self._named}: another fit replaced it while it was read; run the command again"
                ) from None
            self.folder = now.folder
        return self._arrays(names)

    def _arrays(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        from safetensors import SafetensorError, safe_open

        file = self.folder / FACTORS_FILE
        described = self.tensors
        found: dict[str, NDArray[Any]] = {}
        try:
            if not file.is_file():  # opening a named pipe would block
                raise FileNotFoundError("no such file")
            with safe_open(file, framework="numpy") as tensors:
                for name in names:
                    found[name] = tensors.get_tensor(name)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise PosteriorError(
                f"{file}: damaged or missing ({first_line(error)}); fit again with --overwrite"
            ) from error
        for name, array in found.items():
            expected = described.get(name)
            if expected is None or hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest() != expected["blake2b"]:
                raise PosteriorError(f"{file}: tensor {name} is damaged; fit again with --overwrite")
            if list(array.shape) != expected["shape"] or str(array.dtype) != expected["dtype"]:
                raise PosteriorError(
                    f"{file}: tensor {name} is {array.dtype}{list(array.shape)}, and the manifest says "
                    f"{expected['dtype']}{expected['shape']}; fit again with --overwrite"
                )
            if not np.isfinite(array).all():
                raise NumericalError(f"{file}: tensor {name} holds NaN or infinity; fit again with --overwrite")
            if name.endswith(".eigenvalues") and bool((array < 0).any()):
                raise NumericalError(
                    f"{file}: tensor {name} has a negative eigenvalue ({array.min():.3g}): no curvature has one; "
                    "fit again with --overwrite"
                )
        return found

    @cached_property
    def training_rows(self) -> frozenset[str]:
        """Digests of the rows that ``fit`` read; none in a posterior of an earlier version.

        Raises:
            PosteriorError: As for :meth:`arrays`.
        """
        if TRAINING_ROWS not in self.tensors:
            return frozenset()
        numbers = self.arrays([TRAINING_ROWS])[TRAINING_ROWS].tolist()
        return frozenset(number.to_bytes(8, "big", signed=True).hex() for number in numbers)

    def check(self) -> None:
        """Read the factors and check them, as :meth:`gaussian` does."""
        self.gaussian()

    def gaussian(self) -> Posterior:
        """Return the Gaussian with its bases.

        Raises:
            PosteriorError: As for :meth:`arrays`, or the tensors do not have the parameters' shapes.
            NumericalError: A tensor contains NaN or infinity, an eigenvalue is negative, or a basis is not orthonormal.
        """
        import torch

        from lapora.posterior.gaussian import BlockPosterior, JointPosterior, check_blocks, check_joint

        others = ("linear_model.", TRAINING_ROWS)
        wanted = [name for name in self.tensors if not name.startswith(others)]
        arrays = self._with_remainder(self.arrays(wanted))
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        try:
            if self.manifest.joint:
                joint = JointPosterior.from_tensors(self.manifest.parameters, tensors)
                check_joint(joint, self.folder / FACTORS_FILE)
                return joint
            blocks = BlockPosterior.from_tensors(self.manifest.parameters, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise PosteriorError(
                f"{self.folder / MANIFEST_FILE}: parameters do not match the factors ({error}); "
                "fit again with --overwrite"
            ) from error
        answers = len(self.manifest.answers.choices)
        check_blocks(blocks, self.manifest.structure, answers, self.folder / FACTORS_FILE)
        return blocks


def saved_names(root: Path) -> list[str]:
    """Return the names of the posteriors saved beside an adapter."""
    folder = root / "laplace"
    if not folder.is_dir():
        return []
    names = (item.name for item in folder.iterdir() if (item / MANIFEST_FILE).is_file())
    return sorted(name for name in names if not name.startswith("."))
