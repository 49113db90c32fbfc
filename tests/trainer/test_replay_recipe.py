"""By which of two recipes a head is trained."""

from __future__ import annotations

from trainer.replay_recipe import head_recipe


def test_clicks_that_are_compared_several_times_an_epoch_are_gone_over_less_often() -> None:
    assert head_recipe(thinned=True).epochs < head_recipe().epochs


def test_what_was_learned_from_histories_is_spared_whatever_the_slates() -> None:
    assert head_recipe(from_histories=True) == head_recipe(from_histories=True, thinned=True)
