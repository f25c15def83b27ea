"""A container of a rendered pod as real processes on this machine, for the kubelet of kubelet.py.

What a container runtime would give, it gets: the manifest's command, arguments and environment and nothing else, the image's
paths and mounts as folders of a test's own, and the manifest's ports as free ones.
"""

import asyncio
import base64
import contextlib
import http.client
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from serving import ROOT, free_port

SOURCES = {"/opt/nvfp4/scripts": ROOT / "scripts"}


class Container:
    """kubelet.Runtime of one container; `manifests` has the ConfigMap and the Secret that it refers to."""

    def __init__(
        self, manifests: list[dict[str, Any]], spec: dict[str, Any], folder: Path, name: str = "server"
    ) -> None:
        self.folder, self.spec, self.log = folder, spec, folder / "server.log"
        (self.raw,) = (c for c in [*spec.get("initContainers", []), *spec["containers"]] if c["name"] == name)
        volumes = {volume["name"] for volume in spec["volumes"]}
        self.places = dict(SOURCES)
        for mount in self.raw["volumeMounts"]:
            assert mount["name"] in volumes, mount
            if mount["mountPath"] != "/dev/shm":
                self.places[mount["mountPath"]] = folder / "volumes" / mount["name"]
        for place in self.places.values():
            place.mkdir(parents=True, exist_ok=True)
        self.ports = {port["name"]: free_port() for port in self.raw.get("ports", [])}
        self.numbers = {str(p["containerPort"]): str(self.ports[p["name"]]) for p in self.raw.get("ports", [])}
        self.environment = self._environment(manifests)
        self.process: asyncio.subprocess.Process | None = None

    @property
    def api_key(self) -> str:
        return self.environment["VLLM_API_KEY"]

    def here(self, text: str) -> str:
        """A text of the manifest with the image's paths and ports as they are here."""
        text = self.numbers.get(text, text)
        for inside, outside in self.places.items():
            text = re.sub(rf"^{inside}(?=/|$)", str(outside), text)
        return text

    def _environment(self, manifests: list[dict[str, Any]]) -> dict[str, str]:
        named = {(m["kind"], m["metadata"]["name"]): m for m in manifests}
        values = {}
        for source in self.raw.get("envFrom", []):
            values |= named["ConfigMap", source["configMapRef"]["name"]]["data"]
        for variable in self.raw.get("env", []):
            reference = variable["valueFrom"]["secretKeyRef"]
            secret = named["Secret", reference["name"]]["data"][reference["key"]]
            values[variable["name"]] = base64.b64decode(secret).decode()
        programs = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        return {"PATH": programs} | {name: self.here(value) for name, value in values.items()}

    def slow_disk(self) -> "SlowDisk":
        """From the next start on, reading /models is as slow as the returned disk says."""
        disk = SlowDisk(self.folder, Path(self.here("/models")))
        self.environment |= disk.environment
        return disk

    async def start(self) -> None:
        command = [self.here(word) for word in [*self.raw["command"], *self.raw.get("args", [])]]
        if command[0] == "python3":
            command[0] = sys.executable
        with self.log.open("a") as out:
            self.process = await asyncio.create_subprocess_exec(
                *command, env=self.environment, cwd=self.folder, stdout=out, stderr=out, start_new_session=True
            )

    async def wait(self) -> int:
        assert self.process
        code = await self.process.wait()
        self._end_all()
        return code

    async def probe(self, command: list[str]) -> bool:
        with (self.folder / "probes.log").open("a") as out:
            process = await asyncio.create_subprocess_exec(
                *map(self.here, command), env=self.environment, cwd=self.folder, stdout=out, stderr=out
            )
        try:
            return await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def signal(self, name: str) -> None:
        if name == "SIGKILL":
            self._end_all()
        elif self.process and self.process.returncode is None:
            self.process.send_signal(getattr(signal, name))

    def _end_all(self) -> None:
        """When a container's first process ends, all others do."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End what is left of it."""
        self._end_all()

    # ---- what a test asks

    def heartbeat(self, suffix: str = "") -> dict[str, Any] | None:
        """A heartbeat file; rank 0's by default."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads(Path(self.environment["NVFP4_STATUS_FILE"] + suffix).read_text())
        return None

    def request(
        self, method: str, path: str, body: str | bytes | None = None, key: str | None = None, port: str = "http"
    ) -> tuple[int, str]:
        """Status and body of a request; status 0: no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=60)
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {self.api_key if key is None else key}",
        }
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def stream(self, num_tokens: int) -> list[str]:
        """The data lines of a streamed completion of so many tokens, until its end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["http"], timeout=120)
        body = {"prompt": [1, 2, 3], "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        body["return_token_ids"] = True
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        lines = [line.decode().strip() for line in answer]
        connection.close()
        return [line.removeprefix("data: ") for line in lines if line]


class SlowDisk:
    """slow_disk.c for a folder: `bytes_per_s` may be set while the server runs; below 0 it hangs, 0 is as fast as it goes."""

    def __init__(self, folder: Path, slow: Path) -> None:
        library, self.rate = folder / "slow_disk.so", folder / "slow_disk.rate"
        source = Path(__file__).with_name("slow_disk.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self.rate.write_bytes(struct.pack("d", 0))
        self.environment = {
            "LD_PRELOAD": str(library),
            "SLOW_DISK_FOLDER": str(slow.resolve()),
            "SLOW_DISK_RATE": str(self.rate),
        }

    def set(self, bytes_per_s: float) -> None:
        with self.rate.open("r+b") as file:  # in place: the server has the file mapped
            file.write(struct.pack("d", bytes_per_s))
