"""Refreshes all eigenbases: the factors of one size together, in bounded memory.

A *unit* is the factor `[grid…, b, b]` of one axis of one parameter. It holds one matrix
for each block of the parameter. If factors are packed, it has their shape until a chunk
of them is refreshed (see `_triangles`). The parameters are divided into *slots* of
about equal cost. The slots are refreshed one after the other in one step or, if they
are staggered, in steps of their own (see `_clock`). The refresh of a slot has three
parts:

    gather    copies the factors of each size into one *stack* `[height, b, b]`, and
              their eigenbases into another one
    refresh   refreshes the eigenbases of a stack in place, a *chunk* of it at a time
    adopt     gives each parameter its new eigenbases and changes its first moments to
              them

The first and the last part have a branch for each slot, and the second part is shared
by all slots. So a program has one decomposition for each size, however many factors
there are. A factor on a mesh of devices whose sharding is not known is refreshed alone,
because stacking would move it (see `soap_optax.mesh._spread`).
"""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from soap_optax import _kronecker, _triangles
from soap_optax._dtypes import at_least_float32
from soap_optax._kronecker import BasisChange
from soap_optax.mesh import _mesh
from soap_optax.parameters._layout import Layout
from soap_optax.refresh import _members
from soap_optax.refresh._clock import Due
from soap_optax.refresh._methods import Refreshed, RefreshMethod, RefreshRequest

# A refresh that is not staggered has at most `_SLOTS` slots, with factors of on average
# at least `_SLOT_BYTES` bytes. More slots need less memory, because only the stacks of
# one slot are in memory at a time.
_SLOTS = 8
_SLOT_BYTES = 2**20
# A chunk has at most `_CHUNK_BYTES` bytes, in the dtype of the computation, but at
# least one matrix. Small matrices thereby go in one batch, and what a batch of large
# ones needs beside its stack stays small.
_CHUNK_BYTES = 2**25

Unit = tuple[int, int]  # It has the number of a parameter and the number of an axis.


class Bases(NamedTuple):
    """What a refresh changes: four lists, each with an entry for each parameter.

    Attributes:
      eigenbases: each entry has an array `[grid…, b, b]`, or None, for each axis.
      eigenvalues: each entry has an array `[grid…, b]`, or None, for each axis.
      skipped: each entry has an array `[grid…, 1]`, or None, for each axis; see
        `EigenbasisState`.
      moments: each entry has a list of `Moments`, one for each state that has first
        moments of the parameter.
    """

    eigenbases: list[Any]
    eigenvalues: list[Any]
    skipped: list[Any]
    moments: list[Any]

    def take(self, members: Sequence[int]) -> "Bases":
        """Selects the entries of the parameters `members` from each list."""
        return Bases(*([entries[i] for i in members] for entries in self))

    def put(self, members: Sequence[int], part: "Bases") -> "Bases":
        """Replaces the entries of the parameters `members` by those in `part`."""
        changed = [list(entries) for entries in self]
        for entries, new_entries in zip(changed, part, strict=True):
            for i, new in zip(members, new_entries, strict=True):
                entries[i] = new
        return Bases(*changed)


