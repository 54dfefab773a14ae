"""What a transformer block keeps in memory for backward, tensor by tensor, and what its backward needs on top.

A tensor is kept if autograd saves it or a view of it. The counts follow transformers' own code of each family; docs/planning.md
has them as a table. tests/unit/planner/test_activations.py compares them with real blocks.
"""

from dataclasses import dataclass

from ds_recipes.planner.architecture import Architecture, Block

FLOAT32 = 4

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of a chunk of the loss head, as in `models/loss_head.py`; a test holds the two equal."""


PARTLY_ROTATED = ("phi", "phi3", "gpt_neox")
SOFTMAX_IN_HALF = ("gpt2", "falcon")
"""Families whose eager attention takes the softmax in the model's own dtype."""


@dataclass(frozen=True)
class Batch:
    """What one rank computes in one micro-step."""

    rows: int
    context_size: int
    itemsize: int  # bytes of a number in forward: 2 or 4
    attention: str  # as in the run's settings
    device: str = "cuda"  # or "cpu", whose kernels keep other tensors

    @property
    def tokens(self) -> int:
        return self.rows * self.context_size


def boundary_bytes(model: Architecture, batch: Batch) -> int:
    """The hidden states between two blocks: what a checkpointed block keeps."""
    return batch.tokens * model.hidden_size * batch.itemsize


def block_bytes(model: Architecture, block: Block, batch: Batch) -> float:
    """What one block keeps for its backward if nothing is computed again."""
    kernels, size = model.kernels, batch.itemsize
    per_token = _norms(model, batch) + _qk_norms(model, batch) + _attention(model, batch)
    per_token += _mixture(model, block, size) if block.experts else _mlp(block, kernels.mlp, kernels.activation, size)
    if kernels.dropout:
        per_token += 2 * model.hidden_size * (1 if batch.device == "cuda" else size)
    return batch.tokens * per_token + _attention_pairs(model, batch)


def backward_bytes(model: Architecture, block: Block, batch: Batch) -> float:
    """Gradients of activations that one block's backward holds beside what the block has kept, at the worst moment."""
    experts = max(1, block.experts_per_token)
    gradients = (2 if model.kernels.mlp == "gated" else 1) * experts * block.intermediate_size * batch.itemsize
    residual = 2 * model.hidden_size * batch.itemsize
    eager = 0.0
    if batch.attention == "eager":  # the softmax, its gradient and the scores' gradient, all in float32
        scores = batch.rows * model.heads * batch.context_size**2
        freed = _mlp(block, model.kernels.mlp, model.kernels.activation, batch.itemsize) * batch.tokens
        half = batch.itemsize if batch.itemsize < FLOAT32 else 0  # a copy of the softmax that is not needed any more
        eager = max(0.0, scores * (2 * FLOAT32 - half) - freed)
    return max(batch.tokens * (gradients + residual), eager)


def _norm(kind: str, width: int, size: int, output_kept: bool = True, input_kept: bool = True) -> float:
    """Bytes a token of one norm. In half precision RMS norms work on a float32 copy of their input."""
    output = width * size if output_kept else 0
    if kind in ("layer", "free"):  # OLMo's norm without weights works on a float32 copy too
        kept = FLOAT32 if kind == "free" else size
        return (width * kept if input_kept else 0) + output + 2 * FLOAT32
    copy = width * FLOAT32 if size < FLOAT32 or input_kept else 0
    normalised = width * (FLOAT32 if kind in ("gemma", "olmo") else size)
    return copy + normalised + output + FLOAT32


def _norms(model: Architecture, batch: Batch) -> float:
    """Norms over the hidden size, and the inputs of attention and feed-forward, which most of them make."""
    hidden, size, kind = model.hidden_size, batch.itemsize, model.kernels.norm
    if model.family == "olmo2":  # the norms come last: the residual stream itself is what the matrices read
        return 2 * _norm("olmo", hidden, size, output_kept=False) + 2 * hidden * size
    if model.kernels.norms == 4:
        return 2 * _norm(kind, hidden, size) + 2 * _norm(kind, hidden, size, output_kept=False)
    if model.kernels.parallel and model.kernels.norms == 2:
        return _norm(kind, hidden, size) + _norm(kind, hidden, size, input_kept=False)
    return model.kernels.norms * _norm(kind, hidden, size)


def _qk_norms(model: Architecture, batch: Batch) -> float:
    if not model.kernels.qk_norm:
        return 0.0
    kind = "olmo" if model.family == "olmo2" else model.kernels.norm
    widths = (model.heads * model.head_size, model.key_value_heads * model.head_size)
    return sum(_norm(kind, width, batch.itemsize, output_kept=False) for width in widths)


