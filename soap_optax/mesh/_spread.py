"""Refreshes of parameters on a mesh of devices.

A parameter is *local* if it is aligned (see `_placement`) and no work is to be shared
among devices that have copies of it. Each device refreshes the blocks that it has of
it, and there is no communication. All other parameters are *spread*: each matrix of
their factors is brought to one device, its *owner*, so that all devices have about
equally much to do, and its new eigenbasis is handed back. An *exchange* does this for
the factors of one size that are sharded alike. A device has *rooms* in an exchange,
each for one matrix, and some rooms may stay empty. Everything happens in one
`jax.shard_map`, where a device refreshes its own blocks and the matrices that were
brought to it together.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from soap_optax._kronecker import BasisChange
from soap_optax.mesh import _mesh, _placement
from soap_optax.parameters._layout import layout_of_factors
from soap_optax.parameters._tree import Leaf
from soap_optax.refresh import _stacks
from soap_optax.refresh._clock import Due
from soap_optax.refresh._methods import Refreshed, RefreshMethod, RefreshRequest
from soap_optax.refresh._stacks import Bases, Refresh, Unit

# The two numbers of a unit (see `_stacks`), and the number of one of the matrices that
# a device has of it.
_Matrix = tuple[int, int, int]


def make_refresh(
    leaves: Sequence[Leaf],
    factors: Sequence[Any],
    method: RefreshMethod,
    request: RefreshRequest,
    change: BasisChange,
    count: int | None,
    refresh_axes: Sequence[str] | None,
) -> "Refresh | SpreadRefresh":
    """Plans a refresh of all parameters, on their mesh if their shardings are known.

    Args:
      leaves: plans of the parameters.
      factors: a list per parameter, with an array `[grid…, b, b]` or None per axis.
      method: method by which eigenbases are refreshed.
      request: what is asked of the method.
      change: how moments change basis.
      count: largest number of slots, or None; see `_stacks.make_slots`.
      refresh_axes: the option, see `soap_optax.soap`.
    """
    if any(leaf.sharding is None for leaf in leaves) or not leaves:
        layouts = tuple(leaf.layout for leaf in leaves)
        slots = _stacks.make_slots(factors, count)
        wanted = [None] * len(leaves)
        return Refresh(layouts, factors, wanted, method, request, change, slots)
    for leaf in leaves:
        _placement.check_refresh_axes(leaf, refresh_axes)
    with_factors = [i for i, leaf in enumerate(leaves) if leaf.layout.has_factors]
    local = [i for i in with_factors if _is_local(leaves[i], refresh_axes or ())]
    others = [i for i in with_factors if i not in local]
    if count is None:  # Each slot has a similar share of what one device has.
        both = (_slots_by_shards(leaves, factors, some) for some in (local, others))
        slots = tuple(a + b for a, b in itertools.zip_longest(*both, fillvalue=()))
    else:  # Slots decide what is refreshed when, so they must not depend on the mesh.
        slots = _stacks.make_slots(factors, count)
    axes = None if refresh_axes is None else tuple(refresh_axes)
    return SpreadRefresh(
        tuple(leaves), factors, method, request, change, tuple(local), slots, axes
    )


def _shared_axes(leaf: Leaf, refresh_axes: Sequence[str] | None) -> list[str]:
    """The mesh axes along which devices share the refreshes of a spread parameter.

    These are the axes that shard the parameter, because its factors may have copies
    along them, and those of `refresh_axes`, or all axes of the mesh.
    """
    _, sizes = _placement.spec_and_sizes(leaf)
    if refresh_axes is None:
        return [*sizes]
    return [name for name in sizes if name in {*_sharding_axes(leaf), *refresh_axes}]


def _is_local(leaf: Leaf, refresh_axes: Sequence[str]) -> bool:
    """Says whether each device refreshes what it has of a parameter by itself.

    The parameter is then aligned, and along the mesh axes in `refresh_axes` no two
    devices have copies of a block, so that there is no work to share.
    """
    if not _placement.is_aligned(leaf):
        return False
    _, sizes = _placement.spec_and_sizes(leaf)
    return all(sizes[name] == 1 for name in {*refresh_axes} - _sharding_axes(leaf))


def _sharding_axes(leaf: Leaf) -> set[str]:
    """The mesh axes that shard a parameter whose sharding is known."""
    spec, _ = _placement.spec_and_sizes(leaf)
    return {name for entry in spec for name in _mesh.names(entry)}


def _slots_by_shards(
    leaves: Sequence[Leaf], factors: Sequence[Any], members: list[int]
) -> list[tuple[int, ...]]:
    """Divides the parameters `members` into slots by a device's share of factors."""

    def shard(array: Any, sharding: _mesh.NamedSharding | None) -> Any:
        if array is None or sharding is None:
            return None
        return jax.ShapeDtypeStruct(sharding.shard_shape(array.shape), array.dtype)

    shards = [
        list(map(shard, factors[i], _placement.of_factors(leaves[i]))) for i in members
    ]
    slots = _stacks.make_slots(shards)
    return [tuple(members[k] for k in slot) for slot in slots]


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """Brings factors of one size, sharded alike, to their owners, and back.

    The rows of each matrix are sharded over some mesh axes. Along the mesh axes that do
    not shard the matrix, devices have copies. All devices that have rows of a matrix
    share the work. They are numbered along the mesh axes of the rows first.

    For example, there are three 4 × 4 matrices A, B, C on a mesh with axes x and y of
    size 2. Their rows are sharded over x and copied along y, so device 2x + y has rows
    2x and 2x + 1 of each. The owners of A, B, C are devices 0, 1, 2, so one room per
    device is enough. Devices with y = 0 pick, from their rows, what devices 0 and 2
    own, [A, C]. Devices with y = 1 pick what devices 1 and 3 own, [B, empty]. An
    all-to-all along x then gives device 0 all rows of A, device 2 all rows of C, and
    device 1 all rows of B. To hand back, the all-to-all goes the other way: devices
    with y = 0 get their rows of [A, C], and devices with y = 1 their rows of
    [B, empty]. An all-gather along y joins these to [A, C, B, empty], from which each
    device takes A, B and C.

    Arrays whose rows are not sharded, such as eigenvalues, are whole on every device.
    For them all these mesh axes count as axes along which devices have copies.

    Attributes:
      slot: number of the slot in which the factors are refreshed.
      rows: mesh axes over which the rows are sharded.
      copies: mesh axes along which devices have copies.
      sizes: sizes of the mesh.
      owners: for each matrix, the number of its owner and the number of its room there.
      rooms: number of rooms of each device.
    """

    slot: int
    rows: tuple[str, ...]
    copies: tuple[str, ...]
    sizes: Mapping[str, int]
    owners: Mapping[_Matrix, tuple[int, int]]
    rooms: int

    @property
    def units(self) -> list[Unit]:
        """The units whose matrices are exchanged."""
        return sorted({(i, axis) for i, axis, _ in self.owners})

    def bring(self, parts: Mapping[Unit, jax.Array], *, by_rows: bool) -> jax.Array:
        """Collects what this device owns, `[rooms, b, …]`, with zeros in empty rooms.

        Args:
          parts: for each unit, what this device has of its n matrices, `[n, …]`.
          by_rows: whether that is some rows of each matrix. If not, it is everything.
        """
        rows, _ = self._axes(by_rows)
        every = jnp.concatenate([parts[unit] for unit in self.units])
        wanted = self._contents(by_rows)
        mine = jnp.take(every, wanted, axis=0, mode="fill", fill_value=0)
        if rows:
            mine = jax.lax.all_to_all(mine, rows, split_axis=0, concat_axis=1)
        return mine.reshape(self.rooms, -1, *every.shape[2:])

    def hand_back(self, mine: jax.Array, *, by_rows: bool) -> dict[Unit, jax.Array]:
        """Inverts `bring`."""
        rows, copies = self._axes(by_rows)
        parts = mine.reshape(self.rooms, self._count(rows), -1, *mine.shape[2:])
        if rows:
            parts = jax.lax.all_to_all(parts, rows, split_axis=1, concat_axis=0)
        else:
            parts = jnp.swapaxes(parts, 0, 1)
        parts = jax.lax.all_gather(parts, copies) if copies else parts[None]
        parts = parts.reshape(-1, *parts.shape[3:])
        places = self._places(by_rows).items()
        return {unit: jnp.take(parts, place, axis=0) for unit, place in places}

    def is_filled(self) -> jax.Array:
        """Says of each room of this device whether it is not empty, `[rooms]`."""
        count = len(self.owners)
        return self._contents(by_rows=False)[0] < count

    def _contents(self, by_rows: bool) -> jax.Array:
        """Where this device finds what it puts into rooms, `[cuts, rooms]`.

        Along the mesh axes of the rows there are as many devices as cuts. For each room
        of each of them the result has an index into the concatenated units. For an
        empty room, the index is behind their end.
        """
        rows, copies = self._axes(by_rows)
        places = np.concatenate(list(self._places(by_rows).values()))
        count, cuts = self._count(copies), self._count(rows)
        contents = np.full(count * cuts * self.rooms, len(places))
        contents[places] = np.arange(len(places))
        everywhere = jnp.asarray(contents.reshape(count, cuts, self.rooms))
        return everywhere[jax.lax.axis_index(copies) if copies else 0]

    def _places(self, by_rows: bool) -> dict[Unit, np.ndarray[Any, Any]]:
        """The index of each matrix in a flattened array `[copies, cuts, rooms]`."""
        rows, copies = self._axes(by_rows)
        cuts, count = self._count(rows), self._count(copies)
        places: dict[Unit, list[int]] = collections.defaultdict(list)
        for (i, axis, _), (owner, room) in sorted(self.owners.items()):
            cut, copy = divmod(owner, count)
            places[i, axis].append((copy * cuts + cut) * self.rooms + room)
        return {unit: np.asarray(place) for unit, place in places.items()}

    def _axes(self, by_rows: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.rows, self.copies) if by_rows else ((), self.rows + self.copies)

    def _count(self, axes: Sequence[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors", "request", "change"],
    meta_fields=["leaves", "method", "local", "slots", "refresh_axes"],
)
@dataclasses.dataclass(frozen=True)
class SpreadRefresh:
    """A refresh of the eigenbases of all parameters on a mesh, used like `Refresh`.

    Attributes:
      leaves: plans of the parameters, in which all shardings are known.
      factors: a list per parameter, with an array `[grid…, b, b]` or None per axis.
      method: method by which eigenbases are refreshed.
      request: what is asked of the method.
      change: how moments change basis.
      local: numbers of the parameters that each device refreshes by itself.
      slots: for each slot, the numbers of its parameters.
      refresh_axes: mesh axes along which devices that have copies share the work, or
        None for all of them.
    """

    leaves: tuple[Leaf, ...]
    factors: Sequence[Any]
    method: RefreshMethod
    request: RefreshRequest
    change: BasisChange
    local: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]
    refresh_axes: tuple[str, ...] | None

    @functools.cached_property
    def exchanges(self) -> list[_Exchange]:
        """The exchanges of the factors of spread parameters, slot by slot."""
        return [
            exchange
            for slot, members in enumerate(self.slots)
            for exchange in _exchanges(
                self.leaves,
                self.factors,
                slot,
                self._spread(members),
                self.refresh_axes,
            )
        ]

    def _spread(self, members: Sequence[int]) -> list[int]:
        """The numbers of the parameters in `members` that are spread."""
        return [i for i in members if i not in self.local]

    def run(self, bases: Bases, due: Due) -> Bases:
        """Refreshes the slots that are due; their first moments follow.

        First moments of local parameters change basis on each device, slot by slot,
        when the eigenbases are overwritten. First moments of spread parameters change
        basis after that, where they lie. For this all their old eigenbases are kept
        until then.
        """
        if not self.slots:
            return bases
        moments = [m if i in self.local else [] for i, m in enumerate(bases.moments)]
        specs = self._specs(operands := bases._replace(moments=moments))
        refresh = _mesh.on_each_device(
            self._run_on_device,
            mesh=_mesh_of(self.leaves),
            in_specs=(*[jax.P()] * 3, specs.eigenbases, specs),
            out_specs=specs,
        )
        raises = jnp.asarray(self.change.raises)
        change = dataclasses.replace(self.change, raises=raises)
        new = refresh(due, self.request, change, list(self.factors), operands)
        moments = list(bases.moments)
        for i in self.local:
            moments[i] = new.moments[i]
        new = new._replace(moments=moments)
        for slot, members in enumerate(self.slots):
            if spread := self._spread(members):
                adopt = functools.partial(self._adopt, spread)
                adopt = self._if_due(slot, due, adopt, lambda old, *_: old)
                adopted = adopt(bases.take(spread), new.take(spread), due.has(slot))
                new = new.put(spread, adopted)
        return new

    def _run_on_device(
        self,
        due: Due,
        request: RefreshRequest,
        change: BasisChange,
        factors: list[Any],
        bases: Bases,
    ) -> Bases:
        """Refreshes the eigenbases of what one device has or owns.

        This is a `Refresh` whose lists have the local parameters first and then an
        entry for each exchange, as if its factors were a parameter.
        """
        mine = bases.take(self.local)
        layouts = [_placement.local_layout(self.leaves[i]) for i in self.local]
        all_factors = [factors[i] for i in self.local]
        for exchange in self.exchanges:
            bring = functools.partial(_bring, exchange)
            none = functools.partial(_zeros_like_result, bring)
            bring = self._if_due(exchange.slot, due, bring, none)
            factor, brought = bring(factors, bases)
            [eigenbases], *_ = brought
            layouts.append(layout_of_factors(*eigenbases.shape[:2]))
            all_factors.append([factor])
            mine = Bases(*([*a, b] for a, b in zip(mine, brought, strict=True)))
        refresh = Refresh(
            tuple(layouts),
            all_factors,
            [None] * len(self.local) + [e.is_filled() for e in self.exchanges],
            self.method,
            request,
            change,
            self._slots_on_device(),
        )
        mine = refresh.run(mine, due)
        count = len(self.local)
        new = bases.put(self.local, mine.take(range(count)))
        for number, exchange in enumerate(self.exchanges, count):
            hand_back = functools.partial(_hand_back, exchange)
            keep = lambda new, _: new  # noqa: E731
            hand_back = self._if_due(exchange.slot, due, hand_back, keep)
            new = hand_back(new, Bases(*(entries[number] for entries in mine)))
        return new

    def _slots_on_device(self) -> tuple[tuple[int, ...], ...]:
        """The slots of the `Refresh` on a device, with the numbers in its lists."""
        place = {i: number for number, i in enumerate(self.local)}
        slots = [[place[i] for i in slot if i in place] for slot in self.slots]
        for number, exchange in enumerate(self.exchanges, len(self.local)):
            slots[exchange.slot].append(number)
        return tuple(map(tuple, slots))

    def _adopt(
        self, members: Sequence[int], old: Bases, new: Bases, is_due: jax.Array
    ) -> Bases:
        """Changes the first moments of spread parameters to their new eigenbases.

        Where a first moment would not stay finite, the old eigenbasis stays.
        """

        def refreshed(basis: Any, eigenvalues: Any, skipped: Any, before: Any) -> Any:
            if basis is None:
                return None
            is_new = is_due & (skipped == before)[..., 0]
            return Refreshed(basis, eigenvalues, is_new, is_kept=~is_new)

        def adopt(leaf: Leaf, before: Bases, after: Bases) -> Bases:
            found = map(
                refreshed,
                after.eigenbases,
                after.eigenvalues,
                after.skipped,
                before.skipped,
            )
            whole = jax.tree.map(
                lambda moment: _placement.for_blocks(moment, leaf), before.moments
            )
            adopted = _stacks.adopt(
                list(found),
                leaf.layout,
                before._replace(moments=whole),
                is_due,
                self.change,
            )
            moments = jax.tree.map(
                lambda moment: _placement.like_parameter(moment, leaf), adopted.moments
            )
            return adopted._replace(moments=moments)

        entries = zip(
            members, zip(*old, strict=True), zip(*new, strict=True), strict=True
        )
        adopted = [adopt(self.leaves[i], Bases(*a), Bases(*b)) for i, a, b in entries]
        return Bases(*map(list, zip(*adopted, strict=True)))

    def _if_due(self, slot: int, due: Due, do: Any, keep: Any) -> Any:
        """Chooses the function `do` if the slot is refreshed, and `keep` if not."""
        if len(self.slots) == 1:
            return do
        is_due = due.has_for_any(slot).astype(jnp.int32)
        return lambda *operands: jax.lax.switch(is_due, [keep, do], *operands)

    def _specs(self, bases: Bases) -> Bases:
        """The specs of all arrays in the bases."""

        def specs(shardings_of: Any) -> list[Any]:
            return [[s and s.spec for s in shardings_of(leaf)] for leaf in self.leaves]

        vectors = specs(_placement.of_vectors)
        matrices = specs(_placement.of_factors)
        moments = [
            jax.tree.map(
                lambda _, leaf=leaf: _placement.spec_and_sizes(leaf)[0], of_leaf
            )
            for leaf, of_leaf in zip(self.leaves, bases.moments, strict=True)
        ]
        return Bases(matrices, vectors, vectors, moments)


