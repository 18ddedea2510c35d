"""Tests may use float64 and 8 virtual devices, and broadcast no ranks."""

import gc
import importlib.metadata
import os
import tempfile

# Nearly all of the time goes into compiling, so LLVM is told not to optimize, and has
# one module for each program. JAX before 0.11 still has XLA's older emitters, which
# take half the time. The command `make test-default-flags` sets the flags itself and
# compiles as XLA does for users.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * (tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11)),
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The threads of LAPACK only get into each other's way on small matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Some tests compile the same large programs, also in processes of their own. To keep
# a small one costs more than another test saves. Processes of xdist inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-cache-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Nobody reads from which line of Python an operation of a program comes.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("slow", hypothesis.settings())

# Tracing makes many objects, and hardly any of them is garbage.
gc.freeze()
gc.set_threshold(20_000)


@pytest.fixture(autouse=True, scope="module")
def drop_programs():
    """Drops the programs of a file after it.

    Each holds maps of memory, of which Linux allows a process 65,530
    (`vm.max_map_count`). A process that has more dies.
    """
    yield
    jax.clear_caches()
    gc.collect()
