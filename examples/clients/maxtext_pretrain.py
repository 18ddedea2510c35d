"""MaxText pre-trains a tiny model on a mesh of 8 devices with SOAP, and resumes.

Its configuration is maxtext_tiny.yml, and `make test-clients` runs this file.
"""

import functools
import json
import pathlib
import tempfile
import warnings

import jax
from common import compare
from flax import nnx
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train as maxtext
from maxtext.utils import train_utils
from maxtext_soap import get_optimizer

CONFIG = str(pathlib.Path(__file__).with_name("maxtext_tiny.yml"))
FOLDER = tempfile.mkdtemp()
soap = functools.partial(get_optimizer, block_size=16)
theirs, setup = optimizers.get_optimizer, train_utils.setup_train_loop


def setup_and_measure(config, recorder):
    *others, state = setup(config, recorder)
    arrays = jax.tree.leaves(nnx.state(state.optimizer))
    on_device = sum(array.addressable_shards[0].data.nbytes for array in arrays)
    total = sum(array.nbytes for array in arrays)
    print(f"{config.run_name}: {on_device:,} of {total:,} bytes on a device")
    return *others, state


def train(choice, steps=30, **settings):
    optimizers.get_optimizer, opt_type, rate = choice
    metrics = pathlib.Path(FOLDER, f"{steps}.txt")
    settings = {"run_name": opt_type, "enable_checkpointing": False} | settings
    settings |= {"opt_type": opt_type, "learning_rate": rate, "steps": steps}
    settings |= {"base_output_directory": FOLDER, "metrics_file": metrics}
    maxtext.main(["", CONFIG, *(f"{k}={value}" for k, value in settings.items())])
    return json.loads(metrics.read_text().splitlines()[-1])["learning/loss"]


def of(get, opt_type):
    return lambda rate: (get, opt_type, rate)


if __name__ == "__main__":
    warnings.filterwarnings("error", message=".*(blocks|params_sharding)")
    train_utils.setup_train_loop = setup_and_measure
    straight = train((soap, "adamw", 0.01), run_name="soap")
    saved = {"run_name": "resumed", "enable_checkpointing": True}
    for steps in (15, 30):  # The second call resumes where the first one ended.
        loss = train((soap, "adamw", 0.01), steps, **saved)
    assert loss == straight, (loss, straight)
    makes = {"SOAP": of(soap, "adamw"), "AdamW": of(theirs, "adamw")}
    makes["Muon"] = of(theirs, "muon")
    compared = {name: (make, (1e-2, 3e-2, 1e-1)) for name, make in makes.items()}
    compare("maxtext", "pre-training", train, limit=0.01, **compared)
