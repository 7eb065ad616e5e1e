"""The jaxtyping shapes on public functions are true: every pool runs with them checked.

In a process of its own, because the checks replace the errors that users see and hide functions from torch.compile; and all in
the same one, because most of the time goes into the import.
"""

import subprocess
import sys
from pathlib import Path

SCRIPTS = [str(path) for path in sorted(Path(__file__).with_name("shapes").glob("*.py"))]
PROGRAM = """
import runpy, sys
from jaxtyping import install_import_hook
install_import_hook("cenote", "beartype.beartype")
for script in sys.argv[1:]:
    runpy.run_path(script)
    print(script)
"""


def test_shapes_hold() -> None:
    assert len(SCRIPTS) >= 4
    done = subprocess.run([sys.executable, "-c", PROGRAM, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == SCRIPTS, done.stderr[-2000:]
