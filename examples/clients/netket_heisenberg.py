"""NetKet finds the ground state of a Heisenberg chain with SOAP, beside its own SR.

The parameters are complex: `optax.contrib.split_real_and_imaginary` hands SOAP their
real and imaginary parts. NetKet's stochastic reconfiguration (SR) is a preconditioner
of its own, by the geometry of the state. `make test-clients` runs this file.
"""

import functools

import jax
import netket as nk
import optax
from common import RECIPE, compare, schedule

import soap_optax

STEPS, SITES = 200, 12
HILBERT = nk.hilbert.Spin(s=1 / 2, N=SITES, total_sz=0)
CHAIN = nk.graph.Chain(SITES)
HAMILTONIAN = nk.operator.Heisenberg(HILBERT, CHAIN, sign_rule=False)
EXACT = nk.exact.lanczos_ed(HAMILTONIAN)[0]


def train(choice):
    optimizer, preconditioner = choice
    model = nk.models.RBM(alpha=2, param_dtype=complex)
    sampler = nk.sampler.MetropolisExchange(HILBERT, graph=CHAIN)
    state = nk.vqs.MCState(sampler, model, n_samples=512, seed=0, sampler_seed=1)
    driver = nk.driver.VMC(
        HAMILTONIAN,
        optimizer,
        variational_state=state,
        preconditioner=preconditioner,
    )
    driver.run(STEPS, out=nk.logging.RuntimeLog(), show_progress=False)
    exact = nk.vqs.FullSumState(HILBERT, model, variables=state.variables)
    return exact.expect(HAMILTONIAN).mean.real / EXACT * -1 + 1


def soap(rate):
    tx = soap_optax.soap(schedule(rate, STEPS), **RECIPE)
    return optax.contrib.split_real_and_imaginary(tx), None
