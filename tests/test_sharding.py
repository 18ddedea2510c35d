"""Parameters on a mesh: state, trajectories, restarts, collectives, errors."""

import collections
import functools
import itertools
import re

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import training
from flax import nnx
from jax import P
from jax.sharding import AxisType, NamedSharding

import soap_optax
from soap_optax import DimensionNumbers, state_sharding

STACK = DimensionNumbers((-2, -1))  # with batch axes, if any

# Parameters: shape, and sharding on a mesh with the axes d, x, y.
ALIGNED = {
    "matrix": ((16, 32), P("x", "y")),
    "layers": ((3, 16, 16), P(None, "y", "x")),
    "experts": ((8, 8, 4), P(("d", "y"), "x")),
    "partly": ((8, 16), P("x", None)),
    "vector": ((16,), P("y")),
    "scalar": ((), P()),
}
UNBLOCKED = {
    "matrix": ((16, 24), P("x", "y")),
    "layers": ((3, 16, 8), P(None, ("x", "y"), None)),
    "experts": ((4, 8, 6), P(("d", "x"), "y")),
    "replicated": ((8, 6), P()),
    "vector": ((16,), P("y")),
    "scalar": ((), P()),
}
CUT = {
    "matrix": ((16, 24), P("y", "x")),
    "other": ((24, 16), P(("x", "y"), None)),
    "aligned": ((16, 16), P("x", "y")),
    "replicated": ((16, 8), P()),
    "vector": ((16,), P("y")),
    "scalar": ((), P()),
}
needs_jax_0_8 = pytest.mark.skipif(
    jax.__version_info__ < (0, 8),
    reason="JAX 0.7 does not compile for the mesh of jax.set_mesh without arrays on it",
)
MESHES = {"1d": (1, 1, 8), "2d": (1, 2, 4), "3d": (2, 2, 2)}


def make_mesh(sizes, kind=AxisType.Auto):
    return jax.make_mesh(sizes, ("d", "x", "y"), axis_types=(kind,) * 3)


def shardings_of(parameters, mesh):
    return {name: NamedSharding(mesh, spec) for name, (_, spec) in parameters.items()}


def abstract(parameters, dtype=jnp.float32):
    return {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, (shape, _) in parameters.items()
    }


def numbers(parameters):
    return {name: STACK if len(s) > 1 else None for name, (s, _) in parameters.items()}


def make_soap(parameters, mesh=None, optimizer=soap_optax.soap, **options):
    defaults = {
        "dimension_numbers": numbers(parameters),
        "precondition_frequency": 5,
    }
    shardings = mesh and shardings_of(parameters, mesh)
    return optimizer(3e-3, params_sharding=shardings, **defaults | options)


def gradients(parameters, step):
    return {
        name: training.normal(*shape, seed=100 * step + i, dtype=np.float64)
        for i, (name, (shape, _)) in enumerate(parameters.items())
    }


def compiled(tx, parameters, mesh, dtype=jnp.float32):
    """A step ahead of time, whose state may be overwritten."""
    params_sharding = shardings_of(parameters, mesh)
    shapes = abstract(parameters, dtype)
    sharding = state_sharding(tx, shapes, params_sharding)
    state = jax.eval_shape(tx.init, shapes)
    shapes, state = (
        jax.tree.map(lambda x, s: x.update(sharding=s), *pair)
        for pair in ((shapes, params_sharding), (state, sharding))
    )
    explicit = mesh.axis_types[0] == AxisType.Explicit
    out = None if explicit else (params_sharding, sharding)
    step = jax.jit(tx.update, donate_argnums=1, out_shardings=out)
    return step.lower(shapes, state, shapes).compile()


def collectives(text):
    """How many of each kind."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-\\w+"
    return collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))


def decompositions(text):
    """The shapes of the QR decompositions and of Cholesky's."""
    return re.findall(
        r"= \((\S+?)\{[^=]*custom_call_target=\"[^\"]*(?:geqrf|potrf)", text
    )


# --- the same steps -------------------------------------------------------------------


