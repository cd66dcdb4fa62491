# SPDX-License-Identifier: Apache-2.0
"""Time of a whole decoding step of a model as `generate` takes it, dense and with AQUA: weights, attention, and all.

The model has random weights and its caches hold random keys and values, which take the time that real ones do. Nothing
is timed before it is right: dense and AQUA at k_ratio 1 must give the same logits, and a recorded step those of one
that is not recorded.
"""

import gc
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

from aqua_attention.attach.apply import Attachment, apply
from aqua_attention.bench.dense import BASELINES
from aqua_attention.bench.random_llama import need_gpu, random_projections, random_states
from aqua_attention.bench.timing import read_bandwidth, seconds_of
from aqua_attention.cache.layer import Recordable
from aqua_attention.cache.stored import states_bytes
from aqua_attention.calibration.projections import Projections
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.model.interface import install

Settings = tuple[AquaConfig, ...]
ROOM = 128
"""Tokens that the timed steps may append. A static cache of transformers is read to its end, so that more would slow
the dense step down."""
SHORT = 300
"""Tokens of the check of every setting: full tiles and a tail."""
TOLERANCE, NOISE, MOST = 0.02, 3.0, 0.2
"""Relative difference of logits that is allowed, or so many times what another dense attention makes, if that is more,
but never more than the last: in 16 bits, 32 layers of random weights make 0.04 of the order of a sum, and 0.5 of a
token of `SHORT` that is missed."""
# What results say of a model, by what its config calls it.
SIZES = {"layers": "num_hidden_layers", "hidden": "hidden_size", "intermediate": "intermediate_size"}
SIZES |= {"heads": "num_attention_heads", "groups": "num_key_value_heads", "head_dim": "head_dim"}
SIZES["vocabulary"] = "vocab_size"
DENSE_KERNELS = ("SDPA flash", "SDPA flash, packed", "SDPA cuDNN", "SDPA cuDNN, packed")
"""Those of `BASELINES` that read the layout of transformers' static cache."""


@torch.no_grad()
def measure_generate(model: PreTrainedModel, *, batch: int, length: int, settings: Settings) -> dict[str, Any]:
    """Check and time one greedy decoding step, recorded as a CUDA graph, of `batch` sequences of `length` tokens.

    Args:
        model: from `make_model`.
        settings: of AQUA, each possible in the tiled layout.

    Returns:
        `{"batch", "length", ..., "read_bandwidth", "rows"}`; a row a setting: `name`, `k_ratio` (None: dense), `bits`
        (None: those of the model), `seconds` (median of a step, a token of each sequence), `tokens_per_second` (of all
        sequences), `ratio` (to the fastest dense one, above 1 is faster; None where none ran), `bytes` (weights, keys
        and values that a step needs), `roofline_seconds` (what reading them takes at the measured bandwidth) and
        `share` (these of `seconds`); or `absent` (why a dense one did not run).

    Raises:
        AquaError: no CUDA GPU, logits that are wrong, or steps so short that timing them filled the cache.
    """
    need_gpu()
    projections = random_projections(model)
    limit = check_logits(model, projections, settings, batch)
    rows: list[dict[str, Any]] = []
    steps = Steps(model, batch, length)
    expected: Tensor | None = None
    for kernel in (None, *DENSE_KERNELS):
        row: dict[str, Any] = {"name": kernel or "transformers, sdpa", "k_ratio": None, "bits": None}
        try:
            with _dense_kernel(model, kernel, length + 1):
                steps.restart()
                found = steps()
                check_near(found, expected, f"{row['name']}, {length} tokens", limit)
                expected = found if expected is None else expected
                rows.append(row | {"seconds": steps.seconds(), "bytes": step_bytes(model, batch, length, None)})
        except (RuntimeError, ImportError) as error:
            rows.append(row | {"absent": f"failed: {str(error).splitlines()[0][:120]}"})
    del steps
    for config in settings:
        # What the caches before held, graphs and all, makes room first.
        _free()
        name = "aqua, int8" if config.bits else "aqua"
        with apply(model, projections, config) as attachment:
            steps = Steps(model, batch, length, attachment)
            check_near(steps(), expected if is_exact(config) else None, f"{name}, {length} tokens", limit)
            row = {"name": name, "k_ratio": config.k_ratio, "bits": config.bits, "seconds": steps.seconds()}
            rows.append(row | {"bytes": step_bytes(model, batch, length, config)})
        del steps
    _free()
    bandwidth = read_bandwidth()
    compare(rows, batch, bandwidth)
    known = {"device": torch.cuda.get_device_name(), "batch": batch, "length": length}
    known |= {name: getattr(model.config, field) for name, field in SIZES.items()}
    known |= {"dtype": str(model.dtype), "weight_bytes": weight_bytes(model), "read_bandwidth": bandwidth}
    return known | {"rows": rows}


class Steps:
    """Greedy decoding of random sequences: each call appends a token of each to the cache and chooses the next."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int, attachment: Attachment | None = None) -> None:
        """Fill a cache with `random_states`: the tiled one of `attachment`, or a static one of transformers."""
        room = length + ROOM
        self.model, self.batch, self.length = model, batch, length
        self.cache: Cache = StaticCache(config=model.config, max_cache_len=room)
        if attachment is not None:
            self.cache = attachment.new_cache(max_length=room, layout="tiled")
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.restart()

    def restart(self) -> None:
        """Begin anew with the first `length` tokens; nothing is allocated anew."""
        self.cache.reset()
        fill_cache(self.cache, random_states(self.model, self.batch, self.length))
        self.token.copy_(torch.arange(self.batch)[:, None] + 1)

    def __call__(self) -> Tensor:
        """Logits of the next token, [batch, vocabulary]."""
        logits: Tensor = self.model(self.token, past_key_values=self.cache).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def seconds(self) -> float:
        """Median time of a step; an AquaError when the cache had no room for all that were timed."""
        seconds = seconds_of(self)
        # A full cache appends nothing, which would take less time.
        if int(self.cache.get_seq_length()) >= self.length + ROOM:
            raise AquaError(f"the timed steps filled a cache with room for {ROOM} more tokens: take a larger model")
        return seconds


def fill_cache(cache: Cache, states: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put keys, as the model computes them, and values of each layer into an empty cache of fixed size."""
    for layer, (keys, values) in zip(cache.layers, states, strict=True):
        layer.update(keys, values)
        if isinstance(layer, Recordable):
            layer.store(None)


