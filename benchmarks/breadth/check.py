"""One case: build, save, load as ``fit`` does, and compare the covariance of the logits with a dense computation."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from benchmarks.breadth.configurations import END, PADDING, tiny_configuration
from lapora.config import COMPLETE, Dtype, ModelSettings
from lapora.curvature.passes import CurvatureRun
from lapora.models.adapter import WEIGHTS_FILE, ModelKind, read_adapter
from lapora.models.batching import BatchFeed, BatchSize
from lapora.models.loading import LoadedModel, load_model, silence_libraries
from lapora.models.lora_layers import BayesianLayer, find_bayesian_layers
from lapora.models.outputs import OutputModel
from lapora.models.padding_check import check_padding
from lapora.posterior.structures import fit_structure
from lapora.predictive.moments import LinearisedPredictor

ANSWERS = [5, 6, 7]
PRECISION = 0.7
TOLERANCE: dict[str, float] = {"float64": 1e-4, "float32": 1e-2}
"""Largest error of a covariance, relative to its largest entry; many norms compute in float32 whatever the dtype."""


@dataclass(frozen=True)
class Case:
    """One adapter on one tiny base.

    Attributes:
        group: ``causal``, ``classifier`` or ``lora``.
        name: Model type, or LoRA option.
        targets: ``attention`` (PEFT's default, else queries and values) or ``all-linear``; empty for an option.
        base: Model type of the base.
        kind: Kind of model.
        lora: Arguments of ``LoraConfig``.
        config: Settings of the base's configuration.
        saving: Arguments of ``save_pretrained``.
        edits: Changes to the saved ``adapter_config.json``.
    """

    group: Literal["causal", "classifier", "lora"]
    name: str
    targets: str
    base: str
    kind: ModelKind
    lora: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    saving: dict[str, Any] = field(default_factory=dict)
    edits: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name in the file of results."""
        return "/".join(part for part in (self.group, self.name, self.targets) if part)


@dataclass
class _Row:
    input_ids: list[int]
    token_type_ids: list[int] | None = None
    answers: tuple[()] = ()


def save_case(case: Case, folder: Path) -> Path:
    """Write the base with random weights, its tokenizer and the adapter; return the adapter's folder."""
    torch.manual_seed(0)
    causal = case.kind == "causal"
    config = tiny_configuration(case.base, **case.config)
    if not causal:
        config.num_labels = len(ANSWERS)
    with silence_libraries():
        loader = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        try:
            if causal and not config.is_encoder_decoder:
                config.get_text_config().is_decoder = True
            base = loader.from_config(config).float()
        except Exception:  # a library that is not installed, or several models in one
            _save_without_weights(config, case, folder)
            return folder / "adapter"
        _randomize(base)
        base.save_pretrained(folder / "base")
        _tokenizer(config.is_encoder_decoder).save_pretrained(folder / "base")
        settings = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM" if causal else "SEQ_CLS", **case.lora}
        if case.targets:
            settings["target_modules"] = _targets(base, case)
        try:
            model = get_peft_model(base, LoraConfig(**settings))
        except (ValueError, TypeError) as error:
            raise NoSuchCaseError(f"PEFT: {error}") from error
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                nn.init.normal_(parameter, std=0.3)
        if base.config.model_type != config.model_type:  # the text model of several
            config.save_pretrained(folder / "base")
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(str(folder / "adapter"), **case.saving)
    if case.edits:
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **case.edits}))
    return folder / "adapter"


def _save_without_weights(config: Any, case: Case, folder: Path) -> None:
    """Write what there is of a base that transformers does not build here, and an adapter."""
    config.save_pretrained(folder / "base")
    _tokenizer(config.is_encoder_decoder).save_pretrained(folder / "base")
    settings = LoraConfig(task_type="CAUSAL_LM" if case.kind == "causal" else "SEQ_CLS", target_modules=["q_proj"])
    settings.base_model_name_or_path = str(folder / "base")
    settings.save_pretrained(str(folder / "adapter"))
    save_file({"weight": torch.zeros(2, 2)}, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter" / WEIGHTS_FILE)


def _forward(model: nn.Module, ids: list[int]) -> Tensor:
    """Return the logits of one row without padding."""
    network: Any = model.get_base_model()  # type: ignore[operator]
    accepted = inspect.signature(network.forward).parameters
    arguments: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    arguments |= {name: value for name, value in (("use_cache", False),) if name in accepted}
    return model(**arguments).logits


def _targets(base: nn.Module, case: Case) -> str | list[str]:
    if case.targets == "all-linear":
        return "all-linear"
    default = DEFAULT_TARGETS.get(case.base)
    if default is not None:
        return default
    found = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _ATTENTION.search(name)
    ]
    if not found:
        raise NoSuchCaseError(f"no linear layer of {case.base} is called like queries and values")
    return found


_ATTENTION = re.compile(
    r"(^|[._])(q|v|qkv|q_?proj|v_?proj|query|value|q_lin|v_lin|query_key_value|w?qkv(_proj)?|in_proj|q_a_proj|q_b_proj|"
    r"kv_b_proj|query_proj|value_proj|c_attn|att_proj|to_q|to_v|[qv]_head|w[qv]|kv_proj)$",
    re.IGNORECASE,
)


class NoSuchCaseError(Exception):
    """PEFT cannot make such an adapter."""


def _randomize(base: nn.Module) -> None:
    """Replace constants and zeros, with which some layers start, by small random numbers."""
    for parameter in base.parameters():
        if parameter.numel() and float(parameter.std(correction=0)) < 1e-6:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)