CASES = {
    "aligned": (ALIGNED, {"block_size": 4}),
    "aligned in 1d": (ALIGNED, {"block_size": 2, "basis": "current"}),
    "unblocked": (UNBLOCKED, {}),
    "cut": (CUT, {"block_size": 8, "stagger": True}),
    "factorized": (UNBLOCKED, {"factorized": True, "factors": "kl"}),
    "shampoo": (ALIGNED, {"block_size": 4, "optimizer": soap_optax.shampoo}),
    "shared": (
        ALIGNED,
        {"block_size": 4, "refresh_axes": ("d",), "factors": "kl", "basis": "current"},
    ),
    "shared in turns": (
        ALIGNED,
        {"block_size": 4, "refresh_axes": ("d", "x"), "stagger": True},
    ),
    "cut, not shared": (CUT, {"block_size": 8, "refresh_axes": ()}),
    "bf16": (UNBLOCKED, {"precond_dtype": jnp.bfloat16, "mu_dtype": jnp.bfloat16}),
    "packed": (ALIGNED, {"block_size": 4, "pack_factors": True}),
    "packed and shared": (
        ALIGNED,
        {"block_size": 2, "refresh_axes": ("d",), "pack_factors": True},
    ),
}
IN_EVERY_RUN = {
    ("aligned", "2d", AxisType.Explicit),
    ("unblocked", "2d", AxisType.Auto),
    ("cut", "1d", AxisType.Explicit),
    ("packed and shared", "3d", AxisType.Auto),
}


@pytest.mark.filterwarnings("ignore:.*blocks cut across shards")
@pytest.mark.parametrize(
    ("case", "mesh", "kind"),
    cases.some(
        itertools.product(CASES, MESHES, (AxisType.Auto, AxisType.Explicit)),
        IN_EVERY_RUN,
    ),
)
def test_the_trajectory_is_that_of_one_device(case, mesh, kind):
    parameters, options = CASES[case]
    mesh = make_mesh(MESHES[mesh], kind)
    params_sharding = shardings_of(parameters, mesh)
    alone = make_soap(parameters, weight_decay=0.1, **options)
    tx = make_soap(parameters, mesh, weight_decay=0.1, **options)
    params = gradients(parameters, 1000)
    sharding = state_sharding(tx, params, params_sharding)
    placed = jax.device_put(jax.tree.map(jnp.copy, params), params_sharding)
    state = jax.jit(tx.init, out_shardings=sharding)(placed)
    alone_state = jax.jit(alone.init)(params)

    def train(tx, donated):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=donated)

    step, alone_step = train(tx, (0, 1)), train(alone, ())
    # Sums in another order are rounded to other bfloat16 numbers now and then.
    atol = 1e-3 if "precond_dtype" in options else 1e-10
    for i in range(25):
        grads = gradients(parameters, i)
        placed, state = step(placed, state, jax.device_put(grads, params_sharding))
        params, alone_state = alone_step(params, alone_state, grads)
        for name in parameters:
            np.testing.assert_allclose(placed[name], params[name], rtol=0, atol=atol)
    jax.tree.map(
        lambda array, sharding: np.testing.assert_equal(
            array.sharding.is_equivalent_to(sharding, array.ndim), True
        ),
        (placed, state),
        (params_sharding, sharding),
    )
    assert optax.tree.get(state, "refreshes") == (6 if options.get("stagger") else 5)
    assert not any(map(np.any, jax.tree.leaves(optax.tree.get(state, "skipped"))))


# --- a restart, also on fewer devices -------------------------------------------------


RECIPE = {
    "factors": "kl",
    "basis": "current",
    "nesterov": True,
    "update_rms": 0.2,
    "initial_basis": "identity",
    "dimension_numbers": soap_optax.matrices(exclude="embed"),
}
EMBEDDING = {"embed": ((32, 8), P("y", "x"))}
# Parameters, blocks, and a mesh of half of the devices. Aligned blocks among those of
# "cut" are cut there.
HALVED = {
    "small": ({"matrix": ALIGNED["matrix"]} | EMBEDDING, {"block_size": 4}, (1, 2, 2)),
    "aligned": (ALIGNED | EMBEDDING, {"block_size": 4}, (1, 2, 2)),
    "cut": (CUT | EMBEDDING, {"block_size": 8}, (1, 4, 1)),
    "unblocked": (UNBLOCKED | EMBEDDING, {}, (1, 4, 1)),
}
VARIANTS = {
    "recipe": {},
    "f=1": {"precondition_frequency": 1},
    "Shampoo's factors": {"factors": "shampoo"},
    "previous basis": {"basis": "previous"},
    "published": {
        "factors": "shampoo",
        "basis": "previous",
        "nesterov": False,
        "update_rms": None,
        "initial_basis": "eigh",
        "precondition_frequency": 1,
    },
    "without nesterov": {"nesterov": False},
    "without update_rms": {"update_rms": None},
    "stagger": {"stagger": True},
    "embedding by SOAP": {"dimension_numbers": soap_optax.matrices()},
    "bf16": {"precond_dtype": jnp.bfloat16},
}
RESTARTS_IN_EVERY_RUN = {("recipe", "small")}
LAST = 13
SAVED = (5, 8)  # Refreshes are in steps 0, 5 and 10: one is due now, or in two steps.


def loss_of(params, noise):
    return sum(jnp.sum((params[name] - noise[name]) ** 2) for name in params)


