import signal
import subprocess
import sys
from pathlib import Path

import pytest

ENTRY = Path(__file__).parents[3] / "docker" / "entry.py"


SLEEPING = "time.sleep(0.05)"
# As a library in C that calls Python while it loads, and takes any error for its own.
SWALLOWING = "try:\n        time.sleep(0.05)\n    except BaseException:\n        raise TypeError"


@pytest.mark.parametrize("step", [SLEEPING, SWALLOWING])
def test_a_service_that_still_imports_ends_on_sigterm(tmp_path, step):
    package = tmp_path / "services"
    package.mkdir()
    (package / "slow.py").write_text(f"print('importing', flush=True)\nimport time\nwhile True:\n    {step}\n")
    command = [sys.executable, "-P", str(ENTRY), "slow"]
    process = subprocess.Popen(command, env={"PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


def test_the_service_runs_as_the_main_module_with_the_other_arguments(tmp_path):
    package = tmp_path / "services"
    package.mkdir()
    (package / "told.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    command = [sys.executable, "-P", str(ENTRY), "told", "--x"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert done.stdout == "__main__ ['--x']\n"
