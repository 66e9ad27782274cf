"""The posterior on disk: ``ADAPTER/laplace/NAME/posterior.json`` and ``factors.safetensors``.

The manifest is for people and scripts; the factors hold everything else. There is no pickle. A folder is
written under another name and renamed, so that a kill at any moment leaves the old posterior or the new one.
Reading the manifest and the eigenvalues needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lapora._version import __version__
from lapora.errors import PosteriorError, UsageError
from lapora.posterior.prior import PriorPrecision

if TYPE_CHECKING:
    from lapora.posterior.gaussian import Posterior

FORMAT_VERSION = 1
JOINT = "joint"
"""Prefix of the tensors of a posterior whose basis spans all layers."""
JOINT_STRUCTURES = ("full", "lowrank")
MANIFEST_FILE = "posterior.json"
FACTORS_FILE = "factors.safetensors"
_REQUIRED = (
    "adapter",
    "base_model",
    "task",
    "data",
    "structure",
    "parameters",
    "tensors",
    "prior",
    "answers",
)


def posterior_folder(root: Path, name: str) -> Path:
    """Where the posterior ``name`` of an adapter lives.

    Raises:
        UsageError: The name is not a plain file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(f"--name {name!r}: letters, digits, '.', '_' and '-' only")
    return root / "laplace" / name


def write_posterior(folder: Path, manifest: Mapping[str, Any], posterior: Posterior) -> None:
    """Write a posterior, replacing what stands there.

    Raises:
        PosteriorError: The folder cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in posterior.tensors().items()}
    described = {
        key: {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "blake2b": _digest(value),
        }
        for key, value in tensors.items()
    }
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    previous = folder.with_name(f".{folder.name}.previous")
    try:
        fresh.mkdir(parents=True)
        save_file(tensors, fresh / FACTORS_FILE)
        _write_json(fresh / MANIFEST_FILE, {**manifest, "tensors": described})
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        fresh.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        raise PosteriorError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _digest(value: Any) -> str:
    return hashlib.blake2b(value.numpy().tobytes(), digest_size=16).hexdigest()


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


class SavedPosterior:
    """A posterior folder that has been found whole; tensors are read and checked when asked for.

    Args:
        folder: ``ADAPTER/laplace/NAME``.

    Raises:
        PosteriorError: Missing, of another format, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        previous = folder.with_name(f".{folder.name}.previous")
        if not folder.exists() and previous.exists():
            previous.rename(folder)  # a fit was ended between its two renames
        self.manifest = self._read_manifest()

    def _read_manifest(self) -> dict[str, Any]:
        file = self.folder / MANIFEST_FILE
        if not file.is_file():
            raise PosteriorError(f"{self.folder}: no posterior there; make one with `lapora fit`")
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PosteriorError(f"{file}: damaged ({error}); fit again with --overwrite") from error
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            raise PosteriorError(
                f"{file}: not of format {FORMAT_VERSION}, which lapora {__version__} reads; fit again with --overwrite"
            )
        missing = [key for key in _REQUIRED if key not in manifest]
        if missing:
            raise PosteriorError(f"{file}: the field {', '.join(missing)} is missing; fit again with --overwrite")
        try:
            PriorPrecision.from_manifest(manifest["prior"]).per_layer(manifest["parameters"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PosteriorError(f"{file}: the field prior is damaged ({error}); tune the prior again") from error
        return manifest

    def rewrite_manifest(self, changes: Mapping[str, Any]) -> None:
        """Replace fields of the manifest, atomically; the factors stay as they are.

        Raises:
            PosteriorError: The manifest cannot be written.
        """
        self.manifest = {**self.manifest, **changes}
        try:
            _write_json(self.folder / MANIFEST_FILE, self.manifest)
        except OSError as error:
            raise PosteriorError(f"{self.folder}: cannot be written ({error.strerror or error})") from error

    @property
    def prior(self) -> PriorPrecision:
        """The prior as last tuned."""
        return PriorPrecision.from_manifest(self.manifest["prior"])

    @property
    def joint(self) -> bool:
        """Whether one basis spans all layers: they then share one prior precision."""
        return self.manifest["structure"] in JOINT_STRUCTURES

    def eigenvalues(self) -> list[NDArray[np.float64]]:
        """``λ`` of every layer, in order; a single array where one basis spans all layers."""
        names = [f"{JOINT}.eigenvalues"]
        if not self.joint:
            names = [f"{parameter['name']}.eigenvalues" for parameter in self.manifest["parameters"]]
        arrays = self.arrays(names)
        return [arrays[name] for name in names]

    def arrays(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Read tensors, checked against the manifest.

        Raises:
            PosteriorError: The factors file is missing or damaged, or does not belong to the manifest.
        """
        from safetensors import SafetensorError, safe_open

        file = self.folder / FACTORS_FILE
        found: dict[str, NDArray[Any]] = {}
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in names:
                    found[name] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise PosteriorError(f"{file}: damaged or missing ({error}); fit again with --overwrite") from error
        for name, array in found.items():
            expected = self.manifest["tensors"].get(name, {}).get("blake2b")
            if hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest() != expected:
                raise PosteriorError(f"{file}: tensor {name} is damaged; fit again with --overwrite")
        return found

    def gaussian(self) -> Posterior:
        """The Gaussian, bases and all.

        Raises:
            PosteriorError: As for :meth:`arrays`.
        """
        import torch

        from lapora.posterior.gaussian import BlockPosterior, JointPosterior

        wanted = [name for name in self.manifest["tensors"] if not name.startswith("linear_model.")]
        tensors = {name: torch.from_numpy(array) for name, array in self.arrays(wanted).items()}
        kind: type[BlockPosterior] | type[JointPosterior] = JointPosterior if self.joint else BlockPosterior
        try:
            return kind.from_tensors(self.manifest["parameters"], tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise PosteriorError(
                f"{self.folder / MANIFEST_FILE}: parameters do not match the factors ({error}); fit again"
            ) from error


def saved_names(root: Path) -> list[str]:
    """Names of the posteriors saved beside an adapter."""
    folder = root / "laplace"
    if not folder.is_dir():
        return []
    return sorted(item.name for item in folder.iterdir() if (item / MANIFEST_FILE).is_file())
