"""A parameter's plan: the axes that form each factor, and how they are cut into blocks.

A `Layout` follows from the *shape* of a parameter and the options alone. It owns all
shape arithmetic: parameter-shaped arrays are viewed as arrays of blocks by `to_blocks`
and come back by `from_blocks`, so that everything kept between steps has the shape of
the parameter.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax


class DimensionNumbers(NamedTuple):
    """The axes of a parameter that form each Kronecker factor.

    The array is preconditioned as a tensor with one (merged) axis per group. Axes that
    no group names are batch axes: every index along them has factors of its own, as
    for scanned layers, experts or heads. `optax.contrib.MuonDimensionNumbers(r, o)` is
    accepted wherever this is, and means `DimensionNumbers((r, o))`.

    Attributes:
      factor_axes: one entry per factor, an axis or a sequence of axes (negative ones
        count from the end). The axes of an entry are merged in ascending order.

    Example:
      >>> # [layers, heads, head_dim, width]: one factor of heads * head_dim, one of
      >>> # width, for each layer separately
      >>> DimensionNumbers(factor_axes=((1, 2), 3))
      DimensionNumbers(factor_axes=((1, 2), 3))
    """

    factor_axes: Sequence[int | Sequence[int]]


def is_dimension_numbers(value: Any) -> bool:
    """Whether `value` is a `DimensionNumbers` or has the fields of Muon's."""
    return isinstance(value, DimensionNumbers) or (
        hasattr(value, "reduction_axis") and hasattr(value, "output_axis")
    )


