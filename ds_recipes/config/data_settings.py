"""The settings of the data: where records lie, what they mean, and how they become rows. See schema.py."""

from dataclasses import dataclass

from ds_recipes.config.setting import setting

FORMATS = ("text", "alpaca", "chat", "completion", "tokens")
"""The formats that have a name; `dataset` takes a function of the user's too."""


@dataclass(frozen=True)
class DataConfig:
    """The records and how they become rows of tokens."""

    dataset: str = setting(
        "text",
        "Format of a record. text: {'text'}; alpaca: {'instruction', 'input', 'output'}; chat: {'messages'} or "
        "{'conversations'}; completion: {'prompt', 'completion'}; tokens: {'input_ids'}; path/to/file.py:function: a "
        "function of yours. Prompts are no targets.",
        is_path=True,
    )
    text_fields: tuple[str, ...] = setting(
        ("text",), "text: the fields that make the text, joined with a blank line where there are several."
    )
    prompt_template: str | None = setting(
        None,
        "alpaca: a JSON or YAML file with prompt_input and prompt_no_input, texts with {fields} of the record.",
        unit="path",
        default_doc="Stanford Alpaca's prompts",
    )
    chat_template: str | None = setting(
        None, "chat: a Jinja file that renders messages.", unit="path", default_doc="the tokenizer's own template"
    )
    chat_targets: str = setting(
        "all", "chat: which assistant turns are learned, all of them or only the last.", choices=("all", "last")
    )
    train_data: tuple[str, ...] = setting(
        (),
        "Training data, one or more of [weight:]path. A path is a file (JSON Lines, plain or .gz or .zst; a JSON array; "
        "Parquet; CSV; Megatron .bin), a glob, a folder, or hub:owner/name[@revision][:config][:split]. Weights are "
        "shares of the tokens; without weights every row comes once an epoch.",
        unit="path",
    )
    validation_data: tuple[str, ...] = setting(
        (),
        "Validation data, in the format of the training data. What is in it is left out of the training data.",
        unit="path",
    )
    validation_split: float | None = setting(
        None,
        "Hold out this fraction of the training documents for validation, chosen by their content: equal documents are "
        "never on both sides. Instead of validation_data.",
        above=0,
        below=1,
        default_doc="none",
    )
    context_size: int = setting(
        2048, "Length of a row; a document never sees another one in its row.", unit="tokens", least=2
    )
    packing: str = setting(
        "documents",
        "How rows are filled. documents: whole documents side by side; concat: one stream cut into rows without gaps; "
        "off: one document a row.",
        choices=("documents", "concat", "off"),
    )
    truncation: str | None = setting(
        None,
        "What becomes of a document longer than a row. split: it goes on in other rows; truncate: its end is cut off; "
        "drop: it is left out; error: the first one is named and nothing is trained.",
        choices=("split", "truncate", "drop", "error"),
        default_doc="split for text, tokens, functions annotated '-> str', and packing concat; else truncate",
    )
    bad_records: str = setting(
        "error",
        "error: the first record that cannot be used ends the run before training; skip: such records are left out, "
        "counted, and the first ten are named.",
        choices=("error", "skip"),
    )
    skip_samples: tuple[str, ...] = setting(
        (),
        "Rows to leave out, as positions in the run's order, such as 12000-12511 (both ends are left out too). A "
        "checkpoint remembers them. tools/inspect_data.py --sample shows what lies at a position.",
    )
    data_cache: str | None = setting(
        None,
        "Folder for line indexes and tokenised documents; all hosts must see it.",
        unit="path",
        default_doc=".index_cache beside the data, or below the run folder where that cannot be written",
    )
    streaming: bool = setting(
        False,
        "Keep only the documents' lengths on disk and tokenise the records again, ahead of the steps, while training. "
        "The rows and their order are the same.",
    )
    num_workers_tokenise: int | None = setting(
        None,
        "Processes a rank that tokenise; 0 tokenises in the rank itself.",
        unit="processes",
        least=0,
        default_doc="the host's cores divided by its ranks, at most 16",
    )
    num_workers_dataloader: int = setting(
        1, "Background workers a rank that prepare rows; 0 prepares them in the loop.", unit="workers", least=0
    )
