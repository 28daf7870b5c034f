"""What guards a vLLM server, with a command of our own in the server's place: no vLLM is needed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from tbrm.rollout.vllm import guard

# Takes shared memory, and gone at once with all it holds, as a server is whose worker was killed.
SERVER = """
    import mmap, os, tempfile, time
    handle, path = tempfile.mkstemp(dir="/dev/shm", prefix="psm_tbrm_test_")
    os.ftruncate(handle, 4096)
    held = mmap.mmap(handle, 4096)
    print(path, flush=True)
    time.sleep(3)
    os._exit(1)
"""


def test_shared_memory_of_a_server_that_is_gone_before_the_guard_looks() -> None:
    command = [sys.executable, "-S", guard.__file__, "server", sys.executable, "-c", textwrap.dedent(SERVER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        try:
            assert path.name.startswith("psm_tbrm_test_")
            assert path.exists()
            assert process.wait(60) == 0
            assert "exit code 1" in process.stdout.read()
            assert not path.exists()
        finally:
            path.unlink(missing_ok=True)
