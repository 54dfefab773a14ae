"""What can be exported: a checkpoint of ours, a folder that DeepSpeed wrote, a file that holds a whole state_dict."""

import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ds_recipes.checkpoint.export.names import ModelNames
from ds_recipes.checkpoint.export.verified import WEIGHTS, VerifiedWeights
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.files import read_bytes, why_damaged
from ds_recipes.checkpoint.load import check_same_model, open_reader
from ds_recipes.checkpoint.manifest import BUFFERS, MANIFEST, PROBE, RANGES, STATE, Manifest, read_manifest
from ds_recipes.checkpoint.native import (
    DeepSpeedReader,
    DistributedReader,
    FullStateReader,
    OverBase,
    find_distributed,
    is_deepspeed,
    lacks_base,
    open_deepspeed,
    open_distributed,
    open_full_state,
    with_adapters,
)
from ds_recipes.checkpoint.native.write import BESIDE
from ds_recipes.data.tokenizer import VOCABULARY_FILES
from ds_recipes.errors import CheckpointError, InputError
from ds_recipes.models.load import ModelSource, find_model
from ds_recipes.models.parts import PROCESSOR_FILES, part_saved
from ds_recipes.models.skeleton import build_skeleton, parameter_shapes, saved_buffers
from ds_recipes.models.vocabulary import with_vocabulary_size
from ds_recipes.ranges import RangeReader
from ds_recipes.world.group import solo

CONFIG = "config.json"
FULL_STATE = "model.pt"
CPU = torch.device("cpu")
MODEL_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    *PROCESSOR_FILES,
)
"""Small files that belong to a Hugging Face model, beside config.json."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that is open for export.

    `files` are the small files by name, without config.json. `probe` is the file with the logits of training, None if
    training left none. `state` is what is known of the run. `finish` says after the reading whether what was read was whole.
    """

    path: Path
    kind: str
    hf_config: PretrainedConfig
    skeleton: PreTrainedModel
    reader: RangeReader
    trained_in: str
    files: Mapping[str, Path]
    probe: Path | None
    state: Mapping[str, Any]
    notes: tuple[str, ...]
    finish: Callable[[], None]

    @property
    def has_tokenizer(self) -> bool:
        """False where another program left no tokenizer with its weights, and --model named none."""
        config = self.files.get("tokenizer_config.json")
        own_code = config is not None and b'"auto_map"' in read_bytes(config)
        return own_code or any(Path(name).match(pattern) for name in self.files for pattern in VOCABULARY_FILES)


def open_source(path: Path, wanted: Wanted) -> Source:
    """Open whatever lies at `path`, and see that it holds the model of its config.

    Raises:
        CheckpointError: it is damaged, or of another model.
        InputError: nothing there can be exported, or the model's config is missing.
    """
    if (path / MANIFEST).exists():
        return _open_ours(path, wanted)
    _refuse_part_of_ours(path)
    return _open_foreign(path, wanted)


def _refuse_part_of_ours(path: Path) -> None:
    """A file of a checkpoint of ours holds a share of the model, or what another program would have put there is asked for.

    Raises:
        InputError: that is so; the checkpoint is the folder.
    """
    folder = next((place for place in list(path.parents)[:2] if (place / MANIFEST).is_file()), None)
    if folder is not None and not path.is_dir():
        what = "is a part of a checkpoint" if path.exists() else "there is no such file: the checkpoint's"
        rest = ", not one by itself" if path.exists() else " weights lie in several files"
        raise InputError(f"{path}: {what}{rest}. Pass the checkpoint's folder: --ckpt {folder}")


