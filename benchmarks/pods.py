"""Compiles training steps for TPU pods without a TPU, and counts what is in them.

    python benchmarks/pods.py --out docs/results

Each row of the table has the settings, the bytes of the optimizer's state and of
temporaries on a chip, the collectives of the optimizer and of the whole step, what
slices exchange, and the seconds of compiling (`compile_s` and `step_compile_s`, without
tracing and lowering). The update of the optimizer is compiled alone and without
clipping by global norm, whose sums cross all chips. No array is made: models of any
size are shapes here. The command needs the `libtpu` package and no hardware but a CPU.
Each core compiles a row at a time. Rows are kept in `--kept`, in a folder for the code
and the versions, so that a command that was stopped goes on where it was.
"""

import os
import tempfile

# Programs are read from XLA's own dump, because a jaxlib cannot print all instructions
# that a newer libtpu compiles.
os.environ["XLA_FLAGS"] = f"--xla_dump_hlo_as_text --xla_dump_to={tempfile.mkdtemp()}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import dataclasses
import functools
import itertools
import math
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax.training.train_state import TrainState
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import programs
import recipes
import train_lm
from results import machine, origin, report, require_known, run_all

import soap_optax

DUMPS = Path(os.environ["XLA_FLAGS"].split("=")[-1])


@dataclasses.dataclass(frozen=True)
class Pod:
    """A model on a topology, how its arrays are sharded, and what updates it.

    With several slices each of them has the topology and the mesh.
    """

    preset: str
    topology: str
    mesh: tuple[int, int, int]
    block_size: int
    optimizers: tuple[str, ...]
    whole: tuple[str, ...] = ()
    """The optimizers with which the whole training step is compiled, too."""
    vocab: int | None = 32_128
    remat: bool = False
    slices: int = 1

    def config(self, optimizer: str) -> train_lm.Config:
        """The trainer's configuration, with a sequence for each group of chips."""
        options = {"block_size": self.block_size} | OPTIMIZERS[optimizer]
        return train_lm.Config(
            preset=self.preset,
            mesh=self.mesh,
            slices=self.slices,
            batch=self.slices * self.mesh[0] * self.mesh[1],
            vocab=self.vocab,
            bf16=True,
            scan=True,
            remat=self.remat,
            initial_basis="identity",
            **options,
        ).filled()


# The side up to which experts have blocks of their own: their shards have this one.
EXPERT_BLOCKS = 192


def make_soap_experts(
    config: train_lm.Config, mesh: Mesh | None
) -> optax.GradientTransformation:
    """SOAP with larger blocks in experts, which fsdp does not split, than elsewhere."""
    of_experts = dataclasses.replace(config, block_size=EXPERT_BLOCKS)
    optimizers = {
        "expert": train_lm.make_soap(of_experts, mesh),
        "other": train_lm.make_soap(config, mesh),
    }

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "expert" if "experts" in train_lm.names(path) else "other",
            params,
        )

    return optax.partition(optimizers, labels)


def make_soap_on_host(
    config: train_lm.Config, mesh: Mesh | None
) -> optax.GradientTransformation:
    """SOAP whose factors are on the chip for a step, and else in the host's memory."""
    tx = train_lm.make_soap(config, mesh)

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        shardings = soap_optax.state_sharding(
            tx, params, functools.partial(train_lm.param_shardings, mesh)
        )
        updates, state = tx.update(updates, jax.device_put(state, shardings), params)
        return updates, jax.device_put(state, with_factors_on_host(shardings))

    return optax.GradientTransformation(tx.init, update)


def with_factors_on_host(shardings: Any) -> Any:
    """The shardings of a state, with its factors in the memory of the host."""

    def one(path: Any, sharding: NamedSharding) -> NamedSharding:
        is_factor = any(getattr(key, "name", None) == "factors" for key in path)
        return sharding.with_memory_kind("pinned_host") if is_factor else sharding

    return jax.tree.map_with_path(one, shardings)


