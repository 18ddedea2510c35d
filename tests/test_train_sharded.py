"""The example trainer on meshes of devices and as several processes."""

import dataclasses
import functools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys

import cases
import dying_training
import jax
import numpy as np
import pytest
import train_lm
from dying_training import Death
from train_lm import (
    Config,
    cross_entropy,
    make_mesh,
    make_model,
    make_state,
    open_checkpoints,
    param_shardings,
    read_rows,
    state_shardings,
    train,
)

SMALL = Config(
    steps=12,
    warmup=2,
    batch=16,
    context=32,
    eval_every=3,
    eval_batches=1,
    learning_rate=1e-3,
    precondition_frequency=3,
    block_size=32,
    diagnose=False,
    scan=True,
)
MESH = (2, 2, 2)


def change(**changes):
    return dataclasses.replace(SMALL, **changes)


def losses(rows):
    return [(row.step, row.train_loss, row.validation_loss) for row in rows]


def assert_same_losses(rows, others, rtol=1e-3):
    """Up to round-off and what becomes of it.

    On one device two micro-batches in place of one already change the losses of SOAP by
    a share of 2e-4; no refreshes would change them by 0.02 to 0.1.
    """
    assert len(rows) == len(others) > 0
    np.testing.assert_allclose(losses(rows), losses(others), rtol=rtol)


ADAMW = {"optimizer": "adamw", "accumulate": 2, "scan": False}


@functools.cache
def rows_of(config):
    return list(train(config))


@pytest.mark.parametrize(
    "changes",
    [
        ADAMW,
        *cases.slow(
            {"scan": False},
            train_lm.PUBLISHED,
            {"block_size": None},
            {"initial_basis": "identity"},
            {"refresh": "cholesky_qr"},
            {"optimizer": "muon"},
            {"diagnose": True, "remat": True},
            {"preset": "tiny-experts"} | ADAMW,
            {"preset": "tiny-experts", "steps": 6},
        ),
    ],
)
def test_a_mesh_trains_as_one_device(changes):
    on_mesh, alone = change(mesh=MESH, **changes), change(**changes)
    rtol = 1e-3 if on_mesh.optimizer == "soap" else 2e-5
    assert_same_losses(rows_of(on_mesh), rows_of(alone), rtol)


@pytest.mark.slow
def test_slices_train_as_one_device():
    config = change(mesh=(2, 2, 1), slices=2, refresh_axes=("data",))
    assert_same_losses(rows_of(config), rows_of(SMALL))


def test_slices_are_the_first_axis_of_the_mesh():
    mesh = make_mesh(change(mesh=(1, 2, 2), slices=2))
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    ids = [device.id for device in mesh.devices.flat]
    assert ids == list(range(8))


def test_experts_are_split_along_themselves():
    config = change(preset="tiny-experts", mesh=MESH, optimizer="adamw").filled()
    mesh = make_mesh(config)
    tx, model = train_lm.make_optimizer(config), make_model(config)
    init = functools.partial(train_lm.first_state, model, tx)
    state = jax.eval_shape(init, jax.random.key(0))
    experts = param_shardings(mesh, state.params)["blocks"]["experts"]
    assert experts["experts_in"].spec == jax.P(None, "fsdp", None, "tensor")
    assert experts["experts_out"].spec == jax.P(None, "fsdp", "tensor", None)
    assert experts["router"]["kernel"].spec == jax.P(None, "fsdp", None)


@pytest.mark.slow
def test_a_checkpoint_continues_on_another_mesh(tmp_path, monkeypatch):
    config = change(mesh=MESH, checkpoint_dir=tmp_path, checkpoint_every=6)
    whole = list(train(config))
    assert_same_losses(whole, list(train(SMALL)))
    shutil.rmtree(tmp_path / "12")
    four = functools.partial(make_mesh, devices=jax.devices()[:4])
    monkeypatch.setattr(train_lm, "make_mesh", four)
    resumed = list(train(dataclasses.replace(config, mesh=(1, 4, 1), resume=True)))
    assert_same_losses(resumed, whole[2:])


