"""What tests of several processes share: a test module names its script in SCRIPT."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="module")
def script(request):
    """The script as a module: what one process does, to compare with."""
    path = request.module.SCRIPT
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """The folder in which the script's two ranks wrote their results."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    if torch.__version__ < "2.7":
        pytest.skip("torch 2.6 runs no FSDP2 on the CPU")
    folder = tmp_path_factory.mktemp("ranks")
    result = subprocess.run(
        [sys.executable, request.module.SCRIPT, folder],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return folder
