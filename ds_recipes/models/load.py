"""Finding a model: a folder, a hub id, or a config JSON for random weights."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ds_recipes.config.model_check import other_kind, other_weights, quantised_weights
from ds_recipes.errors import InputError
from ds_recipes.hub_probe import ensure_hub_reachable_or_offline
from ds_recipes.models.parts import WHOLE, other_part_hint
from ds_recipes.models.skeleton import NoSuchAttention, build_skeleton, tied_names
from ds_recipes.models.sources import FolderWeights, random_weights, shortened
from ds_recipes.models.vocabulary import check_vocabulary, grown_weights, with_vocabulary_size
from ds_recipes.ranges import RangeReader
from ds_recipes.world.group import World
from ds_recipes.world.hang.activity import here
from ds_recipes.world.together import nothing, work_together

HUB_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
HUB_COPIES = ["consolidated*", "original/*", "onnx/*"]  # the same weights in other forms


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and read, not yet built. `folder` is None for random weights; `part` is what of it is trained.

    Where the vocabulary has grown, `before` is the model as it lies in the folder, and `new_rows` says what the new rows
    hold: "mean" or "random".
    """

    hf_config: PretrainedConfig
    folder: Path | None
    seed: int
    trust_remote_code: bool
    before: "ModelSource | None" = None
    new_rows: str = "mean"
    part: str = WHOLE

    def resized(self, vocabulary_size: int, new_rows: str) -> "ModelSource":
        """This model with a larger vocabulary; itself where the size is the same.

        Raises:
            InputError: other tensors than the embedding and the output head depend on the size of the vocabulary.
        """
        before = self.before or self
        assert vocabulary_size >= before.vocabulary_size, "a vocabulary never shrinks"
        if vocabulary_size == before.vocabulary_size:
            return before
        grown = replace(before, hf_config=with_vocabulary_size(before.hf_config, vocabulary_size))
        if self.folder is None:
            return grown
        check_vocabulary(before._plain_skeleton(), grown._plain_skeleton())
        return replace(grown, before=before, new_rows=new_rows)

    def settled(self, allow_unused: bool) -> tuple["ModelSource", tuple[str, ...]]:
        """This model once it is known that each parameter will get its value, and what the user should know.

        Its files count: where config.json ties the output head to the embedding and the files have two different ones, the
        two are trained apart, as transformers loads them.

        Raises:
            InputError: the folder does not hold the model's weights, or, unless `allow_unused`, holds tensors that the
                model does not have; or random weights cannot be drawn.
        """
        if self.folder is None:
            random_weights(self._plain_skeleton(), self.seed, torch.device("cpu"))
            return self, ()
        source, notes = self, []
        weights = FolderWeights(source._plain_skeleton(), self.folder)
        apart = weights.differing_ties()
        if apart:
            source = source.untied(apart)
            weights = FolderWeights(source._plain_skeleton(), self.folder)
            notes.append(
                f"config.json ties {apart[0]} to the embedding, but the files have different values for the two: they are "
                "trained apart, as transformers loads them, and checkpoints say tie_word_embeddings false"
            )
        if weights.unused and not allow_unused:
            raise InputError(
                f"{self.folder}: holds {len(weights.unused)} tensors that the model of its config.json "
                f"({type(weights.skeleton).__name__}) does not have, so training would go on without them:\n"
                f"{shortened(weights.unused)}\n"
                f"{other_part_hint(source.hf_config) or 'Correct config.json.'} To train without them, and export without "
                "them, pass --allow_unused_weights."
            )
        for names, why in (
            (weights.unused, "--allow_unused_weights"),
            (weights.left_out, "as transformers leaves them"),
        ):
            if names:
                notes.append(
                    f"{len(names)} tensors of the files are not part of the model and left out, here and in what is saved "
                    f"({why}): {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
                )
        return source, tuple(notes)

    def ties(self) -> dict[str, str]:
        """Each further name of a shared parameter, and the name that the parameter goes by."""
        return tied_names(self._plain_skeleton())

    def untied(self, names: Sequence[str]) -> "ModelSource":
        """This model with parameters of their own for `names`, which its config ties to others.

        Raises:
            InputError: they are tied whatever the config says.
        """
        changed = self.config_copy()
        for config in (changed, changed.get_text_config()):
            config.tie_word_embeddings = False
        source = replace(self, hf_config=changed)
        still = [name for name in source.ties() if name in names]
        if still:
            raise InputError(
                f"{self.folder}: models of type {changed.model_type} tie {still[0]} to another parameter, but the files have "
                "different values for the two. Remove the one that does not belong there."
            )
        return source

    def skeleton(self, dtype: torch.dtype, attn_implementation: str, device: torch.device) -> PreTrainedModel:
        """The structure without storage; see `models/skeleton.py`."""
        return build_skeleton(self.config_copy(), dtype, attn_implementation, device, self.trust_remote_code, self.part)

    def has_attention(self, implementation: str) -> bool:
        """True if this model can run with that attention implementation of transformers."""
        if implementation not in self._attentions:
            try:
                self.skeleton(torch.float32, implementation, torch.device("cpu"))
                self._attentions[implementation] = True
            except NoSuchAttention:
                self._attentions[implementation] = False
        return self._attentions[implementation]

    @cached_property
    def _attentions(self) -> dict[str, bool]:
        """What is known of attention implementations: to find out, a skeleton is built."""
        return {}

    def config_copy(self) -> PretrainedConfig:
        """The config as it was read: transformers writes into the one that a model is built from."""
        return copy.deepcopy(self.hf_config)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return int(self.hf_config.get_text_config().vocab_size)

    @property
    def max_positions(self) -> int | None:
        """The longest row that the model can take, in tokens; None where its config does not say."""
        positions = getattr(self.hf_config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None else int(positions)

    @property
    def has_experts(self) -> bool:
        """True for a mixture of experts, by the names that transformers' configs give their number."""
        names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        return any(getattr(self.hf_config.get_text_config(), name, None) for name in names)

    def initial_weights(self, device: torch.device) -> RangeReader:
        """A range reader over the initial weights. It keeps a skeleton of its own.

        Raises:
            InputError: the folder does not hold this model's weights.
        """
        skeleton = self._plain_skeleton()
        if self.before is not None:
            return grown_weights(self.before.initial_weights(device), skeleton, self.seed, self.new_rows)
        if self.folder is None:
            return random_weights(skeleton, self.seed, device)
        return FolderWeights(skeleton, self.folder)

    def _plain_skeleton(self) -> PreTrainedModel:
        return self.skeleton(torch.float32, "eager", torch.device("cpu"))


def find_model(
    world: World,
    model_name: str | None,
    model_config: str | None,
    seed: int,
    trust_remote_code: bool,
    with_weights: bool = True,
    part: str = WHOLE,
) -> ModelSource:
    """Read the model's config; download a hub model's files once per host. Every rank must call it.

    Without `with_weights` the large files of a hub model are left where they are, and only its shape can be asked for.

    Raises:
        InputError: no such model, an unreadable config, or not a causal language model.
    """
    if model_name is None:
        assert model_config is not None
        config = world.check("model config", lambda: _read_config(Path(model_config), trust_remote_code, False))
        return ModelSource(config, None, seed, trust_remote_code, part=part)
    is_folder = Path(model_name).is_dir()
    folder = Path(model_name) if is_folder else _download(world, model_name, HUB_SMALL)
    config = world.check("model config", lambda: _read_config(folder, trust_remote_code, with_weights))
    if with_weights and not is_folder:
        folder = _download(world, model_name, [*HUB_SMALL, "*.safetensors"])
    return ModelSource(config, folder, seed, trust_remote_code, part=part)


def _read_config(path: Path, trust_remote_code: bool, with_weights: bool) -> PretrainedConfig:
    """The config of a folder or a file, once it is known that its weights are weights."""
    file = path / "config.json" if path.is_dir() else path
    kind = other_kind(path) if path.is_dir() and not file.exists() else None
    if kind is not None:
        raise InputError(f"{path}: {kind}")
    try:
        shape = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(_why_not_read(path, error)) from error
    quantised = quantised_weights(shape, file)
    problems = [*([quantised] if quantised else []), *(other_weights(shape, file) if with_weights else [])]
    if problems:
        raise InputError("\n".join(problems))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # each class of configs raises what it likes for values that do not fit together
        raise InputError(_why_not_read(path, error)) from error
    return config


def _why_not_read(path: Path, error: Exception) -> str:
    reason = next(
        (line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()), type(error).__name__
    )
    if "trust_remote_code" in str(error):
        return (
            f"{path}: the model comes with Python code of its own (auto_map in config.json), which runs only where you say "
            "so. Read that code, then pass --trust_remote_code."
        )
    return (
        f"{path}: cannot be read as a model's config ({reason}). Check the file; a model that is newer than transformers "
        "needs a newer one."
    )


def _download(world: World, model_name: str, patterns: list[str]) -> Path:
    """Fetch a hub model on one rank of each host, then let the others find it in the cache."""
    from huggingface_hub import snapshot_download

    def fetch(offline: bool) -> Path:
        try:
            with here().trusted():
                return Path(
                    snapshot_download(
                        model_name,
                        allow_patterns=patterns,
                        ignore_patterns=HUB_COPIES,
                        local_files_only=offline,
                    )
                )
        except (OSError, ValueError) as error:
            where = (
                "the hub could not be reached, and it is not in the cache"
                if offline
                else f"the hub gave no such model ({str(error).splitlines()[0]})"
            )
            raise InputError(
                f"--model_name {model_name}: there is no such folder; {where}. Check the spelling, or pass a folder."
            ) from error

    first = world.local_rank == 0
    reachable = world.check("hub", ensure_hub_reachable_or_offline)
    found = work_together(
        world, "model download", lambda: fetch(not reachable) if first else None, nothing, nothing, nothing
    )
    return world.check("model cache", lambda: found or fetch(True))
