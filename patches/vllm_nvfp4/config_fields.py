"""The fields of DeepSeek-V4's `config.json` that vLLM lacks in one spelling or the other, derived; needs no vLLM.

Transformers writes `layer_types`, `compress_rates` and `mlp_layer_types`; vLLM's model reads `compress_ratios` and
`num_hash_layers`. `config.py` builds vLLM's class on this and the doctor reads checkpoints with it: both refuse the same.
"""

from collections.abc import Callable
from typing import Any

# transformers' layer types, and the key of `compress_rates` each takes its ratio from.
LAYER_RATIO_KEY = {
    "sliding_attention": None,
    "compressed_sparse_attention": "compressed_sparse_attention",
    "heavily_compressed_attention": "heavily_compressed_attention",
}
KNOWN_RATIOS = (0, 1, 4, 128)


def declares_nvfp4(declared: Any) -> bool:
    """True for a quantization_config of ModelOpt's NVFP4, or of DeepSeek's FP8 format with NVFP4 experts."""
    if not isinstance(declared, dict):
        return False
    method = str(declared.get("quant_method", "")).lower()
    if method.startswith("modelopt"):
        nested = declared.get("quantization")
        algo = declared.get("quant_algo") or (nested.get("quant_algo") if isinstance(nested, dict) else None)
        return str(algo or "").upper() == "NVFP4"
    return method in ("fp8", "deepseek_v4_fp8") and str(declared.get("moe_quant_algo") or "").upper() == "NVFP4"


def compress_ratios(layer_types: list[str], compress_rates: dict[str, int]) -> list[int]:
    """ratio[i] = compress_rates[layer_types[i]], 0 for sliding attention.

    Raises: ValueError - an unknown layer type, or a type without its rate.
    """
    ratios = []
    for layer, kind in enumerate(layer_types):
        if kind not in LAYER_RATIO_KEY:
            raise ValueError(
                f"config.json: layer_types[{layer}] is {kind!r}; expected one of {sorted(LAYER_RATIO_KEY)}. "
                "Is this a DeepSeek-V4 configuration?"
            )
        key = LAYER_RATIO_KEY[kind]
        if key is not None and key not in compress_rates:
            raise ValueError(
                f"config.json: layer_types[{layer}] is {kind!r}, but compress_rates has no {key!r} "
                f"(found {sorted(compress_rates)}); export the configuration again"
            )
        ratios.append(0 if key is None else int(compress_rates[key]))
    return ratios


def num_hash_layers(mlp_layer_types: list[str]) -> int:
    """The length of the leading run of `hash_moe`.

    Raises: ValueError - a type other than hash_moe or moe, or a hash layer behind a routed one (vLLM can only tell hash
    layers by a count from the front).
    """
    unknown = sorted(set(mlp_layer_types) - {"hash_moe", "moe"})
    if unknown:
        raise ValueError(f"config.json: mlp_layer_types holds {unknown}; expected only 'hash_moe' and 'moe'")
    count = next((i for i, kind in enumerate(mlp_layer_types) if kind != "hash_moe"), len(mlp_layer_types))
    if "hash_moe" in mlp_layer_types[count:]:
        raise ValueError(
            f"config.json: mlp_layer_types has 'hash_moe' at layer {mlp_layer_types.index('hash_moe', count)} behind a "
            "'moe' layer; vLLM supports hash routing in the first layers only"
        )
    return count


def rope_thetas(kwargs: dict[str, Any]) -> dict[str, float]:
    """Top-level rope_theta and compress_rope_theta, filled from the nested `rope_parameters` where absent.

    vLLM's rope builder overwrites the nested thetas with the top-level ones, so these must be there and agree.

    Raises: ValueError - nested and top-level value differ.
    """
    nested = kwargs.get("rope_parameters") or {}
    found: dict[str, float] = {}
    for field, part in (("rope_theta", "main"), ("compress_rope_theta", "compress")):
        inner = (nested.get(part) or {}).get("rope_theta") if isinstance(nested.get(part), dict) else None
        outer = kwargs.get(field)
        if inner is not None and outer is not None and float(inner) != float(outer):
            raise ValueError(
                f"config.json: {field} is {outer}, but rope_parameters[{part!r}]['rope_theta'] is {inner}; "
                "they must be the same number"
            )
        value = outer if outer is not None else inner
        if value is not None:
            found[field] = float(value)
    return found


def normalised(fields: dict[str, Any], problems: list[str] | None = None) -> dict[str, Any]:
    """A copy of config.json's fields in vLLM's spelling: what one spelling lacks is derived from the other.

    Args:
        fields: config.json, or the keyword arguments of its class.
        problems: None - raise at the first contradiction. A list - add every one to it, and derive what can be.
    Raises: ValueError - a contradiction, or a value that no attention kernel has; TypeError - a field of a wrong type.
    """
    found = dict(fields)
    # Consumed here: upstream's validator knows neither of these values.
    mlp_layer_types = found.pop("mlp_layer_types", None)
    layer_types = found.pop("layer_types", None)
    num_layers = found.get("num_hidden_layers")

    def ratios() -> None:
        if layer_types is not None:
            given, derived = (
                found.get("compress_ratios"),
                compress_ratios(layer_types, found.get("compress_rates") or {}),
            )
            found["compress_ratios"] = derived
            _agree("compress_ratios", given, derived, "layer_types and compress_rates")

    def hash_layers() -> None:
        if mlp_layer_types is not None:
            given, count = found.get("num_hash_layers"), num_hash_layers(mlp_layer_types)
            found["num_hash_layers"] = count
            _agree("num_hash_layers", given, count, "mlp_layer_types")

    steps: list[Callable[[], None]] = [
        lambda: _one_per_layer("layer_types", layer_types, num_layers),
        lambda: _one_per_layer("mlp_layer_types", mlp_layer_types, num_layers),
        lambda: _one_per_layer("compress_ratios", found.get("compress_ratios"), num_layers),
        lambda: found.update(rope_thetas(found)),
        ratios,
        hash_layers,
        lambda: _known_ratios(found.get("compress_ratios")),
    ]
    for step in steps:
        try:
            step()
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            if problems is None:
                raise
            problems.append(str(error) if isinstance(error, ValueError) else f"config.json: {error!r}")
    found.setdefault("num_hash_layers", 0)
    # Without it vLLM creates no routing bias, and loading one fails with a KeyError.
    found.setdefault("topk_method", "noaux_tc")
    return found


def _one_per_layer(field: str, entries: list[Any] | None, num_hidden_layers: int | None) -> None:
    """Raise ValueError where a list is too short for the layers; entries behind them belong to MTP layers."""
    if entries is not None and num_hidden_layers is not None and len(entries) < num_hidden_layers:
        raise ValueError(
            f"config.json: {field} has {len(entries)} entries, but num_hidden_layers is {num_hidden_layers}; "
            "compare it with the one of the model's publisher"
        )


def _agree(field: str, given: Any, derived: Any, source: str) -> None:
    """Raise ValueError where a field that is given differs from what other fields imply."""
    if given is not None and given != derived:
        raise ValueError(f"config.json: {field} is {given}, but {source} give {derived}; they must agree")


def _known_ratios(ratios: list[Any] | None) -> None:
    """Raise ValueError for ratios that no attention kernel has; a configuration without any passes."""
    bad = [(i, r) for i, r in enumerate(ratios or []) if r not in KNOWN_RATIOS]
    if bad:
        raise ValueError(
            f"config.json: compress_ratios[{bad[0][0]}] is {bad[0][1]}; vLLM's attention knows {KNOWN_RATIOS}"
        )
