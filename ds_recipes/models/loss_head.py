"""The loss, computed inside the head module's own forward.

Under ZeRO-3 the head's weight exists only while that module runs, so the loss belongs there. It is computed for the
target positions alone, in chunks, and the gradient of a chunk is taken while its logits are at hand: full logits never
exist, and nothing is computed twice (the idea of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ds_recipes.errors import InputError

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of one chunk: 16 MB of float32 on a CPU (its caches), 256 MB on a GPU (large matrix products)."""


PROBE_VALUES = (2.0**-20, 2.0**-5, 0.75, 3.0, 11.0, 50.0, 400.0, 2.0**13, 2.0**30)
"""What the head is made to give, and its negatives, to see what the model makes of it: from where a cap is linear to where
it is flat."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output: `cap * tanh(scale * x / cap)`, without the cap where it is None.

    Of the head's columns the first `columns` are the vocabulary, all where it is None; the others are padding.
    """

    scale: float = 1.0
    cap: float | None = None
    columns: int | None = None

    def scores(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the model makes of its head's output [..., columns], and the derivative by `scale * logits` with a cap."""
        scores, slope = logits, None
        if self.scale != 1.0:
            scores = scores.float() * self.scale
        if self.cap is not None:
            squashed = torch.tanh(scores.float() / self.cap)
            scores, slope = squashed * self.cap, 1.0 - squashed.square()
        if self.columns is not None and self.columns < scores.shape[-1]:
            scores = scores.float().clone()
            scores[..., self.columns :] = -torch.inf
        return scores, slope

    @classmethod
    def fitted(cls, given: torch.Tensor, made: torch.Tensor) -> "LogitTransform | None":
        """The transform that makes `made` [..., columns] of the head's output `given` [..., padded columns]; None if none does.

        `given` holds `PROBE_VALUES` and their negatives in each row, in this order and over and over.
        """
        rows, columns = made.reshape(-1, made.shape[-1]).double(), made.shape[-1]
        least, largest = PROBE_VALUES[0], PROBE_VALUES[-1]
        if rows.shape[0] != given[..., 0].numel() or columns < 2 * len(PROBE_VALUES) or not rows.isfinite().all():
            return None
        scale, top = float(rows[0, 0]) / least, float(rows[0, len(PROBE_VALUES) - 1])
        is_linear = abs(top - scale * largest) <= 1e-4 * abs(scale) * largest
        found = cls(
            1.0 if abs(scale - 1.0) < 1e-6 else scale,
            None if is_linear else abs(top),
            None if columns == given.shape[-1] else columns,
        )
        if scale == 0.0 or top == 0.0:
            return None
        expected = found.scores(given)[0].reshape(-1, given.shape[-1])[:, :columns].double()
        return found if torch.allclose(rows, expected, rtol=1e-4, atol=1e-12) else None


def probe_values(like: torch.Tensor) -> torch.Tensor:
    """`PROBE_VALUES` and their negatives over and over, in the shape of `like`, in float32."""
    values = torch.tensor([*PROBE_VALUES, *(-value for value in PROBE_VALUES)], device=like.device)
    times = -(-like.shape[-1] // len(values))
    return values.repeat(times)[: like.shape[-1]].expand(like.shape).contiguous()


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
    scores, slope = transform.scores(logits)  # [chunk, vocabulary]
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


@dataclass
class _Forward:
    """One forward of the model that wants something else of the head than its logits."""

    target_index: torch.Tensor | None = None  # [targets]
    target_ids: torch.Tensor | None = None  # [targets]
    loss: torch.Tensor | None = None
    given: torch.Tensor | None = None  # [rows, context, vocabulary], what the head gave instead of its logits


class LossHead:
    """The head of one model, and what the model does to its output, which is learned before the first loss."""

    def __init__(self, head: nn.Module) -> None:
        self.transform: LogitTransform | None = None
        self.running: _Forward | None = None
        self._head = head
        self._native = head.forward

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The head's own logits; in a forward that wants a loss, the sum of the token losses."""
        if self.running is None:
            logits: torch.Tensor = self._native(hidden, *args, **kwargs)
            return logits
        if self.running.target_ids is None:
            self.running.given = probe_values(self._native(hidden, *args, **kwargs))
            torch.set_grad_enabled(
                True
            )  # until `learn_transform` has the logits: what the model adds of its own then shows
            return self.running.given
        assert self.transform is not None, "learn_transform comes before the first loss"
        assert self.running.target_index is not None
        states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self.running.target_index)  # [targets, hidden]
        bias = getattr(self._head, "bias", None)
        return token_loss_sum(states, self._head.weight, bias, self.running.target_ids, self.transform)  # type: ignore[arg-type]

    def after_call(self, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What the model gets of a call of the head, after the engine's hooks have seen its output.

        It goes on with something as small as can be where the loss is all that is wanted.
        """
        if self.running is None or self.running.target_ids is None:
            return output
        self.running.loss = output
        return hidden.new_zeros(*hidden.shape[:-1], 1)


def install_loss_head(model: PreTrainedModel) -> None:
    """Make `model(input_ids, position_ids, target_index, target_ids)` return the sum of its target tokens' losses.

    The model's own forward runs up to its head, so that all that stands before the head is in the loss; what stands after it
    must be known (`learn_transform`). Without targets the call returns the model's logits, [rows, context, vocabulary]. Names
    of parameters stay as they are.

    Raises:
        InputError: the model has no head that is one matrix, with or without a bias.
    """
    head = model.get_output_embeddings()
    _check_head(model, head)
    loss_head = LossHead(head)
    native_model, accepted = model.forward, _accepted_names(model)
    counts_itself = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())

    def model_forward(
        _: nn.Module,
        input_ids: torch.Tensor,  # [rows, context]
        position_ids: torch.Tensor | None = None,  # [rows, context]; None: as the model counts them
        target_index: torch.Tensor | None = None,  # [targets]
        target_ids: torch.Tensor | None = None,  # [targets]
        **attention: Any,
    ) -> torch.Tensor:
        arguments = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **attention}
        arguments = {name: value for name, value in arguments.items() if accepted is None or name in accepted}
        if (
            counts_itself or position_ids is None
        ):  # from its padding id on, as RoBERTa does: other positions would be another model's
            arguments.pop("position_ids", None)
        if target_ids is None:
            logits: torch.Tensor = native_model(**arguments).logits
            return logits
        running = loss_head.running = _Forward(target_index, target_ids)
        try:
            native_model(**arguments)
        finally:
            loss_head.running = None
        if running.loss is None:
            raise InputError(f"{type(model).__name__} does not use its output embeddings to make logits; not supported")
        return running.loss

    head.forward = MethodType(lambda _, *args, **kwargs: loss_head.forward(*args, **kwargs), head)
    head.__class__ = _telling(type(head), loss_head)
    model.forward = MethodType(model_forward, model)
    model.__dict__["loss_head"] = loss_head


def learn_transform(model: PreTrainedModel, logits_of: Callable[[], torch.Tensor]) -> None:
    """Find out what the model does to its head's output, once, by its own forward with known numbers in that place.

    Under an engine it is a collective. `logits_of` calls the model without targets and returns its logits.

    Raises:
        InputError: it is no scale, cap or padding of the vocabulary, or a trained parameter takes part in it.
    """
    loss_head: LossHead = model.__dict__["loss_head"]
    if loss_head.transform is not None:
        return
    running = loss_head.running = _Forward()
    try:
        with torch.no_grad():
            logits = logits_of()
    finally:
        loss_head.running = None
    fitted = None if running.given is None else LogitTransform.fitted(running.given, logits.detach())
    if fitted is None or logits.requires_grad:
        raise InputError(
            f"{type(model).__name__} changes its logits after the head in a way that is not supported"
            f"{' (with something that is trained)' if logits.requires_grad else ''}: the loss could not be computed in the head. "
            "Supported are a scale, a soft cap and padding of the vocabulary."
        )
    loss_head.transform = fitted


def _check_head(model: PreTrainedModel, head: nn.Module | None) -> None:
    names = set() if head is None else {name for name, _ in head.named_parameters()}
    if head is None or "weight" not in names or names - {"weight", "bias"} or head.get_parameter("weight").ndim != 2:
        what = "no output embeddings" if head is None else f"a head with {', '.join(sorted(names)) or 'no parameters'}"
        raise InputError(
            f"{type(model).__name__} has {what}, and training needs one matrix, with or without a bias, that makes logits "
            "from hidden states; such models are not supported"
        )


def _accepted_names(model: PreTrainedModel) -> set[str] | None:
    """The arguments that the model's forward takes; None if it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_any else {parameter.name for parameter in parameters}


def _telling(plain: type[nn.Module], loss_head: LossHead) -> type[nn.Module]:
    """A subclass of the same name whose call tells the loss head of its output."""

    def call(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return loss_head.after_call(hidden, plain.__call__(self, hidden, *args, **kwargs))

    names = {"__call__": call, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (plain,), names)
