"""The devices of tests that run everywhere: the CPU in every run, CUDA under the marker `gpu`."""

import pytest

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
