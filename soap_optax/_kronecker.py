"""Shampoo's Kronecker factors and their eigenbases: mathematics on one parameter.

A block G has axes 1..k and is unfolded along axis i into the matrix G_(i). Axis i has
length b_i, the factor M_i, the eigenbasis Q_i and the estimates e_i of its eigenvalues,
which form the diagonal matrix E_i. The functions here compute:

    accumulate     M_i <- (1 - w) M_i + w G_(i) G_(i)^T
    whiten         G x_j (Q_j (b_j E_j)^-1/2)^T over all j but i         (for KL-SOAP)
    project        G' = G x_1 Q_1^T ... x_k Q_k^T       (for a matrix: Q_L^T G Q_R)
    project_back   G = G' x_1 Q_1 ... x_k Q_k           (for a matrix: Q_L G' Q_R^T)
    follow         e_i <- (1 - w) e_i + w diag(G'_(i) G'_(i)^T)
    damp           G' with the numerically null directions of each M_i taken out
    root           G' x_1 E_1^-p ... x_k E_k^-p          (for Shampoo: L^-p G R^-p)
    rank_one       roots of the second moments of G', from their means along each axis
    clip_rms       blocks of G' scaled down to a root mean square
    set_rms        blocks of G' scaled to a root mean square
    graft          blocks of G' scaled to the norms of the blocks of another array
    change_basis   G' x_1 (Q_1^T Q_1^new)^T ...         (into the refreshed eigenbases)

Arrays have the parameter's shape. The `Layout` of the parameter says which axes form a
factor and how they are cut into blocks. For each axis there is a factor and an
eigenbasis `[grid…, b, b]` and eigenvalues `[grid…, b]`, where the grid numbers the
blocks; None stands for the identity.

The *energy* of a block is the sum of its squares, and the energy at an index of an axis
is the sum of the squares there. To *whiten* a gradient along an axis is to divide its
coordinates by the roots of the eigenvalues, as the formula above says.

The package `refresh` finds new eigenbases. See "SOAP: Improving and Stabilizing Shampoo
using Adam", https://arxiv.org/abs/2409.11321, Algorithms 3 and 4.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from soap_optax import _triangles
from soap_optax._dtypes import at_least_float32, widest
from soap_optax.mesh import _mesh
from soap_optax.parameters._layout import Layout

PerAxis = Sequence[jax.Array | None]

# The shares of `RoundOff.of`, in machine epsilons of the computation and in squares of
# the machine epsilon of coarser rounding.
_RCOND, _COARSE_RCOND = 0.01, 5
# What is at most this many machine epsilons is hidden: those of the computation, and
# those of coarser rounding of eigenbases and products. See `hidden`.
_RESOLUTION, _COARSE_RESOLUTION = 100, 1
# A refresh leaves no larger ratio of a first moment to the root of its second moment,
# unless there was a larger one before. See `_raised`.
_LARGEST_RATIO = 1.5
# KL-SOAP raises eigenvalues to this share of their mean before it inverts them.
_KL_FLOOR = 1e-3


class RoundOff(NamedTuple):
    """Up to which share of the largest eigenvalue an eigenvalue counts as round-off.

    Attributes:
      of_largest: the share of the largest eigenvalue.
      of_mean: a share of the mean eigenvalue, which counts where it is more.
    """

    of_largest: Any
    of_mean: Any = 0.0

    @classmethod
    def of(cls, dtype: Any, eps: Any) -> "RoundOff":
        """What counts as round-off by default.

        Eigenvalues are squares of gradients. If all is in float32, directions whose
        gradients are 30,000 times smaller than the largest count as round-off. Coarser
        rounding spreads a share of about eps^2 of a gradient's energy evenly over all
        directions, so that it is a share of the mean eigenvalue.

        Args:
          dtype: dtype of the computation.
          eps: machine epsilon of the coarsest rounding in play.
        """
        of_dtype = float(jnp.finfo(dtype).eps)
        is_coarser = eps > of_dtype
        if isinstance(is_coarser, bool):
            of_mean: Any = _COARSE_RCOND * eps**2 if is_coarser else 0.0
        else:
            of_mean = jnp.where(is_coarser, _COARSE_RCOND * eps**2, 0)
        return cls(_RCOND * of_dtype, of_mean)

    def is_coarse(self) -> bool:
        """Whether a share of the mean eigenvalue may count."""
        return not (isinstance(self.of_mean, float) and self.of_mean == 0)

    def is_zero(self) -> bool:
        """Whether it is known that nothing counts as round-off."""
        is_number = isinstance(self.of_largest, (int, float))
        return is_number and self.of_largest == 0 and not self.is_coarse()

    def share(self, ratios: jax.Array) -> jax.Array:
        """The share, from the eigenvalues over the largest one, `[grid…, b]`."""
        share = jnp.asarray(self.of_largest, ratios.dtype)
        if self.is_coarse():
            of_mean = jnp.asarray(self.of_mean, ratios.dtype)
            mean = jnp.mean(ratios, axis=-1, keepdims=True)
            share = jnp.maximum(share, of_mean * mean)
        return share


def accumulate(
    factors: PerAxis,
    gradients: Sequence[jax.Array],
    layout: Layout,
    weight: jax.typing.ArrayLike,
    precision: Any,
) -> list[jax.Array | None]:
    """Moves each factor by `weight` towards the Gram matrix of its gradient.

    Factors may be packed (see `_triangles`). A block of a gradient that is not finite,
    or whose energy overflows the dtype of the factor, leaves the factor of the block as
    it is.
    """

    def one(
        factor: jax.Array | None, gradient: jax.Array, axis: int
    ) -> jax.Array | None:
        if factor is None:
            return None
        blocks = _blocks(gradient, factor, layout)
        gram = _gram(blocks, axis, factor, layout.grid, precision)
        if gram.shape != factor.shape:
            gram = _triangles.pack(gram)
        mean = _mean(factor.astype(gram.dtype), gram, weight).astype(factor.dtype)
        # The energy is the trace of the Gram matrix, which bounds its entries. The
        # comparison is false for NaN.
        energy = _energy(blocks, layout)
        sound = energy <= float(jnp.finfo(factor.dtype).max)
        return jnp.where(sound[..., None, None], mean, factor)

    return [
        one(*of_axis) for of_axis in zip(factors, gradients, layout.axes, strict=True)
    ]


def whiten(
    gradient: jax.Array,
    eigenbases: PerAxis,
    eigenvalues: PerAxis,
    layout: Layout,
    round_off: RoundOff,
    precision: Any,
) -> list[jax.Array]:
    """For each axis i, the gradient whitened along all other axes.

    This is G x_j (Q_j E_j^-1/2)^T / sqrt(b_j) for all j but i that have a factor.
    KL-SOAP accumulates its Gram matrix along axis i. So each factor is weighted by the
    inverses of the others, as in Lin et al., https://arxiv.org/abs/2509.03378.
    """
    scales = _whitening(gradient, eigenvalues, layout, round_off)

    def one(i: int) -> jax.Array:
        projected = project(gradient, _but(eigenbases, i), layout, precision)
        return _scale(projected, _but(scales, i), layout)

    return [one(i) for i in range(len(layout.axes))]


def whitened_energies(
    coordinates: jax.Array, eigenvalues: PerAxis, layout: Layout, round_off: RoundOff
) -> list[jax.Array | None]:
    """For each axis i, the energies of what `whiten` gives, along eigenvectors of i."""
    scales = _whitening(coordinates, eigenvalues, layout, round_off)

    def one(i: int) -> jax.Array | None:
        if eigenvalues[i] is None:
            return None
        whitened = _scale(coordinates, _but(scales, i), layout)
        return _energy(layout.to_blocks(whitened), layout, layout.axes[i])

    return [one(i) for i in range(len(layout.axes))]


def _whitening(
    array: jax.Array, eigenvalues: PerAxis, layout: Layout, round_off: RoundOff
) -> list[jax.Array | None]:
    """(b_j e_j)^-1/2 for each axis j with a factor, `[grid…, b]`; 0 where e_j is 0.

    At the start nothing is known of the eigenvalues of an axis. They are then taken to
    be the root mean square of the gradient (for k factors: the k-th root of the mean
    square), so that all factors start at a similar size. With one factor there is
    nothing to whiten, and each entry is None.
    """
    count = sum(values is not None for values in eigenvalues)
    if count < 2:
        return [None] * len(eigenvalues)
    array = at_least_float32(array)
    rows = mean_squares(array, layout)[0]
    start = safe_power(jnp.mean(rows, axis=-1, keepdims=True), 1 / count)

    def one(values: jax.Array | None) -> jax.Array | None:
        if values is None:
            return None
        known = _floored(values.astype(array.dtype), start, round_off)
        return safe_power(known * values.shape[-1], -0.5)

    return [one(values) for values in eigenvalues]


def _floored(
    eigenvalues: jax.Array, start: jax.Array, round_off: RoundOff
) -> jax.Array:
    """Raises eigenvalues to `_KL_FLOOR` of their mean, or to `start` if all are 0.

    Without this, a gradient in a direction that had none before would make the other
    factors forget all earlier gradients. Eigenvalues that are round-off, because
    something is rounded more coarsely than it is computed, are raised to the largest
    one. Their inverses would fill the other factors with round-off.
    """
    mean = jnp.mean(eigenvalues, axis=-1, keepdims=True)
    raised = jnp.maximum(eigenvalues, _KL_FLOOR * mean)
    if round_off.is_coarse():
        is_null = eigenvalues < round_off.of_mean * mean
        largest = jnp.max(eigenvalues, axis=-1, keepdims=True)
        raised = jnp.where(is_null, largest, raised)
    return jnp.where(mean > 0, raised, start)


def bounded(array: jax.Array) -> jax.Array:
    """Clips the finite entries of an array so that their squares are finite.

    A moving average of squares never comes back from infinity, so one overflow would
    end the training of its coordinate. Entries that are not finite stay, so that later
    checks see them.
    """
    limit = float(jnp.finfo(array.dtype).max) ** 0.5 / 2
    return jnp.where(jnp.isfinite(array), jnp.clip(array, -limit, limit), array)


def project(
    array: jax.Array, eigenbases: PerAxis, layout: Layout, precision: Any
) -> jax.Array:
    """The coordinates of `array` in the eigenbases, in the array's shape and dtype."""
    return _multiply(array, eigenbases, layout, precision, back=False)


