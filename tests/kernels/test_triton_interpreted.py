"""The triton kernels in triton's interpreter, on the CPU, beside float64: algebra, masks, edges, numerics.

The interpreter cannot show races, registers or a tensor core's sums: see test_triton_compiled.py, test_triton_gpu.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton_cases import CASES, PROPERTIES, beyond_gate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """All cases measured by one process, in which the kernels were defined under TRITON_INTERPRET=1."""
    out = tmp_path_factory.mktemp("triton") / "report.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "tests/kernels/triton_cases.py", str(out)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(report: dict[str, dict], name: str) -> None:
    assert beyond_gate(CASES[name], report["cases"][name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(report: dict[str, dict], name: str) -> None:
    assert report["properties"][name] is None
