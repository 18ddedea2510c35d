"""Who imports whom, and that nothing private is imported."""

import ast
import re
from pathlib import Path

import pytest

import soap_optax

PACKAGE = Path(soap_optax.__file__).parent

# Each room, from the ground up, and the rooms that it imports: those below it.
ROOMS = {
    "_arguments": set(),
    "_dtypes": set(),
    "_triangles": set(),
    "mesh._mesh": {"_arguments"},
    "refresh._methods": {"_arguments", "_dtypes"},
    "refresh._members": set(),
    "refresh._clock": {"refresh._members"},
    "_options": {"_arguments", "refresh._methods"},
    "parameters._layout": {"_options", "mesh._mesh"},
    "parameters._tree": {
        "_arguments",
        "_dtypes",
        "_options",
        "mesh._mesh",
        "parameters._layout",
    },
    "_kronecker": {"_dtypes", "_triangles", "mesh._mesh", "parameters._layout"},
    "mesh._placement": {
        "_arguments",
        "mesh._mesh",
        "parameters._layout",
        "parameters._tree",
    },
    "parameters._matrices": {
        "_arguments",
        "parameters._layout",
        "parameters._tree",
    },
    "refresh._stacks": {
        "_dtypes",
        "_kronecker",
        "_triangles",
        "mesh._mesh",
        "parameters._layout",
        "refresh._clock",
        "refresh._members",
        "refresh._methods",
    },
    "mesh._spread": {
        "_kronecker",
        "mesh._mesh",
        "mesh._placement",
        "parameters._layout",
        "parameters._tree",
        "refresh._clock",
        "refresh._methods",
        "refresh._stacks",
    },
    "_moments": {"_kronecker", "parameters._tree"},
    "_state": {
        "_arguments",
        "_dtypes",
        "_options",
        "_triangles",
        "mesh._mesh",
        "mesh._placement",
        "parameters._tree",
    },
    "_eigenbasis": {
        "_arguments",
        "_dtypes",
        "_kronecker",
        "_moments",
        "_options",
        "_state",
        "mesh._mesh",
        "mesh._placement",
        "mesh._spread",
        "parameters._tree",
        "refresh._clock",
        "refresh._methods",
        "refresh._stacks",
    },
    "_chain": {"_arguments", "_options", "parameters._tree"},
    "_hyperball": {"_arguments", "_chain", "_options", "parameters._tree"},
    "_inner": {
        "_arguments",
        "_kronecker",
        "mesh._mesh",
        "mesh._placement",
        "parameters._tree",
    },
    "_soap": {
        "_arguments",
        "_chain",
        "_eigenbasis",
        "_inner",
        "_moments",
        "_options",
    },
    "_shampoo": {
        "_arguments",
        "_chain",
        "_eigenbasis",
        "_inner",
        "_kronecker",
        "_options",
        "_state",
        "mesh._placement",
        "parameters._tree",
    },
    "_diagnostics": {
        "_arguments",
        "_state",
        "_triangles",
        "mesh._mesh",
        "refresh._methods",
        "refresh._stacks",
    },
}
FACES = {
    "__init__": {
        "_diagnostics",
        "_eigenbasis",
        "_hyperball",
        "_shampoo",
        "_soap",
        "_state",
        "mesh._placement",
        "parameters._layout",
        "parameters._matrices",
        "refresh._methods",
    },
    "mesh.__init__": set(),
    "parameters.__init__": set(),
    "refresh.__init__": {"refresh._methods"},
}

# JAX's interface for meshes, which only one room uses.
OF_MESHES = re.compile(
    r"AbstractMesh|AxisType|abstract_mesh|auto_axes|reshard|shard_map\(|"
    r"with_sharding_constraint|\.sharding\.mesh\.axis"
)


def path_of(room):
    return PACKAGE / f"{room.replace('.', '/')}.py"


def imports(path):
    """The names of all modules that a file imports, in full."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if any(room_of(f"{node.module}.{alias.name}") for alias in node.names):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def room_of(name):
    """The room that a module of this name is, or None."""
    room = name.removeprefix("soap_optax.")
    return room if room in ROOMS and room != name else None


def test_every_room_is_listed():
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    rooms = {".".join(file.with_suffix("").parts) for file in files}
    assert rooms == set(ROOMS) | set(FACES)


@pytest.mark.parametrize("room", [*ROOMS, *FACES])
def test_what_a_room_imports(room):
    names = list(imports(path_of(room)))
    inside = {room_of(name) for name in names if name.startswith("soap_optax")}
    # `from soap_optax.refresh import METHODS` is by the face of a room.
    if "soap_optax.refresh" in names:
        inside |= {"refresh._methods"}
    assert inside - {None} == {**ROOMS, **FACES}[room]


def test_rooms_import_only_what_is_below():
    rooms = list(ROOMS)
    for room, below in ROOMS.items():
        assert below <= set(rooms[: rooms.index(room)]), room


@pytest.mark.parametrize("room", ROOMS)
def test_one_room_talks_to_jax_about_meshes(room):
    code = path_of(room).read_text()
    docstrings = [
        ast.get_docstring(node, clean=False) or ""
        for node in ast.walk(ast.parse(code))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]
    for text in docstrings:
        code = code.replace(text, "")
    assert bool(OF_MESHES.search(code)) == (room == "mesh._mesh")


@pytest.mark.parametrize("folder", ["soap_optax", "tests", "examples", "benchmarks"])
def test_nothing_private_of_jax_or_optax(folder):
    for path in (PACKAGE.parent / folder).rglob("*.py"):
        assert not any("._src" in name for name in imports(path)), path
