"""What tests of kernels for sm_90a share: CuTe DSL lets only functions be called that are for the machine it believes in."""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import pytest

from ptxsim.host.capture import prepare_environment


@contextlib.contextmanager
def machine(arch: str) -> Iterator[None]:
    """What is compiled inside can be captured if it is for this architecture."""
    with mock.patch.dict(os.environ, CUTE_DSL_ARCH=arch):
        prepare_environment()
        yield
    prepare_environment()


@pytest.fixture(autouse=True)
def on_hopper() -> Iterator[None]:
    """Every test of a module that imports this has an H200."""
    with machine("sm_90a"):
        yield