def training_on(parameters, mesh, options):
    """What a process makes when it starts: a step, and the types of its state."""
    shardings = shardings_of(parameters, mesh)
    tx = make_soap(parameters, mesh, **options)
    params = abstract(parameters, jnp.float64)
    types = jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding),
        (params, jax.eval_shape(tx.init, params)),
        (shardings, state_sharding(tx, params, shardings)),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, noise):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, noise)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return tx, step, types


def train_on(step, carry, parameters, steps):
    """The state after some steps, and their losses."""
    losses = []
    for i in steps:
        carry, loss = step(carry, gradients(parameters, i))
        losses.append(loss)
    return carry, losses


@pytest.mark.filterwarnings("ignore:.*blocks cut across shards")
@pytest.mark.parametrize(
    ("variant", "layout"),
    cases.some(itertools.product(VARIANTS, HALVED), RESTARTS_IN_EVERY_RUN),
)
def test_a_restart_from_a_checkpoint(variant, layout, tmp_path):
    """Bit for bit on the same mesh, and to round-off on another one of 4 devices.

    Without bfloat16 all arrays were within 2e-14 of the largest entry.
    """
    parameters, blocks, half = HALVED[layout]
    options = RECIPE | blocks | VARIANTS[variant]
    mesh = make_mesh(MESHES["3d"])
    other = jax.make_mesh(half, tuple("dxy"), devices=jax.devices()[:4])
    wanted = first_steps(parameters, mesh, options, tmp_path)
    for there, close in ((mesh, to_the_bit), (other, to_round_off(options))):
        _, step, types = training_on(parameters, there, options)
        for saved in SAVED:
            with ocp.StandardCheckpointer() as checkpointer:
                carry = checkpointer.restore(tmp_path / str(saved), types)
            resumed = train_on(step, carry, parameters, range(saved, LAST))
            jax.tree.map(close, resumed, (wanted[0], wanted[1][saved:]))


def to_the_bit(some, other):
    np.testing.assert_array_equal(some, other)
    if isinstance(some, jax.Array):
        assert some.sharding.is_equivalent_to(other.sharding, some.ndim)


def to_round_off(options):
    """Compares up to 1e-10 of the largest entry, or as well as bfloat16 allows.

    Sums in another order are rounded to other bfloat16 numbers now and then.
    """
    share = 1e-2 if "precond_dtype" in options else 1e-10

    def close(some, other):
        some, other = (np.asarray(x, np.float64) for x in (some, other))
        np.testing.assert_allclose(
            some, other, rtol=0, atol=share * max(1, np.abs(other).max(initial=0))
        )

    return close


def first_steps(parameters, mesh, options, folder):
    """The state and the losses of a training that never stops, and saves itself."""
    tx, step, types = training_on(parameters, mesh, options)
    shardings = jax.tree.map(lambda x: x.sharding, types)
    params = jax.device_put(gradients(parameters, 1000), shardings[0])
    carry = params, jax.jit(tx.init, out_shardings=shardings[1])(params)
    losses = []
    for begin, end in itertools.pairwise((0, *SAVED, LAST)):
        carry, more = train_on(step, carry, parameters, range(begin, end))
        losses += more
        if end < LAST:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder / str(end), carry)
    return carry, losses


# --- what the program has -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AxisType.Auto, {"stagger": True, "basis": "current", "weight_decay": 0.1}),
        (AxisType.Explicit, {}),
        *cases.slow(
            (AxisType.Auto, {"refresh": "cholesky_qr", "refresh_tolerance": 0.1}),
            (AxisType.Auto, {"initial_basis": "identity"}),
            (AxisType.Auto, {"factorized": True, "factors": "kl"}),
            (AxisType.Auto, {"optimizer": soap_optax.shampoo, "refresh": "qr"}),
        ),
    ],
)
def test_aligned_blocks_need_no_communication(kind, options):
    """Nor more than one decomposition, of one block after the other."""
    mesh = make_mesh(MESHES["3d"], kind)
    tx = make_soap(ALIGNED, mesh, block_size=4, **options)
    text = compiled(tx, ALIGNED, mesh).as_text()
    assert not collectives(text)
    assert decompositions(text) == ["f32[1,4,4]"]
    has_eigh = options.get("initial_basis", "eigh") == "eigh"
    assert ("syev" in text) == has_eigh


def test_a_chip_has_its_share_of_the_state():
    mesh = make_mesh((2, 2, 2))
    parameters = {"w": ((64, 64), P(("d", "x"), "y")), "s": ((2, 32, 32), P(*"dxy"))}
    tx = make_soap(parameters, mesh, block_size=8)
    shapes = abstract(parameters)
    sharding = state_sharding(tx, shapes, shardings_of(parameters, mesh))
    state = jax.eval_shape(tx.init, shapes)
    total = sum(x.size for x in jax.tree.leaves(state))
    here = sum(
        np.prod(s.shard_shape(x.shape))
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(sharding), strict=True)
    )
    assert here <= 1.02 * total / 8


