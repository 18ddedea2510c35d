"""Parameters on a mesh of devices: the shardings of a state, and refreshes there.

A parameter is *aligned* if all mesh axes that shard it cut its grid of blocks, so that
each device has whole blocks: it refreshes what it has, and there is no communication.
All others are *spread*: each factor is brought to one device, such that all have about
the same to do, and its new eigenbasis is handed back. Both happen in one
`jax.shard_map`, where what is brought is refreshed together with what is there.
"""

import collections
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from soap_optax import _arguments, _refresh, _tree
from soap_optax._layout import layout_of_factors, mesh_axes
from soap_optax._refresh import Bases, Method, Refresh, Refreshed, put, take

NamedSharding = jax.sharding.NamedSharding

_Unit = tuple[int, int]  # the factors of a parameter's axis: the numbers of both
_Matrix = tuple[int, int, int]  # one of them: its number in what a device has


def state_sharding(
    tx: optax.GradientTransformation, params: optax.Params, params_sharding: Any
) -> Any:
    """The sharding of each array in the state of a transformation.

    Moments and all else that `tx.init` makes like a parameter is sharded like it.
    Factors and eigenbases of `soap_optax` are sharded like the blocks of the parameter,
    over whole blocks; where mesh axes are left over, by rows, as far as those divide
    them. All other arrays are replicated. No array is made.

    Args:
      tx: any optax transformation, with or without SOAP in it.
      params: the parameters or their `jax.ShapeDtypeStruct`s.
      params_sharding: a tree of `jax.sharding.NamedSharding` or, for the mesh of
        `jax.set_mesh`, `jax.P` (`PartitionSpec`), like the parameters or a prefix of
        them, or a callable making it from them.

    Returns:
      A tree like `tx.init(params)` of `NamedSharding`, to be given to
      `jax.jit(tx.init, out_shardings=…)`.

    Raises:
      ValueError: naming the parameter, if its sharding is none, names axes that its
        mesh has not, does not fit its shape, or is on another mesh than the others.

    Warns:
      UserWarning: naming the parameter, if its blocks cut across shards.

    Example:
      >>> import jax, jax.numpy as jnp, soap_optax
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> shardings = {"w": jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))}
      >>> params = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
      >>> tx = soap_optax.soap(3e-3, block_size=16, params_sharding=shardings)
      >>> state = soap_optax.state_sharding(tx, params, shardings)
      >>> state[0].eigenbases["w"][0].spec == jax.P("fsdp", "tensor", None, None)
      True
      >>> state[0].inner_state.mu["w"].spec == jax.P("fsdp", "tensor")
      True
    """
    shardings = _tree.resolve_shardings(params, params_sharding)
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    _arguments.require("params", params, "at least one parameter", bool(leaves))
    mesh = shardings[0].mesh
    # On a mesh with explicit axes shardings are types: they say what depends on what.
    explicit = jax.sharding.AbstractMesh(
        *(mesh.axis_sizes, mesh.axis_names),
        axis_types=(jax.sharding.AxisType.Explicit,) * len(mesh.axis_names),
    )
    typed = [
        jax.ShapeDtypeStruct(
            jnp.shape(leaf),
            jnp.result_type(leaf),
            sharding=NamedSharding(explicit, s.spec),
        )
        for leaf, s in zip(leaves, shardings, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, treedef.unflatten(typed))

    def one(array: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        is_typed = isinstance(array.sharding, NamedSharding)
        return NamedSharding(mesh, array.sharding.spec if is_typed else jax.P())

    return jax.tree.map(one, state)


def placed(array: Any, sharding: NamedSharding | None) -> Any:
    """The array, sharded so. None: as it is."""
    if sharding is None:
        return array
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def like_parameter(array: jax.Array, leaf: _tree.Leaf) -> jax.Array:
    """The array of the parameter's shape, sharded like it, if that is known."""
    return placed(array, leaf.sharding)


def for_blocks(array: jax.Array, leaf: _tree.Leaf) -> jax.Array:
    """Likewise, but gathered along mesh axes that would cut its blocks.

    XLA can be wrong about products of blocks that are cut (JAX 0.10.2, 0.12.0).
    """
    if leaf.sharding is None:
        return array
    view = leaf.layout.spec_of_view(leaf.sharding.spec, leaf.sharding.mesh.shape)
    whole = [entry if entry in tuple(view) else None for entry in leaf.sharding.spec]
    return placed(array, NamedSharding(leaf.sharding.mesh, jax.P(*whole)))


def of_factors(leaf: _tree.Leaf) -> Sequence[NamedSharding | None]:
    """The shardings of a parameter's factors; None: not known, or no factor."""
    if leaf.sharding is None:
        return [None] * len(leaf.layout.axes)
    mesh = leaf.sharding.mesh
    specs = leaf.layout.specs_of_factors(leaf.sharding.spec, mesh.shape)
    return [None if spec is None else NamedSharding(mesh, spec) for spec in specs]


def of_vectors(leaf: _tree.Leaf) -> Sequence[NamedSharding | None]:
    """The shardings of what belongs to the factors, `[grid…, b]`, likewise."""
    return [s and of_vector(leaf) for s in of_factors(leaf)]


def of_vector(leaf: _tree.Leaf) -> NamedSharding | None:
    """The sharding of what belongs to an axis, `[grid…, b]`; None: not known."""
    if leaf.sharding is None:
        return None
    mesh = leaf.sharding.mesh
    grid = leaf.layout.spec_of_grid(leaf.sharding.spec, mesh.shape)
    return NamedSharding(mesh, jax.P(*grid, None))


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """Brings factors of one size, sharded alike, to their owners, and back.

    Each is cut by rows over some mesh axes, and along the other axes that do not shard
    it devices have the same. All these devices share the work; they are numbered along
    the axes of the rows first.

    Attributes:
      slot: in which they are refreshed.
      rows: mesh axes by which their rows are sharded.
      copies: mesh axes along which devices have the same.
      sizes: of the mesh axes.
      owners: of each factor, the number of the device and its room there.
      rooms: how many a device has at most.
    """

    slot: int
    rows: tuple[str, ...]
    copies: tuple[str, ...]
    sizes: Mapping[str, int]
    owners: Mapping[_Matrix, tuple[int, int]]
    rooms: int

    def bring(self, parts: Mapping[_Unit, jax.Array], *, by_rows: bool) -> jax.Array:
        """Collects what this device owns, `[rooms, b, …]`, zeros in empty rooms.

        Args:
          parts: `[n, …]` of the factors of one axis of a parameter; for each its rows
            on this device if it is cut `by_rows`, else all.
          by_rows: whether it is.
        """
        rows, copies = self._axes(by_rows)
        places = self._places(by_rows)
        every = jnp.concatenate([parts[unit] for unit in places])
        cuts, count = self._count(rows), self._count(copies)
        where = np.full(count * cuts * self.rooms, len(every))
        where[np.concatenate(list(places.values()))] = np.arange(len(every))
        contents = jnp.asarray(where.reshape(count, cuts, self.rooms))
        wanted = contents[jax.lax.axis_index(copies) if copies else 0]
        mine = jnp.take(every, wanted, axis=0, mode="fill", fill_value=0)
        if rows:
            mine = jax.lax.all_to_all(mine, rows, split_axis=0, concat_axis=1)
        return mine.reshape(self.rooms, cuts * every.shape[1], *every.shape[2:])

    def hand_back(self, mine: jax.Array, *, by_rows: bool) -> dict[_Unit, jax.Array]:
        """Inverse of `bring`."""
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

    def _places(self, by_rows: bool) -> dict[_Unit, np.ndarray[Any, Any]]:
        """Where each factor is in an array `[copies, cuts, rooms]`, counted through."""
        rows, copies = self._axes(by_rows)
        cuts, count = self._count(rows), self._count(copies)
        places: dict[_Unit, list[int]] = collections.defaultdict(list)
        for (leaf, axis, _), (owner, room) in sorted(self.owners.items()):
            cut, copy = divmod(owner, count)
            places[leaf, axis].append((copy * cuts + cut) * self.rooms + room)
        return {unit: np.asarray(place) for unit, place in places.items()}

    def _axes(self, by_rows: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (self.rows, self.copies) if by_rows else ((), self.rows + self.copies)

    def _count(self, axes: Sequence[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)


@dataclasses.dataclass(frozen=True)
class ShardedRefresh:
    """A refresh of the eigenbases of all parameters on a mesh, used like `Refresh`.

    Attributes:
      leaves: the parameters; all have a known sharding.
      factors: as in `Bases`.
      method: how.
      aligned: the numbers of the aligned parameters.
      spread: of each slot, the numbers of its spread parameters.
      exchanges: of the factors of those.
      slots: of each slot, the numbers of what a device refreshes there, in a list of
        the aligned parameters and, after them, the exchanges.
    """

    leaves: Sequence[_tree.Leaf]
    factors: list[Any]
    method: Method
    aligned: list[int]
    spread: list[list[int]]
    exchanges: list[_Exchange]
    slots: list[list[int]]

    def run(self, bases: Bases, begin: Any, end: Any) -> Bases:
        """Refreshes the slots from `begin` to `end`, changes the moments to them."""
        if not self.slots:
            return bases
        # The moments of spread parameters change basis where they are, after this.
        aligned = [
            of if i in self.aligned else [] for i, of in enumerate(bases.moments)
        ]
        specs = self._specs(local := bases._replace(moments=aligned))
        # Scalars are operands, because explicit axes forbid to close over them.
        scalars = {
            name: value
            for name in ("initial", "tolerance")
            if isinstance(value := getattr(self.method, name), jax.Array)
        }
        new = jax.shard_map(
            self._run_on_device,
            mesh=_mesh(self.leaves),
            in_specs=(jax.P(), jax.P(), jax.P(), specs.eigenbases, specs),
            out_specs=specs,
            check_vma=False,
        )(jnp.asarray(begin), jnp.asarray(end), scalars, self.factors, local)
        new = Bases(*map(list, new))
        for i, moments in enumerate(bases.moments):
            if i not in self.aligned:
                new.moments[i] = moments
        for slot, members in enumerate(self.spread):
            if not members:
                continue
            adopt = functools.partial(self._adopt, members)
            adopted = self._if_due(slot, begin, end, adopt, lambda old, _: old)(
                take(members, bases), take(members, new)
            )
            put(adopted, members, new)
        return new

    def _run_on_device(
        self,
        begin: jax.Array,
        end: jax.Array,
        scalars: dict[str, Any],
        factors: list[Any],
        bases: Bases,
    ) -> Bases:
        """`run`, with what one device has, but for the moments of spread parameters."""
        method = dataclasses.replace(self.method, **scalars)
        sizes = _mesh(self.leaves).shape
        aligned = [self.leaves[i] for i in self.aligned]
        layouts = [leaf.layout.local(_spec(leaf), sizes) for leaf in aligned]
        all_factors = [factors[i] for i in self.aligned]
        mine = take(self.aligned, bases)
        for exchange in self.exchanges:
            bring = functools.partial(_bring, exchange)
            factor, brought = self._if_due(
                *(exchange.slot, begin, end, bring),
                lambda *operands, bring=bring: jax.tree.map(
                    jnp.zeros_like, jax.eval_shape(bring, *operands)
                ),
            )(factors, bases)
            layouts.append(layout_of_factors(*factor.shape[:2]))
            all_factors.append([factor])
            for of_kind, one in zip(mine, brought, strict=True):
                of_kind.append(one)
        mine = Refresh(layouts, all_factors, method, self.slots).run(mine, begin, end)
        new = Bases(*map(list, bases))
        put(take(range(len(self.aligned)), mine), self.aligned, new)
        for number, exchange in enumerate(self.exchanges, len(self.aligned)):
            hand_back = functools.partial(_hand_back, exchange)
            new = self._if_due(
                exchange.slot, begin, end, hand_back, lambda new, _: new
            )(new, Bases(*(of_kind[number] for of_kind in mine)))
        return new

    def _adopt(self, members: list[int], old: Bases, new: Bases) -> Bases:
        """Adopts the new eigenbases, as stored, and changes the moments to them."""

        def refreshed(basis: Any, eigenvalues: Any, skipped: Any, before: Any) -> Any:
            if basis is None:
                return None
            is_new = (skipped == before)[..., 0]
            return Refreshed(basis, eigenvalues, is_new)

        taken = []
        for k, i in enumerate(members):
            before = Bases(*(of_kind[k] for of_kind in old))
            after = [of_kind[k] for of_kind in new[:3]]
            found = map(refreshed, *after, before.skipped)
            leaf = self.leaves[i]
            whole = [for_blocks(moment, leaf) for moment in before.moments]
            adopted = _refresh.adopt(
                *(list(found), leaf.layout, before._replace(moments=whole)),
                self.method.precision,
            )
            turned = [like_parameter(moment, leaf) for moment in adopted.moments]
            taken.append(adopted._replace(moments=turned))
        return Bases(*map(list, zip(*taken, strict=True)))

    def _if_due(self, slot: int, begin: Any, end: Any, do: Any, keep: Any) -> Any:
        """`do` or, where other slots are refreshed, `keep`."""
        if len(self.slots) == 1:
            return do
        is_due = jnp.logical_and(begin <= slot, slot < end).astype(jnp.int32)
        return lambda *operands: jax.lax.switch(is_due, [keep, do], *operands)

    def _specs(self, bases: Bases) -> Bases:
        """How the bases are sharded."""
        eigenbases, vectors = (
            [[s and s.spec for s in of(leaf)] for leaf in self.leaves]
            for of in (of_factors, of_vectors)
        )
        moments = [
            [_spec(leaf) for _ in of_leaf]
            for leaf, of_leaf in zip(self.leaves, bases.moments, strict=True)
        ]
        return Bases(eigenbases, vectors, vectors, moments)


def _bring(exchange: _Exchange, factors: list[Any], bases: Bases) -> tuple[Any, Bases]:
    """What this device owns, as the factor and the bases of one parameter."""

    def one(of_kind: list[Any], rank: int) -> jax.Array:
        units = {(i, axis): of_kind[i][axis] for i, axis, _ in exchange.owners}
        flat = {u: x.reshape(-1, *x.shape[-rank:]) for u, x in units.items()}
        return exchange.bring(flat, by_rows=rank == 2)

    eigenbases, eigenvalues, skipped = (
        [one(of_kind, rank)] for of_kind, rank in zip(bases[:3], (2, 1, 1), strict=True)
    )
    return one(factors, 2), Bases(eigenbases, eigenvalues, skipped, [])


def _hand_back(exchange: _Exchange, bases: Bases, mine: Bases) -> Bases:
    """The bases with what devices own put where it came from."""
    new = Bases(*map(list, bases))
    for of_kind, one, by_rows in zip(new, mine[:3], (True, False, False), strict=False):
        for (i, axis), part in exchange.hand_back(one[0], by_rows=by_rows).items():
            shape = of_kind[i][axis].shape
            of_kind[i] = [
                *of_kind[i][:axis],
                part.reshape(shape),
                *of_kind[i][axis + 1 :],
            ]
    return new


def _mesh(leaves: Sequence[_tree.Leaf]) -> Any:
    return leaves[0].sharding.mesh  # type: ignore[union-attr]


def _spec(leaf: _tree.Leaf) -> jax.P:
    return leaf.sharding.spec  # type: ignore[union-attr]


def make_refresh(
    leaves: Sequence[_tree.Leaf],
    factors: list[Any],
    method: Method,
    count: int | None,
) -> Refresh | ShardedRefresh:
    """A refresh of all parameters, on their mesh if their shardings are known.

    Args:
      leaves: the parameters.
      factors: as in `Bases`.
      method: how.
      count: of slots, see `make_slots`.
    """
    if any(leaf.sharding is None for leaf in leaves):
        layouts = [leaf.layout for leaf in leaves]
        return Refresh(layouts, factors, method, _refresh.make_slots(factors, count))
    with_factors = [i for i, leaf in enumerate(leaves) if leaf.layout.has_factors]
    sizes = _mesh(leaves).shape if leaves else {}
    aligned = [
        i for i in with_factors if leaves[i].layout.is_aligned(_spec(leaves[i]), sizes)
    ]
    others = [i for i in with_factors if i not in aligned]
    if count is None:  # of what a device has
        both = (_slots(leaves, factors, some) for some in (aligned, others))
        groups = [a + b for a, b in itertools.zip_longest(*both, fillvalue=[])]
    else:  # the same on every mesh, since they decide what is refreshed when
        groups = _refresh.make_slots(factors, count)
    spread = [[i for i in group if i not in aligned] for group in groups]
    slots = [[aligned.index(i) for i in group if i in aligned] for group in groups]
    exchanges = _exchanges(leaves, factors, spread)
    for number, exchange in enumerate(exchanges, len(aligned)):
        slots[exchange.slot].append(number)
    return ShardedRefresh(leaves, factors, method, aligned, spread, exchanges, slots)


def _slots(
    leaves: Sequence[_tree.Leaf], factors: list[Any], members: list[int]
) -> list[list[int]]:
    """Cuts some parameters into slots by what a device has of their factors."""
    shards = [list(map(_shard, factors[i], of_factors(leaves[i]))) for i in members]
    return [[members[k] for k in slot] for slot in _refresh.make_slots(shards)]


def _shard(array: Any, sharding: NamedSharding | None) -> Any:
    """The shape of what one device has of it."""
    if array is None or sharding is None:
        return None
    return jax.ShapeDtypeStruct(sharding.shard_shape(array.shape), array.dtype)


def _exchanges(
    leaves: Sequence[_tree.Leaf], factors: list[Any], slots: list[list[int]]
) -> list[_Exchange]:
    """Gives the factors in each slot to the devices, the largest first.

    Each to the one with the least to do that has a part of it.
    """
    exchanges = []
    for slot, members in enumerate(slots):
        matrices = [
            (kind, (i, axis, number))
            for i in members
            for axis, sharding in enumerate(of_factors(leaves[i]))
            if sharding is not None
            for kind, count in [_kind(factors[i][axis], sharding)]
            for number in range(count)
        ]
        sizes = _mesh(leaves).shape
        load = np.zeros([*sizes.values()])
        owners: dict[_Kind, dict[_Matrix, tuple[int, int]]] = {}
        rooms: collections.Counter[tuple[_Kind, int]] = collections.Counter()
        for kind, matrix in sorted(matrices, key=lambda entry: -entry[0].size):
            shared = [list(sizes).index(name) for name in (*kind.rows, *kind.copies)]
            others = [d for d in range(load.ndim) if d not in shared]
            by_owner = load.transpose(*shared, *others)
            counts = by_owner.shape[: len(shared)]
            most = by_owner.reshape(math.prod(counts), -1).max(axis=1)
            owner = int(np.argmin(most))
            by_owner[np.unravel_index(owner, counts)] += kind.size**3
            owners.setdefault(kind, {})[matrix] = owner, rooms[kind, owner]
            rooms[kind, owner] += 1
        exchanges += [
            _Exchange(
                *(slot, kind.rows, kind.copies, sizes, of_kind),
                rooms=1 + max(room for _, room in of_kind.values()),
            )
            for kind, of_kind in owners.items()
        ]
    return exchanges


class _Kind(NamedTuple):
    """Factors that can be stacked, see `_Exchange`."""

    size: int
    dtype: Any
    rows: tuple[str, ...]
    copies: tuple[str, ...]


def _kind(factor: jax.Array, sharding: NamedSharding) -> tuple[_Kind, int]:
    """The kind of the factors of one axis, and how many of them a device has."""
    *grid, rows, _ = map(mesh_axes, sharding.spec)
    used = {*rows, *(name for names in grid for name in names)}
    copies = tuple(name for name in sharding.mesh.axis_names if name not in used)
    *count, _, size = sharding.shard_shape(factor.shape)
    return _Kind(size, factor.dtype, rows, copies), math.prod(count)


def warn_of_cut_blocks(leaf: _tree.Leaf) -> None:
    """Warns if blocks of a parameter lie on several devices each."""
    if leaf.sharding is None:
        return
    for cut in leaf.layout.cut_blocks(_spec(leaf), _mesh([leaf]).shape):
        if cut.inner > 1:
            advice = "only the first of merged axes can be sharded along its blocks"
        elif cut.fitting:
            advice = f"block_size={cut.fitting} would fit"
        else:
            advice = "no block_size fits"
        axes = cut.axes[0] if len(cut.axes) == 1 else cut.axes
        warnings.warn(
            f"{leaf.name}: blocks cut across shards, so that each step gathers the "
            f"gradient and each refresh communicates: axis {axes} of size {cut.size} "
            f"has blocks of {cut.block} and shards of {cut.shard}; {advice}",
            stacklevel=2,
        )