def project_and_measure(
    gradient: jax.Array, eigenbases: PerAxis, layout: Layout, precision: Any
) -> tuple[jax.Array, list[jax.Array | None]]:
    """The coordinates of a gradient, and for each axis the energies, `[grid…, b]`.

    The axes are turned one after the other. Turning an axis does not change the
    energies along the others, so the energies along an axis are taken right after it is
    turned. XLA then reads each intermediate array in one pass. If all energies came
    from the last array, XLA would first store an array of its squares.
    """
    energies: list[jax.Array | None] = []
    for i, (axis, basis) in enumerate(zip(layout.axes, eigenbases, strict=True)):
        gradient = project(gradient, _alone(basis, i, layout), layout, precision)
        blocks = layout.to_blocks(gradient)
        energies.append(None if basis is None else _energy(blocks, layout, axis))
    return gradient, energies


def hidden(
    coordinates: jax.Array, energies: PerAxis, layout: Layout, eps: Any
) -> jax.Array:
    """What round-off hides of a gradient in eigenbases that come from it alone.

    A matrix is diagonal there. What stands beside the diagonal is round-off, because
    the factors square its singular values s_i: about eps s^2 / s_i in the directions of
    s_i, where s is the largest one. An elementwise transformation like Adam would scale
    this up to full-size steps, which no other program and no other device repeats.

    The coordinates that stand out of the round-off of a diagonal block are hardly more
    than its shortest axis is long. Where more than twice as many do, the gradient is
    another one than that from which the eigenbases come, and nothing of it is hidden.

    Args:
      coordinates: coordinates of the gradient.
      energies: its energies at each index of each axis with a factor, `[grid…, b]`.
      layout: layout of the parameter, which has factors.
      eps: machine epsilon of the coarsest rounding of eigenbases and products.

    Returns:
      Whether each coordinate is hidden, in the shape of the parameter.
    """
    known = [energy for energy in energies if energy is not None]
    blocks = layout.to_blocks(coordinates)
    largest = functools.reduce(jnp.maximum, [jnp.max(e, axis=-1) for e in known])
    scale = jnp.sqrt(jnp.where(largest > 0, largest, 1))
    singular = [
        _along(safe_root(energy) / scale[..., None], axis, blocks, layout)
        for energy, axis in zip(energies, layout.axes, strict=True)
        if energy is not None
    ]
    sizes = jnp.abs(blocks) / jnp.expand_dims(scale, layout.within)
    of_dtype = _RESOLUTION * float(jnp.finfo(blocks.dtype).eps)
    threshold = jnp.maximum(of_dtype, _COARSE_RESOLUTION * eps).astype(sizes.dtype)
    is_hidden = sizes * functools.reduce(jnp.minimum, singular) < threshold
    visible = jnp.sum(~is_hidden, layout.within, keepdims=True)
    is_hidden &= visible <= 2 * min(blocks.shape[axis] for axis in layout.axes)
    # Energies of 0 say nothing, because the squares of small gradients underflow.
    is_hidden &= jnp.expand_dims(largest > 0, layout.within)
    return layout.from_blocks(is_hidden, coordinates)


