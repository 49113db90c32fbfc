"""MovieLens, official CSV layout (latest, latest-small, 20M, 25M, 32M): ratings.csv, movies.csv, tags.csv.

Plain or gzip. A rating is an action `rating` with the stars as its value. The tags of a film are those that users
gave it over the whole set, so they know its future: leave them out of an evaluation that must not (`with_tags`).
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from models.errors import LogFormatError
from models.events import Action, Item, User
from models.logs.log import LogEvent, find, open_bytes, split_folders

MAX_TAGS: Final = 64
"""Tags kept for a film: those that most users gave it."""
_YEAR: Final = re.compile(r"\((\d{4})\)\s*$")
_CHUNK: Final = 8_192


class MovieLensLog:
    """Reader of MovieLens; ratings stand in memory as four columns, 28 bytes each."""

    kind = "movielens"

    def __init__(self, path: Path, *, with_tags: bool = True) -> None:
        folder = split_folders(path, "ratings.csv")[0]
        ratings = find(folder, "ratings.csv")
        if ratings is None:
            raise LogFormatError(f"no ratings.csv in {folder}")
        self._ratings = ratings
        self._movies = find(folder, "movies.csv")
        self._tags = find(folder, "tags.csv") if with_tags else None
        self.files = tuple(file for file in (self._ratings, self._movies, self._tags) if file)
        self.skipped: Counter[str] = Counter()
        self._table: pa.Table | None = None

    def items(self) -> Iterator[Item]:
        """Every film: title, genres as categories, tags. Without movies.csv, every rated film by its id alone."""
        if self._movies is None:
            for movie_id in np.unique(self._columns()["movieId"].to_numpy()).tolist():
                yield Item(item_id=str(movie_id))
            return
        tags = self._tags_of_films()
        for movie_id, title, genres in _rows(self._movies, ("movieId", "title", "genres")):
            year = _YEAR.search(title)
            names = [] if genres == "(no genres listed)" else [g for g in genres.split("|") if g]
            given = tags.get(movie_id)
            yield Item(
                item_id=movie_id,
                title=title,
                categories=names or None,
                tags=[tag for tag, _ in given.most_common(MAX_TAGS)] if given else None,
                attributes={"year": int(year[1])} if year else None,
            )

    def users(self) -> Iterator[User]:
        """MovieLens has no profiles in this layout."""
        return iter(())

    def events(self) -> Iterator[LogEvent]:
        """Ratings in time order, ties in file order."""
        self.skipped.clear()
        table = self._columns()
        users, movies = table["userId"].to_numpy(), table["movieId"].to_numpy()
        stars, seconds = table["rating"].to_numpy(), table["timestamp"].to_numpy()
        order = np.argsort(seconds, kind="stable")
        for at in range(0, len(order), _CHUNK):
            chunk = order[at : at + _CHUNK]
            columns = (users[chunk].tolist(), movies[chunk].tolist(), stars[chunk].tolist(), seconds[chunk].tolist())
            for user, movie, rating, second in zip(*columns, strict=True):
                action = Action(
                    event_id=f"movielens:{user}:{movie}:{second}",
                    event_time=second * 1000,
                    user_id=str(user),
                    item_id=str(movie),
                    action="rating",
                    value=rating,
                )
                yield LogEvent(second * 1000, action)

    def count_events(self) -> int | None:
        """Exact."""
        return int(self._columns().num_rows)

    def _columns(self) -> pa.Table:
        if self._table is None:
            types = {"userId": pa.int64(), "movieId": pa.int64(), "rating": pa.float64(), "timestamp": pa.int64()}
            try:
                with open_bytes(self._ratings) as file:
                    table = pa_csv.read_csv(
                        file,
                        convert_options=pa_csv.ConvertOptions(column_types=types, include_columns=list(types)),
                    )
            except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
                raise LogFormatError(
                    f"{self._ratings} is not a ratings.csv (userId,movieId,rating,timestamp): {error}"
                ) from None
            if any(column.null_count for column in table.columns):
                raise LogFormatError(f"{self._ratings} has empty fields")
            self._table = table
        return self._table

    def _tags_of_films(self) -> dict[str, Counter[str]]:
        tags: defaultdict[str, Counter[str]] = defaultdict(Counter)
        if self._tags is not None:
            for movie_id, tag in _rows(self._tags, ("movieId", "tag")):
                if name := tag.strip().lower()[:256]:
                    tags[movie_id][name] += 1
        return tags


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    with open_bytes(path) as file:
        reader = csv.reader((line.decode("utf-8") for line in file), strict=True)
        try:
            header = next(reader, [])
            if not set(columns) <= set(header):
                raise LogFormatError(f"{path} has the columns {header}; it needs {', '.join(columns)}")
            places = [header.index(name) for name in columns]
            for row in reader:
                if len(row) != len(header):
                    raise LogFormatError(f"{path}, line {reader.line_num}: {len(row)} columns, not {len(header)}")
                yield tuple(row[place] for place in places)
        except (csv.Error, UnicodeDecodeError) as error:
            raise LogFormatError(f"{path}, line {reader.line_num}: {error}") from None
