"""Every public transformation of optax, in an eigenbasis that turns.

`WORKS` runs against the transformation itself with everything that is odd kept in the
coordinates of the parameters. An array is odd if it flips with the coordinates of
gradients and parameters, even if it stays; that is found by flipping them. The verdicts
are those of docs/family.md.
"""

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import cases
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import soap_optax

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)
SHAPE, STEPS = (4, 3), 6
PARAM = RNG.normal(size=SHAPE)
GRADS = RNG.normal(size=(STEPS, *SHAPE))
BASIS = {"basis": "current", "precondition_frequency": 2, "shampoo_beta": 0.5}
RATE = 0.01

adam = optax.scale_by_adam
sgd = functools.partial(optax.sgd, RATE, momentum=0.9)


def everywhere(value):
    return lambda params: jax.tree.map(lambda _: value, params)


def is_even(step, **_):
    return step % 2 == 0


def with_rate(name):
    module = optax if hasattr(optax, name) else optax.contrib
    return lambda: getattr(module, name)(RATE)


def plain(name):
    module = optax if hasattr(optax, name) else optax.contrib
    return lambda: getattr(module, name)()


def squared_gradients():
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.square, updates))


# Transformations whose constructors need a learning rate, and nothing.
OF_A_RATE = """
    adabelief adadelta adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb
    lars lion nadam nadamw novograd optimistic_adam_v2
    optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd signum sm3
    scale_by_learning_rate scale_by_rprop scale
    acprop ademamix adopt madgrad muon simplified_ademamix schedule_free_adamw
"""
OF_NOTHING = """
    identity normalize_by_update_norm scale_by_adadelta scale_by_adam
    scale_by_adamax scale_by_adan scale_by_amsgrad scale_by_belief scale_by_lion
    scale_by_distance_over_gradients scale_by_novograd scale_by_optimistic_gradient
    scale_by_param_block_norm scale_by_param_block_rms scale_by_radam scale_by_rms
    scale_by_rss scale_by_sign scale_by_sm3 scale_by_trust_ratio scale_by_yogi
    set_to_zero zero_nans
    cocob dog dowg normalize scale_by_acprop scale_by_ademamix
    scale_by_adopt scale_by_cocob scale_by_simplified_ademamix
    schedule_free_sgd
"""
OF_NOTHING_WITH_VALUE = "polyak_sgd scale_by_polyak momo momo_adam reduce_on_plateau"

# Transformations that need no word. What is wrapped has a state.
WORKS = {
    **{name: with_rate(name) for name in OF_A_RATE.split()},
    **{name: plain(name) for name in OF_NOTHING.split()},
    "MultiSteps": lambda: optax.MultiSteps(adam(), 2).gradient_transformation(),
    "adafactor": lambda: optax.adafactor(
        RATE, min_dim_size_to_factor=2, momentum=0.9, multiply_by_parameter_scale=True
    ),
    "add_decayed_weights": lambda: optax.add_decayed_weights(0.1),
    "add_noise": lambda: optax.add_noise(0.1, 0.5, 0),
    "apply_every": lambda: optax.apply_every(2),
    "apply_if_finite": lambda: optax.apply_if_finite(adam(), 3),
    "chain": lambda: optax.chain(optax.trace(0.9), adam()),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.1),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(0.1),
    "conditionally_mask": lambda: optax.conditionally_mask(adam(), is_even),
    "conditionally_transform": lambda: optax.conditionally_transform(adam(), is_even),
    "dadapt_adamw": lambda: optax.contrib.dadapt_adamw(estim_lr0=0.1),
    "ema": lambda: optax.ema(0.9),
    "freeze": lambda: optax.freeze(everywhere(False)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(RATE),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(
        optax.adam
    )(RATE),
    "masked": lambda: optax.masked(adam(), everywhere(True)),
    "mechanize": lambda: optax.contrib.mechanize(sgd(), s_init=0.1),
    "multi_transform": lambda: optax.multi_transform({0: adam()}, everywhere(0)),
    "named_chain": lambda: optax.named_chain(("m", optax.trace(0.9)), ("v", adam())),
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=0),
    "optimistic_adam": lambda: optax.optimistic_adam(RATE, 1.0),
    "partition": lambda: optax.partition({"nu": adam()}, everywhere("nu")),
    "prodigy": lambda: optax.contrib.prodigy(estim_lr0=0.1),
    "sam": lambda: optax.contrib.sam(sgd(), sgd(), 3, reset_state=False),
    "scale_by_factored_rms": lambda: optax.scale_by_factored_rms(
        min_dim_size_to_factor=2
    ),
    "scale_by_madgrad": lambda: optax.contrib.scale_by_madgrad(RATE),
    "scale_by_muon": lambda: optax.contrib.scale_by_muon(
        weight_dimension_numbers=everywhere(optax.contrib.MuonDimensionNumbers())
    ),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: 0.1 * count),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "selective_transform": lambda: optax.selective_transform(
        adam(), freeze_mask=everywhere(False)
    ),
    "snapshot": lambda: optax.snapshot("norm", optax.tree.norm),
    "split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(adam()),
    "stateless": lambda: optax.stateless(lambda u, p: jax.tree.map(jnp.add, u, p)),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(jnp.add),
    "trace": lambda: optax.trace(0.9),
    "with_extra_args_support": lambda: optax.with_extra_args_support(adam()),
    "yogi": lambda: optax.yogi(RATE),
}