def _open_ours(path: Path, wanted: Wanted) -> Source:
    manifest = read_manifest(path)
    if wanted.lora:
        raise InputError(f"--lora {wanted.lora}: {path} has no adapters; it is a checkpoint of a whole model")
    streamed = _verify_before(path, manifest, wanted.verify)
    found = find_model(solo(), str(path), None, 0, wanted.trust_remote_code, with_weights=False)
    skeleton = _skeleton(found.hf_config, wanted)
    buffers = {name: tuple(buffer.shape) for name, buffer in saved_buffers(skeleton).items()}
    check_same_model(manifest, {**parameter_shapes(skeleton), **buffers}, str(path))
    reader = VerifiedWeights(path, manifest) if streamed else open_reader(path, manifest)

    def finish() -> None:
        if isinstance(reader, VerifiedWeights):
            reader.finish()
        if read_manifest(path) != manifest:
            raise CheckpointError(f"{path} was replaced by another checkpoint while it was exported")

    small = [
        name for name in manifest.files if "/" not in name and name not in (STATE, PROBE, BUFFERS, CONFIG, *BESIDE)
    ]
    files = {name: path / name for name in small if not name.startswith("rank-")}
    state = json.loads(read_bytes(path / STATE)) if STATE in manifest.files else {}
    state = {"engine": dict(manifest.engine), **state}
    trained_in = str(manifest.engine["parameters"])
    return Source(
        path, "checkpoint", found.hf_config, skeleton, reader, trained_in, files, path / PROBE, state, (), finish
    )


def _verify_before(path: Path, manifest: Manifest, verify: str) -> bool:
    """Verify what is not verified while it is read; True if the weights are.

    Raises:
        CheckpointError: a file is missing, has another size, or is damaged.
    """
    weights = {part.file for parameter in manifest.parameters.values() for part in parameter.cover}
    streamed = (
        verify == "full"
        and manifest.layout == RANGES
        and all(WEIGHTS in manifest.files[name].parts for name in weights)
    )
    for name, record in manifest.files.items():
        problem = why_damaged(path / name, record, sizes_only=verify == "sizes" or (streamed and name in weights))
        if problem:
            raise CheckpointError(f"{path}: {problem}")
    return streamed


def _open_foreign(path: Path, wanted: Wanted) -> Source:
    foreign = _foreign_reader(path, wanted)
    over_base = wanted.lora is not None and wanted.model is not None and lacks_base(foreign)
    found = _find_config(path, wanted, with_weights=over_base)
    whole = OverBase(foreign, found.initial_weights(CPU)) if over_base else foreign
    reader = with_adapters(whole, wanted.adapter_config, merge=True) if wanted.lora else foreign
    hf_config, notes = _as_large_as(found.hf_config, reader, wanted)
    skeleton = _skeleton(hf_config, wanted)
    named = ModelNames(reader, skeleton, path)
    assert found.folder is not None
    patterns = (*MODEL_FILES, "*.py") if wanted.trust_remote_code else MODEL_FILES
    files = {
        str(file.relative_to(found.folder)): file for pattern in patterns for file in sorted(found.folder.glob(pattern))
    }
    trained_in = foreign.trained_in or "float32"
    state = {"step": foreign.step, "base_model": wanted.model}
    kinds = {DeepSpeedReader: "DeepSpeed", DistributedReader: "torch.distributed.checkpoint"}
    kind = next((name for made, name in kinds.items() if isinstance(foreign, made)), "one state_dict")
    return Source(path, kind, hf_config, skeleton, named, trained_in, files, None, state, notes, lambda: None)


Foreign = DeepSpeedReader | DistributedReader | FullStateReader


def _foreign_reader(path: Path, wanted: Wanted) -> Foreign:
    """Open another program's checkpoint.

    Raises:
        InputError: it has adapters and --lora is not given, or the other way round.
    """
    if is_deepspeed(path):
        reader: Foreign = open_deepspeed(path, wanted.trust_pickle)
    elif (distributed := find_distributed(path)) is not None:
        reader = open_distributed(distributed, wanted.trust_pickle)
    else:
        reader = open_full_state(_full_state_file(path), wanted.trust_pickle)
    has_lora = any(".lora_" in name for name in reader.names)
    if has_lora and wanted.lora is None:
        raise InputError(f"{path} holds LoRA adapters: say --lora merge or --lora adapter")
    if wanted.lora and not has_lora:
        raise InputError(f"--lora {wanted.lora}: {path} has no LoRA adapters")
    return reader


