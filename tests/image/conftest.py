"""Fixtures of the image's tests: a store, bases made on the spot, images built once."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from container import ROOT, Container, Store, copy_sources


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def store() -> Store:
    assert os.getuid() == 0, "buildah --isolation chroot needs root"
    for program in ("buildah", "debootstrap", "unshare", "setpriv", "nsenter"):
        assert shutil.which(program), f"{program} is not installed: apt-get install buildah debootstrap util-linux"
    folder = Path(os.environ.get("NVFP4_IMAGE_WORK", ROOT / ".work" / "image"))
    folder.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    # Where pip has wheels in a folder of this machine, builds need that folder too.
    links = " ".join(re.findall(r"find-links='(.*)'", listed.stdout)).split()
    return Store(folder, sorted({Path(link) for link in links if Path(link).is_dir()}))


@pytest.fixture(scope="session")
def debian(store: Store) -> str:
    return store.base("debian")


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as they are now: every image of a session is built from the same."""
    return copy_sources(tmp_path_factory.mktemp("sources") / "tree")


@pytest.fixture(scope="session")
def cpu_base(store: Store, debian: str, tree: Path) -> str:
    """The flavor's layers below ours."""
    name = "localhost/nvfp4-test-cpu-base"
    store.build(tree, "cpu", debian, "--target", "base-cpu", "--tag", name)
    return name


@pytest.fixture(scope="session")
def cpu_image(store: Store, debian: str, tree: Path, cpu_base: str) -> str:
    return store.build(tree, "cpu", debian)[0]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """What a node mounts at /models: the small checkpoint of `make serve`."""
    folder = tmp_path_factory.mktemp("models")
    script = root / "scripts" / "make_tiny_checkpoint.py"
    subprocess.run([sys.executable, str(script), str(folder / "tiny")], check=True, capture_output=True)
    # Temporary folders are for their owner only; the server is somebody else.
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def container(store: Store, cpu_image: str, models: Path, tmp_path_factory: pytest.TempPathFactory):
    with store.mounted(cpu_image) as mounted:
        log = tmp_path_factory.mktemp("log") / "server.log"
        yield Container(mounted, store.config(cpu_image), models, log)
