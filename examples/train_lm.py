"""Trains a decoder-only language model with SOAP, Shampoo, AdamW, Muon or Lion.

    python examples/train_lm.py --preset tiny --optimizer soap
    python examples/train_lm.py --data corpus.bin --preset 360m --bf16 --accumulate 8
    python examples/train_lm.py --checkpoint-dir ckpt --resume
    python examples/train_lm.py --preset 660m --scan --mesh 1 8 1 --block-size 256

This one file is there to be read from top to bottom and to be copied: it has devices,
the model, data, optimizers, a jitted step and the loop. The architecture is that of the
SOAP paper's experiments, written in Flax: pre-norm, RoPE, QK-norm, a GELU MLP of four
times the width, no biases and a z-loss. Some presets have the sizes of Llama 3 and of
Qwen3's mixture of experts in this architecture.

On several devices (`--mesh`) the batch is split over the axes slice, data and fsdp,
matrices are split over fsdp and tensor, experts over fsdp, and the state of the
optimizer is split as they are. A checkpoint continues on any mesh. With several
processes (`--distributed`), each of them runs the command.
"""

import csv
import dataclasses
import functools
import inspect
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import soap_optax


@dataclasses.dataclass(frozen=True)
class Preset:
    """The sizes of a model and its batches; 210m, 360m and 660m are the paper's.

    Those of `llama-…` are published in arXiv 2407.21783, and those of `qwen3-235b` in
    arXiv 2505.09388, with the contexts of their pre-training. Batches, steps and warmup
    of these are round numbers.
    """

    depth: int
    width: int
    head_dim: int
    context: int
    batch: int
    steps: int
    warmup: int
    heads: int | None = None
    """How many heads queries have; with None they are as wide as the model together."""
    kv_heads: int | None = None
    """How many heads keys and values have; with None they have those of queries."""
    mlp: int | None = None
    """The width of the MLP, or of each expert; with None it is four times that of the
    model."""
    gated: bool = False
    """Whether the MLP is a SwiGLU, as experts always are."""
    experts: int = 0
    """How many experts are in the place of each MLP; with 0 there are none."""
    active_experts: int = 0
    """How many experts each token is sent to."""
    vocab: int | None = None


_of_soap = functools.partial(
    Preset, head_dim=64, context=1024, batch=2048, steps=3200, warmup=600
)
_of_llama = functools.partial(
    Preset,
    head_dim=128,
    context=8192,
    batch=512,
    steps=100_000,
    warmup=2000,
    kv_heads=8,
    gated=True,
    vocab=128_256,
)
_tiny = Preset(2, 128, 32, context=128, batch=32, steps=600, warmup=50)
PRESETS = {
    "tiny": _tiny,
    "210m": _of_soap(12, 1024),
    "360m": _of_soap(24, 1024),
    "660m": _of_soap(24, 1408),
    "llama-8b": _of_llama(32, 4096, mlp=14336),
    "llama-70b": _of_llama(80, 8192, mlp=28672),
    "tiny-experts": dataclasses.replace(
        _tiny, mlp=256, gated=True, experts=8, active_experts=2
    ),
    "qwen3-235b": Preset(
        94,
        4096,
        128,
        context=4096,
        batch=1024,
        steps=100_000,
        warmup=2000,
        heads=64,
        kv_heads=4,
        mlp=1536,
        gated=True,
        experts=128,
        active_experts=8,
        vocab=151_936,
    ),
}

