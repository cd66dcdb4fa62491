# SPDX-License-Identifier: Apache-2.0
"""A process with a vLLM engine: reads a request as JSON, prints what it generated as JSON.

With `together`, torchrun starts so many of them, and each has a part of the model. An engine keeps its memory and its
plugins until its process ends, so each test that needs another one starts this.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from unittest.mock import patch

import aqua_attention as aqua
from aqua_attention.bench import server

MARK = "ANSWERS "
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


def export_smollm2(folder):
    """(folder of safetensors, model, tokenizer, projections file) of SmolLM2, written below `folder`."""
    model, tokenizer = aqua.load_model("smollm2", dtype="float32")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    # Not beside the weights: vLLM loads all files of that kind in a model's folder.
    file = folder / "smollm2.safetensors"
    aqua.calibrate(model, tokenizer, aqua.load_text("builtin:calibration"), tokens=8192, progress=False).save(file)
    return folder / "model", model, tokenizer, file


@contextmanager
def served(model, *, projections, config):
    """`complete(prompt, max_tokens)` of an OpenAI-compatible server, an answer with `token_ids`."""
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    with TemporaryDirectory() as folder, patch.dict(os.environ, ENVIRONMENT):
        log = Path(folder) / "log"
        with server.served(str(model), options, log=log, projections=projections, setting=config) as found:
            yield found.complete


def run(
    model, prompts, *, projections=None, config=None, max_tokens=16, logprobs=None, generated=None, together=1, **engine
):
    """(answers, log) of an engine on token ids; an answer has `tokens` and, if asked for, `logprobs` of the prompt, and
    `generated`, those of the tokens.
    """
    request = {
        "model": str(model),
        "prompts": prompts,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "generated": generated,
        "engine": engine,
    }
    command = [sys.executable]
    if together > 1:
        request["engine"] |= {"tensor_parallel_size": together, "distributed_executor_backend": "external_launcher"}
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={together}"]
    with NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        done = _started([*command, __file__, file.name], projections, config)
    log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError("\n".join(line for line in log.splitlines() if "Error" in line))
    # The engine writes there, too, and later.
    answers = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    return json.loads(answers.removeprefix(MARK)), log


def _started(command, projections, config):
    return subprocess.run(
        command,
        env=server.environment_of(projections, config) | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parent,
    )


def main():
    """Generate."""
    request = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "seed": 0} | request["engine"]
    llm = LLM(request["model"], **engine)
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=request["max_tokens"],
        prompt_logprobs=request["logprobs"],
        logprobs=request["generated"],
        ignore_eos=True,
    )
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], sampling)
    answers = []
    for one in found:
        given = one.prompt_logprobs or []
        likely = [None if each is None else {str(key): value.logprob for key, value in each.items()} for each in given]
        tokens, own = list(one.outputs[0].token_ids), one.outputs[0].logprobs or []
        generated = [each[token].logprob for token, each in zip(tokens, own, strict=False)]
        answers.append({"tokens": tokens, "logprobs": likely, "generated": generated, "cached": one.num_cached_tokens})
    print("\n" + MARK + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
