"""Checks what would be published: builds it, installs it and uses it somewhere else.

`make dist-check` builds the source distribution, and the wheel from that, as those do
who have nothing else. The wheel has to hold every file of the library in this checkout,
and the page that a package index makes of the README has to be whole without the rest
of the repository. The first example of the README is run in an empty environment.

`make release-check TAG=v1.2.3` also compares the tag with the version, looks for a
dated entry in the changelog, and runs all examples of the README and of docstrings with
the oldest JAX and optax that are supported and with the newest for this Python. What it
built is in dist/.
"""

import argparse
import email
import re
import shutil
import subprocess
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "py.typed",
    "parameters/__init__.py",
    "refresh/__init__.py",
    "mesh/__init__.py",
)
WHERE = "import soap_optax; print(soap_optax.__file__)"
DOCTESTS = """
import doctest, importlib, pkgutil, soap_optax
names = [m.name for m in pkgutil.walk_packages(soap_optax.__path__, "soap_optax.")]
results = [doctest.testmod(importlib.import_module(name)) for name in names]
tried, failed = (sum(r[i] for r in results) for i in (1, 0))
assert tried and not failed, f"{failed} of {tried} lines failed"
print(f"{tried} lines of examples in docstrings run")
"""


def make_environment(folder: Path, *packages: str) -> Path:
    """Makes a virtual environment with packages; gives its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *packages], check=True)
    return python


def build(folder: Path) -> Path:
    """Builds the source distribution, and from that the wheel; gives the wheel."""
    python = make_environment(folder / "build", "build", "twine")
    # Without --sdist and --wheel the wheel is built from the source distribution.
    dist = folder / "dist"
    subprocess.run([python, "-m", "build", "--outdir", dist, ROOT], check=True)
    checked = [*dist.iterdir()]
    subprocess.run([python, "-m", "twine", "check", "--strict", *checked], check=True)
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


def check_page(wheel: Path) -> str:
    """Checks the text for a package index, and gives the version."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    about = email.message_from_bytes(archive.read(name))
    page = str(about.get_payload())
    assert page.count("\n## ") > 2, "the README is not in the metadata"
    broken = re.findall(r"\]\((?!https?://)[^)]*\)|\bsrc=\"(?!https?://)[^\"]*", page)
    assert not broken, f"these links need the repository: {broken}"
    print("no link or picture of the README needs the repository")
    return about["Version"]


def examples() -> list[str]:
    """The programs in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert found and "soap_optax" in found[0]
    return found


def check_examples(
    wheel: Path, folder: Path, programs: list[str], packages: Sequence[str] = ()
) -> None:
    """Runs programs with the wheel, its dependencies and these packages alone."""
    python = make_environment(folder, str(wheel), *packages)
    # -I leaves PYTHONPATH and the working directory out of the places of modules.
    isolated = [python, "-I", "-c"]
    where = subprocess.check_output([*isolated, WHERE], cwd=folder, text=True).strip()
    assert Path(where).is_relative_to(folder), f"{where} was imported"
    for program in programs:
        subprocess.run([*isolated, program], cwd=folder, check=True)
    which = ", ".join(packages) or "its dependencies"
    print(f"{len(programs)} programs run with the wheel and {which}")


def check_release(
    wheel: Path, folder: Path, version: str, tag: str, oldest: list[str]
) -> None:
    """Checks what only a release needs."""
    assert tag == f"v{version}", f"the tag {tag} must be v{version}, after the version"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation, (
        f'CITATION.cff must have "version: {version}"'
    )
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entry = re.search(r"^## (.*)", changelog, re.M)
    dated = rf"{re.escape(version)} \(\d{{4}}-\d{{2}}-\d{{2}}\)"
    assert entry and re.fullmatch(dated, entry[1]), (
        f'CHANGELOG.md must begin with "## {version} (<year>-<month>-<day>)", '
        f'got "## {entry and entry[1]}"'
    )
    programs = [*examples(), DOCTESTS]
    check_examples(wheel, folder / "oldest", programs, oldest)
    check_examples(wheel, folder / "newest", programs)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    shutil.copytree(wheel.parent, ROOT / "dist")


def main() -> None:
    """Does all of it in a folder that is removed in the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", metavar="TAG", help="check a release of this tag")
    parser.add_argument("--oldest", nargs="*", default=[], help="versions to try, too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        wheel = build(folder)
        check_files(wheel)
        version = check_page(wheel)
        if asked.release is None:
            check_examples(wheel, folder / "empty", examples()[:1])
        else:
            check_release(wheel, folder, version, asked.release, asked.oldest)


if __name__ == "__main__":
    main()
