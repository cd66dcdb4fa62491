# SPDX-License-Identifier: Apache-2.0
"""What AQUA gains in `model.generate`: of random weights or of a user's model, on this machine, beside dense attention.

Nothing is timed before it is right, see `generate_gate`. The kernels themselves are measured by `decode`.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from aqua_attention.attach import recording
from aqua_attention.attach.apply import Attachment
from aqua_attention.attach.compiled import CompiledParts
from aqua_attention.attach.door import apply
from aqua_attention.bench.clocked import (
    SETTLING,
    SHORT_CALL,
    Options,
    Task,
    clocked,
    default_options,
    figures,
    free,
    own_options,
    plain_generation,
)
from aqua_attention.bench.generate_dense import KERNELS, NAME, Parts, dense_row, static_options, why_failed
from aqua_attention.bench.generate_gate import FORCED, SHORT, Gate, check_generate
from aqua_attention.cache.cache import sliding_windows
from aqua_attention.cache.stored import choice_bytes, states_bytes
from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.machine import device_name
from aqua_attention.model.capture import AttentionLayer, attention_layers, input_device
from aqua_attention.model.limits import check_tokens, has_learned_positions, position_limit
from aqua_attention.ops.backend import chooser, tiled_backend
from aqua_attention.ops.plan import Reading

Settings = tuple[AquaConfig, ...]
Progress = Callable[[int, int], None]
Prompts = Callable[[int, int], Tensor]
"""Maps a number of sequences and a length to token ids of that shape."""
MOST_PROMPT = 65536
"""Tokens of all prompts together, beyond which caches of random weights are filled without a prompt: its activations
take more memory than the GPU has."""
LEAST = 16
"""Tokens of a prompt, and new ones."""
NEW_TOKENS = SETTLING + 64
DEFAULT, STATIC = "transformers, default", "transformers, static, compiled"
# What results say of a model, by what its config calls it.
SIZES = {"layers": "num_hidden_layers", "hidden": "hidden_size", "intermediate": "intermediate_size"}
SIZES |= {"heads": "num_attention_heads", "groups": "num_key_value_heads", "head_dim": "head_dim"}
SIZES["vocabulary"] = "vocab_size"


class GenerateBenchmark:
    """`model.generate` with transformers' caches, with dense attention recorded as ours is, and with AQUA."""

    def __init__(
        self,
        model: PreTrainedModel,
        projections: Projections,
        settings: Settings,
        *,
        new_tokens: int = NEW_TOKENS,
        compile: bool = True,
        static: bool = True,
        prompts: Prompts | None = None,
        is_random: bool = False,
        fill: bool = False,
    ) -> None:
        """For one model, which is as before after each measurement.

        Args:
            settings: of AQUA, a row each.
            new_tokens: that each call generates; those after the first 8 are counted.
            compile: as `apply` takes it, for the recorded dense steps too.
            static: with transformers' compiled static cache, on a GPU.
            prompts: None for random tokens.
            is_random: its weights are, so that more tokens than `MOST_PROMPT` may be random keys and values instead.
            fill: however few tokens they are; no prompt is read.

        An AquaError where too few tokens would be counted.
        """
        if new_tokens < LEAST:
            raise AquaError(
                f"new_tokens is {new_tokens}: it must be {LEAST} or more, of which the first {SETTLING} are not counted"
            )
        self.model, self.projections, self.settings = model, projections, settings
        self.new_tokens, self.compile, self.static, self.is_random = new_tokens, compile, static, is_random
        self.fill = fill
        self.device, self._layers = input_device(model), attention_layers(model)
        self._prompts, self._reads_text = prompts or self._random_prompts, prompts is not None
        self._gates: dict[int, Gate] = {}
        self._bandwidth: float | None = None

    @torch.no_grad()
    def measure(self, batch: int, length: int, progress: Progress = lambda done, total: None) -> dict[str, Any]:
        """Check and time every row for `batch` prompts of `length` tokens.

        Returns:
            `{"device", "batch", "length", ..., "new_tokens", "is_filled", "baseline", "read_bandwidth", "rows"}`. A
            row: `name`, `k_ratio` (None: dense), `bits` (None: those of the model), `seconds` (median of a token of
            each sequence), `tokens_per_second` (of all), `first_seconds` (from the call to the first token, median of
            3; None for a filled cache), `peak_bytes` (of the second call), `once_seconds` (what the first call took
            more: to compile, to record), `recorded` and `reason` (why not), `step_seconds` (the recorded step alone)
            and `added_seconds` (what `generate` adds to it), `tokens_read` (the share of the tokens that a
            step read, in layers that choose them), `ratio` (to the baseline, above 1 is faster),
            `default_ratio` (to transformers' default), `first_ratio` (of the first token to the fastest dense one,
            above 1 is slower), `bytes` (weights, keys and values that a step needs), `roofline_seconds` (what reading
            them takes at the measured bandwidth) and `share` (these of `seconds`); or `absent` (why it did not run).

        Raises:
            AquaError: logits that are wrong, or a size that the model cannot have.
        """
        task = self._task(batch, length)
        rows: list[dict[str, Any]] = []
        with plain_generation(self.model):
            runs = self._runs(task, self._gate(task))
            for done, run in enumerate(runs):
                progress(done, len(runs))
                free()
                rows.append(run())
        free()
        progress(len(runs), len(runs))
        if self.device.type == "cuda" and self._bandwidth is None:
            from aqua_attention.bench.timing import read_bandwidth

            self._bandwidth = read_bandwidth()
        baseline = compare(rows, batch, self._bandwidth)
        return self._facts(task) | {"baseline": baseline, "read_bandwidth": self._bandwidth, "rows": rows}

    def _check_positions(self, ids: Tensor) -> None:
        """An AquaError for more positions than the model knows; a warning where random tokens may have more."""
        context, limit = ids.shape[1] + self.new_tokens, position_limit(self.model)
        if limit is None or context <= limit or self._reads_text or has_learned_positions(self.model):
            check_tokens(self.model, ids, context=context)
        else:
            warnings.warn(f"the model knows {limit} positions: beyond them only times mean something", stacklevel=2)

    def _task(self, batch: int, length: int) -> Task:
        is_filled = self.fill or (self.is_random and batch * length > MOST_PROMPT)
        if length < LEAST:
            raise AquaError(f"size is {batch}x{length}: a prompt must have {LEAST} tokens or more")
        ids = self._prompts(batch, length + is_filled).to(self.device)
        self._check_positions(ids)
        return Task(self.model, ids, self.new_tokens, is_filled)

    def _random_prompts(self, batch: int, length: int) -> Tensor:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))

    def _gate(self, task: Task) -> Gate:
        """What was found right for so many sequences; looked at once, for all lengths."""
        if task.batch not in self._gates:
            # Keys that random weights compute are so much alike that attention hardly matters: random ones do too.
            kinds = (False, True) if self.is_random else (False,)
            ids = task.ids[:, : min(SHORT + 1, task.length)]
            tasks = [Task(self.model, ids, FORCED, filled) for filled in kinds]
            self._gates[task.batch] = check_generate(
                tasks,
                self.projections,
                self.settings,
                kernels=KERNELS if self._records else (),
                parts=self._parts(),
                compile=self.compile,
            )
        return self._gates[task.batch]

    @property
    def _records(self) -> bool:
        """Whether steps can be recorded where the model is."""
        return self.device.type == recording.CudaGraph.device

    def _parts(self) -> Parts:
        """What `apply` compiles, for dense steps."""
        if not self.compile:
            return nullcontext
        return CompiledParts(self.model, self._layers, cuda_only=True).used

    def _runs(self, task: Task, gate: Gate) -> list[Callable[[], dict[str, Any]]]:
        """What measures each row."""
        runs: list[Callable[[], dict[str, Any]]] = [lambda: self._dense(task, DEFAULT, default_options(task))]
        if self.static and self.device.type == "cuda":
            runs.append(lambda: self._static(task))
        if gate.kernels:
            runs.append(lambda: self._counted(task, dense_row(task, gate.kernels, self._parts()), None))
        return runs + [lambda config=config: self._ours(task, config) for config in self.settings]

    def _dense(self, task: Task, name: str, options: Options) -> dict[str, Any]:
        row: dict[str, Any] = {"name": name, "k_ratio": None, "bits": None}
        try:
            return self._counted(task, row | figures(task, options), None)
        except torch.OutOfMemoryError as error:
            return row | {"absent": why_failed(error)}

    def _static(self, task: Task) -> dict[str, Any]:
        try:
            if task.is_filled:  # `generate` takes the cache from us, and compiles as well
                return self._dense(task, STATIC, static_options(task, compiled=True))
            return self._dense(task, STATIC, lambda: {"cache_implementation": "static"})
        except Exception as error:  # whatever transformers' and torch's compilers raise
            return {"name": STATIC, "k_ratio": None, "bits": None, "absent": why_failed(error)}
        finally:
            # Its graphs hold memory, and for another size it would compile for sizes that change.
            vars(self.model).pop("_compiled_call", None)
            torch.compiler.reset()

    def _ours(self, task: Task, config: AquaConfig) -> dict[str, Any]:
        bits = f"int{config.bits}" if config.bits else ""
        name = ", ".join(filter(None, ("AQUA", bits, config.choice)))
        row: dict[str, Any] = {"name": name, "k_ratio": config.k_ratio, "bits": config.bits}
        row["setting"] = config.to_dict()
        try:
            with apply(self.model, self.projections, config, compile=self.compile) as attachment:
                options = own_options(task, attachment)
                row |= figures(task, options, attachment._recorder)
                row |= facts(attachment)
                if any(plan.config.chooses_tokens for plan in attachment._cached().values()):
                    row["tokens_read"] = tokens_read(task, options, attachment)
                return self._counted(task, row, config)
        except torch.OutOfMemoryError as error:
            return row | {"absent": why_failed(error)}

    def _counted(self, task: Task, row: dict[str, Any], config: AquaConfig | None) -> dict[str, Any]:
        sizes = {"batch": task.batch, "length": task.length, "tokens_read": row.get("tokens_read", 1.0)}
        read = step_bytes(task.model, self._layers, config=config, **sizes)
        return row if "absent" in row else row | {"bytes": read}

    def _facts(self, task: Task) -> dict[str, Any]:
        shape = self.model.config.get_text_config()
        known = {"device": device_name(self.device), "batch": task.batch, "length": task.length}
        known |= {name: getattr(shape, field, None) for name, field in SIZES.items()}
        known |= {"dtype": str(self.model.dtype), "weight_bytes": weight_bytes(self.model)}
        known |= {
            "new_tokens": self.new_tokens,
            "is_filled": task.is_filled,
            "compiled": self.compile and self._records,
        }
        return known | {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}


