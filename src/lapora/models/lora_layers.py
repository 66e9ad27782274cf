"""Find the Bayesian layers of a model: every lora_A and lora_B, and optionally the classification head.

Each LoRA factor is treated as a linear layer of its own (Laplace-LoRA, section 3): lora_A maps d_in to r, lora_B maps
r to d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from lapora.config import Subset
from lapora.errors import AdapterError, NoSuchLayersError

Role = Literal["A", "B", "head"]

_PLAIN_VARIANTS = ("DoraLinearVariant", "MiCALinearVariant", "VeloraLinearVariant")
"""PEFT's variants whose gradient in A and B, in eval mode, is that of a linear layer; DoRA's norm is detached."""


@dataclass(frozen=True, eq=False)
class BayesianLayer:
    """A linear layer W (out_features x in_features) with a Gaussian posterior over its weight.

    Attributes:
        name: Key of the weight in the adapter file, without ``.weight``.
        role: ``A``, ``B`` (the two LoRA factors) or ``head``.
        module: The linear layer.
        source: Module whose input identifies layers with a shared input (q, k and v projections).
        reads_answer_only: The layer is part of a head, and only the answer's position is used.
        answer_rows_only: The layer outputs vocabulary logits, and only the C rows of the answers have a gradient.
        bias_as_input: The bias is Bayesian too, as the weight of an additional constant input.
    """

    name: str
    role: Role
    module: nn.Linear
    source: nn.Module
    reads_answer_only: bool = False
    answer_rows_only: bool = False
    bias_as_input: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of W, with the bias as a column."""
        rows, columns = self.module.weight.shape
        return rows, columns + int(self.bias_as_input)

    def gradient_shape(self, classes: int) -> tuple[int, int]:
        """Return the number of rows and columns of W that can have a gradient, with C answers."""
        rows, columns = self.shape
        return (classes if self.answer_rows_only else rows), columns

    @property
    def squared_norm(self) -> float:
        """``‖θ‖²`` of the layer's Bayesian parameters, in float64."""
        total = self.module.weight.detach().double().square().sum()
        if self.bias_as_input:
            total = total + self.module.bias.detach().double().square().sum()
        return float(total)


def find_bayesian_layers(
    model: PeftModel, subset: Subset = "lora", *, whole_answers: bool = False
) -> list[BayesianLayer]:
    """Return the Bayesian layers of a subset, in the order of the model's modules.

    Args:
        model: A PEFT model with one active LoRA adapter.
        subset: ``lora`` (every LoRA factor), ``last-layer`` (the classification head's last linear layer,
            or LoRA on the language-model head) or ``all`` (LoRA and every linear layer of the head).
        whole_answers: Whether whole answers are scored: log-probabilities have a gradient in all vocabulary logits.

    Raises:
        AdapterError: LoRA on a module that is not a linear layer, a LoRA variant, or a merged adapter.
        NoSuchLayersError: ``last-layer`` or ``all`` for a model without a saved head or LoRA on the output layer.
    """
    found = _find(model, subset)
    return [replace(layer, answer_rows_only=False) for layer in found] if whole_answers else found


def _find(model: PeftModel, subset: Subset) -> list[BayesianLayer]:
    adapter_name = cast(str, model.active_adapter)
    output_path = _output_layer_path(model)
    head_paths = _saved_head_paths(model)
    layers: list[BayesianLayer] = []
    fixed: list[str] = []
    merging: set[nn.Module] = set()
    for path, module in model.named_modules():
        if isinstance(module, MultiheadAttention):  # adds its factors to the weights instead of running them
            merging |= set(module.modules())
        if isinstance(module, LoraLayer) and adapter_name in {*module.lora_A, *module.lora_embedding_A}:
            if module in merging or not _is_linear(module, adapter_name):
                fixed.append(f"{path} ({type(module.get_base_layer()).__name__})")
                continue
            in_head = path == output_path or any(path.startswith(head + ".") for head in head_paths)
            layers += _factors(path, module, adapter_name, in_head, writes_vocabulary=path == output_path)
    if fixed and not layers:
        raise AdapterError(f"{fixed[0]}: the adapter has LoRA on no linear layer, which is not supported")
    if not layers:
        raise AdapterError("the adapter has no LoRA layers on this base model; check --base-model")
    if subset == "lora":
        return layers
    heads = [layer for path in head_paths for layer in _head_layers(model, path, adapter_name, path == output_path)]
    on_output = [layer for layer in layers if output_path and layer.name.startswith(f"{output_path}.lora_")]
    if subset == "all" and (heads or on_output):
        return layers + heads
    if subset == "last-layer" and (heads or on_output):
        return heads[-1:] or on_output
    raise NoSuchLayersError(
        f"--subset {subset}: this adapter has neither a saved classification head nor LoRA on the output "
        "layer; use --subset lora"
    )


