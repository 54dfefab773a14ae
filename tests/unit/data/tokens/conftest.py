"""The fixture of small parts, for every test file of this folder."""

from tests.unit.data.tokens.stores import small_parts

__all__ = ["small_parts"]
