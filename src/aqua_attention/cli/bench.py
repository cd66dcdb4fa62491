# SPDX-License-Identifier: Apache-2.0
"""The commands `aqua bench ...`: parsing and printing only, see `bench/` for what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli.options import Device, Dtype, ModelOptions, ProjectionsFile, load_projections
from aqua_attention.cli.spread import Commands
from aqua_attention.cli.terminal import Show, progress_bar
from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError

if TYPE_CHECKING:
    from aqua_attention.machine import Shape

S_RATIOS = [0.0, 0.25]
H2O_RATIOS = [1.0, 0.5]
SIZES = ["32x32768", "8x131072"]
K_RATIOS = [1.0, 0.75, 0.5, 0.25]
GENERATE_SIZES = [f"{batch}x{length}" for batch in (1, 8) for length in (4096, 16384, 32768)]
GENERATE_K_RATIOS = [1.0, 0.5]
BREAKEVEN_K_RATIOS = [0.75, 0.5]

Size = Annotated[list[str], "Sequences and tokens in each, such as 8x32768; repeat."]
Half = Annotated[str, "bfloat16 or float16."]

benchmarks = Commands(no_args_is_help=True, help="Measure what AQUA saves.")


@dataclass(frozen=True)
class Heads:
    """The shape of an attention layer: that of Llama-3.1-8B."""

    heads: Annotated[int, "Query heads."] = 32
    groups: Annotated[int, "Key-value heads."] = 8
    head_dim: Annotated[int, "Dimensions of a head."] = 128

    def on(self, device: Any, dtype: str) -> Shape:
        """The layer of a device, computed in a dtype by name."""
        import torch

        from aqua_attention.machine import Shape

        return Shape(torch.device(device), self.heads, self.groups, self.head_dim, getattr(torch, dtype))


@dataclass(frozen=True)
class ExactWindow:
    """The tokens scored with every dimension."""

    sink: int = AquaConfig.sink
    recent: int = AquaConfig.recent


@benchmarks.command()
def memory(
    *,
    projections: ProjectionsFile,
    length: Annotated[int, "Tokens in the cache."] = 8192,
    batch: Annotated[int, "Sequences."] = 1,
    s_ratio: list[float] = S_RATIOS,
    h2o_ratio: list[float] = H2O_RATIOS,
    exact: ExactWindow,
    dtype: Dtype = "bfloat16",
    model: ModelOptions,
    show: Show,
) -> None:
    """Bytes of the cache as allocated, and the peak of the whole generation: transformers' caches and ours.

    Example: `aqua bench memory smollm2 -p smollm2.safetensors --length 8192 --json memory.json`
    """
    from aqua_attention.bench.memory import measure_memory
    from aqua_attention.report.tables import memory_table

    grid = product((None, 8, 4), dict.fromkeys(s_ratio), dict.fromkeys(h2o_ratio))
    configs = [AquaConfig(s_ratio=s, bits=b, h2o_ratio=h, **vars(exact)) for b, s, h in grid]
    learned, (loaded, _) = load_projections(projections), replace(model, dtype=dtype).load()
    with progress_bar("generate") as progress:
        result = measure_memory(loaded, learned, configs, length=length, batch=batch, progress=progress)
    show(result | {"model": model.model}, memory_table(result), suite="memory")


@benchmarks.command()
def decode(
    *,
    size: Size = SIZES,
    shape: Heads,
    k_ratio: list[float] = K_RATIOS,
    exact: ExactWindow,
    dtype: Half = "bfloat16",
    int8: Annotated[bool, "Keys and values in int8 too, beside dense kernels in fp8."] = False,
    page: Annotated[list[int] | None, "In pages of so many tokens too: 32, 64 or 128; repeat."] = None,
    show: Show,
) -> None:
    """One decoding attention step on a CUDA GPU, checked and timed: AQUA's kernel beside every dense one installed.

    Example: `aqua bench decode --size 32x32768 --size 8x131072 --json decode.json`
    """
    with _needing_triton("decode"):
        from aqua_attention.bench.decode import measure_decode, read_sizes
    from aqua_attention.report.tables import decode_table

    layouts = tuple((bits, tokens) for bits in ((None, 8) if int8 else (None,)) for tokens in (None, *(page or ())))
    layer = shape.on("cuda", _half(dtype))
    same = vars(exact) | {"k_ratios": tuple(k_ratio), "layouts": layouts}
    results = []
    for batch, length in read_sizes(size):
        results.append(measure_decode(layer, batch=batch, length=length, **same))
        show({"results": results}, decode_table(results[-1]), suite="decode")


@benchmarks.command()
def generate(
    *,
    size: Size = GENERATE_SIZES,
    layers: Annotated[int, "Layers of the model, which else has the shape of Llama-3.1-8B."] = 32,
    k_ratio: list[float] = GENERATE_K_RATIOS,
    int8: Annotated[bool, "The smallest k_ratio with keys and values in int8 too."] = True,
    compile: Annotated[bool, "Norms, rotary embeddings and activations by torch.compile, in every row."] = True,
    exact: ExactWindow,
    dtype: Half = "bfloat16",
    show: Show,
) -> None:
    """One whole decoding step of a Llama of random weights on a CUDA GPU, checked and timed: dense and with AQUA.

    Example: `aqua bench generate --size 1x4096 --size 8x32768 --json generate.json`
    """
    with _needing_triton("generate"):
        from aqua_attention.bench.decode import read_sizes
        from aqua_attention.bench.generate import measure_generate
        from aqua_attention.bench.random_llama import compiled, make_model
    import torch

    from aqua_attention.report.tables import generate_table

    half, sizes = getattr(torch, _half(dtype)), read_sizes(size)
    kinds = [(ratio, None) for ratio in dict.fromkeys(k_ratio)] + ([(min(k_ratio), 8)] if int8 else [])
    settings = tuple(AquaConfig(k_ratio=ratio, bits=bits, **vars(exact)) for ratio, bits in kinds)
    model = make_model(num_hidden_layers=layers, dtype=half)
    results = []
    with compiled(model) if compile else nullcontext():
        for batch, length in sizes:
            measured = measure_generate(model, batch=batch, length=length, settings=settings)
            results.append(measured | {"compiled": compile})
            # What is measured stays when a later size fails.
            show({"results": results}, generate_table(results[-1]), suite="generate")


@benchmarks.command()
def breakeven(
    *,
    device: Device = None,
    shape: Heads,
    dtype: Annotated[str | None, "float32 or bfloat16 on a CPU, bfloat16 or float16 on a GPU (the first)."] = None,
    k_ratio: list[float] = BREAKEVEN_K_RATIOS,
    lengths: Annotated[str | None, "FIRST..LAST tokens, doubled (default: 64..65536)."] = None,
    quick: Annotated[bool, "--quick", "Lengths up to 4096 only."] = False,
    exact: ExactWindow,
    show: Show,
) -> None:
    """From which length on choosing dimensions is faster than using all: checked, timed, kept for min_length="auto".

    Example: `aqua bench breakeven --device cpu --heads 9 --groups 3 --head-dim 64 --k-ratio 0.75 --k-ratio 0.5 --quick`
    """
    import torch

    from aqua_attention.bench.breakeven import DTYPES, LENGTHS, QUICK_LENGTHS, measure_breakeven, read_lengths
    from aqua_attention.report.tables import breakeven_tables

    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise AquaError(f"device is {device!r}: it must be cpu, cuda or cuda:NUMBER") from error
    names = DTYPES.get(where.type, ())
    if not names or (dtype is not None and dtype not in names):
        given = " and ".join(filter(None, (f"device is {where.type!r}", dtype and f"dtype {dtype!r}")))
        raise AquaError(f"{given}: it must be cpu with float32 or bfloat16, or cuda with bfloat16 or float16")
    layer, ratios = shape.on(where, dtype or names[0]), tuple(dict.fromkeys(k_ratio))
    read = read_lengths(lengths or (QUICK_LENGTHS if quick else LENGTHS))
    with progress_bar("lengths") as progress:
        result = measure_breakeven(layer, k_ratios=ratios, lengths=read, **vars(exact), progress=progress)
    show(result, *breakeven_tables(result), suite="breakeven")
    typer.echo(f"wrote {result['profile']}")


def _half(name: str) -> str:
    """A dtype's name, checked."""
    if name not in ("bfloat16", "float16"):
        raise AquaError(f"dtype is {name!r}: it must be bfloat16 or float16")
    return name


@contextmanager
def _needing_triton(command: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise AquaError(f"aqua bench {command} needs triton, which CUDA builds of torch bring along") from error