def _mesh_of(leaves: Sequence[Leaf]) -> Any:
    return leaves[0].sharding.mesh  # type: ignore[union-attr]


def _zeros_like_result(function: Any, *operands: Any) -> Any:
    """Zeros in the shapes of what the function would make of the operands."""
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *operands))


def _bring(
    exchange: _Exchange, factors: list[Any], bases: Bases
) -> tuple[jax.Array, list[Any]]:
    """Brings the factors that this device owns, and an entry for each list of `Bases`.

    The last entry is empty, because first moments stay where they are.
    """

    def one(entries: list[Any], rank: int) -> jax.Array:
        parts = {}
        for i, axis in exchange.units:
            array = entries[i][axis]
            parts[i, axis] = array.reshape(-1, *array.shape[-rank:])
        return exchange.bring(parts, by_rows=rank == 2)

    eigenbases = one(bases.eigenbases, 2)
    eigenvalues, skipped = one(bases.eigenvalues, 1), one(bases.skipped, 1)
    return one(factors, 2), [[eigenbases], [eigenvalues], [skipped], []]


def _hand_back(exchange: _Exchange, bases: Bases, mine: Bases) -> Bases:
    """Puts what devices own back into the bases, where it came from."""

    def one(entries: list[Any], owned: jax.Array, by_rows: bool) -> list[Any]:
        changed = [entry and list(entry) for entry in entries]
        for (i, axis), part in exchange.hand_back(owned, by_rows=by_rows).items():
            changed[i][axis] = part.reshape(entries[i][axis].shape)
        return changed

    return Bases(
        one(bases.eigenbases, mine.eigenbases[0], by_rows=True),
        one(bases.eigenvalues, mine.eigenvalues[0], by_rows=False),
        one(bases.skipped, mine.skipped[0], by_rows=False),
        bases.moments,
    )


