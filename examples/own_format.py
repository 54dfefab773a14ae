"""A record format of one's own: a function from a record to what the model reads and learns.

Used as `--dataset examples/own_format.py:read_record`; examples/tiny_own_format.yaml is a run with it. The function is
called once for each record, in several processes. It may return

    "a text"                                               all of it is learned, and an end-of-text token
    {"text": "a text"}                                     the same
    {"prompt": "read", "completion": "learned"}            tokenised apart; the completion and its end are learned
    {"messages": [{"role": "user", "content": "..."}, ...]}    as --dataset chat reads it
    {"input_ids": [...], "target_mask": [...]}             tokens as they are; where the mask is 1, they are learned
    {"input_ids": [...], "labels": [...]}                  the same with Hugging Face's labels: -100 is not learned
    None                                                   the record is left out, and counted

With a second parameter, read_record(record, tokenizer), it is given the tokenizer as well.
"""

from typing import Any

LEAST_WORDS = 3


def read_record(record: dict[str, Any]) -> dict[str, str] | None:
    """A question and an answer in Japanese markup; answers that are too short to teach anything are left out."""
    answer = " ".join(record["output"].split())
    if len(answer.split()) < LEAST_WORDS:
        return None
    question = record["instruction"]
    if record.get("input"):
        question += f"\n{record['input']}"
    return {"prompt": f"質問: {question}\n回答: ", "completion": answer}
