"""The optimizer section of a DeepSpeed JSON, and what it binds."""

import json
from collections.abc import Mapping
from typing import Any

from ds_recipes.config.ds.findings import Findings
from ds_recipes.config.ds.rules import SAME, NoEffect, Only, Removed, Rule, Section, Value

ADAM_PARAMS: dict[str, Rule] = {
    "lr": Value("number", "lr", fsdp=SAME),
    "betas": Value("betas", fsdp=SAME),
    "eps": Value("number", "adam_eps", fsdp=SAME),
    "weight_decay": Value("number", "weight_decay", fsdp=SAME),
    "bias_correction": Only("bool", (True,), "Adam without bias correction is not there: leave it out"),
    "amsgrad": Only("bool", (False,), "AMSGrad is not there: leave it out"),
    "torch_adam": NoEffect("the optimizer is torch's own AdamW in any case", "bool"),
    "foreach": NoEffect("the optimizer is torch's fused AdamW"),
    "fused": NoEffect("the optimizer is torch's fused AdamW"),
    "fp32_optimizer_states": Only("bool", (True,), "use bf16_optimizer_states in bf16"),
    "set_grad_none": NoEffect("it changes no result"),
    "max_grad_norm": Removed("is refused by DeepSpeed as an optimizer's parameter: write gradient_clipping at the top"),
}
ADAM = Only("bool", (True,), "only decoupled weight decay (AdamW) is there: leave it out")
ADAMW = NoEffect("the type AdamW is decoupled in any case", "bool")

SGD_PARAMS: dict[str, Rule] = {
    "lr": Value("number", "lr", fsdp=SAME),
    "momentum": Value("number", "sgd_momentum", fsdp=SAME),
    "weight_decay": Value("number", "weight_decay", fsdp=SAME),
    "dampening": Only("number", (0,), "it is not there: leave it out"),
    "nesterov": Only("bool", (False,), "it is not there: leave it out"),
    "max_grad_norm": ADAM_PARAMS["max_grad_norm"],
}

# By the type's name: DeepSpeed takes its own in any case, torch's as torch writes them.
OPTIMIZERS: dict[str, tuple[str, dict[str, Rule]]] = {
    "adamw": ("adamw", ADAM_PARAMS | {"adam_w_mode": ADAMW}),
    "adam": ("adamw", ADAM_PARAMS | {"adam_w_mode": ADAM}),
    "SGD": ("sgd", SGD_PARAMS),
}
OTHERS = ("adagrad", "lamb", "muadam", "muadamw", "musgd", "lion", "muon")
TORCH_OTHERS = (
    "Adadelta", "Adafactor", "Adamax", "ASGD", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam",
)  # fmt: skip
KEYS = ("type", "params", "legacy_fusion")


def optimizer_rule(section: Any, found: Findings) -> Rule | None:
    """The rule for this section, with its type bound; None where there is nothing more to check."""
    if not isinstance(section, Mapping):
        return Section({})
    name = section.get("type")
    if name is None:
        found.problems.append(
            'optimizer.type is missing: DeepSpeed ignores the section then. Write "AdamW", or leave the section out'
        )
        return None
    key = str(name).lower() if str(name).lower() in OPTIMIZERS else str(name)
    if key not in OPTIMIZERS:
        is_known = str(name).lower() in OTHERS or name in TORCH_OTHERS
        lines = found.unsupported if is_known else found.problems
        who = "this program has" if is_known else "DeepSpeed has no such optimizer; this program has"
        lines.append(f"optimizer.type is {json.dumps(name)}: {who} AdamW, Adam and SGD")
        return None
    optimizer_type, params = OPTIMIZERS[key]
    found.bind("optimizer_type", "optimizer.type", optimizer_type, name)
    return Section(
        {
            "type": Value("text", fsdp=SAME),
            "params": Section(params),
            "legacy_fusion": NoEffect("it is for DeepSpeed's own Adam", "bool"),
        }
    )