def _attention(model: Architecture, batch: Batch) -> float:
    """Queries, keys, values, the result and the softmax's sums: bytes a token."""
    size, queries = batch.itemsize, model.heads * model.head_size
    keys = model.key_value_heads * model.head_size
    if batch.attention == "flash_attention_2":
        return size * (2 * queries + 2 * keys) + FLOAT32 * model.heads
    if batch.attention == "eager" or _is_computed_plainly(model):
        return size * 4 * queries
    repeated = keys != queries  # keys and values are repeated for each head
    together = model.kernels.fused_qkv and not repeated and model.kernels.rotary
    values = queries + 2 * keys if together else queries  # a view of the fused projection keeps all of it
    copied = queries if model.family in PARTLY_ROTATED and batch.device == "cpu" else 0  # the result in another layout
    return size * (3 * queries + values + copied) + FLOAT32 * model.heads


def _is_computed_plainly(model: Architecture) -> bool:
    """Falcon's one head of keys fits none of sdpa's kernels, so torch takes its plain one."""
    return model.family == "falcon" and model.key_value_heads == 1


def _attention_pairs(model: Architecture, batch: Batch) -> float:
    """What grows with the square of the context: sdpa's mask, or eager's softmax."""
    pairs = batch.rows * batch.context_size**2
    if batch.attention == "flash_attention_2":
        return 0.0
    if batch.attention == "sdpa" and not _is_computed_plainly(model):
        return 0.0 if model.family == "opt" else float(pairs * batch.itemsize)  # OPT does not tell documents apart
    if batch.attention == "eager" and model.family in SOFTMAX_IN_HALF:
        return float(pairs * model.heads * batch.itemsize)
    half = batch.itemsize if batch.itemsize < FLOAT32 else 0
    capped = batch.itemsize if model.kernels.capped else 0
    return float(pairs * model.heads * (FLOAT32 + half + capped))


def _mlp(block: Block, kind: str, activation: str, size: int) -> float:
    """Bytes a token of a dense feed-forward."""
    tensors = 4 if kind == "gated" else 5 if activation == "spelt out" else 1 if activation == "relu" else 2
    return tensors * block.intermediate_size * size


def _mixture(model: Architecture, block: Block, size: int) -> float:
    """Bytes a token of a mixture: each token's row goes to so many experts."""
    each = 4 * block.intermediate_size * size + 2 * model.hidden_size * size
    router = block.experts * (size + FLOAT32) + model.hidden_size * size
    return block.experts_per_token * each + router


@dataclass(frozen=True)
class HeadBytes:
    """The loss head's memory at its two worst moments, what it keeps aside."""

    forward: float  # a chunk's logits and the gradient of the matrix that is being summed
    backward: float  # that gradient, multiplied by the loss's and in the model's dtype


def head_bytes(model: Architecture, batch: Batch, targets: int) -> HeadBytes:
    """The head of `targets` target tokens; see `models/loss_head.py`. The gathered matrix is not in it."""
    size, matrix = batch.itemsize, model.head_numel
    chunk = max(64, CHUNK_ELEMENTS[batch.device] // model.vocabulary_size)
    logits = min(chunk, targets) * model.vocabulary_size
    earlier = size if targets > chunk else 0  # the last chunk's gradient is still there
    half = size < FLOAT32
    copy = FLOAT32 if batch.device == "cpu" and half else 0  # CPUs take the softmax of a float32 copy
    softmax = logits * (size + earlier + FLOAT32 + max(copy, size if half else 0))
    product = logits * 2 * size + (matrix * size if half else 0)
    hidden = 2 * targets * model.hidden_size * size
    return HeadBytes(
        forward=max(softmax, product) + matrix * FLOAT32 + hidden,
        backward=matrix * (2 * FLOAT32 + (size if half else 0)) + hidden,
    )


def last_norm_bytes(model: Architecture, batch: Batch) -> float:
    """The final norm's input and result, which wait for the head's backward."""
    return batch.tokens * _norm(model.kernels.norm, model.hidden_size, batch.itemsize)


def shared_bytes(model: Architecture, batch: Batch) -> float:
    """What lives for the whole forward and backward: token ids, positions, masks, rotary tables."""
    pairs = batch.rows * batch.context_size**2
    mask = {"sdpa": 1, "eager": batch.itemsize}.get(batch.attention, 0) * pairs
    rotary = 2 * batch.tokens * model.head_size * batch.itemsize if model.kernels.rotary else 0
    return mask + rotary + 4 * 8 * batch.tokens
