"""The demo's films: invented, deterministic for a seed, each with a text that an encoder can tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from models.errors import SettingsError
from models.events import Item
from streams.demo.films import DECADES, FIRST_NAMES, GENRES, LAST_NAMES

MOST_FILMS: Final = 5_000
LONGEST_TITLE: Final = 28
"""Characters: what fits twice into a line of the view."""
_DIRECTORS_OF_A_GENRE: Final = 4


@dataclass(frozen=True, slots=True)
class Film:
    """One film of the catalogue."""

    item_id: str
    title: str
    genre: str
    decade: int
    director: str
    text: str

    @property
    def label(self) -> str:
        """Title, genre and decade, as the view shows them."""
        return f"{self.title} ({self.genre}, {self.decade}s)"

    def item(self) -> Item:
        """The record for the ``items`` topic."""
        return Item(
            item_id=self.item_id,
            title=self.title,
            text=self.text,
            categories=[self.genre],
            tags=[f"{self.decade}s", self.director],
        )


def directors_of(genre: str) -> list[str]:
    """Return the directors who make films of ``genre``; each name belongs to one genre."""
    place = list(GENRES).index(genre)
    return [
        f"{FIRST_NAMES[(place + 3 * i) % len(FIRST_NAMES)]} {LAST_NAMES[(5 * place + i) % len(LAST_NAMES)]}"
        for i in range(_DIRECTORS_OF_A_GENRE)
    ]


def make_films(count: int, seed: int) -> list[Film]:
    """Return ``count`` films with different titles, genres evenly mixed, the same for the same seed.

    Raises SettingsError where more are asked for than there are titles for.
    """
    if not 1 <= count <= MOST_FILMS:
        raise SettingsError(f"{count} films cannot be made; between 1 and {MOST_FILMS} can")
    rng = np.random.default_rng([seed, 1])
    films: list[Film] = []
    titles: set[str] = set()
    genres = list(GENRES)
    while len(films) < count:
        # In turns, then shuffled: whatever part of the catalogue is searchable first has every genre in it.
        genre = genres[len(films) % len(genres)]
        words = GENRES[genre]
        noun, adjective, place = _pick(rng, words.nouns), _pick(rng, words.adjectives), _pick(rng, words.places)
        title = _title(rng, noun, adjective, place)
        if title in titles:
            title = f"{title} {_pick(rng, ('Returns', 'II', 'III', 'Forever'))}"
        if title in titles or len(title) > LONGEST_TITLE:
            continue
        titles.add(title)
        decade = int(rng.choice(DECADES))
        director = _pick(rng, tuple(directors_of(genre)))
        text = (
            f"{_pick(rng, words.heroes)} {_pick(rng, words.stories)} in {place}. "
            f"{_article(words.phrase)} {words.phrase} of the {decade}s by {director}."
        )
        films.append(Film(f"film-{len(films) + 1:04d}", title, genre, decade, director, text))
    return [films[i] for i in rng.permutation(count)]


def _title(rng: np.random.Generator, noun: str, adjective: str, place: str) -> str:
    short_place = place.removeprefix("the ").removeprefix("a ")
    short_place = short_place[0].upper() + short_place[1:]
    of_place = f"the {short_place}" if place.startswith(("the ", "a ")) else place
    shapes = (
        f"The {adjective} {noun}",
        f"{adjective} {noun}",
        f"The {noun} of {of_place}",
        f"{_pick(rng, FIRST_NAMES)}'s {noun}",
        f"{noun} at {_pick(rng, ('Dawn', 'Dusk', 'Midnight', 'Noon'))}",
        f"Beyond the {adjective} {noun}",
    )
    return _pick(rng, shapes)


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _article(word: str) -> str:
    return "An" if word[0] in "aeiou" else "A"