# Transformations whose `update` needs the loss as `value`.
WORKS_WITH_VALUE = {name: plain(name) for name in OF_NOTHING_WITH_VALUE.split()}

# They run, but what they do to coordinates has no meaning for parameters.
NO_MEANING = {
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
    "centralize": optax.centralize,
    "clip": lambda: optax.clip(0.1),
    "keep_params_nonnegative": optax.keep_params_nonnegative,
}

# The mean in their state is part of a variance, so it must stay as the mean square.
STAY = {"coordinatewise": ("mu", "nu")}
WORKS_WITH_WORDS = {"scale_by_stddev": (optax.scale_by_stddev, STAY)}

# Transformations that are refused with their default arguments.
WORKS_WITH_ARGUMENT = {
    "sophia": lambda: optax.contrib.sophia(
        RATE, hessian_diagonal_fn=squared_gradients()
    )
}

# Transformations that are refused, each with what the error says.
CALLS = "calls a function of the parameters"
REFUSED = {
    "differentially_private_aggregate": (
        lambda: optax.contrib.differentially_private_aggregate(1.0, 0.0, 0),
        "single examples",
    ),
    "dpsgd": (
        lambda: optax.contrib.dpsgd(RATE, 1.0, 0.0, 0),
        "single examples",
    ),
    "flatten": (lambda: optax.flatten(adam()), r"basis of the array .mu"),
    "galore": (lambda: optax.contrib.galore(RATE, rank=2), "projects gradients itself"),
    "hutchinson_estimator_diag_hessian": (
        lambda: optax.contrib.hutchinson_estimator_diag_hessian(),
        CALLS,
    ),
    "lbfgs": (optax.lbfgs, CALLS),
    "monitor": (lambda: optax.monitor({"norm": optax.tree.norm}), "structure"),
    "lookahead": (lambda: optax.lookahead(adam(), 2, 0.5), "LookaheadParams"),
    "scale_by_backtracking_linesearch": (
        lambda: optax.scale_by_backtracking_linesearch(5),
        CALLS,
    ),
    "scale_by_galore": (
        lambda: optax.contrib.scale_by_galore(rank=2),
        "projects gradients itself",
    ),
    "scale_by_lbfgs": (optax.scale_by_lbfgs, r"diff_params_memory.*\(10, 4, 3\)"),
    "scale_by_zoom_linesearch": (
        lambda: optax.scale_by_zoom_linesearch(5),
        CALLS,
    ),
}

