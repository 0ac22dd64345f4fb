"""One child process with a time limit, for the runners of the checks."""

import contextlib
import os
import signal
import subprocess

_running = set()  # leaders of groups


def stop():
    """Kill what runs in any thread, with all that it started."""
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run(command, folder, environment=None, limit=None):
    """Run a command in a folder, with some more environment.

    When the time is up it is killed, with all that it started.

    Returns:
        The exit status, None when out of time; and all it printed.
    """
    with subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        _running.add(process)
        try:
            output, _ = process.communicate(timeout=limit)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return None, f"{output}\nkilled after {limit:.0f} s\n"
        except BaseException:  # Ctrl-C: a group of its own does not get the terminal's signal
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            _running.discard(process)
