"""The devices of tests that run everywhere: the CPU in every run, CUDA under the marker `gpu`."""

import pytest

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
