"""Compiles for a GPU that need not be there, and reads memory and kernels off programs.

    python benchmarks/gpus.py --out docs/results

The table `gpus` has a row for each optimizer, with the parameters of a preset of the
trainer: the bytes of its state, of the temporaries of an update and of what an update
without refresh copies, the decompositions in the program, and the peak of a training
step, which is the gradient of the trainer's loss and this update without clipping.
Nothing is run, so no step is timed; `steps.py` does that on a GPU. `compile_s` and
`step_compile_s` are the seconds of compiling alone, without tracing and lowering.

The table `gpus_kernels` has the number of kernels that a step of the small network of
`small.py` starts. Each takes a few microseconds, however small its arrays are.

The command needs `jax[cuda12]` and no GPU.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Without a GPU nothing can be chosen by running it.
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # It would log that there is no GPU.

import dataclasses
import functools
import itertools
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import kernels
import programs
import small
import steps
import train_lm
from results import machine, origin, report, require_known

import soap_optax

# XLA has to know this of an H200.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  fpus_per_core: 128
  core_count: 132
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  device_memory_size: 150754820096
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""
ROWS = (
    "adamw",
    "soap",
    "blocks 512",
    "bf16 mu",
    "bf16 eigenbases",
    "packed",
    "packed, bf16 eigenbases",
    "packed, bf16 mu and eigenbases, blocks 512",
    "one-sided",
)
# Equal layers may be one stack: three matrices, and their biases, which are a vector.
NETWORKS = {
    "layer by layer": small.MLP,
    "equal layers in a stack": [(2, 64), (64,), (3, 64, 64), (192,), (64, 1), (1,)],
}
# Without eigh a refresh is the only thing that a step of SOAP does now and then.
_soap = functools.partial(
    small.soap, initial_basis="identity", dimension_numbers=soap_optax.matrices()
)
KERNEL_ROWS = {
    **{name: small.LOOPS[name] for name in ("adam", "muon")},
    "soap": _soap,
    "soap, recipe": functools.partial(
        _soap, nesterov=True, basis="current", factors="kl"
    ),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """What to compile."""

    preset: str = "360m"
    rows: tuple[str, ...] = ROWS
    whole: tuple[str, ...] = ("adamw", "soap", "packed, bf16 eigenbases")
    """The rows for which the whole training step is compiled, too."""
    batch: int = 8
    """How many sequences a training step has; it computes in bfloat16."""
    out: Path = Path("runs/gpus")

    @property
    def config(self) -> train_lm.Config:
        return train_lm.Config(
            preset=self.preset, batch=self.batch, vocab=32_128, bf16=True
        ).filled()


def on_gpu(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The shapes of the arrays in a tree, with this sharding, which is on the GPU."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def compiled(jitted: Any, *args: Any) -> tuple[float, Any]:
    """Seconds of compiling for CUDA, and the program."""
    _, lowered = programs.timed_trace(jitted, *args, lowering_platforms=("cuda",))
    return programs.timed_compile(lowered)


def row_of(name: str, check: Check, sharding: jax.sharding.Sharding) -> dict[str, Any]:
    """The update of one optimizer and, if it is asked for, its whole training step."""
    config, tx = check.config, steps.ROWS[name]()
    model = train_lm.make_model(config)
    init = functools.partial(train_lm.first_state, model, tx)
    state = on_gpu(jax.eval_shape(init, jax.random.key(0)), sharding)
    row = {
        "optimizer": name,
        **update_row(tx, state),
        "batch": config.batch,
        "context": config.context,
    }
    if name not in check.whole:
        return row | {"step_peak_mb": None, "step_compile_s": None}
    tokens = jax.ShapeDtypeStruct((1, config.batch, config.context + 1), jnp.int32)
    step = train_lm.jit_step(config, model, state)
    seconds, program = compiled(step, state, on_gpu(tokens, sharding))
    memory = programs.memory_of(program)
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return row | {"step_peak_mb": peak / 1e6, "step_compile_s": seconds}


def update_row(tx: Any, state: Any) -> dict[str, Any]:
    """What the update of an optimizer needs, compiled alone."""
    update = jax.jit(tx.update, donate_argnums=1)
    seconds, program = compiled(update, state.params, state.opt_state, state.params)
    temporary = programs.memory_of(program).temp_size_in_bytes
    text = program.as_text()
    return {
        "state_mb": steps.nbytes(state.opt_state) / 1e6,
        "temporary_mb": temporary / 1e6,
        "temporary_share": temporary / steps.nbytes(state.opt_state),
        "copied_mb": programs.copied_bytes(text) / 1e6,
        **programs.decompositions(text),
        "compile_s": seconds,
    }


def kernels_of(
    name: str, network: str, sharding: jax.sharding.Sharding
) -> dict[str, Any]:
    """The kernels of a step of a small network, with a refresh and without."""
    tx = KERNEL_ROWS[name]()
    params = jax.eval_shape(lambda: small.normal(NETWORKS[network]))
    state = on_gpu((params, jax.eval_shape(tx.init, params)), sharding)
    count = on_gpu(jax.ShapeDtypeStruct((), jnp.int32), sharding)
    step = jax.jit(functools.partial(small.next_state, tx), donate_argnums=0)
    parts = programs.computations(compiled(step, state, count)[1].as_text())
    return {"network": network, "optimizer": name, **kernels.of_a_step(parts)}


def main(check: Check) -> None:
    require_known("rows", check.rows, steps.ROWS)
    require_known("preset", [check.preset], train_lm.PRESETS)
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", topology="1x1x1", target_config=H200
    )
    (device,) = topology.devices
    mesh = jax.sharding.Mesh([device], "x")
    sharding = jax.NamedSharding(mesh, jax.P())
    about = {
        **machine(),
        "target": device.device_kind,
        "cuda_plugin": metadata.version("jax-cuda12-plugin"),
        **origin("gpus"),
    }
    rows = (
        {"model": check.preset, **row_of(name, check, sharding)} for name in check.rows
    )
    report(rows, check.out / "gpus.csv", about)
    pairs = itertools.product(KERNEL_ROWS, NETWORKS)
    rows = (kernels_of(name, network, sharding) for name, network in pairs)
    report(rows, check.out / "gpus_kernels.csv", about)


if __name__ == "__main__":
    main(tyro.cli(Check, description=__doc__))