def in_step_and_refresh(text):
    """The collectives of a step without refresh, and those that a refresh adds."""
    lines = collections.defaultdict(list)
    for line in text.splitlines():
        if start := re.match(r"^(ENTRY )?%(\S+) \(", line):
            name = "ENTRY" if start[1] else start[2]
        elif line.startswith(" "):
            lines[name].append(line)

    def reached(name, without=None):
        found, to_do = set(), [name]
        while to_do:
            if (name := to_do.pop()) not in found and name != without:
                found.add(name)
                called = re.findall(r"%([\w.\-]+)", "\n".join(lines[name]))
                to_do += [other for other in called if other in lines]
        return "\n".join("\n".join(lines[name]) for name in found)

    branches = re.findall(r"branch_computations=\{%\S+, %(\S+)\}", text)
    refreshes = {name: reached(name) for name in branches}
    refreshes = {name: t for name, t in refreshes.items() if "geqrf" in t}
    refresh = max(refreshes, key=lambda name: len(refreshes[name]))
    every = collectives(reached("ENTRY", refresh))
    return every, collectives(reached("ENTRY")) - every


GATHER, SUM, SEND = "all-gather", "all-reduce", "collective-permute"


@pytest.mark.filterwarnings("ignore:.*blocks cut across shards")
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, *cases.slow(AxisType.Explicit)], ids=str
)
@pytest.mark.parametrize(
    ("spec", "options", "step", "refresh"),
    [
        (P("x", "y"), {"block_size": 6}, {}, {}),
        (P(), {}, {}, {GATHER: 6}),
        (P("x", "y"), {"block_size": 8}, {GATHER: 5}, {GATHER: 5}),
        (
            P("x", "y"),
            {},
            # Two of them are the mean eigenvalues by which thresholds for coarse
            # products go, a number for each side.
            {GATHER: 14, SUM: 13, SEND: 1},
            {GATHER: 14, SUM: 6, "all-to-all": 6},
        ),
    ],
    ids=["aligned", "replicated", "cut", "unblocked"],
)
def test_what_communication_remains(kind, spec, options, step, refresh):
    """At most. The table is in docs/pods.md."""
    mesh = make_mesh(MESHES["2d"], kind)
    matrix = {"w": ((16, 24), spec)}
    tx = make_soap(matrix, mesh, initial_basis="identity", **options)
    text = compiled(tx, matrix, mesh).as_text()
    of_step, of_refresh = in_step_and_refresh(text)
    assert of_step <= collections.Counter(step)
    assert of_refresh <= collections.Counter(refresh)


def test_each_factor_is_refreshed_on_one_device():
    """Eight layers on eight devices: one decomposition on each, for each axis."""
    layers = {f"layer_{i}": ((16, 24), P("x", "y")) for i in range(4)}
    mesh = make_mesh(MESHES["3d"])
    tx = make_soap(layers, mesh, initial_basis="identity")
    program = compiled(tx, layers, mesh)
    # 4 factors of 16 and 4 of 24: every device has one of either, and not both.
    owners = exchange_owners(layers, mesh)
    assert {size: rooms for size, _, rooms in owners} == {16: 1, 24: 1}
    assert sorted(n for _, devices, _ in owners for n in devices) == list(range(8))
    found = collectives(program.as_text())
    # To and fro for factors and eigenbases of each size, in the refresh.
    assert found["all-to-all"] == 2 * 3


def exchange_owners(parameters, mesh, refresh_axes=None):
    """Of each exchange: the size, the devices that own something, and the rooms."""
    from soap_optax.mesh import _spread
    from soap_optax.parameters._tree import Leaf

    leaves, factors = [], []
    for name, (shape, spec) in parameters.items():
        layout = training.layout(shape)
        sharding = NamedSharding(mesh, P(*spec, *[None] * (len(shape) - len(spec))))
        leaves.append(Leaf((), (name,), layout, jnp.float32, sharding))
        factors.append(
            [jax.ShapeDtypeStruct(s, jnp.float32) for s in layout.factor_shapes()]
        )
    members = list(range(len(leaves)))
    exchanges = _spread._exchanges(leaves, factors, 0, members, refresh_axes)
    return [
        (
            next(factors[i][axis].shape[-1] for i, axis, _ in exchange.owners),
            [owner for owner, _ in exchange.owners.values()],
            exchange.rooms,
        )
        for exchange in exchanges
    ]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("options", [{"block_size": 4}, *cases.slow({})], ids=str)
