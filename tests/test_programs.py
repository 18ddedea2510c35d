"""What benchmarks read off the text of programs, and that they refuse other texts."""

import jax
import jax.numpy as jnp
import programs
import pytest

EXCHANGES = """
ENTRY %main (a: bf16[4,8]) -> f32[16] {
  %start = (bf16[4,8]{1,0}, bf16[8,8]{1,0}, u32[]) all-gather-start(%a)
  %done = bf16[8,8]{1,0} all-gather-done(%start)
  %sum = (f32[16]{0}, pred[3]{0}) all-reduce(%b, %c)
}
"""
COPIES = """
%keep (x: f32[2]) -> f32[2] {
  %copy.1 = f32[2]{0} copy(%x)
}

%refresh (x: f32[2]) -> f32[2] {
  %copy.2 = f32[1000]{0} copy(%x)
}

%skip (x: f32[2]) -> f32[2] {
  %copy.3 = f32[1000]{0} copy(%x)
}

%step (x: f32[2]) -> f32[2] {
  %copy.4 = s32[2]{0} copy(%x)
  %fusion = bf16[3]{0} fusion(%x), kind=kLoop, calls=%wrapped_copy_computation
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %a = f32[2] conditional(%i, %x, %x), branch_computations={%skip, %step}
  %b = f32[2] conditional(%j, %x, %x), branch_computations={%keep, %refresh}
}
"""


def test_collectives_count_results_and_not_operands():
    found = programs.collectives(EXCHANGES)
    assert found == {
        "collectives": "1 all-gather; 1 all-reduce",
        "collectives_mb": (2 * 64 + 4 * 16 + 3) / 1e6,
    }


def test_copies_are_those_of_a_step_without_refresh():
    assert programs.copied_bytes(COPIES) == 4 * 2 + 2 * 3
    without_conditionals = EXCHANGES.replace("%done", "%copy = f32[5] copy(%a)\n  %d")
    assert programs.copied_bytes(without_conditionals) == 20


def test_decompositions_of_a_program():
    def decompose(matrix):
        return jnp.linalg.qr(matrix), jnp.linalg.eigh(matrix)

    _, lowered = programs.timed_trace(jax.jit(decompose), jnp.eye(3))
    seconds, program = programs.timed_compile(lowered)
    counts = programs.decompositions(program.as_text())
    assert counts == {"qr": 1, "eigh": 1, "cholesky": 0}
    assert seconds > 0 and programs.memory_of(program).temp_size_in_bytes >= 0


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (programs.decompositions, "", "starts with ENTRY, got: an empty text"),
        (programs.collectives, "HloModule", "starts with ENTRY, got: HloModule"),
        (programs.copied_bytes, "HloModule", "starts with ENTRY, got: HloModule"),
        (
            programs.decompositions,
            "ENTRY {\n  %q = f32[2] custom-call(%x)\n}",
            r"a custom_call_target in each custom call, got: %q = f32\[2\]",
        ),
        (
            programs.collectives,
            EXCHANGES.replace("(f32[16]{0}, pred[3]{0})", "other"),
            "the shapes of its results before an instruction, got: %sum = other",
        ),
        (
            programs.collectives,
            EXCHANGES.replace("pred[3]", "odd[3]"),
            r"a dtype with its bits, like bf16, got: odd\[3\]",
        ),
        (
            programs.copied_bytes,
            COPIES.replace("branch_computations", "branches"),
            r"branch_computations in each conditional, got: %a = f32\[2\]",
        ),
        (
            programs.copied_bytes,
            COPIES.replace("{%skip, %step}", "{%skip}"),
            r"two conditionals of two branches .*, got: %a = f32\[2\]",
        ),
    ],
)
def test_other_texts_are_refused(read, text, message):
    with pytest.raises(programs.UnexpectedTextError, match=message):
        read(text)
