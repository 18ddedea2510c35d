"""Benchmarks run and count; what they time is for `make bench`."""

import dataclasses
from pathlib import Path

import jax
import pytest
import results
import small
import steps

TABLES = Path(__file__).parents[1] / "docs" / "results"
# The tables that must be of the code that is there, and the commands that make them.
MADE_BY = {"pods": "make tpu-check", "gpus": "make gpu-check"}


@pytest.mark.slow  # To make a table takes half an hour, and is due before a release.
@pytest.mark.skipif(not TABLES.exists(), reason="the tables are in the repository")
@pytest.mark.parametrize("table", MADE_BY)
def test_a_table_is_of_the_code_that_it_describes(table):
    rows = results.read(TABLES / f"{table}.csv")
    told = {row.get("sources") for row in rows}
    assert told == {results.origin(table)["sources"]}, (
        f"docs/results/{table}.csv is older than the code it describes: run "
        f"`{MADE_BY[table]}` and put its figures into the pages that show them"
    )


def test_every_table_has_sources():
    for table, globs in results.SOURCES.items():
        for glob in globs:
            assert list(results.ROOT.glob(glob)), f"{table}: {glob} finds nothing"


CODE = 'x = 1\n\ndef f(a):\n    return a + "b"\n'


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""A module."""\n\n# A comment.\nx = 1  # Another.\n' + CODE[6:], True),
        (CODE.replace("(a):\n", '(a):\n    """Says more."""\n'), True),
        (CODE.replace('a + "b"', '(\n        a\n        + "b"\n    )'), True),
        (CODE.replace('"b"', '"c"'), False),
        (CODE.replace("x = 1", "x = None"), False),
        (CODE.replace("x = 1", "x: int = 1"), False),
        (CODE.replace("a +", "a -"), False),
    ],
)
def test_code_is_without_comments_docstrings_and_line_breaks(text, same):
    assert (results.code_of(text) == results.code_of(CODE)) == same


def test_a_hash_is_that_of_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "SOURCES", {"table": ("*.py",)})
    hashes = set()
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
        hashes.add(results.origin("table")["sources"])
    (tmp_path / "b.py").write_text("x = 2\n")
    hashes.add(results.origin("table")["sources"])
    assert len(hashes) == 3


def test_layers_in_one_stack_have_the_factors_of_separate_ones():
    stacked = steps.PRESETS["tiny-stacked"]
    sizes = [
        steps.nbytes(jax.eval_shape(steps.soap().init, steps.normal(shape, 0)))
        for shape in (stacked, dataclasses.replace(stacked, stacked=False))
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="names files by backend")
def test_every_part_writes_its_table(tmp_path):
    parts = steps.DEFAULT_PARTS
    rows = ("adamw", "soap", "blocks 256")
    bench = steps.Bench(
        "tiny", rows, parts, 1, tmp_path, sequence=16, batches=(1, 2), layers=(2,)
    )
    steps.main(bench)
    tables = {
        part: results.read(tmp_path / f"bench_tiny_cpu_{part}.csv") for part in parts
    }
    assert [row["optimizer"] for row in tables["steps"]] == list(rows)
    adamw, soap, _ = tables["steps"]
    assert (adamw["qr"], soap["qr"], soap["eigh"]) == ("0", "3", "3")  # 16, 32, 64
    assert float(soap["state_mb"]) > float(adamw["state_mb"])
    assert [row["tokens"] for row in tables["training"]] == ["16", "32"]
    assert len(tables["refreshes"]) == 5
    in_batches, leaf_by_leaf, *_ = tables["compiling"]
    assert (in_batches["qr"], leaf_by_leaf["qr"]) == ("3", "28")
    assert all(row["jax"] == jax.__version__ for t in tables.values() for row in t)
    assert (tmp_path / "bench_tiny_cpu_steps.png").stat().st_size > 0


@pytest.mark.slow
def test_small_models_have_tables(tmp_path):
    small.main(small.Bench(turns=1, steps=3, out=tmp_path))
    device = jax.default_backend()
    loops, ensembles = (
        results.read(tmp_path / f"bench_small_{device}_{part}.csv")
        for part in ("loops", "ensembles")
    )
    assert [row["optimizer"] for row in loops] == list(small.LOOPS)
    assert float(loops[2]["scan_over_soap_without_refreshes"]) == 1
    assert all(float(row["scan_us"]) > 0 for row in loops)
    assert [float(row["members"]) for row in ensembles] == [8, 8]