def _tokenizer(ends: bool) -> PreTrainedTokenizerFast:
    """One token a character; ``ends`` adds the end of text, whose position encoder-decoder classifiers read."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {"<pad>": PADDING, "<s>": 1, "<unk>": 2, "</s>": END}
    vocabulary |= {letter: 3 + index for index, letter in enumerate(letters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if ends:
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>")


def check_case(folder: Path, dtype: Dtype) -> float:
    """Load a saved adapter and return the error of the covariance of its logits, relative to the largest entry.

    With all LoRA weights in one Gaussian (``full``), the reference needs nothing but dense Jacobians of single,
    unpadded rows. With ``kron``, batches of padded rows are compared to rows one at a time.

    Raises:
        LaporaError: The adapter is refused.
    """
    adapter = read_adapter(folder)
    loaded = load_model(adapter, ModelSettings(str(folder), device="cpu", dtype=dtype))
    layers = find_bayesian_layers(loaded.model)
    outputs = OutputModel(loaded.model, loaded.kind, loaded.pad_token_id, ANSWERS if loaded.kind == "causal" else None)
    check_padding(outputs, loaded.tokenizer, quantized=False)
    rows = _rows(loaded)
    mean, covariance = _moments(outputs, layers, rows, "full", 3)
    _, padded = _moments(outputs, layers, rows, "kron", 3)
    _, alone = _moments(outputs, layers, rows, "kron", 1)
    logits, jacobian = dense_jacobian(loaded, layers, rows)
    expected = dense_covariance(logits, jacobian)
    pairs = ((mean, logits), (covariance, expected), (padded, alone))
    # A covariance may be zero, as where the kernels of a model's attention are not installed.
    return max(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300)) for ours, theirs in pairs)


def _rows(loaded: LoadedModel, count: int = 5) -> list[_Row]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    rows = [_Row(torch.randint(3, 30, (length,), generator=generator).tolist()) for length in lengths]
    config: Any = loaded.model.get_base_model().config
    if loaded.kind == "classifier" and config.is_encoder_decoder:  # it reads the position of the last end of text
        for row in rows:
            row.input_ids.append(END)
    return rows


def dense_jacobian(loaded: LoadedModel, layers: list[BayesianLayer], rows: list[_Row]) -> tuple[Tensor, Tensor]:
    """Run rows one at a time, unpadded, through plain autograd: logits ``(N, C)`` and Jacobian ``(N, C, P)``."""
    weights = [layer.module.weight for layer in layers]
    all_logits, jacobian = [], []
    for weight in weights:
        weight.requires_grad_(True)
    for row in rows:
        logits = _forward(loaded.model, row.input_ids)
        logits = logits[0, -1, ANSWERS] if loaded.kind == "causal" else logits[0]
        all_logits.append(logits.detach())
        gradients = [torch.autograd.grad(each, weights, retain_graph=True, allow_unused=True) for each in logits]
        flat = [
            torch.cat(
                [
                    (torch.zeros_like(weight) if part is None else part).reshape(-1)
                    for part, weight in zip(parts, weights, strict=True)
                ]
            )
            for parts in gradients
        ]
        jacobian.append(torch.stack(flat))
    for weight in weights:
        weight.requires_grad_(False)
    return torch.stack(all_logits).double(), torch.stack(jacobian).double()


def dense_covariance(logits: Tensor, jacobian: Tensor) -> Tensor:
    """Return ``J (Σ Jᵀ H J + δ I)⁻¹ Jᵀ`` of each row, ``(N, C, C)``, by Woodbury's identity."""
    p = torch.softmax(logits, dim=1)
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    values, vectors = torch.linalg.eigh(hessian)
    roots = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
    weighted = torch.einsum("nck,ncp->nkp", roots, jacobian).flatten(0, 1)
    inner = weighted @ weighted.T + PRECISION * torch.eye(len(weighted), dtype=torch.float64)
    across = jacobian @ weighted.T
    prior = jacobian @ jacobian.transpose(1, 2)
    return (prior - across @ torch.linalg.solve(inner, across.transpose(1, 2))) / PRECISION


def _moments(
    outputs: OutputModel, layers: list[BayesianLayer], rows: list[_Row], structure: Any, size: int
) -> tuple[Tensor, Tensor]:
    """Return mean ``(N, C)`` and covariance ``(N, C, C)`` of the logits, in batches of a size."""
    run = CurvatureRun(
        outputs, layers, lambda: BatchFeed(outputs, rows, BatchSize(size)), [0] * len(rows), len(ANSWERS), rank=COMPLETE
    )
    posterior, _ = fit_structure(structure, run)
    working = torch.float64 if outputs.network.dtype == torch.float64 else torch.float32
    posterior = posterior.on_device(layers, outputs.device, working)
    precisions = torch.full((1, len(layers)), PRECISION, dtype=torch.float64)
    mean = torch.zeros(len(rows), len(ANSWERS), dtype=torch.float64)
    covariance = torch.zeros(len(rows), len(ANSWERS), len(ANSWERS), dtype=torch.float64)
    with LinearisedPredictor(
        outputs, layers, posterior, precisions, classes=len(ANSWERS), every_class=True
    ) as predictor:
        for batch in BatchFeed(outputs, rows, BatchSize(size), bucketed=True):
            found = predictor.moments(batch)
            mean[list(batch.rows)] = found.mean.double()
            covariance[list(batch.rows)] = found.covariance.double()
    return mean, covariance