# What each optimizer is given where the command says nothing. Those of soap, muon and
# adamw are the best of a sweep on the tiny preset with 300 steps, or within 0.001 nats
# of it (docs/results.md). SOAP had refreshes at each step there. At each fifth step
# they cost less time, and losses after 600 steps were within 0.01 nats of those. The
# others are starting points. Larger models want smaller rates.
TUNED: dict[str, dict[str, Any]] = {
    "soap": {
        "learning_rate": 3e-2,
        "b2": 0.95,
        "precondition_frequency": 5,
        "factors": "kl",
        "basis": "current",
    },
    "shampoo": {"learning_rate": 3e-2, "b2": 0.95, "refresh": "eigh"},
    "muon": {"learning_rate": 3e-2, "adam_learning_rate": 1e-1, "b2": 0.95},
    "adamw": {"learning_rate": 1e-2, "b2": 0.98},
    "lion": {"learning_rate": 1e-3, "b2": 0.99},
}
# What an optimizer is given where `TUNED` says nothing, either.
UNTUNED: dict[str, Any] = {
    "precondition_frequency": 10,
    "refresh": "qr",
    "factors": "shampoo",
    "basis": "previous",
}
# The choices of the SOAP paper.
PUBLISHED = UNTUNED | {"nesterov": False, "adam": ()}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and how."""

    preset: Literal[
        "tiny",
        "210m",
        "360m",
        "660m",
        "llama-8b",
        "llama-70b",
        "tiny-experts",
        "qwen3-235b",
    ] = "tiny"
    optimizer: str = "soap"
    """A name in `OPTIMIZERS`: `soap`, `shampoo`, `muon`, `adamw` or `lion`. Muon needs
    an optax newer than 0.2.6."""
    data: str = "stdlib"
    """A file, a folder, a `.bin` of uint16 tokens, or `stdlib`, which stands for the
    source files of Python's standard library. All but a `.bin` are read as bytes."""
    vocab: int | None = None
    """The size of the vocabulary. With None it is the preset's, or else 256 for bytes
    and 32128, which is T5's, for a `.bin`."""
    learning_rate: float | None = None
    """The peak of the schedule. With None this and b2, the frequency, the factors and
    the basis are those of the optimizer in `TUNED`."""
    b1: float = 0.95
    b2: float | None = None
    weight_decay: float = 1e-4
    clip: float = 1.0
    """The global norm at which gradients are clipped."""
    precondition_frequency: int | None = None
    refresh: Literal["qr", "cholesky_qr", "eigh"] | None = None
    """How eigenbases are refreshed; with None SOAP takes `qr` and Shampoo `eigh`."""
    initial_basis: Literal["eigh", "identity"] = "eigh"
    block_size: int | None = None
    one_sided: bool = False
    factorized: bool = False
    """Whether the second moments of SOAP have rank one."""
    factors: Literal["shampoo", "kl"] | None = None
    """Shampoo with factors `kl` is KL-Shampoo: its power is 1/2, without grafting."""
    basis: Literal["previous", "current"] | None = None
    """The basis SOAP works in; `soap_optax.soap` explains these options."""
    adam: tuple[str, ...] = ("embed",)
    """Patterns of the matrices that are left to Adam, as vectors are; `embed` matches
    the embedding and the head. AdamW and Lion have no use for this."""
    adam_learning_rate: float | None = None
    """The peak for parameters that are left to Adam. With None it is that of all; only
    where both rates are None are they both those of the optimizer in `TUNED`."""
    nesterov: bool = True
    """Whether momentum looks one step ahead, in all optimizers but Lion."""
    update_rms: float | None = None
    """The size of SOAP's and Shampoo's updates; `soap_optax.soap` explains it."""
    stagger: bool = False
    refresh_tolerance: float | None = None
    """The share of a factor off the diagonal up to which its eigenbasis stays."""
    precond_dtype: Literal["bfloat16"] | None = None
    """The dtype of eigenbases; None is float32, which factors always have."""
    pack_factors: bool = False
    """Whether to store one triangle of each factor."""
    precision: str = "high"
    """The precision of the products of SOAP and Shampoo in a step."""
    refresh_precision: str = "highest"
    """The precision of the products of factors and eigenbases in their refreshes."""
    rcond: float | None = None
    """The share below which directions are damped as round-off; 0 damps none, and None
    is SOAP's default."""
    steps: int | None = None
    warmup: int | None = None
    batch: int | None = None
    """How many sequences a step has. With None this and its neighbours are those of the
    preset."""
    context: int | None = None
    accumulate: int = 1
    """How many micro-batches a step has."""
    bf16: bool = False
    """Compute in bfloat16; parameters and optimizer stay in float32."""
    scan: bool = False
    """Keep all layers in one stack, `[depth, …]`, so that one layer is compiled."""
    remat: bool = False
    """Compute a layer once more for its gradients, in place of keeping all of it."""
    mesh: tuple[int, int, int] | None = None
    """How many devices are along the axes data, fsdp and tensor of a slice; with None
    there is one device."""
    slices: int = 1
    """How many slices the devices are in, each with a mesh of its own. Devices of one
    slice have a fast network. If all refreshes are local, only gradients are summed
    between slices; `docs/pods.md` explains it."""
    refresh_axes: tuple[str, ...] | None = None
    """The axes of the mesh along which copies of a factor share its refreshes;
    `soap_optax.soap` explains it."""
    distributed: bool = False
    """Be one of several processes, which JAX finds on a cluster."""
    coordinator: str | None = None
    """The `host:port` of the first process, where JAX does not find it."""
    processes: int | None = None
    process_id: int | None = None
    z_loss: float = 1e-4
    seed: int = 0
    eval_every: int = 25
    eval_batches: int = 8
    metrics: Path | None = None
    """The CSV file into which metrics are written."""
    diagnose: bool = True
    """Log how good the eigenbases of SOAP and Shampoo are, at every evaluation."""
    checkpoint_dir: Path | None = None
    checkpoint_every: int = 200
    resume: bool = False
    """Continue from the newest checkpoint."""

    def filled(self) -> "Config":
        """Fills in values of the preset and tuned ones where there is None."""
        self.check_optimizer()
        preset = PRESETS[self.preset]
        defaults = UNTUNED | TUNED.get(self.optimizer, {})
        if self.learning_rate is not None:  # The tuned rates belong together.
            defaults.pop("adam_learning_rate", None)
        defaults |= {
            "vocab": preset.vocab or (32128 if self.data.endswith(".bin") else 256),
            "steps": preset.steps,
            "warmup": preset.warmup,
            "batch": preset.batch,
            "context": preset.context,
        }
        missing = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        filled = dataclasses.replace(self, **missing)
        filled.check()
        return filled

    def check(self) -> None:
        """Refuses sizes that are not positive or do not fit."""
        positive = ("vocab", "steps", "batch", "context", "accumulate", "eval_every")
        for name in (*positive, "eval_batches", "checkpoint_every"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} must be at least 1, got {getattr(self, name)}"
                )
        if self.batch % self.accumulate:
            raise ValueError(
                f"--accumulate must divide the batch of {self.batch}, got "
                f"{self.accumulate}"
            )
        self.check_rates()
        self.check_devices()

    def check_optimizer(self) -> None:
        """Refuses an optimizer that is not there."""
        if self.optimizer not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise ValueError(f"--optimizer must be of {known}, got {self.optimizer}")
        options = inspect.signature(optax.contrib.muon).parameters
        if self.optimizer == "muon" and "consistent_rms" not in options:
            raise ValueError(
                "--optimizer muon needs an optax newer than 0.2.6, got "
                f"{optax.__version__}"
            )

    def check_rates(self) -> None:
        """Refuses rates that are missing, and a rate of Adam where all is Adam's."""
        for name in ("learning_rate", "b2"):
            if getattr(self, name) is None:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} must be given for {self.optimizer}, got none"
                )
        if self.optimizer in ("adamw", "lion") and self.adam_learning_rate is not None:
            raise ValueError(
                "--adam-learning-rate must be left out with adamw and lion, which have "
                f"one rate, got {self.adam_learning_rate}"
            )

    @property
    def adam_peak(self) -> float | None:
        """The peak for parameters that are left to Adam."""
        rate = self.adam_learning_rate
        return self.learning_rate if rate is None else rate

    @property
    def shards(self) -> int:
        """The number of parts into which devices split a batch."""
        return 1 if self.mesh is None else self.slices * math.prod(self.mesh[:2])

    def check_devices(self) -> None:
        """Refuses a mesh that does not fit the batch, and processes without a mesh."""
        if self.mesh is not None and min(self.mesh) < 1:
            raise ValueError(f"--mesh must be of sizes above 0, got {self.mesh}")
        if self.slices < 1 or (self.slices > 1 and self.mesh is None):
            raise ValueError(
                f"--slices must be at least 1, and 1 without --mesh, got {self.slices}"
            )
        micro_batch = self.batch // self.accumulate
        if micro_batch % self.shards:
            raise ValueError(
                f"--mesh must have slices * data * fsdp that divides the micro-batch "
                f"of {micro_batch}, got {self.slices} * {self.mesh[0]} * {self.mesh[1]}"
            )
        if unknown := set(self.refresh_axes or ()) - set(AXES):
            raise ValueError(
                f"--refresh-axes must be of {', '.join(AXES)}, got "
                f"{', '.join(sorted(unknown))}"
            )
        if self.distributed and self.mesh is None:
            raise ValueError("--distributed needs --mesh, got none")
        for name in ("coordinator", "processes", "process_id"):
            if not self.distributed and getattr(self, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} needs --distributed, got {getattr(self, name)} alone"
                )


