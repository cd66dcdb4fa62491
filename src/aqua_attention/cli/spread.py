# SPDX-License-Identifier: Apache-2.0
"""One declaration, many options: what a command takes as a dataclass, or as knobs, is spread into typer's options.

Beside the knobs there is `--preset`. Its setting holds but for the knobs that the user has given.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from inspect import Parameter
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer

from aqua_attention.cli.terminal import stoppable
from aqua_attention.config import DEFAULT_PRESET, PRESETS, AquaConfig, Knob, knobs
from aqua_attention.errors import AquaError

BASIS = Knob("The rotation: aqua (as calibrated); to compare svd, none, or key-pca (of keys alone)", default="aqua")
"""No knob of `AquaConfig`: a setting has it beside them."""
PRESET = Annotated[str, f"A setting by name: {', '.join(PRESETS)}; other options change it."]
_CONTEXT = "typer_context"
"""The parameter by which typer tells which options were given."""


@dataclass(frozen=True)
class Knobs:
    """Marks a parameter that takes every knob, and the basis, as {name: [values]}: `Annotated[dict, Knobs()]`.

    Knobs that are not given have one value, the preset's; so have those that the command has an option of its own for.

    Attributes:
        repeat: the options that may be given several times; the others have one value.
        config: the class that declares the knobs.
    """

    repeat: tuple[str, ...] = ()
    config: Any = AquaConfig


class Option(NamedTuple):
    """What typer reads for a field, and what the field gets."""

    parameter: Parameter
    read: Callable[[Any], Any] = lambda value: value


class Part(NamedTuple):
    """The options that a parameter is spread into, and what makes it from their values.

    `has_preset`: `make` has a value for every option, and is only told those that the user has given.
    """

    options: list[Option]
    make: Callable[..., Any]
    has_preset: bool = False

    def made(self, given: dict[str, Any], context: typer.Context | None) -> Any:
        """The parameter's value, of all values that the command was called with."""
        values = {}
        for name, read in ((option.parameter.name, option.read) for option in self.options):
            if not self.has_preset or _is_given(name, context):
                values[name] = read(given[name])
        return self.make(**values)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its dataclasses spread into options, one a field, and `AquaConfig` and `Knobs` into one a knob.

    An option that the command has itself stands for the knob of that name. `Annotated[type, "help"]` is an option with
    that help, and `Annotated[type, "--name", "-n", "help"]` has its own names; a bare type has the help of the knob
    with its name.
    """
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    parts = {each.name: part for each in parameters if (part := _part(each.annotation))}
    own = {each.name for each in parameters if each.name not in parts}
    for part in parts.values():
        part.options[:] = [option for option in part.options if option.parameter.name not in own]
    flat = [one for each in parameters for one in (parts[each.name].options if each.name in parts else [Option(each)])]
    flat.sort(key=lambda option: option.parameter.name == "json")  # last, whoever has it
    declared, shown = knobs() | {"basis": BASIS}, []
    for parameter in (option.parameter for option in flat):
        explained = _explained(parameter.annotation, declared.get(parameter.name))
        shown.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=explained))
    if any(part.has_preset for part in parts.values()):
        shown.append(_parameter(_CONTEXT, typer.Context, MISSING))

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        context = given.pop(_CONTEXT, None)
        with stoppable():
            made = {name: part.made(given, context) for name, part in parts.items()}
            command(**{name: given[name] for name in own}, **made)

    with_options.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return with_options


class Commands(typer.Typer):
    """Commands that are each `spread`."""

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        """See `typer.Typer.command`."""
        added = super().command(*args, **options)
        return lambda function: added(spread(function))


def _is_given(name: str, context: typer.Context | None) -> bool:
    """Whether the user has given an option, be it with the value of its default."""
    source = context.get_parameter_source(name) if context else None
    return source is not None and source.name != "DEFAULT"


def _part(annotation: Any) -> Part | None:
    """What a parameter is spread into; None if it is an option."""
    preset = Option(_parameter("preset", PRESET, DEFAULT_PRESET))
    for mark in get_args(annotation):
        if isinstance(mark, Knobs):
            declared = knobs(mark.config) | {"basis": BASIS}
            options = [_knob_option(name, knob, name in mark.repeat) for name, knob in declared.items()]
            return Part([preset, *options], functools.partial(_as_lists, mark.config), has_preset=True)
    if not isinstance(annotation, type) or not dataclasses.is_dataclass(annotation):
        return None
    declared_in: Any = annotation
    if issubclass(annotation, AquaConfig):
        options = [_knob_option(name, knob) for name, knob in knobs(declared_in).items()]
        return Part([preset, *options], lambda preset=DEFAULT_PRESET, **given: annotation.preset(preset, **given), True)
    hints = get_type_hints(annotation, include_extras=True)
    fields = [field for field in dataclasses.fields(annotation) if field.init]
    return Part([Option(_parameter(field.name, hints[field.name], field.default)) for field in fields], annotation)


def _as_lists(config: Any, preset: str = DEFAULT_PRESET, **given: Any) -> dict[str, list[Any]]:
    values = config.preset(preset).to_dict() | {"basis": BASIS.default} | given
    return {name: value if isinstance(value, list) else [value] for name, value in values.items()}


def _parameter(name: str, annotation: Any, default: Any) -> Parameter:
    default = Parameter.empty if default is MISSING else default
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _knob_option(name: str, knob: Knob, repeated: bool = False) -> Option:
    """A knob as an option. It is typed as a word if some of its values are words, or None among several."""
    words = {str(choice).lower(): choice for choice in knob.choices if isinstance(choice, str) or repeated}
    in_words = knob.type is not str and bool(words)
    kind, default = (str, str(knob.default).lower()) if in_words else (knob.type, knob.default)

    def read(value: Any) -> Any:
        if not in_words or value in words:
            return words.get(value, value)
        if not knob.range:
            raise AquaError(f"{name} is {value!r}: it must be one of {', '.join(words)}")
        return knob.type(value) if value.isdecimal() else value

    annotation: Any = list[kind] if repeated else kind  # type: ignore[valid-type]
    if default is None:
        annotation |= None
    elif repeated:
        default = [default]
    option = _parameter(name, _explained(annotation, knob), default)
    return Option(option, (lambda values: [read(value) for value in values or ()]) if repeated else read)


def _explained(annotation: Any, knob: Knob | None) -> Any:
    """A type with an option's help: the string beside it, else the knob's. An option that has help keeps it."""
    kind, *beside = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if beside:
        words = all(isinstance(each, str) for each in beside)
        return Annotated[kind, typer.Option(*beside[:-1], help=beside[-1])] if words else annotation
    if knob is None:
        return annotation
    text = f"{knob.help}, {knob.range}" if "<" in knob.range else knob.help
    if "list[" in str(annotation):
        text += ", or none; may be repeated" if None in knob.choices else "; may be repeated"
    return Annotated[annotation, typer.Option(help=f"{text}.")]
