# SPDX-License-Identifier: Apache-2.0
"""The commands `aqua bench ...`: parsing and printing only, see `bench/` for what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqua_attention.cli.options import Device, Dtype, MaybeModel, ModelOptions, ProjectionsFile, load_projections
from aqua_attention.cli.spread import Commands
from aqua_attention.cli.terminal import Show
from aqua_attention.config import PRESETS, AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.io.progress import progress_bar

if TYPE_CHECKING:
    from aqua_attention.bench.choosing import Choosing
    from aqua_attention.machine import Shape

S_RATIOS = [0.0, 0.25]
H2O_RATIOS = [1.0, 0.5]
SIZES = ["32x32768", "8x131072"]
K_RATIOS = [1.0, 0.75, 0.5, 0.25]
GENERATE_SIZES = ["1x1024", "1x8192", "1x32768", "8x8192", "8x32768"]
CPU_SIZES = ["1x512", "1x8192"]
GENERATE_K_RATIOS = [AquaConfig.k_ratio, 0.5]
BREAKEVEN_K_RATIOS = [0.75, 0.5]

Size = Annotated[list[str], "Sequences and tokens in each, such as 8x32768; may be repeated."]
Half = Annotated[str, "bfloat16 or float16."]

benchmarks = Commands(
    no_args_is_help=True,
    help="Measure what AQUA saves in time and memory.\n\nExample: `aqua bench generate smollm2 -p smollm2.safetensors`",
)


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


@dataclass(frozen=True)
class Choices:
    """Rows that read some tokens only (AQUA-Select), scored by the smallest k_ratio; in int8 too as others."""

    select_p: Annotated[
        list[float] | None, "Also measure reading only the tokens with this share of the softmax; repeat."
    ] = None
    select_tokens: Annotated[
        list[int] | None, "Also measure reading only so many tokens, besides the exact window; repeat."
    ] = None
    score_bits: Annotated[int, "Bits of the keys that choose these tokens: 16, 8 or 4."] = 8

    def of(self, config: AquaConfig) -> list[AquaConfig]:
        """The settings of these rows."""
        chosen = [{"select_p": share} for share in self.select_p or ()]
        chosen += [{"select_tokens": count} for count in self.select_tokens or ()]
        return [AquaConfig(**config.to_dict() | each | {"score_bits": self.score_bits}) for each in chosen]


@dataclass(frozen=True)
class ChoicesByLength(Choices):
    """The same where lengths differ."""

    select_share: Annotated[
        list[float] | None, "Also measure reading this share of the tokens, whatever they hold; repeat."
    ] = None
    read_share: Annotated[
        float, "Share of the tokens that holds the softmax of --select-p: the random keys are made so."
    ] = 0.2

    def at_any_length(self, k_ratio: float) -> list[Choosing]:
        """What these rows choose by, scored by so many dimensions."""
        from aqua_attention.bench.choosing import CHOICES, Choosing

        given = [(name, value) for name in CHOICES for value in getattr(self, name) or ()]
        return [Choosing(k_ratio, self.score_bits, **{name: value}) for name, value in dict.fromkeys(given)]


@dataclass(frozen=True)
class GenerateSizes:
    """How many prompts, how long, and how much is generated after them."""

    size: Annotated[
        list[str] | None,
        "Prompts and tokens in each, such as 8x8192; may be repeated (default: what is usual on the device).",
    ] = None
    length: Annotated[int | None, "The same as --size 1xLENGTH."] = None
    new_tokens: Annotated[int, "Tokens that each call generates; those after the first 8 are counted."] = 72
    fill: Annotated[bool, "--fill", "Begin with random tokens in the cache. No prompt is read, and none is timed."] = (
        False
    )

    def of(self, model: Any, *, is_random: bool) -> list[tuple[int, int]]:
        """The sizes asked for; by default the usual ones of the device, for a user's model single prompts that fit."""
        from aqua_attention.bench.problem import read_sizes
        from aqua_attention.model.limits import position_limit

        if self.size or self.length is not None:
            return read_sizes([*(self.size or []), *([] if self.length is None else [f"1x{self.length}"])])
        usual = read_sizes(GENERATE_SIZES if model.device.type == "cuda" else CPU_SIZES)
        if is_random:
            return usual
        limit = position_limit(model)
        fit = [each for each in usual if each[0] == 1 and (limit is None or each[1] + self.new_tokens <= limit)]
        if not fit:
            raise AquaError(f"the model knows {limit} positions: choose fewer tokens by --length and --new-tokens")
        return fit


