"""Chat templates in the manner of public families, each beside plain Python that writes the same conversation.

The Python is the oracle: it says which piece of the text is learned. What the families share and where they differ (roles,
spaces, end tokens, the generation prompt) is from their model cards and tokenizer configurations; the templates are
written for these tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, Any]]
Pieces = list[tuple[str, bool]]
"""Texts in order, learned or not."""


@dataclass(frozen=True)
class Family:
    """A template, the special tokens of its tokenizer, and plain Python that writes what it writes."""

    name: str
    template: str
    write: Callable[[Messages], Pieces]
    specials: tuple[str, ...]
    eos: str
    has_system: bool = True
    alternates: bool = False  # user and assistant must take turns, the user first


def _chatml(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        learned = message["role"] == "assistant"
        pieces += [(f"<|im_start|>{message['role']}\n", False), (message["content"], learned), ("<|im_end|>", learned)]
        pieces += [("\n", False)]
    return pieces


CHATML = Family(
    "chatml",
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    _chatml,
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "<|endoftext|>",
)
CHATML_WITHOUT_PROMPT = Family(
    "chatml without a generation prompt",
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}",
    _chatml,
    CHATML.specials,
    "<|im_end|>",
)
CHATML_WITH_TAGS = Family(
    "chatml with generation tags",
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    _chatml,
    CHATML.specials,
    "<|im_end|>",
)


def _llama3(messages: Messages) -> Pieces:
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for message in messages:
        learned = message["role"] == "assistant"
        pieces += [(f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False)]
        pieces += [(message["content"].strip(), learned), ("<|eot_id|>", learned)]
    return pieces


_LLAMA3_TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
LLAMA3 = Family(
    "llama 3",
    _LLAMA3_TURNS
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    _llama3,
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
    "<|end_of_text|>",
)
LLAMA3_WITHOUT_PROMPT = Family(
    "llama 3 without a generation prompt", _LLAMA3_TURNS, _llama3, LLAMA3.specials, "<|eot_id|>"
)


def _mistral(messages: Messages, before_answer: str, strips: bool) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for message in messages:
        content = message["content"].strip() if strips else message["content"]
        if message["role"] == "user":
            pieces += [(f"[INST] {message['content']} [/INST]", False)]
        else:
            pieces += [(before_answer + content + "</s>", True)]
    return pieces


_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}"
)
MISTRAL = Family(
    "mistral 0.1",
    "{{ bos_token }}{% for m in messages %}"
    + _ALTERNATE
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    lambda messages: _mistral(messages, "", strips=False),
    ("<s>", "</s>"),
    "</s>",
    has_system=False,
    alternates=True,
)
MISTRAL_3 = Family(
    "mistral 0.3",
    "{{ bos_token }}{% for m in messages %}"
    + _ALTERNATE
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
    lambda messages: _mistral(messages, " ", strips=True),
    ("<s>", "</s>", "[INST]", "[/INST]"),
    "</s>",
    has_system=False,
    alternates=True,
)


def _gemma(messages: Messages) -> Pieces:
    pieces: Pieces = [("<bos>", False)]
    for message in messages:
        learned = message["role"] == "assistant"
        pieces += [(f"<start_of_turn>{'model' if learned else message['role']}\n", False)]
        pieces += [(message["content"].strip(), learned), ("<end_of_turn>", learned), ("\n", False)]
    return pieces


GEMMA = Family(
    "gemma",
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('There is no system role') }}{% endif %}"
    "{% for m in messages %}"
    + _ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim "
    "+ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    _gemma,
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "<eos>",
    has_system=False,
    alternates=True,
)


def _zephyr(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        learned = message["role"] == "assistant"
        pieces += [(f"<|{message['role']}|>\n", False), (message["content"] + "</s>", learned), ("\n", False)]
    return pieces


ZEPHYR = Family(
    "zephyr",
    "{% for m in messages %}{% if m['role'] in ['user', 'system', 'assistant'] %}\n"
    "{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}\n"
    "{% endif %}{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}{% endfor %}",
    _zephyr,
    ("<s>", "</s>"),
    "</s>",
)


def _deepseek(messages: Messages) -> Pieces:
    pieces: Pieces = [("<｜begin▁of▁sentence｜>", False)]
    for message in messages:
        if message["role"] == "user":
            pieces += [(f"User: {message['content']}\n\n", False)]
        elif message["role"] == "assistant":
            pieces += [("Assistant:", False), (f" {message['content']}<｜end▁of▁sentence｜>", True)]
        else:
            pieces += [(f"{message['content']}\n\n", False)]
    return pieces


_DEEPSEEK_TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\\n\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
)
DEEPSEEK = Family(
    "deepseek",
    _DEEPSEEK_TURNS + "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    _deepseek,
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "<｜end▁of▁sentence｜>",
)
DEEPSEEK_WITHOUT_PROMPT = Family(
    "deepseek without a generation prompt", _DEEPSEEK_TURNS, _deepseek, DEEPSEEK.specials, DEEPSEEK.eos
)


def _llama2(messages: Messages) -> Pieces:
    system, turns = ("", messages)
    if messages[0]["role"] == "system":
        system, turns = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n", messages[1:]
    pieces: Pieces = []
    for i, message in enumerate(turns):
        if message["role"] == "user":
            content = (system if i == 0 else "") + message["content"]
            pieces += [(f"<s>[INST] {content.strip()} [/INST]", False)]
        else:
            pieces += [(f" {message['content'].strip()} </s>", True)]
    return pieces


LLAMA2 = Family(
    "llama 2",
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}{% for m in turns %}"
    + _ALTERNATE
    + "{% set content = (system if loop.first else '') + m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    _llama2,
    ("<s>", "</s>"),
    "</s>",
    alternates=True,
)


def _phi3(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        learned = message["role"] == "assistant"
        pieces += [(f"<|{message['role']}|>\n", False), (message["content"] + "<|end|>", learned), ("\n", False)]
    if messages[-1]["role"] == "assistant":  # put there when nothing is to be generated: part of the last turn
        pieces[-1:] = [("\n<|endoftext|>", True)]
    return pieces


PHI3 = Family(
    "phi 3",
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    _phi3,
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    "<|endoftext|>",
)


def _headings(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        learned = message["role"] == "assistant"
        pieces += [(f"### {message['role']}:\n", False), (message["content"] + "\n", learned)]
    return pieces


HEADINGS = Family(
    "headings without an end token",
    "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}",
    _headings,
    ("</s>",),
    "</s>",
)

FAMILIES = (
    CHATML, CHATML_WITHOUT_PROMPT, CHATML_WITH_TAGS, LLAMA3, LLAMA3_WITHOUT_PROMPT, MISTRAL, MISTRAL_3, GEMMA, ZEPHYR,
    DEEPSEEK, DEEPSEEK_WITHOUT_PROMPT, LLAMA2, PHI3, HEADINGS,
)  # fmt: skip

# Drops what earlier turns thought, and writes an empty thought where the last one has none.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% set answer = m['content'].split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m['content'] "
    "else '' %}{% if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ answer }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

WORDS = "User: Assistant: the quick brown fox jumps over a lazy dog and says yes 日本語 no user assistant system"


@lru_cache
def tokenizer_of(family: Family, pad_is_eos: bool = False, trims_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the family's special tokens, its template and its EOS token."""
    return make_chat_tokenizer(family.specials, family.eos, family.template, pad_is_eos, trims_offsets)


def make_chat_tokenizer(
    specials: tuple[str, ...],
    eos: str,
    template: str | dict[str, str] | None,
    pad_is_eos: bool = False,
    trims_offsets: bool = False,
    words: str = WORDS,
    splits_words: bool = True,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """`splits_words` False lets tokens join any neighbours, as in tokenizers that do not cut at words first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits_words)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([words] * 3, trainer)
    tokenizer.add_tokens([AddedToken(special, special=True, normalized=False) for special in (*specials, "<pad>")])
    if trims_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    bos = next((special for special in specials if "begin" in special or special in ("<s>", "<bos>")), None)
    if adds_bos:
        bos_id = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos if pad_is_eos else "<pad>"
    )
    made.chat_template = template
    return made
