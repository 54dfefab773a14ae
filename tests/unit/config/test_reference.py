"""The reference page is what the settings' documentation says now, and the lists that other parts rely on hold."""

from pathlib import Path

from ds_recipes.config.checkpoint_settings import CHANGES
from ds_recipes.config.render import reference_page
from ds_recipes.config.schema import SETTINGS
from ds_recipes.config.seed_flags import OTHER_NAMES

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    assert page == reference_page(), "run tools/make_reference.py"


def test_every_setting_and_flag_is_on_the_page() -> None:
    page = reference_page()
    assert all(f"| `{name}` |" in page for name in SETTINGS)
    assert all(f"`--{name}`" in page for name in OTHER_NAMES)


def test_a_name_means_one_thing() -> None:
    assert not set(OTHER_NAMES) & set(SETTINGS)
    assert len(set(CHANGES)) == len(CHANGES)
