"""Checkpoints of an interrupted fit: ``ADAPTER/laplace/.NAME.partial/pass-K.safetensors``, one file per pass.

Each file contains the accumulated sums, every setting and digest that they depend on, and a checksum. Files are
written under a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapora.curvature.passes import PassState
from lapora.errors import LaporaWarning, PosteriorError, first_line
from lapora.storage.files import os_error_reason, remove_path

# Maximum share of the time that may be spent on saving.
_SHARE_OF_TIME = 0.02
_MOST_PASSES = 2


class Checkpoint:
    """Checkpoints of the passes of one fit.

    Args:
        folder: ``ADAPTER/laplace/NAME``; the checkpoints are stored beside it.
        identity: Every setting and digest that the sums depend on.
        resume: Resume from the saved checkpoints; otherwise they are deleted.
        every: Minimum number of seconds between two saves, longer if saving is slow; 0 saves after every batch.
        device: Device on which restored sums are placed.
        rank: Rank of this process; each rank saves its own sums.

    Raises:
        PosteriorError: A checkpoint is damaged, or belongs to another fit; every difference is named.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        every: float,
        device: torch.device,
        rank: int = 0,
    ) -> None:
        self.folder = partial_folder(folder)
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.every = every
        self.device = device
        self.resumed_rows = 0
        self._passes = 0
        self._rank = rank
        if rank == 0 and (not resume or self.folder.is_symlink()):  # a symlink would redirect the files
            self.remove()

    def next_pass(self, *, keep: bool) -> _Pass:
        """Return the checkpoint of the next pass.

        Args:
            keep: Always save the finished pass, because a later pass depends on it.
        """
        file = self._file(self._passes)
        if not file.exists():  # later passes depend on it
            for later in range(self._passes + 1, _MOST_PASSES):
                self._file(later).unlink(missing_ok=True)
        self._passes += 1
        return _Pass(self, file, keep)

    def _file(self, number: int) -> Path:
        return self.folder / f"pass-{number}{f'-process-{self._rank}' if self._rank else ''}.safetensors"

    def remove(self) -> None:
        """Delete the checkpoints of a finished fit; errors are ignored."""
        with suppress(OSError):
            remove_path(self.folder)


def partial_folder(folder: Path) -> Path:
    """Return the folder of a posterior's checkpoints."""
    return folder.with_name(f".{folder.name}.partial")


class _Pass:
    """Checkpoint of one pass; implements :class:`lapora.curvature.passes.PassCheckpoint`."""

    def __init__(self, checkpoint: Checkpoint, file: Path, keep: bool) -> None:
        self._checkpoint = checkpoint
        self._file = file
        self._keep = keep
        self._wrote = file.exists()
        self._last = time.monotonic()
        self._pause = checkpoint.every

    def saved(self) -> PassState | None:
        if not self._file.exists():
            return None
        state = _read(self._file, self._checkpoint.identity, self._checkpoint.device)
        self._checkpoint.resumed_rows = len(state.order)
        return state

    def offer(self, take: Callable[[], PassState]) -> None:
        started = time.monotonic()
        if started - self._last < self._pause:
            return
        self._write(take())
        self._last = time.monotonic()
        if self._checkpoint.every:
            self._pause = max(self._checkpoint.every, (self._last - started) / _SHARE_OF_TIME)

    def finish(self, take: Callable[[], PassState]) -> None:
        if self._keep or self._wrote:
            self._write(take())

    def _write(self, state: PassState) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors().items()}
        described = json.dumps({"identity": self._checkpoint.identity, "facts": state.observer.facts})
        fresh = self._file.with_name(f"{self._file.name}.new")
        try:
            self._file.parent.mkdir(exist_ok=True)
            fresh.unlink(missing_ok=True)
            save_file(tensors, fresh, {"state": described, "blake2b": _digest(described, tensors)})
            fresh.replace(self._file)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
            warnings.warn(
                f"{self._file.parent}: the checkpoint cannot be written ({os_error_reason(error)}); the fit goes on "
                f"{'with the previous one' if self._file.exists() else 'without'}: free some disk space before it ends",
                LaporaWarning,
                stacklevel=2,
            )
        else:
            self._wrote = True


def _digest(described: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, identity: Mapping[str, Any], device: torch.device) -> PassState:
    from safetensors import SafetensorError, safe_open

    try:
        if not file.is_file():  # opening a named pipe would block
            raise ValueError("not a regular file")
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        described = json.loads(metadata["state"])
        if metadata["blake2b"] != _digest(metadata["state"], tensors):
            raise ValueError("its checksum does not match its content")
        then, facts = dict(described["identity"]), described["facts"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PosteriorError(f"{file}: damaged ({first_line(error)}); fit again without --resume") from error
    differences = _differences(then, identity)
    if differences:
        raise PosteriorError(
            f"{file.parent}: the checkpoint was written with other settings or data: {'; '.join(differences)}; use the "
            "same ones, or fit again without --resume"
        )
    # Copy, so that tensors are aligned in memory like new sums: the rounding of a product may depend on alignment.
    on_device = {
        name: tensor.to(device, copy=True) if name.startswith("observer.") else tensor
        for name, tensor in tensors.items()
    }
    return PassState.from_tensors(on_device, facts)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(set(then) | set(now)):
        before, after = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} {before!r:.80} then, {after!r:.80} now")
    return found