def facts(attachment: Attachment) -> dict[str, Any]:
    """What the last `generate` of an attachment took: the layout of its cache, its backend, and why not another."""
    untiled = attachment._why_not_automatic()
    if untiled is not None:
        decoding = attachment.explain().decoding if attachment.config.chooses_tokens else None
        if decoding is not None and decoding.choice and decoding.unchosen is None:
            return {"layout": decoding.layout, "backend": chooser().name, "reason": untiled}
        return {"layout": "plain", "backend": None, "reason": untiled}
    device = next(iter(attachment._cached().values())).rotation.device
    return {"layout": "tiled", "backend": tiled_backend(device).name, "reason": attachment._recorder.reason}


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a step reads: of input embeddings it reads a few rows, if they are not the output's."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    unread = None if head is not None and head.weight is embeddings else embeddings
    return sum(each.nbytes for each in model.parameters() if each is not unread)


def tokens_read(task: Task, options: Options, attachment: Attachment) -> float:
    """The share of the tokens seen that decoding steps read, in layers that choose; of a short call, not timed."""
    counts = [0.0, 0.0]

    def add(_: int, reading: Reading) -> None:
        if reading.read.shape[2] == 1:
            counts[0] += float(reading.read.sum())
            counts[1] += float(reading.seen.sum())

    attachment.on_reading = add
    try:
        clocked(task, options, SHORT_CALL)
    finally:
        attachment.on_reading = None
    return counts[0] / counts[1]


