"""What all benchmarks read off a compiled program: seconds, memory and its text.

XLA promises no format of its text. Where the text is not as it was when a function that
reads it was written, the function raises an `UnexpectedTextError`, which says what it
looked for and shows the place. So a count of zero means that there is nothing to count.
"""

import math
import re
import time
from collections.abc import Iterable
from typing import Any

# The instructions of XLA by which devices exchange arrays.
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
)
# The kinds of decompositions, and a part of the name by which each is called.
DECOMPOSITIONS = {"qr": "geqrf", "eigh": "syev", "cholesky": "potrf"}


class UnexpectedTextError(ValueError):
    """The text of a program that is not as a benchmark expects it."""

    def __init__(self, wanted: str, text: str):
        shown = text.strip()[:400] or "an empty text"
        super().__init__(f"the text of the program must have {wanted}, got: {shown}")


def timed_trace(jitted: Any, *args: Any, **options: Any) -> tuple[float, Any]:
    """Seconds of tracing and lowering (`trace_s` in all tables), and what is lowered.

    Args:
      jitted: a function made by `jax.jit`.
      *args: its arguments, or their shapes.
      **options: of `lower`, like the platforms.
    """
    since = time.perf_counter()
    lowered = jitted.trace(*args).lower(**options)
    return time.perf_counter() - since, lowered


def timed_compile(lowered: Any) -> tuple[float, Any]:
    """Seconds of compiling (`compile_s` in all tables), and the program.

    Tracing and lowering are over before, so they are not in these seconds.
    """
    since = time.perf_counter()
    program = lowered.compile()
    return time.perf_counter() - since, program


def memory_of(program: Any) -> Any:
    """The memory that XLA plans for a program, as `jax.stages.Compiled` tells it."""
    memory = program.memory_analysis()
    if memory is None or not hasattr(memory, "temp_size_in_bytes"):
        raise ValueError(
            "memory_analysis() of the program must have temp_size_in_bytes, got "
            f"{memory}"
        )
    return memory


def decompositions(text: str) -> dict[str, int]:
    """How many decompositions of each kind are in the text of a program."""
    names = []
    for line in _lines(text):
        if " custom-call(" in line:
            target = re.search(r'custom_call_target="([^"]+)"', line)
            if target is None:
                raise UnexpectedTextError(
                    "a custom_call_target in each custom call", line
                )
            names.append(target[1].lower())
    return {
        kind: sum(part in name for name in names)
        for kind, part in DECOMPOSITIONS.items()
    }


def computations(text: str) -> dict[str, str]:
    """The lines of each computation of a program by its name, the main one as ENTRY."""
    found = {}
    pattern = r"^(ENTRY )?%?(\S+) \(.*?\{\n(.*?)^\}"
    for entry, name, lines in re.findall(pattern, text, re.M | re.S):
        found["ENTRY" if entry else name] = lines
    if "ENTRY" not in found:
        raise UnexpectedTextError("a computation that starts with ENTRY", text)
    return found


def _lines(text: str) -> list[str]:
    """The lines of a text that has a main computation."""
    if not re.search(r"^ENTRY ", text, re.M):
        raise UnexpectedTextError("a computation that starts with ENTRY", text)
    return text.splitlines()


def copied_bytes(text: str) -> int:
    """Bytes of floats that an update without refresh copies.

    They are copied in the main computation, in the branch that is a step and in the
    branch that keeps the eigenbases. SOAP has two conditionals of two branches: whether
    it is the first step, and whether a refresh is due. Adam has none.
    """
    parts = computations(text)
    entry = parts["ENTRY"]
    conditionals = [line for line in entry.splitlines() if " conditional(" in line]
    chosen = [branches(line) for line in conditionals]
    run = [entry]
    if chosen:
        if len(chosen) != 2 or any(len(names) != 2 for names in chosen):
            wanted = "two conditionals of two branches in its main computation"
            raise UnexpectedTextError(wanted, "\n".join(conditionals))
        (_, step), (keep, _) = chosen
        run += [parts[step], parts[keep]]
    return sum(_bytes_copied(line) for part in run for line in part.splitlines())


