"""Which parameters weight decay pulls on: decided by a module's kind and a parameter's name, not by the number of dimensions.

Decay is for weights that multiply activations. Biases, gains (of norms and others) and the rates of a recurrence are left
alone, also where a model keeps them with two dimensions: an expert's biases [experts, features], a norm of each head
[heads, head size], Mamba's A_log [channels, state]. Mamba's own code marks such parameters with `_no_weight_decay`, which is
heeded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

BIAS = re.compile(r"(?:^|_)bias(?:es)?(?:$|_)")
"""Of a parameter's own name: bias, gate_up_proj_bias, dt_bias, e_score_correction_bias, bias_ih_l0."""

NORM_CLASS = re.compile(r"norm(?!al|ed|head|emb)", re.IGNORECASE)
"""Of a class: LlamaRMSNorm, CohereLayerNorm, GroupNorm; not Baichuan's NormHead, which is a linear layer."""

NORM_NAME = re.compile(r"(?:^|_)(?:layer_?|rms_?)?(?:norm|ln)(?:$|_|\d)")
"""Of a module or a parameter: q_norm, input_layernorm, ln_1, norm_weight."""

RATES = re.compile(r"A_logs?|Ds?|dt|sinks?|attention_sinks?|time_.*")
"""Of a parameter that is not in a linear layer: a recurrence's rates (Mamba, RWKV), and the weight of attending to nothing."""

GAIN = re.compile(r"(?:.*_)?(?:scales?|gains?|gamma|lambda\d*)")
"""Of the same: what multiplies a feature by itself, as a norm's weight does."""

LINEAR = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Decay:
    """What weight decay does to one parameter. `spared` says why it is left alone; None: it decays."""

    kind: str  # class of the module and name in it, such as LlamaRMSNorm.weight
    numel: int
    spared: str | None


def weight_decay_of(model: nn.Module) -> dict[str, Decay]:
    """The verdict on each trained parameter by its canonical name. Call it on a skeleton: shards have other shapes."""
    found: dict[str, Decay] = {}
    seen: set[int] = set()
    for path, owner, local, parameter in _placed(model):
        if id(parameter) not in seen and parameter.requires_grad:
            kind = f"{type(owner).__name__}.{local}"
            found[path] = Decay(kind, parameter.numel(), _why_spared(path, owner, local, parameter))
        seen.add(id(parameter))
    return found


def decayed_names(model: nn.Module) -> frozenset[str]:
    """Names of the trained parameters that decay."""
    return frozenset(name for name, decay in weight_decay_of(model).items() if decay.spared is None)


def _placed(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Each parameter with its full name, the module that has it, and its name there; a list's are those of its owner."""
    owners = dict(model.named_modules())
    for path, module in owners.items():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{path}.{name}" if path else name
            owner, local = module, name
            if isinstance(module, nn.ParameterList | nn.ParameterDict):
                parent, _, local = path.rpartition(".")
                owner = owners[parent]
            yield full, owner, local, parameter


def _why_spared(path: str, owner: nn.Module, local: str, parameter: nn.Parameter) -> str | None:
    if getattr(parameter, "_no_weight_decay", False):
        return "marked by the model"
    if BIAS.search(local):
        return "bias"
    if isinstance(owner, LINEAR) and local == "weight":
        return None
    attribute = path.split(".")[-2] if "." in path else ""
    is_norm = NORM_CLASS.search(type(owner).__name__) or NORM_NAME.search(local)
    if is_norm or (local == "weight" and NORM_NAME.search(attribute)):
        return "norm"
    if RATES.fullmatch(local):
        return "rate"
    if GAIN.fullmatch(local):
        return "gain"
    if sum(size != 1 for size in parameter.shape) < 2:
        return "vector"
    return None
