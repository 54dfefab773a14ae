"""The small files that every checkpoint carries, so that it becomes a Hugging Face model without its origin."""

import tempfile
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ds_recipes.models.load import ModelSource


def model_files(source: ModelSource, skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """config.json, generation_config.json and the tokenizer's files, by name; a remote-code model's Python files too."""
    config = source.config_copy()
    config.architectures = [type(skeleton).__name__]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        own = None if source.folder is None else source.folder / "generation_config.json"
        if own is not None and own.exists():
            (folder / own.name).write_bytes(own.read_bytes())
        else:
            GenerationConfig.from_model_config(config).save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    if source.trust_remote_code and source.folder is not None:
        files |= {path.name: path.read_bytes() for path in sorted(source.folder.glob("*.py"))}
    return files
