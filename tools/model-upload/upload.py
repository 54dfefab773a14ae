"""Kotoba-Recipes' name for tools/upload_to_hub.py, which this runs with the same arguments."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from ds_recipes.cluster.old_entry_points import run_todays_program

if __name__ == "__main__":
    run_todays_program(__file__, sys.argv[1:])
