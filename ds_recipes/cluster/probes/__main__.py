"""All probes of one rank, in the place that its launcher gave it. Started by the doctor (`cluster/doctor/probe.py`).

What it finds goes as lines of JSON to the file descriptor after --report_to; its own output is for people, after a failure.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> NoReturn:
    """Tell of torch, meet the other ranks, measure, take a step."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a doctor that is killed leaves nobody behind
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    channel = os.fdopen(int(sys.argv[sys.argv.index("--report_to") + 1]), "w", encoding="utf-8")

    def tell(event: str, value: Any) -> None:
        channel.write(json.dumps({"event": event, "value": value}) + "\n")
        channel.flush()

    phase = "import"

    def enter(name: str) -> None:
        nonlocal phase
        phase = name
        tell("phase", name)

    try:
        from ds_recipes.cluster.probes.sequence import run_all

        run_all(tell, enter)
    except BaseException as failure:
        traceback.print_exc()
        text = str(failure).strip() or type(failure).__name__
        tell("failed", {"phase": phase, "kind": type(failure).__name__, "text": text})
        leave_failing(failure)
    leave(0)


def leave(status: int) -> NoReturn:
    """End at once: nothing is left to be kept, and to take torch down takes Python long on a busy machine."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_failing(failure: BaseException) -> NoReturn:
    """Let the other ranks know, as a run would, and end."""
    if "torch" in sys.modules:
        from ds_recipes.world import channel

        if channel.current is not None:
            channel.current.fail(failure)
    leave(1)


if __name__ == "__main__":
    main()