# Callables that make no transformation of updates.
OTHERS = {
    "types": """
        MaskOrFn OptState Params ScalarOrSchedule Schedule Updates
        """,
    "schedules": """
        constant_schedule cosine_decay_schedule cosine_onecycle_schedule
        exponential_decay join_schedules linear_onecycle_schedule linear_schedule
        piecewise_constant_schedule piecewise_interpolate_schedule polynomial_schedule
        sgdr_schedule warmup_constant_schedule warmup_cosine_decay_schedule
        warmup_exponential_decay_schedule
        """,
    "losses": """
        convex_kl_divergence cosine_distance cosine_similarity ctc_loss
        ctc_loss_with_forward_probs generalized_kl_divergence hinge_loss huber_loss
        kl_divergence l2_loss log_cosh ntxent safe_softmax_cross_entropy
        sigmoid_binary_cross_entropy sigmoid_focal_loss smooth_labels
        softmax_cross_entropy softmax_cross_entropy_with_integer_labels squared_error
        """,
    "functions of arrays and states": """
        apply_updates bias_correction global_norm incremental_update init_empty_state
        matrix_inverse_pth_root microbatch multi_normal nnls
        per_example_global_norm_clip per_example_layer_norm_clip periodic_update
        power_iteration safe_increment safe_int32_increment safe_norm
        safe_root_mean_squares scale_gradient schedule_free_eval_params
        skip_large_updates skip_not_finite tree_map_params update_infinity_moment
        update_moment update_moment_per_elem_norm value_and_grad_from_state
        """,
    "measures, for monitor": "measure_with_ema",
}


def public_names():
    """Gathers the public callables of both modules, and one class that wraps others."""
    names = {"MultiSteps"}
    for module in (optax, optax.contrib):
        for name, value in vars(module).items():
            if callable(value) and not inspect.isclass(value) and name[0] != "_":
                names.add(name)
    return names


def present(names):
    """Selects the names that this version of optax has."""
    return sorted(set(names) & public_names())


VERDICTS = {
    "works": WORKS,
    "works with": {**WORKS_WITH_VALUE, **WORKS_WITH_WORDS, **WORKS_WITH_ARGUMENT},
    "refused": REFUSED,
    "no meaning": NO_MEANING,
}


class Trajectory(NamedTuple):
    """Keeps what each step gives.

    Attributes:
      updates: for each step the update of each parameter.
      states: for each step the arrays of the state that each parameter has.
    """

    updates: list[dict[str, Any]]
    states: list[dict[str, list[Any]]]


def project(array, bases):
    rows, columns = bases
    return (rows.T @ array @ columns).astype(array.dtype)


def project_back(array, bases):
    rows, columns = bases
    return (rows @ array @ columns.T).astype(array.dtype)


def arrays_of(state):
    """Lists for each parameter the arrays in the state of a group, keys as integers."""

    def data(array):
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(array) if is_key else array

    states = state.inner_states.items()
    return {name: list(map(data, jax.tree.leaves(s))) for name, s in states}


