"""The examples in the README and in docs/ run, and every option is described."""

import inspect
import re
from pathlib import Path

import pytest
from test_api import public_names

import soap_optax

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    )
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code):
    exec(compile(code, "an example", "exec"), {})


@pytest.mark.parametrize("function", ["soap", "shampoo", "in_eigenbasis"])
def test_every_option_is_described(function):
    """In the table of docs/options.md, and in the docstring of `soap`."""
    table = (ROOT / "docs" / "options.md").read_text()
    documented = {"soap": "", "shampoo": soap_optax.shampoo.__doc__}
    documented["in_eigenbasis"] = soap_optax.in_eigenbasis.__doc__
    docstring = soap_optax.soap.__doc__ + documented[function]
    for name in inspect.signature(getattr(soap_optax, function)).parameters:
        assert f"`{name}`" in table, name
        assert re.search(rf"^ +{name}: ", docstring, re.M), name


def test_every_public_name_is_in_the_api():
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: soap_optax\.(\w+)$", page, re.M)
    assert sorted(listed) == public_names()


def test_functions_that_belong_together_have_the_same_options():
    def options(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def without(options, *names):
        return {k: v for k, v in options.items() if k not in names}

    of_last_part = ("adam_learning_rate", "adam_weight_decay")
    soap = options(soap_optax.soap)
    scale_by_soap = options(soap_optax.scale_by_soap)
    assert scale_by_soap == without(soap, *of_last_part)
    wrapper = options(soap_optax.in_eigenbasis)
    words = ("first_moments", "coordinatewise", "second_moments", "clip_update_rms")
    of_others = ("adam_b1", "adam_b2", "adam_eps")
    of_adam = ("factorized", "nesterov", "clip_update_rms", *of_others)
    assert without(wrapper, *words) == without(scale_by_soap, *of_adam)
    shampoo = options(soap_optax.shampoo)
    assert options(soap_optax.scale_by_shampoo) == without(shampoo, *of_last_part)
    own = ("power", "grafting", "adam_eps", "refresh")
    of_soap = ("factorized", "basis", "clip_update_rms", "refresh", "adam_eps")
    assert without(shampoo, *own) == without(soap, *of_soap)
