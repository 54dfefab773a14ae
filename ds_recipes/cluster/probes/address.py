"""Print rank 0's address and a free port there, as JSON, after the ranks have agreed on them over MPI."""

import json
import os
import sys

from ds_recipes.errors import WorldError
from ds_recipes.world.rendezvous import agree_on_address
from ds_recipes.world.resolve import resolve


def main() -> int:
    """Returns 2 if they cannot agree."""
    try:
        place = agree_on_address(resolve(os.environ))
    except WorldError as problem:
        print(" ".join(str(problem).splitlines()), file=sys.stderr)
        return problem.exit_status
    print(json.dumps([place.address, place.port]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
