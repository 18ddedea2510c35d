"""What users rely on: the public names, their arguments, and states of older versions.

    python tests/test_api.py    # writes the file of names and arguments anew
    python tests/test_api.py X  # writes states of the version X

CONTRIBUTING.md says what may change.
"""

import inspect
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import soap_optax

FOLDER = Path(__file__).parent / "api"
NAMES = FOLDER / "names.txt"
OPTIMIZERS = {
    "soap": lambda: soap_optax.soap(1e-2, weight_decay=0.1),
    "recipe": lambda: soap_optax.soap(
        1e-2, nesterov=True, precondition_frequency=1, basis="current", factors="kl"
    ),
    "small": lambda: soap_optax.soap(
        1e-2, factorized=True, one_sided=True, block_size=2, mu_dtype=jnp.bfloat16
    ),
    "shampoo": lambda: soap_optax.shampoo(1e-2),
    "shampoo, grafting": lambda: soap_optax.shampoo(1e-2, grafting="adam", power=0.5),
    "inside": lambda: soap_optax.in_eigenbasis(optax.scale_by_lion()),
}
NEAR = {"rtol": 1e-3, "atol": 1e-6}
STATES = sorted(FOLDER.glob("states_*.npz"))


def described(name):
    """A public name, and its arguments with their defaults."""
    thing = getattr(soap_optax, name)
    if not callable(thing):
        return name
    methods = sorted(getattr(thing, "__abstractmethods__", ()))
    more = [signature(f"{name}.{method}", getattr(thing, method)) for method in methods]
    return "\n".join([signature(name, thing), *more])


def signature(name, function):
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return f"{name}{inspect.Signature(plain)}"


def public_names():
    """The names that `soap_optax` exports, without its modules."""
    things = vars(soap_optax).items()
    public = [n for n, x in things if n[0] != "_" and not inspect.ismodule(x)]
    return sorted(public)


def described_names():
    return "".join(f"{described(name)}\n" for name in public_names())


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_has_a_docstring(name):
    assert getattr(soap_optax, name).__doc__


def test_the_public_names_and_their_arguments_are_written_down():
    assert described_names() == NAMES.read_text(), (
        "the public interface has changed; CONTRIBUTING.md says what may change, and "
        "python tests/test_api.py writes the file anew"
    )


def training_of(name):
    """An optimizer, its parameters, and the gradient of each step."""
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
        "nested": {"b": jnp.asarray(rng.normal(size=6), jnp.float32)},
    }
    shifts = [jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for _ in range(6)]

    def gradients(step):
        w = params["w"] * jnp.float32(0.5) + shifts[step]
        return {"w": w, "nested": {"b": w[0]}}

    return OPTIMIZERS[name](), params, gradients


def leaves_by_path(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def written(version):
    """Writes, for each optimizer, a state after four steps and the next two updates."""
    arrays = {}
    for name in OPTIMIZERS:
        tx, params, gradients = training_of(name)
        state = tx.init(params)
        for step in range(6):
            if step == 4:
                for path, leaf in leaves_by_path(state).items():
                    arrays[f"{name}|state|{path}"] = np.asarray(leaf, stored(leaf))
            updates, state = tx.update(gradients(step), state, params)
            if step >= 4:
                for path, leaf in leaves_by_path(updates).items():
                    arrays[f"{name}|updates {step}|{path}"] = np.asarray(leaf)
    np.savez_compressed(FOLDER / f"states_{version}.npz", **arrays)


def stored(leaf):
    """The dtype in the file, because NumPy's files have no bfloat16."""
    return np.float32 if leaf.dtype == jnp.bfloat16 else leaf.dtype


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("path", STATES, ids=lambda path: path.stem)
def test_a_state_of_an_older_version_goes_on(path, name):
    arrays = np.load(path)
    tx, params, gradients = training_of(name)
    like = tx.init(params)
    kept = {
        key.split("|", 2)[2]: arrays[key]
        for key in arrays.files
        if key.startswith(f"{name}|state|")
    }
    expected = {key: leaf.shape for key, leaf in leaves_by_path(like).items()}
    assert {key: leaf.shape for key, leaf in kept.items()} == expected
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(kept[jax.tree_util.keystr(path)], leaf.dtype),
        like,
    )
    for step in (4, 5):
        updates, state = jax.jit(tx.update)(gradients(step), state, params)
        for key, update in leaves_by_path(updates).items():
            recorded = arrays[f"{name}|updates {step}|{key}"]
            # The momentum of "small" has bfloat16, where round-off is 4e-3.
            near = {"rtol": 1e-2, "atol": 1e-4} if name == "small" else NEAR
            np.testing.assert_allclose(update, recorded, **near)


def test_each_released_version_has_states():
    assert FOLDER / f"states_{soap_optax.__version__}.npz" in STATES


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        written(sys.argv[1])
    else:
        NAMES.write_text(described_names())