def branches(line: str) -> list[str]:
    """The names of the computations that an instruction chooses from, if it does."""
    if " conditional(" not in line:
        return []
    listed = re.search(r"branch_computations=\{([^}]+)\}", line)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    named = [
        re.search(rf"{truth}_computation=%?([\w.-]+)", line)
        for truth in ("false", "true")
    ]
    if None in named:
        raise UnexpectedTextError("computations in each conditional", line)
    return [found[1] for found in named]  # type: ignore[index]


def _bytes_copied(line: str) -> int:
    """Bytes of what an instruction copies if that are floats, else 0.

    Some versions of XLA wrap copies in fusions, which are named after them.
    """
    copy = re.search(r" copy(-start)?\(| fusion\(.*calls=%?wrapped_copy", line)
    if copy is None:
        return 0
    result = line[: copy.start()].partition("= ")[2]
    dtype, dims = _arrays(result, line)[0]
    return _bytes(dtype, dims) if dtype[0] in "fb" else 0


def collectives(text: str) -> dict[str, Any]:
    """How many collectives of each kind a program has, and the bytes of their results.

    A collective in the body of a loop, like that over layers, counts once. XLA can
    spread a collective over the work that hides it, and then writes it several times,
    with one channel and one result. It counts once, too.
    """
    found: dict[Any, tuple[str, int]] = {}
    for number, line in enumerate(_lines(text)):
        match = re.search(rf" ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if match is None:
            continue
        kind, start = match.groups()
        arrays = [
            array
            for array in _arrays(line[: match.start()].partition("= ")[2], line)
            if array != ("u32", "")  # -start passes them on to its -done
        ]
        if start and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :]  # the first half are the operands
        channel = re.search(r"channel_id=(\d+)", line)
        key = (kind, channel[1], *arrays) if channel else number
        found[key] = kind, sum(_bytes(dtype, dims) for dtype, dims in arrays)
    return _by_kind("collectives", found.values())


def between_slices(text: str) -> dict[str, Any]:
    """What a program of several TPU slices exchanges between them, as `collectives`.

    The text is that of one slice. Its collectives are within the slice, and what it
    receives from other slices it receives through its host.
    """
    found = []
    for line in _lines(text):
        match = re.search(r" recv\(", line)
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
        if match and kind:
            dtype, dims = _arrays(line[: match.start()].partition("= ")[2], line)[0]
            found.append((kind[1].lower().replace("_", "-"), _bytes(dtype, dims)))
    return _by_kind("between_slices", found)


def _by_kind(name: str, found: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """Columns of a table for exchanges, of each of which kind and bytes are given."""
    sizes: dict[str, list[int]] = {}
    for kind, size in found:
        sizes.setdefault(kind, []).append(size)
    texts = [
        f"{len(sizes[kind])} {kind} of {sum(sizes[kind]) / 1e6:.4g} MB"
        for kind in sorted(sizes)
    ]
    total = sum(map(sum, sizes.values()))
    return {name: "; ".join(texts) or 0, f"{name}_mb": total / 1e6}


def _arrays(result: str, line: str) -> list[tuple[str, str]]:
    """The dtype and the dimensions of each array in a result like `f32[8,16]{1,0}`."""
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", result)
    if not arrays:
        raise UnexpectedTextError(
            "the shapes of its results before an instruction", line
        )
    return arrays


def _bytes(dtype: str, dims: str) -> int:
    """Bytes of an array; a dtype of less than a byte takes one for each element."""
    count = math.prod(int(n) for n in dims.split(",") if n)
    if dtype == "pred":
        return count
    bits = re.match(r"[a-z]+(\d+)", dtype)
    if bits is None:
        raise UnexpectedTextError(
            "a dtype with its bits, like bf16", f"{dtype}[{dims}]"
        )
    return count * max(1, int(bits[1]) // 8)