def run_in_eigenbasis(group, params, extra_args, words):
    """Gives the trajectory of a group in an eigenbasis, and the bases of each step."""
    tx = soap_optax.in_eigenbasis(group, rcond=0.0, **BASIS, **words)
    update, state = jax.jit(tx.update), tx.init(params)
    trajectory, bases = Trajectory([], []), []
    for gradient in GRADS:
        gradients = {name: jnp.asarray(gradient) for name in params}
        updates, state = update(gradients, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        trajectory.updates.append(updates)
        trajectory.states.append(arrays_of(state.inner_state))
        of_all = list(state.eigenbases.values())
        jax.tree.map(np.testing.assert_array_equal, of_all, of_all[:1] * len(of_all))
        bases.append(of_all[0])
    return trajectory, bases


def run_alone(update, state, params, extra_args, odd=(), bases=None, signs=1.0):
    """Runs a group of transformations on gradients with these signs.

    With bases, gradients and parameters are projected to them in each step, and where
    they change, the odd arrays go through the coordinates of the parameters.
    """
    treedef, identity = jax.tree.structure(state), [np.eye(n) for n in SHAPE]
    bases = [identity, *(bases or [identity] * STEPS)]
    trajectory = Trajectory([], [])
    for gradient, old, new in zip(GRADS, bases[:-1], bases[1:], strict=True):
        forth = functools.partial(project, bases=new)
        if any(np.any(q != p) for q, p in zip(old, new, strict=True)):
            arrays = [
                forth(project_back(array, old)) if is_odd else array
                for array, is_odd in zip(jax.tree.leaves(state), odd, strict=True)
            ]
            state = treedef.unflatten(arrays)
        gradients = {name: forth(jnp.asarray(gradient * signs)) for name in params}
        updates, state = update(
            gradients, state, jax.tree.map(forth, params), **extra_args
        )
        if bases[1] is new:  # Round-off of the first gradient is taken out.
            seen = np.abs(forth(gradient)) > 1e-12
            updates = {k: np.where(seen, update, 0) for k, update in updates.items()}
        updates = {k: project_back(update, new) for k, update in updates.items()}
        params = optax.apply_updates(params, updates)
        trajectory.updates.append(updates)
        trajectory.states.append(arrays_of(state))
    return trajectory


def find_odd(update, init, params, extra_args):
    """Finds for each array of the state whether it is odd; it must be odd or even."""
    signs = RNG.choice([-1.0, 1.0], SHAPE)
    flipped = jax.tree.map(lambda x: x * signs, params)
    run = functools.partial(run_alone, update, extra_args=extra_args)
    runs = run(init(params), params), run(init(flipped), flipped, signs=signs)
    # All steps of an array become one array.
    before, after = (
        jax.tree.leaves(jax.tree.map(lambda *x: np.stack(x), *run.states))
        for run in runs
    )
    paths = jax.tree.leaves_with_path(runs[0].states[0])
    odd = []
    for (path, _), a, b in zip(paths, before, after, strict=True):
        turns = a.shape[1:] == SHAPE
        # The tolerance is above 1e-6, with which all of Yogi's moments begin.
        is_odd = turns and np.allclose(a * signs, b, atol=1e-5)
        is_even = np.allclose(a, b, atol=1e-5)
        where = jax.tree_util.keystr(path)
        assert is_odd != is_even or not turns, where
        odd.append(is_odd)
    return odd


@functools.cache
def trajectories(names, words=(), turns=True, **extra_args):
    """Runs each transformation on a parameter of its own, all in one program.

    Gives the trajectory in the eigenbasis, the expected one and the bases; unless
    `turns`, the expected one turns no array.
    """
    members = {name: MAKERS[name]() for name in names}
    group = optax.partition(members, {name: name for name in names})
    params = {name: jnp.asarray(PARAM) for name in names}
    with jax.numpy_rank_promotion("allow"):
        update = jax.jit(group.update)
        odd = find_odd(update, group.init, params, extra_args)
        odd = [is_odd and turns for is_odd in odd]
        actual, bases = run_in_eigenbasis(group, params, extra_args, dict(words))
        state = group.init(params)
        expected = run_alone(update, state, params, extra_args, odd, bases)
    return actual, expected, bases


WITHOUT_VALUE = tuple(present({**WORKS, **WORKS_WITH_ARGUMENT, **NO_MEANING}))
WITH_VALUE = tuple(present(WORKS_WITH_VALUE))
MAKERS = {**WORKS, **WORKS_WITH_VALUE, **WORKS_WITH_ARGUMENT, **NO_MEANING}
MAKERS |= {name: make for name, (make, _) in WORKS_WITH_WORDS.items()}


def test_the_bases_turn():
    *_, bases = trajectories(WITH_VALUE, value=1.5)
    for before, after in zip(bases[0::2], bases[2::2], strict=False):
        for old, new in zip(before, after, strict=True):
            assert np.linalg.norm(old.T @ new - np.eye(len(old))) > 0.1


def assert_as_expected(name, actual, expected):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(actual.updates, expected.updates, strict=True):
        close(ours[name], theirs[name])
    for ours, theirs in zip(actual.states, expected.states, strict=True):
        for a, b in zip(ours[name], theirs[name], strict=True):
            close(a, b)


@pytest.mark.parametrize("name", WITHOUT_VALUE)
def test_values(name):
    actual, expected, _ = trajectories(WITHOUT_VALUE)
    assert_as_expected(name, actual, expected)


@pytest.mark.parametrize("name", WITH_VALUE)
def test_values_with_the_loss(name):
    actual, expected, _ = trajectories(WITH_VALUE, value=1.5)
    assert_as_expected(name, actual, expected)


def test_centred_second_moments_stay_with_their_means():
    """Turned, a mean may exceed the root of the mean square: then the root is NaN."""
    names = ("scale_by_stddev",)
    actual, expected, _ = trajectories(names, tuple(STAY.items()), turns=False)
    assert_as_expected(*names, actual, expected)
    params = {"w": jnp.asarray(PARAM)}
    turned = {"first_moments": ("mu",), "coordinatewise": ("nu",)}
    for words, is_finite in (STAY, True), (turned, False):
        tx = soap_optax.in_eigenbasis(optax.scale_by_stddev(), **BASIS, **words)
        updates = run(tx, params, np.repeat(GRADS[:2], 4, axis=0))
        assert all(np.isfinite(u["w"]).all() for u in updates) == is_finite
    with pytest.raises(ValueError, match=r"does not know .*ScaleByRStdDevState"):
        soap_optax.in_eigenbasis(optax.rmsprop(RATE, centered=True)).init(params)


@pytest.mark.parametrize("name", present(REFUSED))
def test_refused(name):
    make, error = REFUSED[name]
    params = {"w": jnp.asarray(PARAM)}
    with pytest.raises(ValueError, match=error):
        soap_optax.in_eigenbasis(make()).init(params)
    if name != "dpsgd":  # without factors nothing is refused
        soap_optax.in_eigenbasis(make(), max_precond_dim=0).init(params)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: optax.contrib.sophia(RATE), CALLS),
        (lambda: optax.contrib.sam(sgd(), sgd(), opaque_mode=True), CALLS),
        (lambda: soap_optax.scale_by_soap(), "projects gradients itself"),
    ],
    ids=["sophia", "sam", "soap"],
)
def test_refused_in_some_uses(make, error):
    with pytest.raises(ValueError, match=error):
        soap_optax.in_eigenbasis(optax.chain(make())).init(jnp.asarray(PARAM))


