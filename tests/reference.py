"""SOAP in NumPy, float64, written from the paper, one parameter at a time.

Algorithm 3 of arXiv 2409.11321 with the authors' conventions: the first gradient only
builds the eigenbases, and a refresh happens when the frequency divides the step. Unlike
the library this reference keeps the coordinates sorted by eigenvalue and permutes the
second moment, and it rotates the first moment back and forth through the parameter's
coordinates. eps is added after bias correction, as in optax.

KL-SOAP weights each factor by the inverses of the others, from eigenvalues that are
exact at a refresh (by eigh) and follow the gradients otherwise. Each gradient counts
once in them, as it does in the factors.
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
        factorized=False,
        factors="shampoo",
        nesterov=False,
        eps_root=0.0,
    ):
        self.nesterov, self.eps_root = nesterov, eps_root
        self.factorized, self.kl = factorized, factors == "kl"
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
        self.eigenvalues = [
            np.zeros(n) if f else None for n, f in zip(shape, has_factor, strict=True)
        ]
        self.mu, self.nu = np.zeros(shape), np.zeros(shape)
        self.count = self.adam_count = 0

    def step(self, gradient):
        if self.basis == "current":
            self._accumulate(gradient)
            is_refreshed = self._refresh()
            direction = self._adam(gradient, follows=not is_refreshed)
        else:
            first = self.count == 0
            direction = np.zeros_like(gradient) if first else self._adam(gradient)
            self._accumulate(gradient)
            self._refresh()
        self.count += 1
        return direction

    def _adam(self, gradient, *, follows=True):
        projected = _rotate(gradient, self.bases, transpose=True)
        self.adam_count += 1
        self.mu = self.b1 * self.mu + (1 - self.b1) * projected
        self.nu = self.b2 * self.nu + (1 - self.b2) * projected**2
        mu_hat = self.mu / (1 - self.b1**self.adam_count)
        if self.nesterov:
            mu_hat = self.b1 * self.mu / (1 - self.b1 ** (self.adam_count + 1))
            correction = (1 - self.b1) / (1 - self.b1**self.adam_count)
            mu_hat = mu_hat + correction * projected
        nu_hat = self.nu / (1 - self.b2**self.adam_count)
        if self.factorized:
            nu_hat = rank_one(nu_hat)
        if self.kl and follows:
            self._follow(projected)
        root = np.sqrt(nu_hat + self.eps_root)
        return _rotate(mu_hat / (root + self.eps), self.bases)

    def _beta(self):
        beta = self.beta
        if self.basis == "current" or self.kl:  # the decay of a bias-corrected mean
            beta *= (1 - beta**self.count) / (1 - beta ** (self.count + 1))
        return beta

    def _accumulate(self, gradient):
        beta = self._beta()
        inverses = self._inverses(gradient)
        for i, factor in enumerate(self.factors):
            if factor is not None:
                whitened = gradient
                for j, q in enumerate(self.bases):
                    if self.kl and j != i and q is not None:
                        matrix = (q * inverses[j]) @ q.T / len(q)
                        whitened = _multiply(matrix, whitened, j)
                rows = np.moveaxis(gradient, i, 0).reshape(len(factor), -1)
                others = np.moveaxis(whitened, i, 0).reshape(len(factor), -1)
                self.factors[i] = beta * factor + (1 - beta) * rows @ others.T

    def _inverses(self, gradient):
        """Of the eigenvalues, but those below a thousandth of their mean."""
        known = [v for v in self.eigenvalues if v is not None]
        if not any(np.any(v) for v in known):
            size = np.mean(gradient**2) ** (1 / len(known)) if known else None
            return [
                None if v is None else np.full(len(v), 1 / size)
                for v in self.eigenvalues
            ]
        return [
            None if v is None else 1 / np.maximum(v, 1e-3 * v.mean())
            for v in self.eigenvalues
        ]

    def _follow(self, projected):
        beta, inverses = self._beta(), self._inverses(projected)
        followed = []
        for i, values in enumerate(self.eigenvalues):
            energy = projected**2
            for j, inverse in enumerate(inverses):
                if j != i and inverse is not None:
                    energy = _multiply(np.diag(inverse / len(inverse)), energy, j)
            others = tuple(j for j in range(projected.ndim) if j != i)
            if values is not None:
                values = beta * values + (1 - beta) * energy.sum(others)
            followed.append(values)
        self.eigenvalues = followed

    def _refresh(self):
        """Says whether it was due."""
        if self.count % self.frequency(self.count):
            return False
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
            q = self.bases[i]
            self.eigenvalues[i] = np.diag(q.T @ factor @ q)
        self.mu = _rotate(mu, self.bases, transpose=True)
        return True


def rank_one(nu):
    """The product of the means along each axis, over powers of the mean of all."""
    product = np.ones_like(nu) * nu.mean() ** (1 - nu.ndim)
    for i in range(nu.ndim):
        others = tuple(j for j in range(nu.ndim) if j != i)
        product = product * nu.mean(others, keepdims=True)
    return product


def _rotate(array, bases, *, transpose=False):
    for i, q in enumerate(bases):
        if q is not None:
            array = _multiply(q.T if transpose else q, array, i)
    return array


def _multiply(matrix, array, axis):
    return np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)


def run(gradients, **options):
    """The directions for a sequence of gradients, `[T, ...]`."""
    soap = Soap(gradients.shape[1:], **options)
    return np.stack([soap.step(gradient) for gradient in gradients])
