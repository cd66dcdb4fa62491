# SPDX-License-Identifier: Apache-2.0
"""A knob is declared once: its option, its error and its words in tables need no other line of the library.

The recipe of a new knob: declare it in `config.py`, act on it where it acts (one to three files), test it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

import aqua_attention
from aqua_attention.cli.spread import Knobs, spread
from aqua_attention.config import AquaConfig, Knob, knobs
from aqua_attention.errors import AquaError

DECLARED = '    dummy: Annotated[float, Knob("Nothing at all", "0 <= dummy < 1")] = 0.25\n\n'


@dataclass(frozen=True)
class Dummy(AquaConfig):
    dummy: Annotated[float, Knob("Nothing at all", "0 <= dummy < 1")] = 0.25
    word: Annotated[int | Literal["auto"], Knob("A number or a word", "1 or more", choices=("auto",))] = 1
    few: Annotated[int | None, Knob("One of a few", choices=(None, 2, 3))] = None


@dataclass(frozen=True)
class Place:
    where: Annotated[str, "Where it is."]
    basis: str = "none"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Runs Python on a copy of the library with one line more in `config.py`."""
    source = tmp_path_factory.mktemp("library") / "aqua_attention"
    shutil.copytree(Path(aqua_attention.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    config = source / "config.py"
    text = config.read_text()
    assert text.count("    def __post_init__(self)") == 1
    config.write_text(text.replace("    def __post_init__(self)", f"{DECLARED}    def __post_init__(self)"))

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(source.parent), "COLUMNS": "200", "NO_COLOR": "1"}
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)

    return run


@pytest.mark.parametrize(
    "command",
    ["generate", *(f"eval {name}" for name in "perplexity lines needle ruler tasks grid transfer context".split())],
)
def test_one_declaration_is_an_option_of_every_command_that_has_knobs(library, command):
    done = library("-m", "aqua_attention.cli.main", *command.split(), "--help")
    (line,) = [line for line in done.stdout.splitlines() if "--dummy" in line]
    assert "Nothing at all, 0 <= dummy < 1" in line
    assert ("repeat" in line) == (command == "eval grid")
    assert "[default: 0.25]" in done.stdout


def test_one_declaration_is_a_range_error_words_in_tables_and_settings_of_a_grid(library):
    done = library("-m", "aqua_attention.cli.main", "generate", "m", "-p", "p", "--prompt", "x", "--dummy", "2")
    assert (done.returncode, done.stderr) == (2, "error: dummy is 2.0: it must be a number with 0 <= dummy < 1\n")
    code = """
from aqua_attention.evaluate.setting import grid_settings
from aqua_attention.report.tables import describe_setting
for setting in grid_settings({"k_ratio": [1, 0.5], "dummy": [0, 0.25], "sink": [0, 4], "recent": [0]}):
    print(describe_setting(setting.config.to_dict()).replace(", weighted, shared by group, sliding exact", ""))
"""
    done = library("-c", code)
    assert done.stdout.splitlines() == [
        *("k_ratio 1, dummy 0.0", "k_ratio 0.5, dummy 0.0", "k_ratio 1", "k_ratio 0.5"),
        *("k_ratio 1, exact 4 + 0, dummy 0.0", "k_ratio 0.5, exact 4 + 0, dummy 0.0"),
        *("k_ratio 1, exact 4 + 0", "k_ratio 0.5, exact 4 + 0"),
    ], done.stderr


def test_the_knobs_of_a_class_are_its_fields():
    assert list(knobs()) == list(AquaConfig().to_dict())
    assert list(knobs(Dummy)) == [*knobs(), "dummy", "word", "few"]
    assert {name: knob.default for name, knob in knobs().items()} == AquaConfig().to_dict()
    for name, value, allowed in (
        ("dummy", 1, "a number with 0 <= dummy < 1"),
        ("word", 0, 'a whole number, 1 or more, or "auto"'),
        ("word", None, 'a whole number, 1 or more, or "auto"'),
        ("few", 4, "one of None, 2, 3"),
    ):
        with pytest.raises(AquaError) as refusal:
            Dummy(**{name: value})
        assert str(refusal.value) == f"{name} is {value!r}: it must be {allowed}"


