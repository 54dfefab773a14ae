"""What would keep a run from starting, or slow it down: this machine, or all machines of a job. See --help.

    python tools/doctor.py [--config run.yaml] [--hostfile FILE] [--quick] [--json FILE]
    mpirun -np 16 python tools/doctor.py --config run.yaml        # or deepspeed, torchrun, srun: as the job starts train.py

Needs no torch to tell that torch is missing. docs/doctor.md has every finding. Exit status: 2 with errors, else 0.
"""

import sys

from ds_recipes.cluster.doctor.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