def make_slots(
    factors: Sequence[Any], count: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Divides parameters into slots of about equal costs.

    Args:
      factors: a list per parameter, with an array, its `jax.ShapeDtypeStruct` or None
        for each axis.
      count: largest number of slots, or None for a number with which a refresh of all
        slots, one after the other, needs little memory.

    Returns:
      For each slot, the numbers of its parameters.
    """
    if count is None:
        stacked = [
            factor.size * factor.dtype.itemsize
            for of_leaf in factors
            for factor in of_leaf
            if factor is not None and not _mesh.may_be_spread(factor)
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
    return tuple(map(tuple, slots))


@dataclasses.dataclass(frozen=True)
class Stack:
    """The units of one size and dtype, which are stacked in each slot.

    Attributes:
      units: for each slot, its units in the order in which they are stacked.
      shapes: shape `[grid…, b, b]` of each unit.
    """

    units: Sequence[Sequence[Unit]]
    shapes: Mapping[Unit, tuple[int, ...]]

    @property
    def height(self) -> int:
        """The number of matrices in the slot that has the most."""
        return max(sum(self.counts(slot)) for slot in range(len(self.units)))

    def counts(self, slot: int) -> list[int]:
        """The number of matrices of each unit in a slot."""
        return [math.prod(self.shapes[unit][:-2]) for unit in self.units[slot]]

    def gather(self, slot: int, array_of: Callable[[Unit], jax.Array]) -> jax.Array:
        """Stacks the arrays of a slot, filled up with zeros to `[height, …]`.

        Args:
          slot: number of the slot.
          array_of: gives an array `[n, …]` for a unit that has n matrices.
        """
        first = next(itertools.chain(*self.units))
        like = array_of(first)  # In a shard_map zeros have to vary as the arrays do.
        missing = self.height - sum(self.counts(slot))
        zeros = jnp.zeros_like(like, shape=(missing, *like.shape[1:]))
        return jnp.concatenate([*map(array_of, self.units[slot]), zeros])

    def scatter(self, slot: int, refreshed: Refreshed) -> dict[Unit, Refreshed]:
        """Cuts the results `[height, …]` of a slot into the results of its units."""
        ends = list(itertools.accumulate(self.counts(slot), initial=0))
        return {
            unit: _in_grid([x[begin:end] for x in refreshed], self.shapes[unit])
            for unit, (begin, end) in zip(
                self.units[slot], itertools.pairwise(ends), strict=True
            )
        }


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors", "wanted", "request", "change"],
    meta_fields=["layouts", "method", "slots"],
)
@dataclasses.dataclass(frozen=True)
class Refresh:
    """A refresh of the eigenbases of all parameters.

    It is a pytree, so that it can be an operand of compiled functions.

    Attributes:
      layouts: layout of each parameter.
      factors: a list per parameter, with an array `[grid…, b, b]` or None per axis.
      wanted: for each parameter, whether each of its matrices is wanted, `[n]`, or None
        if all are.
      method: method by which eigenbases are refreshed.
      request: what is asked of the method.
      change: how moments change basis.
      slots: for each slot, the numbers of its parameters; see `make_slots`.
    """

    layouts: tuple[Layout, ...]
    factors: Sequence[Any]
    wanted: Sequence[jax.Array | None]
    method: RefreshMethod
    request: RefreshRequest
    change: BasisChange
    slots: tuple[tuple[int, ...], ...]

    def run(self, bases: Bases, due: Due) -> Bases:
        """Refreshes the slots that are due; their first moments follow."""
        if not self.slots:
            return bases
        run_slot = functools.partial(self._run_slot, due)
        if len(self.slots) == 1:
            return run_slot(0, bases)
        return jax.lax.fori_loop(due.least, due.most, run_slot, bases)

    def _run_slot(self, due: Due, slot: Any, bases: Bases) -> Bases:
        numbers = range(len(self.slots))
        is_due = due.has(slot)
        gather = [functools.partial(self._gather, k) for k in numbers]
        refreshed = [
            _refresh_stack(
                self.method, self.request, factors, eigenbases, wanted & is_due
            )
            for factors, eigenbases, wanted in _switch(slot, gather, bases.eigenbases)
        ]
        # Each slot has a conditional of its own that takes nothing of the other slots,
        # because XLA would copy what it takes (no public issue is known; the test of
        # what a step copies in tests/test_batches.py shows it).
        for k, members in enumerate(self.slots):
            adopt = functools.partial(self._adopt, k)
            branches = [adopt] if len(self.slots) == 1 else [_keep, adopt]
            is_mine = jnp.equal(slot, k).astype(jnp.int32)
            mine = _switch(is_mine, branches, bases.take(members), refreshed, is_due)
            bases = bases.put(members, mine)
        return bases

    @functools.cached_property
    def _stacks(self) -> list[Stack]:
        """The stacks, one for each kind of factor that may be stacked."""
        units: dict[Any, list[list[Unit]]] = {}
        shapes = {}
        for slot, members in enumerate(self.slots):
            for i in members:
                for axis, factor in enumerate(self.factors[i]):
                    if factor is not None and not _mesh.may_be_spread(factor):
                        shape: Any = self.layouts[i].factor_shapes()[axis]
                        of_kind = units.setdefault(
                            _kind(factor, shape), [[] for _ in self.slots]
                        )
                        of_kind[slot].append((i, axis))
                        shapes[i, axis] = shape
        return [Stack(of_kind, shapes) for of_kind in units.values()]

    def _gather(
        self, slot: int, eigenbases: Sequence[Any]
    ) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """The factors and eigenbases in the stacks of a slot, and which are wanted."""

        def factors_of(unit: Unit) -> jax.Array:
            return _flat(self.factors[unit[0]][unit[1]])

        def eigenbases_of(unit: Unit) -> jax.Array:
            return _flat(eigenbases[unit[0]][unit[1]])

        def stacked(stack: Stack) -> tuple[jax.Array, jax.Array, jax.Array]:
            factors = stack.gather(slot, factors_of)
            given = [self.wanted[i] for i, _ in stack.units[slot]]
            wanted = _wanted(factors, stack.counts(slot), given)
            return factors, stack.gather(slot, eigenbases_of), wanted

        return [stacked(stack) for stack in self._stacks]

    def _adopt(
        self, slot: int, mine: Bases, stacks: list[Refreshed], is_due: jax.Array
    ) -> Bases:
        """Puts the results in the stacks of a slot into the bases of its parameters."""
        refreshed: dict[Unit, Refreshed] = {}
        for stack, new in zip(self._stacks, stacks, strict=True):
            refreshed |= stack.scatter(slot, new)

        def one(unit: Unit, factor: Any, basis: Any) -> Refreshed | None:
            if factor is None or unit in refreshed:
                return refreshed.get(unit)
            return refresh_one(factor, basis, self.method, self.request, is_due)

        adopted = []
        for i, *of_leaf in zip(self.slots[slot], *mine, strict=True):
            old = Bases(*of_leaf)
            pairs = zip(self.factors[i], old.eigenbases, strict=True)
            found = [one((i, axis), *pair) for axis, pair in enumerate(pairs)]
            adopted.append(adopt(found, self.layouts[i], old, is_due, self.change))
        return Bases(*map(list, zip(*adopted, strict=True)))


def _wanted(
    stack: jax.Array, counts: Sequence[int], given: Sequence[jax.Array | None]
) -> jax.Array:
    """Which matrices in a stack `[height, b, b]` are wanted, `[height]`.

    Args:
      stack: a stack, of which the matrices after those of all units fill up the height.
      counts: numbers of the matrices of its units.
      given: for each unit which of its matrices are wanted, or None: all.
    """
    filled = np.arange(len(stack)) < sum(counts)
    wanted = jnp.zeros_like(stack, shape=filled.shape, dtype=bool) | filled
    begins = itertools.accumulate(counts, initial=0)
    for begin, some in zip(begins, given, strict=False):
        if some is not None:
            wanted = jax.lax.dynamic_update_slice_in_dim(wanted, some, begin, axis=0)
    return wanted


def _keep(bases: Bases, *_: Any) -> Bases:
    return bases


def refresh_one(
    factor: jax.Array,
    eigenbasis: jax.Array,
    method: RefreshMethod,
    request: RefreshRequest,
    is_due: Any = True,
) -> Refreshed:
    """Refreshes the eigenbasis `[grid…, b, b]` of one factor and keeps its sharding."""

    def run(
        factor: jax.Array, eigenbasis: jax.Array, request: RefreshRequest, is_due: Any
    ) -> Refreshed:
        def in_stack(to_stack: Any, factor: Any, eigenbasis: Any) -> Refreshed:
            factors, bases = to_stack(factor), to_stack(eigenbasis)
            wanted = jnp.ones_like(factors[..., 0, 0], bool) & is_due
            new = _refresh_stack(method, request, factors, bases, wanted)
            return _in_grid(new, eigenbasis.shape)

        block_by_block = functools.partial(in_stack, _flat)
        if not _mesh.may_be_spread(factor):
            return block_by_block(factor, eigenbasis)
        # On CPU batches are avoided, even if that gathers the factor; see the comment
        # in `_by_chunks`.
        as_one = functools.partial(in_stack, lambda array: array[None])
        return jax.lax.platform_dependent(
            factor, eigenbasis, cpu=block_by_block, default=as_one
        )

    grid = range(factor.ndim - 2)
    dims = ([*grid, None, None], [*grid, None], grid, grid)
    shardings = [_mesh.explicit_sharding(factor, d) for d in dims]
    if shardings[0] is not None:
        run = _mesh.in_automatic_mode(run, Refreshed(*shardings))  # type: ignore[arg-type]
    return run(factor, eigenbasis, request, is_due)


def _switch(index: Any, branches: Sequence[Any], *operands: Any) -> Any:
    if len(branches) == 1:
        return branches[0](*operands)
    return jax.lax.switch(index, branches, *operands)


def _kind(factor: jax.Array, shape: tuple[int, ...]) -> Any:
    """The type of one matrix of a factor. Factors of one kind can be stacked."""
    return jax.typeof(jnp.zeros_like(factor, shape=shape[-2:]))


def _flat(array: jax.Array) -> jax.Array:
    """Reshapes `[grid…, b, b]` to `[n, b, b]`."""
    return array.reshape(-1, *array.shape[-2:])


def _in_grid(stack: Sequence[jax.Array], shape: tuple[int, ...]) -> Refreshed:
    """Reshapes the results of n matrices for a factor of shape `[grid…, b, b]`."""
    shapes = (shape, shape[:-1], shape[:-2], shape[:-2])
    return Refreshed(*(x.reshape(s) for x, s in zip(stack, shapes, strict=True)))


def adopt(
    new: Sequence[Refreshed | None],
    layout: Layout,
    old: Bases,
    is_due: jax.Array,
    change: BasisChange,
) -> Bases:
    """Replaces the eigenbases of one parameter by the new ones, where these are new.

    Args:
      new: results of a refresh for each axis, or None for an axis without a factor.
      layout: layout of the parameter.
      old: bases of the parameter, that is, its entry in each list of `Bases`.
      is_due: whether the parameter is due. If not, nothing in `new` is new.
      change: how moments change basis.

    Returns:
      The new bases of the parameter.
    """
    moments, is_new = _kronecker.change_basis(
        old.moments,
        old.eigenbases,
        [None if n is None else n.eigenbases for n in new],
        [None if n is None else n.is_new for n in new],
        layout,
        change,
    )
    entries = zip(
        new, is_new, old.eigenbases, old.eigenvalues, old.skipped, strict=True
    )
    adopted = [(None,) * 3 if e[0] is None else _adopted(is_due, *e) for e in entries]
    eigenbases, eigenvalues, skipped = map(list, zip(*adopted, strict=True))
    return Bases(eigenbases, eigenvalues, skipped, moments)


def _adopted(
    is_due: jax.Array,
    new: Any,
    is_new: Any,
    eigenbasis: Any,
    eigenvalues: Any,
    skipped: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    values = new.eigenvalues.astype(eigenvalues.dtype)
    has_values = is_new | new.is_kept
    return (
        jnp.where(is_new[..., None, None], new.eigenbases, eigenbasis),
        jnp.where(has_values[..., None], values, eigenvalues),
        skipped + (is_due & ~is_new[..., None]).astype(skipped.dtype),
    )


def _refresh_stack(
    method: RefreshMethod,
    request: RefreshRequest,
    factors: jax.Array,
    eigenbases: jax.Array,
    wanted: jax.Array,
) -> Refreshed:
    """Refreshes a stack, chunk by chunk. Where the method fails, eigenbases stay.

    Args:
      method: method by which eigenbases are refreshed.
      request: what is asked of the method.
      factors: factors, `[n, ..., b, b]`.
      eigenbases: eigenbases of these factors, `[n, ..., b, b]`.
      wanted: whether each eigenbasis is wanted, `[n, ...]`.
    """
    run = _members.as_one_stack(functools.partial(_by_chunks, method))
    return run(request, (factors, eigenbases, wanted))


def _by_chunks(
    method: RefreshMethod,
    request: RefreshRequest,
    stacks: tuple[jax.Array, jax.Array, jax.Array],
) -> Refreshed:
    """Refreshes stacks as `_refresh_stack` says, a chunk at a time.

    Under `jax.vmap` the stacks are those of all members, and what is asked may be an
    array `[n]`, with an entry for each matrix.
    """
    factors, eigenbases, wanted = stacks
    request = jax.tree.map(lambda x: _per_matrix(x, wanted), request)
    zeros = jnp.zeros_like(at_least_float32(eigenbases[..., 0, :]))
    matrix = eigenbases[0].size * zeros.dtype.itemsize
    chunk = max(1, min(len(factors), _CHUNK_BYTES // matrix))
    none = jnp.zeros_like(zeros[..., 0], bool)
    old = Refreshed(eigenbases, zeros, is_new=none, is_kept=none)
    run = functools.partial(_in_chunks, functools.partial(_refresh_chunk, method))
    if chunk == 1:
        return run(request, factors, wanted, old, chunk=1)
    # On CPU decompositions come from LAPACK, which does one after another anyway.
    # Batches of them beside other work have been seen to wait for each other for ever
    # (with JAX 0.10.2). No public issue is known, and `tests/test_workarounds.py` tells
    # when this workaround may go.
    return jax.lax.platform_dependent(
        request,
        factors,
        wanted,
        old,
        cpu=functools.partial(run, chunk=1),
        default=functools.partial(run, chunk=chunk),
    )


def _per_matrix(value: Any, wanted: jax.Array) -> Any:
    """Gives an array `[n]` the shape `[n, ...]` of `wanted`; a scalar stays."""
    if jnp.ndim(value) == 0:
        return value
    others = range(1, wanted.ndim)
    return jnp.broadcast_to(jnp.expand_dims(value, others), wanted.shape)


def _in_chunks(
    refresh: Any,
    request: RefreshRequest,
    factors: jax.Array,
    wanted: jax.Array,
    stack: Refreshed,
    chunk: int,
) -> Refreshed:
    """Applies `refresh` to `chunk` matrices of a stack at a time."""
    count = len(factors)
    if count == chunk:
        return refresh(request, factors, wanted, stack)

    def body(i: jax.Array, stack: Refreshed) -> Refreshed:
        # The last chunk may overlap with the one before it.
        begin = jnp.minimum(i * chunk, count - chunk)
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, chunk)  # noqa: E731
        asked = jax.tree.map(lambda x: part(x) if jnp.ndim(x) else x, request)
        new = refresh(asked, part(factors), part(wanted), jax.tree.map(part, stack))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        return jax.tree.map(lambda x, y: put(x, y, begin), stack, new)

    return jax.lax.fori_loop(0, -(-count // chunk), body, stack)


def _refresh_chunk(
    method: RefreshMethod,
    request: RefreshRequest,
    factors: jax.Array,
    wanted: jax.Array,
    done: Refreshed,
) -> Refreshed:
    """Refreshes the eigenbases of a chunk that are wanted and not new already.

    Eigenbases can be new already where chunks overlap. A chunk in which nothing is left
    to refresh costs nothing. If only some matrices are to be decomposed, because they
    belong to members of other counts, they come after the others, so that methods are
    always asked for one or the other.
    """
    if getattr(request.decompose, "ndim", 0) == 0:
        return _refresh_left(method, request, factors, wanted, done)

    def refresh(i: jax.Array, done: Refreshed) -> Refreshed:
        asked = dataclasses.replace(request, decompose=i == 1)
        some = wanted & (request.decompose == asked.decompose)
        return _refresh_left(method, asked, factors, some, done)

    return jax.lax.fori_loop(0, 2, refresh, done)


def _refresh_left(
    method: RefreshMethod,
    request: RefreshRequest,
    factors: jax.Array,
    wanted: jax.Array,
    done: Refreshed,
) -> Refreshed:
    """Refreshes those of the wanted eigenbases that are not new already, if any."""
    left = wanted & ~done.is_new & ~done.is_kept

    def refresh(done: Refreshed) -> Refreshed:
        matrices = _triangles.whole(factors, done.eigenbases.shape[-1])
        new = method.refresh(matrices, done.eigenbases, left, request)
        bases = new.eigenbases.astype(done.eigenbases.dtype)
        has_values = new.is_new | new.is_kept
        return Refreshed(
            jnp.where(new.is_new[..., None, None], bases, done.eigenbases),
            jnp.where(has_values[..., None], new.eigenvalues, done.eigenvalues),
            new.is_new | done.is_new,
            new.is_kept | done.is_kept,
        )

    return jax.lax.cond(jnp.any(left), refresh, lambda done: done, done)
