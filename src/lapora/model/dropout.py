"""Dropout of LoRA inputs switched on in a model that is otherwise in eval mode (MC dropout; Gal & Ghahramani 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def lora_dropouts(model: nn.Module) -> list[nn.Dropout]:
    """The adapter's own ``lora_dropout`` layers that drop anything."""
    return [
        module
        for name, module in model.named_modules()
        if ".lora_dropout." in name and isinstance(module, nn.Dropout) and module.p > 0
    ]


@contextmanager
def lora_dropout_on(model: nn.Module, seed: int) -> Iterator[None]:
    """Let the adapter's dropout draw, from a seed; the caller's random state is left as it was."""
    layers = lora_dropouts(model)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            for layer in layers:
                layer.train()
            yield
        finally:
            for layer in layers:
                layer.eval()
