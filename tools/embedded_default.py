"""Make the embedded default: a small model, its tokenizer and two data sets, from Python's own standard library.

    python tools/embedded_default.py [FOLDER]      # default: embedded/

Nothing is downloaded. The folder then holds model/ (a Llama-shaped model with random weights, and a tokenizer trained
on the spot), text.jsonl, alpaca.jsonl, and text_validation.jsonl, alpaca_validation.jsonl. `make setup` runs this once.
"""

import importlib
import inspect
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from types import ModuleType

MODULES = """
    abc argparse ast asyncio.tasks base64 bisect calendar cmd code collections configparser contextlib copy csv
    dataclasses datetime decimal difflib dis email.message enum filecmp fileinput fnmatch fractions ftplib functools
    getopt gettext glob graphlib gzip hashlib heapq html html.parser http.client http.cookies http.server imaplib
    inspect io ipaddress json json.decoder json.encoder keyword linecache locale logging logging.handlers lzma
    mailbox mimetypes multiprocessing.pool netrc numbers operator optparse os pathlib pdb pickle pickletools
    platform plistlib poplib pprint profile queue quopri random re reprlib sched secrets selectors shelve shlex
    shutil smtplib socket socketserver sqlite3 ssl statistics string stringprep subprocess symtable sysconfig
    tarfile tempfile textwrap threading timeit token tokenize trace traceback types typing unittest.case
    unittest.mock urllib.parse urllib.request urllib.robotparser uuid warnings wave weakref wsgiref.util
    xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipapp zipfile
""".split()  # noqa: SIM905 - a hundred quoted names are harder to read

JAPANESE = (
    "言語モデルは、前の文脈から次のトークンを予測するように学習します。",
    "継続事前学習では、公開された重みから始めて、新しい言語や分野の文章で学習を続けます。",
    "命令調整では、指示の部分は損失に含めず、応答の部分だけを学習の対象にします。",
    "学習が途中で止まっても、最後に保存したチェックポイントから同じ順序で再開できます。",
    "東京から大阪までは新幹線でおよそ二時間半かかります。",
)

VOCABULARY_SIZE = 4096
CONTEXT = 1024
QUESTION = "What does this function do?"
LONGEST_SOURCE = 6000  # characters of one text record
LONGEST_SIGNATURE = 240  # characters: with the prompt around it fewer tokens than a row of 256
VALIDATION_SHARE = 20  # every twentieth record, by its content

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def main(folder: Path) -> None:
    """Write the folder anew; it appears under its name only when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    members = [member for name in MODULES for member in documented_functions(importlib.import_module(name))]
    texts = [{"text": text} for text in [*JAPANESE, *module_texts(), *(source for _, _, source in members)]]
    questions = [
        {"instruction": QUESTION, "input": signature, "output": docstring} for signature, docstring, _ in members
    ]
    write_split(partial, "text", texts)
    write_split(partial, "alpaca", questions)
    make_tokenizer([record["text"] for record in texts], partial / "model")
    make_model(partial / "model")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    print(f"{folder}: {len(texts):,} text records, {len(questions):,} alpaca records, a model; {size:.0f} MB")


def module_texts() -> Iterator[str]:
    """The documentation that modules carry themselves."""
    for name in MODULES:
        docstring = inspect.getdoc(importlib.import_module(name))
        if docstring:
            yield f"{name}\n\n{docstring}"[:LONGEST_SOURCE]


def documented_functions(module: ModuleType) -> Iterator[tuple[str, str, str]]:
    """(signature, first paragraph of the docstring, source) of each documented function and method of a module."""
    owners = [
        module,
        *(cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__),
    ]
    for owner in owners:
        for name, function in sorted(vars(owner).items()):
            if not inspect.isfunction(function) or function.__module__ != module.__name__ or not function.__doc__:
                continue
            try:
                signature, source = str(inspect.signature(function)), inspect.getsource(function)
            except (OSError, TypeError, ValueError):
                continue
            docstring = inspect.cleandoc(function.__doc__).split("\n\n")[0].strip()
            label = name if owner is module else f"{owner.__name__}.{name}"
            if docstring and len(signature) <= LONGEST_SIGNATURE:
                yield f"{module.__name__}: def {label}{signature}", docstring, inspect.cleandoc(source)[:LONGEST_SOURCE]


def write_split(folder: Path, name: str, records: list[dict[str, str]]) -> None:
    """Records to NAME.jsonl and NAME_validation.jsonl, split by content; equal records are kept once."""
    lines = dict.fromkeys(json.dumps(record, ensure_ascii=False) for record in records)
    files = {"": [], "_validation": []}  # type: dict[str, list[str]]
    for line in lines:
        held_out = int.from_bytes(blake2b(line.encode(), digest_size=4).digest(), "big") % VALIDATION_SHARE == 0
        files["_validation" if held_out else ""].append(line)
    for suffix, chosen in files.items():
        (folder / f"{name}{suffix}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def make_tokenizer(texts: list[str], folder: Path) -> None:
    """Train a byte-level BPE tokenizer that puts <s> before a text, and save it as transformers reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **SPECIAL_TOKENS)
    fast.save_pretrained(folder)


def make_model(folder: Path) -> None:
    """Save a Llama-shaped model of 7 M parameters with random weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore", DeprecationWarning)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "embedded"))
