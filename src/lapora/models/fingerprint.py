"""What a base model is known by: digests of its weights, and the libraries that run it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import transformers


def fingerprint_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest the first, middle and last elements of every tensor, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        parameter = tensors[name]
        flat = parameter.detach().reshape(-1)
        middle = flat.numel() // 2
        sample = torch.cat([flat[:8], flat[middle : middle + 8], flat[-8:]]).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


_PIECE = 1 << 22


def digest_in(dtype: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest every element of every tensor as it is when rounded to ``dtype``, the same on every device.

    A file in float32 that is loaded in bfloat16 has the digest that it has when loaded in float32 and rounded. Of
    each piece of a tensor the bits are added up as whole numbers, which is exact in any order, and as fast as memory.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        parameter = tensors[name]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        for piece in parameter.detach().reshape(-1).split(_PIECE):
            rounded = piece.to(getattr(torch, dtype))
            digest.update(f" {_sum_of_bits(rounded)}".encode())
            digest.update(torch.cat([rounded[:8], rounded[-8:]]).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sum_of_bits(values: torch.Tensor) -> int:
    whole = torch.nn.functional.pad(values, (0, -len(values) % 8)) if len(values) % 8 else values
    if whole.storage_offset() % 8:
        whole = whole.clone()
    return int(whole.view(torch.int64).sum())


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what the network computes."""
    import peft

    return {"torch": str(torch.__version__), "transformers": transformers.__version__, "peft": peft.__version__}