def project_back(
    array: jax.Array, eigenbases: PerAxis, layout: Layout, precision: Any
) -> jax.Array:
    """Inverts `project`."""
    return _multiply(array, eigenbases, layout, precision, back=True)


class Moments(NamedTuple):
    """The moments of a parameter in one state of the inner transformation.

    Attributes:
      first: arrays that are linear in the gradient, such as its mean.
      second: means of the squares of what the first moments are means of. There may be
        none, or more than one.
    """

    first: list[Any]
    second: list[Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["raises"],
    meta_fields=["precision"],
)
@dataclasses.dataclass(frozen=True)
class BasisChange:
    """How moments change basis.

    Attributes:
      raises: whether second moments are raised where a first moment has come into a
        coordinate that knows nothing of it; see `_raised`.
      precision: precision of the products that turn first moments.
    """

    raises: jax.typing.ArrayLike
    precision: Any


def change_basis(
    moments: Sequence[Moments],
    old: PerAxis,
    new: PerAxis,
    is_new: PerAxis,
    layout: Layout,
    change: BasisChange,
) -> tuple[list[Moments], list[jax.Array | None]]:
    """Turns first moments from the eigenbases `old` to the eigenbases `new`.

    Second moments stay in their coordinates, and may be raised there (`BasisChange`).
    Blocks for which `is_new`, `[grid…]`, is false keep their coordinates exactly.

    Returns:
      The new moments, and `is_new` with false where a block would not stay finite. Such
      a block keeps its moments and its coordinates along all axes.
    """
    turns = [
        (_alone(q, i, layout), _alone(other, i, layout), take)
        for i, (q, other, take) in enumerate(zip(old, new, is_new, strict=True))
        if q is not None and other is not None and take is not None
    ]
    if not turns or not jax.tree.leaves(moments):
        return list(moments), list(is_new)

    def turn(array: jax.Array) -> jax.Array:
        for q, other, take in turns:
            turned = project_back(array, q, layout, change.precision)
            turned = project(turned, other, layout, change.precision)
            array = _where_blocks(take, turned, array, layout)
        return array

    def one(group: Moments) -> Moments:
        first, raised = [turn(array) for array in group.first], group.second
        for pair in zip(group.first, first, strict=True):
            raised = [_raised(square, *pair, layout) for square in raised]
        second = zip(raised, group.second, strict=True)
        return Moments(first, [jnp.where(change.raises, *pair) for pair in second])

    turned = [one(group) for group in moments]
    pairs = list(zip(jax.tree.leaves(moments), jax.tree.leaves(turned), strict=True))
    are_fine = [_is_finite(b, layout) | ~_is_finite(a, layout) for a, b in pairs]
    is_fine = functools.reduce(jnp.logical_and, are_fine)
    kept = [_where_blocks(is_fine, after, before, layout) for before, after in pairs]
    taken = [None if take is None else take & is_fine for take in is_new]
    return jax.tree.unflatten(jax.tree.structure(turned), kept), taken