# --- devices -------------------------------------------------------------------------

AXES = ("slice", "data", "fsdp", "tensor")
COPY_AXES = ("slice", "data")
BATCH_AXES = (*COPY_AXES, "fsdp")
# The axes of the mesh that split the last axes of a parameter, by a name on the path to
# it. Every device has all other parameters.
SPLITS: dict[str, tuple[str | None, ...]] = {
    "embed": ("tensor", "fsdp"),
    "query": ("fsdp", "tensor"),
    "key": ("fsdp", "tensor"),
    "value": ("fsdp", "tensor"),
    "attention_out": ("tensor", "fsdp"),
    "mlp_in": ("fsdp", "tensor"),
    "mlp_gate": ("fsdp", "tensor"),
    "mlp_out": ("tensor", "fsdp"),
    "router": ("fsdp", None),
    "experts_in": ("fsdp", None, "tensor"),
    "experts_gate": ("fsdp", None, "tensor"),
    "experts_out": ("fsdp", "tensor", None),
    "unembed": ("fsdp", "tensor"),
}


def make_mesh(config: Config, devices: Any = None) -> Mesh | None:
    """The mesh of the devices of all processes; None if no mesh is asked for."""
    if config.mesh is None:
        return None
    devices = jax.devices() if devices is None else devices
    if config.slices * math.prod(config.mesh) != len(devices):
        slices = "" if config.slices == 1 else f" in {config.slices} slices"
        raise ValueError(
            f"--mesh must be of all {len(devices)} devices, got {config.mesh}{slices}"
        )
    by_slice = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
    meshes = [
        jax.make_mesh(config.mesh, AXES[1:], devices=list(slice_devices)).devices
        for slice_devices in np.reshape(by_slice, (config.slices, -1))
    ]
    kinds = (AxisType.Auto,) * len(AXES)
    return Mesh(np.stack(meshes), AXES, axis_types=kinds)


