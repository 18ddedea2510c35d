"""The README's examples run."""

import inspect
import re
from pathlib import Path

import pytest

import soap_optax

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code):
    exec(compile(code, "README.md", "exec"), {})


def test_every_option_is_in_the_table():
    keywords = [
        name
        for name, parameter in inspect.signature(soap_optax.soap).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    table = README.split("## What to change first")[1].split("## Two commands")[0]
    assert all(f"`{name}`" in table for name in keywords)


def test_functions_that_belong_together_have_the_same_options():
    def options(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    soap = options(soap_optax.soap)
    assert options(soap_optax.scale_by_soap) == soap
    wrapper = options(soap_optax.in_eigenbasis)
    wrapper.pop("first_moments")
    soap.pop("clip_update_rms"), wrapper.pop("clip_update_rms")
    soap.pop("factorized")
    assert wrapper == soap
    assert options(soap_optax.scale_by_shampoo) == options(soap_optax.shampoo)