def _raised(
    square: jax.Array, before: jax.Array, after: jax.Array, layout: Layout
) -> jax.Array:
    """Raises second moments that are too small for turned first moments.

    Without a turn, the ratio of a mean to the root of the mean of the squares hardly
    exceeds that of a steady gradient, which is 1. A turn can bring a mean into a
    coordinate whose second moment has seen as good as nothing, because rows rarely have
    a gradient, and the ratio has no bound. Where it exceeds `_LARGEST_RATIO` and each
    ratio that the block had before, the second moment becomes so large that the ratio
    is the largest of these.

    Args:
      square: second moments.
      before: first moments before the turn.
      after: first moments after it.
      layout: layout of the parameter.
    """
    values, old, new = map(
        layout.to_blocks, map(at_least_float32, (square, before, after))
    )
    root = safe_root(values)
    ratios = jnp.where(root > 0, jnp.abs(old) / jnp.where(root > 0, root, 1), 0)
    largest = jnp.max(ratios, layout.within, keepdims=True)
    is_known = largest > 0
    needed = jnp.square(new / jnp.where(is_known, largest, 1))
    limit = jnp.maximum(_LARGEST_RATIO, largest)
    is_small = is_known & (jnp.abs(new) > limit * root)
    raised = layout.from_blocks(jnp.where(is_small, needed, values), square)
    return raised.astype(square.dtype)


