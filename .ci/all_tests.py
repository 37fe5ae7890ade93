"""Everything a change must pass, on a clean clone."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

os.chdir(Path(__file__).resolve().parent.parent)
# What each target runs here: `test` takes the slow tests, too, since a second start would cost
# half a minute of a processor.
SELECTED = {"test": "-m 'not (deploy or flower or recipes)'", "test-deploy": ""}
# Linux shares processor time among sessions, and elsewhere `nice` decides.
BEHIND = """(echo 15 > /proc/self/autogroup) 2> /dev/null
exec nice -n 15 make test "$0\""""
# Where each target keeps the names of the tests that failed.
FAILED = {"test": ".pytest_cache", "test-deploy": ".pytest_cache/deploy"}
FEW = 2  # files


def main() -> int:
    """Run all targets; return an exit status."""
    # What one process compiles of the package and its tests, the many that follow need not.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if subprocess.run(["make", "setup"]).returncode:
        return 1
    # Fleets wait much of their time: for heartbeats, timeouts and processes that start. The other
    # tests fill that time, with a lower priority, so that no fleet misses a deadline of its own.
    with tempfile.TemporaryFile() as said:
        tests = subprocess.Popen(
            ["sh", "-c", BEHIND, options("test")], stdout=said, stderr=said, start_new_session=True
        )
        try:
            if subprocess.run(["make", "docs"]).returncode:
                return 1
            failed = {"test-deploy": subprocess.run(["make", "test-deploy"]).returncode != 0}
            failed["test"] = tests.wait() != 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(tests.pid, signal.SIGTERM)
            said.seek(0)
            sys.stdout.buffer.write(said.read())
            sys.stdout.flush()
    return int(not all(map(passes_alone, [target for target in failed if failed[target]])))


def options(target: str, *more: str) -> str:
    """Return an argument of `make` that gives a target's pytest its options."""
    return " ".join([f"PYTEST={SELECTED[target]}", *more])


def passes_alone(target: str) -> bool:
    """Run the tests of a target that failed once more, without the other target beside them.

    Real processes may miss a deadline on a machine that is busy. A test that fails again has found
    something. A target whose failures are in more than a few files is not run again.
    """
    kept = Path(FAILED[target], "v", "cache", "lastfailed")
    names = list(json.loads(kept.read_text())) if kept.exists() else []
    if not 1 <= len({name.partition("::")[0] for name in names}) <= FEW:
        return False
    print(f"Failed beside other tests, and now run again alone: {', '.join(names)}", flush=True)
    again = options(target, "-n 0 --last-failed --last-failed-no-failures none")
    return subprocess.run(["make", target, again]).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