def _output_layer_path(model: PeftModel) -> str | None:
    """Return the path of the language-model head, or None for a sequence classifier."""
    base = cast(Any, model.get_base_model())
    output = base.get_output_embeddings()
    return next((path for path, module in model.named_modules() if output is not None and module is output), None)


def _saved_head_paths(model: PeftModel) -> list[str]:
    """Return the paths of ``modules_to_save`` outside the transformer blocks."""
    blocks = [f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and not any(path.startswith(block) for block in blocks)
    ]


def _is_linear(module: LoraLayer, adapter_name: str) -> bool:
    """Return whether the factors run as linear layers; embeddings, convolutions and bare parameters do not."""
    if adapter_name not in module.lora_A or isinstance(module, ParamWrapper):
        return False
    return all(type(each[adapter_name]) is nn.Linear for each in (module.lora_A, module.lora_B))


def _factors(
    path: str, module: LoraLayer, adapter_name: str, in_head: bool, writes_vocabulary: bool
) -> list[BayesianLayer]:
    if module.merged:
        raise AdapterError(f"{path}: merged adapters are not supported; call unmerge_adapter, or load it unmerged")
    variant = type(module.lora_variant.get(adapter_name)).__name__
    if adapter_name in module.lora_variant and variant not in _PLAIN_VARIANTS:
        raise AdapterError(f"{path}: {variant} is not supported; LoRA, rsLoRA and DoRA are")
    first, second = (cast(nn.Linear, each[adapter_name]) for each in (module.lora_A, module.lora_B))
    return [
        BayesianLayer(f"{path}.lora_A", "A", first, cast(nn.Module, module), reads_answer_only=in_head),
        BayesianLayer(f"{path}.lora_B", "B", second, second, in_head, answer_rows_only=writes_vocabulary),
    ]


def norm_overrides(layer: BayesianLayer) -> list[tuple[nn.Module, Callable[..., Any], str]]:
    """Return the methods to override so that DoRA's weight norm is computed without running the LoRA layers.

    PEFT computes ``B A`` as ``lora_B(lora_A(I))`` and detaches the norm of ``W + B A`` from the graph, so that this
    call has no gradient; it is computed from the weights here.

    Returns:
        Modules, functions for :class:`lapora.curvature.checkpointing.ForwardOverride` and names of methods.
    """

    def product(original: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        names = dict(zip(("lora_A", "lora_B"), arguments, strict=False)) | keywords
        return (names["lora_B"].weight @ names["lora_A"].weight).detach()

    magnitudes = getattr(layer.source, "lora_magnitude_vector", {})
    return [
        (module, product, "get_lora_weight") for module in magnitudes.values() if hasattr(module, "get_lora_weight")
    ]


def _head_layers(model: PeftModel, path: str, adapter_name: str, writes_vocabulary: bool) -> list[BayesianLayer]:
    wrapper = cast(ModulesToSaveWrapper, model.get_submodule(path))
    saved = wrapper.modules_to_save[adapter_name]
    found = []
    for inner, module in saved.named_modules():
        if isinstance(module, nn.Linear):
            name = f"{path}.{inner}" if inner else path
            found.append(
                BayesianLayer(
                    name,
                    "head",
                    module,
                    module,
                    reads_answer_only=True,
                    answer_rows_only=writes_vocabulary,
                    bias_as_input=module.bias is not None,
                )
            )
    return found


def lora_dropouts(model: nn.Module) -> list[nn.Dropout]:
    """Return the adapter's ``lora_dropout`` layers with a nonzero probability."""
    return [
        module
        for name, module in model.named_modules()
        if ".lora_dropout." in name and isinstance(module, nn.Dropout) and module.p > 0
    ]


@contextmanager
def lora_dropout_on(model: nn.Module, seed: int) -> Iterator[None]:
    """Enable the adapter's dropout with a random seed; the global random state is restored."""
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


def describe_parameter(name: str, role: Role, shape: tuple[int, int], squared_norm: float) -> dict[str, Any]:
    """Return one entry of the manifest's ``parameters``."""
    return {"name": name, "shape": list(shape), "role": role, "squared_norm": squared_norm}
