"""Build images with buildah, and run them as a node would, without a container runtime."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENTER = Path(__file__).with_name("enter.sh")
START_LIMIT_S = 400
BUILD_LIMIT_S = 3600


class Store:
    """buildah with a store of its own.

    Args:
        folder: of the store; kept from run to run, so that layers are.
        mounts: folders of this machine that builds see at the same place, such as pip's wheels.
    """

    def __init__(self, folder: Path, mounts: list[Path]) -> None:
        self.folder = folder
        self.command = ["buildah", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self.flags = [flag for mount in mounts for flag in ("--volume", f"{mount}:{mount}:ro")]

    def __call__(self, *arguments: str) -> str:
        """Output of a buildah command."""
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"buildah {shlex.join(arguments)} failed:\n{done.stderr[-4000:]}"
        return done.stdout

    def base(self, *arguments: str) -> str:
        """An image that make_base.sh makes."""
        self._run([str(Path(__file__).with_name("make_base.sh")), *arguments], {"BUILDAH": shlex.join(self.command)})
        return f"localhost/nvfp4-test-{arguments[0]}"

    def build(self, context: Path, flavor: str, base: str, *flags: str, check: bool = True) -> tuple[str, str]:
        """Runs scripts/image_build.sh of a source tree; returns the image's name and the build's output."""
        name = f"localhost/nvfp4-test:{flavor}"
        command = [str(context / "scripts" / "image_build.sh"), flavor, "--isolation", "chroot", *self.flags]
        # A copy of the sources has no history of its own.
        environment = {"BUILDER": shlex.join(self.command), "BASE_IMAGE": base, "GIT_DIR": str(ROOT / ".git")}
        return name, self._run([*command, "--tag", name, *flags], environment, check)

    def _run(self, command: list[str], environment: Mapping[str, str], check: bool = True) -> str:
        done = subprocess.run(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=BUILD_LIMIT_S, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == check, f"{command[0]} ended with {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout

    def config(self, image: str) -> dict[str, Any]:
        """What the image says of itself: User, Env, Entrypoint, Labels, Healthcheck and so on."""
        return json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]

    def layers(self, image: str) -> list[tuple[str, int]]:
        """Digest and bytes of each layer's uncompressed archive, the lowest first."""
        document = json.loads(self("inspect", "--type", "image", image))
        digests = document["Docker"]["rootfs"]["diff_ids"]
        known = json.loads((self.folder / "storage" / "overlay-layers" / "layers.json").read_text())
        sizes = {layer["diff-digest"]: layer["diff-size"] for layer in known if "diff-digest" in layer}
        return [(digest, sizes[digest]) for digest in digests]

    @contextlib.contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """The image's root filesystem."""
        container = self("from", image).strip()
        try:
            yield Path(self("mount", container).strip())
        finally:
            self("umount", container)
            self("rm", container)


class Container:
    """An image's root, run as k8s/base/deployment.yaml asks: its user, a read-only root, /tmp, /models, no rights.

    Args:
        root: where the image is mounted.
        config: what the image says of itself.
        models: folder to find at /models.
        log: file for what it prints.
    """

    def __init__(self, root: Path, config: dict[str, Any], models: Path, log: Path) -> None:
        self.root, self.config, self.models, self.log = root, config, models, log

    def environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        """The image's, and the caller's on top; nothing of the test's own."""
        return {**dict(entry.split("=", 1) for entry in self.config["Env"]), **extra}

    def run(self, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """A command in a container of its own, to its end."""
        enter = [str(ENTER), str(self.root), self.config["User"], str(self.models), *command]
        return subprocess.run(
            enter, env=self.environment(extra), capture_output=True, text=True, timeout=START_LIMIT_S, check=False
        )

    @contextlib.contextmanager
    def serving(self, port: int, *arguments: str, **extra: str) -> Iterator["Server"]:
        """The image's entrypoint with arguments, from ready until the block ends."""
        command = [*self.config["Entrypoint"], *arguments]
        extra = {"NVFP4_HOST": "127.0.0.1", "NVFP4_PORT": str(port), **extra}
        with self.log.open("w") as out:
            process = subprocess.Popen(
                [str(ENTER), str(self.root), self.config["User"], str(self.models), *command],
                env=self.environment(extra), stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        server = Server(process, port, self)
        try:
            server.wait_until_ready()
            yield server
        finally:
            # Killing unshare kills process 1 of the container, and with it everything in it.
            process.kill()
            process.wait()


class Server:
    """A running container's HTTP server and its process 1."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, container: Container) -> None:
        self.process, self.url, self.container = process, f"http://127.0.0.1:{port}", container

    def wait_until_ready(self) -> None:
        """Raises: AssertionError - it ended, or START_LIMIT_S passed; the message has its last lines."""
        started = time.monotonic()
        while time.monotonic() - started < START_LIMIT_S:
            assert self.process.poll() is None, f"the container ended:\n{self.container.log.read_text()[-6000:]}"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.5)
        raise AssertionError(f"not ready in {START_LIMIT_S} s:\n{self.container.log.read_text()[-6000:]}")

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """An open response to a POST; lines of a stream are read from it."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=120)

    @property
    def first(self) -> int:
        """This machine's number of the container's process 1."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def stop(self) -> None:
        """What `docker stop` does first: the image's stop signal to process 1."""
        os.kill(self.first, signal.Signals[self.container.config["StopSignal"]])

    def inside(self, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """What `docker exec` does: a command in the running container's namespaces, as the image's user."""
        user, group = self.container.config["User"].split(":")
        enter = ["nsenter", "--target", str(self.first), "--mount", "--pid", "--ipc", f"--root=/proc/{self.first}/root"]
        enter += ["--setuid", user, "--setgid", group, *command]
        environment = self.container.environment(extra)
        return subprocess.run(enter, env=environment, capture_output=True, text=True, timeout=60, check=False)


def copy_sources(target: Path, source: Path = ROOT) -> Path:
    """What a build can see of a source tree, to change and to build from."""
    names = ("Dockerfile", ".dockerignore", "LICENSE", "README.md", "pyproject.toml", "versions.env")
    target.mkdir(parents=True)
    for name in names:
        shutil.copy2(source / name, target / name)
    for name in ("cutedsl", "ptxsim", "patches", "requirements", "scripts"):
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return target