class CutBlocks(NamedTuple):
    """Blocks of a (merged) axis that lie on several devices each.

    Attributes:
      axes: of the parameter.
      size: of all of it.
      block: the side of its blocks.
      shard: how much of it a device has.
      inner: how many devices share each index of the first of merged axes.
      fitting: the largest side of blocks that would lie on one device each, or 0.
    """

    axes: tuple[int, ...]
    size: int
    block: int
    shard: int
    inner: int
    fitting: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of shape `shape` is viewed as an array of equal blocks.

    Attributes:
      shape: the parameter's shape.
      order: its axes, permuted only where the axes of one factor are not adjacent.
      view: shape of the array of blocks, for instance `[m/b1, b1, n/b2, b2]`.
      grid: the axes of the view that number the blocks: batch axes and block indices.
      parents: for each axis of the view, the axis of the (ordered) parameter it takes
        its sharding from, None where it takes none.
      axes: the axes of the view along a block, one per factor.
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

    def to_blocks(self, array: jax.Array) -> jax.Array:
        """Views a parameter-shaped array as an array of blocks."""
        ordered = array.transpose(self.order)
        sharding = explicit_sharding(array, range(array.ndim))
        if sharding is not None:
            spec = self.spec_of_view(sharding.spec, sharding.mesh.shape)
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
        return jax.lax.reshape(ordered, self.view, out_sharding=sharding)

    def from_blocks(self, blocks: jax.Array, like: jax.Array) -> jax.Array:
        """Inverse of `to_blocks`, sharded like `like`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        shape = [self.shape[axis] for axis in self.order]
        sharding = explicit_sharding(like, self.order)
        ordered = jax.lax.reshape(blocks, shape, out_sharding=sharding)
        return ordered.transpose(inverse)

    def blocked(self) -> list[tuple[tuple[int, ...], int]]:
        """The (merged) axes that are cut into blocks, and the side of those."""
        starts = [parent for parent in self.parents if parent is not None]
        ends = dict(itertools.pairwise([*starts, len(self.order)]))
        found = []
        for axis in self.axes:
            first = self.parents[axis - 1]
            if self.parents[axis] is None and first is not None:
                found.append((self.order[first : ends[first]], self.view[axis]))
        return found

    def spec_of_view(self, spec: jax.P, sizes: Mapping[str, int]) -> jax.P:
        """How the array of blocks is sharded, if the parameter is by `spec`.

        An axis takes the mesh axes of its parent, if their `sizes` divide it.
        """
        entries: list[Any] = []
        for size, parent in zip(self.view, self.parents, strict=True):
            entry = None if parent is None else spec[self.order[parent]]
            entries.append(None if size % _shards(entry, sizes) else entry)
        return jax.P(*entries)

    def spec_of_grid(self, spec: jax.P, sizes: Mapping[str, int]) -> jax.P:
        """Likewise, how the grid of blocks is."""
        view = self.spec_of_view(spec, sizes)
        return jax.P(*(view[axis] for axis in self.grid))

    def is_aligned(self, spec: jax.P, sizes: Mapping[str, int]) -> bool:
        """Whether all mesh axes that shard it cut its grid of blocks, and some do.

        If there are any: one device has all.
        """
        grid = self.spec_of_grid(spec, sizes)
        on_grid = {name for entry in grid for name in mesh_axes(entry)}
        named = {n for entry in spec for n in mesh_axes(entry) if sizes[n] > 1}
        return named <= on_grid and bool(named or math.prod(sizes.values()) == 1)

    def cut_blocks(self, spec: jax.P, sizes: Mapping[str, int]) -> list[CutBlocks]:
        """The (merged) axes whose blocks lie on several devices each."""
        found = []
        for axes, block in self.blocked():
            first, *others = (_shards(spec[axis], sizes) for axis in axes)
            inner = math.prod(others)
            size = math.prod(self.shape[axis] for axis in axes)
            shard = size // first
            if inner > 1 or shard % block:
                fits = [b for b in range(2, block) if inner == 1 and shard % b == 0]
                fitting = max(fits, default=0)
                found.append(
                    CutBlocks(axes, size, block, shard // inner, inner, fitting)
                )
        return found

    def specs_of_factors(
        self, spec: jax.P, sizes: Mapping[str, int]
    ) -> tuple[jax.P | None, ...]:
        """How factors `[grid…, b, b]` are sharded, if the parameter is by `spec`.

        The grid as in the array of blocks; the rows by the mesh axes of the axes that
        are not cut into blocks, as far as they divide them. None without a factor.
        """
        grid = self.spec_of_grid(spec, sizes)
        used = {axis for entry in grid for axis in mesh_axes(entry)}
        cut = {axis for axes, _ in self.blocked() for axis in axes}
        whole = (entry for axis, entry in enumerate(spec) if axis not in cut)
        others = [n for entry in whole for n in mesh_axes(entry) if n not in used]

        def one(shape: tuple[int, ...]) -> jax.P:
            rows: tuple[str, ...] = ()
            for name in others:
                if shape[-2] % _shards((*rows, name), sizes) == 0:
                    rows = (*rows, name)
            return jax.P(*grid, rows or None, None)

        return tuple(s if s is None else one(s) for s in self.factor_shapes())

    def local(self, spec: jax.P, sizes: Mapping[str, int]) -> "Layout":
        """The layout of what one device has."""

        def cut(shape: tuple[int, ...], by: jax.P) -> tuple[int, ...]:
            entries = zip(shape, by, strict=True)
            return tuple(size // _shards(entry, sizes) for size, entry in entries)

        view = cut(self.view, self.spec_of_view(spec, sizes))
        return dataclasses.replace(self, shape=cut(self.shape, spec), view=view)

    def factor_shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        """The shape `[grid…, b, b]` of each factor, None where it is the identity."""
        grid = tuple(self.view[axis] for axis in self.grid)
        return tuple(
            (*grid, self.view[axis], self.view[axis]) if has_factor else None
            for axis, has_factor in zip(self.axes, self.factored, strict=True)
        )


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a `jax.P`."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def _shards(entry: Any, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[name] for name in mesh_axes(entry))


def layout_of_factors(count: int, size: int) -> Layout:
    """Of a parameter with `count` blocks and one factor each, `[count, size, size]`."""
    shape, axes = (count, size), (0, 1)
    return Layout(shape, axes, shape, axes, grid=(0,), axes=(1,), factored=(True,))


def _identity(shape: tuple[int, ...]) -> Layout:
    """The layout of a parameter without factors."""
    axes = tuple(range(len(shape)))
    return Layout(shape, axes, shape, axes, (), axes, (False,) * len(shape))


def explicit_sharding(
    array: jax.Array, dims: Sequence[int | None]
) -> jax.sharding.NamedSharding | None:
    """The sharding of an array with these dimensions of `array`, None: not sharded.

    Only on a mesh with explicit axes, where reshapes and products have to say how their
    result is sharded; else None.
    """
    sharding = jax.typeof(array).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = jax.P(*(None if d is None else sharding.spec[d] for d in dims))
    return jax.sharding.NamedSharding(sharding.mesh, spec)


def make_layout(
    shape: Sequence[int],
    *,
    max_precond_dim: int,
    merge_dims: bool,
    precondition_1d: bool,
    one_sided: bool,
    block_size: int | None,
    dimension_numbers: Any = None,
) -> Layout:
    """Plans a parameter; see `soap_optax.soap` for the options.

    Args:
      shape: the parameter's shape.
      max_precond_dim: an axis of a block longer than this keeps the identity.
      merge_dims: merge adjacent axes while their product is at most `max_precond_dim`.
      precondition_1d: whether vectors have a factor.
      one_sided: keep only the factor of the smallest axis of a block.
      block_size: upper bound of a block's side, None for whole axes.
      dimension_numbers: overrides the shape rule (merging, vectors) where not None.

    Returns:
      The `Layout`.

    Raises:
      ValueError: if `dimension_numbers` repeats an axis or names one that is not there.
    """
    shape = tuple(shape)
    if dimension_numbers is not None:
        groups = _named_groups(shape, dimension_numbers)
    elif len(shape) == 1 and not precondition_1d:
        groups = []
    elif merge_dims and len(shape) > 1:
        groups = _merged_groups(shape, max_precond_dim)
    else:
        groups = [(axis,) for axis in range(len(shape))]
    sizes = [math.prod(shape[axis] for axis in group) for group in groups]
    blocks = [_block(size, block_size) for size in sizes]
    factored = [1 < block <= max_precond_dim for block in blocks]
    if one_sided and any(factored):
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


def _merged_groups(
    shape: tuple[int, ...], max_precond_dim: int
) -> list[tuple[int, ...]]:
    """Adjacent axes, merged from the left while the product allows it, as published."""
    groups: list[tuple[int, ...]] = []
    run: tuple[int, ...] = ()
    for axis, size in enumerate(shape):
        merged = math.prod(shape[member] for member in run)
        if merged * size <= max_precond_dim or merged == 1:
            run = (*run, axis)
        else:
            groups.append(run)
            run = (axis,)
        if size > max_precond_dim and run:
            groups.append(run)
            run = ()
    return [*groups, run] if run else groups


def _block(size: int, block_size: int | None) -> int:
    """The side of equal blocks: the largest divisor of `size` up to `block_size`.

    An axis whose largest such divisor is 1 or below an eighth of `block_size` stays
    whole: many tiny blocks precondition next to nothing.
    """
    if block_size is None or size <= block_size:
        return size
    divisor = next(b for b in range(block_size, 0, -1) if size % b == 0)
    return size if divisor == 1 or 8 * divisor < block_size else divisor
