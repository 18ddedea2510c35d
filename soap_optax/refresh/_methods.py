"""Methods of refreshing eigenbases: mathematics on matrices `[..., b, b]`.

A factor M is symmetric and positive semi-definite. Its eigenbasis Q is orthonormal, and
its columns are approximate eigenvectors. The *Rayleigh quotient* q^T M q of a column q
estimates its eigenvalue. A direction is *null* if its eigenvalue is round-off.

A method is a class with one function, `RefreshMethod.refresh`. To add one, write the
class and enter it in `METHODS`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from soap_optax import _arguments
from soap_optax._dtypes import at_least_float32, coarsest_eps

# An eigenvalue is round-off up to this many machine epsilons, as a share of the largest
# one: those of the factor, and those of coarser rounding of its entries in products.
_NULL, _COARSE_NULL = 10, 0.25
# Cholesky-QR adds a trace of so many machine epsilons, and stops after so many passes.
_TRACE, _PASSES = 2, 8


class Refreshed(NamedTuple):
    """What a refresh makes of eigenbases.

    Attributes:
      eigenbases: new eigenbases, `[..., b, b]`. Each column stands in the place of the
        old column that it continues.
      eigenvalues: estimates of the eigenvalues, one for each new column, `[..., b]`.
      is_new: whether an eigenbasis is new and sound, `[...]`. Where it is false, the
        eigenbasis may hold anything.
      is_kept: whether the old eigenbasis is good enough to stay, and the eigenvalues
        are estimates for it, `[...]`. Where neither holds, the refresh failed, and the
        eigenvalues may hold anything.
    """

    eigenbases: jax.Array
    eigenvalues: jax.Array
    is_new: jax.Array
    is_kept: Any = False


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["decompose", "tolerance"],
    meta_fields=["precision"],
)
@dataclasses.dataclass(frozen=True)
class RefreshRequest:
    """What a refresh asks of every method.

    It is a pytree, because it has to be an operand of functions that see only a part of
    a mesh. On explicit axes these may not close over arrays (jax-ml/jax#29162).

    Attributes:
      decompose: whether to find the eigenvectors of the factors by decomposition, as at
        the first step, when nothing is known of them. None says that this is never
        asked, so that no decomposition is compiled. A method gets a scalar, also under
        `jax.vmap`.
      tolerance: an eigenbasis Q may stay while the norm of the off-diagonal part of
        Q^T M Q is at most this share of the norm of M. None means that it may not.
        Under `jax.vmap` over tolerances it is an array `[n, ...]` like `wanted`.
      precision: precision of the products of matrices.
    """

    decompose: jax.Array | bool | None = None
    tolerance: jax.typing.ArrayLike | None = None
    precision: Any = jax.lax.Precision.HIGHEST


class RefreshMethod(abc.ABC):
    """A method of refreshing eigenbases.

    A subclass is a frozen dataclass, whose fields are the parameters of the method.
    Under `jax.vmap` the function gets the matrices of all members of an ensemble in one
    batch, and derivatives do not go through it.
    """

    @abc.abstractmethod
    def refresh(
        self,
        factors: jax.Array,
        eigenbases: jax.Array,
        wanted: jax.Array,
        request: RefreshRequest,
    ) -> Refreshed:
        """Refreshes a batch of eigenbases.

        Args:
          factors: factors, `[n, ..., b, b]`, in at least float32.
          eigenbases: eigenbases of these factors, `[n, ..., b, b]`.
          wanted: whether each eigenbasis is to be refreshed, `[n, ...]`.
          request: what else is asked of the method.

        Returns:
          The new eigenbases. An eigenbasis that is not wanted is not marked as new.
        """


@dataclasses.dataclass(frozen=True)
class QR(RefreshMethod):
    """One power step M Q and a QR decomposition, as published.

    The decomposition is by Householder's method on CPU. On other platforms, which are
    slow at that, it is the one of `CholeskyQR`. See Vyas et al., "SOAP: Improving and
    Stabilizing Shampoo using Adam", https://arxiv.org/abs/2409.11321, Algorithm 4.
    """

    def refresh(
        self,
        factors: jax.Array,
        eigenbases: jax.Array,
        wanted: jax.Array,
        request: RefreshRequest,
    ) -> Refreshed:
        return _by_power_step(_qr, factors, eigenbases, wanted, request)


@dataclasses.dataclass(frozen=True)
class CholeskyQR(RefreshMethod):
    """The step of `QR`, up to round-off, computed by products of matrices everywhere.

    Products are fast on GPU and TPU, where `QR` takes this method, too.
    """

    def refresh(
        self,
        factors: jax.Array,
        eigenbases: jax.Array,
        wanted: jax.Array,
        request: RefreshRequest,
    ) -> Refreshed:
        return _by_power_step(_cholesky, factors, eigenbases, wanted, request)


@dataclasses.dataclass(frozen=True)
class Eigh(RefreshMethod):
    """A full decomposition of M into eigenvectors at every refresh."""

    def refresh(
        self,
        factors: jax.Array,
        eigenbases: jax.Array,
        wanted: jax.Array,
        request: RefreshRequest,
    ) -> Refreshed:
        request = dataclasses.replace(request, decompose=True)
        return _by_power_step(_qr, factors, eigenbases, wanted, request)


METHODS: dict[str, RefreshMethod] = {
    "qr": QR(),
    "cholesky_qr": CholeskyQR(),
    "eigh": Eigh(),
}


def rule(name: str, value: Any) -> None:
    """A rule for arguments (see `_arguments`): a `RefreshMethod` or the name of one."""
    names = [*METHODS]
    listed = f"{' or '.join(map(repr, names))} or a soap_optax.RefreshMethod"
    is_method = isinstance(value, RefreshMethod)
    is_name = isinstance(value, str) and value in names
    _arguments.require(name, value, listed, is_method or is_name)
    try:
        hash(value)
    except TypeError:
        rule_of_hash = "hashable, like a frozen dataclass without arrays"
        _arguments.require(name, value, rule_of_hash, False)


def method_of(value: str | RefreshMethod) -> RefreshMethod:
    """The method that has the name `value`, or `value` if it is a method itself."""
    return METHODS[value] if isinstance(value, str) else value


# Orthonormal rows, and for each row the size, `[..., b]`, of the part of it that was
# orthogonal to the rows before it.
_Orthonormal = tuple[jax.Array, jax.Array]

# Makes rows orthonormal: each row in its turn, so that it is orthogonal to the rows
# before it. It takes the rows, the rows of the old eigenbases in whose places they
# stand, both `[n, ..., b, b]`, and whether each matrix is wanted, `[n, ...]`.
_Orthonormalize = Callable[[jax.Array, jax.Array, jax.Array], _Orthonormal]


class PowerStep(NamedTuple):
    """The power step M Q of a factor M and its eigenbasis Q, and its eigenvalues.

    Attributes:
      rows: columns of M Q as rows, over `largest`, `[..., b, b]`. A null column of Q
        stands here as it is.
      quotients: Rayleigh quotients of the columns of Q, over `largest`, `[..., b]`, and
        0 for null columns.
      largest: largest of the Rayleigh quotients, or 1 where it is not positive,
        `[..., 1]`.
      off_diagonal: norm of the off-diagonal part of Q^T M Q over the norm of M,
        `[...]`.
      null_share: share of the largest eigenvalue up to which one is round-off.
    """

    rows: jax.Array
    quotients: jax.Array
    largest: jax.Array
    off_diagonal: jax.Array
    null_share: jax.Array


def power_step(factors: jax.Array, eigenbases: jax.Array, precision: Any) -> PowerStep:
    """Takes the power step M Q. Its columns are nearly multiples of the columns of Q.

    Args:
      factors: symmetric positive semi-definite matrices M, `[..., b, b]`.
      eigenbases: matrices Q with orthonormal columns, `[..., b, b]`.
      precision: precision of the product M Q.
    """
    basis = at_least_float32(eigenbases)
    products = jnp.einsum("...ki,...kl->...il", basis, factors, precision=precision)
    basis = _transposed(basis)
    quotients = jnp.sum(basis * products, axis=-1)
    largest = jnp.max(quotients, axis=-1, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)
    quotients, products = quotients / largest, products / largest[..., None]
    null_share = _null_share(factors, precision)
    is_null = quotients <= null_share
    quotients = jnp.where(is_null, 0, quotients)
    norm = _norm(products)
    residual = _norm(products - quotients[..., None] * basis)
    return PowerStep(
        rows=jnp.where(is_null[..., None], basis, products),
        quotients=quotients,
        largest=largest,
        off_diagonal=residual / jnp.where(norm > 0, norm, 1),
        null_share=null_share,
    )


def quality(
    factors: jax.Array, eigenbases: jax.Array, precision: Any
) -> tuple[jax.Array, jax.Array]:
    """Measures the condition of factors, and how well eigenbases diagonalize them.

    Returns:
      The largest diagonal entry of Q^T M Q over the smallest, infinite where the
      smallest is round-off, and the norm of the off-diagonal part of Q^T M Q over the
      norm of M, both `[...]`.
    """
    step = power_step(factors, eigenbases, precision)
    low = step.quotients.min(axis=-1)
    condition = jnp.where(low > 0, 1 / jnp.where(low > 0, low, 1), jnp.inf)
    return condition, step.off_diagonal


def angles(eigenbases: jax.Array, others: jax.Array) -> jax.Array:
    """The angles between the lines along pairs of columns, in radians, `[..., b]`."""
    basis, other = at_least_float32(eigenbases), at_least_float32(others)
    is_opposite = jnp.sum(basis * other, axis=-2, keepdims=True) < 0
    chords = basis - jnp.where(is_opposite, -other, other)
    lengths = jnp.sqrt(jnp.sum(jnp.square(chords), axis=-2))
    return 2 * jnp.arcsin(jnp.minimum(lengths / 2, 1))


def is_orthonormal(matrix: jax.Array) -> jax.Array:
    """Says of each matrix Q whether its columns are orthonormal, `[...]`.

    The test is whether Q^T Q v = v, up to round-off, for one vector v of random signs.
    """
    signs = np.random.default_rng(0).choice([-1.0, 1.0], matrix.shape[-1])
    vector = jnp.broadcast_to(jnp.asarray(signs, matrix.dtype), matrix.shape[:-1])
    product = jnp.einsum("...ij,...j->...i", matrix, vector, precision="highest")
    again = jnp.einsum("...ij,...i->...j", matrix, product, precision="highest")
    residual = again - vector
    tolerance = 1e4 * float(jnp.finfo(matrix.dtype).eps)
    return jnp.all(jnp.abs(residual) <= tolerance, axis=-1)


def _by_power_step(
    orthonormalize: _Orthonormalize,
    factors: jax.Array,
    eigenbases: jax.Array,
    wanted: jax.Array,
    request: RefreshRequest,
) -> Refreshed:
    """Takes a power step and makes its rows orthonormal, or decomposes the factors.

    An eigenbasis stays where the tolerance of the request allows it. Eigenvectors from
    a decomposition go through `orthonormalize` as well, so that a program has one QR
    decomposition for both cases.
    """
    step = power_step(factors, eigenbases, request.precision)
    quotients = step.quotients * step.largest
    to_do = wanted
    if request.tolerance is not None:
        # A comparison with NaN is false: such an eigenbasis is to do, and fails.
        to_do = wanted & ~(step.off_diagonal <= request.tolerance)
    is_kept = wanted & ~to_do

    def finish() -> Refreshed:
        operands = (step, factors, eigenbases, to_do)
        rows, sizes = _ranked(*operands, request.decompose, orthonormalize)
        is_new = to_do & is_orthonormal(rows)
        values = jnp.where(to_do[..., None], sizes * step.largest, quotients)
        return Refreshed(_transposed(rows), values, is_new, is_kept)

    def keep() -> Refreshed:
        return Refreshed(at_least_float32(eigenbases), quotients, to_do, is_kept)

    if request.tolerance is None:
        return finish()
    return jax.lax.cond(jnp.any(to_do), finish, keep)


def _ranked(
    step: PowerStep,
    factors: jax.Array,
    eigenbases: jax.Array,
    wanted: jax.Array,
    decompose: jax.Array | bool | None,
    orthonormalize: _Orthonormalize,
) -> _Orthonormal:
    """Makes rows orthonormal in the order of descending Rayleigh quotients.

    Afterwards each row returns to the place where it stood. Coordinates thereby keep
    their identity, and statistics that are kept per coordinate stay valid. A row of
    which hardly anything is orthogonal to the rows before it continues with round-off,
    and is null from then on.

    Args:
      step: power step, whose rows are taken unless the factors are decomposed.
      factors: factors, `[n, ..., b, b]`.
      eigenbases: old eigenbases, `[n, ..., b, b]`.
      wanted: whether each matrix is wanted, `[n, ...]`.
      decompose: whether to take the eigenvectors of the factors, in the order of their
        eigenvalues, in place of the rows of the power step.
      orthonormalize: makes the rows orthonormal.

    Returns:
      The rows and their sizes, which are 0 for null rows.
    """
    order = jnp.argsort(step.quotients, axis=-1, descending=True)
    operands = (step, factors, order)
    if decompose is None:
        rows, is_null = _sorted(*operands)
    elif decompose is True:
        rows, is_null = _eigenvectors(*operands)
    else:
        rows, is_null = jax.lax.cond(decompose, _eigenvectors, _sorted, *operands)
    old_rows = _take_rows(_transposed(at_least_float32(eigenbases)), order)
    rows, sizes = orthonormalize(rows, old_rows, wanted)
    is_null |= sizes <= step.null_share * jnp.max(sizes, axis=-1, keepdims=True)
    place = jnp.argsort(order, axis=-1)
    sizes = jnp.take_along_axis(jnp.where(is_null, 0, sizes), place, axis=-1)
    return _take_rows(rows, place), sizes


def _sorted(
    step: PowerStep, _: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rows of the power step, put in `order`, and whether each row is null."""
    quotients = jnp.take_along_axis(step.quotients, order, axis=-1)
    return _take_rows(step.rows, order), quotients <= 0


def _eigenvectors(
    step: PowerStep, factors: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors as rows, times their eigenvalues, in descending order.

    Round-off decides which null eigenvectors are found. A null one is therefore
    replaced by the row of the identity that belongs where `_ranked` will put it.
    """
    matrix = factors / step.largest[..., None]
    values, vectors = (x[..., ::-1] for x in jnp.linalg.eigh(matrix))
    is_null = values <= step.null_share * values[..., :1]
    columns = jnp.arange(order.shape[-1], dtype=order.dtype)
    columns = jnp.broadcast_to(columns, matrix.shape)
    identity = (order[..., None] == columns).astype(matrix.dtype)
    rows = _transposed(vectors) * values[..., None]
    return jnp.where(is_null[..., None], identity, rows), is_null


def _qr(rows: jax.Array, old_rows: jax.Array, wanted: jax.Array) -> _Orthonormal:
    """Orthonormalizes rows by the method that is fast on the platform."""
    return jax.lax.platform_dependent(
        rows, old_rows, wanted, cpu=_householder, default=_cholesky
    )


def _householder(rows: jax.Array, *_: jax.Array) -> _Orthonormal:
    """Orthonormalizes rows by QR, with the signs that turn each row the least."""
    columns, triangle = jnp.linalg.qr(_transposed(rows))
    sizes = jnp.diagonal(triangle, axis1=-2, axis2=-1)
    signs = jnp.where(sizes < 0, -1, 1).astype(sizes.dtype)
    return _transposed(columns) * signs[..., None], jnp.abs(sizes)


def _cholesky(rows: jax.Array, old_rows: jax.Array, wanted: jax.Array) -> _Orthonormal:
    """Orthonormalizes rows by repeated Cholesky-QR.

    With the factorization X X^T = L L^T the rows of L^-1 X are orthonormal, up to
    round-off times the squared condition number of X. While that number is large, a
    multiple of the identity is added to X X^T, so that a factorization exists, and such
    a pass only makes the number smaller. The pass that makes X orthonormal up to
    round-off is the last, of each matrix by itself, and a matrix that is not wanted has
    none. See Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices", arXiv 1809.11085.

    Rows that depend on one another would stay so. A trace of the old rows is therefore
    added, as much as round-off. Those of a power step are D Q^T M Q times the old rows
    Q^T, with a positive diagonal matrix D. As M is positive semi-definite, no
    eigenvalue of D Q^T M Q is negative, and the trace makes it nonsingular. Null rows
    and decomposed factors may depend on the old rows in any way, so that the trace has
    a part of random signs, too. Sizes are those of the rows without it.
    """
    eps = float(jnp.finfo(rows.dtype).eps)
    identity = jnp.broadcast_to(jnp.eye(rows.shape[-1], dtype=rows.dtype), rows.shape)

    def is_far(carry: Any) -> jax.Array:
        _, distance, passed = carry
        return (passed < _PASSES) & jnp.any(distance > 0.5)

    def improve(carry: Any) -> Any:
        rows, old_distance, passed = carry
        is_left = old_distance > 0.5
        gram = jnp.matmul(rows, _transposed(rows), precision="highest")
        distance = _norm(gram - identity)
        shift = jnp.where(distance > 0.5, 4 * eps * _norm(gram), 0)
        triangle = jnp.linalg.cholesky(gram + shift[..., None, None] * identity)
        better = jax.lax.linalg.triangular_solve(
            triangle, rows, left_side=True, lower=True
        )
        return (
            jnp.where(is_left[..., None, None], better, rows),
            jnp.where(is_left, distance, old_distance),
            passed + 1,
        )

    count = rows.shape[-1]
    signs = jax.random.rademacher(jax.random.key(0), (count, count), rows.dtype)
    signs = jnp.broadcast_to(signs, rows.shape)
    trace = _TRACE * eps * (old_rows + signs / (4 * count) ** 0.5)
    lengths = jnp.sqrt(jnp.sum(jnp.square(rows), axis=-1, keepdims=True))
    traced = rows / jnp.where(lengths > 0, lengths, 1) + trace
    distance = jnp.where(wanted, jnp.inf, jnp.zeros_like(lengths[..., 0, 0]))
    found, *_ = jax.lax.while_loop(is_far, improve, (traced, distance, 0))
    return found, jnp.abs(jnp.sum(rows * found, axis=-1))


def _norm(matrix: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(matrix), axis=(-2, -1)))


def _null_share(factors: jax.Array, precision: Any) -> jax.Array:
    """The share of the largest eigenvalue up to which an eigenvalue is round-off.

    Where products round the entries of the factors more coarsely than the dtype of the
    factors does, a smaller multiple of this suffices, because the errors of many
    entries cancel out.
    """
    of_dtype = _NULL * float(jnp.finfo(factors.dtype).eps)
    eps = coarsest_eps(factors.dtype, precisions=[precision])
    return jnp.maximum(of_dtype, _COARSE_NULL * eps).astype(factors.dtype)


def _take_rows(matrix: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take_along_axis(matrix, indices[..., None], axis=-2)


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -2, -1)
