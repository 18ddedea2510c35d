"""NetKet finds the ground state of a Heisenberg chain with SOAP, beside its own SR.

The parameters are complex: `optax.contrib.split_real_and_imaginary` hands SOAP their
real and imaginary parts. NetKet's stochastic reconfiguration (SR) is a preconditioner
of its own, by the geometry of the state. `make test-clients` runs this file.
"""

import netket as nk
import optax
from common import compare, schedule

import soap_optax

STEPS, SITES = 150, 12
HILBERT = nk.hilbert.Spin(s=1 / 2, N=SITES, total_sz=0)
CHAIN = nk.graph.Chain(SITES)
HAMILTONIAN = nk.operator.Heisenberg(HILBERT, CHAIN)


def train(choice):
    """Gives the error of the energy, as a share of the exact energy."""
    optimizer, preconditioner = choice
    model = nk.models.RBM(alpha=2, param_dtype=complex)
    sampler = nk.sampler.MetropolisExchange(HILBERT, graph=CHAIN)
    state = nk.vqs.MCState(sampler, model, n_samples=512, seed=0, sampler_seed=1)
    options = {"variational_state": state, "preconditioner": preconditioner}
    driver = nk.driver.VMC(HAMILTONIAN, optimizer, **options)
    driver.run(STEPS, out=nk.logging.RuntimeLog(), show_progress=False)
    summed = nk.vqs.FullSumState(HILBERT, model, variables=state.variables)
    exact = nk.exact.lanczos_ed(HAMILTONIAN)[0]
    return 1 - summed.expect(HAMILTONIAN).mean.real / exact


def soap(rate):
    tx = soap_optax.soap(schedule(rate, STEPS), nesterov=True)
    return optax.contrib.split_real_and_imaginary(tx), None


def nadam(rate):
    return optax.nadam(schedule(rate, STEPS), b1=0.95, b2=0.95), None


def sr(rate):
    curved = nk.optimizer.SR(diag_shift=1e-3, holomorphic=True)
    return optax.sgd(schedule(rate, STEPS)), curved


if __name__ == "__main__":
    optimizers = {"SOAP": (soap, (1e-2, 3e-2, 1e-1))}
    optimizers["NAdam"] = (nadam, (1e-2, 3e-2, 1e-1))
    optimizers["SR"] = (sr, (1e-2, 3e-2, 1e-1))
    compare("netket", "energy of a spin chain", train, limit=2e-3, **optimizers)
