"""Refreshes all eigenbases: the factors of one size together, in bounded memory.

A refresh goes through the parameters in slots of about equal cost, one slot after the
other, or, staggered, one slot a step. In a slot

    gather         copies factors and eigenbases: one stack for each size (and dtype)
    refresh        the eigenbases in the stacks, in place, in chunks
    adopt          puts each new eigenbasis in place and changes the first moments to it

The first and the last are branches over the slots, the second is the same for all: a
program has one decomposition for each size, however many factors there are. A factor on
a mesh of devices whose sharding is not known is refreshed alone, because stacking would
move it (see `_sharding`).
"""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from soap_optax import _kronecker
from soap_optax._layout import Layout, explicit_sharding

# Into how many slots a refresh is cut that is not staggered, if each has so many bytes:
# as many times smaller than factors and eigenbases is what it keeps beside them.
_SLOTS = 8
_SLOT_BYTES = 2**20
# A chunk of a stack has at most this many bytes, in the dtype of computation, and this
# share of it, or one matrix.
_CHUNK_BYTES = 2**25
_CHUNK_SHARE = 1 / 8

_Unit = tuple[int, int]  # a parameter and one of its axes


@dataclasses.dataclass(frozen=True)
class Method:
    """How eigenbases are refreshed.

    Attributes:
      name: one power step M Q, orthonormalized by Householder's (`"qr"`) or Cholesky's
        method (`"cholesky_qr"`), or a decomposition of M (`"eigh"`).
      initial: whether to decompose, whatever the name; the eigenbases are the identity
        then. False if it is known not to be so.
      tolerance: an eigenbasis Q stays while the norm of the off-diagonal part of
        Q^T M Q is at most this share of that of M; None: never.
      precision: of the products of matrices.
    """

    name: str
    initial: jax.Array | bool = False
    tolerance: jax.typing.ArrayLike | None = None
    precision: Any = jax.lax.Precision.HIGHEST


class Bases(NamedTuple):
    """What a refresh changes, for each parameter in a list.

    Attributes:
      eigenbases: as in `EigenbasisState`, in lists; for each axis an array or None.
      eigenvalues: likewise.
      skipped: likewise.
      moments: the parameter's first moments.
    """

    eigenbases: list[Any]
    eigenvalues: list[Any]
    skipped: list[Any]
    moments: list[Any]


def take(members: Sequence[int], bases: Bases) -> Bases:
    """Those of some parameters."""
    return Bases(*([of_kind[i] for i in members] for of_kind in bases))


def put(part: Bases, members: Sequence[int], bases: Bases) -> None:
    """Inverse of `take`, in place."""
    for of_kind, changed in zip(bases, part, strict=True):
        for i, new in zip(members, changed, strict=True):
            of_kind[i] = new


class Refreshed(NamedTuple):
    """What a refresh makes of an eigenbasis, or of a stack of them.

    Attributes:
      eigenbases: the new ones, with columns in the order of those of the old ones, or
        those, as they were, `[…, b, b]`.
      eigenvalues: estimates that belong to the new ones, `[…, b]`.
      is_new: which they are, `[…]`.
    """

    eigenbases: jax.Array
    eigenvalues: jax.Array
    is_new: jax.Array