def test_a_state_is_made_where_it_belongs():
    config = change(mesh=(1, 4, 2), optimizer="adamw").filled()
    mesh = make_mesh(config)
    state = make_state(config, make_model(config, mesh))
    for array, sharding in zip(
        *map(jax.tree.leaves, (state, state_shardings(mesh, state))), strict=True
    ):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    blocks = state.params["blocks"]
    assert blocks["query"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")
    assert blocks["mlp_out"]["kernel"].sharding.spec == jax.P(None, "tensor", "fsdp")
    assert blocks["query_norm"]["scale"].sharding.is_fully_replicated
    (adam,) = (
        s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s)
    )
    shards = adam.mu["blocks"]["query"]["kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(2, 32, 64)}


def is_adam(node):
    return hasattr(node, "mu")


def test_an_axis_that_cannot_be_cut_stays_whole():
    mesh = make_mesh(change(mesh=(1, 4, 2)))
    params = {"embed": {"embedding": jax.ShapeDtypeStruct((255, 128), "float32")}}
    shardings = param_shardings(mesh, params)
    assert shardings["embed"]["embedding"].spec == jax.P(None, "fsdp")


def unstacked(params):
    """The parameters of scanned layers as those of single ones."""
    params = dict(params)
    stack = params.pop("blocks")
    layers = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(2)]
    return params | {f"block_{i}": layer for i, layer in enumerate(layers)}


def loss_and_gradients(config, params, tokens):
    loss = jax.jit(
        jax.value_and_grad(
            functools.partial(cross_entropy, make_model(config)), has_aux=True
        )
    )
    (loss, _), gradients = loss(params, tokens)
    return loss, gradients


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_are_the_layers(remat):
    config = change(remat=remat).filled()
    tokens = np.arange(34, dtype=np.int32).reshape(2, 17)
    params = jax.jit(make_model(config).init)(jax.random.key(0), tokens)["params"]
    loss, gradients = loss_and_gradients(config, params, tokens)
    apart = dataclasses.replace(config, scan=False, remat=False)
    wanted = loss_and_gradients(apart, unstacked(params), tokens)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, (loss, unstacked(gradients)), wanted)
    first, second = params["blocks"]["query"]["kernel"]
    assert np.abs(first - second).max() > 0.1


def test_a_llama_of_8_billion():
    config = Config(preset="llama-8b", scan=True, mesh=(1, 4, 2)).filled()
    mesh = make_mesh(config)
    model = make_model(config, mesh)
    state = jax.eval_shape(lambda: make_state(config, model))
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert size / 1e9 == pytest.approx(8.03, abs=0.005)
    assert state.params["blocks"]["key"]["kernel"].shape == (32, 4096, 1024)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": (2, 2, 1)}, r"--mesh must be of all 8 devices, got \(2, 2, 1\)"),
        ({"mesh": (8, 0, 1)}, r"--mesh must be of sizes above 0, got \(8, 0, 1\)"),
        (
            {"mesh": (2, 4, 1), "accumulate": 4},
            r"the micro-batch of 4, got 1 \* 2 \* 4",
        ),
        ({"mesh": MESH, "slices": 2}, r"8 devices, got \(2, 2, 2\) in 2 slices"),
        ({"slices": 2}, "--slices must be at least 1, and 1 without --mesh, got 2"),
        ({"mesh": MESH, "slices": 0}, "--slices must be at least 1"),
        ({"refresh_axes": ("pipe",)}, "--refresh-axes must be of slice, .* got pipe"),
        ({"distributed": True}, "--distributed needs --mesh, got none"),
        ({"mesh": MESH, "coordinator": "x:1"}, "--coordinator needs --distributed"),
        ({"process_id": 0}, "--process-id needs --distributed"),
    ],
)
def test_clear_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        list(train(change(**changes)))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


TOGETHER = change(mesh=MESH, steps=24, checkpoint_every=6)


