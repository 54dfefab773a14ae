"""Write docs/reference/settings.md from the settings' own documentation. Run it after a change in config/schema.py."""

from pathlib import Path

from ds_recipes.config.render import reference_page

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "settings.md"

if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(reference_page(), encoding="utf-8")
    print(PAGE)
