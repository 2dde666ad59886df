"""The Python on the machine's page runs as it is shown, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from checkout import CHECKOUT


def test_the_page_runs(tmp_path: Path) -> None:
    page = (CHECKOUT / "docs" / "ptx-machine.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    script = tmp_path / "page.py"  # a file, because Triton reads the source of its kernels
    script.write_text(program)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Resources(registers=" in done.stdout

    script.write_text(program.replace("    tl.debug_barrier()", "    # tl.debug_barrier()"))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert re.search(r"Fault: race on x, element \d+ of 4 bytes: thread \d+ of CTA 0 (reads|writes) it", done.stderr)
