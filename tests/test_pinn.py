"""The experiment with physics-informed networks: solutions, windows and rates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pinn
import pytest
import search


def cole_hopf(t, x):
    """The solution of Burgers' equation, a quotient of two integrals."""
    viscosity = 0.01 / np.pi
    nodes, weights = np.polynomial.hermite.hermgauss(120)
    y = x[:, None] - 2 * np.sqrt(viscosity * t) * nodes
    density = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * viscosity))
    return -np.sum(density * np.sin(np.pi * y), -1) / np.sum(density, -1)


@pytest.mark.parametrize("row", [20, 50, 100])
def test_the_solution_of_burgers_equation_is_that_of_its_formula(row):
    expected = cole_hopf(row / 100, pinn.grid(256))
    np.testing.assert_allclose(pinn.solution("Burgers")[row], expected, atol=1e-4)


@pytest.mark.parametrize("name", pinn.PROBLEMS)
def test_residuals_and_solutions_have_one_equation(name):
    problem, x, size = pinn.PROBLEMS[name], pinn.grid(64), 64
    k = np.pi * np.arange(size // 2 + 1)
    u = np.cos(np.pi * x)
    rate = problem.linear(k) * np.fft.rfft(u) + problem.nonlinear(u, k)
    rate = jnp.asarray(np.fft.irfft(rate, size))
    residual = problem.residual(
        lambda t, x: jnp.cos(jnp.pi * x) + t * rate, jnp.zeros(size), jnp.asarray(x)
    )
    np.testing.assert_allclose(residual, 0, atol=1e-8)


def test_a_window_starts_where_the_one_before_has_ended():
    problem = pinn.PROBLEMS["Korteweg-de Vries"]
    x, zero = pinn.grid(300), jnp.zeros(300)
    network = pinn.Network(problem.modes)
    before, after = (network.init(jax.random.key(i), zero, zero) for i in range(2))
    start = 0.1 * jax.random.normal(jax.random.key(2), (2, problem.handed_on))
    at_end = pinn.field(problem, before, start)(zero + 1 / problem.windows, x)
    handed = pinn.handed_on(problem, before, start)
    np.testing.assert_allclose(
        pinn.field(problem, after, handed)(zero, x), at_end, atol=1e-4
    )


def test_windows_are_trained_one_after_another(monkeypatch):
    name = "Korteweg-de Vries"
    problem = dataclasses.replace(pinn.PROBLEMS[name], windows=2, steps=80, points=32)
    monkeypatch.setitem(pinn.PROBLEMS, name, problem)
    rows = pinn.train(pinn.Job(name, "Adam", 1e-2, 0, 80))
    assert [row["step"] for row in rows] == list(range(4, 161, 4))
    assert rows[19]["error"] < rows[0]["error"] < 1
    assert np.isfinite([row["loss"] for row in rows]).all()


def test_a_search_tries_the_rates_to_both_sides():
    def rates(rate):
        job = pinn.Job("Burgers", "Adam", rate, 0, 10)
        return [near.rate for near in search.at_next_rates(job, pinn.RATES)]

    assert rates(1e-2) == [3e-3, 3e-2]
    assert rates(pinn.RATES[0]) == [3e-4]
    assert rates(pinn.RATES[-1]) == [3e-2]


def test_a_search_leaves_what_is_not_finite():
    losses = {1: np.nan, 2: np.inf, 3: 2.0, 4: 1.0, 5: np.nan}
    best, found = search.climb(
        {"a": 1, "b": 5},
        lambda one: [x for x in (one - 1, one + 1) if x in losses],
        lambda some: some,
        losses.get,
    )
    assert best == {"a": 4, "b": 4} and ("b", 3) in found