class _Kind(NamedTuple):
    """What factors need to have in common to share an exchange."""

    size: int
    dtype: Any
    rows: tuple[str, ...]
    copies: tuple[str, ...]


def _exchanges(
    leaves: Sequence[Leaf],
    factors: Sequence[Any],
    slot: int,
    members: list[int],
    refresh_axes: tuple[str, ...] | None,
) -> list[_Exchange]:
    """Gives the matrices of the spread parameters of a slot to owners, largest first.

    The owner of a matrix is the device with the least to do of those that have a part
    of it.
    """
    axes_of = {i: _shared_axes(leaves[i], refresh_axes) for i in members}
    matrices = [
        (kind, (i, axis, number))
        for i in members
        for axis, sharding in enumerate(_placement.of_factors(leaves[i]))
        if sharding is not None
        for shape in [leaves[i].layout.factor_shapes()[axis]]
        for kind, count in [_kind(shape, factors[i][axis].dtype, sharding, axes_of[i])]
        for number in range(count)
    ]
    sizes = _mesh_of(leaves).shape
    load = np.zeros([*sizes.values()])
    owners: dict[_Kind, dict[_Matrix, tuple[int, int]]] = {}
    rooms: collections.Counter[tuple[_Kind, int]] = collections.Counter()
    for kind, matrix in sorted(matrices, key=lambda entry: -entry[0].size):
        shared = [list(sizes).index(name) for name in (*kind.rows, *kind.copies)]
        owner = _give_to_idlest(load, shared, kind.size**3)
        owners.setdefault(kind, {})[matrix] = owner, rooms[kind, owner]
        rooms[kind, owner] += 1
    return [
        _Exchange(
            slot,
            kind.rows,
            kind.copies,
            sizes,
            of_kind,
            rooms=1 + max(room for _, room in of_kind.values()),
        )
        for kind, of_kind in owners.items()
    ]