def test_a_mesh_of_one_device(kind, options):
    devices = jax.devices()[:1]
    mesh = jax.make_mesh(
        (1,) * 3, tuple("dxy"), devices=devices, axis_types=(kind,) * 3
    )
    tx = make_soap(UNBLOCKED, mesh, initial_basis="identity", **options)
    assert not collectives(compiled(tx, UNBLOCKED, mesh).as_text())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_copies_share_the_refreshes_along_given_axes(kind):
    """Devices along d have copies of blocks, and only they exchange anything."""
    mesh, matrix = make_mesh(MESHES["3d"], kind), {"w": ((16, 16), P("x", "y"))}
    options = {"block_size": 8, "initial_basis": "identity", "refresh_axes": ("d",)}
    text = compiled(make_soap(matrix, mesh, **options), matrix, mesh).as_text()
    step, refresh = in_step_and_refresh(text)
    # One for eigenbases, one for eigenvalues and one for numbers of skipped refreshes.
    assert not step and refresh == {GATHER: 3}
    groups = re.findall(r" all-gather\(.*replica_groups=(.*)", text)
    # XLA writes them in three ways, the last of which is that of JAX 0.12.
    along_d = (
        "{{0,4},{1,5},{2,6},{3,7}}",
        "[4,2]<=[2,4]T(1,0)",
        "mesh['d'=2,'x'=2,'y'=2] {'d'}",
    )
    assert len(groups) == 3 and all(group.startswith(along_d) for group in groups)
    ((_, owners, rooms),) = exchange_owners({"w": ((16, 16), P())}, mesh, ("d",))
    assert (sorted(owners), rooms) == ([0, 1], 1)


def test_work_is_balanced_by_cost():
    """One large factor on a device, the small ones on the others."""
    parameters = {"large": ((64, 8), P()), **{f"w{i}": ((8, 8), P()) for i in range(7)}}
    owners = exchange_owners(parameters, make_mesh((1, 1, 8)))
    (_, (of_large,), _), (_, of_small, rooms) = owners
    assert of_large not in of_small
    assert rooms == 3  # 15 on the other seven devices


# --- shardings of states --------------------------------------------------------------


def specs(tree):
    return jax.tree.map(lambda sharding: sharding.spec, tree)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"w": True, "s": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"soap": tx, "adam": optax.adamw(1e-3)}, {"w": "soap", "s": "soap", "b": "adam"}
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}
PARAMETERS = {
    "w": ((16, 32), P("x", "y")),
    "s": ((3, 16, 8), P(None, "y", "x")),
    "b": ((16,), P("x")),
}


@pytest.mark.parametrize(
    "wrapper",
    cases.some([*WRAPPERS, "inject_hyperparams"], {"partition", "inject_hyperparams"}),
)
def test_inside_of_other_transformations(wrapper):
    """The state is made so, and stays so."""
    mesh = make_mesh((2, 2, 2))
    params_sharding = shardings_of(PARAMETERS, mesh)
    options = {
        "block_size": 4,
        "dimension_numbers": lambda params: jax.tree.map(
            lambda p: STACK if p.ndim > 1 else None, params
        ),
        "params_sharding": params_sharding,
    }
    if wrapper == "inject_hyperparams":
        tx = optax.inject_hyperparams(soap_optax.soap, static_args=tuple(options))(
            learning_rate=optax.linear_schedule(1e-3, 0, 9), **options
        )
    else:
        tx = WRAPPERS[wrapper](soap_optax.soap(1e-3, **options))
    shapes = abstract(PARAMETERS)
    sharding = state_sharding(tx, shapes, params_sharding)
    state = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(sharding) == jax.tree.structure(state)
    flat = jax.tree_util.tree_flatten_with_path(sharding)[0]
    for path, one in flat:
        name = jax.tree_util.keystr(path)
        if re.search(r"\.(mu|acc_grads)\['s'\]$", name):
            assert one.spec == P(None, "y", "x")
        if re.search(r"\.eigenbases\['w'\]\[\d\]$", name):
            assert one.spec == P("x", "y", None, None)
        if name.endswith("count"):
            assert one.spec == P()
    assert any("eigenbases['w']" in jax.tree_util.keystr(path) for path, _ in flat)
    params = jax.device_put(
        {name: jnp.ones(shape) for name, (shape, _) in PARAMETERS.items()},
        params_sharding,
    )
    placed = jax.jit(tx.init, out_shardings=sharding)(params)
    _, placed = jax.jit(tx.update)(params, placed, params)
    for array, one in zip(
        jax.tree.leaves(placed), jax.tree.leaves(sharding), strict=True
    ):
        assert array.sharding.is_equivalent_to(one, array.ndim)