# The rest is about transformations that are not of optax.


class OwnState(NamedTuple):
    count: Any
    m1: Any
    m2: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["count", "m1", "m2"], meta_fields=[]
)
@dataclasses.dataclass
class OwnDataclass:
    count: Any
    m1: Any
    m2: Any


class OwnModule(eqx.Module):
    count: Any
    m1: Any
    m2: Any


def own_adam(make_state=OwnState, read=vars):
    """Makes `optax.scale_by_adam` with other names in its state."""
    adam = optax.scale_by_adam()

    def init(params):
        return make_state(*adam.init(params))

    def update(updates, state, params=None):
        fields = (read(state)[name] for name in ("count", "m1", "m2"))
        updates, new = adam.update(updates, optax.ScaleByAdamState(*fields), params)
        return updates, make_state(*new)

    return optax.GradientTransformation(init, update)


def own_dict(count, m1, m2):
    return {"count": count, "m1": m1, "m2": m2}


OWN = {
    "named tuple": (OwnState, OwnState._asdict),
    "dataclass": (OwnDataclass, vars),
    "module": (OwnModule, vars),
    "dict": (own_dict, dict),
}
OWN_WORDS = {"first_moments": ("m1",), "coordinatewise": ("m2",)}
CONTAINERS = {
    "dict": lambda w: {"w": w, "b": jnp.ones(3)},
    "list": lambda w: [jnp.ones(3), w],
    "array": lambda w: w,
    "box": lambda w: {"w": nn.Partitioned(w, (None, None))},
    "module": lambda w: eqx.nn.Linear(4, 3, key=jax.random.key(0)),
}


def run(tx, params, gradients=GRADS):
    """Gives the updates of each step."""
    update, state, history = jax.jit(tx.update), tx.init(params), []
    for gradient in gradients:
        resized = jax.tree.map(
            lambda p, g=gradient: jnp.asarray(np.resize(g, p.shape), p.dtype), params
        )
        updates, state = update(resized, state, params)
        history.append(updates)
    return history