def make_slots(factors: list[list[Any]], count: int | None = None) -> list[list[int]]:
    """Cuts a refresh into slots of about equal costs.

    Args:
      factors: of each parameter, for each axis an array, its shape or None.
      count: of slots, at most; None: such that a refresh of all, one slot after the
        other, needs little memory.

    Returns:
      For each slot, the indices of its parameters.
    """
    if count is None:
        stacked = [
            factor.size * factor.dtype.itemsize
            for of_leaf in factors
            for factor in of_leaf
            if factor is not None and not _may_be_spread(factor)
        ]
        count = max(1, min(_SLOTS, sum(stacked) // _SLOT_BYTES))
    costs = {
        i: sum(f.size * f.shape[-1] for f in of_leaf if f is not None)
        for i, of_leaf in enumerate(factors)
    }
    costs = {i: cost for i, cost in costs.items() if cost}
    slots: list[list[int]] = [[] for _ in range(min(count, len(costs)))]
    loads = [(0, slot) for slot in range(len(slots))]
    for i in sorted(costs, key=lambda i: -costs[i]):
        load, slot = heapq.heappop(loads)
        slots[slot].append(i)
        heapq.heappush(loads, (load + costs[i], slot))
    return slots


@dataclasses.dataclass(frozen=True)
class Refresh:
    """A refresh of the eigenbases of all parameters.

    Attributes:
      layouts: of each parameter.
      factors: as in `Bases`.
      method: how.
      slots: see `make_slots`.
    """

    layouts: Sequence[Layout]
    factors: list[Any]
    method: Method
    slots: list[list[int]]

    def run(self, bases: Bases, begin: Any, end: Any) -> Bases:
        """Refreshes the slots from `begin` to `end`, changes the moments to them."""
        if not self.slots:
            return bases
        if len(self.slots) == 1:
            return self._run_slot(0, bases)
        return jax.lax.fori_loop(begin, end, self._run_slot, bases)

    def _run_slot(self, slot: Any, bases: Bases) -> Bases:
        numbers = range(len(self.slots))
        gather = [functools.partial(self._gather_slot, k) for k in numbers]
        stacks = [
            _refreshed(self.method, *stack)
            for stack in _switch(slot, gather, bases.eigenbases)
        ]
        bases = Bases(*map(list, bases))
        # One branch for each slot, with nothing of the others, which would be copied.
        for k, members in enumerate(self.slots):
            branches = [_keep, functools.partial(self._adopt_slot, k)]
            if len(self.slots) == 1:
                branches = branches[1:]
            is_mine = jnp.equal(slot, k).astype(jnp.int32)
            mine = _switch(is_mine, branches, take(members, bases), stacks)
            put(mine, members, bases)
        return bases

    @functools.cached_property
    def _stacks(self) -> list[list[list[_Unit]]]:
        """What is in the stack of each kind of factor, for each slot."""
        kinds: dict[Any, list[list[_Unit]]] = {}
        for k, members in enumerate(self.slots):
            for i in members:
                for axis, factor in enumerate(self.factors[i]):
                    if factor is not None and not _may_be_spread(factor):
                        of_slots = kinds.setdefault(
                            _kind(factor), [[] for _ in self.slots]
                        )
                        of_slots[k].append((i, axis))
        return list(kinds.values())

    def _gather_slot(
        self, slot: int, eigenbases: list[Any]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Stacks of factors and eigenbases; zeros fill them up to those of any slot."""

        def stack(of_slots: list[list[_Unit]], of_kind: list[Any]) -> jax.Array:
            counts = [
                sum(_count(self.factors[i][axis]) for i, axis in units)
                for units in of_slots
            ]
            ((i, axis), *_) = itertools.chain(*of_slots)
            like = self.factors[i][axis]  # in a shard_map zeros vary as it does
            missing = (max(counts) - counts[slot], *like.shape[-2:])
            mine = [_flat(of_kind[i][axis]) for i, axis in of_slots[slot]]
            return jnp.concatenate([*mine, jnp.zeros_like(like, shape=missing)])

        return [
            (stack(of_slots, self.factors), stack(of_slots, eigenbases))
            for of_slots in self._stacks
        ]

    def _adopt_slot(self, slot: int, mine: Bases, stacks: list[Refreshed]) -> Bases:
        """The bases of a slot's parameters with the new ones from its stacks."""
        refreshed = {}
        for stack, of_slots in zip(stacks, self._stacks, strict=True):
            begin = 0
            for i, axis in of_slots[slot]:
                shape = self.factors[i][axis].shape
                end = begin + _count(self.factors[i][axis])
                refreshed[i, axis] = _in_grid([x[begin:end] for x in stack], shape)
                begin = end

        def one(unit: _Unit, factor: Any, basis: Any) -> Refreshed | None:
            if factor is None or unit in refreshed:
                return refreshed.get(unit)
            return refresh_one(factor, basis, self.method)

        adopted = []
        for i, *of_leaf in zip(self.slots[slot], *mine, strict=True):
            old = Bases(*of_leaf)
            pairs = zip(self.factors[i], old.eigenbases, strict=True)
            new = [one((i, axis), *pair) for axis, pair in enumerate(pairs)]
            adopted.append(adopt(new, self.layouts[i], old, self.method.precision))
        return Bases(*map(list, zip(*adopted, strict=True)))


def _keep(bases: Bases, _: list[Refreshed]) -> Bases:
    return bases


def refresh_one(factor: jax.Array, eigenbasis: jax.Array, method: Method) -> Refreshed:
    """Refreshes the eigenbasis of one factor `[grid…, b, b]`, as it is sharded."""

    def run(factor: jax.Array, eigenbasis: jax.Array, initial: Any) -> Refreshed:
        mine = dataclasses.replace(method, initial=initial)

        def in_stack(to_stack: Any, factor: Any, eigenbasis: Any) -> Refreshed:
            new = _refreshed(mine, to_stack(factor), to_stack(eigenbasis))
            return _in_grid(new, factor.shape)

        block_by_block = functools.partial(in_stack, _flat)
        if not _may_be_spread(factor):
            return block_by_block(factor, eigenbasis)
        # Not a batch on CPU even if that has to gather it, see `_refreshed`.
        as_one = functools.partial(in_stack, lambda array: array[None])
        return jax.lax.platform_dependent(
            factor, eigenbasis, cpu=block_by_block, default=as_one
        )

    grid = range(factor.ndim - 2)
    if explicit_sharding(factor, grid) is None:
        return run(factor, eigenbasis, method.initial)
    if method.initial is False:
        run = functools.partial(run, initial=False)
    dims = ([*grid, None, None], [*grid, None], grid)
    shardings: list[Any] = [explicit_sharding(factor, d) for d in dims]
    run = jax.sharding.auto_axes(run, out_sharding=Refreshed(*shardings))
    initial = () if method.initial is False else (method.initial,)
    return run(factor, eigenbasis, *initial)


def _switch(index: Any, branches: Sequence[Any], *operands: Any) -> Any:
    if len(branches) == 1:
        return branches[0](*operands)
    return jax.lax.switch(index, branches, *operands)


def _kind(factor: jax.Array) -> Any:
    """The type of one matrix of it; those of one kind can be stacked."""
    return jax.typeof(jnp.zeros_like(factor, shape=factor.shape[-2:]))


def _may_be_spread(array: jax.Array) -> bool:
    """Whether it is on a mesh of several devices."""
    mesh = jax.typeof(array).sharding.mesh
    axes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind != jax.sharding.AxisType.Manual and size > 1 for kind, size in axes)


def _count(factor: jax.Array) -> int:
    return math.prod(factor.shape[:-2])


def _flat(array: jax.Array) -> jax.Array:
    """`[grid…, b, b]` as `[n, b, b]`."""
    return array.reshape(-1, *array.shape[-2:])


def _in_grid(stack: Sequence[jax.Array], shape: tuple[int, ...]) -> Refreshed:
    """The results of a stack for a factor of this shape, `[grid…, b, b]`."""
    shapes = (shape, shape[:-1], shape[:-2])
    return Refreshed(*(x.reshape(s) for x, s in zip(stack, shapes, strict=True)))


def adopt(
    new: Sequence[Refreshed | None], layout: Layout, old: Bases, precision: Any
) -> Bases:
    """The bases of one parameter with its new eigenbases, where they are new."""
    moments, is_new = _kronecker.change_basis(
        old.moments,
        old.eigenbases,
        [None if n is None else n.eigenbases for n in new],
        [None if n is None else n.is_new for n in new],
        *(layout, precision),
    )
    entries = zip(
        *(new, is_new, old.eigenbases, old.eigenvalues, old.skipped), strict=True
    )
    adopted = [(None,) * 3 if e[0] is None else _adopted(*e) for e in entries]
    eigenbases, eigenvalues, skipped = map(list, zip(*adopted, strict=True))
    return Bases(eigenbases, eigenvalues, skipped, moments)


def _adopted(
    new: Any, is_new: Any, eigenbasis: Any, eigenvalues: Any, skipped: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    values = new.eigenvalues.astype(eigenvalues.dtype)
    return (
        jnp.where(is_new[..., None, None], new.eigenbases, eigenbasis),
        jnp.where(is_new[..., None], values, eigenvalues),
        skipped + (~is_new[..., None]).astype(skipped.dtype),
    )


def _refreshed(method: Method, factors: jax.Array, eigenbases: jax.Array) -> Refreshed:
    """Refreshes a stack, chunk by chunk."""
    zeros = jnp.zeros_like(_kronecker.at_least_float32(eigenbases[..., 0, :]))
    matrix = factors[0].size * zeros.dtype.itemsize
    chunk = max(1, min(int(_CHUNK_SHARE * len(factors)), _CHUNK_BYTES // matrix))
    old = Refreshed(eigenbases, zeros, is_new=jnp.zeros_like(zeros[..., 0], bool))
    run = functools.partial(_in_chunks, functools.partial(_refresh_chunk, method))
    if chunk == 1:
        return run(factors, old, chunk=1)
    # On CPU decompositions come from LAPACK, one after another anyway; batches of them
    # beside other work have been seen to wait for each other for ever (JAX 0.10.2).
    return jax.lax.platform_dependent(
        *(factors, old),
        cpu=functools.partial(run, chunk=1),
        default=functools.partial(run, chunk=chunk),
    )


def _in_chunks(
    refresh: Any, factors: jax.Array, stack: Refreshed, chunk: int
) -> Refreshed:
    """Applies `refresh` to so many of a stack at a time."""
    count = len(factors)
    if count == chunk:
        return refresh(factors, stack)

    def body(i: jax.Array, stack: Refreshed) -> Refreshed:
        # The last one may overlap with what is done already.
        begin = jnp.minimum(i * chunk, count - chunk)
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, chunk)  # noqa: E731
        new = refresh(part(factors), jax.tree.map(part, stack))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        return jax.tree.map(lambda x, y: put(x, y, begin), stack, new)

    return jax.lax.fori_loop(0, -(-count // chunk), body, stack)


def _refresh_chunk(method: Method, factors: jax.Array, old: Refreshed) -> Refreshed:
    """Refreshes some eigenbases together; where it fails or is not needed, none is new.

    An eigenbasis of zeros stands for none, with nothing to do. Where there is nothing
    to do at all, it costs nothing.
    """
    keep = lambda old: old  # noqa: E731
    # What is new is of a chunk before this one, with which it overlaps.
    is_left = jnp.any(old.eigenbases[..., 0, :] != 0, axis=-1) & ~old.is_new

    def refresh(old: Refreshed) -> Refreshed:
        step = _kronecker.power_step(
            factors, old.eigenbases, method.precision, is_first=method.initial
        )
        if method.tolerance is None:
            return _orthonormalized(method, factors, step, is_left, old)
        to_do = is_left & ~(step.off_diagonal <= method.tolerance)  # NaN then fails
        finish = functools.partial(_orthonormalized, method, factors, step, to_do)
        return jax.lax.cond(jnp.any(to_do), finish, keep, old)

    return jax.lax.cond(jnp.any(is_left), refresh, keep, old)


def _orthonormalized(
    method: Method,
    factors: jax.Array,
    step: _kronecker.PowerStep,
    to_do: jax.Array,
    old: Refreshed,
) -> Refreshed:
    """The orthonormalized power steps that are to do, where they are sound."""
    rows, decomposed = step.rows, method.initial
    if method.name == "eigh":
        rows = factors.astype(rows.dtype) / step.largest[..., None]
        decomposed = True
    rows, sizes, is_sound = _kronecker.orthonormalize(
        *(rows, step.quotients, to_do),
        by_cholesky=method.name == "cholesky_qr",
        decomposed=decomposed,
    )
    is_new = to_do & is_sound
    columns = jnp.swapaxes(rows, -2, -1).astype(old.eigenbases.dtype)
    return Refreshed(
        jnp.where(is_new[..., None, None], columns, old.eigenbases),
        jnp.where(is_new[..., None], sizes * step.largest, old.eigenvalues),
        is_new | old.is_new,
    )
