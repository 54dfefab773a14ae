"""How a user goes on without data on which a run went wrong."""

from ds_recipes.data.skips import Skips
from ds_recipes.training.run import Run
from ds_recipes.training.state import positions_text


def how_to_leave_out(run: Run, start: int, stop: int, position: int) -> str:
    """Name the data at positions [start, stop), and the flag to go on without them from a checkpoint at `position`.

    The flag takes the place of what the run file says, and a rewind may be younger than the checkpoint: so it names all that
    is left out from there on.
    """
    ahead = [part for part in Skips([*run.stream.skips.ranges, (start, stop)]).ranges if part[1] > position]
    flag = " ".join(positions_text(max(first, position), end) for first, end in ahead)
    return (
        f"Their data are the positions {positions_text(start, stop)} of the run's order, which begin with "
        f"{run.provenance(start)}. To go on without them start again with --skip_samples {flag}."
    )
