"""Which cases of a test run each time, and which only with `make test-slow`.

A case that is a tuple has a value for each argument.
"""

import pytest


def slow(*cases):
    """Cases for `make test-slow` alone."""
    return [_case(case, in_every_run=False) for case in cases]


def some(cases, every_run):
    """Cases of which only `every_run` runs each time."""
    cases = list(cases)
    assert all(case in cases for case in every_run)
    return [_case(case, case in every_run) for case in cases]


def named(cases, *every_run):
    """The values of a dictionary, by name; only those named run each time."""
    assert set(every_run) <= set(cases)
    return [_case(case, name in every_run, name) for name, case in cases.items()]


def _case(case, in_every_run, name=None):
    values = case if isinstance(case, tuple) else (case,)
    marks = () if in_every_run else pytest.mark.slow
    return pytest.param(*values, id=name, marks=marks)
