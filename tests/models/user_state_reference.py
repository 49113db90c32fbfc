"""The user row in slow, plain Python: one user, one event at a time, lists and dictionaries, written from the rules.

Shares no code with the update under test but the codes of the actions and the settings. Vectors are Python floats;
they are rounded to fp16 after an event that moved them, as the rules say.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

from models.user_events import ACTION, IMPRESSION, REQUEST, UserEvent, UserStateConfig

Vector = list[float]
STRENGTHS = ("click", "like", "dislike", "hide", "share", "purchase", "rating", "dwell")


def half(x: float) -> float:
    """Return ``x`` rounded to fp16."""
    return float(struct.unpack("<e", struct.pack("<e", x))[0])


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def length(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def plus(a: Vector, factor: float, b: Vector) -> Vector:
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def times(a: Vector, factor: float) -> Vector:
    return [x * factor for x in a]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def short(item: int) -> int:
    return item % 2**32 or 1


@dataclass
class Shown:
    item: int
    time_s: int
    count: int


@dataclass
class Open:
    request: int
    time_s: int
    surface: int
    n: int
    items: list[int]
    clicked: set[int] = field(default_factory=set)
    """Short hashes of the items acted on positively."""


@dataclass
class Recent:
    item: int
    time_s: int
    code: int
    pending: bool


@dataclass
class World:
    """Where the reference looks things up, and the place in the model's history."""

    config: UserStateConfig
    vectors: dict[int, Vector]
    epoch: int
    space_id: int
    generation: int
    base_rates: dict[int, float] = field(default_factory=dict)
    windows_seconds: dict[int, int] = field(default_factory=dict)

    def window(self, surface: int) -> int:
        return self.windows_seconds.get(surface, self.config.attribution_window_seconds)

    def known(self, item: int) -> Vector | None:
        return self.vectors.get(item)

    def known_short(self, item: int) -> Vector | None:
        fits = [v for full, v in self.vectors.items() if short(full) == item]
        return fits[0] if len(fits) == 1 else None

    def bias(self, surface: int) -> float:
        rate = self.base_rates.get(surface, self.config.default_base_rate)
        return math.log(rate / (1 - rate))


