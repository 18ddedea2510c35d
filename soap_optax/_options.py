"""Every option once: its name, its type, its default and its rule.

A function declares its options as `**options: Unpack[…]`, which type checkers
understand. The decorator `takes` spells them out in the signature of the function,
where people and `optax.inject_hyperparams` see them. Inside the library the options
travel together, in one dict with a value for each.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypedDict,
    TypeVar,
    cast,
    get_type_hints,
)

import jax
import optax

from soap_optax import _arguments
from soap_optax.refresh import _methods

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Option(NamedTuple):
    """The default of an option, and the rule for its values (see `_arguments`)."""

    default: Any
    rule: _arguments.Rule


class FamilyOptions(TypedDict, total=False):
    """The options that SOAP and Shampoo share; `soap_optax.soap` describes them."""

    shampoo_beta: Annotated[
        jax.typing.ArrayLike | None,
        Option(None, _arguments.optional(_arguments.number(0, 1))),
    ]
    precondition_frequency: Annotated[
        int | Callable[[jax.Array], Any],
        Option(10, _arguments.or_schedule(_arguments.traceable_integer(1))),
    ]
    # The default is None, because optax.inject_hyperparams traces each default that is
    # a number, and a traced number cannot decide which factors exist. The public issue
    # is google-deepmind/optax#412.
    max_precond_dim: Annotated[
        int | None, Option(None, _arguments.optional(_arguments.integer(0)))
    ]
    merge_dims: Annotated[bool, Option(False, _arguments.flag)]
    precondition_1d: Annotated[bool, Option(False, _arguments.flag)]
    one_sided: Annotated[bool, Option(False, _arguments.flag)]
    block_size: Annotated[
        int | None, Option(None, _arguments.optional(_arguments.integer(2)))
    ]
    dimension_numbers: Annotated[
        Any, Option(None, _arguments.tree_or_function("dimension numbers"))
    ]
    factors: Annotated[
        Literal["shampoo", "kl"],
        Option("shampoo", _arguments.choice("shampoo", "kl")),
    ]
    refresh: Annotated[
        Literal["qr", "cholesky_qr", "eigh"] | _methods.RefreshMethod,
        Option("qr", _methods.rule),
    ]
    refresh_tolerance: Annotated[
        jax.typing.ArrayLike | None,
        Option(None, _arguments.optional(_arguments.number(0, 1))),
    ]
    stagger: Annotated[bool, Option(False, _arguments.flag)]
    initial_basis: Annotated[
        Literal["eigh", "identity"],
        Option("eigh", _arguments.choice("eigh", "identity")),
    ]
    precond_dtype: Annotated[
        jax.typing.DTypeLike | None,
        Option(None, _arguments.optional(_arguments.floating_dtype)),
    ]
    pack_factors: Annotated[bool, Option(False, _arguments.flag)]
    precision: Annotated[Any, Option(jax.lax.Precision.HIGH, _arguments.precision)]
    refresh_precision: Annotated[
        Any, Option(jax.lax.Precision.HIGHEST, _arguments.precision)
    ]
    rcond: Annotated[
        jax.typing.ArrayLike | None,
        Option(None, _arguments.optional(_arguments.number(0, 1))),
    ]
    update_rms: Annotated[
        jax.typing.ArrayLike | None,
        Option(None, _arguments.optional(_arguments.positive)),
    ]
    params_sharding: Annotated[
        Any, Option(None, _arguments.tree_or_function("shardings"))
    ]
    refresh_axes: Annotated[
        Sequence[str] | None, Option(None, _arguments.optional(_arguments.strings))
    ]


class EigenbasisOptions(FamilyOptions, total=False):
    """All options: those of `FamilyOptions`, and two that Shampoo fixes."""

    basis: Annotated[
        Literal["previous", "current"],
        Option("previous", _arguments.choice("previous", "current")),
    ]
    clip_update_rms: Annotated[
        jax.typing.ArrayLike | None,
        Option(None, _arguments.optional(_arguments.positive)),
    ]


class AdamOptions(TypedDict, total=False):
    """The settings of Adam for parameters without factors; see `soap_optax.soap`."""

    adam_b1: Annotated[
        jax.typing.ArrayLike | None,
        Option(None, _arguments.optional(_arguments.number(0, 1))),
    ]
    adam_b2: Annotated[
        jax.typing.ArrayLike | None,
        Option(None, _arguments.optional(_arguments.number(0, 1))),
    ]
    adam_eps: Annotated[
        jax.typing.ArrayLike | None,
        Option(None, _arguments.optional(_arguments.number(0))),
    ]


class RateOptions(TypedDict, total=False):
    """Learning rate and weight decay of parameters without factors."""

    adam_learning_rate: Annotated[
        optax.ScalarOrSchedule | None,
        Option(None, _arguments.optional(_arguments.learning_rate)),
    ]
    adam_weight_decay: Annotated[
        optax.ScalarOrSchedule | None,
        Option(None, _arguments.optional(_arguments.weight_decay)),
    ]


class ScaleBySoapOptions(EigenbasisOptions, AdamOptions, total=False):
    """The options of `scale_by_soap`."""


class SoapOptions(ScaleBySoapOptions, RateOptions, total=False):
    """The options of `soap`."""


class ScaleByShampooOptions(FamilyOptions, AdamOptions, total=False):
    """The options of `scale_by_shampoo`."""


class ShampooOptions(ScaleByShampooOptions, RateOptions, total=False):
    """The options of `shampoo`."""


def _check_together(options: Mapping[str, Any]) -> None:
    """Checks the rules that hold between options."""
    if options["stagger"]:
        # The frequency decides which parameters are refreshed together.
        frequency = options["precondition_frequency"]
        if callable(frequency):
            raise ValueError(
                "precondition_frequency must be no schedule if stagger=True, because "
                f"it decides which parameters share a step, got {frequency}"
            )
        _arguments.integer(1)("precondition_frequency", frequency)


def takes(
    options: type[FamilyOptions], **defaults: Any
) -> Callable[[_Function], _Function]:
    """Spells out the options of a function whose last parameter is `**options`.

    The decorated function first checks each option by its rule. Then it calls the
    function with a value for every option. For an unknown argument it raises a
    `TypeError` that names the function and the argument.

    Args:
      options: the class that lists the options.
      **defaults: the defaults in which the function differs from the class.
    """
    known = _options_of(options)

    def decorate(function: _Function) -> _Function:
        own = inspect.signature(function)
        *named, _ = own.parameters.values()
        spelled = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, option.default),
                annotation=annotation,
            )
            for name, (annotation, option) in known.items()
        ]
        signature = own.replace(parameters=[*named, *spelled])

        @functools.wraps(function)
        def with_every_option(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            bound.apply_defaults()
            for name, (_, option) in known.items():
                option.rule(name, bound.arguments[name])
            _check_together(bound.arguments)
            return function(*bound.args, **bound.kwargs)

        with_every_option.__signature__ = signature  # type: ignore[attr-defined]
        return cast(_Function, with_every_option)

    return decorate


def _options_of(options: type[FamilyOptions]) -> dict[str, tuple[Any, Option]]:
    """The type and the `Option` of each option in a class, by name."""
    hints = get_type_hints(options, include_extras=True)
    return {
        name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items()
    }


@takes(EigenbasisOptions)
def complete(**options: Any) -> EigenbasisOptions:
    """Checks options and returns them in a dict, completed by their defaults."""
    return cast(EigenbasisOptions, options)
