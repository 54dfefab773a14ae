"""Continue a prompt with an exported model, with plain transformers.

    python tools/generate.py FOLDER --prompt "def main(" [--max_new_tokens 64] [--temperature 0.8 --seed 1]

Without --temperature the likeliest token is taken each time. Nothing of ds_recipes is imported: what this prints, any
program that reads Hugging Face models can make.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def generate(
    folder: str, prompt: str, max_new_tokens: int, temperature: float, seed: int, trust_remote_code: bool = False
) -> str:
    """The continuation of `prompt`, without the prompt and without special tokens.

    Raises:
        OSError, ValueError: transformers cannot read the model, or it comes with code of its own, which is not to run.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **how)[0]  # [prompt and new tokens]
    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the exported model's folder, or a hub id")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to make at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python files of the model")
    given = parser.parse_args()
    try:
        print(generate(**vars(given)))
    except (OSError, ValueError) as error:
        print(f"{given.folder}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
