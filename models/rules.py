"""Rules of the people who run a surface: what may be shown there, what is moved up or down, what stands first.

Axes as in models/ranking.py. A rule speaks of items alone, never of users; what a user's own past rules out is in
models/ranking.py.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.catalogue import Catalogue
from models.events import MAX_K, Filters, Item, epoch_ms
from models.ranking import F32, I32, Bools, among

Value = str | bool | float


class ItemMatch(BaseModel):
    """A condition on items. Each field that is given narrows it; an item that does not say a value does not match."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    categories: tuple[str, ...] | None = Field(None, description="The item has at least one of these categories.")
    tags: tuple[str, ...] | None = Field(None, description="The item has at least one of these tags.")
    attributes: dict[str, Value] = Field(
        default_factory=dict, description="The item has each of these attributes with this value."
    )
    min_price: float | None = Field(None, description="Least price.")
    max_price: float | None = Field(None, description="Greatest price.")
    max_age_seconds: float | None = Field(None, gt=0, description="Published at most this many seconds ago.")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for: every item matches."""
        if self.categories is not None or self.tags is not None or self.max_age_seconds is not None:
            return False
        return self.min_price is None and self.max_price is None and not self.attributes

    def filters(self, now_ms: int) -> Filters:
        """Return the condition, attributes apart, as the filters of a request made at ``now_ms``."""
        return Filters(
            categories=None if self.categories is None else list(self.categories),
            tags=None if self.tags is None else list(self.tags),
            published_after=self._oldest_ms(now_ms),
            min_price=self.min_price,
            max_price=self.max_price,
        )

    def mask(self, catalogue: Catalogue, rows: I32, now_ms: int) -> Bools:
        """Return which rows match at ``now_ms``, bool of their shape; any value for one outside the catalogue."""
        oldest_ms = self._oldest_ms(now_ms)
        found = catalogue.matching(rows, self.categories, self.tags, oldest_ms, self.min_price, self.max_price)
        for name, value in self.attributes.items():
            found &= catalogue.attribute_mask(rows, name, value)
        return found

    def _oldest_ms(self, now_ms: int) -> int | None:
        return None if self.max_age_seconds is None else now_ms - round(self.max_age_seconds * 1000)

    def fits(self, item: Item, now_ms: int) -> bool:
        """Tell whether one item matches, by its record alone: the fallback's own check."""
        if not fits_filters(item, self.filters(now_ms)):
            return False
        has = item.attributes or {}
        # True == 1 in Python, not here.
        return all(
            has.get(name) == value and isinstance(has.get(name), bool) == isinstance(value, bool)
            for name, value in self.attributes.items()
        )


class BoostRule(ItemMatch):
    """Moves the items that match up or down."""

    boost: float = Field(
        ge=-100, le=100, description="Added to the score of an item that matches: log-odds with a CTR model."
    )


class RulesConfig(BaseModel):
    """What the people who run a surface want of its slates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowed: ItemMatch = Field(default_factory=ItemMatch, description="Only items that match are shown.")
    blocked: dict[str, ItemMatch] = Field(
        default_factory=dict, description="By name: items that match any of these are not shown."
    )
    blocked_items: tuple[str, ...] = Field((), description="Ids of items that are not shown.")
    boosts: dict[str, BoostRule] = Field(
        default_factory=dict, description="By name: items that match get its boost; several add up."
    )
    pinned: tuple[str, ...] = Field(
        (),
        max_length=MAX_K,
        description="Ids of items that stand first, in this order, wherever they may be shown to the user at all; not "
        "in slates of named candidates.",
    )

    @model_validator(mode="after")
    def _none_blocks_all(self) -> Self:
        for name, match in self.blocked.items():
            if match.is_empty:
                raise ValueError(f"the blocked items {name!r} have no condition: nothing could be shown")
        return self

    @property
    def filter_items(self) -> bool:
        """Whether a rule keeps items out."""
        return bool(self.blocked or self.blocked_items) or not self.allowed.is_empty

    def refused(self, catalogue: Catalogue, rows: I32, now_ms: int) -> Bools:
        """Return which rows may not be shown at ``now_ms``, bool of their shape; any value for padding."""
        refused = (
            np.zeros(rows.shape, np.bool_) if self.allowed.is_empty else ~self.allowed.mask(catalogue, rows, now_ms)
        )
        for match in self.blocked.values():
            refused |= match.mask(catalogue, rows, now_ms)
        if self.blocked_items:
            refused |= among(rows, catalogue.index.rows(self.blocked_items))
        return refused

    def boost(self, catalogue: Catalogue, rows: I32, now_ms: int) -> F32:
        """Return what is added to the score of each row, float32 of their shape; any value for padding."""
        added = np.zeros(rows.shape, np.float32)
        for rule in self.boosts.values():
            added += rule.mask(catalogue, rows, now_ms) * np.float32(rule.boost)
        return added

    def allows(self, item: Item, now_ms: int) -> bool:
        """Tell whether one item may be shown, by its record alone: the fallback's own check."""
        if item.item_id in self.blocked_items or not self.allowed.fits(item, now_ms):
            return False
        return not any(match.fits(item, now_ms) for match in self.blocked.values())


def fits_filters(item: Item, filters: Filters) -> bool:
    """Tell whether one item fits the filters of a request, by its record alone."""
    if filters.categories is not None and not set(filters.categories) & set(item.categories or ()):
        return False
    if filters.tags is not None and not set(filters.tags) & set(item.tags or ()):
        return False
    if filters.published_after is not None and (
        item.published_at is None or epoch_ms(item.published_at) < epoch_ms(filters.published_after)
    ):
        return False
    if filters.min_price is not None and (item.price is None or item.price < filters.min_price):
        return False
    return filters.max_price is None or (item.price is not None and item.price <= filters.max_price)


def plainly_servable(catalogue: Catalogue, row: int, now_ms: int, filters: Filters | None, rules: RulesConfig) -> bool:
    """Tell whether one item may be shown, by its record alone; the fallback's own check."""
    if not 0 <= row < len(catalogue.in_catalogue) or not catalogue.in_catalogue[row] or catalogue.hidden[row]:
        return False
    item = catalogue.item(row)
    if item is None or (item.expires_at is not None and epoch_ms(item.expires_at) <= now_ms):
        return False
    return (filters is None or fits_filters(item, filters)) and rules.allows(item, now_ms)
