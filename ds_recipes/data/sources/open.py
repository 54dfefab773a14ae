"""Opening any file of records, by what it holds and what it is called."""

from pathlib import Path

from ds_recipes.config.data_paths import HubData
from ds_recipes.data.index.cache import Progress
from ds_recipes.data.index.raw import open_packed, reading
from ds_recipes.data.sources.csv_rows import open_csv
from ds_recipes.data.sources.hub import open_hub, open_saved
from ds_recipes.data.sources.jsonl import open_json
from ds_recipes.data.sources.megatron import is_megatron
from ds_recipes.data.sources.record import Source
from ds_recipes.data.sources.tables import MAGIC, ParquetFile
from ds_recipes.errors import InputError, NoRecordsError

CSV_SUFFIXES = (".csv", ".csv.gz", ".csv.zst")


def open_source(file: Path | HubData, cache: Path, progress: Progress | None = None) -> Source:
    """Open a file of records, a folder of `save_to_disk` or a data set of the hub; what is found out about it is kept in `cache`.

    JSONL and JSON arrays may be called anything, Parquet files too; a CSV file is one by its name.

    Raises:
        InputError: it is missing, unreadable or of an unknown kind; NoRecordsError: it holds no record.
    """
    if isinstance(file, HubData):
        return open_hub(file, cache, progress)
    if file.is_dir():
        return open_saved(file, cache, progress)
    with open_packed(file) as opened, reading(file):
        magic = opened.read(len(MAGIC))
    if not magic and file.suffix in (".parquet", ".bin"):
        raise NoRecordsError(f"{file}: is empty. Get or write the file again.")
    assert not is_megatron(file), "token files are no records; see megatron.py"
    name = file.name.lower()
    if name.endswith(".parquet") or magic == MAGIC:
        return ParquetFile(file, cache, progress)
    if name.endswith(CSV_SUFFIXES):
        return open_csv(file, cache, progress)
    if file.suffix in (".bin", ".idx"):
        index = file.with_suffix(".idx")
        raise InputError(f"{file}: token files come in pairs, but {index} is not there or is no index of Megatron's.")
    return open_json(file, cache, progress)
