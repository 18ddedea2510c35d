"""A type checker tells callers which option they misspelt or gave a wrong type.

Each caller is a call and the name of the option that mypy must report, None for a call
that is correct.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CALLERS = {
    "misspelt": ("soap_optax.soap(1e-3, blok_size=4)", "blok_size"),
    "wrong_type": ('soap_optax.soap(1e-3, block_size="4")', "block_size"),
    "of_another": ('soap_optax.shampoo(1e-3, basis="current")', "basis"),
    "wrong_choice": ('soap_optax.scale_by_soap(basis="next")', "basis"),
    "correct": (
        "soap_optax.soap(1e-3, block_size=4, basis='current', refresh='eigh')\n"
        "soap_optax.scale_by_soap(refresh=soap_optax.QR(), max_precond_dim=None)\n"
        "soap_optax.shampoo(1e-3, power=0.5, precond_dtype='bfloat16')",
        None,
    ),
}


def run_mypy(files):
    """Checks all files at once, with the options and the cache of `make lint`.

    Without a cache, reading JAX takes nearly all of the time.
    """
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-pretty", *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_each_wrong_call_is_one_error_with_the_name_of_its_option(tmp_path):
    files = {name: tmp_path / f"{name}.py" for name in CALLERS}
    for name, (call, _) in CALLERS.items():
        files[name].write_text(f"import soap_optax\n\n{call}\n")
    lines = run_mypy(files.values())
    for name, (_, option) in CALLERS.items():
        reported = [line for line in lines if f"{name}.py:" in line]
        errors = [line for line in reported if " error: " in line]
        if option is None:
            assert reported == []
        else:
            assert len(errors) == 1, reported
            assert f'"{option}"' in errors[0]
