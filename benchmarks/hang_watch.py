"""What the hang monitor costs a rank: its looks at the main thread, and what the main thread itself notes.

    python benchmarks/hang_watch.py

Prints microseconds of CPU time: of one look at a stack of so many frames (there are twenty a second), of one `progress()`,
and of what stands around one collective. Then the share of a core that the looks take.
"""

import threading
import time
from collections.abc import Callable

from ds_recipes.world.hang.activity import here, progress
from ds_recipes.world.hang.frames import main_frame, where_is
from ds_recipes.world.hang.watch import TICK_SECONDS

TIMES = 20_000
FRAMES = (10, 40, 100)
"""Of a step's outermost parts, of a model's forward inside it, and of a deep one."""


def main() -> None:
    looks = {frames: at_depth(frames) for frames in FRAMES}
    for frames, seconds in looks.items():
        print(f"a look at {frames:3} frames  {1e6 * seconds:6.2f} us")
    print(f"progress()           {1e6 * mean_seconds(progress):6.2f} us")
    print(f"around a collective  {1e6 * mean_seconds(empty_collective):6.2f} us")
    print(f"the looks take {max(looks.values()) / TICK_SECONDS:.3%} of a core at most")


def at_depth(frames: int) -> float:
    """Seconds of one look, from within so many calls."""
    if frames:
        return at_depth(frames - 1)
    me = threading.get_ident()
    return mean_seconds(lambda: where_is(main_frame(me)))


def mean_seconds(work: Callable[[], object]) -> float:
    started = time.thread_time()
    for _ in range(TIMES):
        work()
    return (time.thread_time() - started) / TIMES


def empty_collective() -> None:
    with here().in_collective("none"):
        pass


if __name__ == "__main__":
    main()
