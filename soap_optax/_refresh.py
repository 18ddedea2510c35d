"""Refreshes all eigenbases: the factors of one size together, in bounded memory.

A refresh goes through the parameters in slots of about equal cost, one slot after the
other, or, staggered, one slot a step. In a slot

    start          takes the power step of each factor: one stack for each size
    orthonormalize the stacks, in place, in chunks, where it is needed
    adopt          puts each new eigenbasis in place and changes the first moments to it

The first and the last are branches over the slots, the second is the same for all: a
program has one decomposition for each size, however many factors there are. A factor on
a mesh of devices whose sharding is not known is refreshed alone, because stacking would
move it (see `_sharding`).
"""

import collections
import dataclasses
import functools
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from soap_optax import _kronecker
from soap_optax._layout import Layout, explicit_sharding

# Into how many slots a refresh is cut that is not staggered, if each has so many bytes:
# as many times smaller than the eigenbases is what it keeps beside them.
_SLOTS = 8
_SLOT_BYTES = 2**20
# A chunk of a stack has at most this many bytes, and this share of it, or one matrix.
_CHUNK_BYTES = 2**25
_CHUNK_SHARE = 1 / 8

_Key = Any  # what stacks are sorted by: size and dtype


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
    """A refreshed eigenbasis.

    Attributes:
      rows: its eigenvectors, in the order of the old one's, `[grid…, b, b]`.
      eigenvalues: estimates that belong to them, `[grid…, b]`.
      is_new: whether they are new, `[grid…]`; if not, they are anything.
    """

    rows: jax.Array
    eigenvalues: jax.Array
    is_new: jax.Array


class _Stack(NamedTuple):
    """Of factors of one size, `[n, …]`: their `PowerStep`, and what becomes of it.

    Attributes:
      rows: of the power step, then of the new eigenbasis.
      quotients: see `PowerStep`.
      largest: see `PowerStep`.
      sizes: see `orthonormalize`.
      to_do: whether a refresh is needed, and not done yet.
      is_done: whether `rows` and `sizes` are those of a new eigenbasis.
    """

    rows: jax.Array
    quotients: jax.Array
    largest: jax.Array
    sizes: jax.Array
    to_do: jax.Array
    is_done: jax.Array


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
            if factor is not None and _key(factor) is not None
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
        starts = [
            functools.partial(self._start_slot, members) for members in self.slots
        ]
        stacks = {
            key: _orthonormalized(stack, self.method)
            for key, stack in _switch(slot, starts, bases.eigenbases).items()
        }
        bases = Bases(*map(list, bases))
        # One branch for each slot, with nothing of the others, which would be copied.
        for k, members in enumerate(self.slots):
            branches = [_keep, functools.partial(self._adopt_slot, members)]
            if len(self.slots) == 1:
                branches = branches[1:]
            is_mine = jnp.equal(slot, k).astype(jnp.int32)
            mine = _switch(is_mine, branches, take(members, bases), stacks)
            put(mine, members, bases)
        return bases

    def _start_slot(
        self, members: list[int], eigenbases: list[Any]
    ) -> dict[_Key, _Stack]:
        """The power steps of a slot, in stacks that have room for those of any."""
        parts: dict[_Key, list[_Stack]] = collections.defaultdict(list)
        for i in members:
            for factor, basis in zip(self.factors[i], eigenbases[i], strict=True):
                if factor is not None and (key := _key(factor)) is not None:
                    part = _power_steps(_flat(factor), _flat(basis), self.method)
                    parts[key].append(part)
        room: collections.Counter[_Key] = collections.Counter()
        for slot in self.slots:
            room |= self._count(slot)
        return {key: _stacked(parts[key], key, count) for key, count in room.items()}

    def _count(self, members: list[int]) -> collections.Counter[_Key]:
        """How many factors of each size a slot has."""
        counts: collections.Counter[_Key] = collections.Counter()
        for i in members:
            for factor in self.factors[i]:
                if factor is not None and (key := _key(factor)) is not None:
                    counts[key] += len(_flat(factor))
        return counts

    def _adopt_slot(
        self, members: list[int], mine: Bases, stacks: dict[_Key, _Stack]
    ) -> Bases:
        """The bases of a slot's parameters with the new ones from its stacks."""
        ends: collections.Counter[_Key] = collections.Counter()

        def one(factor: Any, basis: Any) -> Refreshed | None:
            if factor is None:
                return None
            key = _key(factor)
            if key is None:
                return refresh_one(factor, basis, self.method)
            begin = ends[key]
            end = ends[key] = begin + len(_flat(factor))
            part = jax.tree.map(lambda x: x[begin:end], stacks[key])
            return _from_stack(part, factor.shape)

        adopted = []
        for i, *of_leaf in zip(members, *mine, strict=True):
            old = Bases(*of_leaf)
            pairs = zip(self.factors[i], old.eigenbases, strict=True)
            new = [one(*pair) for pair in pairs]
            adopted.append(adopt(new, self.layouts[i], old, self.method.precision))
        return Bases(*map(list, zip(*adopted, strict=True)))


