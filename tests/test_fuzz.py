import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent


def test_files_that_are_damaged_or_made_to_do_harm_are_refused_or_do_none(tmp_path):
    """`benchmarks/fuzz.py` with 200 files in place of 10,000."""
    out = tmp_path / "fuzz.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--files", "200"]
    done = subprocess.run(
        [*command, "--seed", "1", "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert sum(found["outcomes"].values()) == 200
    assert sum(n for kind, n in found["outcomes"].items() if kind.endswith("refused")) > 100
    assert found["peak_memory_rise_mb"] < 200