@benchmarks.command()
def memory(
    *,
    projections: ProjectionsFile,
    length: Annotated[int, "Tokens in the cache."] = 8192,
    batch: Annotated[int, "Sequences."] = 1,
    s_ratio: list[float] = S_RATIOS,
    h2o_ratio: list[float] = H2O_RATIOS,
    choices: Choices,
    exact: ExactWindow,
    dtype: Dtype = "bfloat16",
    model: ModelOptions,
    show: Show,
) -> None:
    """Measure the bytes of the cache, and the peak of the whole generation: transformers' caches and AQUA's.

    Rows that choose tokens say what their keys, values and the copy that is scored take. Each is measured twice, as the
    model computes and in int8. Their prompts are plain torch on a CPU, which takes minutes for long ones.

    Example: `aqua bench memory smollm2 -p smollm2.safetensors --length 8192 --json memory.json`
    """
    from aqua_attention.bench.memory import measure_memory
    from aqua_attention.evaluate.record import provenance
    from aqua_attention.evaluate.run import facts_of_model
    from aqua_attention.report.tables import memory_tables

    grid = product((None, 8, 4), dict.fromkeys(s_ratio), dict.fromkeys(h2o_ratio))
    configs = [AquaConfig(s_ratio=s, bits=b, h2o_ratio=h, **vars(exact)) for b, s, h in grid]
    for bits in (None, 8):
        configs += choices.of(AquaConfig(k_ratio=PRESETS["select"]["k_ratio"], bits=bits, **vars(exact)))
    learned, (loaded, _) = load_projections(projections), replace(model, dtype=dtype).load()
    with progress_bar("generate") as progress:
        result = measure_memory(loaded, learned, configs, length=length, batch=batch, progress=progress)
    result |= {"model": model.name} | provenance(projections, learned) | facts_of_model(loaded)
    show(result, *memory_tables(result), suite="memory")


@benchmarks.command()
def decode(
    *,
    size: Size = SIZES,
    shape: Heads,
    k_ratio: list[float] = K_RATIOS,
    exact: ExactWindow,
    dtype: Half = "bfloat16",
    int8: Annotated[bool, "Also time keys and values in int8, beside dense kernels in fp8."] = False,
    page: Annotated[list[int] | None, "Also time pages of 32, 64 or 128 tokens; may be repeated."] = None,
    show: Show,
) -> None:
    """Check and time one attention step of decoding on a CUDA GPU: AQUA's kernel beside every dense one installed.

    Example: `aqua bench decode --size 32x32768 --size 8x131072 --json decode.json`
    """
    with _needing_triton("decode"):
        from aqua_attention.bench.decode import measure_decode
    from aqua_attention.bench.problem import read_sizes
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
    projections: Annotated[Path | None, "--projections", "-p", "File made by `aqua calibrate` for MODEL."] = None,
    sizes: GenerateSizes,
    k_ratio: list[float] = GENERATE_K_RATIOS,
    int8: Annotated[
        bool | None, "Also time keys and values in int8, with the smallest k_ratio (default: on a GPU)."
    ] = None,
    compile: Annotated[bool, "Compile norms, rotary embeddings and MLPs of recorded steps, dense ones too."] = True,
    static: Annotated[
        bool, "Also time transformers' compiled static cache, which compiles for a minute for each size."
    ] = True,
    layers: Annotated[int | None, "Without MODEL: how many layers the random model has."] = None,
    data: Annotated[
        str | None, "With MODEL: take prompts from this text, as in `aqua calibrate` (default: random tokens)."
    ] = None,
    choices: Choices,
    exact: ExactWindow,
    model: MaybeModel,
    show: Show,
) -> None:
    """Measure `model.generate` on this machine, dense and AQUA: first token, milliseconds a token, memory.

    MODEL is yours, with its projections. Without one, weights are random: Llama-3.1-8B's shape on a GPU, a small Llama
    on a CPU. Rows are transformers' default, its compiled static cache, dense attention by the fastest kernel in
    recorded steps, and AQUA. All are checked before they are timed.

    Example: `aqua bench generate smollm2 -p smollm2.safetensors --length 4096 --json generate.json`
    """
    from aqua_attention.bench.generate import GenerateBenchmark
    from aqua_attention.evaluate.record import provenance
    from aqua_attention.machine import warn_of_load
    from aqua_attention.report.tables import generate_table

    warn_of_load("measure again when the machine is idle")
    loaded, learned, prompts, name = _subject(model, projections, data, layers)
    made = provenance(projections, learned) if projections else {"projections": "random", "projections_sha256": None}
    on_gpu = loaded.device.type == "cuda"
    kinds: list[tuple[float, int | None]] = [(ratio, None) for ratio in dict.fromkeys(k_ratio)]
    kinds += [(min(k_ratio), 8)] if (on_gpu if int8 is None else int8) else []
    ours = AquaConfig(**vars(exact))
    settings = tuple(replace(ours, k_ratio=ratio, bits=bits) for ratio, bits in kinds)
    for bits in dict.fromkeys(bits for _, bits in kinds):
        settings += tuple(choices.of(replace(ours, k_ratio=min(k_ratio), bits=bits)))
    given: dict[str, Any] = {
        "new_tokens": sizes.new_tokens,
        "fill": sizes.fill,
        "compile": compile,
        "static": static,
        "prompts": prompts,
    }
    benchmark = GenerateBenchmark(loaded, learned, settings, is_random=model.model is None, **given)
    results: list[dict[str, Any]] = []
    shared = {"model": name, "prompts": data or "random tokens"} | made
    for batch, tokens in sizes.of(loaded, is_random=model.model is None):
        with progress_bar(f"{batch} x {tokens}") as progress:
            results.append(benchmark.measure(batch, tokens, progress))
        # What is measured stays when a later size fails.
        show(shared | {"results": results}, generate_table(results[-1]), suite="generate")


