"""What the experiments share: runs that are kept, and tables that name the machine."""

import ast
import concurrent.futures
import csv
import hashlib
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

Row = dict[str, Any]


def machine() -> dict[str, str]:
    """The machine, the versions and the dtype, which stand in every row of a table."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "dtype": "float32",
    }


def processor() -> str:
    """The name of the processor, which Linux keeps in a file of its own."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


ROOT = Path(__file__).parent.parent
# The modules whose programs are in a table, so that it is out of date when they change.
# The table and the command that makes it have equal names.
SOURCES = {
    "pods": (
        "soap_optax/**/*.py",
        "examples/train_lm.py",
        "experiments/recipes.py",
        "benchmarks/pods.py",
        "benchmarks/programs.py",
    ),
    "gpus": (
        "soap_optax/**/*.py",
        "examples/train_lm.py",
        "benchmarks/gpus.py",
        "benchmarks/kernels.py",
        "benchmarks/programs.py",
        "benchmarks/small.py",
        "benchmarks/steps.py",
    ),
}


def origin(table: str) -> dict[str, str]:
    """The commit, and a hash of the code that a table in `SOURCES` is made from.

    The hash changes with the code of the modules, and not with their comments,
    docstrings and line breaks. It is the same for all versions of Python.
    """
    paths = sorted(path for glob in SOURCES[table] for path in ROOT.glob(glob))
    codes = {
        path.relative_to(ROOT).as_posix(): code_of(path.read_text(encoding="utf-8"))
        for path in paths
    }
    digest = hashlib.sha256(repr(codes).encode()).hexdigest()
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip() or "unknown", "sources": digest[:12]}


def code_of(text: str) -> str:
    """The syntax tree of a module without strings that are statements, as a text.

    `ast.dump` would write empty fields, which differ between versions of Python.
    """

    def write(node: Any) -> Any:
        if isinstance(node, list):
            return [write(item) for item in node if not is_docstring(item)]
        if isinstance(node, ast.Constant):
            return repr(node.value)
        if not isinstance(node, ast.AST):
            return node
        fields = ((name, value) for name, value in ast.iter_fields(node))
        return type(node).__name__, [
            (name, write(value)) for name, value in fields if value not in (None, [])
        ]

    def is_docstring(node: Any) -> bool:
        value = node.value if isinstance(node, ast.Expr) else None
        return isinstance(value, ast.Constant) and isinstance(value.value, str)

    return repr(write(ast.parse(text)))


def show(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, (float, np.floating)) else str(value)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    """Writes a table all at once, so that a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    draft = path.with_suffix(f".{os.getpid()}.part")  # Other commands may write it.
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows({k: show(v) for k, v in row.items()} for row in rows)
    draft.replace(path)


def require_known(option: str, given: Iterable[str], known: Collection[str]) -> None:
    """Ends the program with an error if anything `given` is not `known`."""
    if unknown := [name for name in given if name not in known]:
        names = ", ".join(known)
        sys.exit(f"error: --{option} must be of {names}, got {', '.join(unknown)}")


def report(
    rows: Iterable[Row], path: Path, about: Mapping[str, str] | None = None
) -> list[Row]:
    """Prints rows as they come, and writes all that have come into a table.

    Args:
      rows: of the table.
      path: of the file.
      about: further columns, the same in every row; None: `machine()`.

    Returns:
      The rows.
    """
    about = machine() if about is None else about
    found: list[Row] = []
    for row in rows:
        found.append(row)
        print("  ".join(f"{k} {show(v)}" for k, v in row.items()), flush=True)
        write(path, [{**row, **about} for row in found])
    return found


def run_all(
    function: Callable[[Any], list[Row]], jobs: Mapping[str, Any], folder: Path
) -> dict[str, list[dict[str, str]]]:
    """The rows of each job, as they stand in `<folder>/<name>.csv`.

    Jobs without a file are run, as many at a time as there are cores. Each has a
    process on a core of its own, so that they do not wait for one another. On an
    accelerator, or where a process cannot be kept on a core, one job follows another.
    """
    missing = [name for name in jobs if not (folder / f"{name}.csv").exists()]
    on_cpu = jax.default_backend() == "cpu" and hasattr(os, "sched_setaffinity")
    if missing and on_cpu:
        # The processes inherit this before they load LAPACK: a core has one thread.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        cores = multiprocessing.get_context("spawn").SimpleQueue()
        available = sorted(os.sched_getaffinity(0))
        for core in available:
            cores.put(core)
        with concurrent.futures.ProcessPoolExecutor(
            len(available), multiprocessing.get_context("spawn"), _stay_on, (cores,)
        ) as pool:
            pending = {
                pool.submit(_run, function, jobs[name], folder / f"{name}.csv"): name
                for name in missing
            }
            for done in concurrent.futures.as_completed(pending):
                done.result()
                print(f"{pending[done]}: done", file=sys.stderr)
    elif missing:
        for name in missing:
            _run(function, jobs[name], folder / f"{name}.csv")
    return {name: read(folder / f"{name}.csv") for name in jobs}


def _stay_on(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})


def _run(function: Callable[[Any], list[Row]], job: Any, path: Path) -> None:
    if not path.exists():  # Another command may have run it meanwhile.
        write(path, function(job))