train_lm.OPTIMIZERS |= {
    "soap_experts": make_soap_experts,
    "soap_on_host": make_soap_on_host,
}

# The recipe of docs/recipes.md for models of this size.
RECIPE: dict[str, Any] = {
    "learning_rate": 3e-4,
    "b1": 0.9,
    "b2": 0.95,
    "update_rms": 0.2,
    **recipes.KL_SOAP,
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "soap": train_lm.PUBLISHED,
    "recipe": RECIPE,
    "recipe on spheres": RECIPE | {"optimizer": "soap_spheres"},
    "recipe packed": RECIPE | {"pack_factors": True, "precond_dtype": "bfloat16"},
    "recipe factors on host": RECIPE | {"optimizer": "soap_on_host"},
    "recipe no blocks": RECIPE | {"block_size": None},
    "recipe large blocks": RECIPE | {"optimizer": "soap_experts"},
    "recipe shared": RECIPE | {"refresh_axes": ("data",)},
    "recipe shared by all": RECIPE | {"refresh_axes": ("slice", "data")},
}
# Blocks are as large as the smallest shards: of keys and values in llama-70b, and of
# what reads the width in qwen3-235b, where each group of chips has an expert. Experts
# without blocks are compiled in a small model, because their factors are large.
PODS = {
    "360m": Pod(
        "360m",
        "v5e:4x4",
        (1, 4, 4),
        256,
        (
            "adamw",
            "soap",
            "recipe",
            "recipe packed",
            "recipe on spheres",
            "recipe factors on host",
        ),
        whole=("adamw", "soap", "recipe"),
    ),
    "660m": Pod("660m", "v5e:4x4", (1, 4, 4), 352, ("adamw", "recipe")),
    # The vocabulary of 128,256 is rounded up, so that blocks of 128 fit its shards.
    "llama-8b": Pod(
        "llama-8b",
        "v5p:8x8x4",
        (1, 32, 8),
        128,
        ("adamw", "recipe"),
        whole=("adamw", "recipe"),
        vocab=131_072,
        remat=True,
    ),
    "llama-70b": Pod(
        "llama-70b",
        "v5p:8x8x16",
        (1, 64, 16),
        64,
        ("adamw", "recipe"),
        whole=("adamw", "recipe"),
        vocab=None,
        remat=True,
    ),
    "qwen3-235b": Pod(
        "qwen3-235b",
        "v5p:8x8x16",
        (1, 128, 8),
        32,
        ("adamw", "recipe large blocks"),
        whole=("adamw", "recipe large blocks"),
        vocab=None,
        remat=True,
    ),
    "experts": Pod(
        "tiny-experts",
        "v5e:4x4",
        (1, 8, 2),
        16,
        ("recipe", "recipe no blocks"),
        whole=("recipe", "recipe no blocks"),
        vocab=256,
    ),
    "360m, slices": Pod(
        "360m",
        "v5e:4x4",
        (1, 4, 4),
        256,
        ("recipe",),
        whole=("recipe",),
        slices=2,
    ),
    "360m, slices of copies": Pod(
        "360m",
        "v5e:4x4",
        (2, 4, 2),
        256,
        ("recipe", "recipe shared", "recipe shared by all"),
        slices=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """What to compile."""

    out: Path = Path("runs/pods")
    kept: Path = Path("runs/pods")
    """Where finished rows are kept, so that no command compiles them again."""
    pods: tuple[str, ...] = tuple(PODS)
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    """Which of the optimizers of a pod have a row."""
    step: bool = True
    """Compile the training step, too, and not only the update of the optimizer."""


def make_mesh(pod: Pod, config: train_lm.Config) -> Mesh:
    """The trainer's mesh of a topology whose chips need not be there."""
    topology = topologies.get_topology_desc(
        pod.topology, platform="tpu", num_slices=pod.slices
    )
    mesh = train_lm.make_mesh(config, topology.devices)
    assert mesh is not None  # There is one, because the configuration has its sizes.
    return mesh


def abstract_state(config: train_lm.Config, mesh: Mesh, tx: Any) -> TrainState:
    """The shapes and shardings of a training state."""
    init = functools.partial(train_lm.first_state, train_lm.make_model(config), tx)
    state = jax.eval_shape(init, jax.random.key(0))
    shardings = train_lm.state_shardings(mesh, state)
    if config.optimizer == "soap_on_host":
        on_host = with_factors_on_host(shardings.opt_state)
        shardings = shardings.replace(opt_state=on_host)
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


class Job(NamedTuple):
    """A row to be made: a pod, an optimizer, and whether whole steps are wanted."""

    pod: str
    optimizer: str
    step: bool


def rows_of(job: Job) -> list[dict[str, Any]]:
    """The row of a job."""
    pod, name = PODS[job.pod], job.optimizer
    config = pod.config(name)
    mesh = make_mesh(pod, config)
    row = {
        "model": pod.preset,
        "topology": pod.topology,
        "slices": pod.slices,
        "optimizer": name,
        "mesh": " x ".join(map(str, config.mesh)),
        **settings(config),
    }
    row |= update_of(config, mesh)
    if job.step and name in pod.whole:
        row |= step_of(config, mesh)
    return [row]


def settings(config: train_lm.Config) -> dict[str, Any]:
    """The settings that make the program what it is; None where there is nothing."""
    names = (
        "block_size",
        "factors",
        "basis",
        "precondition_frequency",
        "nesterov",
        "update_rms",
        "refresh_axes",
        "remat",
        "batch",
        "context",
    )
    found = {name: getattr(config, name) for name in names}
    if config.refresh_axes is not None:
        found["refresh_axes"] = " ".join(config.refresh_axes)
    found["left_to_adam"] = " ".join(config.adam) or None
    if config.optimizer == "adamw":
        of_both = ("nesterov", "remat", "batch", "context")
        found = {name: found[name] if name in of_both else None for name in found}
    if config.optimizer == "soap_spheres":
        found["update_rms"] = None  # Spheres take its place.
    if config.optimizer == "soap_experts":
        found["block_size"] = f"{config.block_size}, experts {EXPERT_BLOCKS}"
    return found


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
        "state_mb_a_chip": state / 1e6,
        "state_over_share": state / (total / mesh.size),
        "arguments_mb_a_chip": memory.argument_size_in_bytes / 1e6,
        "on_host_mb_a_chip": memory.host_argument_size_in_bytes / 1e6,
        "temporary_mb_a_chip": memory.temp_size_in_bytes / 1e6,
        **exchanges(text),
        "program_mb": memory.generated_code_size_in_bytes / 1e6,
        "compile_s": seconds,
    }


def exchanges(text: str) -> dict[str, Any]:
    """What chips exchange within a slice, and between slices."""
    return programs.collectives(text) | programs.between_slices(text)


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
        **{f"step_{key}": value for key, value in exchanges(text).items()},
        "step_temporary_mb_a_chip": memory.temp_size_in_bytes / 1e6,
        "step_program_mb": memory.generated_code_size_in_bytes / 1e6,
        "step_compile_s": seconds,
    }


def main(check: Check) -> None:
    require_known("pods", check.pods, PODS)
    require_known("optimizers", check.optimizers, OPTIMIZERS)
    about = machine() | {"libtpu": metadata.version("libtpu")} | origin("pods")
    known = about | {name: metadata.version(name) for name in ("optax", "flax")}
    versions = ("sources", "python", "jax", "libtpu", "optax", "flax")
    folder = "_".join(f"{name}_{known[name]}" for name in versions)
    jobs = {
        f"{pod}, {name}" + ", update" * (not check.step): Job(pod, name, check.step)
        for pod in check.pods
        for name in PODS[pod].optimizers
        if name in check.optimizers
    }
    found = run_all(rows_of, jobs, check.kept / folder)
    report(itertools.chain(*found.values()), check.out / "pods.csv", about)


if __name__ == "__main__":
    main(tyro.cli(Check, description=__doc__))
