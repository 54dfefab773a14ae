"""Continue a prompt with an exported model, with plain transformers.

    python tools/generate.py FOLDER --prompt "def main(" [--max_new_tokens 64] [--temperature 0.8 --seed 1]

Without --temperature the likeliest token is taken each time. Nothing of ds_recipes is imported: what this prints, any
program that reads Hugging Face models can make.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def generate(folder: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """The continuation of `prompt`, without the prompt and without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **how)[0]  # [prompt and new tokens]
    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the exported model's folder, or a hub id")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to make at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    given = parser.parse_args()
    print(generate(given.folder, given.prompt, given.max_new_tokens, given.temperature, given.seed))


if __name__ == "__main__":
    main()