def _full_state_file(path: Path) -> Path:
    """`path` itself, or the one file in it.

    Raises:
        InputError: there is none.
    """
    if path.suffix == ".distcp":
        raise InputError(
            f"{path}: holds one rank's share of a model. Pass the folder that it lies in: --ckpt {path.parent}"
        )
    if path.is_file():
        return path
    if (path / FULL_STATE).is_file():
        return path / FULL_STATE
    if not path.exists():
        raise InputError(f"{path}: there is no such checkpoint")
    hint = " It holds a run: name one of its checkpoints, or pass the folder with --run." if _is_run(path) else ""
    raise InputError(
        f"{path}: nothing in it can be exported: neither {MANIFEST}, nor files of DeepSpeed or "
        f"torch.distributed.checkpoint, nor {FULL_STATE}.{hint}"
    )


def _is_run(path: Path) -> bool:
    return any(re.fullmatch(r"(iter_|checkpoint-)\d+", entry.name) for entry in path.iterdir())


def _find_config(path: Path, wanted: Wanted, with_weights: bool) -> ModelSource:
    """The model's config: that of --model, or one that lies in the checkpoint's folder or in the one above it.

    Without `with_weights` the weights of a hub model are left where they are.

    Raises:
        InputError: there is none.
    """
    places = [path.parent] if path.is_file() else [path, path.parent]
    beside = next((str(place) for place in places if (place / CONFIG).is_file()), None)
    model = wanted.model or beside
    if model is None:
        raise InputError(
            f"{path}: no {CONFIG} lies with it. Name the folder or hub id of the model that was trained with --model."
        )
    try:
        return find_model(solo(), model, None, 0, wanted.trust_remote_code, with_weights)
    except InputError as error:
        raise InputError(str(error).replace("--model_name", "--model")) from error


def _as_large_as(
    hf_config: PretrainedConfig, reader: RangeReader, wanted: Wanted
) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """The config with the checkpoint's vocabulary: training may have grown the embedding."""
    embedding = _skeleton(hf_config, wanted).get_input_embeddings()
    rows, columns = embedding.get_parameter("weight").shape
    name = next(
        (name for name in reader.names if name.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight"))), None
    )
    saved = reader.shape(name) if name is not None else (rows, columns)
    if saved == (rows, columns) or len(saved) != 2 or saved[1] != columns:
        return hf_config, ()
    note = f"the checkpoint has {saved[0]:,} rows in its vocabulary, config.json {rows:,}: the former were taken"
    return with_vocabulary_size(hf_config, saved[0]), (note,)


def _skeleton(hf_config: PretrainedConfig, wanted: Wanted, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build_skeleton(deepcopy(hf_config), dtype, "eager", CPU, wanted.trust_remote_code, part_saved(hf_config))


def dtypes_apart(hf_config: PretrainedConfig, dtype: torch.dtype, wanted: Wanted) -> dict[str, torch.dtype]:
    """The parameters and saved buffers that transformers gives another dtype when it loads the model in `dtype`."""
    model = _skeleton(hf_config, wanted, dtype)
    own = {**dict(model.named_parameters()), **saved_buffers(model)}
    return {name: tensor.dtype for name, tensor in own.items() if tensor.dtype != dtype}


def open_adapter(path: Path, wanted: Wanted) -> tuple[RangeReader, str]:
    """The LoRA adapter of a checkpoint under PEFT's names, and the dtype that it was trained in.

    Raises:
        InputError: there is none.
    """
    reader = _foreign_reader(path, wanted)
    return with_adapters(reader, wanted.adapter_config, merge=False), reader.trained_in or "float32"
