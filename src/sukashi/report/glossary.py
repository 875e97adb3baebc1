"""The words that pages use and that not everybody knows: what each means, and where a page first says it."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """A word, what it means, and how else it is written; a page says it where `said` is found."""

    name: str
    means: str
    said: str = ""

    @property
    def anchor(self) -> str:
        return f"word-{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}"

    @property
    def found(self) -> re.Pattern[str]:
        return re.compile(rf"(?<![\w/])(?:{self.said or re.escape(self.name) + 's?'})(?![\w/])")


WORDS = (
    Word(
        "SAUCE",
        "100 times the area under accuracy against the fraction removed, from the dense network to nothing left, "
        "closed by a straight line to what one answer for all images gets right. 100 would be a network that never "
        "errs however much is cut.",
    ),
    Word("relative SAUCE", "SAUCE divided by the dense network's accuracy.", "[Rr]elative SAUCE"),
    Word(
        "criterion",
        "A rule that says how important each unit or weight is; the least important go first.",
        "criterion|criteria",
    ),
    Word(
        "contender",
        "What is held against others: a criterion, followed by “/” and how its calibration images were drawn, where "
        "not at random, and by “+” and what repairs its cuts.",
    ),
    Word(
        "unit",
        "What structured pruning removes whole: a channel of a convolution, a hidden unit, a dimension of attention.",
    ),
    Word("site", "A place in the network whose units can be scored and removed; layers cut together are one site."),
    Word("coupled", "Of layers that make the same units, as those whose outputs are added: they lose them together."),
    Word(
        "attribution",
        "A method that says how much each position in a network, or each pixel, had to do with an answer.",
    ),
    Word(
        "progressive pass",
        "One round of a progressive criterion: units are judged in turn, each in the network that the removals before "
        "it left.",
        "progressive pass(?:es)?",
    ),
    Word(
        "progressive",
        "Of a criterion that removes units one by one and judges each in what is left; others score all at once.",
    ),
    Word(
        "subspace",
        "Directions in what a layer writes, as many as it has dimensions: what a network says along them is taken "
        "together, looked at and taken out, as a unit is.",
    ),
    Word(
        "average precision",
        "The mean, over the images that have something, of the share that has it among all with no lower a score: 1 "
        "where they all come first.",
    ),
    Word("dense", "The network before anything was removed."),
    Word(
        "lossless",
        "Shown by a test on the same images to lose at most a margin of accuracy, at a ratio and at every smaller one. "
        "A margin of .01 is one point.",
        "lossless(?:ly)?",
    ),
    Word(
        "point",
        "A percentage point, .01 of accuracy: from 95% to 94% is one point.",
        r"[\d.]+ points?|ten points|in points|points of accuracy",
    ),
    Word(
        "scope",
        "Among which single weights the least important are looked for: those of a row (one output), of a layer, of "
        "all layers (global), or so many of every few (as 2:4).",
    ),
    Word(
        "mode zero",
        "Units are silenced, not cut out: logits are those of the cut network, shape and speed those of the dense one.",
        "mode zero|zeroed|silenced",
    ),
    Word("level", "One of the ratios of a schedule: a network that is cut so far and trained on from there."),
    Word(
        "population",
        "On which of the test images maps are compared: those that both networks get right, that the reference gets "
        "right, or all.",
    ),
    Word("reference", "The first network of an audit; every other one is held against it.", "reference(?:'s|&#39;s)?"),
    Word(
        "gini",
        "How few pixels hold a map: 0 where all matter alike, near 1 where one holds everything.",
        "[Gg]ini",
    ),
    Word(
        "ROAD",
        "Remove and debias: pixels are taken in the order of a map and filled from what is around them; how much more "
        "accuracy goes where the most relevant go first than where the least relevant do.",
        "ROAD|road",
    ),
    Word("AOPC", "How much accuracy goes, on average over the steps, as the most relevant pixels do.", "AOPC|aopc"),
    Word("MoRF", "Most relevant first: the order in which pixels are taken.", "MoRF|morf"),
    Word("LeRF", "Least relevant first: the order in which pixels are taken.", "LeRF|lerf"),
    Word(
        "Holm",
        "Holm's correction: p values of many tests are raised, so that all of them together err as seldom as one.",
        "Holm(?:'s|&#39;s)?",
    ),
    Word(
        "Tango",
        "Tango's score test: whether one network is at most so much worse than another on the same images.",
        "Tango(?:'s|&#39;s)?",
    ),
    Word("Wilson", "Wilson's interval of a share, such as accuracy, of so many images.", "Wilson(?:'s|&#39;s)?"),
    Word(
        "95% interval",
        "What a method gives that covers the true value in 95 of 100 repetitions: with other images, and where it is "
        "for new seeds too, with other seeds.",
        "95% (?:bootstrap )?intervals?",
    ),
    Word(
        "SD",
        "Standard deviation: here of the reference's values over images, by which a change is called slight or large.",
        "SD|standard deviations?",
    ),
    Word(
        "rounding alone leaves",
        "What is left of a map's likeness to itself when each weight is moved by as little as other rounding would.",
        "rounding alone(?: leaves| does)?|rounded otherwise",
    ),
    Word("critical", "Of a unit: a test shows that the network does worse without it."),
    Word("neutral", "Of a unit: no test shows that the network does better or worse without it."),
    Word("detrimental", "Of a unit: a test shows that the network does better without it."),
    Word(
        "calibration images",
        "Training images that a criterion looks at to score units; none of them is tested on.",
        "calibration(?: images)?",
    ),
    Word(
        "held out by seed",
        "Images kept from training, chosen by the hash of their names and the seed: another seed keeps others.",
    ),
    Word(
        "held out",
        "Images kept from training, chosen by the hash of their names: the same ones whatever the seed.",
        "held out(?! by seed)",
    ),
    Word(
        "waiting",
        "The share of a training's time in which the network had no images to work on.",
        "waiting|on getting them ready",
    ),
    Word(
        "rewinding",
        "Weights that stay are put back to what they were early in training, then trained again.",
        "rewind(?:s|ing)?|rewound",
    ),
    Word(
        "enforce a mask",
        "Weights that were removed are set to zero again after each step of training, so that they stay so.",
        "enforced?|enforcing(?: a mask)?",
    ),
    Word(
        "FLOPs",
        "Operations that one image takes in convolutions, matrix products and attention; a multiply-add is two.",
        "FLOPs",
    ),
    Word(
        "latency",
        "Milliseconds of one pass, the median of several. Its factor (×) is the median of the factors of passes timed "
        "in turns (over seeds their geometric mean), which what slows both networks for a while does not change; it is "
        "not the quotient of the two medians.",
    ),
)

_PARTS = re.compile(r"(<style>.*?</style>|<[^>]*>)", re.DOTALL)
# In these no word is explained: they are names, links, or code; in the first no word counts.
_UNREAD = ("title", "pre", "code")
_PLAIN = (*_UNREAD, "header", "h2", "h3", "a", "summary", "caption", "td", "th")


def explained(page: str) -> str:
    """The page, in which each word is a link where it first stands in a sentence, to what it means at the end."""
    parts = _PARTS.split(page)
    open_ = dict.fromkeys(_PLAIN, 0)
    linked: set[str] = set()
    told: set[str] = set()
    for i, part in enumerate(parts):
        if i % 2:
            name = re.match(r"</?(\w*)", part)
            if name and name[1] in open_:
                open_[name[1]] += -1 if part.startswith("</") else 1
        elif part.strip() and not any(open_[tag] for tag in _UNREAD):
            parts[i] = part if any(open_.values()) else _linked(part, linked)
            told |= {word.name for word in WORDS if word.found.search(part)}
    return "".join(parts).replace(PLACE, _list([word for word in WORDS if word.name in told]))


PLACE = "<!-- words -->"


def _linked(text: str, linked: set[str]) -> str:
    """A piece of text with the words in it that were not linked before; of words in one another the longest."""
    found: list[tuple[int, int, Word]] = []
    for word in sorted(WORDS, key=lambda word: -len(word.name)):
        match = None if word.name in linked else word.found.search(text)
        if match and all(match.end() <= start or end <= match.start() for start, end, _ in found):
            found.append((*match.span(), word))
            linked.add(word.name)
    for start, end, word in sorted(found, reverse=True, key=lambda of: of[0]):
        title = html.escape(word.means)
        link = f'<a class="word" href="#{word.anchor}" title="{title}">{text[start:end]}</a>'
        text = text[:start] + link + text[end:]
    return text


def _list(words: list[Word]) -> str:
    return "\n".join(
        f'<dt id="{word.anchor}">{html.escape(word.name)}</dt><dd>{html.escape(word.means)}</dd>'
        for word in sorted(words, key=lambda word: word.name.lower())
    )