def _keep(bases: Bases, _: dict[_Key, _Stack]) -> Bases:
    return bases


def refresh_one(factor: jax.Array, eigenbasis: jax.Array, method: Method) -> Refreshed:
    """Refreshes the eigenbasis of one factor `[grid…, b, b]`, as it is sharded."""

    def run(factor: jax.Array, eigenbasis: jax.Array, initial: Any) -> Refreshed:
        mine = dataclasses.replace(method, initial=initial)

        def in_stack(to_stack: Any, factor: Any, eigenbasis: Any) -> Refreshed:
            stack = _power_steps(to_stack(factor), to_stack(eigenbasis), mine)
            return _from_stack(_orthonormalized(stack, mine), factor.shape)

        block_by_block = functools.partial(in_stack, _flat)
        if not _may_be_spread(factor):
            return block_by_block(factor, eigenbasis)
        # Not a batch on CPU even if that has to gather it, see `_in_chunks`.
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


def _key(factor: jax.Array) -> _Key:
    """Size and dtype of computation; None where it may be spread over devices."""
    if _may_be_spread(factor):
        return None
    return factor.shape[-1], jnp.promote_types(factor.dtype, jnp.float32)


def _may_be_spread(array: jax.Array) -> bool:
    """Whether it is on a mesh of several devices."""
    mesh = jax.typeof(array).sharding.mesh
    axes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind != jax.sharding.AxisType.Manual and size > 1 for kind, size in axes)


def _flat(array: jax.Array) -> jax.Array:
    """`[grid…, b, b]` as `[n, b, b]`."""
    return array.reshape(-1, *array.shape[-2:])


def _power_steps(factor: jax.Array, eigenbasis: jax.Array, method: Method) -> _Stack:
    """The power steps, or the factors themselves where those are decomposed.

    An eigenbasis of zeros stands for none, with nothing to do.
    """
    step = _kronecker.power_step(
        factor, eigenbasis, method.precision, is_first=method.initial
    )
    rows = step.rows
    if method.name == "eigh":
        rows = factor.astype(rows.dtype) / step.largest[..., None]
    to_do = jnp.any(eigenbasis[..., 0, :] != 0, axis=-1)
    if method.tolerance is not None:  # to do for NaN, which then fails
        to_do &= ~(step.off_diagonal <= method.tolerance)
    zeros = jnp.zeros_like(step.quotients)
    is_done = jnp.zeros_like(to_do)
    return _Stack(rows, step.quotients, step.largest, zeros, to_do, is_done)


