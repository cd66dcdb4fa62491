# SPDX-License-Identifier: Apache-2.0
"""How fast a model is calibrated and how much memory that takes, to estimate what a larger one needs.

    python benchmarks/calibration_rate.py smollm2
    python benchmarks/calibration_rate.py llama-3.1-8b --device cuda --context 8192

`llama-3.1-8b` is a model of that shape with random weights in bfloat16 (16 GB): rates and memory do not depend on the
weights. Anything else is loaded as `aqua calibrate` does. Prints tokens a second with and without statistics, the time
of the decomposition, the size of the projections file, and the largest memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import aqua_attention as aqua
from aqua_attention.bench.random_llama import LLAMA_8B
from aqua_attention.calibration.projections import Projections
from aqua_attention.calibration.run import collect
from aqua_attention.io.files import write_json
from aqua_attention.model.capture import attention_layers, innermost_decoder
from aqua_attention.model.fingerprint import shape_of


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=8, help="timed windows, after one to warm up")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()

    model = load(options)
    device, layers = model.device, attention_layers(model)
    decoder = innermost_decoder(model, layers)
    tokens = torch.randint(0, model.config.vocab_size, (options.windows + 1, options.context))
    collect(model, tokens[:1])  # to warm up
    with torch.no_grad():
        decoder(input_ids=tokens[:1].to(device), use_cache=False)
        forward = timed(device, lambda: [decoder(input_ids=w[None].to(device), use_cache=False) for w in tokens[1:]])
    statistics = {}
    calibration = timed(device, lambda: statistics.update(collect(model, tokens[1:])))
    started = time.perf_counter()
    projections = Projections.from_statistics(statistics, {"shape": shape_of(model, layers)}, {})
    decomposition = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "projections.safetensors")
        projections.save(path)
        size = path.stat().st_size
    timed_tokens = options.windows * options.context
    result = {
        "model": options.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "dtype": str(model.dtype),
        "context": options.context,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "forward_tokens_per_second": timed_tokens / forward,
        "calibration_tokens_per_second": timed_tokens / calibration,
        "decomposition_seconds": decomposition,
        "file_bytes": size,
        "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
        "peak_bytes": peak(device),
    }
    for name, value in result.items():
        print(f"{name:32} {f'{value:,.1f}' if isinstance(value, float) else value}")
    if options.json:
        write_json(options.json, result)


def load(options: argparse.Namespace) -> PreTrainedModel:
    """The model to calibrate."""
    if options.model != "llama-3.1-8b":
        return aqua.load_model(options.model, dtype=options.dtype, device=options.device)[0]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_8B, rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def timed(device: torch.device, run) -> float:
    """Seconds that `run()` takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak(device: torch.device) -> int:
    """Largest memory so far: allocated on the GPU, or resident in this process (which may include loading)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    main()
