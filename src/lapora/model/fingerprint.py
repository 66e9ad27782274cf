"""What a base model is known by: a digest of a sample of its weights, and the libraries that run it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import transformers
from torch import nn


def base_fingerprint(base: nn.Module, missing: set[str]) -> str:
    """Digest the first, middle and last elements of every tensor that came from the base's own files."""
    return fingerprint_of_tensors({name: value for name, value in base.named_parameters() if name not in missing})


def fingerprint_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest the first, middle and last elements of every tensor, whatever their order."""
    digest = hashlib.sha256()
    for name, parameter in sorted(tensors.items()):
        flat = parameter.detach().reshape(-1)
        middle = flat.numel() // 2
        sample = torch.cat([flat[:8], flat[middle : middle + 8], flat[-8:]]).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what the network computes."""
    import peft

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
