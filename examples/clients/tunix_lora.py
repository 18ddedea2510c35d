"""Tunix trains a tiny Llama, and then adapters of LoRA on it, with SOAP.

`PeftTrainer` trains all parameters on the text of one module of Python, and then
adapters by Qwix on another one. `make test-clients` runs this file.
"""

import argparse
import functools
import typing

import jax
import numpy as np
import qwix
from common import compare, nadam, schedule, text
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer, utils

import soap_optax

STEPS, MASK = 100, np.ones((16, 48), bool)
SIZES = {"num_layers": 2, "vocab_size": 256, "embed_dim": 64, "hidden_dim": 128}
SIZES |= {"num_heads": 4, "head_dim": 16, "num_kv_heads": 2}


def model_input(batch):
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


def fit(model, tx, module):
    tokens = text(STEPS + 1, rows=16, context=47, module=module)
    batches = [peft_trainer.TrainingInput(batch, MASK) for batch in tokens]
    config = peft_trainer.TrainingConfig(eval_every_n_steps=STEPS, max_steps=STEPS)
    trainer = peft_trainer.PeftTrainer(model, tx, config)
    trainer.with_gen_model_input_fn(model_input).train(batches[1:], batches[:1])
    return trainer.metrics_logger.get_metric_history("", "loss", "eval")[-1]


def train(tx):
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0)
    inputs = {"rngs": nnx.Rngs(1)} | BASE.get_model_input()
    model = qwix.apply_lora_to_model(nnx.clone(BASE), provider, **inputs)
    return fit(model, tx, argparse)


if __name__ == "__main__":
    jax.set_mesh(jax.make_mesh((1, 1), ("fsdp", "tp")))
    config = llama3.ModelConfig(**SIZES, rope_theta=10_000, norm_eps=1e-5)
    BASE = llama3.Llama3(config, rngs=nnx.Rngs(0))
    loss = fit(BASE, soap_optax.soap(schedule(1e-2, STEPS), nesterov=True), typing)
    print(f"google-tunix, all parameters: SOAP ended at a loss of {loss:.4g}")
    soap = functools.partial(soap_optax.soap, nesterov=True, one_sided=True)
    rates = (1e-2, 3e-2, 1e-1)
    runs = {"SOAP": (soap, rates), "NAdam": (nadam, rates)}
    compare("google-tunix", "LoRA", train, STEPS, limit=2.0, **runs)