@pytest.mark.parametrize(
    ("kind", "container"),
    cases.some(
        [
            *((kind, "dict") for kind in OWN),
            *(("dict", c) for c in list(CONTAINERS)[1:]),
        ],
        [("named tuple", "dict"), ("dict", "module")],
    ),
)
def test_own_adam(kind, container):
    params = CONTAINERS[container](jnp.asarray(PARAM))
    inner = own_adam(*OWN[kind])
    with pytest.raises(ValueError, match=r"m1.*say first_moments=\('m1',\)"):
        soap_optax.in_eigenbasis(inner).init(params)
    actual = run(soap_optax.in_eigenbasis(inner, **BASIS, **OWN_WORDS), params)
    expected = run(soap_optax.in_eigenbasis(optax.scale_by_adam(), **BASIS), params)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


WRAPPERS = {
    "named_chain": lambda tx: optax.named_chain(("m2", optax.trace(0.9)), ("m", tx)),
    "partition": lambda tx: optax.partition({"m2": tx}, everywhere("m2")),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(RATE),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, RATE),
}


@pytest.mark.parametrize(
    "wrapper", cases.some(WRAPPERS, {"partition", "inject_hyperparams"})
)
def test_own_adam_in_a_wrapper(wrapper):
    wrap, params = WRAPPERS[wrapper], CONTAINERS["dict"](jnp.asarray(PARAM))
    own = wrap(own_adam(*OWN["named tuple"]))
    with pytest.raises(ValueError, match=r"m1.* in OwnState, of parameter .'w'.,"):
        soap_optax.in_eigenbasis(own).init(params)
    actual = run(soap_optax.in_eigenbasis(own, **BASIS, **OWN_WORDS), params)
    known = soap_optax.in_eigenbasis(wrap(optax.scale_by_adam()), **BASIS)
    jax.tree.map(np.testing.assert_array_equal, actual, run(known, params))


def with_state(make):
    """Makes a transformation that holds what `make` makes of the parameters."""
    return optax.GradientTransformation(make, lambda g, state, params=None: (g, state))


W_AND_B = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda params: params, "in no field that could be named"),
        (lambda params: {"flat": jnp.ones(15)}, r"flat.*coordinatewise=\('flat',\)"),
        (lambda params: {"t": {"w": params["w"].T}}, r"say coordinatewise=\('t',\)"),
        (lambda params: {"list": [params["w"]]}, "belongs to no parameter"),
        (lambda params: {"rows": {"w": jnp.ones(4)}}, r"rows.*\(4,\)"),
        (lambda params: {"c": {"w": params["w"] * 1j}}, r"\('c',\)"),
        (
            lambda params: optax.TraceState({"w": jnp.ones(4)}),
            "cannot change the basis",
        ),
        (lambda params: optax.TraceState(jnp.ones(7)), "cannot change the basis"),
    ],
)
def test_arrays_nobody_vouched_for(make, error):
    with pytest.raises(ValueError, match=error):
        soap_optax.in_eigenbasis(with_state(make)).init(W_AND_B)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: {"steps": jnp.ones((4, 3), jnp.int32)},
        lambda params: {"keys": jax.random.split(jax.random.key(0), 12)},
        lambda params: {"old_keys": jax.random.split(jax.random.PRNGKey(0), 6)},
        lambda params: {"norms": jax.tree.map(jnp.linalg.norm, params)},
        lambda params: {"losses": jnp.ones(5)},
        lambda params: {"of_b": {"b": jnp.ones(3)}},
        lambda params: {"of_b": {"b": jnp.ones((2, 3))}},
        lambda params: optax.TraceState([params, params]),
        lambda params: None,
    ],
)
def test_arrays_that_need_no_word(make):
    soap_optax.in_eigenbasis(with_state(make)).init(W_AND_B)


