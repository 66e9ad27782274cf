"""Compare a saved posterior with the adapter, base model and task it is used with; all differences are reported."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lapora.errors import LaporaWarning
from lapora.models.adapter import Adapter
from lapora.models.fingerprint import library_versions
from lapora.models.loading import LoadedModel
from lapora.models.lora_layers import BayesianLayer
from lapora.storage.manifest import BaseModel, Manifest

_DECIDING_SETTINGS = (
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_rslora",
)
_PROBE = "Is the sky blue? 0123456789 naïve übermäßig 空は青い\n\tdef f(x): return {x}"


def adapter_settings(adapter: Adapter) -> dict[str, Any]:
    """Return the adapter settings that affect the forward pass, defaults omitted."""
    found: dict[str, Any] = {key: adapter.config.get(key) for key in _DECIDING_SETTINGS}
    return {key: value for key, value in _ordered(found).items() if value and value != "none"}


def _ordered(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sort lists of names, and drop duplicates, which PEFT makes where it saves an adapter again."""
    return {key: sorted(set(value)) if _is_list_of_texts(value) else value for key, value in settings.items()}


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def tokenizer_digest(tokenizer: Any, chat_template: bool) -> str:
    """Return a digest of a tokenizer's vocabulary, its encoding of a fixed text and, if used, its chat template."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode("ascii"))
    digest.update(json.dumps(list(tokenizer(_PROBE)["input_ids"])).encode("ascii"))
    if chat_template:
        digest.update(str(tokenizer.chat_template).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def adapter_differences(manifest: Manifest, adapter: Adapter) -> list[str]:
    """Return the differences in the adapter's own files."""
    found = []
    if manifest.adapter != adapter.sha256:
        found.append(f"adapter weights {manifest.adapter[:12]} then, {adapter.sha256[:12]} now")
    then, now = manifest.adapter_config, adapter_settings(adapter)
    if then is not None:
        then = _ordered(then)  # of an earlier version, with duplicates
        found += [
            f"adapter setting {key} {then.get(key)!r:.60} then, {now.get(key)!r:.60} now"
            for key in sorted({*then, *now})
            if then.get(key) != now.get(key)
        ]
    return found


def model_differences(
    manifest: Manifest, loaded: LoadedModel, layers: Sequence[BayesianLayer], outputs: int
) -> list[str]:
    """Return the differences in base model, tokenizer, number of outputs of the head and Bayesian layers."""
    then = manifest.base_model
    found = []
    if then.quantization != loaded.quantize:
        found.append(f"quantization {then.quantization} then, {loaded.quantize} now")
    else:
        found += _weight_differences(then, loaded)
    if manifest.tokenizer is not None:
        now = tokenizer_digest(loaded.tokenizer, manifest.data.chat_template)
        if now != manifest.tokenizer:
            found.append(f"tokenizer {manifest.tokenizer[:12]} then, {now[:12]} now")
    if loaded.number_of_labels not in (None, outputs):
        found.append(f"answers {outputs} then, {loaded.number_of_labels} outputs of the head now")
    return found + _layer_differences(manifest.parameters, layers)


_FINENESS = {"float64": 2, "float32": 1, "bfloat16": 0, "float16": 0}


def base_digests(loaded: LoadedModel) -> dict[str, str]:
    """Return digests of the base's weights, rounded to its dtype and to each coarser one; empty if quantized."""
    own = _FINENESS.get(loaded.dtype, -1)
    types = [each for each in _FINENESS if each == loaded.dtype or _FINENESS[each] < own]
    return {each: loaded.digest(each) for each in types if loaded.weights}


def _weight_differences(then: BaseModel, loaded: LoadedModel) -> list[str]:
    """Compare the base weights; of two dtypes, in the coarser one."""
    before, after = then.fingerprint, loaded.fingerprint
    common = min(then.dtype, loaded.dtype, key=lambda each: _FINENESS.get(each, 0))
    comparable = then.dtype == loaded.dtype or _FINENESS.get(then.dtype) != _FINENESS.get(loaded.dtype)
    if comparable and loaded.weights and common in then.digests:
        before, after = then.digests[common], loaded.digest(common)
        if before != after and before == loaded.digest_of_used(common):  # a fit in memory knows no others
            return []
    elif then.dtype != loaded.dtype:
        warnings.warn(
            f"fitted in {then.dtype}, run in {loaded.dtype}: whether the base model is the same cannot be checked",
            LaporaWarning,
            stacklevel=4,
        )
        return []
    if before == after:
        return []
    return [f"base model's weights {before[:12]} ({then.name}) then, {after[:12]} ({loaded.base_model}) now"]


def answer_differences(manifest: Manifest, task: str, choices: Sequence[str]) -> list[str]:
    """Return the differences in the answers, from those recorded by ``fit``."""
    then = manifest.answers.choices
    if not then or list(choices) == then:
        return []
    now = ", ".join(choices) or "other ones in each row"
    return [f"answers {', '.join(then)} then, {now} of task {task} now"]


def _layer_differences(parameters: Sequence[Mapping[str, Any]], layers: Sequence[BayesianLayer]) -> list[str]:
    then = {parameter["name"]: (tuple(parameter["shape"]), parameter["role"]) for parameter in parameters}
    now = {layer.name: (tuple(layer.shape), layer.role) for layer in layers}
    found = []
    for word, names in (("gone", [*(then.keys() - now.keys())]), ("new", [*(now.keys() - then.keys())])):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{len(names)} parameters {word}: {', '.join(sorted(names)[:3])}{more}")
    found += [
        f"parameter {name} {then[name][0]} then, {now[name][0]} now"
        for name in then
        if name in now and then[name] != now[name]
    ]
    if not found and list(then) != list(now):
        found.append("the order of the parameters")
    return found


def warn_of_other_versions(manifest: Manifest) -> None:
    """Warn of other library versions than at the fit, which change outputs by rounding only."""
    then, now = manifest.libraries, library_versions()
    if not isinstance(then, dict):
        return
    changed = [f"{name} {then[name]} then, {now[name]} now" for name in now if then.get(name) not in (None, now[name])]
    if changed:
        warnings.warn(
            f"fitted with other library versions: {', '.join(changed)}; predictions may differ in the last digits",
            LaporaWarning,
            stacklevel=3,
        )
