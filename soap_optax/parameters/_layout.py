"""A parameter's layout: which axes form each factor, and how they are cut into blocks.

A `Layout` follows from the shape of a parameter and the options alone. It does all
arithmetic with shapes: `to_blocks` views an array of the parameter's shape as an array
of blocks, and `from_blocks` goes back, so that moments kept between steps have the
shape of the parameter.

The *view* is the array of blocks, for instance of shape `[m/b1, b1, n/b2, b2]`. The
*grid* is the axes of the view that number the blocks or the members of a batch. A
*group* is the axes of the parameter that form one factor; they are *merged* into one
axis.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from soap_optax._options import FamilyOptions
from soap_optax.mesh import _mesh

DEFAULT_MAX_PRECOND_DIM = 10_000


class DimensionNumbers(NamedTuple):
    """The axes of a parameter that form each Kronecker factor.

    The axes of a factor are merged into one. Axes that belong to no factor are batch
    axes: every index along them has factors of its own, as for scanned layers, experts
    or heads. `optax.contrib.MuonDimensionNumbers(r, o)` is accepted wherever this class
    is, and means `DimensionNumbers((r, o))`.

    Attributes:
      factor_axes: for each factor, an axis or a sequence of axes. Negative ones count
        from the end. The axes of a factor are merged in ascending order.

    Examples:
      >>> # In [layers, heads, head_dim, width] each layer has one factor for heads and
      >>> # head_dim together and one for width.
      >>> DimensionNumbers(factor_axes=((1, 2), 3))
      DimensionNumbers(factor_axes=((1, 2), 3))
    """

    factor_axes: Sequence[int | Sequence[int]]


def is_dimension_numbers(value: Any) -> bool:
    """Says whether a value is a `DimensionNumbers` or has the fields of Muon's."""
    return isinstance(value, DimensionNumbers) or (
        hasattr(value, "reduction_axis") and hasattr(value, "output_axis")
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of shape `shape` is viewed as an array of equal blocks.

    Attributes:
      shape: shape of the parameter.
      order: axes of the parameter in the order in which they are viewed. They are
        permuted only where the axes of one factor are not adjacent.
      view: shape of the view, for instance `[m/b1, b1, n/b2, b2]`.
      parents: for each axis of the view, the index in `order` of the parameter's axis
        from which it takes its sharding, or None where it takes none.
      grid: axes of the view that number the blocks or are batch axes.
      axes: axes of the view along the sides of a block, one per group.
      factored: for each of `axes`, whether it has a factor or keeps the identity.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    view: tuple[int, ...]
    parents: tuple[int | None, ...]
    grid: tuple[int, ...]
    axes: tuple[int, ...]
    factored: tuple[bool, ...]

    @property
    def has_factors(self) -> bool:
        return any(self.factored)

    @property
    def within(self) -> list[int]:
        """The axes of the view that are not in the grid, along the sides of a block."""
        return [d for d in range(len(self.view)) if d not in self.grid]

    @property
    def sources(self) -> list[int | None]:
        """For each axis of the view, the parameter's axis that gives its sharding."""
        return [None if p is None else self.order[p] for p in self.parents]

    def to_blocks(self, array: jax.Array) -> jax.Array:
        """Views a parameter-shaped array as an array of blocks."""
        ordered = array.transpose(self.order)
        sharding = _mesh.explicit_sharding(array, range(array.ndim))
        if sharding is not None:
            mesh = sharding.mesh
            spec = _mesh.inherited(sharding.spec, self.sources, self.view, mesh.shape)
            sharding = _mesh.NamedSharding(mesh, spec)
        return jax.lax.reshape(ordered, self.view, out_sharding=sharding)

    def from_blocks(self, blocks: jax.Array, like: jax.Array) -> jax.Array:
        """Inverts `to_blocks`, with a result that is sharded like `like`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        shape = [self.shape[axis] for axis in self.order]
        sharding = _mesh.explicit_sharding(like, self.order)
        ordered = jax.lax.reshape(blocks, shape, out_sharding=sharding)
        return ordered.transpose(inverse)

    def blocked(self) -> list[tuple[tuple[int, ...], int]]:
        """The groups of axes that are cut into blocks, each with its block's side."""
        starts = [parent for parent in self.parents if parent is not None]
        ends = dict(itertools.pairwise([*starts, len(self.order)]))
        found = []
        for axis in self.axes:
            first = self.parents[axis - 1]
            if self.parents[axis] is None and first is not None:
                found.append((self.order[first : ends[first]], self.view[axis]))
        return found

    def factor_shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        """The shape `[grid…, b, b]` of each factor, None where it is the identity."""
        grid = tuple(self.view[axis] for axis in self.grid)
        return tuple(
            (*grid, self.view[axis], self.view[axis]) if has_factor else None
            for axis, has_factor in zip(self.axes, self.factored, strict=True)
        )


def layout_of_factors(count: int, size: int) -> Layout:
    """The layout of `count` blocks of one axis, with factors `[count, size, size]`."""
    shape, axes = (count, size), (0, 1)
    return Layout(shape, axes, shape, axes, grid=(0,), axes=(1,), factored=(True,))


def _identity(shape: tuple[int, ...]) -> Layout:
    """The layout of a parameter without factors."""
    axes = tuple(range(len(shape)))
    return Layout(shape, axes, shape, axes, (), axes, (False,) * len(shape))


def make_layout(
    shape: Sequence[int], options: FamilyOptions, dimension_numbers: Any = None
) -> Layout:
    """Plans a parameter.

    Args:
      shape: the parameter's shape.
      options: a value for every option; those about axes, factors and blocks are read.
      dimension_numbers: dimension numbers of this parameter, or None. They replace the
        options `merge_dims` and `precondition_1d`.

    Returns:
      The `Layout`.

    Raises:
      ValueError: if `dimension_numbers` do not name different axes of the parameter,
        and at least one per factor.
    """
    shape = tuple(shape)
    longest = options["max_precond_dim"]
    longest = DEFAULT_MAX_PRECOND_DIM if longest is None else longest
    if dimension_numbers is not None:
        groups = _named_groups(shape, dimension_numbers)
    elif len(shape) == 1 and not options["precondition_1d"]:
        groups = []
    elif options["merge_dims"] and len(shape) > 1:
        groups = _merged_groups(shape, longest)
    else:
        groups = [(axis,) for axis in range(len(shape))]
    sizes = [math.prod(shape[axis] for axis in group) for group in groups]
    blocks = [_block(size, options["block_size"]) for size in sizes]
    factored = [1 < block <= longest for block in blocks]
    if options["one_sided"] and any(factored):
        smallest = min(
            (i for i, has_factor in enumerate(factored) if has_factor),
            key=blocks.__getitem__,
        )
        factored = [i == smallest for i in range(len(blocks))]
    if 0 in shape or not any(factored):
        return _identity(shape)
    return _assemble(shape, groups, blocks, factored)


def _assemble(
    shape: tuple[int, ...],
    groups: Sequence[tuple[int, ...]],
    blocks: Sequence[int],
    factored: Sequence[bool],
) -> Layout:
    """Lays out batch axes and groups in the order of the parameter's axes."""
    group_of = {axis: i for i, group in enumerate(groups) for axis in group}
    order: list[int] = []
    view: list[int] = []
    parents: list[int | None] = []
    grid: list[int] = []
    axes = [0] * len(groups)
    for axis, size in enumerate(shape):
        if axis in order:
            continue
        parents.append(len(order))
        if axis not in group_of:
            order.append(axis)
            grid.append(len(view))
            view.append(size)
            continue
        i = group_of[axis]
        order.extend(groups[i])
        count = math.prod(shape[member] for member in groups[i]) // blocks[i]
        if count > 1:
            grid.append(len(view))
            view.append(count)
            parents.append(None)
        axes[i] = len(view)
        view.append(blocks[i])
    return Layout(
        shape,
        order=tuple(order),
        view=tuple(view),
        parents=tuple(parents),
        grid=tuple(grid),
        axes=tuple(axes),
        factored=tuple(factored),
    )


def _named_groups(
    shape: tuple[int, ...], dimension_numbers: Any
) -> list[tuple[int, ...]]:
    """The groups of axes that dimension numbers name, ascending and non-negative."""
    if isinstance(dimension_numbers, DimensionNumbers):
        named = dimension_numbers.factor_axes
    else:
        named = (dimension_numbers.reduction_axis, dimension_numbers.output_axis)
    try:
        groups = [tuple(g) if isinstance(g, Sequence) else (g,) for g in named]
        flat = [operator.index(axis) for group in groups for axis in group]
    except TypeError:
        raise ValueError(
            "dimension_numbers must name axes by integers, one or a sequence of them "
            f"per factor, got {dimension_numbers}"
        ) from None
    rank = len(shape)
    if any(not -rank <= axis < rank for axis in flat):
        raise ValueError(
            f"dimension_numbers must name axes of the parameter (rank {rank}, shape "
            f"{shape}), got {dimension_numbers}"
        )
    if len({axis % rank for axis in flat}) < len(flat) or not all(groups):
        raise ValueError(
            "dimension_numbers must name an axis at most once, and at least one axis "
            f"per factor, got {dimension_numbers} for shape {shape}"
        )
    return [tuple(sorted(axis % rank for axis in group)) for group in groups]


def _merged_groups(shape: tuple[int, ...], longest: int) -> list[tuple[int, ...]]:
    """Merges adjacent axes from the left up to a product of `longest`, as published."""
    groups: list[tuple[int, ...]] = []
    run: tuple[int, ...] = ()
    for axis, size in enumerate(shape):
        merged = math.prod(shape[member] for member in run)
        if merged * size <= longest or merged == 1:
            run = (*run, axis)
        else:
            groups.append(run)
            run = (axis,)
        if size > longest and run:
            groups.append(run)
            run = ()
    return [*groups, run] if run else groups


def _block(size: int, block_size: int | None) -> int:
    """The side of equal blocks: the largest divisor of `size` up to `block_size`.

    The axis stays whole if this divisor is 1 or less than an eighth of `block_size`,
    because many tiny blocks precondition next to nothing.
    """
    if block_size is None or size <= block_size:
        return size
    divisor = next(b for b in range(block_size, 0, -1) if size % b == 0)
    return size if divisor == 1 or 8 * divisor < block_size else divisor