class ReferenceRow:
    """One user's row."""

    def __init__(self) -> None:
        self.epoch = self.offset = self.last_time_ms = self.vector_time_ms = 0
        self.impressions = self.clicks = self.actions = self.requests = 0
        self.space_id = self.generation = self.unclicked = 0
        self.event_ids: list[int] = []
        self.shown: list[Shown] = []
        self.open: list[Open] = []
        self.recent: list[Recent] = []
        self.h: list[Vector] = [[0.0] * 64, [0.0] * 64]
        self.moved = False

    def apply(self, event: UserEvent, world: World) -> str:
        """Apply one event; return what it did."""
        if self.epoch == world.epoch and self.offset > event.offset:
            return "replayed"
        self.epoch, self.offset = world.epoch, event.offset + 1
        if event.event_hash in self.event_ids:
            return "duplicate"
        now_ms = max(self.last_time_ms, event.time_ms)
        self.moved = False
        frozen = self.space_id not in (0, world.space_id) and self.generation > world.generation
        if not frozen:
            self._enter(now_ms, world)
            self._late_steps(world)
            self._close(now_ms, world)
        if event.kind == ACTION:
            self._act(event, frozen, world)
        elif event.kind == IMPRESSION:
            self._impress(event)
        elif event.kind == REQUEST:
            self.requests += 1
        if self.moved:
            self._round()
        self.event_ids = [event.event_hash, *self.event_ids][:8]
        self.last_time_ms = now_ms
        return "applied"

    def _round(self) -> None:
        for t in (0, 1):
            n = length(self.h[t])
            self.h[t] = [half(x / n) * n for x in self.h[t]] if n else [0.0] * 64

    def _decay(self, seconds: float, world: World) -> None:
        c = world.config
        for t, half_life in enumerate((c.short_term_half_life_seconds, c.long_term_half_life_seconds)):
            self.h[t] = times(self.h[t], 0.5 ** (max(seconds, 0) / half_life))

    def _enter(self, now_ms: int, world: World) -> None:
        if self.space_id not in (0, world.space_id):
            self.h = [[0.0] * 64, [0.0] * 64]
            self.moved, self.unclicked = True, 0
            at_s = None
            for entry in reversed(self.recent):
                vector, weight = world.known(entry.item), self._strength(entry.code, world)
                entry.pending = vector is None and weight > 0
                if vector is None or weight == 0:
                    continue
                if at_s is not None:
                    self._decay(entry.time_s - at_s, world)
                at_s = entry.time_s if at_s is None else max(at_s, entry.time_s)
                self._logistic(vector, weight, entry.code & 0x10 != 0, 255, world)
            if at_s is not None:
                self._decay(now_ms / 1000 - at_s, world)
        elif self.space_id:
            self._decay((now_ms - self.vector_time_ms) / 1000, world)
        self.vector_time_ms = max(self.vector_time_ms, now_ms)
        self.space_id = world.space_id
        self.generation = max(self.generation, world.generation)

    def _strength(self, code: int, world: World) -> float:
        if not code & 0x30:
            return 0.0
        return float(getattr(world.config, STRENGTHS[(code & 15) - 1] + "_strength"))

    def _late_steps(self, world: World) -> None:
        for entry in reversed(self.recent):
            vector = world.known(entry.item)
            if entry.pending and vector is not None:
                self._logistic(vector, self._strength(entry.code, world), entry.code & 0x10 != 0, 255, world)
                entry.pending = False

    def _finish(self, t: int, h: Vector, world: World) -> None:
        n = length(h)
        self.h[t] = times(h, world.config.max_norm / n) if n > world.config.max_norm else h
        self.moved = True

    def _rates(self, world: World) -> list[tuple[int, float, float]]:
        c = world.config
        both = (c.learning_rate, c.long_term_learning_rate)
        return [(t, rate, 1 - rate * c.weight_decay) for t, rate in enumerate(both)]

    def _logistic(self, v: Vector, weight: float, label: bool, surface: int, world: World) -> None:
        for t, rate, keep in self._rates(world):
            p = sigmoid(world.config.logit_scale * dot(self.h[t], v) + world.bias(surface))
            self._finish(t, plus(times(self.h[t], keep), rate * weight * (label - p), v), world)

    def _softmax(self, slate: list[Vector], clicked: Vector, weight: float, world: World) -> None:
        for t, rate, keep in self._rates(world):
            logits = [world.config.logit_scale * dot(self.h[t], v) for v in slate]
            odds = [math.exp(x - max(logits)) for x in logits]
            h = plus(times(self.h[t], keep), rate * weight, clicked)
            for share, v in zip(odds, slate, strict=True):
                h = plus(h, -rate * weight * share / sum(odds), v)
            self._finish(t, h, world)

    def _close(self, now_ms: int, world: World) -> None:
        over = [o for o in reversed(self.open) if now_ms // 1000 - o.time_s > world.window(o.surface)]
        for impression in sorted(over, key=lambda o: o.time_s):
            if not impression.clicked:
                self._against(impression, world)
            self.open = [o for o in self.open if o is not impression]

    def _against(self, impression: Open, world: World) -> None:
        c = world.config
        self.unclicked += 1
        slate = [v for item in impression.items if (v := world.known_short(item)) is not None]
        if self.unclicked > c.unclicked_cap or not slate or c.unclicked_weight == 0:
            self.unclicked = min(self.unclicked, 255)
            return
        for t, rate, _ in self._rates(world):
            step = [0.0] * 64
            for v in slate:
                p = sigmoid(c.logit_scale * dot(self.h[t], v) + world.bias(impression.surface))
                step = plus(step, rate * c.unclicked_weight * p / len(slate), v)
            if length(self.h[t]) == 0:
                continue
            most = c.unclicked_max_share * length(self.h[t])
            self._finish(t, plus(self.h[t], -min(1.0, most / length(step)), step), world)

    def _impress(self, event: UserEvent) -> None:
        items = [short(int(i)) for i in event.items]
        time_s = event.time_ms // 1000
        self.impressions += 1
        self.open = [Open(event.request_hash, time_s, event.surface, min(len(items), 255), items[:12]), *self.open][:4]
        counts = {s.item: s.count for s in self.shown}
        fresh = [Shown(i, time_s, min(counts.get(i, 0) + 1, 255)) for i in items[:20]]
        self.shown = (fresh + [s for s in self.shown if s.item not in items[:20]])[:20]

    def _matched(self, event: UserEvent, item: int, world: World) -> Open | None:
        usable = [o for o in self.open if event.time_ms // 1000 - o.time_s <= world.window(o.surface)]
        for o in usable:
            if event.request_hash and o.request == event.request_hash:
                return o
        return next((o for o in usable if item in o.items), None)

    def _act(self, event: UserEvent, frozen: bool, world: World) -> None:
        full = int(event.items[0])
        item, vector = short(full), world.known(full)
        positive = event.action & 0x10 != 0
        impression = self._matched(event, item, world)
        if positive:
            self.unclicked = 0
            if impression is not None:
                impression.clicked.add(item)
        stepped = event.strength > 0 and vector is not None and not frozen
        if stepped:
            assert vector is not None
            slate = []
            if positive and impression is not None:
                others = [world.known_short(i) for i in impression.items if i != item]
                slate = [vector, *(v for v in others if v is not None)]
            if len(slate) > 1:
                self._softmax(slate, vector, event.strength, world)
            else:
                self._logistic(vector, event.strength, event.label > 0, event.surface, world)
        self._remember(full, event, event.strength > 0 and not stepped)
        self.actions += 1
        self.clicks += event.action & 15 == 1

    def _remember(self, full: int, event: UserEvent, pending: bool) -> None:
        entry = Recent(full, event.time_ms // 1000, event.action, pending)
        for old in self.recent:
            if old.item == full and not event.action & 0x30:
                entry.code, entry.pending = old.code, old.pending
        self.recent = [entry, *(r for r in self.recent if r.item != full)][:16]