def check_logits(model: PreTrainedModel, projections: Projections, settings: Settings, batch: int) -> float:
    """The relative difference of logits that is allowed; with few tokens, so that dense and AQUA fit beside each other.

    An AquaError when AQUA at k_ratio 1 is not dense, or a CUDA graph of some setting not what it records.
    """
    steps = Steps(model, batch, SHORT)
    expected = steps()
    check_near(expected, None, "dense", 0)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    steps.restart()
    limit = min(max(TOLERANCE, NOISE * difference(steps(), expected)), MOST)
    model.set_attn_implementation(before)
    check_graph(steps, "dense", limit)
    exact = AquaConfig(k_ratio=1, selection="weighted", share="group", sink=settings[0].sink, recent=settings[0].recent)
    for config in dict.fromkeys((exact, *settings)):
        name = f"aqua, k_ratio {config.k_ratio:g}" + (f", int{config.bits}" if config.bits else "")
        with apply(model, projections, config) as attachment:
            steps = Steps(model, batch, SHORT, attachment)
            check_near(steps(), expected if is_exact(config) else None, name, limit)
            check_graph(steps, name, limit)
    return limit


def check_graph(steps: Steps, name: str, limit: float) -> None:
    """Raise AquaError when replayed steps do not give what the same steps give that are not recorded."""
    if steps.model.device.type != "cuda":
        return
    steps.restart()
    expected = [(steps.token.clone(), steps().clone()) for _ in range(3)]
    steps.restart()
    steps()  # what is made once is made before the recording
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = steps()
    # The same tokens: of two that are equally likely, rounding would choose, and all that follows be another text.
    for token, right in expected[1:]:
        steps.token.copy_(token)
        graph.replay()
        if not torch.equal(steps.token, logits.argmax(-1, keepdim=True)):
            raise AquaError("a decoding step is wrong: as a CUDA graph it does not choose the likeliest token")
        check_near(logits, right, f"{name}, as a CUDA graph", limit)


def check_near(found: Tensor, expected: Tensor | None, name: str, limit: float) -> None:
    """Raise AquaError when logits, [batch, vocabulary], are further from the expected ones than `limit`.

    Where these are not known (None), they must be finite.
    """
    if expected is None and not bool(torch.isfinite(found).all()):
        raise AquaError(f"a decoding step is wrong: the logits of {name} are not all finite")
    error = 0.0 if expected is None else difference(found, expected)
    if not error <= limit:
        raise AquaError(f"a decoding step is wrong: the logits of {name} are off by {error:.2g}, allowed: {limit:.2g}")


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative difference of logits, [batch, vocabulary], of the worst sequence; infinite where they are no numbers."""
    errors = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(errors.nan_to_num(torch.inf).max())


def is_exact(config: AquaConfig) -> bool:
    """Whether it is dense attention up to rounding to the model's dtype."""
    return config.k_ratio == 1 and config.s_ratio == 0 and config.logit_error is None and config.bits is None


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a step reads: all but the table of input embeddings, of which it reads a few rows."""
    embeddings = model.get_input_embeddings().weight
    return sum(each.nbytes for each in model.parameters() if each is not embeddings)


def step_bytes(model: PreTrainedModel, batch: int, length: int, config: AquaConfig | None) -> int:
    """Bytes of weights, keys and values that a step reads; of keys the chosen dimensions; None: dense.

    The few tokens of the exact window, read whole, are counted as the others.
    """
    shape = model.config
    read, bits = (shape.head_dim, None) if config is None else (config.selected_dims(shape.head_dim), config.bits)
    tokens = shape.num_hidden_layers * batch * shape.num_key_value_heads * length
    return weight_bytes(model) + tokens * states_bytes(read, shape.head_dim, model.dtype.itemsize, bits)


def compare(rows: list[dict[str, Any]], batch: int, bandwidth: float) -> None:
    """Add what follows from `seconds` and `bytes` to the rows that have them; `bandwidth` is in bytes a second."""
    dense = [row["seconds"] for row in rows if row["k_ratio"] is None and "seconds" in row]
    for row in (row for row in rows if "seconds" in row):
        row["tokens_per_second"] = batch / row["seconds"]
        row["ratio"] = min(dense) / row["seconds"] if dense else None
        row["roofline_seconds"] = row["bytes"] / bandwidth
        row["share"] = row["roofline_seconds"] / row["seconds"]


def _dense_kernel(model: PreTrainedModel, kernel: str | None, length: int) -> ExitStack:
    """While open, attention is this one of `BASELINES` over the first `length` tokens of the cache; None: as it was.

    Transformers' own copies keys and values for each query head and reads the empty end of the cache. These do not;
    steps after the first leave out the few tokens appended by then, which takes as long but for those.
    """
    restore = ExitStack()
    if kernel is None:
        return restore

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return BASELINES[kernel](query[:, :, 0], key[:, :, :length], value[:, :, :length])()[:, None], None

    restore.callback(install(model, attend, lambda *_, **__: None)[1])
    return restore


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