def names(path: tuple[Any, ...]) -> list[str]:
    return [key.key for key in path]


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """The shardings of parameters, or of their shapes.

    `SPLITS` says how the last axes are split. An axis that cannot be split into
    equal parts stays whole.
    """

    def one(path, param):
        axes = next((SPLITS[name] for name in names(path) if name in SPLITS), ())
        axes = (None,) * (param.ndim - len(axes)) + axes
        spec = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for size, axis in zip(param.shape, axes, strict=True)
        ]
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(one, params)


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """The shardings of a state, or of its shapes; the optimizer's follow parameters."""
    params = param_shardings(mesh, state.params)
    return state.replace(
        step=NamedSharding(mesh, P()),
        params=params,
        opt_state=soap_optax.state_sharding(state.tx, state.params, params),
    )


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """The sharding of tokens `[…, batch, time]`."""
    return NamedSharding(mesh, P(*(None,) * (ndim - 2), BATCH_AXES))


def on_mesh(tokens: np.ndarray, mesh: Mesh | None) -> np.ndarray | jax.Array:
    """Puts tokens `[…, batch, time]` on the mesh; every process puts its own rows."""
    if mesh is None:
        return tokens
    sharding = batch_sharding(mesh, tokens.ndim)
    return jax.make_array_from_callback(tokens.shape, sharding, tokens.__getitem__)


def split(x: jax.Array, mesh: Mesh | None, *axes: Any) -> jax.Array:
    """Splits an array within a program over these axes of the mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))


# --- model ---------------------------------------------------------------------------


def rotary(x: jax.Array) -> jax.Array:
    """Applies the rotary position embedding to `[batch, time, heads, head_dim]`."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None] * frequencies[None, :]
    cos, sin = (f(angles)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1)


