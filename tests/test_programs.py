"""What benchmarks read off the text of programs, and that they refuse other texts."""

import jax
import jax.numpy as jnp
import kernels
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
        "collectives": "1 all-gather of 0.000128 MB; 1 all-reduce of 6.7e-05 MB",
        "collectives_mb": (2 * 64 + 4 * 16 + 3) / 1e6,
    }


PARTS = """
%fused.1 (p: f32[2,8]) -> f32[4,8] {
  %all-gather.1 = f32[4,8]{1,0:T(8,128)} all-gather(%p), channel_id=1
}

%fused.2 (p: f32[2,8]) -> f32[4,8] {
  %all-gather.2 = f32[4,8]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=1
}

ENTRY %main (a: f32[2,8]) -> f32[4,8] {
  %a.1 = f32[4,8] fusion(%a), calls=%fused.1
  %a.2 = f32[4,8] fusion(%a.1), calls=%fused.2
  %b = f32[4]{0} all-gather(%c), channel_id=1
  %d = f32[4,8]{1,0} all-gather(%a), channel_id=2
}
"""


def test_a_collective_in_several_parts_counts_once():
    found = programs.collectives(PARTS)
    assert found["collectives"] == "3 all-gather of 0.000272 MB"


SLICES = """
ENTRY %main (a: f32[4]) -> f32[8] {
  %send = (f32[4]{0}, u32[], token[]) send(%a, %t), channel_id=1, NAME
  %recv = (f32[8]{0}, u32[]{:S(2)}, token[]) recv(%t), channel_id=2, NAME
  %done = (f32[8]{0}, token[]) recv-done(%recv), channel_id=2, NAME
  %other = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=3
  %c = f32[4] all-reduce(%a), channel_id=4
}
""".replace("NAME", 'frontend_attributes={_xla_megascale_transfer_type="ALL_GATHER"}')


def test_what_slices_receive_from_one_another():
    assert programs.between_slices(SLICES) == {
        "between_slices": "1 all-gather of 3.2e-05 MB",
        "between_slices_mb": 32 / 1e6,
    }
    nothing = {"between_slices": 0, "between_slices_mb": 0.0}
    assert programs.between_slices(EXCHANGES) == nothing


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
            r"computations in each conditional, got: %a = f32\[2\]",
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


UPDATE = """
%first (x: f32[2]) -> f32[2] {
  ROOT %a = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
}

%keep (x: f32[2]) -> f32[2] {
  ROOT %x = f32[2]{0} parameter(0)
}

%again (x: (f32[2], s32[])) -> pred[] {
  ROOT %less = pred[] fusion(%x), kind=kLoop, calls=%fused
}

%turn (x: (f32[2], s32[])) -> (f32[2], s32[]) {
  %product = (f32[2]{0}, s8[64]{0}) custom-call(%x), custom_call_target="gemm"
  ROOT %pair = (f32[2]{0}, /*index=1*/s32[]) tuple(%product, %i)
}

%refresh (x: f32[2]) -> f32[2] {
  %copy = (f32[2]{0}, f32[2]{0}, u32[]) copy-start(%x)
  %copied = f32[2]{0} copy-done(%copy)
  %loop = (f32[2]{0}, s32[]) while(%init), condition=%again, body=%turn
  ROOT %y = f32[2]{0} conditional(%p, %x, %x), true_computation=%first, false_computation=%keep
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %a = f32[2]{0} conditional(%i, %x, %x), branch_computations={%keep, %first}
  %sum = f32[]{:T(128)} reduce(%a, %zero), dimensions={0}, to_apply=%add
  ROOT %b = f32[2]{0} conditional(%j, %x, %x), branch_computations={%keep, %refresh}
}
"""  # noqa: E501


def test_kernels_of_a_step():
    parts = programs.computations(UPDATE)
    found = kernels.of_a_step(parts)
    # One in the conditional before, one in the sum, and four in the refresh.
    assert found == {"kernels": 2, "kernels_with_refresh": 6}
    without = {"ENTRY": parts["first"]}
    assert kernels.of_a_step(without) == {"kernels": 1}


def test_kernels_of_an_unexpected_text():
    with pytest.raises(programs.UnexpectedTextError, match="an instruction in each"):
        kernels.of_a_step({"ENTRY": "  no instruction"})
    line = "  %b = f32[2]{0} conditional(%j, %x, %x), computations={%keep, %refresh}"
    with pytest.raises(programs.UnexpectedTextError, match="in each conditional"):
        kernels.of_a_step({"ENTRY": line})
