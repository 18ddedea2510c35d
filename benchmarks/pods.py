"""Compiles training steps for TPU pods without a TPU, and counts what is in them.

    python benchmarks/pods.py --out docs/results

Each row of the table has the bytes of the optimizer's state and of temporaries on a
chip, the collectives of the optimizer and of the whole step, and the seconds of
compiling (`compile_s` and `step_compile_s`, without tracing and lowering). The update
of the optimizer is compiled alone and without clipping by global norm, whose sums cross
all chips. The command needs the `libtpu` package and no hardware but a CPU.
"""

import os
import tempfile

# Programs are read from XLA's own dump, because a jaxlib cannot print all instructions
# that a newer libtpu compiles.
os.environ["XLA_FLAGS"] = f"--xla_dump_hlo_as_text --xla_dump_to={tempfile.mkdtemp()}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import dataclasses
import functools
import math
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.training.train_state import TrainState
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import programs
import train_lm
from results import machine, report, require_known

DUMPS = Path(os.environ["XLA_FLAGS"].split("=")[-1])


@dataclasses.dataclass(frozen=True)
class Pod:
    """A model on a topology: how its arrays are sharded, and the size of its blocks."""

    preset: str
    topology: str
    mesh: tuple[int, int, int]
    block_size: int
    vocab: int = 32_128
    remat: bool = False

    @property
    def config(self) -> train_lm.Config:
        """The trainer's configuration, with a sequence for each group of chips."""
        return train_lm.Config(
            preset=self.preset,
            mesh=self.mesh,
            batch=self.mesh[0] * self.mesh[1],
            vocab=self.vocab,
            bf16=True,
            scan=True,
            remat=self.remat,
            initial_basis="identity",
            block_size=self.block_size,
            **train_lm.PUBLISHED,
        )


PODS = {
    "360m": Pod("360m", "v5e:4x4", (1, 4, 4), 256),
    "660m": Pod("660m", "v5e:4x4", (1, 4, 4), 352),
    # The vocabulary of 128,256 is rounded up, so that blocks of 128 fit its shards.
    "llama-8b": Pod("llama-8b", "v5p:8x8x4", (1, 32, 8), 128, 131_072, remat=True),
}
OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "soap": {},
    "soap no blocks": {"block_size": None},
}


@dataclasses.dataclass(frozen=True)
class Check:
    """What to compile."""

    out: Path = Path("runs/pods")
    pods: tuple[str, ...] = tuple(PODS)
    optimizers: tuple[str, ...] = ("adamw", "soap")
    step: bool = True
    """Compile the training step, too, and not only the update of the optimizer."""


def make_mesh(pod: Pod) -> Mesh:
    """The mesh of a topology whose chips need not be there."""
    devices = topologies.get_topology_desc(pod.topology, platform="tpu").devices
    kinds = (AxisType.Auto,) * len(train_lm.AXES)
    return Mesh(np.array(devices).reshape(pod.mesh), train_lm.AXES, axis_types=kinds)


def abstract_state(config: train_lm.Config, mesh: Mesh, tx: Any) -> TrainState:
    """The shapes and shardings of a training state."""
    init = functools.partial(train_lm.first_state, train_lm.make_model(config), tx)
    state = jax.eval_shape(init, jax.random.key(0))
    shardings = train_lm.state_shardings(mesh, state)
    return jax.tree.map(lambda x, s: x.update(sharding=s), state, shardings)


def bytes_of(shapes: Any, *, on_a_chip: bool) -> int:
    """The bytes of all arrays: of their parts on a chip, or of the whole arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if on_a_chip else x.shape)
        * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )


def timed(lowered: Any) -> tuple[float, Any, str]:
    """Seconds of compiling, the program, and its text."""
    seconds, program = programs.timed_compile(lowered)
    texts = list(DUMPS.glob("*.after_optimizations.txt"))
    if len(texts) != 1:
        there = sorted(path.name for path in DUMPS.iterdir())
        raise ValueError(
            f"{DUMPS} must have one text of a program, *.after_optimizations.txt, "
            f"got {there}"
        )
    found = texts[0].read_text()
    for file in (path for path in DUMPS.rglob("*") if path.is_file()):
        file.unlink()
    return seconds, program, found


def row_of(pod: Pod, name: str, *, whole_step: bool) -> dict[str, Any]:
    config = dataclasses.replace(pod.config, **OPTIMIZERS[name]).filled()
    mesh = make_mesh(pod)
    row = {"model": pod.preset, "topology": pod.topology, "optimizer": name}
    row |= update_of(config, mesh)
    return row | step_of(config, mesh) if whole_step else row


def update_of(config: train_lm.Config, mesh: Mesh) -> dict[str, Any]:
    """What the update of the optimizer needs, compiled alone."""
    alone = abstract_state(config, mesh, tx := train_lm.make_unclipped(config, mesh))
    shardings = jax.tree.map(lambda x: x.sharding, (alone.params, alone.opt_state))
    update = jax.jit(tx.update, donate_argnums=1, out_shardings=shardings)
    lowered = update.lower(alone.params, alone.opt_state, alone.params)
    seconds, program, text = timed(lowered)
    memory = programs.memory_of(program)
    state = bytes_of(alone.opt_state, on_a_chip=True)
    total = bytes_of(alone.opt_state, on_a_chip=False)
    return {
        "parameters_m": sum(x.size for x in jax.tree.leaves(alone.params)) / 1e6,
        "mesh": " x ".join(map(str, config.mesh)),
        "block_size": None if config.optimizer == "adamw" else config.block_size,
        "state_mb_a_chip": state / 1e6,
        "state_over_share": state / (total / mesh.size),
        "temporary_mb_a_chip": memory.temp_size_in_bytes / 1e6,
        **programs.collectives(text),
        "program_mb": memory.generated_code_size_in_bytes / 1e6,
        "compile_s": seconds,
    }


def step_of(config: train_lm.Config, mesh: Mesh) -> dict[str, Any]:
    """What the whole training step needs."""
    model = train_lm.make_model(config, mesh)
    whole = abstract_state(config, mesh, train_lm.make_optimizer(config, mesh))
    tokens = jax.ShapeDtypeStruct((1, config.batch, config.context + 1), jnp.int32)
    spread = NamedSharding(mesh, train_lm.batch_sharding(mesh, 3).spec)
    step = train_lm.jit_step(config, model, whole)
    lowered = step.lower(whole, tokens.update(sharding=spread))
    seconds, program, text = timed(lowered)
    memory = programs.memory_of(program)
    return {
        **{f"step_{key}": value for key, value in programs.collectives(text).items()},
        "step_temporary_mb_a_chip": memory.temp_size_in_bytes / 1e6,
        "step_program_mb": memory.generated_code_size_in_bytes / 1e6,
        "step_compile_s": seconds,
    }


def main(check: Check) -> None:
    require_known("pods", check.pods, PODS)
    require_known("optimizers", check.optimizers, OPTIMIZERS)
    rows = (
        row_of(PODS[pod], name, whole_step=check.step)
        for pod in check.pods
        for name in check.optimizers
    )
    about = {**machine(), "libtpu": metadata.version("libtpu")}
    report(rows, check.out / "pods.csv", about)


if __name__ == "__main__":
    main(tyro.cli(Check, description=__doc__))
