"""Identity of a base model: digests of its weights, and library versions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers


def fingerprint_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Compute the SHA-256 of the first, middle and last elements of every tensor, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        parameter = tensors[name]
        flat = parameter.detach().reshape(-1)
        middle = flat.numel() // 2
        sample = torch.cat([flat[:8], flat[middle : middle + 8], flat[-8:]]).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


_CHUNK = 1 << 22


def digest_at_dtype(dtype: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Compute the SHA-256 of all elements of all tensors, rounded to ``dtype``; equal on every device.

    The digest of a float32 file loaded in bfloat16 equals that of the same file loaded in float32 and rounded here.
    The bits of each chunk are summed as integers: exact in any order, and as fast as reading memory.

    Args:
        dtype: Name of the element type, such as ``bfloat16``.
        tensors: Tensors by name.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        parameter = tensors[name]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        for chunk in parameter.detach().reshape(-1).split(_CHUNK):
            rounded = chunk.to(getattr(torch, dtype))
            digest.update(f" {_sum_of_bits(rounded)}".encode())
            digest.update(torch.cat([rounded[:8], rounded[-8:]]).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sum_of_bits(values: torch.Tensor) -> int:
    whole = torch.nn.functional.pad(values, (0, -len(values) % 8)) if len(values) % 8 else values
    if whole.storage_offset() % 8:
        whole = whole.clone()
    return int(whole.view(torch.int64).sum())


_SAMPLES, _SAMPLE = 64, 4096


def digest_of_folder(folder: Path) -> str:
    """Compute the SHA-256 of the names, sizes and samples of a model's files, without loading the model.

    Of each file, 64 pieces of 4 KiB at equal distances are read: whole files that are smaller, and some of almost
    every tensor of a model that was trained on.
    """
    digest = hashlib.sha256()
    for file in sorted(each for each in folder.iterdir() if each.is_file() and not each.name.startswith(".")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode("utf-8", "surrogateescape"))
        with file.open("rb") as stream:
            for number in range(_SAMPLES):
                stream.seek(number * max(size // _SAMPLES, _SAMPLE))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries on which the network's outputs depend."""
    import peft

    return {"torch": str(torch.__version__), "transformers": transformers.__version__, "peft": peft.__version__}