def _subject(model: MaybeModel, projections: Path | None, data: str | None, layers: int | None) -> tuple[Any, ...]:
    """What `generate` measures: model, projections, prompts (None: random), and the model's name."""
    if model.model is None:
        if projections or data:
            raise AquaError("--projections and --data are for a MODEL: name it, or leave them out")
        from aqua_attention.bench.random_llama import make_llama, random_projections

        made = make_llama(model.device, model.dtype, layers)
        return made, random_projections(made), None, f"random weights, {made.config.num_hidden_layers} layers"
    if projections is None:
        raise AquaError(f"{model.model} needs its projections: make them by `aqua calibrate`, and give -p FILE")
    if layers is not None:
        raise AquaError("--layers is for the random model: leave out --layers, or MODEL")
    learned, (loaded, tokenizer) = load_projections(projections), model.load()
    if data is None:
        return loaded, learned, None, model.name
    from aqua_attention.data.text import load_text, text_prompts

    return loaded, learned, text_prompts(tokenizer, load_text(data)), model.name


@benchmarks.command()
def breakeven(
    *,
    device: Device = None,
    shape: Heads,
    dtype: Annotated[
        str | None, "float32 or bfloat16 on a CPU, bfloat16 or float16 on a GPU (default: the first)."
    ] = None,
    k_ratio: list[float] = BREAKEVEN_K_RATIOS,
    lengths: Annotated[str | None, "FIRST..LAST tokens, each length twice the one before (default: 64..65536)."] = None,
    quick: Annotated[bool, "--quick", "Lengths up to 4096 only."] = False,
    choices: ChoicesByLength,
    exact: ExactWindow,
    show: Show,
) -> None:
    """Find the length from which choosing dimensions is faster than using all, and keep it for min_length="auto".

    With --select-p, --select-tokens or --select-share also the length from which choosing tokens is faster. It is
    compared with dense attention, with choosing dimensions alone, and with what min_length switches to.

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
        result = measure_breakeven(
            layer,
            k_ratios=ratios,
            lengths=read,
            **vars(exact),
            choosing=choices.at_any_length(min(ratios)),
            read_share=choices.read_share,
            progress=progress,
        )
    show(result, *breakeven_tables(result), suite="breakeven")
    if result["profile"] is None:
        typer.echo("the machine was busy, and no profile was kept: run this again on an idle machine", err=True)
    else:
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
        raise AquaError(
            f"aqua bench {command} needs triton, which CUDA builds of torch bring along: pip install triton"
        ) from error
