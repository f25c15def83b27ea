"""The simulator against silicon: every probe must do here what it did on the GPU that tests/data/probes was recorded on.

The recording is made by scripts/record_probes.py; recording.json says when, on which GPU and with which driver. A test runs
a family of probes and lists everything that differs.
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
# Maps that break a documented rule which this driver does not enforce; the check does.
STRICTER = {"bad_interleave_32_swizzle"}


@pytest.fixture(scope="module")
def recording() -> dict[str, dict]:
    return json.loads((DATA / "recording.json").read_text())


@pytest.fixture(scope="module")
def recorded_output(recording):
    """Return a function of (probe, buffer): the bytes that the GPU left there."""
    blob = np.frombuffer(lzma.decompress((DATA / "outputs.xz").read_bytes()), dtype=np.uint8)

    def output(name: str, buffer: str) -> np.ndarray:
        at, size = recording["cases"][name]["outputs"][buffer]
        return blob[at : at + size]

    return output


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


def test_every_probe_ended_as_it_should(recording):
    """The GPU ends only those launches with an error that are meant to fail, and with the right one."""
    wrong = {}
    for name, case in CASES.items():
        error = recording["cases"][name].get("error", "")
        if bool(error) != bool(case.fails) or not error.endswith(case.fails):
            wrong[name] = error
    assert wrong == {}


def test_no_wait_of_a_probe_timed_out(recorded_output):
    """A bounded wait runs out only where the simulator must find a deadlock."""
    stuck = {n for n, case in CASES.items() if "status" in case.outputs and not case.fails}
    stuck = {name for name in stuck if recorded_output(name, "status").any()}
    assert stuck == {name for name, case in CASES.items() if case.finding == "deadlock"}


def floats(data, kind):
    if kind == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return data.view({"f32": np.float32, "f16": np.float16}[kind]).astype(np.float64)


def difference(case, got, want):
    """Say how the bytes differ, or the floats by more than approximate instructions may; "" if they do not."""
    if case.rtol == case.atol == 0.0:
        at = np.flatnonzero(got != want)
        if not at.size:
            return ""
        first = at[0] // 4 * 4
        values = [array[first : first + 16].tobytes().hex(" ", 4) for array in (got, want)]
        return f"{at.size} of {got.size} bytes, first at {at[0]}: simulated {values[0]}, GPU {values[1]}"
    mine, theirs = floats(got, case.float_type), floats(want, case.float_type)
    with np.errstate(invalid="ignore"):
        close = np.abs(mine - theirs) <= case.rtol * np.abs(theirs) + case.atol
    outside = np.flatnonzero(~(close | (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))))
    return f"simulated {mine[outside][:4]}, GPU {theirs[outside][:4]}" if outside.size else ""


def run_probe(name, policy, entry, recorded_output):
    """Run a probe and return what differs from the recording."""
    case = CASES[name]
    maps = [bytes.fromhex(text) for text in entry.get("maps", [])]
    try:
        outputs, report = simulated(case, policy, seed=len(name), maps=maps)
    except Unsupported as error:
        return [f"unsupported: {error}"]
    found = sorted({finding.code for finding in report.findings})
    if found != [case.finding] * bool(case.finding):
        return [f"findings {[f'{f.code}: {f.message}' for f in report.findings]}, expected {case.finding or 'none'}"]
    if case.finding:
        return []
    texts = {buffer: difference(case, outputs[buffer], recorded_output(name, buffer)) for buffer in case.outputs}
    return [f"{buffer}: {text}" for buffer, text in texts.items() if text]


FAMILIES: dict[str, list[str]] = {}
for _name, _case in CASES.items():
    if _case.compared:
        FAMILIES.setdefault(_name.split("/")[0], []).append(_name)


@pytest.mark.parametrize("family", FAMILIES)
def test_simulator_does_what_the_gpu_did(family, recording, recorded_output):
    wrong = []
    for name in FAMILIES[family]:
        for policy in POLICIES if CASES[name].is_async else POLICIES[:1]:
            texts = run_probe(name, policy, recording["cases"][name], recorded_output)
            wrong += [f"{name}, {policy}: {text}" for text in texts]
    if wrong:
        pytest.fail(f"{len(wrong)} differences\n" + "\n".join(wrong), pytrace=False)


def test_what_is_recorded_only_says_why():
    assert [name for name, case in CASES.items() if not case.compared and not case.note] == []


def maps_recorded(recording):
    """Yield (name, our map, address, bytes): the table's, and every probe's."""
    for name, entry in recording["tensor_maps"].items():
        if "hex" in entry:
            yield name, TABLE[name], entry["address"], bytes.fromhex(entry["hex"])
    for name, entry in recording["cases"].items():
        for i, text in enumerate(entry.get("maps", [])):
            data = bytes.fromhex(text)
            yield name, CASES[name].maps[i], int.from_bytes(data[:8], "little"), data


def test_tensor_maps_encode_as_the_driver_does(recording):
    wrong = {}
    n = 0
    for name, tensor, address, data in maps_recorded(recording):
        mine = tensormap.encode(as_simulated(tensor, address))
        hint = 1 << 21  # "large tensor": of no effect, see tensormap.py
        word = int.from_bytes(data[8:12], "little")
        data = data[:8] + (word & ~hint).to_bytes(4, "little") + data[12:64]
        if mine[:64] != data:
            wrong[name] = (mine[:64].hex(" ", 4), data.hex(" ", 4))
        n += 1
    assert wrong == {}
    assert n >= 200


def test_tensor_maps_decode_to_what_was_asked_for(recording):
    wrong = {}
    for name, tensor, address, data in maps_recorded(recording):
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
        if want.element != got.element:
            different.append("dtype")
        if different:
            wrong[name] = different
    assert wrong == {}


def test_static_check_refuses_what_the_driver_refused(recording):
    wrong = {}
    for name, entry in recording["tensor_maps"].items():
        faults = tensormap.check(as_simulated(TABLE[name], entry["address"]), arch="sm_90a")
        if bool(faults) != ("error" in entry or name in STRICTER):
            wrong[name] = faults or entry
    assert wrong == {}
    assert set(recording["tensor_maps"]) == set(TABLE)
