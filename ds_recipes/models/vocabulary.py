"""A vocabulary that grows: how many rows a model needs, its config with that many, and the values of the new rows.

Each value of a new row depends on nothing but its place in the full tensor and the model's own weights, so any split of
the tensor into ranks gives the same ones. Old rows stay as they are in the folder.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ds_recipes.errors import InputError
from ds_recipes.models.skeleton import parameter_shapes, saved_buffers
from ds_recipes.models.sources import InitialWeights
from ds_recipes.ranges import RangeReader

CHUNK_ELEMENTS = 1 << 20
"""Old weights held at a time while their mean is taken: 4 MB in float32, 8 MB in float64."""

STD_NAMES = ("initializer_range", "init_std")
"""What transformers' configs call the standard deviation of a model's initial weights."""

NewRow = Callable[[str, int], torch.Tensor]
"""The float32 values of a parameter's new row, by the parameter's name and the row's number."""


def rows_needed(tokenizer_size: int, model_rows: int, multiple: int | None) -> int:
    """Rows of the embedding: enough for the tokenizer's ids, never fewer than the model has, rounded up to `multiple`."""
    rows = max(tokenizer_size, model_rows)
    return rows if multiple is None else -(-rows // multiple) * multiple


def with_vocabulary_size(hf_config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """A copy of the config with another vocabulary size, in the text model's own config and wherever it is repeated."""
    changed = copy.deepcopy(hf_config)
    text = changed.get_text_config()
    before = text.vocab_size
    text.vocab_size = rows
    if getattr(changed, "vocab_size", None) == before:
        changed.vocab_size = rows
    return changed


def check_vocabulary(old: PreTrainedModel, new: PreTrainedModel) -> None:
    """See that the two skeletons differ in nothing but the rows of the embedding and of the output head.

    Raises:
        InputError: another tensor follows from the vocabulary, or the embedding has not one row a token.
    """
    old_rows, new_rows = _rows(old), _rows(new)
    grows, shapes = _vocabulary_names(new), parameter_shapes(new)
    for name, shape in parameter_shapes(old).items():
        has_rows = name in grows and shape[0] == old_rows
        if shapes.get(name) != ((new_rows, *shape[1:]) if has_rows else shape):
            raise _follows(old, name, "vocab_size")
    buffers = saved_buffers(new)
    for name, buffer in saved_buffers(old).items():
        if name not in buffers or buffers[name].shape != buffer.shape:
            raise _follows(old, name, "vocab_size")
    _refuse_other_token_tables(old)


def _rows(model: PreTrainedModel) -> int:
    rows: int = model.config.get_text_config().vocab_size
    found = model.get_input_embeddings().get_parameter("weight").shape[0]
    if found != rows:
        raise InputError(
            f"models of type {model.config.model_type} have {found} rows in their embedding for a vocab_size of {rows}, so "
            "their vocabulary cannot grow. Leave out --added_tokens, --added_plain_tokens and --pad_vocabulary_to."
        )
    return rows


def _vocabulary_names(model: PreTrainedModel) -> set[str]:
    """The parameters that have a row a token: those of the embedding and of the output head, once where they are tied."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules: tuple[nn.Module, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    return {names[id(parameter)] for module in modules for parameter in module.parameters(recurse=False)}


def _refuse_other_token_tables(model: PreTrainedModel) -> None:
    """Some models look token ids up in a second table whose size is a setting of its own (Gemma 3n)."""
    settings = vars(model.config.get_text_config())
    sizes = {value: key for key, value in settings.items() if key.startswith("vocab_size_")}
    for path, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        if is_table and module.num_embeddings in sizes:
            raise _follows(model, f"{path}.weight", sizes[module.num_embeddings])


def _follows(model: PreTrainedModel, name: str, key: str) -> InputError:
    return InputError(
        f"the vocabulary of models of type {model.config.model_type} cannot grow: {name} has a shape that follows from "
        f"{key}, and it is neither the embedding nor the output head. Leave out --added_tokens, --added_plain_tokens and "
        "--pad_vocabulary_to."
    )


class GrownWeights(InitialWeights):
    """A range reader over a model whose vocabulary has grown: old rows from `old`, new ones from `new_row`."""

    def __init__(self, old: RangeReader, shapes: Mapping[str, tuple[int, ...]], new_row: NewRow) -> None:
        super().__init__(shapes)
        self._old = old
        self._new_row = new_row

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        return self._old.buffers

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened parameter into `out`; it may cut rows anywhere."""
        border = prod(self._old.shape(name))
        num_old = max(0, min(out.numel(), border - start))
        if num_old:
            self._old.read_into(kind, name, start, out[:num_old])
        width = prod(self.shape(name)[1:])
        filled = num_old
        while filled < out.numel():
            row, column = divmod(start + filled, width)
            piece = self._new_row(name, row).reshape(-1)[column : column + out.numel() - filled]
            out[filled : filled + piece.numel()].copy_(piece)
            filled += piece.numel()


def mean_rows(old: RangeReader) -> NewRow:
    """Every new row is the mean of all old ones; read when a rank first needs it."""
    means: dict[str, torch.Tensor] = {}

    def new_row(name: str, row: int) -> torch.Tensor:
        if name not in means:
            means[name] = mean_row(old, name)
        return means[name]

    return new_row


def mean_row(reader: RangeReader, name: str) -> torch.Tensor:
    """The mean over a parameter's rows, summed in float64 and rounded to float32, [elements of a row].

    Rows are added in a fixed order by element-wise sums alone, so that every rank gets the same bits, whatever its
    number of threads and its processor.
    """
    shape = reader.shape(name)
    rows, width = shape[0], prod(shape[1:])
    chunk = min(rows, max(1, CHUNK_ELEMENTS // width))
    buffer = torch.empty(chunk * width)
    total = torch.zeros(width, dtype=torch.float64)
    for first in range(0, rows, chunk):
        part = buffer[: min(chunk, rows - first) * width]
        reader.read_into("fp32", name, first * width, part)
        total += _sum_of_rows(part.reshape(-1, width).double())
    return (total / rows).float()


def _sum_of_rows(terms: torch.Tensor) -> torch.Tensor:
    """Sum over the rows of `terms`, [rows, width], which is overwritten: the upper half onto the lower, again and again."""
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        terms[: len(terms) - half] += terms[half:]
        terms = terms[:half]
    return terms[0]


def random_rows(seed: int, std: float, shapes: Mapping[str, tuple[int, ...]]) -> NewRow:
    """Every new row is normal with mean 0, from a generator of its own; a bias starts at 0 as in a new model.

    numpy's Philox takes all 128 bits of a key. torch's generator for a CPU takes only 32 bits of a seed, so that in one
    run of 86 two of 10,000 rows would be equal.
    """

    def new_row(name: str, row: int) -> torch.Tensor:
        width = prod(shapes[name][1:])
        if len(shapes[name]) == 1:
            return torch.zeros(width)
        digest = hashlib.blake2b(f"{seed}:{name}:{row}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        return torch.from_numpy(generator.standard_normal(width)).mul_(std).float()

    return new_row


def grown_weights(old: RangeReader, skeleton: PreTrainedModel, seed: int, new_rows: str) -> GrownWeights:
    """The weights of `skeleton`, whose vocabulary is larger than that of `old`; `new_rows` is "mean" or "random".

    Raises:
        InputError: the rows are to be random and the model's config does not say how large.
    """
    shapes = parameter_shapes(skeleton)
    if new_rows == "mean":
        return GrownWeights(old, shapes, mean_rows(old))
    text = skeleton.config.get_text_config()
    stds = [float(getattr(text, key)) for key in STD_NAMES if getattr(text, key, None) is not None]
    if not stds:
        raise InputError(
            f"--new_token_init random: the config of this model of type {skeleton.config.model_type} has no "
            f"{STD_NAMES[0]}, so the size of its initial weights is not known. Use --new_token_init mean."
        )
    return GrownWeights(old, shapes, random_rows(seed, stds[0], shapes))
