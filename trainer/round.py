"""One round: read, join, look back, judge the waiting candidate, train the next one, announce it.

Every step leaves the world whole. A process that ends anywhere leaves at most a version in the registry that no role
names; what it had decided it carries out when it is back. The order: the live bundle is compared with the previous one
first, so that a candidate is never measured against a live bundle that is about to go.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog

from models import bundle as bundles
from models.bundle import BOOTSTRAP_VERSION, Bundle, BundleContents
from models.errors import BundleError, EncoderError, ModelError, TrainingError
from models.examples import RANDOMISED
from models.manifest import Manifest, OffsetRange, new_version
from models.pointer import (
    Pointer,
    Pointers,
    plan_candidate,
    plan_promotion,
    plan_rest_of_promotion,
    plan_rollback,
    plan_withdrawal,
)
from models.registry import prune_cache
from trainer.announce import ANNOUNCER, ANOTHER_DECIDER, SILENT_INTERVALS, preparation
from trainer.dataset import F32, Examples, ItemFacts, read_examples
from trainer.lone_actions import histories, sampled_examples
from trainer.ports import Identity, Names, Ports
from trainer.promotion import (
    Decision,
    check_labels,
    check_shadow,
    check_trained,
    compare,
    judge,
    should_roll_back,
)
from trainer.settings import TrainerConfig
from trainer.space_learning import SpaceConfig, enough_histories
from trainer.state import Pending, TrainerState, load_state, save_state
from trainer.window import Stopped

log = structlog.get_logger(__name__)

HOUR_MS: Final = 3_600_000
PATIENCE: Final = 4
"""A slice of so many times the least size, still without shadow scores enough, is judged without waiting longer."""
POLL_SECONDS: Final = 0.5
LOOKS_BETWEEN: Final = 24
"""Where histories were too few, they are looked at so many times in the time that a learned space stands."""
NOT_YET: Final = frozenset({"window-too-small"})
"""Reasons for which nothing was trained, and nothing is wrong."""


@dataclass(slots=True)
class RoundResult:
    """What a round did, in order: (outcome, sentence)."""

    done: list[tuple[str, str]] = field(default_factory=list)
    failed: bool = False
    """Whether something looks wrong: labels, or what training made. What was done besides stands."""

    def add(self, outcome: str, sentence: str) -> None:
        """Note a step's outcome, and log it."""
        self.done.append((outcome, sentence))
        log.info("round_step", outcome=outcome, sentence=sentence)

    @property
    def outcomes(self) -> list[str]:
        """Return the outcomes alone."""
        return [outcome for outcome, _ in self.done]


