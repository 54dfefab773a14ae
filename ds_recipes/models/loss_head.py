"""The loss, computed inside the head module's own forward.

Under ZeRO-3 the head's weight exists only while that module runs, so the loss belongs there. It is computed for the
target positions alone, in chunks, and the gradient of a chunk is taken while its logits are at hand: full logits never
exist, and nothing is computed twice (the idea of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of one chunk: 16 MB of float32 on a CPU (its caches), 256 MB on a GPU (large matrix products)."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head: `cap * tanh(scale * x / cap)`, without the cap where it is None."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> "LogitTransform":
        """Read the scale and cap that transformers' models declare (Cohere, Granite, Falcon-H1, Gemma 2)."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(scale, float(cap) if cap else None)


class _ChunkedTokenLoss(torch.autograd.Function):
    """Sum of cross-entropy of `hidden @ weight.T + bias` against `target_ids`; see `token_loss_sum`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [targets, hidden]
        weight: torch.Tensor,  # [vocabulary, hidden]
        bias: torch.Tensor | None,  # [vocabulary]
        target_ids: torch.Tensor,  # [targets]
        transform: LogitTransform,
        with_gradient: bool,
    ) -> torch.Tensor:
        chunk = max(64, CHUNK_ELEMENTS[hidden.device.type] // weight.shape[0])
        wants_hidden, wants_weight, wants_bias = (with_gradient and wanted for wanted in ctx.needs_input_grad[:3])
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        weight = weight.to(hidden.dtype)  # no copy but under autocast
        bias = None if bias is None else bias.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk]  # [chunk, hidden]
            logits = nn.functional.linear(part, weight, bias)  # [chunk, vocabulary]
            loss, grad_logits = _token_loss(logits, target_ids[start : start + chunk], transform, with_gradient)
            total += loss
            if grad_logits is None:
                continue
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + chunk])
            if grad_weight is not None and grad_logits.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), part)
            elif grad_weight is not None:
                grad_weight += grad_logits.t() @ part
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_total).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad_total).to(bias_dtype),
            None,
            None,
            None,
        )


def _token_loss(
    logits: torch.Tensor, target_ids: torch.Tensor, transform: LogitTransform, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of cross-entropy of one chunk, and its gradient with respect to the head's raw output in that output's dtype."""
    scores, slope = logits, None  # [chunk, vocabulary]
    if transform.scale != 1.0:
        scores = scores.float() * transform.scale
    if transform.cap is not None:
        squashed = torch.tanh(scores.float() / transform.cap)
        scores, slope = squashed * transform.cap, 1.0 - squashed.square()
    log_probs = torch.log_softmax(scores, dim=-1, dtype=torch.float32)  # [chunk, vocabulary]
    loss = -log_probs.gather(1, target_ids[:, None]).sum()
    if not with_gradient:
        return loss, None
    gradient = log_probs.exp_()  # softmax
    gradient.scatter_add_(1, target_ids[:, None], gradient.new_full((1, 1), -1.0).expand(len(target_ids), 1))
    if slope is not None:
        gradient *= slope
    if transform.scale != 1.0:
        gradient *= transform.scale
    return loss, gradient.to(logits.dtype)


def token_loss_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target_ids: torch.Tensor,
    transform: LogitTransform,
) -> torch.Tensor:
    """Sum of cross-entropy over target tokens, a float32 scalar, differentiable in `hidden`, `weight` and `bias`.

    Args:
        hidden: [targets, hidden], the states that predict; may have no rows.
        weight: [vocabulary, hidden]; gathered by the engine while the head runs.
        bias: [vocabulary] or None.
        target_ids: [targets], int64.
        transform: what the model does to its logits.

    Under torch's autocast the products are in its dtype, as those of a linear layer are.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):
        return _ChunkedTokenLoss.apply(hidden, weight, bias, target_ids, transform, torch.is_grad_enabled())  # type: ignore[no-any-return, no-untyped-call]


def install_loss_head(model: PreTrainedModel) -> None:
    """Make `model(input_ids, position_ids, target_index, target_ids)` return the sum of its target tokens' losses.

    Without targets the call is the model's own forward and returns its logits, [rows, context, vocabulary]. Only bound
    forwards are replaced, so that parameter names stay as they are.
    """
    head = model.get_output_embeddings()
    transform = LogitTransform.of(model.config.get_text_config())
    native_head, native_model = head.forward, model.forward

    def head_forward(_: nn.Module, hidden: torch.Tensor, target_ids: torch.Tensor | None = None) -> torch.Tensor:
        if target_ids is None:
            scores: torch.Tensor = native_head(hidden)
            return scores
        return token_loss_sum(hidden, head.weight, getattr(head, "bias", None), target_ids, transform)

    def model_forward(
        _: nn.Module,
        input_ids: torch.Tensor,  # [rows, context]
        position_ids: torch.Tensor,  # [rows, context]
        target_index: torch.Tensor | None = None,  # [targets]
        target_ids: torch.Tensor | None = None,  # [targets]
        **attention: Any,
    ) -> torch.Tensor:
        if target_ids is None or target_index is None:
            logits: torch.Tensor = native_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            return logits
        states = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **attention)
        hidden = states.last_hidden_state.flatten(0, 1).index_select(0, target_index)  # [targets, hidden]
        loss: torch.Tensor = head(hidden, target_ids)
        return loss

    head.forward = MethodType(head_forward, head)
    model.forward = MethodType(model_forward, model)
