"""The table of precision and sharding: drawn on a terminal, plain lines elsewhere."""

import io
import os
import pty

from ds_recipes.models.weight_decay import Decay
from ds_recipes.training.announce import decay_lines, show_table

DESCRIPTION = {"engine": "fsdp", "gradient_accumulation": "float32", "autocast": None, "sharding": "over [2] ranks"}


def test_elsewhere_than_on_a_terminal_it_is_one_plain_line_an_entry() -> None:
    out = io.StringIO()
    show_table(DESCRIPTION, out)
    assert out.getvalue().splitlines() == [
        "precision and sharding:",
        "  engine                 fsdp",
        "  gradient accumulation  float32",
        "  sharding               over [2] ranks",
    ]


def test_on_a_terminal_it_is_drawn(monkeypatch) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        show_table(DESCRIPTION, terminal)
        text = os.read(master, 65536).decode()
    os.close(master)
    for words in ("Precision and sharding", "\u2502", "gradient accumulation", "over [2] ranks"):
        assert words in text, text
    assert "autocast" not in text


def test_what_decays_is_told_by_kind() -> None:
    decays = {
        "a.0.weight": Decay("Linear.weight", 3000, None),
        "a.1.weight": Decay("Linear.weight", 1000, None),
        "a.bias": Decay("Linear.bias", 20, "bias"),
    }
    assert decay_lines(decays, 0.1) == [
        "weight decay 0.1, by kind of parameter, with the number of values:",
        "  yes        2 x Linear.weight  4,000",
        "  no (bias)  1 x Linear.bias       20",
    ]
    assert decay_lines(decays, 0.0) == ["weight decay: 0, nothing decays"]
