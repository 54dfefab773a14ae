"""Look at a run's data as training will see them: no GPU, no DeepSpeed, no process group.

    python tools/inspect_data.py --config run.yaml [--any_setting value ...]
    python tools/inspect_data.py --config run.yaml --rows 3               # decoded rows, targets marked
    python tools/inspect_data.py --config run.yaml --sample 12000 12001   # what lies at these positions of the run

Takes the settings of train.py, of which it needs no run folder. Prints records, tokens, the share of target tokens, a histogram of
lengths, padding, truncations and duplicates for each source, then decoded rows. What it tokenises is kept, and training starts
from it.
"""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from ds_recipes.config.check import check_inputs
from ds_recipes.config.load import load_config
from ds_recipes.config.schema import Config
from ds_recipes.errors import ConfigError, DsRecipesError

OWN_FLAGS = {"--rows": "1", "--sample": None}
BAR_WIDTH = 24
NO_RUN = "runs/inspect_data"  # holds tokens if the folder of the data cannot be written and no run folder is named


def main(argv: Sequence[str]) -> int:
    """Read the settings as train.py does, then the data, and print."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    console = Console(soft_wrap=True, highlight=False)
    try:
        own, settings = take_own_flags(argv)
        num_rows = whole_numbers("--rows", own["--rows"])
        samples = whole_numbers("--sample", own["--sample"])
        config = load_config(settings, stand_ins={"save_checkpoint_path": NO_RUN})
        problems = check_inputs(config)
        if problems:
            raise ConfigError(problems)
        inspect(config, console, num_rows[0] if num_rows else 0, samples)
    except DsRecipesError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def take_own_flags(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Separate --rows and --sample with their values from the settings of train.py."""
    own = {flag: [default] if default else [] for flag, default in OWN_FLAGS.items()}
    settings: list[str] = []
    current: list[str] | None = None
    for word in argv:
        if word in own:
            current = own[word] = []
        elif word.startswith("--"):
            current = None
            settings.append(word)
        elif current is not None:
            current.append(word)
        else:
            settings.append(word)
    return own, settings


def whole_numbers(flag: str, words: Sequence[str]) -> list[int]:
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise ConfigError([f"{flag} takes whole numbers from 0, not {wrong[0]!r} (command line)"])
    return [int(word) for word in words]


def inspect(config: Config, console: Console, num_rows: int, samples: Sequence[int]) -> None:
    """Read the data and print what they hold; these imports load transformers."""
    from ds_recipes.data.reading import read_corpora
    from ds_recipes.models.load import find_model
    from ds_recipes.training.inputs import fit_vocabulary, read_tokenizer
    from ds_recipes.world.group import solo

    tokenizer = read_tokenizer(config)
    world, model = solo(), config.model
    found = find_model(
        world, model.model_name, model.model_config, config.run.seed, model.trust_remote_code, with_weights=False
    )
    source, notes = fit_vocabulary(config, found, tokenizer)
    read = read_corpora(config, tokenizer, source.vocabulary_size, world, lambda line: console.print(escape(line)))
    for note in notes:
        console.print(f"note: {escape(note)}")
    if samples:
        show_samples(config, console, read.corpus, samples, tokenizer)
        return
    show_corpus(console, read.corpus, "training data")
    if read.validation is not None:
        show_corpus(console, read.validation, "validation data")
    for row in range(min(num_rows, read.corpus.num_rows)):
        show_row(console, read.corpus, row, tokenizer, f"row {row}")


def show_corpus(console: Console, corpus, title: str) -> None:
    """Each source: its counts, its lengths, and how it is packed."""
    from ds_recipes.data.statistics import statistics_of

    console.print(f"[bold]{title}[/bold]")
    for one in map(statistics_of, corpus.sources):
        files = f" ({one.files:,} files)" if one.files > 1 else ""
        copies = f", one of them {one.most_copies:,} times" if one.duplicates else ""
        console.print(f"[bold]{escape(one.name)}[/bold]{files}")
        console.print(
            f"  records    {one.records:,}: {one.documents:,} documents, {one.bad_records:,} bad, {one.left_out:,} left out"
        )
        console.print(f"  duplicates {one.duplicates:,} documents repeat the content of an earlier one{copies}")
        console.print(f"  tokens     {one.tokens:,}; a document has {one.median:,} (median), at most {one.longest:,}")
        console.print(f"  {'length in tokens':>20} {'documents':>10}")
        most = max((bin_.documents for bin_ in one.bins), default=1)
        for bin_ in one.bins:
            bar = "█" * max(round(BAR_WIDTH * bin_.documents / most), 1 if bin_.documents else 0)
            share = 100 * bin_.tokens / max(one.tokens, 1)
            span = f"{bin_.first:,} to {bin_.last:,}"
            console.print(
                f"  {span:>20} {bin_.documents:>10,} [cyan]{bar:<{BAR_WIDTH}}[/cyan] {share:5.1f} % of the tokens"
            )
    for line in corpus.describe():
        console.print(escape(line))


def show_samples(config: Config, console: Console, corpus, positions: Sequence[int], tokenizer) -> None:
    """What lies at positions of the run's order: source, row, epoch, files and lines, and the row itself."""
    import numpy as np

    located = corpus.locate(np.array(positions, np.int64))
    columns = zip(positions, located.source.tolist(), located.row.tolist(), located.epoch.tolist(), strict=True)
    for position, source, row, epoch in columns:
        rows_a_step = config.run.global_batch_size
        step = f", step {position // rows_a_step + 1}" if rows_a_step and not config.data.skip_samples else ""
        console.print(
            f"position {position:,}{step}: row {row:,} of {escape(corpus.names[source])}, epoch {epoch}: "
            f"{escape(corpus.provenance(row))}"
        )
        show_row(console, corpus, row, tokenizer, f"position {position:,}")


def show_row(console: Console, corpus, row: int, tokenizer, title: str) -> None:
    """A row decoded: a line for each document's border, targets in green and ⟦brackets⟧, what is only read in grey."""
    from ds_recipes.data.show import runs_of

    source, index = corpus.find(row)
    at = 0
    for piece in source.pieces(index):
        runs = runs_of(tokenizer, source.documents, piece)
        targets = sum(run.num_tokens for run in runs if run.is_learned)
        whole = source.documents.offsets[piece.document + 1] - source.documents.offsets[piece.document]
        console.print(
            f"[bold yellow]── {title}, positions {at:,} to {at + piece.length - 1:,}: "
            f"{escape(source.documents.where(piece.document))}, its tokens {piece.start:,} to "
            f"{piece.start + piece.length - 1:,} of {whole:,}, {targets:,} of them targets[/bold yellow]"
        )
        for run in runs:
            style, text = ("green", f"⟦{run.text}⟧") if run.is_learned else ("bright_black", run.text)
            console.print(f"[{style}]{escape(text)}[/{style}]", end="")
        console.print()
        at += piece.length
    if at < source.context_size:
        console.print(f"[bold yellow]── positions {at:,} to {source.context_size - 1:,}: padding[/bold yellow]")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
