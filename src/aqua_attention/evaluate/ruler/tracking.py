# SPDX-License-Identifier: Apache-2.0
"""RULER's variable tracking: a value that is handed on from variable to variable, hidden in noise."""

import random
from itertools import pairwise
from string import ascii_uppercase

from aqua_attention.evaluate.ruler.material import Draw, Material
from aqua_attention.evaluate.ruler.needles import NOISE, in_lines, in_noise
from aqua_attention.evaluate.suites.retrieval import Question, share_found

NEW_TOKENS = 30
"""That an answer may have."""
VARIABLES = 5
"""One that is given the value, and four that each take it from the one before."""
LETTERS, EXAMPLE_LETTERS = 5, 3
"""Of a variable's name, and of one in the example."""
EXAMPLE_NOISE = 3
"""Lines of noise in the example."""


def tracking(material: Material, draw: Draw) -> Question:
    """A question for all variables that have the value, behind an example with its answer."""
    rng = draw.rng
    values = rng.sample(range(10_000, 100_000), 2)
    example_names = _variables(rng, EXAMPLE_LETTERS, "")
    names = _variables(rng, LETTERS, " ".join(example_names))
    example = in_lines([NOISE] * EXAMPLE_NOISE, _chain(example_names, values[0]), rng)
    text = in_noise(_chain(names, values[1]), material, draw)
    shown = f"{_prompt(example, values[0])}\n{_start(values[0])} {' '.join(example_names)}"
    prompt = f"{shown}\n\n{_prompt(text, values[1])}"
    return Question(prompt, _start(values[1]), tuple(names), {}, NEW_TOKENS, share_found)


def _chain(names: list[str], value: int) -> list[str]:
    """The assignments, in their order."""
    return [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]


def _variables(rng: random.Random, letters: int, others: str) -> list[str]:
    """Different names that hold none of the `others`, and are no words of the noise."""
    names: dict[str, None] = {}
    while len(names) < VARIABLES:
        name = "".join(rng.choices(ascii_uppercase, k=letters))
        if name not in NOISE.upper() and not any(other in name for other in others.split()):
            names[name] = None
    return list(names)


def _prompt(text: str, value: int) -> str:
    return (
        "In the text below variables are given values, by a number or by another variable. Follow who has which.\n\n"
        f"{text}\n\nQuestion: which variables have the value {value} in the text above?"
    )


def _start(value: int) -> str:
    return f"Answer: in the text above {VARIABLES} variables have the value {value}, namely:"
