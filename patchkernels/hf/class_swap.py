"""Changes what one module does by swapping the class of that instance.

:func:`swap_class` gives a module a subclass of its class in which a mixin comes first; :func:`restore_class` undoes
this. Unlike a ``forward`` set on the instance, the swap survives ``deepcopy`` and pickling: a copy runs on its own
weights. Parameters, hooks, ``state_dict`` and ``isinstance`` stay as they were. The subclass has the name of
the original class, because ``save_pretrained`` writes that name into the model's configuration.
"""

from __future__ import annotations

import functools
from typing import Any


class SwappedClass:
    """The base of all mixins, and so of all classes that :func:`swap_class` makes."""

    _patch_state: Any  # the `state` that swap_class received for this module
    _patch_original_class: Any
    _patch_mixin: Any

    @classmethod
    def attributes_for(cls, original_class: Any) -> dict[str, Any]:
        """Attributes of the swapped class that depend on the original class; none by default."""
        return {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Makes ``type(module)(...)`` an ordinary module, as ``from_pretrained`` of that class does."""
        self.__class__ = type(self)._patch_original_class
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the original class and the mixin, since pickle cannot find the class made of them by its name."""
        cls = type(self)
        return new_instance, (cls._patch_original_class, cls._patch_mixin), self.__dict__.copy()

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("an enabled model takes no nn.DataParallel; run one process per GPU (torchrun)")


def swap_class(module: Any, mixin: Any, state: Any) -> None:
    """Puts ``mixin`` before the class of ``module``; the mixin's methods find ``state`` as ``self._patch_state``.

    Raises:
        ValueError: the module has that mixin already, with another state.
    """
    if isinstance(module, mixin):
        raise ValueError(
            f"a {type(module).__name__} of this model is part of another enabled model; disable that first"
        )
    original_class: Any = type(module)
    module.__class__ = swapped_class(original_class, mixin)
    module._patch_state = state


def restore_class(module: Any) -> None:
    """Restores the class that ``module`` had before :func:`swap_class`. Has no effect on any other module."""
    if isinstance(module, SwappedClass):
        vars(module).pop("forward", None)  # that of the swapped class, which accelerate's hooks leave behind
        module.__class__ = type(module)._patch_original_class
        del module._patch_state


def check_restorable(module: Any) -> None:
    """Raises ``ValueError`` if a swapped module has another class by now, or a forward on the instance."""
    cls = type(module)
    if not isinstance(module, SwappedClass):
        return
    if cls is not swapped_class(cls._patch_original_class, cls._patch_mixin):
        raise ValueError(
            f"a {cls.__name__} was given another class after the model was enabled, by parametrize or fully_shard for "
            "example: undo that first"
        )
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not cls.forward:
        raise ValueError(
            f"the forward of a {cls.__name__} was replaced after the model was enabled, by accelerate's hooks for "
            "example: remove them first (accelerate.hooks.remove_hook_from_submodules)"
        )


@functools.cache
def swapped_class(original_class: Any, mixin: Any) -> Any:
    """The subclass of ``original_class`` with ``mixin`` before it; the same class for the same arguments."""
    attributes = {
        "__module__": original_class.__module__,
        "__qualname__": original_class.__qualname__,
        "__doc__": original_class.__doc__,
        "_patch_original_class": original_class,
        "_patch_mixin": mixin,
        **mixin.attributes_for(original_class),
    }
    return type(original_class.__name__, (mixin, original_class), attributes)


def new_instance(original_class: Any, mixin: Any) -> Any:
    """An instance of the swapped class without attributes, which ``pickle`` and ``deepcopy`` then fill."""
    cls = swapped_class(original_class, mixin)
    return cls.__new__(cls)
