"""Models larger than a device: layers spread over devices, the host and the disk by Accelerate.

The base's layers stay where Accelerate puts them; what rests on the host or the disk comes to a device for as long as
it is run. The adapter's own modules, and every sum and factor of a layer, stay on the device where that layer is run.
"""

from __future__ import annotations

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


def loading_arguments(spread: Placement) -> dict[str, Any]:
    """What ``from_pretrained`` is told.

    Raises:
        UsageError: A bound of memory that cannot be read.
    """
    arguments: dict[str, Any] = {"device_map": spread.device_map}
    if spread.max_memory:
        arguments["max_memory"] = _bounds(spread.max_memory)
    if spread.offload_dir is not None:
        arguments["offload_folder"] = str(spread.offload_dir)
    return arguments


def _bounds(text: str) -> dict[int | str, str]:
    """``0=20GiB,cpu=60GiB`` as Accelerate takes it."""
    from accelerate.utils import convert_file_size_to_int

    found: dict[int | str, str] = {}
    for part in text.split(","):
        device, _, size = (piece.strip() for piece in part.partition("="))
        try:
            convert_file_size_to_int(size)
        except ValueError as error:
            raise UsageError(f"--max-memory {text}: {part!r} is not DEVICE=SIZE, as in 0=20GiB,cpu=60GiB") from error
        if device != "cpu" and not device.isdigit():
            raise UsageError(f"--max-memory {text}: {device!r} is neither a GPU's number nor cpu")
        found[int(device) if device.isdigit() else device] = size
    return found


def execution_device(module: nn.Module) -> torch.device:
    """Where a module's products are computed, wherever its weights rest meanwhile."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    parameter = next(module.parameters(), None)
    if parameter is not None and not parameter.is_meta:
        return parameter.device
    return next((execution_device(child) for child in module.children()), torch.device("cpu"))


def entry_device(network: nn.Module) -> torch.device:
    """Where token ids go."""
    if getattr(network, "hf_device_map", None) is None:
        return next(network.parameters()).device
    return execution_device(cast(Any, network).get_input_embeddings())


def is_offloaded(network: nn.Module) -> bool:
    """Whether layers rest on the host or the disk and come to a device to be run."""
    places = {str(place) for place in (getattr(network, "hf_device_map", None) or {}).values()}
    return "disk" in places or ("cpu" in places and len(places) > 1)


@contextmanager
def without_placement(base: nn.Module) -> Iterator[None]:
    """Hide from PEFT that the base is spread: it would spread the adapter, too."""
    device_map = base.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            cast(Any, base).hf_device_map = device_map


def keep_missing(base: nn.Module, missing: set[str]) -> None:
    """Take weights that no file has (a head that the adapter brings) from the disk, where they have no value.

    Args:
        base: A spread base.
        missing: Names of the tensors.
    """
    for path in {name.rpartition(".")[0] for name in missing}:
        module = base.get_submodule(path)
        if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue
        device = execution_device(module)
        cast(Any, module)._hf_hook.original_devices = {}  # there is nothing to put back
        remove_hook_from_module(module)
        module.to_empty(device=device, recurse=False)
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)
        add_hook_to_module(module, AlignDevicesHook(execution_device=device))


def place_adapter(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Put the adapter's modules on the devices where the layers beside them are run, and keep them there.

    Args:
        model: With an adapter that PEFT has put where the base's weights rest, which is nowhere for those on the disk.
        weights: The adapter's own.
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
    """The parameters of a base that came from its own files, by name; those on the disk are read when asked for.

    Args:
        base: The base model, without an adapter.
        missing: Names that its files do not have.
    """

    def __init__(self, base: nn.Module, missing: set[str]) -> None:
        self._parameters = {name: value for name, value in base.named_parameters() if name not in missing}
        self._resting = {
            name: _resting(base, name) for name, parameter in self._parameters.items() if parameter.is_meta
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._parameters[name]
        if not found.is_meta:
            return found
        weights, key = self._resting[name]
        return weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _resting(base: nn.Module, name: str) -> tuple[Mapping[str, torch.Tensor], str]:
    path, _, key = name.rpartition(".")
    return cast(Any, base.get_submodule(path))._hf_hook.weights_map, key


def available_memory() -> float:
    """Bytes that this process may still take, a container's limit included."""
    free = float(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, float(limit.read_text()) - float(used.read_text()))
    except (OSError, ValueError):  # no such files, or "max"
        return free
