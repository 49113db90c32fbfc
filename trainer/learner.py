"""What a round learns with: fine-tuning from the live bundle or the bootstrap, and the bundle that comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import structlog

from models import bootstrap
from models.bundle import Bundle, BundleContents, Canary, ItemEncodings
from models.ctr import CtrScorer
from models.encoder import EncoderConfig, TextEncoder
from models.encoder_delta import EncoderDelta
from models.errors import EncoderError
from models.examples import FeaturesRecord, encode
from trainer.batches import TrainingSet
from trainer.dataset import F32, Examples, ItemFacts
from trainer.encodings import OutputCache
from trainer.finetune import StartingPoint, Trained, carrying_map, train, without_similarities
from trainer.ports import Identity, Learned
from trainer.progress import Show
from trainer.scoring import ItemTable, encode_items, score
from trainer.settings import TrainerConfig
from trainer.space_learning import SpaceConfig, enough_histories, first_scorer, learn_space, with_features
from trainer.training_config import TrainingConfig

log = structlog.get_logger(__name__)

CANARY_RECORDS: Final = 32
"""Impressions of the window that a bundle carries, with the scores that every machine must find for them."""
CANARY_USER: Final = "canary"
"""Stands for the users of those impressions: a bundle goes to places that no user's id should."""


class FinetuneLearner:
    """Fine-tunes by trainer/finetune.py and scores by the code that serves. The encoder is loaded when it is needed."""

    def __init__(
        self, training: TrainingConfig, encoder: EncoderConfig, folder: Path, space: SpaceConfig | None = None
    ) -> None:
        """``folder``: where outputs of frozen encoder layers and a computed bootstrap space are kept.

        ``space``: how a space is learned from histories.
        """
        self._training = training
        self._space = (space or SpaceConfig()).settled(
            seed=training.seed, device=training.device, cache_bytes=training.cache_bytes
        )
        self._encoder_config = encoder
        self._folder = folder
        self._cache = OutputCache(folder / "encodings", training.cache_bytes)
        self._loaded: TextEncoder | None = None

    @classmethod
    def of(cls, config: TrainerConfig, encoder: EncoderConfig) -> FinetuneLearner:
        """Return the learner of the settings."""
        space = SpaceConfig(least_items=config.histories_least_items)
        space = space.with_encoder("frozen" if config.histories == "off" else config.histories)
        encoder = encoder.model_copy(update={"threads": config.threads})
        return cls(config.training, encoder, config.data_folder, space)

    def train(
        self, identity: Identity, examples: Examples, items: ItemFacts, parent: Bundle | None, show: Show
    ) -> Learned:
        """Learn from impressions in time order, starting from ``parent``, else from the bootstrap.

        A parent of another encoder than that of the settings cannot be gone on from: the bootstrap is, then. Raises
        TrainingError as ``finetune.train`` does, and EncoderError.
        """
        start = self._start(parent)
        if start is None:
            log.warning("parent_left", version=parent.version if parent else None, reason="its encoder is another one")
            parent, start = None, self._bootstrap_start()
        shown = TrainingSet(
            [e.features for e in examples.impressions],
            [e.labels for e in examples.impressions],
            items.texts,
            embeddings=items.embeddings,
        )
        origin, start = start, self._with_histories(start, shown, examples, show)
        trained = train(
            shown,
            start,
            self._training,
            new_space_id=f"space-{identity.version}",
            cache_folder=self._folder / "encodings",
            on_progress=show,
        )
        if start is not origin:
            trained.carry = self._carry(origin, trained, _only(items, shown.records).texts)
        contents = self._contents(identity, examples, items, origin, trained, parent, show)
        course = trained.course
        losses = [trained.metrics["train_loss"], trained.metrics["loss_held_back"]] if course.epochs else []
        auc = trained.metrics.get("auc_held_back", float("nan"))
        log.info("trained", version=identity.version, seconds={k: round(v, 1) for k, v in trained.seconds.items()})
        # A first model's start is no bundle that serves: the gate may still find it better than the bootstrap.
        improved = bool(course.best_epoch) or parent is None or start is not origin
        return Learned(contents, losses, auc, course.start.auc, improved=improved)

    def score(self, bundle: Bundle, records: Sequence[FeaturesRecord], items: ItemFacts) -> list[F32]:
        """Return the calibrated log-odds of each impression's items, as a worker computes them.

        Raises EncoderError where the bundle is of another encoder than that of the settings.
        """
        delta = None if bundle.encoder_folder is None else EncoderDelta.load(bundle.encoder_folder)
        encoder_id = self._encoder().encoder_id if delta is None else delta.encoder_id
        if encoder_id != bundle.space.encoder_id:
            raise EncoderError(
                f"bundle {bundle.version} is of the encoder {bundle.space.encoder_id}, the settings name "
                f"{encoder_id}; it cannot be scored here"
            )
        known = _only(items, records)
        encodings = encode_items(self._encoder(), known.texts, self._cache, delta=delta)
        table = ItemTable(bundle.space, encodings, known.embeddings)
        return score(bundle.scorer, bundle.features, table, records)

    def _encoder(self) -> TextEncoder:
        if self._loaded is None:
            self._loaded = TextEncoder.load(self._encoder_config)
        return self._loaded

    def _start(self, parent: Bundle | None) -> StartingPoint | None:
        if parent is None:
            return self._bootstrap_start()
        encoder = self._encoder()
        base = parent.manifest.base_model or parent.manifest.encoder_id
        if base != encoder.encoder_id:
            return None
        delta = None if parent.encoder_folder is None else EncoderDelta.load(parent.encoder_folder)
        return StartingPoint(parent.space, encoder, delta, parent.scorer, parent.features)

    def _bootstrap_start(self) -> StartingPoint:
        encoder = self._encoder()
        return StartingPoint(bootstrap.find_or_compute_space(encoder, self._folder / "bootstrap"), encoder)

    def _with_histories(
        self, start: StartingPoint, shown: TrainingSet, examples: Examples, show: Show
    ) -> StartingPoint:
        """Return where the training starts: in a space learned from histories, where there are enough of them."""
        if not enough_histories(examples.histories, shown.texts, self._space):
            return start
        first = start
        if start.scorer is None:
            first = replace(start, scorer=first_scorer(start.space.dim, self._training.seed, self._training))
        made = learn_space(
            examples.histories,
            shown.texts,
            first,
            self._space,
            cache_folder=self._folder / "encodings",
            on_progress=show,
        )
        log.info("space_learned", space=made.start.space.space_id, losses=made.losses, seconds=made.seconds)
        learned = made.start if start.scorer is not None else with_features(made.start, shown)
        if learned.scorer is None or learned.features is None:
            return learned
        # Records hold similarities in the space that was served.
        tensors = without_similarities(learned.scorer.tensors, learned.features)
        return replace(learned, scorer=CtrScorer(learned.scorer.config, tensors))

    def _carry(self, origin: StartingPoint, trained: Trained, texts: Mapping[int, str]) -> F32:
        """Return the map by which long-term vectors go over from the space that was served to the new one."""
        before = encode_items(self._encoder(), texts, self._cache, delta=origin.delta)
        after = encode_items(self._encoder(), texts, self._cache, delta=trained.delta)
        old = origin.space.item_vectors(before.base, before.items)
        return carrying_map(old, trained.space.item_vectors(after.base, after.items))

    def _contents(
        self,
        identity: Identity,
        examples: Examples,
        items: ItemFacts,
        start: StartingPoint,
        trained: Trained,
        parent: Bundle | None,
        show: Show,
    ) -> BundleContents:
        encodings = None
        if trained.delta is not None:
            # Not on item-vectors under this id: the whole catalogue comes with the bundle, so that workers wait for
            # nothing but what is newer.
            encodings = encode_items(
                self._encoder(),
                items.texts,
                self._cache,
                lambda done, total: show("encoding the catalogue", done, total),
                trained.delta,
            )
        space = trained.space
        changed = space.space_id != start.space.space_id
        return BundleContents(
            name=identity.name,
            version=identity.version,
            created_ms=identity.created_ms,
            space_id=space.space_id,
            encoder_id=space.encoder_id,
            scorer_config=trained.scorer.config.model_dump(mode="json"),
            scorer_tensors=trained.scorer.tensors,
            features=trained.features,
            projection=space.projection,
            canary=self._canary(examples, items, trained.delta),
            window=identity.window,
            parent=parent.version if parent else None,
            residual_items=space.residual_items,
            residuals=space.residuals,
            carry=trained.carry if changed else None,
            carry_from=start.space.space_id if changed and trained.carry is not None else None,
            encoder=trained.delta,
            encodings=encodings,
            metrics={name: value for name, value in trained.metrics.items() if np.isfinite(value)},
            train=self._training.model_dump(mode="json"),
        )

    def _canary(self, examples: Examples, items: ItemFacts, delta: EncoderDelta | None) -> Canary:
        chosen = [e.features for e in examples.impressions[-CANARY_RECORDS:]]
        found: ItemEncodings = encode_items(self._encoder(), _only(items, chosen).texts, self._cache, delta=delta)
        nameless = [
            msgspec.structs.replace(
                record, user_id=CANARY_USER, request_id=None, session_id=None, context=None, experiment=None, scores=[]
            )
            for record in chosen
        ]
        return Canary([encode(record) for record in nameless], found.items, found.base)


def _only(items: ItemFacts, records: Sequence[FeaturesRecord]) -> ItemFacts:
    """Return what is known of the items that are shown or recent in these records."""
    hashes = {int(h) for r in records for part in (r.items, r.recent_items) for h in np.frombuffer(part, "<u8")}
    return ItemFacts(
        {h: items.texts[h] for h in sorted(hashes) if h in items.texts},
        {h: items.embeddings[h] for h in sorted(hashes) if h in items.embeddings},
    )
