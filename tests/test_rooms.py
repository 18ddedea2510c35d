"""Who imports whom, and that nothing private is imported."""

import ast
from pathlib import Path

import pytest

import soap_optax

PACKAGE = Path(soap_optax.__file__).parent
ROOMS = {
    "_arguments": set(),
    "_layout": set(),
    "_kronecker": {"_layout"},
    "_tree": {"_arguments", "_layout"},
    "_refresh": {"_kronecker", "_layout"},
    "_sharding": {"_arguments", "_layout", "_refresh", "_tree"},
    "_eigenbasis": {
        *("_arguments", "_kronecker", "_layout", "_refresh", "_sharding", "_tree"),
    },
    "_factorized": {"_kronecker", "_sharding", "_tree"},
    "_soap": {"_arguments", "_eigenbasis", "_factorized"},
    "_shampoo": {
        *("_arguments", "_eigenbasis", "_kronecker", "_sharding", "_soap", "_tree"),
    },
    "_diagnostics": {"_arguments", "_eigenbasis", "_kronecker", "_refresh"},
    "__init__": {
        *("_diagnostics", "_eigenbasis", "_layout", "_shampoo", "_sharding", "_soap"),
    },
}
OUTSIDE = {
    "_layout": {
        *("collections", "dataclasses", "itertools", "jax", "math", "operator"),
        "typing",
    },
    "_kronecker": {"collections", "functools", "jax", "math", "numpy", "typing"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "soap_optax":
                yield from (f"soap_optax.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_room_is_listed():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_directions(room):
    names = list(imports(PACKAGE / f"{room}.py"))
    inside = {n.split(".")[1] for n in names if n.startswith("soap_optax.")}
    assert inside <= ROOMS[room]
    outside = {n.split(".")[0] for n in names if not n.startswith("soap_optax")}
    assert outside <= OUTSIDE.get(room, outside)


@pytest.mark.parametrize("folder", ["soap_optax", "tests", "examples"])
def test_nothing_private_of_jax_or_optax(folder):
    for path in (PACKAGE.parent / folder).glob("*.py"):
        assert not any("._src" in name for name in imports(path))


def test_public_names():
    public = {name for name in vars(soap_optax) if not name.startswith("_")}
    assert public == {
        "Diagnostics",
        "DimensionNumbers",
        "EigenbasisState",
        "ShampooState",
        "diagnostics",
        "in_eigenbasis",
        "scale_by_shampoo",
        "scale_by_soap",
        "shampoo",
        "soap",
        "state_sharding",
    }
    for name in public:
        assert getattr(soap_optax, name).__doc__