@pytest.mark.parametrize("shape", [(4,), (2, 7)])
def test_other_arrays_beside_a_bare_parameter(shape):
    """The path of such a parameter is empty, so every path ends in it."""
    inner = with_state(lambda params: {"losses": jnp.ones(shape)})
    soap_optax.in_eigenbasis(inner).init(jnp.asarray(PARAM))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"first_moments": ("m3",)}, "first_moments .*'m1', 'm2', got 'm3'"),
        ({"coordinatewise": ("count",)}, "coordinatewise .*'m1', 'm2', got 'count'"),
        (
            {"first_moments": ("m1",), "coordinatewise": ("m2", "m1")},
            "'m1' must stand in only one of first_moments, coordinatewise",
        ),
        ({"second_moments": ("m3",)}, "second_moments .*'m1', 'm2', got 'm3'"),
        (
            {"second_moments": ("m2",), "coordinatewise": ("m2",)},
            "'m2' must stand in only one of",
        ),
    ],
)
def test_wrong_words(words, error):
    inner = own_adam(*OWN["named tuple"])
    with pytest.raises(ValueError, match=error):
        soap_optax.in_eigenbasis(inner, **words).init(W_AND_B)
    # Without factors there is nothing to say, so nothing can be wrong.
    soap_optax.in_eigenbasis(inner, max_precond_dim=0, **words).init(W_AND_B)


def test_second_moments_are_raised():
    """With this word, Adam in the eigenbasis is SOAP, also where rows are rare."""
    rows = np.zeros((40, 30, 6), np.float32)
    for i, row in enumerate(np.random.default_rng(0).integers(0, 30, 40)):
        rows[i, row] = np.random.default_rng(i).normal(size=6)
    options = {"precondition_frequency": 3, "clip_update_rms": None}
    params = {"w": jnp.zeros((30, 6))}
    adam = optax.scale_by_adam(0.95, 0.95)
    raised, stays = (
        soap_optax.in_eigenbasis(adam, **options, **words)
        for words in ({"second_moments": ("nu",)}, {})
    )
    soap = run(soap_optax.scale_by_soap(**options), params, rows)
    for step, other in zip(run(raised, params, rows), soap, strict=True):
        np.testing.assert_allclose(step["w"], other["w"], 1e-6, 1e-6)
    others = [step["w"] for step in run(stays, params, rows)]
    assert np.abs(others).max() > 2 * max(np.abs(step["w"]).max() for step in soap)


def test_words_come_before_the_table():
    tx = soap_optax.in_eigenbasis(
        optax.scale_by_adam(), coordinatewise=("mu",), **BASIS
    )
    still = run(tx, W_AND_B)[-1]["w"]
    turned = run(soap_optax.in_eigenbasis(optax.scale_by_adam(), **BASIS), W_AND_B)
    assert np.abs(still - turned[-1]["w"]).max() > 0.01


def test_abstract_parameters():
    shapes = jax.eval_shape(lambda: W_AND_B)
    with pytest.raises(ValueError, match="m1"):
        jax.eval_shape(soap_optax.in_eigenbasis(own_adam(*OWN["dict"])).init, shapes)
    jax.eval_shape(soap_optax.in_eigenbasis(optax.scale_by_adan()).init, shapes)


# The lists above are complete and agree with the docs.


def test_every_public_name_has_one_verdict():
    others = [name for names in OTHERS.values() for name in names.split()]
    listed = [*others, *(name for names in VERDICTS.values() for name in names)]
    assert len(listed) == len(set(listed))
    assert public_names() <= set(listed)


def documented():
    """Reads from the table of the docs each name, its verdict and what to say."""
    text = (ROOT / "docs" / "family.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| `.*\|$", text, re.MULTILINE):
        names, verdict, say = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            yield name, verdict, say


def test_the_docs_agree():
    rows = list(documented())
    expected = {name: v for v, names in VERDICTS.items() for name in names}
    assert {name: verdict for name, verdict, _ in rows} == expected
    assert len(rows) == len(expected)
    say = {name: text for name, _, text in rows}
    assert all("value=" in say[name] for name in WORKS_WITH_VALUE)
    for name, (_, words) in WORKS_WITH_WORDS.items():
        for argument, fields in words.items():
            quoted = ", ".join(f'"{field}"' for field in fields)
            assert f"`{argument}=({quoted})`" in say[name]
