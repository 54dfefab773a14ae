"""Mixtures of experts under ZeRO-3: a block that chooses among modules has to be gathered as one.

ZeRO-3 gathers a module's parameters as that module runs. An expert to which no token goes on one rank does not run there:
the others wait for that rank's part for ever, or the order that ZeRO-3 has learnt is broken. A block that is a leaf is
gathered whole, and experts without tokens get a gradient of zeros (https://www.deepspeed.ai/docs/config-json/, leaf_module;
deepspeed.utils.set_z3_leaf_modules).

transformers 5 keeps the experts of a layer in one tensor, mostly without a choice among modules; models with code of their
own mostly keep a list. Where a loop over the experts that have tokens calls a module for each (DBRX, LongCat-Flash), ranks
call it a different number of times, and ZeRO-3 hangs or fails over its order: such a block is a leaf too. So is an indexer
of sparse attention that calls a module for each query that has keys to choose from.
"""

import ast
import inspect
import textwrap
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from deepspeed.utils import get_z3_leaf_modules
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module, z3_leaf_module
from torch import nn
from transformers import PreTrainedModel

LEAST_EXPERTS = 2


def mark_expert_blocks(model: PreTrainedModel) -> None:
    """Make each block of a model that chooses among a list of experts a leaf of ZeRO-3.

    A leaf's gradients are reduced when that of its input is known. Where the embedding is frozen the input may need
    none, and DeepSpeed would reduce before they are there: then the embedding's output is made to need one.
    """
    blocks = expert_blocks(model)
    for block in blocks:
        set_z3_leaf_module(block, True)
    if blocks and not all(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
        model.enable_input_require_grads()


def expert_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules whose data decide which of their modules run: blocks of experts, and indexers that loop over queries."""
    return [
        module
        for module in model.modules()
        if _chooses_among_modules(module) or _loops_over_experts(module) or _loops_over_queries(module)
    ]


@contextmanager
def without_leaf_hooks(model: nn.Module) -> Iterator[None]:
    """Meanwhile no forward makes backward reduce the gradients of leaf modules, which DeepSpeed does in hooks of the modules.

    A backward that takes no parameter's gradient would put zeros among those of the step that follows.
    """
    hooks = [(module, module._backward_hooks) for module in model.modules() if z3_leaf_module(module)]
    try:
        for module, _ in hooks:
            module._backward_hooks = OrderedDict()
        yield
    finally:
        for module, own in hooks:
            module._backward_hooks = own


def leaf_class_names(model: nn.Module) -> list[str]:
    """Names of the classes of a model's leaf modules, by this module's doing, by the JSON's or by DeepSpeed's own."""
    return sorted({type(module).__name__ for module in get_z3_leaf_modules(model)})


def _chooses_among_modules(module: nn.Module) -> bool:
    """True for a block with a list of experts: one of that name, or any list of equals beside a router."""
    children = dict(module.named_children())
    lists = {name: child for name, child in children.items() if isinstance(child, nn.ModuleList | nn.ModuleDict)}
    has_router = any(map(_is_router, children.keys() - lists.keys()))
    return any(
        len(child) >= LEAST_EXPERTS and ("expert" in name.lower() or (has_router and _are_equals(child)))
        for name, child in lists.items()
    )


def _loops_over_experts(module: nn.Module) -> bool:
    """True for experts in one tensor whose class has only a loop; the others compute all at once, by `ExpertsInterface`."""
    is_fused = type(module).__name__.endswith("Experts") and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    return is_fused and any(True for _ in module.children()) and not hasattr(type(module).forward, "__wrapped__")


def _loops_over_queries(module: nn.Module) -> bool:
    """True for an indexer of sparse attention that calls a module of its own for each query with keys to choose from (Qwen 4)."""
    if not type(module).__name__.endswith("Indexer"):
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward))))
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    called = {ast.unparse(node.func) for loop in loops for node in ast.walk(loop) if isinstance(node, ast.Call)}
    return any(f"self.{name}" in called for name, _ in module.named_children())


def _is_router(name: str) -> bool:
    """By the names that published models use; a gate_proj is a part of an ordinary block."""
    return name == "gate" or name.endswith("_gate") or "router" in name or "gating" in name


def _are_equals(modules: nn.ModuleList | nn.ModuleDict) -> bool:
    return len({type(module) for module in modules.children()}) == 1
