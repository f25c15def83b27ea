"""Put our methods in front of an upstream class that is only known at run time (CPU or NVIDIA)."""

from typing import Any

# What mixins inherit: to the type checker anything, at run time nothing.
Upstream: Any = object


_classes: dict[tuple[type, type], type] = {}


def in_front_of(mixin: type, base: type) -> type:
    """A subclass of `base` whose methods are looked up in `mixin` first; one class for each pair."""
    if (mixin, base) not in _classes:
        _classes[mixin, base] = type(f"Nvfp4{base.__name__}", (mixin, base), {})
    return _classes[mixin, base]