@pytest.mark.parametrize(
    "options",
    [
        {"factors": "kl", "basis": "current"},
        *cases.slow({}, {"factorized": True}, {"optimizer": soap_optax.shampoo}),
    ],
    ids=["KL", "SOAP", "factorized", "Shampoo"],
)
def test_a_step_leaves_the_state_where_it_was(options):
    """Also where nobody asks for it, so that a restart runs the same program."""
    mesh = make_mesh(MESHES["3d"])
    matrix = {"w": ((16, 24), P("x", "y"))}
    tx, _, (params, state) = training_on(matrix, mesh, options)
    program = jax.jit(tx.update).lower(params, state, params).compile()
    _, after = program.output_shardings
    for before, sharding in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        assert before.sharding.is_equivalent_to(sharding, before.ndim)


def test_factors_are_sharded_by_blocks_else_by_rows():
    mesh = make_mesh((2, 2, 2))

    def spec_of(shape, spec, **options):
        sharding = NamedSharding(mesh, spec)
        tx = soap_optax.scale_by_soap(params_sharding=sharding, **options)
        shapes = jax.ShapeDtypeStruct(shape, jnp.float32)
        state = state_sharding(tx, shapes, sharding)
        return [s and s.spec for s in state.factors], state.eigenvalues[0].spec

    rows = P(("x", "y"), None)
    assert spec_of((16, 8), P("x", "y")) == ([rows, rows], P(None))
    # Where only some divide: as many as do.
    assert spec_of((16, 6), P("x", "y"))[0] == [rows, P("x", None)]
    assert spec_of((16, 5), P("x"))[0] == [P("x", None), P(None, None)]
    blocks = P("x", "y", None, None)
    assert spec_of((16, 8), P("x", "y"), block_size=4)[0] == [blocks, blocks]
    layers = DimensionNumbers((1, 2))
    stacked = spec_of((4, 16, 8), P("d", "x", None), dimension_numbers=layers)
    assert stacked[0] == [P("d", "x", None)] * 2
    heads = DimensionNumbers(((0, 1), 2))
    merged = spec_of((4, 4, 16), P("x"), dimension_numbers=heads, block_size=8)
    assert merged[0] == [P("x", None, None, None)] * 2


def test_no_array_is_made():
    mesh = make_mesh((2, 2, 2))
    huge = {"w": jax.ShapeDtypeStruct((2**20, 2**19), jnp.float32)}
    sharding = {"w": NamedSharding(mesh, P("x", "y"))}
    tx = soap_optax.soap(1e-3, block_size=512, params_sharding=sharding)
    state = state_sharding(tx, huge, sharding)
    assert state[0].eigenbases["w"][1].spec == P("x", "y", None, None)
    with pytest.raises(ValueError, match="params must be at least one parameter"):
        state_sharding(optax.adamw(1e-3), {}, {})


@needs_jax_0_8
def test_adam_alone_and_meshes_of_jax_set_mesh():
    mesh = make_mesh((2, 2, 2))
    params = abstract(PARAMETERS)
    by_spec = {name: spec for name, (_, spec) in PARAMETERS.items()}
    with jax.set_mesh(mesh):
        state = state_sharding(optax.adamw(1e-3), params, by_spec)
        jax.jit(optax.adamw(1e-3).init, out_shardings=state)(params_of(params))
    assert specs(state[0].mu) == by_spec and state[0].count.spec == P()


def params_of(shapes):
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def test_flax_boxes_and_logical_axes():
    mesh = make_mesh((1, 2, 4))
    rules = (("in", "x"), ("out", "y"))
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Dense(32, kernel_init=init)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 16)))["params"]
    logical = nn.get_partition_spec(boxed)
    params_sharding = nn.logical_to_mesh_sharding(logical, mesh, rules)
    tx = soap_optax.soap(1e-3, block_size=4, params_sharding=params_sharding)
    for params in (boxed, nn.unbox(boxed)):
        sharding = state_sharding(tx, params, params_sharding)
        basis = sharding[0].eigenbases["kernel"][0]
        assert basis.spec == P("x", "y", None, None)
        is_box = lambda node: isinstance(node, nn.meta.AxisMetadata)  # noqa: E731
        unboxed = jax.tree.map(
            nn.meta.unbox, sharding[0].inner_state.mu, is_leaf=is_box
        )
        assert specs(unboxed) == {"kernel": P("x", "y"), "bias": P(None)}
        real = params_of(params)
        state = jax.jit(tx.init, out_shardings=sharding)(real)
        jax.jit(tx.update)(real, state, real)


