"""The simulator against silicon: every probe must do here what it did on the GPU that tests/data/probes was recorded on.

The recording is made by scripts/record_probes.py; recording.json says when, on which GPU and with which driver.
"""

import json
import lzma
import pathlib

import numpy as np
import pytest
from probes.cases import all_cases
from probes.maps import table
from probes.run import as_simulated, simulated

from ptxsim import tensormap
from ptxsim.findings import Unsupported

DATA = pathlib.Path(__file__).resolve().parents[1] / "data" / "probes"
CASES = all_cases()
TABLE = table()
POLICIES = ("eager", "random", "lazy")

# Probes of instructions that the simulator does not know, and why it need not. Each must raise Unsupported: once it is
# known, its line goes. Keys are names or their beginnings.
UNSUPPORTED: dict[str, str] = {}
# Findings that a probe provokes on purpose.
EXPECTED_FINDINGS: dict[str, set[str]] = {}


def reason_unsupported(name: str) -> str | None:
    return next((reason for key, reason in UNSUPPORTED.items() if name.startswith(key)), None)


@pytest.fixture(scope="module")
def recording() -> dict[str, dict]:
    return json.loads((DATA / "recording.json").read_text())


@pytest.fixture(scope="module")
def blob() -> np.ndarray:
    return np.frombuffer(lzma.decompress((DATA / "outputs.xz").read_bytes()), dtype=np.uint8)


def test_recording_names_its_origin(recording):
    assert {"date", "gpu", "driver", "cuda_driver_api", "compute_capability"} <= set(recording["recorded_on"])
    assert recording["recorded_on"]["compute_capability"] == "9.0"


def test_every_probe_is_recorded_as_it_is_now(recording):
    """A probe whose text or data changed must be recorded again on a GPU."""
    stale = []
    for name, case in CASES.items():
        entry = recording["cases"].get(name)
        if entry is None or (entry["ptx_sha256"], entry["data_sha256"]) != (case.ptx_sha256(), case.data_sha256()):
            stale.append(name)
    assert stale == []
    assert set(recording["cases"]) == set(CASES)


def test_every_probe_ran(recording):
    errors = {name: entry["error"] for name, entry in recording["cases"].items() if "error" in entry}
    assert errors == {}


def test_no_wait_of_a_probe_timed_out(recording, blob):
    stuck = []
    for name in CASES:
        if "status" in recording["cases"][name]["outputs"]:
            at, size = recording["cases"][name]["outputs"]["status"]
            if blob[at : at + size].any():
                stuck.append(name)
    assert stuck == []


def compare(case, buffer, got, want):
    """Compare bytes, or within the stated error for approximate instructions; return the worst error in ulps."""
    if case.rtol == case.atol == 0.0:
        if not np.array_equal(got, want):
            at = np.flatnonzero(got != want)
            pytest.fail(
                f"{buffer}: {at.size} of {got.size} bytes differ, first at {at[0]}: "
                f"simulated {got[at[0] // 4 * 4 :][:16].tobytes().hex(' ', 4)}, "
                f"GPU {want[at[0] // 4 * 4 :][:16].tobytes().hex(' ', 4)}"
            )
        return 0.0
    mine, theirs = (array.view(np.float32).astype(np.float64) for array in (got, want))
    assert np.array_equal(np.isnan(mine), np.isnan(theirs))
    infinite = np.isinf(theirs)
    assert np.array_equal(mine[infinite], theirs[infinite])
    finite = np.isfinite(theirs)
    mine, theirs = mine[finite], theirs[finite]
    error = np.abs(mine - theirs)
    outside = np.flatnonzero(~(error <= case.rtol * np.abs(theirs) + case.atol))
    assert outside.size == 0, f"simulated {mine[outside][:4]}, GPU {theirs[outside][:4]}"
    spacing = np.spacing(np.abs(theirs).astype(np.float32)).astype(np.float64)
    return float(np.max(error / spacing, initial=0.0))


RUNS = [
    pytest.param(name, policy, id=f"{name}-{policy}")
    for name, case in CASES.items()
    if case.compared
    for policy in (POLICIES if case.is_async else POLICIES[:1])
]


@pytest.mark.parametrize(("name", "policy"), RUNS)
def test_simulator_does_what_the_gpu_did(name, policy, recording, blob, record_property):
    case = CASES[name]
    if reason_unsupported(name) is not None:
        with pytest.raises(Unsupported):
            simulated(case, policy)
        return
    outputs, report = simulated(case, policy, seed=len(name))
    assert {finding.code for finding in report.findings} == EXPECTED_FINDINGS.get(name, set()), report.findings
    worst = 0.0
    for buffer in case.outputs:
        at, size = recording["cases"][name]["outputs"][buffer]
        worst = max(worst, compare(case, buffer, outputs[buffer], blob[at : at + size]))
    if case.rtol or case.atol:
        record_property("worst_error_in_ulps", worst)


def maps_recorded():
    """Yield (name, our map, address, bytes): the table's, and every probe's."""
    found = json.loads((DATA / "recording.json").read_text()) if (DATA / "recording.json").exists() else None
    if found is None:
        return
    for name, entry in found["tensor_maps"].items():
        if "hex" in entry:
            yield name, TABLE[name], entry["address"], bytes.fromhex(entry["hex"])
    for name, entry in found["cases"].items():
        for i, text in enumerate(entry.get("maps", [])):
            data = bytes.fromhex(text)
            yield name, CASES[name].maps[i], int.from_bytes(data[:8], "little"), data


def test_tensor_maps_encode_as_the_driver_does():
    wrong = {}
    n = 0
    for name, tensor, address, data in maps_recorded():
        mine = tensormap.encode(as_simulated(tensor, address))
        hint = 1 << 21  # "large tensor": of no effect, see tensormap.py
        word = int.from_bytes(data[8:12], "little")
        data = data[:8] + (word & ~hint).to_bytes(4, "little") + data[12:64]
        if mine[:64] != data:
            wrong[name] = (mine[:64].hex(" ", 4), data.hex(" ", 4))
        n += 1
    assert wrong == {}
    assert n >= 200


def test_tensor_maps_decode_to_what_was_asked_for():
    wrong = {}
    for name, tensor, address, data in maps_recorded():
        want, got = as_simulated(tensor, address), tensormap.decode(data)
        fields = (
            "global_address",
            "dims",
            "strides_bytes",
            "box",
            "element_strides",
            "swizzle",
            "interleave",
            "oob_fill",
        )
        different = [field for field in fields if getattr(want, field) != getattr(got, field)]
        # The descriptor does not tell signed from unsigned integers, nor does the hardware.
        if want.element.code != got.element.code and got.dtype not in ("u32", "s32", "u64", "s64"):
            different.append("dtype")
        if different:
            wrong[name] = different
    assert wrong == {}


def test_static_check_refuses_what_the_driver_refused(recording):
    wrong = {}
    for name, entry in recording["tensor_maps"].items():
        faults = tensormap.check(as_simulated(TABLE[name], entry["address"]), arch="sm_90a")
        if bool(faults) != ("error" in entry):
            wrong[name] = faults or entry
    assert wrong == {}
    assert set(recording["tensor_maps"]) == set(TABLE)