def given(command, *arguments):
    """What a command was called with, or the error; and its help."""
    app, taken = typer.Typer(add_completion=False), {}
    app.command()(spread(command(taken)))
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    done = runner.invoke(app, list(map(str, arguments)))
    return taken or done.exception, runner.invoke(app, ["--help"]).output


def single(taken):
    def command(name: Annotated[str, "Its name."], config: Dummy, place: Place) -> None:
        taken.update(name=name, config=config, place=place)

    return command


def test_a_dataclass_is_an_option_a_field():
    taken, shown = given(single, "--name", "x", "--where", "y", "--dummy", 0.5, "--word", "auto", "--few", 3)
    assert taken == {"name": "x", "config": Dummy(dummy=0.5, word="auto", few=3), "place": Place("y", "none")}
    for words in (
        "Its name.",
        "Where it is.",
        "A number or a word.",
        "aqua (as calibrated); to compare svd",
        "One of a few.",
    ):
        assert words in shown
    assert str(given(single, "--name", "x", "--where", "y", "--word", "many")[0]).startswith(
        "word is 'many': it must be"
    )
    assert isinstance(given(single, "--name", "x")[0], SystemExit), "it needs --where"


def repeated(taken):
    def command(
        values: Annotated[dict[str, list[Any]], Knobs(("dummy", "word", "few", "logit_error"), Dummy)],
        k_ratio: Annotated[float, "Its own."] = 1.0,
    ) -> None:
        taken.update(values, own=k_ratio)

    return command


def test_knobs_that_repeat_are_lists_and_an_option_of_the_command_stands_for_one():
    defaults = {name: [knob.default] for name, knob in knobs(Dummy).items()} | {"basis": ["aqua"], "own": 1.0}
    taken, shown = given(repeated)
    assert taken == defaults
    assert "Its own." in shown
    assert "One of a few, or none; may be repeated." in shown
    taken, _ = given(
        repeated, "--few", "none", "--few", 2, "--word", 9, "--word", "auto", "--k-ratio", 0.5, "--sink", 3
    )
    assert taken == defaults | {"few": [None, 2], "word": [9, "auto"], "own": 0.5, "sink": [3]}
    assert str(given(repeated, "--few", 4)[0]) == "few is '4': it must be one of none, 2, 3"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Dummy()),
        (["--preset", "accurate"], Dummy()),
        (["--preset", "fast"], Dummy(k_ratio=0.5)),
        (["--preset", "small"], Dummy(bits=8)),
        (["--preset", "select"], Dummy(k_ratio=0.25, select_p=0.95, score_bits=8)),
        (["--preset", "paper"], Dummy.paper()),
        (["--preset", "fast", "--k-ratio", 0.25], Dummy(k_ratio=0.25)),
        (["--k-ratio", 0.75, "--preset", "fast"], Dummy(k_ratio=0.75)),
        (["--preset", "paper", "--sink", 4], Dummy.paper(sink=4)),
        (
            ["--preset", "paper", "--selection", "weighted", "--dummy", 0.5],
            Dummy.paper(selection="weighted", dummy=0.5),
        ),
    ],
)
def test_an_option_that_is_given_overrides_the_preset_even_with_its_default(arguments, expected):
    one, shown = given(single, "--name", "x", "--where", "y", *arguments)
    assert one == {"name": "x", "config": expected, "place": Place("y", "none")}
    assert "accurate, fast, small, select, paper" in shown
    assert "[default: weighted]" in shown
    many, _ = given(repeated, *arguments)
    values = {name: [value] for name, value in expected.to_dict().items()} | {"basis": ["aqua"], "own": 1.0}
    if "--k-ratio" in arguments:
        preset = "fast" if "fast" in arguments else "accurate"
        values |= {"k_ratio": [Dummy.preset(preset).k_ratio], "own": float(expected.k_ratio)}
    assert many == values


@pytest.mark.parametrize("command", [single, repeated])
def test_an_unknown_preset_is_refused_by_name(command):
    required = ["--name", "x", "--where", "y"] if command is single else []
    refusal, _ = given(command, *required, "--preset", "best")
    assert str(refusal) == "preset is 'best': it must be one of accurate, fast, small, select, paper"
