"""Load an exported model as anyone would, and say in JSON how it compares with what training recorded.

    python -P fresh_load.py FOLDER PROBE DTYPE [trust]

Run in a process of its own with plain transformers: nothing of ds_recipes is imported, so what passes here passes on
a machine that has never seen it. PROBE holds token ids and the logits that the training engine computed for them.
"""

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def compare(folder: str, probe_file: str, dtype: str, trust_remote_code: bool) -> dict[str, object]:
    """Keys that loading missed or did not know, and the largest difference of the logits with their own size."""
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=trust_remote_code
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    probe = load_file(probe_file)
    with torch.inference_mode():
        logits = model.eval()(probe["input_ids"]).logits.float()  # [1, tokens, vocabulary]
    return {
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "difference": float((logits - probe["logits"]).abs().max()),
        "largest_logit": float(probe["logits"].abs().max()),
        "tokenizer_size": len(tokenizer),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


if __name__ == "__main__":
    print("\n" + json.dumps(compare(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:] == ["trust"])))