class Round:
    """Makes rounds. ``run`` raises MillstreamError, OSError or Stopped; the next call goes on from what stands."""

    def __init__(self, config: TrainerConfig, names: Names, ports: Ports) -> None:
        self._config = config
        self._names = names
        self._ports = ports
        self._state = TrainerState()

    def run(self) -> RoundResult:
        """Make one round."""
        result, ports, metrics = RoundResult(), self._ports, self._ports.metrics
        self._state = self._load_state()
        self._state.rounds += 1
        self._state.labels_end = ports.source.labels_end()
        self._tidy(result)
        since_ms = ports.now_ms() - round(self._config.window_hours * HOUR_MS)
        with metrics.step("read"):
            ranges = ports.source.read(since_ms)
            items = ports.source.items()
        names, most = self._names, self._config.max_impressions
        with metrics.step("join"):
            examples = read_examples(ports.spool, ranges, names.features_topic, names.labels_topic, most)
        if not examples.has_impressions and self._config.sampled_negatives:
            with metrics.step("sample"):
                ranges, actions = ports.source.actions(since_ms)
                drawn, seed = self._config.sampled_negatives, self._config.seed
                examples = sampled_examples(actions, items, drawn, seed, most)
        self._describe(examples)
        self._go_on()
        with metrics.step("look-back"):
            self._look_back(examples, result)
        self._go_on()
        with metrics.step("judge"):
            is_waiting = self._judge(examples, items, result)
        save_state(self._config.data_folder, self._state)
        self._go_on()
        if not is_waiting:
            try:
                self._train(examples, ranges, items, result)
            except TrainingError as error:
                result.failed = error.reason not in NOT_YET
                result.add(error.reason, error.detail)
        self._keep_house()
        return result

    def newly_labelled(self) -> int:
        """Return how many records came to ``labels`` since the last round began."""
        return max(self._ports.source.labels_end() - self._state.labels_end, 0)

    # --- what stands ---------------------------------------------------------------------------------------------

    def _load_state(self) -> TrainerState:
        found = load_state(self._config.data_folder)
        if found is not None:
            return found
        kept = self._config.gate.positive_rate_rounds
        registry, rates = self._ports.registry, list[float]()
        for version in registry.versions()[-kept:]:
            try:
                rates.append(registry.manifest(version).metrics.get("positive_rate", 0.0))
            except BundleError as error:
                log.warning("manifest_passed_over", version=version, reason=error.reason)
        return TrainerState(positive_rates=[r for r in rates if r > 0])

    def _tidy(self, result: RoundResult) -> None:
        """Finish what a process that ended in the middle left: half a promotion, bundles being made."""
        shutil.rmtree(self._making, ignore_errors=True)
        # Before anything is written: room on a full disk comes from here alone.
        self._ports.spool.delete_before(self._ports.now_ms() - round(self._config.spool_days * 24 * HOUR_MS))
        pointers = self._ports.board.pointers()
        candidate, live = pointers.version("candidate"), pointers.version("live")
        pending, planned = self._state.pending, list[Pointer]()
        if pending is not None and pending.version == live and _decision_of(pending).promote:
            planned = plan_rest_of_promotion(pointers, pending.live, **self._said(f"gave way to {live}"))
        elif candidate is not None and candidate == live:
            planned = plan_withdrawal(pointers, "candidate", **self._said(f"{candidate} is live"))
        if planned:
            self._announce(planned, result, "finished", f"the promotion of {live}")
        if pending is None:
            return
        if pending.version == candidate and candidate != live:
            self._carry_out(pending, result)
        else:
            self._state.pending = None

    def _describe(self, examples: Examples) -> None:
        metrics = self._ports.metrics
        figures = {"impressions": len(examples), "items": examples.items, "clicks": examples.clicks}
        for kind, value in figures.items():
            metrics.examples.labels(kind).set(value)
        metrics.left_out.clear()
        for reason, count in examples.left_out.items():
            metrics.left_out.labels(reason).set(count)
        metrics.positive_rate.set(examples.clicks / max(examples.items, 1))
        metrics.arms(positive_rates_by_policy(examples), self._state.rounds)
        log.info("window_read", **figures, left_out=examples.left_out)

    # --- the live bundle against the previous one ----------------------------------------------------------------

    def _look_back(self, examples: Examples, result: RoundResult) -> None:
        pointers = self._ports.board.pointers()
        live, previous = pointers.version("live"), pointers.version("previous")
        if live is None or previous is None:
            return
        gate = self._config.gate
        fresh = examples.after(self._state.looked_back_to_ms)
        both = Examples([e for e in fresh.impressions if e.features.model_version == live])
        both, scores = logged_scores(both, live, previous)
        if len(both) < gate.min_impressions or len(set(both.users())) < gate.min_users:
            return
        decision = should_roll_back(
            np.concatenate(scores[0]),
            np.concatenate(scores[1]),
            both.flat_labels(),
            both.impression_numbers(),
            both.users(),
            gate,
            self._config.seed,
        )
        self._state.looked_back_to_ms = both.newest_ms
        if decision.outcome == "roll-back":
            planned = plan_rollback(pointers, **self._said(decision.sentence))
            said = f"{previous} is live again instead of {live}: {decision.sentence}"
            self._announce(planned, result, "rolled-back", said)
        save_state(self._config.data_folder, self._state)
        # Last: a registry that is away must not hold a rollback up.
        self._record(live, decision, other=previous)

    # --- the candidate -------------------------------------------------------------------------------------------

    def _judge(self, examples: Examples, items: ItemFacts, result: RoundResult) -> bool:
        """Judge the waiting candidate if its slice is large enough; return whether one still waits."""
        pointers = self._ports.board.pointers()
        pointer, live = pointers.roles.get("candidate"), pointers.version("live") or BOOTSTRAP_VERSION
        if pointer is None:
            return False
        candidate = pointer.version
        try:
            bundle = self._bundle(pointer)
        except BundleError as error:
            decision = Decision("refuse", f"bundle-{error.reason}", f"the candidate cannot be read: {error.detail}")
            self._decide(decision, candidate, pointers, result)
            return False
        since = max(bundle.manifest.window.to_ms, self._learned_to(live), self._state.judged_to_ms)
        found = examples.after(since)
        if live == BOOTSTRAP_VERSION:
            # The hand-set score is not a bundle: what workers logged of it is all there is.
            found, _ = logged_scores(found, BOOTSTRAP_VERSION)
        why = self._why_wait(found, candidate, pointers)
        if why is not None:
            result.add("waiting", f"candidate {candidate} waits: {why}")
            return True
        self._state.judged_to_ms = found.newest_ms
        try:
            decision = self._judged(found, bundle, live, pointers, items)
        except (EncoderError, ModelError) as error:
            reason = "encoder" if isinstance(error, EncoderError) else "scores-not-finite"
            decision = Decision("refuse", reason, f"the candidate cannot be scored: {error}")
        self._decide(decision, candidate, pointers, result)
        # It still stands where somebody else decided about the live one meanwhile.
        return self._ports.board.pointers().version("candidate") == candidate

    def _why_wait(self, found: Examples, candidate: str, pointers: Pointers) -> str | None:
        gate = self._config.gate
        users = len(set(found.users()))
        if len(found) < gate.min_impressions or users < gate.min_users:
            return (
                f"{len(found):,} impressions of {users:,} users are labelled since its window, "
                f"{gate.min_impressions:,} of {gate.min_users:,} are needed"
            )
        live = pointers.roles.get("live")
        left = (live.announced_ms + gate.cool_down_minutes * 60_000 - self._ports.now_ms()) if live else 0
        if left > 0:
            return f"the last change of the live bundle is too young by {left / 60_000:.1f} min"
        shadows = len(logged_scores(found, candidate)[0])
        if shadows < gate.min_shadow_impressions and len(found) < PATIENCE * gate.min_impressions:
            return f"{shadows:,} impressions were scored in shadow, {gate.min_shadow_impressions:,} are needed"
        return None

    def _judged(self, found: Examples, bundle: Bundle, live: str, pointers: Pointers, items: ItemFacts) -> Decision:
        gate, seed = self._config.gate, self._config.seed
        found, theirs = self._live_scores(found, live, pointers, items)
        mine = self._ports.learner.score(bundle, [e.features for e in found.impressions], items)
        if not mine:
            return Decision("refuse", "live-unknown", f"nothing says how {live} scores: neither its bundle nor the log")
        first, second = np.concatenate(mine), np.concatenate(theirs)
        labels, numbers, users = found.flat_labels(), found.impression_numbers(), found.users()
        decision = judge(first, second, labels, numbers, users, gate, seed)
        figures = dict(decision.figures)
        drawn = found.policies() == RANDOMISED
        if drawn.sum() >= 2 and np.isfinite(first).all() and np.isfinite(second).all():
            of = drawn[numbers]
            apart = compare(
                first[of],
                second[of],
                labels[of],
                np.unique(numbers[of], return_inverse=True)[1],
                users[drawn],
                rate=gate.equal_promotion_rate,
                resamples=gate.resamples,
                seed=seed,
            )
            figures |= apart.figures("candidate", "live", "randomised_")
        figures |= {f"positive_rate_{p}": rate for p, rate in positive_rates_by_policy(found).items()}
        if decision.promote:
            shadow = self._shadow(found, bundle.version, mine)
            figures |= shadow.figures
            if not shadow.promote:
                decision = shadow
        return replace(decision, figures=figures)

    def _live_scores(
        self, found: Examples, live: str, pointers: Pointers, items: ItemFacts
    ) -> tuple[Examples, list[F32]]:
        """Return the live scores; of a bundle that cannot be scored here, those that workers logged, and on which."""
        if live != BOOTSTRAP_VERSION:
            try:
                bundle = self._bundle(pointers.roles["live"])
                return found, self._ports.learner.score(bundle, [e.features for e in found.impressions], items)
            except (BundleError, EncoderError, ModelError) as error:
                log.warning("live_bundle_not_scored", version=live, error=str(error), action="logged scores are taken")
        found, (logged,) = logged_scores(found, live)
        return found, logged

    def _shadow(self, found: Examples, candidate: str, recomputed: Sequence[F32]) -> Decision:
        by_id = {e.features.impression_id: scores for e, scores in zip(found.impressions, recomputed, strict=True)}
        scored, logged = logged_scores(found, candidate)
        return check_shadow(logged[0], [by_id[e.features.impression_id] for e in scored.impressions], self._config.gate)

    def _decide(self, decision: Decision, candidate: str, pointers: Pointers, result: RoundResult) -> None:
        """Keep a decision, then carry it out: a process that ends in between goes on with the same one."""
        pending = Pending(candidate, decision.record(), pointers.roles.get("live"))
        self._state.pending = pending
        save_state(self._config.data_folder, self._state)
        self._carry_out(pending, result)

    def _carry_out(self, pending: Pending, result: RoundResult) -> None:
        decision, candidate = _decision_of(pending), pending.version
        if decision.promote:
            decision = self._prepared(candidate, decision)
        # Read again: an operator may have spoken while workers prepared, and overrides.
        pointers = self._ports.board.pointers()
        pointer, live = pointers.roles.get("candidate"), pointers.version("live") or BOOTSTRAP_VERSION
        against = pending.live.version if pending.live else BOOTSTRAP_VERSION
        self._record(candidate, decision, other=against)
        if pointer is None or pointer.version != candidate:
            result.add("overridden", f"{candidate} is no candidate any more; somebody else decided")
        elif decision.promote and live != against:
            said = f"{live} became live meanwhile; {candidate} was better than {against}, it waits to be judged again"
            result.add("overridden", said)
        elif decision.promote:
            planned = plan_promotion(pointers, candidate, pointer.manifest_sha256, **self._said(decision.sentence))
            self._announce(planned, result, "promoted", f"{candidate} is live: {decision.sentence}")
        else:
            planned = plan_withdrawal(pointers, "candidate", **self._said(decision.sentence))
            said = f"{candidate} is not promoted ({decision.reason}): {decision.sentence}"
            self._announce(planned, result, "refused", said)
        self._state.pending = None
        save_state(self._config.data_folder, self._state)

    def _prepared(self, candidate: str, decision: Decision) -> Decision:
        """Wait until the live workers have prepared the candidate; the decision, or a refusal where none can."""
        config, ports = self._config, self._ports
        interval, began = self._names.status_interval_seconds, ports.now_ms()
        deadline = began + round(config.prepare_timeout_seconds * 1000)
        first: dict[str, int] = {}
        while True:
            statuses, now_ms = ports.board.statuses(), ports.now_ms()
            heard = {s.worker_id for s in statuses if first.setdefault(s.worker_id, s.time_ms) != s.time_ms}
            found = preparation(statuses, candidate, now_ms, interval, heard)
            ports.show("workers prepared", found.prepared, found.workers)
            # All seem gone: gone, or their clocks are behind this one, which the next thing that they say tells.
            listening = statuses and not found.workers and now_ms < began + SILENT_INTERVALS * interval * 1000
            if (found.is_done and not listening) or now_ms >= deadline:
                break
            self._go_on()
            ports.sleep(POLL_SECONDS)
        figures = {**decision.figures, "workers": float(found.workers), "workers_prepared": float(found.prepared)}
        if found.workers and not found.prepared:
            said = "; ".join(sorted({f"{r.reason}: {r.detail}" for r in found.refusals})) or "none said why"
            return Decision(
                "refuse", "not-prepared", f"none of {found.workers} workers has prepared it: {said}", figures
            )
        if found.prepared < found.workers:
            log.warning("promoted_before_all_prepared", workers=found.workers, prepared=found.prepared)
        return replace(decision, figures=figures)

    # --- training ------------------------------------------------------------------------------------------------

    def _train(self, examples: Examples, ranges: Sequence[OffsetRange], items: ItemFacts, result: RoundResult) -> None:
        config, ports = self._config, self._ports
        if len(examples) < config.min_impressions or examples.clicks < config.min_clicks:
            raise TrainingError(
                "window-too-small",
                f"{len(examples):,} labelled impressions with {examples.clicks:,} positive labels, "
                f"{config.min_impressions:,} with {config.min_clicks:,} are needed (left out: "
                f"{', '.join(f'{n:,} {reason}' for reason, n in examples.left_out.items()) or 'none'})",
            )
        fresh = examples.after(self._state.learned_to_ms)
        if not len(fresh):
            result.add("nothing-new", "no impression was labelled since the last training")
            return
        rate = self._checked_rate(fresh if len(fresh) >= config.min_impressions else examples)
        parent = self._parent()
        now_ms = ports.now_ms()
        ranges, examples = self._with_histories(ranges, examples, items)
        identity = Identity(ports.registry.name, new_version(now_ms), now_ms, examples.window(ranges))
        with ports.metrics.step("train"):
            learned = ports.learner.train(identity, examples, items, parent, ports.show)
        check_trained(learned.losses, learned.auc, learned.auc_before, config.gate)
        self._go_on()
        if not learned.improved:
            self._state.learned_to_ms = identity.window.to_ms
            save_state(config.data_folder, self._state)
            result.add("nothing-learned", f"no epoch on {len(examples):,} impressions was better than the parent")
            return
        contents = learned.contents
        contents.metrics = {**contents.metrics, "positive_rate": rate}
        with ports.metrics.step("publish"):
            manifest, sha256 = self._published(contents)
        ports.metrics.trained(manifest.metrics, self._state.rounds)
        ports.metrics.learned_to(identity.window.to_ms)
        self._state.learned_to_ms = identity.window.to_ms
        planned = plan_candidate(
            ports.board.pointers(), identity.version, sha256, **self._said(f"learned from {len(examples)} impressions")
        )
        said = (
            f"{identity.version} learned from {len(examples):,} impressions with {examples.clicks:,} positive labels, "
            f"AUC {learned.auc:.4f} on the held-back slice, before {learned.auc_before:.4f}"
        )
        self._announce(planned, result, "candidate", said)
        save_state(config.data_folder, self._state)

    def _with_histories(
        self, ranges: Sequence[OffsetRange], examples: Examples, items: ItemFacts
    ) -> tuple[Sequence[OffsetRange], Examples]:
        """Return the examples with users' histories, and the ranges of both, where a space is to be learned now."""
        config, now_ms = self._config, self._ports.now_ms()
        if config.histories == "off" or now_ms < self._state.histories_due_ms:
            return ranges, examples
        with self._ports.metrics.step("histories"):
            more, actions = self._ports.source.actions(now_ms - round(config.histories_hours * HOUR_MS))
            found = histories(actions, examples)
        enough = enough_histories(found, items.texts, SpaceConfig(least_items=config.histories_least_items))
        wait_hours = config.histories_every_hours if enough else config.histories_every_hours / LOOKS_BETWEEN
        self._state.histories_due_ms = now_ms + round(wait_hours * HOUR_MS)
        log.info("histories_read", users=len(found), actions=sum(map(len, found.values())), enough=enough)
        if not enough:
            return ranges, examples
        # Of a log without impressions, the window's events are among them.
        others = [r for r in ranges if r.topic not in {m.topic for m in more}]
        return [*others, *more], replace(examples, histories=found)

    def _parent(self) -> Bundle | None:
        """Return the live bundle; None, the bootstrap, where there is none or it is gone from the registry."""
        live = self._ports.board.pointers().roles.get("live")
        if live is None or live.is_bootstrap:
            return None
        try:
            return self._bundle(live)
        except BundleError as error:
            log.warning("parent_left", version=live.version, reason=error.reason, action="started from the bootstrap")
            return None

    def _checked_rate(self, examples: Examples) -> float:
        labels = examples.flat_labels()
        rates = self._state.positive_rates
        try:
            return check_labels(labels, rates, self._config.gate)
        finally:
            kept = [*rates, float(labels.mean())][-self._config.gate.positive_rate_rounds :]
            self._state.positive_rates = kept
            save_state(self._config.data_folder, self._state)

    def _published(self, contents: BundleContents) -> tuple[Manifest, str]:
        folder = self._making / contents.version
        manifest = bundles.save(folder, contents, self._names.private_key)
        bundles.load(folder, self._names.public_key).check_canary()
        self._ports.registry.publish(folder)
        shutil.rmtree(self._making, ignore_errors=True)
        return manifest, self._ports.registry.manifest_sha256(contents.version)

    # --- small parts ---------------------------------------------------------------------------------------------

    @property
    def _making(self) -> Path:
        return self._config.data_folder / "making"

    def _go_on(self) -> None:
        if self._ports.stopping():
            raise Stopped

    def _said(self, why: str) -> dict[str, Any]:
        return {"at_ms": self._ports.now_ms(), "by": ANNOUNCER, "why": why[:500]}

    def _announce(self, planned: Sequence[Pointer], result: RoundResult, outcome: str, sentence: str) -> None:
        """Announce roles and note it; where an operator or another trainer spoke at the same moment, note that."""
        try:
            self._ports.board.announce(planned)
        except TrainingError as error:
            if error.reason != ANOTHER_DECIDER:
                raise
            outcome, sentence = "overridden", error.detail
        result.add(outcome, sentence)

    def _record(self, version: str, decision: Decision, *, other: str) -> None:
        """Keep a decision with its figures in the registry, in the log and in the metrics."""
        self._ports.metrics.decided(decision, self._state.rounds)
        record = {**decision.record(), "version": version, "against": other, "by": ANNOUNCER}
        log.info("gate_decision", **record)
        if version != BOOTSTRAP_VERSION:
            self._ports.registry.record_decision(version, record, self._ports.now_ms())

    def _bundle(self, pointer: Pointer) -> Bundle:
        names, sha256 = self._names, pointer.manifest_sha256
        folder = self._ports.registry.fetch(pointer.version, names.bundle_cache, manifest_sha256=sha256)
        return bundles.load(folder, names.public_key, manifest_sha256=sha256)

    def _learned_to(self, version: str) -> int:
        """Return up to which event time a version has learned, 0 for the bootstrap and for one that is gone."""
        if version == BOOTSTRAP_VERSION:
            return 0
        try:
            return self._ports.registry.manifest(version).window.to_ms
        except BundleError as error:
            log.warning("live_bundle_gone", version=version, reason=error.reason)
            return 0

    def _keep_house(self) -> None:
        """Show the roles; delete fetched bundles that no role names."""
        ports = self._ports
        roles = ports.board.pointers().roles
        ports.metrics.generation.clear()
        for role, pointer in roles.items():
            ports.metrics.generation.labels(role).set(pointer.generation)
        prune_cache(self._names.bundle_cache, {p.version for p in roles.values()}, self._names.cache_bundles)


def logged_scores(examples: Examples, *versions: str) -> tuple[Examples, list[list[F32]]]:
    """Return the impressions that workers scored with all these versions, and those scores, one list a version."""
    kept, found = [], list[list[F32]]([] for _ in versions)
    for example in examples.impressions:
        logged = dict(example.features.scores)
        if all(version in logged for version in versions):
            kept.append(example)
            for scores, version in zip(found, versions, strict=True):
                scores.append(np.frombuffer(logged[version], "<f4"))
    return Examples(kept), found


def positive_rates_by_policy(examples: Examples) -> dict[str, float]:
    """Return the share of positive labels by who made the slate, the most frequent first."""
    items, clicks = Counter[str](), Counter[str]()
    for example in examples.impressions:
        items[example.features.policy] += len(example.labels)
        clicks[example.features.policy] += int(example.labels.sum())
    return {policy: clicks[policy] / count for policy, count in items.most_common()}


def _decision_of(pending: Pending) -> Decision:
    kept = pending.decision
    return Decision(kept["outcome"], kept["reason"], kept["sentence"], dict(kept["figures"]))
