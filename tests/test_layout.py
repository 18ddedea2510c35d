"""Shape arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest
import training
from optax.contrib import MuonDimensionNumbers

from soap_optax import DimensionNumbers

layout = training.layout


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((), {}, ()),
        ((5,), {}, (None,)),
        ((5,), {"precondition_1d": True}, ((5, 5),)),
        ((4, 6), {}, ((4, 4), (6, 6))),
        ((1, 6), {}, (None, (6, 6))),
        ((0, 6), {}, (None, None)),
        ((4, 6), {"max_precond_dim": 5}, ((4, 4), None)),
        ((4, 6), {"max_precond_dim": 0}, (None, None)),
        ((6, 4), {"one_sided": True}, (None, (4, 4))),
        ((4, 4), {"one_sided": True}, ((4, 4), None)),
        ((1, 4, 3), {"one_sided": True}, (None, None, (3, 3))),
        ((3, 2, 5), {"merge_dims": True}, ((30, 30),)),
        ((3, 2, 5), {"merge_dims": True, "max_precond_dim": 7}, ((6, 6), (5, 5))),
        (
            (3, 50, 2),
            {"merge_dims": True, "max_precond_dim": 7},
            ((3, 3), None, (2, 2)),
        ),
        ((50, 1), {"merge_dims": True, "max_precond_dim": 7}, (None, None)),
        ((1, 50, 4), {"merge_dims": True, "max_precond_dim": 7}, (None, (4, 4))),
        ((8, 12), {"block_size": 4}, ((2, 3, 4, 4), (2, 3, 4, 4))),
        ((8, 3), {"block_size": 4}, ((2, 4, 4), (2, 3, 3))),
        ((8, 13), {"block_size": 4}, ((2, 4, 4), (2, 13, 13))),
        ((400, 262), {"block_size": 100}, ((4, 100, 100), (4, 262, 262))),
        (
            (20, 8),
            {"block_size": 10, "max_precond_dim": 10},
            ((2, 10, 10), (2, 8, 8)),
        ),
        (
            (7, 4, 6),
            {"dimension_numbers": DimensionNumbers((1, 2))},
            ((7, 4, 4), (7, 6, 6)),
        ),
        (
            (7, 4, 6),
            {"dimension_numbers": DimensionNumbers(((0, 1), 2))},
            ((28, 28), (6, 6)),
        ),
        (
            (7, 4, 6),
            {"dimension_numbers": MuonDimensionNumbers((0,), (-1,))},
            ((4, 7, 7), (4, 6, 6)),
        ),
        ((7, 4), {"dimension_numbers": DimensionNumbers(())}, (None, None)),
    ],
)
def test_factor_shapes(shape, options, expected):
    assert layout(shape, **options).factor_shapes() == expected


@pytest.mark.parametrize(
    ("shape", "options", "view"),
    [
        ((8, 12), {"block_size": 4}, (2, 4, 3, 4)),
        ((8, 12), {"block_size": 8}, (8, 2, 6)),
        ((5, 8, 12), {"block_size": 4}, (5, 2, 4, 3, 4)),
        ((4, 3, 6), {"dimension_numbers": DimensionNumbers(((0, 2), 1))}, (24, 3)),
        ((2, 3, 4), {"dimension_numbers": DimensionNumbers((2, 0))}, (2, 3, 4)),
    ],
)
def test_blocks_and_back(shape, options, view):
    plan = layout(shape, **options)
    array = jnp.arange(np.prod(shape)).reshape(shape)
    blocks = plan.to_blocks(array)
    assert blocks.shape == view
    np.testing.assert_array_equal(plan.from_blocks(blocks, array), array)


def test_blocks_are_contiguous_pieces():
    array = jnp.arange(8 * 12).reshape(8, 12)
    blocks = layout((8, 12), block_size=4).to_blocks(array)
    np.testing.assert_array_equal(blocks[1, :, 2], array[4:8, 8:12])


def test_only_axes_that_are_not_adjacent_are_moved():
    def order(*axes):
        return layout((2, 3, 4, 5), dimension_numbers=DimensionNumbers(axes)).order

    assert order((0, 1), (2, 3)) == (0, 1, 2, 3)
    assert order((3, 2), 0) == (0, 1, 2, 3)
    assert order((0, 2), 1) == (0, 2, 1, 3)


@pytest.mark.parametrize(
    "numbers",
    [
        DimensionNumbers((0, 2)),
        DimensionNumbers((0, -3)),
        DimensionNumbers((0, 0)),
        DimensionNumbers((0, (1, -1))),
        DimensionNumbers((0, ())),
        MuonDimensionNumbers(0, 0),
    ],
)
def test_bad_dimension_numbers(numbers):
    with pytest.raises(ValueError, match="dimension_numbers must name"):
        layout((3, 4), dimension_numbers=numbers)
