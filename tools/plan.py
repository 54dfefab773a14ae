"""Plan a run before it is queued: memory by part, host memory, disk, time and cost. Needs no GPU and no torch.

    python tools/plan.py --config run.yaml --nodes 8 --gpus_per_node 8 --gpu_memory 80GB
    python tools/plan.py --model_config examples/models/llama2_7b.json --context_size 4096 --activation_checkpointing

Takes the settings of train.py. Of the model it reads config.json, and the sizes in its safetensors files where they lie in a
folder. docs/planning.md says what each number means and how well it agrees with real runs.
Exit status: 0 it fits; 1 it does not; 2 the settings or the model's files are wrong.
"""

import sys

from ds_recipes.errors import DsRecipesError
from ds_recipes.planner.command import run

if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:], __doc__))
    except DsRecipesError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
