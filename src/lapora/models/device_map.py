"""Models larger than one device: Accelerate places layers on several devices, in CPU memory and on disk.

Offloaded layers are copied to a device while they run. The adapter's modules, and the sums and factors of a layer,
stay on the device on which the layer runs (its execution device).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lapora.config import Placement
from lapora.errors import UsageError


def device_map_arguments(placement: Placement) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for a placement.

    Raises:
        UsageError: ``max_memory`` cannot be parsed.
    """
    arguments: dict[str, Any] = {"device_map": placement.device_map}
    if placement.max_memory:
        arguments["max_memory"] = _parse_max_memory(placement.max_memory)
    if placement.offload_dir is not None:
        arguments["offload_folder"] = str(placement.offload_dir)
    return arguments


def _parse_max_memory(text: str) -> dict[int | str, str]:
    """Parse ``0=20GiB,cpu=60GiB`` to Accelerate's ``max_memory``."""
    from accelerate.utils import convert_file_size_to_int

    limits: dict[int | str, str] = {}
    for part in text.split(","):
        device, _, size = (piece.strip() for piece in part.partition("="))
        try:
            convert_file_size_to_int(size)
        except ValueError as error:
            raise UsageError(f"--max-memory {text}: {part!r} is not DEVICE=SIZE, as in 0=20GiB,cpu=60GiB") from error
        if device != "cpu" and not device.isdigit():
            raise UsageError(f"--max-memory {text}: {device!r} is neither a GPU's index nor cpu")
        limits[int(device) if device.isdigit() else device] = size
    return limits


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module runs, which may differ from where its weights are stored."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    parameter = next(module.parameters(), None)
    if parameter is not None and not parameter.is_meta:
        return parameter.device
    return next((execution_device(child) for child in module.children()), torch.device("cpu"))


def entry_device(network: nn.Module) -> torch.device:
    """Return the device of the input embeddings, to which token ids must be moved."""
    if getattr(network, "hf_device_map", None) is None:
        return next(network.parameters()).device
    return execution_device(cast(Any, network).get_input_embeddings())


def is_offloaded(network: nn.Module) -> bool:
    """Return whether layers are offloaded to CPU memory or disk and copied to a device to run."""
    locations = {str(location) for location in (getattr(network, "hf_device_map", None) or {}).values()}
    return "disk" in locations or ("cpu" in locations and len(locations) > 1)


@contextmanager
def without_placement(base: nn.Module) -> Iterator[None]:
    """Hide the base's device map from PEFT, which would apply it to the adapter too."""
    device_map = base.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            cast(Any, base).hf_device_map = device_map


def initialize_missing(base: nn.Module, missing: set[str]) -> None:
    """Allocate zeros for offloaded weights that are in no file, such as a head that the adapter will provide.

    Args:
        base: A base model with a device map.
        missing: Names of the tensors.
    """
    for path in {name.rpartition(".")[0] for name in missing}:
        module = base.get_submodule(path)
        if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue
        device = execution_device(module)
        cast(Any, module)._hf_hook.original_devices = {}  # no values to restore
        remove_hook_from_module(module)
        module.to_empty(device=device, recurse=False)
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)
        add_hook_to_module(module, AlignDevicesHook(execution_device=device))


def place_adapter(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Move the adapter's modules to the execution devices of their layers, without offloading.

    Args:
        model: PEFT model with an adapter that is where the base's weights are stored (``meta`` for those on disk).
        weights: The adapter's weights.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            device = execution_device(module.get_base_layer())
            for name in module.adapter_layer_names:
                getattr(module, name).to_empty(device=device)
        elif isinstance(module, ModulesToSaveWrapper):
            device = execution_device(module.original_module)
            for saved in module.modules_to_save.values():
                remove_hook_from_module(saved, recurse=True)
                saved.to_empty(device=device)
                add_hook_to_module(saved, AlignDevicesHook(execution_device=device))
    set_peft_model_state_dict(model, weights)


class BaseWeights(Mapping[str, torch.Tensor]):
    """Mapping of a base model's parameters by name; parameters offloaded to disk are read on access.

    Args:
        base: The base model, without an adapter.
        missing: Names of parameters that are not in the base's files; they are left out.
    """

    def __init__(self, base: nn.Module, missing: set[str]) -> None:
        self._parameters = {name: value for name, value in base.named_parameters() if name not in missing}
        self._offloaded = {
            name: _offloaded(base, name) for name, parameter in self._parameters.items() if parameter.is_meta
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        if not parameter.is_meta:
            return parameter
        weights, key = self._offloaded[name]
        return weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _offloaded(base: nn.Module, name: str) -> tuple[Mapping[str, torch.Tensor], str]:
    path, _, key = name.rpartition(".")
    return cast(Any, base.get_submodule(path))._hf_hook.weights_map, key


_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Files with limit, usage and statistics, and the name of the inactive page cache in these: version 2, version 1."""


def available_memory() -> float:
    """Return the available memory of the host in bytes, the cgroup limit included."""
    return min(float(psutil.virtual_memory().available), *(_left_in_cgroup(*files) for files in _CGROUP_FILES))


def _left_in_cgroup(limit: str, usage: str, statistics: str, cache: str) -> float:
    """Return the memory below a cgroup's limit, the page cache that can be reclaimed included; infinity without one."""
    try:
        maximum, used = (float((_CGROUP / file).read_text()) for file in (limit, usage))
    except (OSError, ValueError):  # no such files, or "max"
        return math.inf
    return maximum - max(0.0, used - _statistic(_CGROUP / statistics, cache))


def _statistic(file: Path, name: str) -> float:
    """Return the value of a line ``name value``, or 0 without such a file or line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def resident_memory() -> int:
    """Return the physical memory of this process in bytes; pages of libraries that are in memory are included."""
    return int(psutil.Process().memory_info().rss)
