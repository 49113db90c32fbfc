"""The sentences of reasons, by language. A template has the fields of its name and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Language = Literal["en", "zh"]


@dataclass(frozen=True, slots=True)
class ReasonTexts:
    """One language."""

    because: str
    """{verb}, {title}"""
    because_untitled: str
    """{verb}: the item has no title."""
    verbs: dict[str, str]
    """By action; what is not here is the first one."""
    recent: str
    co_click: str
    trending: str
    trending_category: str
    """{category}"""
    newest: str
    chosen: str
    profile: str
    query: str
    pinned: str
    drawn: str
    drawn_new: str


TEXTS: Final[dict[Language, ReasonTexts]] = {
    "en": ReasonTexts(
        because="Because you {verb} “{title}”",
        because_untitled="Because you {verb} an item like it",
        verbs={
            "click": "clicked",
            "like": "liked",
            "share": "shared",
            "purchase": "bought",
            "rating": "rated",
            "dwell": "spent time on",
        },
        recent="Like what you clicked before",
        co_click="Often chosen after what you clicked",
        trending="Popular at the moment",
        trending_category="Popular at the moment in {category}",
        newest="Among the newest items",
        chosen="The best known of the items asked for",
        profile="Fits your profile",
        query="Matches your search",
        pinned="Picked for this page",
        drawn="Drawn at random, to learn what you like",
        drawn_new="New here: shown to learn who likes it",
    ),
    "zh": ReasonTexts(
        because="因为你{verb}过《{title}》",
        because_untitled="因为你{verb}过类似的内容",
        verbs={
            "click": "点击",
            "like": "喜欢",
            "share": "分享",
            "purchase": "购买",
            "rating": "评价",
            "dwell": "细看",
        },
        recent="与你点击过的内容相似",
        co_click="看过你点击的内容的人常接着看",
        trending="当前热门",
        trending_category="“{category}”类当前热门",
        newest="最新上线的内容",
        chosen="所选内容中最受关注的",
        profile="符合你的个人资料",
        query="符合你的搜索",
        pinned="本页精选",
        drawn="随机展示，以便了解你的喜好",
        drawn_new="新内容，展示给你以便了解谁会喜欢",
    ),
}