def follow(
    eigenvalues: PerAxis, energies: PerAxis, weights: Sequence[Any]
) -> list[jax.Array | None]:
    """Moves the eigenvalue estimates towards the gradient's energies.

    While the eigenbases stay, the estimates are then the Rayleigh quotients of the
    factors. Like the factors, the estimates of a block stay as they are if the energy
    of the gradient is not finite there.

    Args:
      eigenvalues: estimates of the eigenvalues.
      energies: energies of the gradient along the eigenvectors.
      weights: for each axis the weight of the gradient, `[]` or `[grid…, 1]`.
    """

    def one(
        eigenvalue: jax.Array | None, energy: jax.Array | None, weight: Any
    ) -> jax.Array | None:
        if eigenvalue is None or energy is None:
            return None
        mean = _mean(eigenvalue.astype(energy.dtype), energy, weight)
        sound = jnp.isfinite(jnp.sum(energy, axis=-1, keepdims=True))
        return jnp.where(sound, mean.astype(eigenvalue.dtype), eigenvalue)

    of_axes = zip(eigenvalues, energies, weights, strict=True)
    return [one(*of_axis) for of_axis in of_axes]


def damp(
    array: jax.Array, eigenvalues: PerAxis, layout: Layout, round_off: RoundOff
) -> jax.Array:
    """Multiplies each index of an axis by r^2 / (r^2 + c^2).

    Here r = e / e_max, and c is the share of `round_off`. Where the gradient has
    nothing but the round-off of its projection, an elementwise transformation like Adam
    would scale it up to full-size steps.
    """
    if round_off.is_zero():
        return array

    def share(eigenvalue: jax.Array | None) -> jax.Array | None:
        if eigenvalue is None:
            return None
        largest = jnp.max(eigenvalue, axis=-1, keepdims=True)
        ratio = jnp.maximum(eigenvalue, 0) / jnp.where(largest > 0, largest, 1)
        null = round_off.share(ratio)
        # Both are divided by the larger one, so that no derivative overflows.
        unit = jax.lax.stop_gradient(jnp.maximum(ratio, null))
        # Nothing is damped if no eigenvalue is known, or if the share is 0.
        is_known = (largest > 0) & (unit > 0)
        unit = jnp.where(is_known, unit, 1)
        square = jnp.square(ratio / unit)
        total = jnp.where(is_known, square + jnp.square(null / unit), 1)
        return jnp.where(is_known, square / total, 1)

    return _scale(array, list(map(share, eigenvalues)), layout)


def root(
    array: jax.Array,
    eigenvalues: PerAxis,
    layout: Layout,
    power: Any,
    eps: jax.typing.ArrayLike,
) -> jax.Array:
    """Multiplies each index of an axis by (e + eps)^-power, or by 0 if e + eps is 0."""

    def one(eigenvalue: jax.Array | None) -> jax.Array | None:
        if eigenvalue is None:
            return None
        shifted = eigenvalue + eps
        return safe_power(shifted, -power)

    return _scale(array, list(map(one, eigenvalues)), layout)


