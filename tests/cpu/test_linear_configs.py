"""scripts/bench/linear_configs.py without a GPU: specs, rows with a kernel that is made up, and the fit."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cutedsl.kernels import grouped_gemm_sm90 as gemm

NAMES = ("common", "linear", "linear_configs")
TIMES_US = {"128xN": [0.6, 2.0, 1.5, 0.0], "128xN,even": [0.7, 6.0, 0.0, 0.5], "128xN,k4": [0.6, 4.5, 1.0, 0.0]}


@pytest.fixture
def configs(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(root / "scripts" / "bench"))
    yield importlib.import_module("linear_configs")
    for name in NAMES:
        del sys.modules[name]


def made_up(configs: ModuleType) -> list[dict[str, Any]]:
    """Rows whose times are exactly those of TIMES_US."""
    found = []
    for spec, times in TIMES_US.items():
        for name in configs.linear.SHAPES:
            for m in (128, 256, 512):
                row = {"shape": name, "m": m, "spec": spec, "ok": True, "commit": "c0ffee"}
                us = sum(x * y for x, y in zip(configs.factors(row), times, strict=True))
                found.append(row | {"us": us})
    return found


def test_specs(configs: ModuleType) -> None:
    assert configs.fields("128xN,even", 5) == {"tile_w": 128, "tile_n": 8, "even": True}
    assert configs.fields("256xN,k4,c4", 33) == {"tile_w": 256, "tile_n": 64, "cluster_k": 4, "num_consumers": 4}
    assert configs.fields("256xN,w2", 65) == {"tile_w": 256, "tile_n": 128, "cluster_w": 2}
    assert configs.fields("128x64", 512)["tile_n"] == 64
    shape = gemm.Shape(20, 4096, 4096)
    assert configs.config("128xN,k2", shape) == gemm.largest_config("bf16", 128, 32, cluster_k=2, one_group=True)
    assert configs.config("chosen", shape) == gemm.choose_config(shape, "bf16")
    for spec in configs.SPECS.split(";"):
        if spec != "cublas":
            configs.config(spec, shape)


@pytest.mark.parametrize("spec", ["128xN,list", "128xN,u", "128xN,k", "128xN,s4", "128xN,", "128", "Nx128", "cublas2"])
def test_unknown_part(configs: ModuleType, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected"):
        configs.fields(spec, 8)
    monkeypatch.setattr(sys, "argv", ["linear_configs.py", "--specs", f"cublas;{spec}"])
    with pytest.raises(ValueError, match="expected"):
        configs.main()


def test_rows(configs: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The contract of the kernel is kept, each spec gets its own, and a wrong one is noticed."""
    dense, copies = configs.weights(128, 256, torch.device("cpu"))
    seen = []

    def compiled(config: gemm.Config) -> Any:
        def kernel(x: torch.Tensor, *others: Any) -> None:
            seen.append(config)
            others[5].copy_(x.float() @ dense.t() * (1.5 if config.cluster_k == 2 else 1.0))

        return kernel

    monkeypatch.setattr(gemm, "compiled", compiled)
    rows = configs.measure(dense, copies, 3, ["cublas", "chosen", "128xN,k2", "128xN,even", "128xN,even,k2"], 2)
    assert [row["spec"] for row in rows] == ["cublas", "chosen", "128xN,k2", "128xN,even"]
    assert [row["ok"] for row in rows] == [True, True, False, True]
    assert {str(config) for config in seen} == {row["config"] for row in rows[1:]}
    assert "not measured: 128xN,even,k2 at 3 tokens" in capsys.readouterr().err


def test_fit(configs: ModuleType) -> None:
    rows = made_up(configs)
    wrong = rows[0] | {"us": 1e6, "ok": False}
    peer = rows[0] | {"us": 1.0, "spec": "cublas"}
    fits = configs.fit([*rows, wrong, peer])
    assert list(fits) == [("to 2048", spec) for spec in TIMES_US]
    for spec, times in TIMES_US.items():
        times_us, error, num_rows = fits["to 2048", spec]
        assert times_us == pytest.approx(times, abs=1e-3)
        assert (error < 1e-4, num_rows) == (True, 3 * len(configs.linear.SHAPES))
    assert configs.slower(rows, fits) == []
    # The fits are as before, but what they choose was measured to be slower.
    best = min((row for row in rows if (row["shape"], row["m"]) == ("pro.wo_b", 256)), key=lambda row: row["us"])
    slowed = [*(row for row in rows if row is not best), best | {"us": 1000.0}]
    (line,) = configs.slower(slowed, fits)
    assert line.startswith(f"pro.wo_b m=256 (c0ffee): {best['spec']} 1000.0 us, best ")


def test_few_rows_are_not_fitted(configs: ModuleType) -> None:
    assert configs.fit(made_up(configs)[: configs.MIN_ROWS - 1]) == {}


def test_rows_of_the_repository(
    configs: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times in `_splits` of clusters and of even shares, where tokens are many, are those of the rows."""
    path = root / "docs" / "bench" / "linear_configs.jsonl"
    monkeypatch.setattr(sys, "argv", ["linear_configs.py", "--fit", str(path)])
    assert configs.main() == 0
    assert "128xN,even" in capsys.readouterr().out
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["m"] in configs.MS]
    fits = configs.fit(rows)
    for tokens, cls in (
        (gemm.MANY_TOKENS, f"to {gemm.MANY_TOKENS}"),
        (gemm.MANY_TOKENS + 1, f"above {gemm.MANY_TOKENS}"),
    ):
        for split in gemm._splits(tokens):
            tile = f"{split.tile_w}x{'N' if split.tile_n == gemm.LARGE_TILE_N else split.tile_n}"
            spec = tile + ",even" * split.even + f",k{split.cluster_k}" * (split.cluster_k > 1)
            times = [getattr(split, term) for term in configs.TERMS]
            assert fits[cls, spec][0] == pytest.approx(times, rel=0.03, abs=0.05), f"{cls}: {spec}"
