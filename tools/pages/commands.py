# SPDX-License-Identifier: Apache-2.0
"""Commands in shell blocks and between backticks: they exist, and take the options that they are given."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from aqua_attention.config import AquaConfig
from pages.files import ROOT, Block, without_code

FOREIGN = {"git", "mkdir", "cd", "pip", "vllm"}
"""Programs that are not ours."""
OUR_VARIABLES = ("AQUA_PROJECTIONS", "AQUA_CONFIG", "AQUA_ALLOW_UNTESTED_VLLM", "AQUA_CACHE_DIR")


def lines(block: Block) -> list[list[str]]:
    """The commands of a shell block as words."""
    code = re.sub(r"\\\n\s*", " ", block.code)
    code = re.sub(r"<[\w ]+>", "PLACE", code)
    commands = (part for line in code.splitlines() for part in _split(shlex.split(line, comments=True)))
    return [words for words in commands if words]


def _split(words: list[str]) -> Iterator[list[str]]:
    """At `&&`."""
    found: list[str] = []
    for word in words:
        if word == "&&":
            yield found
            found = []
        else:
            found.append(word)
    yield found


def wrong(words: list[str]) -> str | None:
    """What is wrong with a command; None when nothing is."""
    words = words[1:] if words[0] == "export" else words
    while words and re.match(r"\w+=", words[0]):
        name, _, value = words[0].partition("=")
        words = words[1:]
        if name.startswith("AQUA_") and name not in OUR_VARIABLES:
            return f"there is no variable {name}"
        if name == "AQUA_CONFIG":
            AquaConfig.of(json.loads(value) if value.startswith("{") else value)
    if not words or words[0] in FOREIGN:
        return None
    program, *given = words
    if program == "aqua":
        return _wrong_aqua(given)
    if program == "make":
        return _wrong_make(given)
    if program.rpartition("/")[2] == "python":
        return _wrong_python(given)
    return None if (ROOT / program).parts[len(ROOT.parts)] == ".venv" else f"{program} is not known"


def command_of(given: list[str]) -> tuple[Any, list[str]]:
    """The command that `aqua GIVEN` names, or the last group, and the words behind it."""
    from aqua_attention.cli.main import app

    command, rest = typer.main.get_command(app), list(given)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    return command, rest


def _wrong_aqua(given: list[str]) -> str | None:
    command, rest = command_of(given)
    if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        return f"aqua {' '.join(given)}: there is no command {rest[0]}"
    try:
        command.make_context(command.name, rest)
    except Exception as error:  # typer's own, from its copy of click
        if type(error).__name__ in ("Exit", "NoArgsIsHelpError"):
            return None
        return f"aqua {' '.join(given)}: {getattr(error, 'message', error)}"
    return None


def _wrong_make(given: list[str]) -> str | None:
    targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing = [word for word in given if "=" not in word and word not in targets]
    return f"the Makefile has no {missing[0]}" if missing else None


def _wrong_python(given: list[str]) -> str | None:
    script = ROOT / given[0]
    if given[0] == "-m":
        return None
    if not script.exists():
        return f"there is no {given[0]}"
    source = script.read_text()
    unknown = [word for word in given[1:] if word.startswith("--") and f'"{word}"' not in source]
    return f"{given[0]} has no {unknown[0]}" if unknown else None


def mentioned(path: Path) -> list[str]:
    """Commands of ours between backticks."""
    return re.findall(r"`(aqua [^`]+)`", without_code(path.read_text()))


def wrong_mention(text: str) -> str | None:
    """What is wrong with a command that is mentioned, perhaps without all that it needs; None when nothing is."""
    command, rest = command_of(re.sub(r"\s+", " ", text).split(" ")[1:])
    if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        return f"{text}: there is no command {rest[0]}"
    known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
    unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word not in known]
    is_passed_on = command.name == "lm-eval"
    return f"{text}: there is no option {unknown[0]}" if unknown and not is_passed_on else None