def route(scores: jax.Array, active: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Sends each token to the experts that it has the highest scores for.

    An expert takes the tokens of a sequence in their order until it has enough, so that
    no token depends on later ones.

    Args:
      scores: of the experts for the tokens, `[batch, time, experts]`.
      active: how many experts a token is sent to.
      capacity: how many tokens of a sequence an expert takes.

    Returns:
      Ones where a token has a place with an expert, `[batch, time, experts, capacity]`,
      and the weights of the experts for the tokens, `[batch, time, experts]`, which
      have the sum 1 for each token.
    """
    _, best = jax.lax.top_k(scores, active)
    chosen = jax.nn.one_hot(best, scores.shape[-1]).sum(axis=-2)
    weights = scores * chosen
    places = jnp.cumsum(chosen, axis=1).astype(jnp.int32) - 1
    # A place from the capacity on is all zeros.
    taken = jax.nn.one_hot(places, capacity) * chosen[..., None]
    return taken, weights / weights.sum(axis=-1, keepdims=True)


class Experts(nn.Module):
    """A mixture of experts: SwiGLU MLPs, some of which each token is sent to.

    Tokens go to experts and come back by products with arrays of zeros and ones, as in
    GShard, arXiv 2006.16668, where each sequence is a group. An expert takes at most
    `CAPACITY` times as many tokens of a sequence as it has with equal loads. Tokens
    beyond that pass it by on the residual connection. There is no loss that makes loads
    equal.
    """

    preset: Preset
    dtype: Any
    mesh: Mesh | None = None

    CAPACITY = 1.25

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        (_, time, width), sizes = x.shape, self.preset
        mlp = sizes.mlp or 4 * width
        equal = sizes.active_experts * time / sizes.experts
        logits = nn.Dense(sizes.experts, use_bias=False, name="router")(
            x.astype(jnp.float32)
        )
        taken, weights = route(
            jax.nn.softmax(logits),
            sizes.active_experts,
            math.ceil(self.CAPACITY * equal),
        )
        combine = (taken * weights[..., None]).astype(self.dtype)
        init = nn.initializers.lecun_normal(batch_axis=0)
        matrix = lambda name, *shape: self.param(  # noqa: E731
            name, init, (sizes.experts, *shape)
        ).astype(self.dtype)
        tokens = jnp.einsum("btec,btd->becd", taken.astype(self.dtype), x)
        # Devices exchange tokens, and not the sequences that they are made of.
        tokens = split(tokens, self.mesh, BATCH_AXES)
        tokens = split(tokens, self.mesh, COPY_AXES, "fsdp")
        hidden = jnp.einsum("becd,edm->becm", tokens, matrix("experts_in", width, mlp))
        gate = jnp.einsum("becd,edm->becm", tokens, matrix("experts_gate", width, mlp))
        hidden = nn.silu(gate) * hidden
        out = jnp.einsum("becm,emd->becd", hidden, matrix("experts_out", mlp, width))
        out = split(out, self.mesh, COPY_AXES, "fsdp")
        out = split(out, self.mesh, BATCH_AXES)
        return jnp.einsum("btec,becd->btd", combine, out)


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and around a residual connection."""

    preset: Preset
    dtype: Any
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm("attention_norm")(x)
        x = x + self.attention(y)
        y = self.norm("mlp_norm")(x)
        if self.preset.experts:
            x = x + Experts(self.preset, self.dtype, self.mesh, name="experts")(y)
        else:
            x = x + self.mlp(y)
        return split(x, self.mesh, BATCH_AXES)

    def attention(self, x: jax.Array) -> jax.Array:
        width, head_dim = x.shape[-1], self.preset.head_dim
        heads = self.preset.heads or width // head_dim
        kv_heads = self.preset.kv_heads or heads
        split_heads = lambda y: y.reshape(*y.shape[:2], -1, head_dim)  # noqa: E731
        query, key, value = (
            split_heads(self.linear(count * head_dim, name)(x))
            for name, count in (
                ("query", heads),
                ("key", kv_heads),
                ("value", kv_heads),
            )
        )
        query, key = self.norm("query_norm")(query), self.norm("key_norm")(key)
        y = jax.nn.dot_product_attention(
            rotary(query), rotary(key), value, is_causal=True
        )
        return self.linear(width, "attention_out")(y.reshape(*y.shape[:2], -1))

    def mlp(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        mlp = self.preset.mlp or 4 * width
        hidden = self.linear(mlp, "mlp_in")(x)
        if self.preset.gated:
            hidden = nn.silu(self.linear(mlp, "mlp_gate")(x)) * hidden
        else:
            hidden = nn.gelu(hidden)
        return self.linear(width, "mlp_out")(hidden)

    def linear(self, size: int, name: str) -> nn.Dense:
        return nn.Dense(size, use_bias=False, dtype=self.dtype, name=name)

    def norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(use_bias=False, dtype=self.dtype, name=name)


class Transformer(nn.Module):
    """A decoder-only transformer from tokens `[batch, time]` to logits in float32."""

    vocab: int
    preset: Preset
    dtype: Any = jnp.float32
    scan: bool = False
    remat: bool = False
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = nn.Embed(self.vocab, self.preset.width, name="embed").embedding
        table = split(table.astype(self.dtype), self.mesh, P.UNCONSTRAINED, None)
        x = split(jnp.take(table, tokens, axis=0), self.mesh, BATCH_AXES)
        kind = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        block = functools.partial(kind, self.preset, self.dtype, self.mesh)
        if self.scan:
            stack = nn.scan(
                lambda layer, x: (layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.preset.depth,
            )
            x, _ = stack(block(name="blocks"), x)
        else:
            for i in range(self.preset.depth):
                x = block(name=f"block_{i}")(x)
        x = nn.LayerNorm(use_bias=False, dtype=self.dtype, name="final_norm")(x)
        logits = nn.Dense(self.vocab, use_bias=False, dtype=self.dtype, name="unembed")(
            x
        )
        return logits.astype(jnp.float32)


def make_model(config: Config, mesh: Mesh | None = None) -> Transformer:
    return Transformer(
        config.vocab,
        PRESETS[config.preset],
        dtype=jnp.bfloat16 if config.bf16 else jnp.float32,
        scan=config.scan,
        remat=config.remat,
        mesh=mesh,
    )


# --- data ----------------------------------------------------------------------------


def read_tokens(data: str) -> np.ndarray:
    """Reads the corpus as a flat array: of bytes, or of uint16 tokens from a `.bin`."""
    path = Path(sysconfig.get_paths()["stdlib"] if data == "stdlib" else data)
    if not path.exists():
        raise FileNotFoundError(
            f"--data must be a file, a folder or stdlib, got {data}"
        )
    if path.suffix == ".bin":
        if path.stat().st_size % 2 or not path.stat().st_size:
            raise ValueError(
                f"--data must be a .bin of uint16 tokens, got {data} of "
                f"{path.stat().st_size} bytes"
            )
        return np.memmap(path, np.uint16, mode="r")
    if path.is_file():
        return np.fromfile(path, np.uint8)
    if data == "stdlib":
        skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
        files = [p for p in path.rglob("*.py") if not skip & set(p.parts)]
    else:
        files = [p for p in path.rglob("*") if p.is_file()]
    if not files:
        raise FileNotFoundError(
            f"--data must hold files to read, got the folder {data}"
        )
    return np.concatenate([np.fromfile(p, np.uint8) for p in sorted(files)])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation windows of a token array.

    The array is cut into 40 stretches, and the last 5% of each are for validation, so
    that both parts are alike. A batch depends on the seed and its step alone, so a
    resumed run sees the data it would have seen.
    """

    tokens: np.ndarray
    config: Config

    def __post_init__(self) -> None:
        needed = 40 * 20 * (self.config.context + 1)
        if len(self.tokens) < needed:
            raise ValueError(
                f"--data must hold at least {needed} tokens for --context "
                f"{self.config.context}, got {len(self.tokens)}"
            )

    def batch(self, step: int, size: int, *, validation: bool = False) -> np.ndarray:
        """The tokens of a batch, `[size, context + 1]`, int32."""
        rng = np.random.default_rng([self.config.seed, step, validation])
        stretch = len(self.tokens) // 40
        split = int(0.95 * stretch)
        low, high = (split, stretch) if validation else (0, split)
        offsets = rng.integers(low, high - self.config.context, size)
        starts = rng.integers(0, 40, size) * stretch + offsets
        windows = [self.tokens[s : s + self.config.context + 1] for s in starts]
        tokens = np.stack(windows).astype(np.int32)
        if tokens.max() >= self.config.vocab:
            raise ValueError(
                f"--vocab must exceed every token, got {self.config.vocab} and the "
                f"token {tokens.max()}"
            )
        return tokens

    def micro_batches(self, step: int) -> np.ndarray:
        """The tokens of a training step, `[micro-batches, batch, context + 1]`."""
        tokens = self.batch(step, self.config.batch)
        return tokens.reshape(self.config.accumulate, -1, tokens.shape[-1])


# --- optimizers ----------------------------------------------------------------------


def matrices(adam: Sequence[str]) -> Callable[[Any], Any]:
    """Gives factors to all matrices but routers and those that the patterns match.

    The scales of all layers in one stack are no matrix. Routers are left to Adam as the
    head is, because each of their columns gives the scores of one expert, and they end
    in a softmax. They are few of the parameters.
    """
    # What `exclude` names has to be there, and most models have no router.
    not_a_router = "^(?!.*router)"
    return soap_optax.matrices(exclude=("scale", *adam), include=not_a_router)


def is_numbers(node: Any) -> bool:
    return node is None or isinstance(node, soap_optax.DimensionNumbers)


def muon_dimension_numbers(adam: Sequence[str]) -> Callable[[Any], Any]:
    """Gives the same matrices to Muon, and all else to the Adam within it."""

    def one(numbers):
        return numbers and optax.contrib.MuonDimensionNumbers(*numbers.factor_axes)

    return lambda params: jax.tree.map(one, matrices(adam)(params), is_leaf=is_numbers)


def make_optimizer(
    config: Config, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.clip)
    return optax.chain(clip, make_unclipped(config, mesh))


def make_schedule(config: Config, peak: jax.typing.ArrayLike) -> optax.Schedule:
    """Warms up to a peak, and decays by a cosine to a tenth of it."""
    share = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, config.warmup, max(config.steps, config.warmup + 1), end_value=0.1
    )
    return lambda count: peak * share(count)


def adam_schedule(config: Config) -> optax.Schedule:
    """The schedule of parameters that are left to Adam."""
    return make_schedule(config, config.adam_peak)


def adamw_options(config: Config) -> dict[str, Any]:
    """The options that AdamW, SOAP and Shampoo share."""
    return {
        "b1": config.b1,
        "b2": config.b2,
        "weight_decay": config.weight_decay,
        "nesterov": config.nesterov,
    }


def eigenbasis_options(config: Config, mesh: Mesh | None) -> dict[str, Any]:
    """The options of whatever works in eigenbases."""
    return {
        "precondition_frequency": config.precondition_frequency,
        "refresh": config.refresh,
        "initial_basis": config.initial_basis,
        "block_size": config.block_size,
        "one_sided": config.one_sided,
        "factors": config.factors,
        "stagger": config.stagger,
        "refresh_tolerance": config.refresh_tolerance,
        "precond_dtype": config.precond_dtype,
        "pack_factors": config.pack_factors,
        "precision": config.precision,
        "refresh_precision": config.refresh_precision,
        "dimension_numbers": matrices(config.adam),
        "rcond": config.rcond,
        "refresh_axes": config.refresh_axes,
        "params_sharding": mesh and functools.partial(param_shardings, mesh),
    }


def make_unclipped(
    config: Config, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    return OPTIMIZERS[config.optimizer](config, mesh)


def make_soap(config: Config, mesh: Mesh | None) -> optax.GradientTransformation:
    return soap_optax.soap(
        make_schedule(config, config.learning_rate),
        adam_learning_rate=adam_schedule(config),
        update_rms=config.update_rms,
        basis=config.basis,
        factorized=config.factorized,
        **adamw_options(config),
        **eigenbasis_options(config, mesh),
    )


def make_shampoo(config: Config, mesh: Mesh | None) -> optax.GradientTransformation:
    is_kl = config.factors == "kl"
    return soap_optax.shampoo(
        make_schedule(config, config.learning_rate),
        adam_learning_rate=adam_schedule(config),
        update_rms=config.update_rms,
        power=0.5 if is_kl else 0.4,
        grafting=None if is_kl else "adam",
        **adamw_options(config),
        **eigenbasis_options(config, mesh),
    )


def make_muon(config: Config, mesh: Mesh | None) -> optax.GradientTransformation:
    del mesh
    return optax.contrib.muon(
        make_schedule(config, config.learning_rate),
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_weight_decay=config.weight_decay,
        adam_learning_rate=adam_schedule(config),
        muon_weight_dimension_numbers=muon_dimension_numbers(config.adam),
        consistent_rms=0.2,
    )


def make_adamw(config: Config, mesh: Mesh | None) -> optax.GradientTransformation:
    del mesh
    schedule = make_schedule(config, config.learning_rate)
    return optax.adamw(schedule, **adamw_options(config))


def make_lion(config: Config, mesh: Mesh | None) -> optax.GradientTransformation:
    del mesh
    schedule, decay = make_schedule(config, config.learning_rate), config.weight_decay
    return optax.lion(schedule, config.b1, config.b2, weight_decay=decay)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "soap": make_soap,
    "shampoo": make_shampoo,
    "muon": make_muon,
    "adamw": make_adamw,
    "lion": make_lion,
}
"""Functions of the configuration and the mesh, by the name of the optimizer."""


# --- training ------------------------------------------------------------------------


def cross_entropy(
    model: Transformer, params: Any, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The mean cross-entropy (nats per token) and the mean squared log-partition z."""
    logits = model.apply({"params": params}, tokens[:, :-1])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(log_z - target), jnp.mean(log_z**2)


def train_step(
    state: TrainState, tokens: jax.Array, *, model: Transformer, z_loss: float
) -> tuple[TrainState, jax.Array]:
    """Takes a step on tokens `[micro-batches, batch, context + 1]`."""

    def loss_fn(params, micro_batch):
        loss, log_z_squared = cross_entropy(model, params, micro_batch)
        return loss + z_loss * log_z_squared, loss

    def accumulate(total, micro_batch):
        (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, micro_batch
        )
        return jax.tree.map(jnp.add, total, (grads, loss)), None

    zero = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()))
    total, _ = jax.lax.scan(accumulate, zero, tokens)
    grads, loss = jax.tree.map(lambda x: x / len(tokens), total)
    return state.apply_gradients(grads=grads), loss


def first_state(
    model: Transformer, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = model.clone(mesh=None).init(key, tokens)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def make_state(config: Config, model: Transformer) -> TrainState:
    """Makes the first state where it belongs, so that no device has all of it."""
    init = functools.partial(first_state, model, make_optimizer(config, model.mesh))
    key = jax.random.key(config.seed)
    shardings = None
    if model.mesh is not None:
        shardings = state_shardings(model.mesh, jax.eval_shape(init, key))
    return jax.jit(init, out_shardings=shardings)(key)


def jit_step(
    config: Config, model: Transformer, state: TrainState
) -> jax.stages.Wrapped:
    """Compiles `train_step` for states like this one, which it overwrites.

    The state may be of arrays or of their shapes.
    """
    step_fn = functools.partial(train_step, model=model, z_loss=config.z_loss)
    shardings = None
    if model.mesh is not None:
        shardings = (state_shardings(model.mesh, state), NamedSharding(model.mesh, P()))
    return jax.jit(step_fn, donate_argnums=0, out_shardings=shardings)


@dataclasses.dataclass(frozen=True)
class Row:
    """Metrics at a step; seconds are those spent in training steps since the start.

    The last four say how good the eigenbases are, see `soap_optax.diagnostics`. The
    condition number is the median over all factors, and the others are means.
    """

    step: int
    seconds: float
    train_loss: float
    validation_loss: float
    tokens_per_second: float
    condition: float = float("nan")
    off_diagonal: float = float("nan")
    rotation: float = float("nan")
    skipped: float = float("nan")

    def summary(self) -> str:
        """The figures for a line of progress, those of eigenbases if there are any."""
        shown = {
            "loss": f"{self.train_loss:.3f}",
            "validation": f"{self.validation_loss:.3f}",
            "tokens_per_s": f"{self.tokens_per_second:.0f}",
        }
        for name in ("condition", "off_diagonal", "rotation", "skipped"):
            if not np.isnan(value := getattr(self, name)):
                shown[name] = f"{value:.2g}"
        return ", ".join(f"{name}={text}" for name, text in shown.items())


@jax.jit
def diagnose(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The figures of a `Row` about the eigenbases."""
    per_factor = jax.tree.leaves(
        soap_optax.diagnostics(opt_state),
        is_leaf=lambda node: isinstance(node, soap_optax.Diagnostics),
    )
    flat = [jax.tree.map(jnp.ravel, figures) for figures in per_factor]
    together = jax.tree.map(lambda *x: jnp.concatenate(x), *flat)
    means = jax.tree.map(jnp.mean, together)
    return means._replace(condition=jnp.median(together.condition))._asdict()


def describe_bases(config: Config, state: TrainState) -> dict[str, float]:
    """What `diagnose` says, or nothing without eigenbases or if nobody asks for it."""
    if config.optimizer not in ("soap", "shampoo") or not config.diagnose:
        return {}
    return {name: float(value) for name, value in diagnose(state.opt_state).items()}


def open_checkpoints(
    config: Config, state: TrainState
) -> tuple[ocp.CheckpointManager | None, TrainState, float]:
    """Opens the checkpoints, and gives the state and the seconds to start from."""
    if config.checkpoint_dir is None:
        if config.resume:
            raise ValueError("--resume needs --checkpoint-dir, got none")
        return None, state, 0.0
    manager = ocp.CheckpointManager(
        config.checkpoint_dir.absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
    )
    if config.resume:
        return manager, *restore(manager, state)
    if manager.latest_step() is not None:
        raise ValueError(
            "--checkpoint-dir must be empty unless --resume is given, got "
            f"{config.checkpoint_dir} with step {manager.latest_step()}"
        )
    return manager, state, 0.0


def train(
    config: Config, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Row]:
    """Trains, and yields metrics at every evaluation, with seconds by the clock."""
    config = config.filled()
    corpus = Corpus(read_tokens(config.data), config)
    mesh = make_mesh(config)
    model = make_model(config, mesh)
    manager, state, seconds = open_checkpoints(config, make_state(config, model))
    step_fn = jit_step(config, model, state)
    step_fn = step_fn.lower(state, on_mesh(corpus.micro_batches(0), mesh)).compile()
    validate = make_validation(config, model, corpus, mesh)
    validate(state)  # It compiles before the clock runs.
    progress = progress_bar(config, int(state.step))
    losses: list[jax.Array] = []
    seconds_before = seconds
    since = clock()
    for step in progress:
        state, loss = step_fn(state, on_mesh(corpus.micro_batches(step), mesh))
        losses.append(loss)
        done = step + 1
        evaluate = done % config.eval_every == 0 or done == config.steps
        checkpoint = done % config.checkpoint_every == 0 or done == config.steps
        if not evaluate and not (manager and checkpoint):
            continue
        jax.block_until_ready(loss)
        seconds += clock() - since
        if evaluate:
            figures = measure(config, state, losses, seconds - seconds_before)
            loss = validate(state)
            row = Row(done, round(seconds, 3), validation_loss=loss, **figures)
            losses, seconds_before = [], seconds
            progress.set_postfix_str(row.summary())
            yield row
        if manager and checkpoint:
            save(manager, state, seconds)
        since = clock()
    if manager:
        manager.wait_until_finished()


def measure(
    config: Config, state: TrainState, losses: list[jax.Array], seconds: float
) -> dict[str, float]:
    """The figures of a `Row` about the steps since the last one, and the eigenbases."""
    trained = len(losses) * config.batch * config.context
    return {
        "train_loss": float(np.mean(losses)),
        "tokens_per_second": round(trained / seconds, 1),
        **describe_bases(config, state),
    }


def make_validation(
    config: Config, model: Transformer, corpus: Corpus, mesh: Mesh | None
) -> Callable[[TrainState], float]:
    """A function that gives the mean cross-entropy on the validation batches."""
    eval_fn = jax.jit(lambda params, tokens: cross_entropy(model, params, tokens)[0])
    size = -(-min(config.batch, 128) // config.shards) * config.shards
    batches = [
        on_mesh(corpus.batch(i, size, validation=True), mesh)
        for i in range(config.eval_batches)
    ]
    return lambda state: float(np.mean([eval_fn(state.params, b) for b in batches]))


def progress_bar(config: Config, first: int) -> Any:
    """The numbers of the steps to take, shown by the first process."""
    return tqdm(
        range(first, config.steps),
        initial=first,
        total=config.steps,
        desc=config.optimizer,
        file=sys.stderr,
        disable=jax.process_index() > 0,
    )


def saved_part(state: TrainState, seconds: float) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "seconds": seconds,
    }


def save(manager: ocp.CheckpointManager, state: TrainState, seconds: float) -> None:
    tree = saved_part(state, seconds)
    manager.save(int(state.step), args=ocp.args.StandardSave(tree))


def restore(
    manager: ocp.CheckpointManager, state: TrainState
) -> tuple[TrainState, float]:
    """Reads the newest checkpoint onto the devices of `state`."""
    newest = manager.latest_step()
    if newest is None:
        raise FileNotFoundError(
            f"--resume needs a checkpoint, none in {manager.directory}"
        )
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved_part(state, 0.0))
    tree = manager.restore(newest, args=ocp.args.StandardRestore(target))
    seconds = tree.pop("seconds")
    return state.replace(**tree), seconds


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes a new file in place of the old one, which is whole until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    part.replace(path)


def read_rows(path: Path) -> list[Row]:
    types = {field.name: field.type for field in dataclasses.fields(Row)}
    with path.open(newline="") as file:
        return [
            Row(**{name: types[name](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


def main(config: Config) -> None:
    config = config.filled()
    if config.distributed:
        jax.distributed.initialize(
            config.coordinator, config.processes, config.process_id
        )
    if jax.process_index() > 0:  # The first process speaks for all.
        config = dataclasses.replace(config, metrics=None)
    rows: list[Row] = []
    if config.metrics and config.resume and config.metrics.exists():
        rows = read_rows(config.metrics)
    for row in train(config):
        rows = [*(before for before in rows if before.step < row.step), row]
        if config.metrics:
            write_rows(config.metrics, rows)
    if rows and jax.process_index() == 0:
        print(f"{config.optimizer}: validation loss {rows[-1].validation_loss:.4f}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
