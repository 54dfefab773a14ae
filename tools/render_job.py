"""Print a job script, ready to be submitted or edited in three places.

    python tools/render_job.py --cluster abci-pbs --nodes 4 --gpus_per_node 8 --walltime 12:00:00 --config run.yaml
    python tools/render_job.py --cluster slurm --launcher deepspeed --queue gpu -- --max_steps 1000

What is left out is as in the script of launch/ for that cluster, which this prints when nothing else is given. Flags of train.py
come after `--`. docs/clusters/ has a page for each cluster.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_recipes.cluster.job import CLUSTERS, LAUNCHERS, Job, parse_walltime
from ds_recipes.cluster.job_script import default_job, render
from ds_recipes.config.missing import similar
from ds_recipes.config.values import expand_path
from ds_recipes.errors import ConfigError, DsRecipesError


def main(arguments: Sequence[str] | None = None) -> int:
    given = vars(parse(arguments))
    usual = default_job(given.pop("cluster"))
    try:
        if given["config"] is not None and not Path(given["config"]).is_file():
            raise ConfigError([f"--config {given['config']}: there is no such file{similar(Path(given['config']))}"])
        if given["walltime"]:
            given["walltime_seconds"] = parse_walltime(given["walltime"])
        fields = {item.name for item in dataclasses.fields(Job)}
        chosen = {name: value for name, value in given.items() if name in fields and value is not None}
        for name in ("modules", "exports"):
            if name in chosen:
                chosen[name] = tuple(word for word in chosen[name].split(",") if word)
        chosen["arguments"] = tuple(chosen["arguments"])
        print(render(dataclasses.replace(usual, **chosen)), end="")
    except DsRecipesError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True, choices=CLUSTERS)
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, help="what starts the ranks (default: the cluster's usual one)"
    )
    parser.add_argument("--nodes", type=int, help="hosts of the job")
    parser.add_argument("--gpus_per_node", type=int, help="GPUs of a host; each gets a rank")
    parser.add_argument("--cpus_per_rank", type=int, help="cores of a rank (SLURM; default: 8)")
    parser.add_argument("--walltime", metavar="[D-]H:MM:SS", help="the job's time limit")
    parser.add_argument("--lead_seconds", type=int, help="how long before the limit the ranks are gone (default: 300)")
    parser.add_argument("--name", help="the job's name")
    parser.add_argument("--group", help="the group or account that pays")
    parser.add_argument("--queue", help="queue, partition or resource type")
    parser.add_argument("--modules", metavar="A,B", help="modules to load; an empty word for none")
    parser.add_argument("--activate", metavar="FILE", help="what activates the Python environment")
    parser.add_argument(
        "--exports", metavar="A,B", help="variables for the ranks on other hosts, besides the usual ones"
    )
    parser.add_argument(
        "--hostfile", type=expand_path, metavar="FILE", help="the file of hosts, where no scheduler names them"
    )
    parser.add_argument("--config", type=expand_path, metavar="FILE", help="the run file")
    parser.add_argument(
        "--run_folder", type=expand_path, metavar="FOLDER", help="where checkpoints, logs and records go"
    )
    parser.add_argument("arguments", nargs="*", metavar="-- FLAG", help="flags of train.py")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