@needs_jax_0_8
def test_nnx_optimizer():
    mesh = make_mesh((1, 2, 4))
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", "y"))
    with jax.set_mesh(mesh):
        model = nnx.Linear(16, 32, kernel_init=init, rngs=nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
        params_sharding = nnx.get_partition_spec(params)
        tx = soap_optax.soap(
            1e-3, block_size=4, params_sharding=lambda _: params_sharding
        )
        sharding = state_sharding(tx, params, params_sharding)
        assert sharding[0].eigenbases["kernel"][0].spec == P("x", "y", None, None)
        state = jax.jit(tx.init, out_shardings=sharding)(params)
        jax.jit(tx.update)(params, state, params)


@needs_jax_0_8
def test_a_state_in_boxes_of_nnx():
    """MaxText reads the sharding of each array from the box around it."""
    mesh = make_mesh((1, 2, 4))
    model = nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, P("x", "y")), params)
    tx = soap_optax.soap(1e-3, block_size=4, params_sharding=shardings)
    of_state = state_sharding(tx, params, shardings)

    def init(params):
        box = lambda leaf, found: nnx.Variable(leaf, out_sharding=found)  # noqa: E731
        return jax.tree.map(box, nnx.as_pure(tx.init(params)), of_state)

    boxing = optax.GradientTransformationExtraArgs(init, tx.update)
    optimizer = nnx.Optimizer(model, boxing, wrt=nnx.Param)
    is_box = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    boxes = jax.tree.leaves(nnx.state(optimizer.opt_state), is_leaf=is_box)
    found = [str(box.out_sharding) for box in boxes]
    assert sorted(found) == sorted(map(str, jax.tree.leaves(of_state)))
    other = nnx.clone(model)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    plain = nnx.Optimizer(other, tx, wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(model, grads)
        plain.update(other, grads)
    assert jnp.array_equal(model.kernel[...], other.kernel[...])


# --- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["state_sharding", "update"])
@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        (lambda mesh: {"w": P("x", "z")}, r"\['w'\] must be of mesh axes .*z"),
        (lambda mesh: {"v": P("x")}, "must be a tree with the structure"),
        (lambda mesh: {"w": P("x", "y", "d")}, r"\['w'\] must be of at most 2 axes"),
        (lambda mesh: {"w": P(None, "y")}, r"\['w'\] must be such that 4 shards"),
        (lambda mesh: {"w": "x"}, "must be a NamedSharding or"),
        (lambda mesh: {"w": None}, r"\['w'\] must be a NamedSharding or"),
        (
            lambda mesh: {"w": NamedSharding(mesh, P(P.UNCONSTRAINED, "y"))},
            r"\['w'\] must be of mesh axes",
        ),
        (
            lambda mesh: {"w": jax.sharding.SingleDeviceSharding(jax.devices()[0])},
            r"\['w'\] must be a NamedSharding or",
        ),
    ],
)
def test_shardings_that_do_not_fit(where, sharding, message):
    mesh = make_mesh((1, 2, 4))
    params = {"w": jnp.ones((8, 6))}
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        if where == "state_sharding":
            state_sharding(soap_optax.soap(1e-3), params, sharding(mesh))
        else:
            soap_optax.soap(1e-3, params_sharding=sharding(mesh)).init(params)


