"""A plan for people: on a terminal, and as a row of a table."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ds_recipes.planner.machine import CONTEXT_BYTES, FRAGMENTATION, GB
from ds_recipes.planner.plan import Answer

PART_NOTES = {
    "parameters": "shards, and what is gathered or kept whole",
    "gradients": "their float32 sums, and those of the block at hand",
    "optimizer": "master weights and moments",
    "activations": "kept for backward, and the block at hand",
    "logits": "a chunk of them, and the head's gradient",
    "buffers": "of communication",
}


def gigabytes(number: float) -> str:
    """Bytes as GB (10^9)."""
    return f"{number / GB:,.2f} GB" if number < 100 * GB else f"{number / GB:,.0f} GB"


def show(console: Console, answer: Answer) -> None:
    """The whole plan."""
    _heading(console, answer)
    console.print(_memory(answer))
    _verdict(console, answer)
    for title, lines in (
        ("Host memory a node", _host(answer)),
        ("Disk", _disk(answer)),
        ("Time", _time(answer)),
    ):
        console.print(f"\n[bold]{title}[/bold]")
        for line in lines:
            console.print(f"  {escape(line)}")


def _heading(console: Console, answer: Answer) -> None:
    model, situation, question = answer.found.model, answer.situation, answer.question
    tied = ", embedding and head tied" if model.tied else ""
    console.print(
        f"[bold]{escape(answer.found.where)}[/bold]: {model.family}, {model.numel:,} parameters, {len(model.blocks)} blocks, "
        f"vocabulary {model.vocabulary_size:,}{tied}"
    )
    for note in answer.found.notes:
        console.print(f"[yellow]note: {escape(note)}[/yellow]")
    batch = situation.batch
    kept = "without activation checkpointing"
    if situation.settings.checkpointing:
        kept = "with activation checkpointing"
    sharding = situation.settings.sharding
    what = f"FSDP2, stage {sharding.stage}" if situation.engine == "fsdp" else f"ZeRO-{sharding.stage}"
    places = ", ".join(
        f"{name} on {place}"
        for name, place in (("optimizer", sharding.optimizer_on), ("parameters", sharding.parameters_on))
        if place != "device"
    )
    console.print(
        f"{question.nodes} x {question.gpus_per_node} GPUs of {gigabytes(question.memory_bytes)}: {what}"
        f"{', ' + places if places else ''}, {situation.settings.precision.parameters}, {batch.rows} x {batch.context_size:,} "
        f"tokens a micro-step, {kept}, {batch.attention} attention\n"
    )


def _memory(answer: Answer) -> Table:
    table = Table(title=f"Memory of a GPU, at its worst moment: {answer.worst.name}", title_justify="left", box=None)
    table.add_column("part")
    table.add_column("GB", justify="right")
    table.add_column("", style="bright_black")
    for name, number in vars(answer.worst.parts).items():
        table.add_row(name, f"{number / GB:,.2f}", PART_NOTES[name])
    total = answer.worst.parts.total
    table.add_row("[bold]tensors[/bold]", f"[bold]{total / GB:,.2f}[/bold]", "")
    table.add_row("fragmentation", f"{total * FRAGMENTATION / GB:,.2f}", f"assumed: {FRAGMENTATION:.0%} of the tensors")
    table.add_row("context", f"{CONTEXT_BYTES / GB:,.2f}", "assumed: CUDA, NCCL and workspaces")
    colour = "green" if answer.fits else "red"
    table.add_row(
        f"[bold {colour}]needed[/bold {colour}]", f"[bold {colour}]{answer.needed / GB:,.2f}[/bold {colour}]", ""
    )
    return table


def _verdict(console: Console, answer: Answer) -> None:
    memory = answer.question.memory_bytes
    left = memory - answer.needed
    console.print(
        f"Activations while the head runs: {gigabytes(answer.kept)} without activation checkpointing, "
        f"{gigabytes(answer.boundaries)} with it."
    )
    if answer.fits:
        console.print(f"\n[bold green]It fits[/bold green], {gigabytes(left)} are left. {_smallest(answer)}")
        return
    console.print(f"\n[bold red]It does not fit[/bold red]: {gigabytes(-left)} are missing. {_smallest(answer)}")
    if answer.suggestions:
        console.print("What would help, by what it costs:")
    for one in answer.suggestions:
        verdict = "[green]fits[/green]" if one.fits else "not yet"
        host = f" ({gigabytes(one.host)} of host memory a node)" if one.host else ""
        console.print(f"  {escape(one.what)}: {gigabytes(one.needed)} a GPU{host}, {verdict}")


def _smallest(answer: Answer) -> str:
    found = answer.smallest
    if found is None:
        return "No number of GPUs is enough with these settings."
    if found.nodes == 1:
        return (
            f"The fewest GPUs for these settings: {found.gpus_per_node} of one node ({gigabytes(found.needed)} each)."
        )
    return f"The fewest for these settings: {found.nodes} nodes of {found.gpus_per_node} ({gigabytes(found.needed)} a GPU)."


def _host(answer: Answer) -> Iterator[str]:
    host, ranks = answer.host, answer.situation.ranks_per_host
    yield f"{gigabytes(host.total)} in all for {ranks} ranks"
    yield f"{gigabytes(host.processes)} for the processes (assumed)"
    if host.offloaded:
        yield f"{gigabytes(host.offloaded)} for what is offloaded"
    yield f"loading: {host.reading / 1e6:,.0f} MB of buffers; each rank reads only its own ranges"
    yield (
        f"saving: {gigabytes(host.saving)} for the copy that is written beside training"
        if host.saving
        else "saving: nothing, it streams while training waits"
    )
    if host.nvme:
        yield f"NVMe: {gigabytes(host.nvme)} of disk on each host"


def _disk(answer: Answer) -> Iterator[str]:
    one = f"{gigabytes(answer.disk.checkpoint)} a checkpoint"
    if answer.disk.total is None:
        yield f"{one}; how many are kept depends on the length of the run (--max_steps, --max_tokens, --epoch_tokens)"
    else:
        yield f"{one}, at most {answer.disk.kept} at once: {gigabytes(answer.disk.total)}"


def _time(answer: Answer) -> Iterator[str]:
    work, question = answer.work, answer.question
    yield (
        f"{work.tokens_per_step:,} tokens a step ({answer.plan.global_rows:,} rows, micro-steps: {answer.plan.micro_steps}), "
        f"{work.flops_per_token:.3e} flops a token"
    )
    gpu = (
        f"{question.gpu} ({question.peak_tflops:,.0f} TFLOPS)"
        if question.gpu
        else f"{question.peak_tflops:,.0f} TFLOPS"
    )
    yield (
        f"at {question.mfu:.0%} of {gpu}, assumed: {work.step_seconds:,.2f} s a step, {work.tokens_per_second:,.0f} tokens a "
        "second"
    )
    if work.hours is None:
        yield "steps: not known; give --max_steps or --max_tokens, or the data's size with --epoch_tokens"
        return
    yield (
        f"{work.total_steps:,} steps, {work.total_tokens:,} tokens: {work.hours:,.1f} hours, {work.node_hours:,.1f} node-hours"
    )
    if work.cost is not None:
        yield f"cost: {work.cost:,.2f}, at {question.price_per_gpu_hour:g} a GPU-hour"


TABLE_HEAD = "| model | parameters | a GPU needs | fits | the fewest GPUs |\n|---|---|---|---|---|"


def table_row(answer: Answer) -> str:
    """One row of a Markdown table; a plan that does not fit names the first change that makes it."""
    model, smallest = answer.found.model, answer.smallest
    name = answer.found.where.rsplit("/", 1)[-1].removesuffix(".json")
    fewest = "no number" if smallest is None else f"{smallest.nodes} x {smallest.gpus_per_node}"
    return (
        f"| {name} | {model.numel:,} | {answer.needed / GB:.1f} GB | {_fits(answer, answer.suggestions)} | {fewest} |"
    )


def _fits(answer: Answer, changes: Sequence) -> str:  # type: ignore[type-arg]
    if answer.fits:
        return "yes"
    first = next((one for one in changes if one.fits), None)
    if first is None:
        return "no"
    host = f" and {first.host / GB:,.0f} GB of host memory" if first.host else ""
    return f"with `{first.what}`: {first.needed / GB:.1f} GB{host}"
