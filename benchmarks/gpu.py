"""Measure fit and predict of a Llama-2-7B shape on a CUDA GPU, compared with the floor: ``python -m benchmarks.gpu``.

Random weights in bfloat16, LoRA of rank 8 on q, v and lm_head, 256 tokens, two and four answers. Prints the GPU's name,
examples per second and peak memory of floor, fit and predict as a Markdown table. ``--quantize 4bit`` saves the base
to a temporary folder (13 GB) and loads it in NF4. ``--shape small`` runs in seconds on any machine, to test the script.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import floor as measured
from benchmarks.models import Subject, random_batches
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.outputs import OutputModel
from lapora.models.quantization import keep_inputs_whole, quantization_config

SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7B")
    parser.add_argument("--quantize", choices=["none", "4bit", "8bit"], default="none")
    parser.add_argument("--classes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'no GPU'}, torch {torch.__version__}\n")
    print("| C | what | examples per second | over the floor's time | spread | peak memory beyond the model |")
    print("| --- | --- | --- | --- | --- | --- |")
    for classes in options.classes:
        model = _model(options.shape, options.quantize, device)
        tokens = list(range(100, 100 + classes))
        answers = OutputModel(model, "causal", 0, tokens)
        batches = random_batches(
            answers, rows=options.rows, tokens=options.tokens, batch_size=options.batch_size, device=device
        )
        it = Subject(answers, find_bayesian_layers(model), batches, options.rows, classes)
        _measure(it, options.rounds)
        del model, answers, it


def _model(shape: str, quantize: str, device: str) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **SHAPES[shape])
    config.dtype = torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if quantize != "none":
        with tempfile.TemporaryDirectory() as folder:
            base.save_pretrained(Path(folder) / "base")
            del base
            how = quantization_config(quantize, torch.bfloat16, ["lm_head"])
            base = AutoModelForCausalLM.from_pretrained(
                Path(folder) / "base", quantization_config=how, dtype=torch.bfloat16, device_map={"": device}
            )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.eval().requires_grad_(False)
    if quantize != "none":
        keep_inputs_whole(model)
    return model


def _measure(it: Subject, rounds: int) -> None:
    less = it.classes - 1
    posterior = measured.fit(it).on_device(it.layers, it.answers.device, torch.float32)
    runs: dict[str, Callable[[], object]] = {
        "floor": lambda: measured.floor(it, less),
        "fit, `kron`": lambda: measured.fit(it),
        "predict, mc-joint": lambda: measured.predict(it, posterior, "mc-joint"),
    }
    base = 0.0
    for name, run in runs.items():
        run()
        peak = _peak(run)
        times = [measured.timed(run) for _ in range(rounds)]
        taken = statistics.median(times)
        base = base or taken
        spread = (max(times) - min(times)) / taken
        print(
            f"| {it.classes} | {name} | {it.rows / taken:.1f} | {taken / base:.2f} | {spread:.0%} | {peak:.2f} GiB |",
            flush=True,
        )


def _peak(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


if __name__ == "__main__":
    main()
