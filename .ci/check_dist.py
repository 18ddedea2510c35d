"""Checks what would be published: builds it, installs it and uses it somewhere else.

Run by `make dist-check`. The wheel is built from the source distribution, as by those
who have nothing else, and has to hold every file of the library in this checkout. It is
then installed in an empty environment, and the first example of the README is run there
from another directory, so that the checkout cannot be imported.
"""

import re
import subprocess
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "py.typed",
    "parameters/__init__.py",
    "refresh/__init__.py",
    "mesh/__init__.py",
)
WHERE = "import soap_optax; print(soap_optax.__file__)"


def make_environment(folder: Path, *packages: str) -> Path:
    """Makes a virtual environment with packages; gives its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *packages], check=True)
    return python


def build(folder: Path) -> Path:
    """Builds the source distribution, and from that the wheel; gives the wheel."""
    python = make_environment(folder / "build", "build")
    # Without --sdist and --wheel the wheel is built from the source distribution.
    dist = folder / "dist"
    subprocess.run([python, "-m", "build", "--outdir", dist, ROOT], check=True)
    (source,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    print(f"built {source.name} and from it {wheel.name}")
    return wheel


def check_files(wheel: Path) -> None:
    """Checks that the wheel holds the whole library, and nothing beside it."""
    library = ROOT / "soap_optax"
    files = {path for path in library.rglob("*") if path.suffix in (".py", ".typed")}
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    missing = {f"soap_optax/{part}" for part in PARTS} - expected
    assert not missing, f"the checkout lacks {sorted(missing)}"
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == expected, f"the wheel differs in {sorted(packed ^ expected)}"
    print(f"the wheel holds the {len(packed)} files of the library")


def check_example(wheel: Path, folder: Path) -> None:
    """Runs the README's first example with the wheel and its dependencies alone."""
    python = make_environment(folder / "empty", str(wheel))
    # -I leaves PYTHONPATH and the working directory out of the places of modules.
    isolated = [python, "-I", "-c"]
    where = subprocess.check_output([*isolated, WHERE], cwd=folder, text=True).strip()
    assert Path(where).is_relative_to(folder / "empty"), f"{where} was imported"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)[0]
    assert "soap_optax" in example
    subprocess.run([*isolated, example], cwd=folder, check=True)
    print("the first example of the README runs with the wheel alone")


def main() -> None:
    """Does all of it in a folder that is removed in the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        wheel = build(folder)
        check_files(wheel)
        check_example(wheel, folder)


if __name__ == "__main__":
    main()
