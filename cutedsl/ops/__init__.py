"""Custom ops: contracts, shapes for the compiler, and dispatch to runners. Importing this package registers all of them.

`cutedsl.ops.<op>` is a module; the function of the same name is inside it: `from cutedsl.ops.linear import linear`.
"""

from cutedsl.ops import linear, moe, quantized_linear, registry, shared_expert, wo_a

__all__ = ["linear", "moe", "quantized_linear", "registry", "shared_expert", "wo_a"]