def _give_to_idlest(
    load: np.ndarray[Any, Any], shared: Sequence[int], cost: float
) -> int:
    """Adds a cost to the load of the device that has the least to do.

    Args:
      load: load of each device of the mesh; it is changed in place.
      shared: axes of the mesh along which devices share the work. Along the other axes
        devices do equal work at the same time, each for its own shards.
      cost: cost of the work to be done.

    Returns:
      The number of the device, counted along the shared axes in their order.
    """
    others = tuple(d for d in range(load.ndim) if d not in shared)
    busiest = load.max(axis=others, keepdims=True).transpose(*shared, *others)
    owner = int(np.argmin(busiest))
    counts = [load.shape[axis] for axis in shared]
    where: list[Any] = [slice(None)] * load.ndim
    for axis, index in zip(shared, np.unravel_index(owner, counts), strict=True):
        where[axis] = int(index)
    load[tuple(where)] += cost
    return owner


def _kind(
    shape: Any, dtype: Any, sharding: _mesh.NamedSharding, shared: Sequence[str]
) -> tuple[_Kind, int]:
    """The kind of the matrices of a factor, and how many of them a device has."""
    *grid, rows, _ = map(_mesh.names, sharding.spec)
    used = {*rows, *(name for entry in grid for name in entry)}
    copies = tuple(name for name in shared if name not in used)
    *count, _, size = sharding.shard_shape(shape)
    return _Kind(size, dtype, rows, copies), math.prod(count)
