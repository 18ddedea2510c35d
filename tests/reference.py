"""SOAP in NumPy, float64, written from the paper, one parameter at a time.

Algorithm 3 of arXiv 2409.11321 with the authors' conventions: the first gradient only
builds the eigenbases, and a refresh happens when the frequency divides the step. Unlike
the library this reference keeps the coordinates sorted by eigenvalue and permutes the
second moment, and it rotates the first moment back and forth through the parameter's
coordinates. eps is added after bias correction, as in optax.
"""

import math

import numpy as np


class Soap:
    """SOAP on an array; `step(gradient)` gives the (ascent) direction."""

    def __init__(
        self,
        shape,
        *,
        b1=0.95,
        b2=0.95,
        eps=1e-8,
        shampoo_beta=None,
        frequency=10,
        max_precond_dim=10_000,
        precondition_1d=False,
        one_sided=False,
        basis="previous",
        refresh="qr",
        initial_basis="eigh",
    ):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.beta = b2 if shampoo_beta is None else shampoo_beta
        self.frequency = frequency if callable(frequency) else lambda count: frequency
        self.basis, self.refresh, self.initial_basis = basis, refresh, initial_basis
        has_factor = [1 < n <= max_precond_dim for n in shape]
        if len(shape) == 1 and not precondition_1d:
            has_factor = [False]
        if one_sided and any(has_factor):
            sizes = [
                n if f else math.inf for n, f in zip(shape, has_factor, strict=True)
            ]
            smallest = sizes.index(min(sizes))
            has_factor = [i == smallest for i in range(len(shape))]
        self.factors = [
            np.zeros((n, n)) if f else None
            for n, f in zip(shape, has_factor, strict=True)
        ]
        self.bases = [
            np.eye(n) if f else None for n, f in zip(shape, has_factor, strict=True)
        ]
        self.mu, self.nu = np.zeros(shape), np.zeros(shape)
        self.count = self.adam_count = 0

    def step(self, gradient):
        if self.basis == "current":
            self._accumulate(gradient)
            self._refresh()
            direction = self._adam(gradient)
        else:
            first = self.count == 0
            direction = np.zeros_like(gradient) if first else self._adam(gradient)
            self._accumulate(gradient)
            self._refresh()
        self.count += 1
        return direction

    def _adam(self, gradient):
        projected = _rotate(gradient, self.bases, transpose=True)
        self.adam_count += 1
        self.mu = self.b1 * self.mu + (1 - self.b1) * projected
        self.nu = self.b2 * self.nu + (1 - self.b2) * projected**2
        mu_hat = self.mu / (1 - self.b1**self.adam_count)
        nu_hat = self.nu / (1 - self.b2**self.adam_count)
        return _rotate(mu_hat / (np.sqrt(nu_hat) + self.eps), self.bases)

    def _accumulate(self, gradient):
        beta = self.beta
        if self.basis == "current":  # the decay of a bias-corrected mean
            beta *= (1 - beta**self.count) / (1 - beta ** (self.count + 1))
        for i, factor in enumerate(self.factors):
            if factor is not None:
                rows = np.moveaxis(gradient, i, 0).reshape(gradient.shape[i], -1)
                self.factors[i] = beta * factor + (1 - beta) * rows @ rows.T

    def _refresh(self):
        if self.count % self.frequency(self.count):
            return
        mu = _rotate(self.mu, self.bases)
        for i, (factor, q) in enumerate(zip(self.factors, self.bases, strict=True)):
            if factor is None:
                continue
            order = np.argsort(-np.diag(q.T @ factor @ q))
            self.nu = np.take(self.nu, order, axis=i)
            decompose = self.refresh == "eigh" or (
                self.count == 0 and self.initial_basis == "eigh"
            )
            if decompose:
                self.bases[i] = np.linalg.eigh(factor)[1][:, ::-1]
            else:
                self.bases[i] = np.linalg.qr(factor @ q[:, order])[0]
        self.mu = _rotate(mu, self.bases, transpose=True)


def _rotate(array, bases, *, transpose=False):
    for i, q in enumerate(bases):
        if q is not None:
            q = q.T if transpose else q
            array = np.moveaxis(np.tensordot(q, array, (1, i)), 0, i)
    return array


def run(gradients, **options):
    """The directions for a sequence of gradients, `[T, ...]`."""
    soap = Soap(gradients.shape[1:], **options)
    return np.stack([soap.step(gradient) for gradient in gradients])
