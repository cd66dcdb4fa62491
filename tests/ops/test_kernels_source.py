# SPDX-License-Identifier: Apache-2.0
"""What the source of kernels must not have, because an older triton that we take does not compile it."""

import ast
from pathlib import Path

import aqua_attention.ops.backends.triton as package

JIT = {"triton.jit", "gluon.jit"}


def kernels():
    """(file, function) of all that is compiled for a GPU."""
    for path in sorted(Path(package.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and JIT & {ast.unparse(each) for each in node.decorator_list}:
                yield path.name, node


def nested(function):
    """Lines in which tuples within tuples are unpacked."""
    targets = (target for each in ast.walk(function) if isinstance(each, ast.Assign) for target in each.targets)
    return [
        target.lineno
        for target in targets
        if isinstance(target, ast.Tuple) and any(isinstance(part, ast.Tuple) for part in target.elts)
    ]


def test_no_kernel_unpacks_tuples_within_tuples():
    """triton 3.6 fails on it, with an error that does not say where."""
    found = list(kernels())
    assert len(found) > 50
    assert [(name, lines) for name, function in found if (lines := nested(function))] == []


def test_they_would_be_found():
    (function,) = ast.parse("def kernel():\n    (a, b), c = one, two\n").body
    assert nested(function) == [2]
