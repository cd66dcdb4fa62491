# SPDX-License-Identifier: Apache-2.0
"""The commands `aqua bench ...`: parsing and printing only, see `bench/` for what they do."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import Annotated

import typer

from aqua_attention.cli.options import (
    Device,
    Dtype,
    GgufFile,
    Json,
    KRatios,
    Model,
    ProjectionsFile,
    Recent,
    RemoteCode,
    Sink,
    load_model,
)
from aqua_attention.cli.terminal import check_writable, print_table, progress_bars
from aqua_attention.errors import AquaError

S_RATIOS = [0.0, 0.25]
H2O_RATIOS = [1.0, 0.5]
SIZES = ["32x32768", "8x131072"]
K_RATIOS = [1.0, 0.75, 0.5, 0.25]
GENERATE_SIZES = [f"{batch}x{length}" for batch in (1, 8) for length in (4096, 16384, 32768)]
GENERATE_K_RATIOS = [1.0, 0.5]
BREAKEVEN_K_RATIOS = [0.75, 0.5]

benchmarks = typer.Typer(no_args_is_help=True, help="Measure what AQUA saves.")


@benchmarks.command()
def memory(
    model: Model,
    projections: ProjectionsFile,
    length: Annotated[int, typer.Option(help="Tokens in the cache.")] = 8192,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    s_ratio: Annotated[
        list[float], typer.Option(help="Share of trailing key dimensions never stored; repeat.")
    ] = S_RATIOS,
    h2o_ratio: Annotated[
        list[float], typer.Option("--h2o-ratio", help="Share of the tokens that stays; repeat.")
    ] = H2O_RATIOS,
    sink: Sink = 4,
    recent: Recent = 64,
    gguf_file: GgufFile = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    json: Json = None,
) -> None:
    """Bytes of the cache as allocated, and the peak of the whole generation: transformers' caches and ours.

    Example: `aqua bench memory smollm2 -p smollm2.safetensors --length 8192 --json memory.json`
    """
    check_writable(json)
    from aqua_attention.bench.memory import measure_memory
    from aqua_attention.calibration.projections import Projections
    from aqua_attention.config import AquaConfig
    from aqua_attention.io.files import write_json
    from aqua_attention.report.tables import memory_table

    grid = product((None, 8, 4), dict.fromkeys(s_ratio), dict.fromkeys(h2o_ratio))
    configs = [AquaConfig(s_ratio=s, bits=b, h2o_ratio=h, sink=sink, recent=recent) for b, s, h in grid]
    learned = Projections.load(projections)
    loaded, _ = load_model(model, gguf_file, dtype, device, trust_remote_code)
    with progress_bars() as report:
        result = measure_memory(
            loaded,
            learned,
            configs,
            length=length,
            batch=batch,
            progress=lambda done, total: report("generate", done, total),
        )
    result |= {"model": model}
    if json:
        write_json(json, result)
    print_table(memory_table(result))


@benchmarks.command()
def decode(
    size: Annotated[list[str], typer.Option(help="Sequences and tokens in each, such as 8x32768; repeat.")] = SIZES,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    groups: Annotated[int, typer.Option(help="Key-value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Dimensions of a head.")] = 128,
    k_ratio: KRatios = K_RATIOS,
    sink: Sink = 4,
    recent: Recent = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    int8: Annotated[bool, typer.Option(help="Keys and values in int8 too, beside dense kernels in fp8.")] = False,
    page: Annotated[
        list[int] | None, typer.Option(help="In pages of so many tokens too: 32, 64 or 128; repeat.")
    ] = None,
    json: Json = None,
) -> None:
    """One decoding attention step on a CUDA GPU, checked and timed: AQUA's kernel beside every dense one installed.

    Example: `aqua bench decode --size 32x32768 --size 8x131072 --json decode.json`
    """
    check_writable(json)
    import torch

    try:
        from aqua_attention.bench.decode import measure_decode, read_sizes
    except ModuleNotFoundError as error:
        raise AquaError("aqua bench decode needs triton, which CUDA builds of torch bring along") from error
    from aqua_attention.io.files import write_json
    from aqua_attention.machine import Shape
    from aqua_attention.report.tables import decode_table

    if dtype not in ("bfloat16", "float16"):
        raise AquaError(f"dtype is {dtype!r}: it must be bfloat16 or float16")
    layouts = tuple((bits, tokens) for bits in ((None, 8) if int8 else (None,)) for tokens in (None, *(page or ())))
    shape = Shape(torch.device("cuda"), heads, groups, head_dim, getattr(torch, dtype))
    results = []
    for batch, length in read_sizes(size):
        results.append(
            measure_decode(
                shape,
                batch=batch,
                length=length,
                k_ratios=tuple(k_ratio),
                sink=sink,
                recent=recent,
                layouts=layouts,
            )
        )
        print_table(decode_table(results[-1]))
    if json:
        write_json(json, {"results": results})


@benchmarks.command()
def generate(
    size: Annotated[
        list[str], typer.Option(help="Sequences and tokens in each, such as 8x32768; repeat.")
    ] = GENERATE_SIZES,
    layers: Annotated[int, typer.Option(help="Layers of the model, which else has the shape of Llama-3.1-8B.")] = 32,
    k_ratio: KRatios = GENERATE_K_RATIOS,
    int8: Annotated[bool, typer.Option(help="The smallest k_ratio with keys and values in int8 too.")] = True,
    compile: Annotated[
        bool, typer.Option(help="Norms, rotary embeddings and activations by torch.compile, in every row.")
    ] = True,
    sink: Sink = 4,
    recent: Recent = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    json: Json = None,
) -> None:
    """One whole decoding step of a Llama of random weights on a CUDA GPU, checked and timed: dense and with AQUA.

    Example: `aqua bench generate --size 1x4096 --size 8x32768 --json generate.json`
    """
    check_writable(json)
    import torch

    try:
        from aqua_attention.bench.decode import read_sizes
        from aqua_attention.bench.generate import measure_generate
        from aqua_attention.bench.random_llama import compiled, make_model
    except ModuleNotFoundError as error:
        raise AquaError("aqua bench generate needs triton, which CUDA builds of torch bring along") from error
    from aqua_attention.config import AquaConfig
    from aqua_attention.io.files import write_json
    from aqua_attention.report.tables import generate_table

    if dtype not in ("bfloat16", "float16"):
        raise AquaError(f"dtype is {dtype!r}: it must be bfloat16 or float16")
    sizes, kinds = read_sizes(size), [(ratio, None) for ratio in dict.fromkeys(k_ratio)]
    settings = tuple(
        AquaConfig(k_ratio=ratio, selection="weighted", share="group", sink=sink, recent=recent, bits=bits)
        for ratio, bits in (*kinds, *([(min(k_ratio), 8)] if int8 else []))
    )
    model = make_model(num_hidden_layers=layers, dtype=getattr(torch, dtype))
    results = []
    with compiled(model) if compile else nullcontext():
        for batch, length in sizes:
            measured = measure_generate(model, batch=batch, length=length, settings=settings)
            results.append(measured | {"compiled": compile})
            print_table(generate_table(results[-1]))
            # What is measured stays when a later size fails.
            if json:
                write_json(json, {"results": results})


@benchmarks.command()
def breakeven(
    device: Device = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    groups: Annotated[int, typer.Option(help="Key-value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Dimensions of a head.")] = 128,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16 on a CPU, bfloat16 or float16 on a GPU (default: the first)."),
    ] = None,
    k_ratio: KRatios = BREAKEVEN_K_RATIOS,
    lengths: Annotated[str | None, typer.Option(help="FIRST..LAST tokens, doubled (default: 64..65536).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Lengths up to 4096 only.")] = False,
    sink: Sink = 4,
    recent: Recent = 64,
    json: Json = None,
) -> None:
    """From which length on choosing dimensions is faster than using all: checked, timed, kept for min_length="auto".

    Example: `aqua bench breakeven --device cpu --heads 9 --groups 3 --head-dim 64 --k-ratio 0.75 --k-ratio 0.5 --quick`
    """
    check_writable(json)
    import torch

    from aqua_attention.bench.breakeven import DTYPES, LENGTHS, QUICK_LENGTHS, measure_breakeven, read_lengths
    from aqua_attention.io.files import write_json
    from aqua_attention.machine import Shape
    from aqua_attention.report.tables import breakeven_tables

    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise AquaError(f"device is {device!r}: it must be cpu, cuda or cuda:NUMBER") from error
    names = DTYPES.get(where.type, ())
    if not names or (dtype is not None and dtype not in names):
        given = " and ".join(filter(None, (f"device is {where.type!r}", dtype and f"dtype {dtype!r}")))
        raise AquaError(f"{given}: it must be cpu with float32 or bfloat16, or cuda with bfloat16 or float16")
    shape = Shape(where, heads, groups, head_dim, getattr(torch, dtype or names[0]))
    with progress_bars() as report:
        result = measure_breakeven(
            shape,
            k_ratios=tuple(dict.fromkeys(k_ratio)),
            lengths=read_lengths(lengths or (QUICK_LENGTHS if quick else LENGTHS)),
            sink=sink,
            recent=recent,
            progress=lambda done, total: report("lengths", done, total),
        )
    if json:
        write_json(json, result)
    for table in breakeven_tables(result):
        print_table(table)
    typer.echo(f"wrote {result['profile']}")