def mean_squares(array: jax.Array, layout: Layout) -> list[jax.Array]:
    """The mean square of each block at each index of each axis, `[grid…, b]`."""
    blocks = layout.to_blocks(array)
    within = [blocks.shape[axis] for axis in layout.axes]
    return [
        # The entries are scaled before they are summed, so that a mean of finite
        # squares is finite.
        _energy(blocks * (size / math.prod(within)) ** 0.5, layout, axis)
        for axis, size in zip(layout.axes, within, strict=True)
    ]


def rank_one(means: Sequence[jax.Array], like: jax.Array, layout: Layout) -> jax.Array:
    """The roots of the second moments whose means along each axis are `means`.

    The second moments are taken to have rank one, as in Adafactor. They are then the
    product of the means along the k axes, over the (k-1)th power of the mean of all.
    """
    roots = []
    for i, mean in enumerate(means):
        total = jnp.mean(mean, axis=-1, keepdims=True)
        ratio = mean if i == 0 else mean / jnp.where(total > 0, total, 1)
        roots.append(safe_root(ratio))
    return _scale(jnp.ones_like(like), roots, layout)


def _scale(array: jax.Array, scales: PerAxis, layout: Layout) -> jax.Array:
    """Multiplies each index of each axis of each block by its scale, `[grid…, b]`."""
    if all(scale is None for scale in scales):
        return array
    blocks = layout.to_blocks(array)
    for scale, axis in zip(scales, layout.axes, strict=True):
        if scale is not None:
            blocks = blocks * _along(scale, axis, blocks, layout)
    return layout.from_blocks(blocks, array)


def _along(
    values: jax.Array, axis: int, blocks: jax.Array, layout: Layout
) -> jax.Array:
    """Gives values `[grid…, b]` the rank of blocks, so that they vary along an axis."""
    kept = sorted((*layout.grid, axis))
    values = jnp.moveaxis(values, -1, kept.index(axis)).astype(blocks.dtype)
    return jnp.expand_dims(values, [d for d in range(blocks.ndim) if d not in kept])


def clip_rms(
    array: jax.Array, layout: Layout, limit: jax.typing.ArrayLike
) -> jax.Array:
    """Scales the blocks whose root mean square exceeds `limit` down to it."""
    blocks = layout.to_blocks(at_least_float32(array))
    limit = jnp.asarray(limit, blocks.dtype)
    # An entry as large as the limit is scaled to `unit`, whose square is far from
    # underflow and still farther from overflow.
    unit = 2.0**13 * float(jnp.finfo(blocks.dtype).tiny) ** 0.5
    squares = jnp.square(blocks * (unit / limit))
    excess = safe_root(jnp.mean(squares, layout.within, keepdims=True)) / unit
    clipped = layout.from_blocks(blocks / jnp.maximum(excess, 1), array)
    return clipped.astype(array.dtype)


def set_rms(
    array: jax.Array, layout: Layout, wanted: jax.typing.ArrayLike
) -> jax.Array:
    """Scales each block to a root mean square. A block of zeros stays as it is."""
    blocks, _, norm = _over_largest(array, layout)
    size = math.prod(blocks.shape[axis] for axis in layout.within)
    wanted = jnp.asarray(wanted, blocks.dtype) * size**0.5
    scaled = blocks * (wanted / jnp.where(norm > 0, norm, 1))
    return layout.from_blocks(scaled, array).astype(array.dtype)


def graft(array: jax.Array, like: jax.Array, layout: Layout) -> jax.Array:
    """Scales each block to the norm of the corresponding block of `like`.

    A block of zeros stays as it is.
    """
    blocks, _, norm = _over_largest(array, layout)
    _, largest, wanted = _over_largest(like, layout)
    scaled = blocks * (wanted / jnp.where(norm > 0, norm, 1)) * largest
    return layout.from_blocks(scaled, array)


