# SPDX-License-Identifier: Apache-2.0
"""A process with a vLLM engine: reads a request as JSON, prints what it generated as JSON.

An engine keeps its memory and its plugins until its process ends, so each test that needs another one starts this.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from urllib.request import Request, urlopen

MARK = "ANSWERS "
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


def environment_of(projections, config):
    """For a process with the plugin; without projections it is stock vLLM."""
    own = {} if projections is None else {"AQUA_PROJECTIONS": str(projections), "AQUA_CONFIG": json.dumps(config or {})}
    return {name: value for name, value in os.environ.items() if not name.startswith("AQUA_")} | ENVIRONMENT | own


@contextmanager
def served(model, *, projections, config, port=18231):
    """`complete(prompt, max_tokens)` of an OpenAI-compatible server, an answer with `token_ids`."""
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--port", str(port)]
    # `vllm serve` asks for the version of a package that the CPU build does not call by that name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
    with TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, env=environment_of(projections, config), stdout=log, stderr=subprocess.STDOUT
        )

        def ask(path, body=None):
            data = None if body is None else json.dumps(body).encode()
            request = Request(f"http://127.0.0.1:{port}/{path}", data, {"Content-Type": "application/json"})
            with urlopen(request, timeout=300) as answer:
                return answer.read()

        def complete(prompt, max_tokens):
            wanted = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True}
            return json.loads(ask("v1/completions", {"model": str(model), "prompt": prompt} | wanted))["choices"][0]

        try:
            for _ in range(300):
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read()[-4000:])
                with suppress(OSError):
                    ask("health")
                    break
                time.sleep(1)
            yield complete
        finally:
            server.terminate()
            server.wait(60)


def run(model, prompts, *, projections=None, config=None, max_tokens=16, logprobs=None, **engine):
    """(answers, log) of an engine on token ids; an answer has `tokens` and, if asked for, `logprobs` of the prompt."""
    request = {
        "model": str(model),
        "prompts": prompts,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "engine": engine,
    }
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(request),
        env=environment_of(projections, config),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parent,
    )
    log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError("\n".join(line for line in log.splitlines() if "Error" in line))
    # The engine writes there, too, and later.
    answers = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    return json.loads(answers.removeprefix(MARK)), log


def main():
    """Generate."""
    request = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "seed": 0} | request["engine"]
    llm = LLM(request["model"], **engine)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=request["max_tokens"], prompt_logprobs=request["logprobs"], ignore_eos=True
    )
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], sampling)
    answers = []
    for one in found:
        given = one.prompt_logprobs or []
        likely = [None if each is None else {str(key): value.logprob for key, value in each.items()} for each in given]
        answers.append({"tokens": list(one.outputs[0].token_ids), "logprobs": likely, "cached": one.num_cached_tokens})
    print("\n" + MARK + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
