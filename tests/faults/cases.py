"""Rounds that are run every day: one of each kind, and those that a sweep has found to fail once, with what it was."""

from tests.faults.rounds import Round

CASES: dict[str, Round] = {
    "killed in the middle of a save": Round("fsdp", 2, faults="tear@9 rank=1 kind=write path=*iter_0000006*"),
    "killed between the rename and its fsync": Round("fsdp", 2, 4, faults="kill@4 rank=0 kind=fsync_folder path=*"),
    "killed while an old one is deleted": Round("fsdp", 2, 4, faults="kill@3 rank=0 kind=unlink path=*iter_0000002*"),
    "disk full while a slow save is under way": Round(
        "fsdp",
        2,
        faults="delay:0.05@1x60 kind=write path=*iter_0000004*; fail:ENOSPC@1 rank=0 kind=fsync path=*iter_0000004*",
    ),
    "all killed, a save under way, the newest damaged": Round(
        "fsdp",
        2,
        4,
        damaged="rank-00000",
        faults="delay:0.1@1x99 within=saving path=*iter_*",
        signal="KILL",
        targets=(0, 1),
        at_share=0.9,
    ),
    "stopped by a signal while it saves": Round(
        "deepspeed",
        2,
        faults="delay:0.1@1x20 kind=write path=*iter_0000004*; signal:TERM@2 rank=1 kind=write path=*iter_0000004*",
    ),
    "its grace ends in the save that a signal asked for": Round(
        "fsdp",
        2,
        faults="signal:TERM@3 rank=0 kind=append path=*metrics.jsonl; kill@2 rank=0 kind=write path=*iter_0000003*; "
        "kill@2 rank=1 kind=write path=*iter_0000003*",
    ),
    "the run's record cannot be written": Round("fsdp", 1, 4, faults="fail:EIO@2 kind=replace path=*run.json*"),
    "the newest cannot be read by one rank (seed 2100: it was taken for damaged)": Round(
        "fsdp", 2, 4, faults="fail:EDQUOT@2 rank=1 kind=open path=*iter_*"
    ),
}