def test_refresh_axes_are_axes_of_the_mesh():
    shardings = {"w": NamedSharding(make_mesh((1, 2, 4)), P("x"))}
    tx = soap_optax.soap(1e-3, params_sharding=shardings, refresh_axes=("data",))
    message = r"refresh_axes must be .* axes of the mesh, which are d, x, y, got \('da"
    with pytest.raises(ValueError, match=message):
        tx.init({"w": jnp.ones((8, 6))})
    twice = soap_optax.soap(1e-3, params_sharding=shardings, refresh_axes=("d", "d"))
    with pytest.raises(ValueError, match="refresh_axes must be different axes"):
        twice.init({"w": jnp.ones((8, 6))})
    mesh = make_mesh((1, 2, 4), AxisType.Explicit)  # `init` sees one device.
    later = soap_optax.soap(1e-3, refresh_axes=("data",))
    state = later.init({"w": jnp.ones((8, 6))})
    params = jax.device_put({"w": jnp.ones((8, 6))}, NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(later.update, params, state, params)
    with pytest.raises(ValueError, match="refresh_axes must be a sequence of names"):
        soap_optax.soap(1e-3, refresh_axes="data")


def test_params_sharding_by_a_function_is_of_shapes():
    """What works in `init` works in an update that is traced, and the other way."""
    mesh = make_mesh((2, 2, 2))
    shardings = {"v": NamedSharding(mesh, P("y")), "w": NamedSharding(mesh, P("x"))}
    params = {"v": jnp.ones(8), "w": jnp.ones((8, 6))}
    params = jax.device_put(params, shardings)

    def by_rank(params):
        specs = {1: P("y"), 2: P("x")}
        return jax.tree.map(lambda x: NamedSharding(mesh, specs[x.ndim]), params)

    of_tree, of_function = (
        soap_optax.soap(1e-3, params_sharding=given) for given in (shardings, by_rank)
    )
    steps = [
        jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
        for tx in (of_tree, of_function)
    ]
    jax.tree.map(np.testing.assert_array_equal, *steps)
    reads = lambda params: jax.tree.map(lambda x: x.sharding, params)  # noqa: E731
    tx = soap_optax.soap(1e-3, params_sharding=reads)
    message = "params_sharding must be a function of the shapes .* give the tree"
    for call in (
        lambda: tx.init(params),
        lambda: jax.jit(tx.init)(params),
        lambda: jax.jit(tx.update)(params, of_tree.init(params), params),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_two_meshes():
    first, second = (jax.devices()[i : i + 4] for i in (0, 4))
    params = {name: jnp.ones((8, 6)) for name in "vw"}
    for sizes, devices in (((2, 2, 2), None), ((1, 2, 2), second)):
        other = jax.make_mesh(sizes, tuple("dxy"), devices=devices)
        mesh = jax.make_mesh((1, 2, 2), tuple("dxy"), devices=first)
        params_sharding = {
            "v": NamedSharding(mesh, P("x")),
            "w": NamedSharding(other, P("x")),
        }
        with pytest.raises(ValueError, match=r"\['w'\] must be on the same mesh"):
            state_sharding(soap_optax.soap(1e-3), params, params_sharding)
    with pytest.raises(ValueError, match=r"\['v'\] must be .*no mesh is set"):
        state_sharding(soap_optax.soap(1e-3), params, {"v": P("x"), "w": P("x")})


@pytest.mark.parametrize(
    ("shape", "spec", "options", "message"),
    [
        ((64,) * 2, P("x"), {}, "axis 0 of size 64 has blocks of 32 and shards of 8"),
        ((64,) * 2, P("x"), {}, "block_size=8 would fit"),
        (
            (4, 16, 64),
            P(None, "x"),
            {"dimension_numbers": DimensionNumbers(((0, 1), 2))},
            "only the first of merged axes",
        ),
        (
            (8, 37, 64),
            P("x"),
            {"dimension_numbers": DimensionNumbers(((0, 1), 2))},
            r"blocks of 8 and shards of 37; no block_size fits",
        ),
    ],
)
def test_blocks_that_cut_across_shards_are_reported(shape, spec, options, message):
    mesh = make_mesh((1, 8, 1))
    sharding = {"w": NamedSharding(mesh, spec)}
    tx = soap_optax.soap(1e-3, block_size=32, params_sharding=sharding, **options)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    with pytest.warns(UserWarning, match=rf"\['w'\].*{message}"):
        state_sharding(tx, params, sharding)


def test_an_optimizer_without_params_sharding_is_reported():
    """Once, at the line of the caller, and at each call of `state_sharding`."""
    mesh = make_mesh((2, 2, 2))
    shapes, shardings = abstract(UNBLOCKED), shardings_of(UNBLOCKED, mesh)
    tx = optax.chain(optax.clip(1.0), make_soap(UNBLOCKED))
    for _ in range(2):
        with pytest.warns(UserWarning, match="params_sharding must be given") as found:
            state_sharding(tx, shapes, shardings)
        (warning,) = found
        assert warning.filename == __file__
        assert str(warning.message).endswith(
            "missing for ['experts'], ['layers'], ['matrix']"
        )
    split = optax.partition(
        {"a": make_soap(UNBLOCKED, mesh), "b": soap_optax.shampoo(1e-3)},
        {name: "b" if name == "matrix" else "a" for name in UNBLOCKED},
    )
    with pytest.warns(UserWarning, match=r"missing for \['matrix'\]$"):
        state_sharding(split, shapes, shardings)


@pytest.mark.parametrize("optimizer", [soap_optax.soap, soap_optax.shampoo])
def test_nothing_is_reported_that_does_not_communicate(optimizer):
    """With `params_sharding`, on explicit axes, or without sharded factors.

    Here a warning is an error.
    """
    mesh, explicit = make_mesh((2, 2, 2)), make_mesh((2, 2, 2), AxisType.Explicit)
    shapes, shardings = abstract(UNBLOCKED), shardings_of(UNBLOCKED, mesh)
    without = make_soap(UNBLOCKED, optimizer=optimizer)
    for_all = optimizer(1e-3, params_sharding=lambda params: shardings)
    state_sharding(make_soap(UNBLOCKED, mesh, optimizer), shapes, shardings)
    state_sharding(for_all, shapes, shardings)
    state_sharding(without, shapes, shardings_of(UNBLOCKED, explicit))
    state_sharding(optax.adamw(1e-3), shapes, shardings)
    for name in ("replicated", "vector"):
        one = optimizer(1e-3)
        state_sharding(one, {name: shapes[name]}, {name: shardings[name]})
