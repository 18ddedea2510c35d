"""Rules of style that ruff lacks: short functions, and calls that spread no literal.

The lines of its own of a function are those from `def` to its end without its docstring
and without the functions inside it.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ("soap_optax", "examples", "benchmarks", "experiments")
LIMIT = 40
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules(*folders):
    """Parses all modules of some folders; gives the path and the tree of each."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def lines(node):
    """Gives the numbers of the lines of a node, those of its decorators included."""
    begin = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return set(range(begin, node.end_lineno + 1))


def own_length(function):
    own = set(range(function.lineno, function.end_lineno + 1))
    if ast.get_docstring(function) is not None:
        own -= lines(function.body[0])
    for node in ast.walk(function):
        if isinstance(node, FUNCTIONS) and node is not function:
            own -= lines(node)
    return len(own)


def long_functions(tree):
    """Finds the functions over the limit: line, name, length."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and own_length(node) > LIMIT:
            yield node.lineno, node.name, own_length(node)


def spread_literals(tree):
    """Finds calls such as `f(x, *(a, b))`: line and text of what is spread."""
    for call in ast.walk(tree):
        for argument in getattr(call, "args", []) if isinstance(call, ast.Call) else []:
            if isinstance(argument, ast.Starred) and isinstance(
                argument.value, (ast.Tuple, ast.List)
            ):
                yield argument.lineno, ast.unparse(argument)


def test_functions_are_short():
    found = [
        f"{path}:{line}: {name} has {length} lines of its own"
        for path, tree in modules(*LIBRARY)
        for line, name, length in long_functions(tree)
    ]
    assert not found, f"functions over {LIMIT} lines:\n" + "\n".join(found)


def test_no_call_spreads_a_literal():
    found = [
        f"{path}:{line}: {text}"
        for path, tree in modules(*LIBRARY, "tests")
        for line, text in spread_literals(tree)
    ]
    assert not found, "bind these to short names first:\n" + "\n".join(found)


def function_of(length):
    """Makes a function with a docstring, a function inside and `length` own lines."""
    own = ["    x = 1\n"] * (length - 1)
    inner = ["    @staticmethod\n", "    def g():\n", *["        y = 2\n"] * 50]
    return "".join(["def f():\n", '    """Does\n\n    nothing."""\n', *inner, *own])


@pytest.mark.parametrize(("length", "expected"), [(40, []), (41, [(1, "f", 41)])])
def test_own_lines_are_counted(length, expected):
    tree = ast.parse(function_of(length))
    assert [found for found in long_functions(tree) if found[1] == "f"] == expected


def test_what_is_a_spread_literal():
    tree = ast.parse("f(a, *(b, c))\ng(*[d], *e)\nh(*map(i, j))\nk = [*(l, m)]\n")
    assert list(spread_literals(tree)) == [(1, "*(b, c)"), (2, "*[d]")]