def start(arguments, log):
    """Starts a process of Python with four devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),  # The script imports the trainer.
    }
    command = [sys.executable, *arguments]
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def flags(config):
    """The command line of a configuration."""
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        else:
            yield from (f"--{option}", *str(value).strip("()").split(", "))


class Processes:
    """Processes of four devices each that train together, of which one may die."""

    def __init__(self, folder, config, *, death=None, **changes):
        folder.mkdir(exist_ok=True)
        config = dataclasses.replace(
            config,
            metrics=folder / "metrics.csv",
            checkpoint_dir=folder / "saved",
            **changes,
        )
        script = [train_lm.__file__]
        if death is not None:
            how = death.moment, str(death.steps), str(death.process)
            script = [dying_training.__file__, *how]
        count = math.prod(config.mesh) // 4
        self.logs = [folder / f"log{i}" for i in range(count)]
        self.running = []
        address = f"127.0.0.1:{free_port()}"
        for i, log in enumerate(self.logs):
            if count > 1:
                config = dataclasses.replace(
                    config,
                    distributed=True,
                    coordinator=address,
                    processes=count,
                    process_id=i,
                )
            self.running.append(start([*script, *flags(config)], log))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running:
            process.kill()
            process.wait()

    def finish(self):
        codes = [process.wait(timeout=240) for process in self.running]
        assert not any(codes), self.output()

    def output(self):
        return "\n".join(log.read_text()[-2000:] for log in self.logs)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    with Processes(tmp_path, TOGETHER, steps=12, **ADAMW) as processes:
        processes.finish()
    one = rows_of(change(mesh=MESH, **ADAMW))
    assert_same_losses(read_rows(tmp_path / "metrics.csv"), one, rtol=2e-5)


@pytest.mark.slow
def test_two_processes_train_as_one_by_soap(tmp_path):
    with Processes(tmp_path, TOGETHER) as processes:
        processes.finish()
    one = list(train(TOGETHER))
    assert_same_losses(read_rows(tmp_path / "metrics.csv"), one)


# --- a process dies -------------------------------------------------------------------

RECIPE = change(
    mesh=MESH,
    precondition_frequency=5,
    factors="kl",
    basis="current",
    nesterov=True,
    update_rms=0.2,
    adam=("embed",),
    initial_basis="identity",
    eval_every=1,
    checkpoint_every=4,
)
# The newest checkpoint at each death. Refreshes are due after 0, 5 and 10 steps.
SAVED = {
    Death("refresh", 10, process=1): 8,
    Death("update", 7, process=0): 4,
    Death("save", 8, process=0): 4,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a training of two processes that never stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Processes(folder, RECIPE) as processes:
        processes.finish()
    return folder


def train_until(death, folder):
    """Trains until a process dies; the other one can do nothing alone."""
    with Processes(folder, RECIPE, death=death) as processes:
        code = processes.running[death.process].wait(timeout=240)
        assert code == -signal.SIGKILL, processes.output()
    assert rows_in(folder)[-1].step == death.steps
    assert max(saved_steps(folder)) == SAVED[death]
    assert is_unfinished(folder, death.steps) == (death.moment == "save")


def rows_in(folder):
    return read_rows(folder / "metrics.csv")


def saved_steps(folder):
    names = [path.name for path in (folder / "saved").iterdir()]
    return [int(name) for name in names if name.isdecimal()]


def is_unfinished(folder, step):
    """Says whether a checkpoint has been begun that was not finished."""
    return bool(list((folder / "saved").glob(f"{step}.*tmp*")))


def final_state(folder):
    config = dataclasses.replace(RECIPE, checkpoint_dir=folder / "saved", resume=True)
    config = config.filled()
    mesh = make_mesh(config)
    state = open_checkpoints(config, make_state(config, make_model(config, mesh)))[1]
    assert int(state.step) == config.steps
    return state.params, state.opt_state


@pytest.mark.slow
@pytest.mark.parametrize("death", SAVED, ids=lambda death: death.moment)
def test_a_restart_is_the_same_to_the_bit(death, undisturbed, tmp_path):
    """Losses, parameters and the state of the optimizer, after a process was killed."""
    train_until(death, tmp_path)
    with Processes(tmp_path, RECIPE, resume=True) as processes:
        processes.finish()
    assert losses(rows_in(tmp_path)) == losses(rows_in(undisturbed))
    states = map(final_state, (tmp_path, undisturbed))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert not is_unfinished(tmp_path, death.steps)


@pytest.mark.slow
def test_a_restart_with_half_of_the_devices(undisturbed, tmp_path):
    """One process trains on alone, on another mesh, equally up to round-off.

    The trainer keeps parameters in float32. After four steps with a refresh among them
    losses differed by 5e-7, and parameters by 1.5e-8. In float64,
    `test_sharding.py::test_a_restart_from_a_checkpoint` compares to 1e-10.
    """
    train_until(Death("refresh", 10, process=1), tmp_path)
    with Processes(tmp_path, RECIPE, resume=True, mesh=(1, 2, 2)) as processes:
        processes.finish()
    assert_same_losses(rows_in(tmp_path), rows_in(undisturbed), rtol=1e-5)
    (params, _), (wanted, _) = map(final_state, (tmp_path, undisturbed))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(close, params, wanted)
