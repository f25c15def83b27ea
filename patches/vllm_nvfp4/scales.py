"""One check for every scale that leaves a load: a scale that is not a positive finite number stops it, by name."""

import torch

from vllm_nvfp4.checkpoint import CheckpointError

E4M3_NAN_MAGNITUDE = 0x7F


def bad_block_scale(scale: torch.Tensor) -> str | None:
    """What is wrong with e4m3 block scales, or None; works on the bytes, so nothing is widened.

    A block scale of 0 is legal (a block of zeros); NaN and negative numbers are not. Good bytes are read once, by one thread:
    a checkpoint has a hundred gigabytes of scales, and torch's threads wait for each other where ranks share the cores.
    """
    bits = scale.detach().view(torch.uint8)
    if not bits.numel() or int((bits.numpy() if bits.is_cpu else bits).max()) < E4M3_NAN_MAGNITUDE:
        return None
    if bool(((bits & 0x7F) == E4M3_NAN_MAGNITUDE).any()):
        return "NaN"
    if bool((bits > 0x80).any()):
        return "negative"
    return None


def bad_global_scale(value: float) -> str | None:
    """What is wrong with a global scale, or None."""
    if value != value:
        return "NaN, or never loaded"
    if value in (float("inf"), float("-inf")):
        return "infinite"
    if value == 0:
        return "zero"
    return "negative" if value < 0 else None


def check_scales(module: str, block_scale: torch.Tensor, **global_scales: torch.Tensor) -> None:
    """Refuse a module with an unusable scale.

    Args:
        module: vLLM's prefix, for the message.
        block_scale: e4m3, any shape.
        global_scales: name of the leaf -> fp32 tensor, one number a shard or expert.
    Raises: CheckpointError - names the module, the leaf, the position and the value.
    """
    problem = bad_block_scale(block_scale)
    if problem:
        raise CheckpointError(
            f"{module}.weight_scale holds a {problem} block scale (parameters start as NaN: it may never have been "
            "loaded); export or download the checkpoint again"
        )
    for leaf, values in global_scales.items():
        ok = torch.isfinite(values) & (values > 0)
        if not bool(ok.all()):
            index = tuple(int(i) for i in (~ok).nonzero()[0])
            value = float(values[index])
            raise CheckpointError(
                f"{module}.{leaf}{list(index)} is {value} ({bad_global_scale(value)}); expected a positive finite "
                "number. Calibrate and export the checkpoint again; an expert that calibration never reached has no "
                "input_scale"
            )