def step_bytes(
    model: PreTrainedModel,
    layers: list[AttentionLayer],
    *,
    batch: int,
    length: int,
    config: AquaConfig | None,
    tokens_read: float = 1.0,
) -> int:
    """Bytes of weights, keys and values that a step reads; of keys the chosen dimensions; None: dense.

    Where tokens are chosen all are scored, and the share `tokens_read` of them is read. The few tokens of the exact
    window, read whole, are counted as the others. Of a sliding window all tokens in it are read, in the model's dtype.
    """
    read, windows = weight_bytes(model), sliding_windows(model.config)
    for layer in (layer for layer in layers if layer.causal):
        slides, dims = layer.index in windows, layer.head_dim
        is_whole = config is None or (slides and config.sliding == "exact")
        chosen = dims if is_whole or config is None else config.selected_dims(dims)
        bits = None if slides or config is None else config.bits
        tokens = batch * layer.num_key_value_heads * min(length, windows.get(layer.index, length))
        if config is not None and config.chooses_tokens and not slides:
            scored, whole = choice_bytes(config, dims, model.dtype.itemsize, bits)
            read += round(tokens * (scored + tokens_read * whole))
            continue
        read += tokens * states_bytes(chosen, dims, model.dtype.itemsize, bits)
    return read


def compare(rows: list[dict[str, Any]], batch: int, bandwidth: float | None) -> str | None:
    """Add to the rows what follows from their times; `bandwidth` is in bytes a second.

    Returns:
        The name of the baseline: the recorded dense row, or where there is none the fastest dense one.
    """
    measured = [row for row in rows if "seconds" in row]
    dense = [row for row in measured if row["k_ratio"] is None]
    recorded = [row for row in dense if row["name"].startswith(NAME)]
    baseline = min(recorded or dense, key=lambda row: float(row["seconds"]), default=None)
    default = next((row for row in dense if row["name"] == DEFAULT), None)
    firsts = [row["first_seconds"] for row in dense if row.get("first_seconds") is not None]
    for row in measured:
        seconds, first = row["seconds"], row.get("first_seconds")
        row["tokens_per_second"] = batch / seconds
        row["ratio"] = baseline["seconds"] / seconds if baseline else None
        row["default_ratio"] = default["seconds"] / seconds if default else None
        row["first_ratio"] = first / min(firsts) if firsts and first is not None else None
        row["roofline_seconds"] = row["bytes"] / bandwidth if bandwidth else None
        row["share"] = row["roofline_seconds"] / seconds if bandwidth else None
    return baseline["name"] if baseline else None