def _stacked(parts: Sequence[_Stack], key: _Key, count: int) -> _Stack:
    """Stacks factors to `[count, …]`, filled up with some that are not to do."""
    size, dtype = key

    def one(shape: tuple[int, ...], dtype: Any, arrays: Sequence[jax.Array]) -> Any:
        stack, begin = jnp.zeros((count, *shape), dtype), 0
        for array in arrays:
            stack = jax.lax.dynamic_update_slice_in_dim(stack, array, begin, axis=0)
            begin += len(array)
        return stack

    shapes = ((size, size), (size,), (1,), (size,), (), ())
    dtypes = (dtype, dtype, dtype, dtype, bool, bool)
    fields = zip(*parts, strict=True) if parts else [()] * len(shapes)
    return _Stack(*map(one, shapes, dtypes, fields))


def _from_stack(stack: _Stack, shape: tuple[int, ...]) -> Refreshed:
    return Refreshed(
        rows=stack.rows.reshape(shape),
        eigenvalues=(stack.sizes * stack.largest).reshape(shape[:-1]),
        is_new=stack.is_done.reshape(shape[:-2]),
    )


def adopt(
    new: Sequence[Refreshed | None], layout: Layout, old: Bases, precision: Any
) -> Bases:
    """The bases of one parameter with its new eigenbases, where they are new."""
    moments, is_new = _kronecker.change_basis(
        old.moments,
        old.eigenbases,
        [None if n is None else n.rows for n in new],
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
        # A constraint on the layout would gather what is spread over devices.
        _kronecker.adopt(
            *(new.rows, eigenbasis, is_new), overwrite=not _may_be_spread(eigenbasis)
        ),
        jnp.where(is_new[..., None], values, eigenvalues),
        skipped + (~is_new[..., None]).astype(skipped.dtype),
    )


def _orthonormalized(stack: _Stack, method: Method) -> _Stack:
    """The stack with new eigenbases, where they are needed and nothing fails."""
    most = min(_CHUNK_BYTES, _CHUNK_SHARE * stack.rows.nbytes)
    chunk = max(1, int(most) // stack.rows[0].nbytes)
    by_cholesky = method.name == "cholesky_qr"
    first = functools.partial(
        _kronecker.orthonormalize,
        by_cholesky=by_cholesky,
        decomposed=True if method.name == "eigh" else method.initial,
    )
    stack = _in_chunks(first, stack, chunk)
    if by_cholesky:
        again = functools.partial(_kronecker.orthonormalize, by_cholesky=False)
        stack = _in_chunks(again, stack, 1)
    return stack


def _in_chunks(function: Any, stack: _Stack, chunk: int) -> _Stack:
    """Applies `function` to rows and quotients that are to do; where it succeeds, done.

    A chunk where nothing is to do costs nothing.
    """

    def apply(part: _Stack) -> _Stack:
        rows, sizes = function(part.rows, part.quotients)
        sound = _kronecker.is_orthonormal(rows)
        new = part.to_do & sound
        return part._replace(
            rows=jnp.where(new[..., None, None], rows, part.rows),
            sizes=jnp.where(new[..., None], sizes, part.sizes),
            to_do=part.to_do & ~sound,
            is_done=part.is_done | new,
        )

    def apply_if_any(part: _Stack) -> _Stack:
        return jax.lax.cond(jnp.any(part.to_do), apply, lambda part: part, part)

    def refresh_chunk(chunk: int, i: jax.Array, stack: _Stack) -> _Stack:
        # The last one may overlap with what is done already.
        begin = jnp.minimum(i * chunk, len(stack.rows) - chunk)
        part = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, begin, chunk), stack
        )
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, begin, 0),
            *(stack, apply_if_any(part)),
        )

    def loop(stack: _Stack, chunk: int) -> _Stack:
        count = len(stack.rows)
        if count == chunk:
            return apply_if_any(stack)
        body = functools.partial(refresh_chunk, chunk)
        return jax.lax.fori_loop(0, -(-count // chunk), body, stack)

    if chunk == 1:
        return loop(stack, 1)
    # On CPU decompositions come from LAPACK, one after another anyway; batches of them
    # beside other work have been seen to wait for each other for ever (JAX 0.10.2).
    return jax.lax.platform_dependent(
        stack,
        cpu=functools.partial(loop, chunk=1),
        default=functools.partial(loop, chunk=chunk),
    )