def _over_largest(
    array: jax.Array, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks over their largest entries, the latter, and the norms that are left.

    So no norm underflows or overflows.
    """
    blocks = layout.to_blocks(at_least_float32(array))
    largest = jnp.max(jnp.abs(blocks), layout.within, keepdims=True)
    # The product of what is left does not depend on this number, nor do derivatives.
    largest = jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))
    blocks = blocks / largest
    norm = safe_root(_energy(blocks, layout))
    return blocks, largest, jnp.expand_dims(norm, layout.within)


def safe_root(array: jax.Array) -> jax.Array:
    """The root of an array, with the derivative 0 where the array is 0."""
    is_zero = array == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, array)))


def safe_power(array: jax.Array, power: Any) -> jax.Array:
    """A power of an array, or 0, with the derivative 0, where it is not positive."""
    is_positive = array > 0
    return jnp.where(is_positive, jnp.where(is_positive, array, 1) ** power, 0)


def _is_finite(array: jax.Array, layout: Layout) -> jax.Array:
    """Says of each block whether the sum of its entries is finite, `[grid…]`."""
    blocks = layout.to_blocks(array)
    return jnp.isfinite(jnp.sum(blocks, layout.within))


def _alone(matrix: jax.Array | None, index: int, layout: Layout) -> PerAxis:
    """A list with a matrix for the axis `index` and the identity for the others."""
    return [matrix if i == index else None for i in range(len(layout.axes))]


def _but(per_axis: PerAxis, index: int) -> PerAxis:
    """A copy of `per_axis` with the identity for the axis `index`."""
    return [None if i == index else entry for i, entry in enumerate(per_axis)]


def _where_blocks(
    mask: jax.Array, array: jax.Array, other: jax.Array, layout: Layout
) -> jax.Array:
    """Takes the blocks of `array` where `mask`, `[grid…]`, is true, else of `other`."""
    blocks = layout.to_blocks(array)
    chosen = jnp.where(
        jnp.expand_dims(mask, layout.within), blocks, layout.to_blocks(other)
    )
    return layout.from_blocks(chosen, array)


def _mean(old: jax.Array, new: jax.Array, weight: jax.typing.ArrayLike) -> jax.Array:
    weight = jnp.asarray(weight, new.dtype)
    return (1 - weight) * old + weight * new


def _blocks(array: jax.Array, like: jax.Array, layout: Layout) -> jax.Array:
    """The blocks of `array`, in the widest dtype of float32, `array` and `like`."""
    dtype = widest(jnp.float32, array.dtype, like.dtype)
    return layout.to_blocks(array.astype(dtype))


def _energy(blocks: jax.Array, layout: Layout, axis: int | None = None) -> jax.Array:
    """The energy of each block, `[grid…]`, or at each index of `axis`, `[grid…, b]`.

    It is written as a product of matrices, which XLA on CPU computes in one pass and
    without an array of squares.
    """
    every = list(range(blocks.ndim))
    kept = [*layout.grid] if axis is None else [*layout.grid, axis]
    return jnp.einsum(
        blocks,
        every,
        blocks,
        every,
        kept,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=_mesh.explicit_sharding(
            blocks, [*layout.grid] if axis is None else [*layout.grid, None]
        ),
    )


def _gram(
    blocks: jax.Array, axis: int, like: jax.Array, grid: Sequence[int], precision: Any
) -> jax.Array:
    """G_(axis) G_(axis)^T for each block, `[grid…, b, b]`, sharded like `like`."""
    rows = list(range(blocks.ndim))
    columns = [blocks.ndim if d == axis else d for d in rows]
    return jnp.einsum(
        blocks,
        rows,
        blocks,
        columns,
        [*grid, axis, blocks.ndim],
        precision=precision,
        out_sharding=_mesh.explicit_sharding(like, range(like.ndim)),
    )


def _multiply(
    array: jax.Array, bases: PerAxis, layout: Layout, precision: Any, *, back: bool
) -> jax.Array:
    """Multiplies each axis of each block by Q^T or, if `back`, by Q."""
    turned = array
    for basis, axis in zip(bases, layout.axes, strict=True):
        if basis is not None:
            blocks = _blocks(turned, basis, layout)
            old = list(range(blocks.ndim))
            new = [blocks.ndim if d == axis else d for d in old]
            entry = [blocks.ndim, axis] if back else [axis, blocks.ndim]
            matrix = _mesh.with_whole_rows(basis).astype(blocks.dtype)
            blocks = jnp.einsum(
                blocks,
                old,
                matrix,
                [*layout.grid, *entry],
                new,
                precision=precision,
                out_sharding=_mesh.explicit_sharding(blocks, old),
            )
            turned = layout.from_blocks(blocks, turned)
    return turned.astype(array.dtype)
