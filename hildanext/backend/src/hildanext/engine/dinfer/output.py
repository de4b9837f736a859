"""What dInfer gives back, looked at before it is believed."""

from collections.abc import Sequence

from hildanext.engine.base import EngineFailed


def checked(row: list[int], fed: Sequence[int], length: int, mask_id: int) -> list[int]:
    """A row that dInfer returned. Raises `EngineFailed` unless it is what was fed, written on to `length`."""
    if row[: len(fed)] != list(fed):
        raise EngineFailed("dinfer gave another prompt back", "is it the version that the adapter knows?")
    if len(row) != length:
        raise EngineFailed(f"dinfer gave {len(row)} tokens and not {length}", "is it the version the adapter knows?")
    if mask_id in row[len(fed) :]:
        raise EngineFailed("dinfer left masks in its text", "is engine.mask_id the model's?")
    return row
