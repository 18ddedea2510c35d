"""MaxText pre-trains a tiny model on a mesh of 8 devices with SOAP, and resumes.

`get_optimizer` takes the place of MaxText's. It reads MaxText's configuration, its
dimension numbers of Muon and its logical axes. `make test-clients` runs this file.
"""

import json
import pathlib
import tempfile
import warnings

import flax.linen as nn
import jax
import optax
from common import RECIPE, compare
from flax import nnx
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train as maxtext
from maxtext.utils import muon_utils, sharding, train_utils

import soap_optax

HERE, FOLDER = pathlib.Path(__file__).parent, pathlib.Path(tempfile.mkdtemp())
get_theirs, setup = optimizers.get_optimizer, train_utils.setup_train_loop


def get_optimizer(config, schedule, model=None, mesh=None):
    params = nnx.state(model, nnx.Param)
    with nn.logical_axis_rules(config.logical_axis_rules):
        shardings = nnx.as_pure(sharding.nnx_construct_named_sharding(params, mesh))
    numbers = muon_utils.get_muon_weight_dimension_numbers(model, config)
    adam = (config.adam_b1, config.adam_b2, config.adam_eps, config.adam_eps_root)
    options = {"weight_decay": config.adam_weight_decay, "block_size": 16}
    options |= RECIPE | {"nesterov": False}  # MaxText's AdamW has no such momentum.
    options |= {"dimension_numbers": numbers, "params_sharding": shardings}
    tx = soap_optax.soap(schedule, *adam, **options)
    of_state = soap_optax.state_sharding(tx, nnx.as_pure(params), shardings)

    def init(params):  # MaxText looks for the sharding in a box around each array.
        box = lambda leaf, found: nnx.Variable(leaf, out_sharding=found)  # noqa: E731
        return jax.tree.map(box, nnx.as_pure(tx.init(params)), of_state)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def setup_and_measure(config, recorder):
    *others, state = setup(config, recorder)
    arrays = jax.tree.leaves(nnx.state(state.optimizer))
    on_device = sum(array.addressable_shards[0].data.nbytes for array in arrays)
    total = sum(array.nbytes for array in arrays)
    print(f"{config.run_name}: {on_device:,} of {total:,} bytes on a device", flush=True)
    return *others, state


def train(choice, steps=30, **settings):
    optimizers.get_optimizer, opt_type, rate = choice
    settings |= {"opt_type": opt_type, "learning_rate": rate, "steps": steps}
    settings |= {"base_output_directory": FOLDER, "metrics_file": FOLDER / f"{steps}.txt"}
    settings = {"run_name": opt_type, "enable_checkpointing": False} | settings
    texts = [f"{name}={value}" for name, value in settings.items()]
    maxtext.main(["", str(HERE / "maxtext_tiny.yml"), *texts])
    return json.loads(settings["metrics_file"].read_text().splitlines()[-1])["learning/loss"]


def of(get, opt_type):
    return lambda rate: (get, opt_type, rate)


if __name__ == "__main__":
    warnings.filterwarnings("error", message=".*(blocks|params_sharding)")
    train_utils.setup_train_loop = setup_and_measure
    best = (get_optimizer, "adamw", 0.01)
    straight = train(best, run_name="soap")
    for steps in (15, 30):  # The second call resumes where the first one ended.
        loss = train(best, steps, run_name="resumed", enable_checkpointing=True)
    if loss != straight:
        raise SystemExit(f"maxtext: resumed training ended at {loss}, not {straight}")
    rates = (1e-2, 3e-2, 1e-1)
    compare(
        "maxtext",
        "pre-training",
        train,
        SOAP=(of(get_optimizer, "adamw"), rates),
        AdamW=(of(get_theirs, "adamw"), rates),
        Muon=(of(get_theirs, "muon"), rates),
    )
