"""`DropIn`: the signature of a layer that takes the place of a Keras layer."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from keras_vdrop.layers.foreign_arguments import refuse_foreign_arguments
from keras_vdrop.layers.rematerialization import Rematerialized

# Values of arguments that older configs lack. With them, the optimizer state in the same file still fits.
_BEFORE_RATES = {"log_variance_rate": 1.0}


class DropIn:
    """Mixin for `class VariationalX(..., keras.layers.X)` that takes X's arguments, in X's order, and our keywords.

    A constructor `(*args, ..., **kwargs)` turns its arguments into keywords by `_bind`. `help` and editors show a
    composed signature: Keras's arguments, then the keywords of our constructors.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A constructor with `*args` passes its arguments on, so its own signature says little.
        passes_on = inspect.getfullargspec(cls.__init__).varargs
        cls.__signature__ = cls._composed_signature() if passes_on else _signature_of(cls.__init__)

    @classmethod
    def _keras_arguments(cls) -> dict[str, inspect.Parameter]:
        """Return the parameters of the Keras layer's constructor, by name, without its `**kwargs`."""
        keras_layer = next(base for base in cls.__mro__ if not issubclass(base, (DropIn, Rematerialized)))
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        return _arguments(keras_layer.__init__, *kinds)

    @classmethod
    def _own_arguments(cls) -> dict[str, inspect.Parameter]:
        """Return the keyword-only parameters of our constructors, by name."""
        own = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, DropIn) and "__init__" in vars(base):
                own.update(_arguments(base.__init__, inspect.Parameter.KEYWORD_ONLY))
        return own

    @classmethod
    def _composed_signature(cls) -> inspect.Signature:
        theirs = cls._keras_arguments()
        own = [parameter for name, parameter in cls._own_arguments().items() if name not in theirs]
        return inspect.Signature([*theirs.values(), *own, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])

    @classmethod
    def _bind(cls, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Name the positional arguments, as Python would for the Keras layer, and merge them with the keywords."""
        names = list(cls._keras_arguments())
        if len(args) > len(names):
            raise TypeError(f"{cls.__name__} takes at most {len(names)} positional arguments. Received: {len(args)}")
        named = dict(zip(names, args))
        refuse_foreign_arguments(cls, kwargs)
        if twice := set(named) & set(kwargs):
            raise TypeError(f"{cls.__name__} got multiple values for {sorted(twice)}.")
        return {**named, **kwargs}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        keras_layer: Any = super()
        return keras_layer.from_config({**_BEFORE_RATES, **config})


def _signature_of(method: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a method without `self` and annotations: Keras has none, and the stubs have all."""
    signature = inspect.signature(method)
    parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return signature.replace(parameters=parameters[1:])


def _arguments(method: Callable[..., Any], *kinds: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a method that are of the given kinds, by name."""
    parameters = _signature_of(method).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}
