"""How many kernels a GPU starts for a program, read off the text of the program."""

import re

from programs import UnexpectedTextError, branches


def of_a_step(parts: dict[str, str]) -> dict[str, int]:
    """The kernels of an update with a refresh, if it has any, and without.

    The last conditional of an update is whether a refresh is due.

    Args:
      parts: the computations of the update, as `programs.computations` gives them.
    """
    at_most = kernels(parts, "ENTRY")
    choices = [
        names for line in parts["ENTRY"].splitlines() if (names := branches(line))
    ]
    if not choices:
        return {"kernels": at_most}
    keep, refresh = (kernels(parts, name) for name in choices[-1])
    return {"kernels": at_most - refresh + keep, "kernels_with_refresh": at_most}


# Instructions that start no kernel: they name, group or choose what others compute.
_NO_KERNEL = (
    "parameter|constant|tuple|get-tuple-element|bitcast|conditional|while|call|.*-done"
)


def kernels(parts: dict[str, str], name: str) -> int:
    """How many kernels a computation of a program starts at most.

    Of a conditional the branch with most kernels counts, and of a loop one turn.
    """
    count = 0
    for line in parts[name].splitlines():
        found = re.search(r"[\])}] ([a-z][\w-]*)\(", re.sub(r"/\*.*?\*/", "", line))
        if found is None:
            raise UnexpectedTextError("an instruction in each line", line)
        kind = found[1]
        count += not re.fullmatch(_NO_KERNEL, kind)
        if kind in ("while", "call"):
            called = re.findall(r"(?:condition|body|to_apply)=%?([\w.-]+)", line)
            count += sum(kernels(parts, one) for one in called)
        count += max((kernels(parts, one) for one in branches(line)), default=0)
    return count
