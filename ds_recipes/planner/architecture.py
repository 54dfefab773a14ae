"""What the planner knows of a model: every parameter's shape, in the order in which modules use them, and its kernels' traits."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Parameter:
    """One trained tensor. `share` is the part of the tokens that use it: below 1 for an expert of a mixture."""

    name: str
    shape: tuple[int, ...]
    share: float = 1.0
    is_bias: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Block:
    """One transformer layer: its modules in the order of the forward pass, each with its parameters."""

    modules: tuple[tuple[Parameter, ...], ...]
    window: int | None = None  # tokens that attention sees; None: the whole document
    experts: int = 0  # of its feed-forward; 0: a dense one
    experts_per_token: int = 0
    intermediate_size: int = 0

    @property
    def parameters(self) -> Iterator[Parameter]:
        return (parameter for module in self.modules for parameter in module)

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class Kernels:
    """What decides which tensors a block keeps for backward."""

    norm: str  # "rms", "gemma" (rms with a float32 weight), "layer" or "free" (without weights)
    norms: int  # over the hidden size, in a block
    qk_norm: str  # "", "head" or "width"
    mlp: str  # "gated" or "plain"
    activation: str  # "relu", another "one" kernel, or "spelt out" in single operations (gelu_new)
    parallel: bool = False  # attention and feed-forward read the same input
    fused_qkv: bool = False
    fused_gate_up: bool = False
    rotary: bool = True
    dropout: bool = False
    capped: bool = False  # attention scores through tanh: transformers runs it eager


@dataclass(frozen=True)
class Architecture:
    """A causal language model without its weights."""

    family: str
    vocabulary_size: int
    hidden_size: int
    heads: int
    key_value_heads: int
    head_size: int
    embeddings: tuple[Parameter, ...]  # the token table first
    blocks: tuple[Block, ...]
    last: tuple[Parameter, ...]  # of the final norm, and what else lies before the head
    head: tuple[Parameter, ...]  # empty where it is the embedding
    kernels: Kernels
    exact: bool = False  # the sizes were read from the files of its weights

    @property
    def tied(self) -> bool:
        return not any(len(parameter.shape) == 2 for parameter in self.head)

    @property
    def parameters(self) -> Iterator[Parameter]:
        yield from self.embeddings
        for block in self.blocks:
            yield from block.parameters
        yield from self.last
        yield from self.head

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def head_numel(self) -> int:
        """Elements of the output matrix, tied or not."""
        return self.vocabulary_size * self.hidden_size
