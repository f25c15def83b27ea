"""Load a model in a process of its own and write how much memory the load took: `python memory_run.py MODEL OUT.json`.

OUT: {"weights_bytes": parameters and buffers of the loaded model, "peak_bytes": highest anonymous resident size while
loading less that just before, "after_bytes": likewise at the end}. Anonymous: what the process allocated; libraries' code
that is paged in as it is first used is not memory that a loader holds.
"""

import gc
import json
import os
import sys
import threading
from pathlib import Path

SAMPLE_S = 0.002


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak(threading.Thread):
    """The highest anonymous memory between start() and finish(), sampled."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.stopping = anonymous_bytes(), threading.Event()

    def run(self) -> None:
        while not self.stopping.wait(SAMPLE_S):
            self.highest = max(self.highest, anonymous_bytes())

    def finish(self) -> int:
        self.stopping.set()
        self.join()
        return max(self.highest, anonymous_bytes())


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM
    from vllm.utils.import_utils import has_cutedsl
    from vllm_nvfp4.model_loader import Nvfp4ModelLoader

    # vLLM's attention asks this while layers are made, which imports CuTe DSL: 40 MB of modules that no loader holds.
    has_cutedsl()
    found: dict[str, int] = {}
    load = Nvfp4ModelLoader.load_model

    def measured(self, *args, **kwargs):
        gc.collect()
        before, peak = anonymous_bytes(), Peak()
        peak.start()
        model = load(self, *args, **kwargs)
        found["peak_bytes"] = peak.finish() - before
        found["after_bytes"] = anonymous_bytes() - before
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(model)}
        found["weights_bytes"] = sum(storages.values())
        return model

    Nvfp4ModelLoader.load_model = measured
    LLM(model=sys.argv[1], max_model_len=512, max_num_seqs=1, distributed_executor_backend="uni")
    Path(sys.argv[2]).write_text(json.dumps(found))


def tensors_of(model):
    """Every parameter and buffer, and the packed copies that vLLM's CPU path keeps as plain attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        packed = getattr(module, "_wo_a_packed", None)
        if packed is not None:
            yield packed


if __name__ == "__main__":
    main()
