# SPDX-License-Identifier: Apache-2.0
"""Cells of tables: text with figures of a record in braces, such as `{change:+%} ({kl})` or `{dense / aqua:.2f}`.

Numbers are decimals, so that a figure keeps the digits that were recorded: `0.20` is not written as `0.2`, and
`{change:+%}` writes `0.0020` as `+0.20%`. What is computed from figures names its digits: `{dense / aqua:.2f}`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

_BRACES = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max}


class Wrong(Exception):
    """What is wrong with a record or a page, in one line."""


class Absent(Exception):
    """The figure that a cell names is not there, or null."""


def expressions(cell: str) -> list[str]:
    """What stands between braces."""
    return [each[1] for each in _BRACES.finditer(cell)]


def written(cell: str, names: Mapping[str, Any]) -> str:
    """A cell with its figures.

    Raises:
        Absent: a figure is not there.
        Wrong: an expression that is none.
    """
    return _BRACES.sub(lambda each: _text(value(each[1], names), each[2] or ""), cell)


def value(expression: str, names: Mapping[str, Any]) -> Any:
    """What an expression comes to: names, `record.row["name"].figure`, + - * /, min and max."""
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body, names)
    except (SyntaxError, TypeError, ArithmeticError) as error:
        raise Wrong(f"{{{expression}}}: {error}") from error


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Decimal(str(number))
        case ast.Name(id=name):
            return _of(names, name)
        case ast.Attribute(value=whole, attr=name) | ast.Subscript(value=whole, slice=ast.Constant(value=name)):
            return _of(_value(whole, names), str(name))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.Call(func=ast.Name(id=name), args=given, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_value(each, names) for each in given)
    raise Wrong(f"{ast.unparse(node)}: only names, + - * /, min and max are known")


def _of(whole: Any, name: str) -> Any:
    found = whole.get(name) if isinstance(whole, Mapping) else None
    if found is None:
        raise Absent(name)
    return found


def _text(found: Any, form: str) -> str:
    if isinstance(found, Decimal):
        return format(found, form or "f")
    if form or not isinstance(found, str):
        raise Wrong(f"{found!r} is no figure to be written as {form!r}")
    return found


def names_in(cell: str) -> set[str]:
    """What the expressions of a cell begin with: fields of a row, or records."""
    trees = (ast.walk(ast.parse(each.strip(), mode="eval")) for each in expressions(cell))
    return {node.id for tree in trees for node in tree if isinstance(node, ast.Name)} - _FUNCTIONS.keys()
