"""Every call in docs/recipes.md trains a small model as it is printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import needs_consistent_rms

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
RECIPES = re.findall(
    r"^## ([^\n]*)\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE
)
TOKENS = jax.random.randint(jax.random.key(0), (64,), 0, 16)


def make_params():
    shapes = {
        "embed": {"embedding": (16, 16)},
        "layer": {"kernel": (16, 16), "lora_a": (16, 2), "bias": (16,)},
        "lm_head": {"kernel": (16, 16)},
    }
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    leaves, tree = jax.tree.flatten(shapes, is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    made = zip(keys, leaves, strict=True)
    params = jax.tree.unflatten(tree, [0.3 * jax.random.normal(*pair) for pair in made])
    params["layer"]["lora_b"] = jnp.zeros((2, 16))
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


@jax.jit
def loss_fn(params):
    layer = params["layer"]
    kernel = layer["kernel"] + layer["lora_a"] @ layer["lora_b"]
    hidden = jnp.tanh(
        params["embed"]["embedding"][TOKENS] @ kernel + layer["bias"][None]
    )
    logits = hidden @ params["lm_head"]["kernel"]
    targets = (TOKENS + 1) % 16
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean()


def run(title, code):
    """The names that a recipe defines."""
    names = {}
    exec(compile(code, title, "exec"), names)
    return names


def train(tx, params):
    """The parameters after 30 steps, and the losses before the first and after each."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, losses = tx.init(params), [float(loss_fn(params))]
    for _ in range(30):
        params, state = step(params, state)
        losses.append(float(loss_fn(params)))
    return params, losses


@pytest.mark.parametrize(
    ("title", "code"),
    [
        pytest.param(
            title,
            code,
            marks=[needs_consistent_rms] if "consistent_rms" in code else [],
            id=title,
        )
        for title, code in RECIPES
    ],
)
def test_recipe(title, code):
    names = run(title, code)
    if title == "Ensembles":
        assert names["updates"]["w"].shape == (5, 8, 4)
        return
    _, losses = train(names["tx"], make_params())
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]


def test_matrices_on_spheres_keep_their_norms():
    title = "SOAP on spheres"
    start = make_params()
    params, _ = train(run(title, dict(RECIPES)[title])["tx"], start)
    for name in ("kernel", "lora_a"):
        before, after = start["layer"][name], params["layer"][name]
        norms = [np.linalg.norm(matrix) for matrix in (before, after)]
        np.testing.assert_allclose(*norms, rtol=1e-5)
    assert not np.allclose(start["layer"]["kernel"], params["layer"]["kernel"])


def test_all_recipes_are_found():
    assert len(RECIPES) == PAGE.read_text().count("```python") == 13
