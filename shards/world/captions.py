"""Sentences about one picture: only what the view shows, with a log of every attribute mentioned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shards.world.draws import Draws
from shards.world.identity import ATTRIBUTES, Identity, effective
from shards.world.moment import CARRIED, IN_IMAGE, Moment

Mention = tuple[str, str]
MAX_WORDS = 38
SYNONYMS: dict[str, tuple[str, ...]] = {
    "t-shirt": ("t-shirt", "tee"),
    "tank top": ("tank top", "sleeveless top"),
    "sweater": ("sweater", "pullover"),
    "hoodie": ("hoodie",),
    "jacket": ("jacket",),
    "coat": ("coat", "overcoat"),
    "trousers": ("trousers", "pants"),
    "shorts": ("shorts",),
    "skirt": ("skirt",),
    "leggings": ("leggings", "tights"),
    "sneakers": ("sneakers", "trainers"),
    "boots": ("boots",),
    "sandals": ("sandals",),
    "backpack": ("backpack", "rucksack"),
    "handbag": ("handbag", "purse"),
    "shoulder bag": ("shoulder bag", "satchel"),
    "suitcase": ("suitcase", "trolley"),
    "cap": ("cap",),
    "beanie": ("beanie",),
    "sun hat": ("sun hat",),
    "gray": ("gray", "grey"),
    "navy": ("navy", "dark blue"),
    "beige": ("beige", "cream"),
    "striped": ("striped",),
    "pinstriped": ("pinstriped", "vertically striped"),
    "checked": ("checked", "plaid"),
    "dotted": ("dotted", "spotted"),
    "slim": ("slim", "thin"),
    "heavy": ("heavy", "stout"),
    "young": ("young",),
    "elderly": ("elderly", "old"),
    "man": ("man", "gentleman", "guy", "male"),
    "woman": ("woman", "lady", "girl", "female"),
    "pale": ("pale", "fair"),
    "blonde": ("blonde", "blond"),
    "purple": ("purple", "violet"),
    "walking": ("walking", "strolling"),
    "standing": ("standing", "standing still"),
    "running": ("running", "jogging"),
    "front": ("facing the camera", "seen from the front"),
    "side": ("seen from the side", "in profile"),
    "back": ("seen from behind", "seen from the back"),
}
PLURAL = ("trousers", "shorts", "leggings", "sneakers", "boots", "sandals")
_RARE = {"build": 0.45, "height": 0.3, "age": 0.45, "skin": 0.3, "logo": 0.8, "presentation": 1.1}
"""Attributes that people name less often than clothes, as a factor of the coverage."""
_MOMENT_COVERAGE = 0.9
"""Probability that pose or view is named in a world of instance 1."""


def article(phrase: str) -> str:
    """Return the phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def say(value: str, draws: Draws) -> str:
    """Return one of the words for a value."""
    return draws.pick(SYNONYMS.get(value, (value,)))


@dataclass(frozen=True)
class Caption:
    """A sentence (or two) and the attributes it names, in order.

    A mention whose name begins with IN_IMAGE holds for the picture ("image.pose"), all others hold for the person.
    """

    text: str
    mentions: tuple[Mention, ...]


@dataclass
class Speaker:
    """Words about one picture, phrase by phrase, while the mentions are logged.

    Attributes:
        seen: The identity's effective attributes.
        visible: Attributes that the picture shows.
        coverage: Probability that a visible attribute is named.
        wrong: Probability that a colour word is replaced by another.
        draws: Stream of the caption.
        instance: Strength of instance-level content; above 0, bag, pose and view are mentions about the picture.
    """

    seen: Mapping[str, str]
    visible: frozenset[str]
    coverage: float
    wrong: float
    draws: Draws
    instance: float = 0.0
    mentions: list[Mention] = field(default_factory=list)

    def named(self, name: str) -> str:
        """Return a word for an attribute and log it, or "" where it is not visible, absent or left out."""
        value = self.seen[name]
        if name not in self.visible or value in ("none", "average", "adult", "plain"):
            return ""
        if not self.draws.chance(self.coverage * _RARE.get(name, 1.0)):
            return ""
        colour = name.endswith("colour") or name in ("upper_colour2", "scarf")
        if colour and self.draws.chance(self.wrong):
            value = self.draws.pick([v for v in ATTRIBUTES[name] if v not in (value, "none")])
        self.mentions.append((f"{IN_IMAGE}{name}" if self.instance and name in CARRIED else name, value))
        return say(value, self.draws)

    def momentary(self, name: str) -> str:
        """Return words for the picture's pose or view and log them, or "" where they are hidden or left out."""
        if not self.instance or name not in self.visible or not self.draws.chance(_MOMENT_COVERAGE * self.instance):
            return ""
        self.mentions.append((f"{IN_IMAGE}{name}", self.seen[name]))
        return say(self.seen[name], self.draws)

    def subject(self) -> str:
        """Return the person without article, such as "tall young woman"."""
        words = [self.named("height"), self.named("build"), self.named("age")]
        noun = self.named("presentation") or self.draws.pick(("person", "pedestrian"))
        return " ".join([word for word in words if word] + [noun])

    def body(self) -> str:
        """Return hair and skin, such as "long black hair and pale skin", or ""."""
        skin = self.named("skin")
        return listing([self._hair(), f"{skin} skin" if skin else ""])

    def _hair(self) -> str:
        style, colour = self.named("hair"), self.named("hair_colour")
        if style == "bald":
            return "a bald head"
        if style == "ponytail":
            return article(f"{colour} ponytail".strip())
        return f"{style} {colour} hair".strip().replace("  ", " ") if style or colour else ""

    def upper(self) -> str:
        """Return the upper garment with colours and pattern."""
        garment, colour = self.named("upper"), self.named("upper_colour")
        if not garment and not colour:
            return ""
        pattern = self.named("pattern")
        # A second colour alone would be read as the ground colour, so it is named only beside it.
        second = self.named("upper_colour2") if pattern and colour else ""
        noun = garment or self.draws.pick(("top", "upper garment"))
        if pattern == "sash":
            phrase = article(f"{colour} {noun}".strip()) + f" with {article(second + ' sash' if second else 'sash')}"
        elif pattern == "two-tone" and second:
            phrase = article(f"{colour} {noun}".strip()) + f" with {article(f'{second} lower half')}"
        else:
            joined = f"{colour} and {second}" if colour and second else colour or second
            phrase = article(" ".join(word for word in (joined, pattern, noun) if word))
        logo = self.named("logo")
        return f"{phrase} {'and' if ' with ' in phrase else 'with'} a logo" if logo else phrase

    def _thing(self, kind: str, colour: str, general: tuple[str, ...], plural: bool = False) -> str:
        noun, shade = self.named(kind), self.named(colour)
        if not noun and not shade:
            return ""
        phrase = f"{shade} {noun or self.draws.pick(general)}".strip()
        return phrase if plural or self.seen[kind] in PLURAL else article(phrase)

    def lower(self) -> str:
        """Return the lower garment."""
        noun, shade = self.named("lower"), self.named("lower_colour")
        if not noun and not shade:
            return ""
        phrase = f"{shade} {noun or 'bottoms'}".strip()
        return phrase if not noun or self.seen["lower"] in PLURAL else article(phrase)

    def shoes(self) -> str:
        """Return the shoes."""
        return self._thing("shoes", "shoe_colour", ("shoes", "footwear"), plural=True)

    def bag(self) -> str:
        """Return the bag."""
        return self._thing("bag", "bag_colour", ("bag",))

    def extras(self) -> list[str]:
        """Return hat, scarf and glasses, as far as named."""
        hat = self._thing("hat", "hat_colour", ("hat",))
        scarf, glasses = self.named("scarf"), self.named("glasses")
        return [phrase for phrase in (hat, article(f"{scarf} scarf") if scarf else "", glasses) if phrase]


def listing(phrases: list[str]) -> str:
    """Join phrases with commas and a final "and"."""
    phrases = [phrase for phrase in phrases if phrase]
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1] if phrases else ""


@dataclass(frozen=True)
class _Parts:
    subject: str
    pronoun: str
    clothes: list[str]
    body: str
    bag: str
    extras: list[str]
    where: str
    pose: str | None
    pick: Callable[[tuple[str, ...]], str]

    def at_rest(self) -> "_Parts":
        """Return the parts with the pose moved to the end of the first sentence, for frames without a place for it."""
        return replace(self, where=f" while {self.pose}{self.where}", pose="") if self.pose else self


def _plain(parts: _Parts) -> str:
    text = article(parts.subject) + (f" with {parts.body}" if parts.body else "")
    if parts.clothes:
        text += f" {parts.pick(('is wearing', 'wears', 'is dressed in'))} {listing(parts.clothes)}"
    text += parts.where
    rest = list(parts.extras)
    if parts.bag:
        text += f". {parts.pronoun} {parts.pick(('carries', 'is carrying', 'holds'))} {parts.bag}"
        return text + (f" and has {listing(rest)}." if rest else ".")
    return text + (f". {parts.pronoun} has {listing(rest)}." if rest else ".")


def _clothes_first(parts: _Parts) -> str:
    if not parts.clothes:
        return _plain(parts)
    rest = listing([parts.body, *parts.extras, parts.bag])
    text = f"{parts.pick(('dressed in', 'wearing'))} {listing(parts.clothes)}, this {parts.subject}"
    if rest:
        return f"{text} {parts.pick(('has', 'can be seen with'))} {rest}{parts.where}."
    return f"{text} {'is walking' if parts.pose is None else 'can be seen'}{parts.where}."


def _acting(parts: _Parts) -> str:
    if parts.pose == "":
        return _plain(parts)
    text = f"{parts.pick(('the', 'this'))} {parts.subject}" + (f" in {listing(parts.clothes)}" if parts.clothes else "")
    verb = parts.pick(("walking", "standing")) if parts.pose is None else parts.pose
    text += f" is {verb}" + (f" with {parts.bag}" if parts.bag else "") + parts.where
    rest = listing([parts.body, *parts.extras])
    return f"{text}. {parts.pronoun} also has {rest}." if rest else f"{text}."


def _picture(parts: _Parts) -> str:
    text = f"{parts.pick(('a picture of', 'there is', 'we see'))} {article(parts.subject)}"
    rest = listing([parts.body, *parts.extras, *parts.clothes])
    text += (f" with {rest}" if rest else "") + parts.where
    return f"{text}. {parts.pick(('the bag is', parts.pronoun + ' brings'))} {parts.bag}." if parts.bag else f"{text}."


def _listed(parts: _Parts) -> str:
    rest = listing([*parts.extras, *parts.clothes])
    text = article(parts.subject) + (f" wears {rest}" if rest else "") + parts.where
    if parts.body:
        text += f", and {parts.pick(('has', 'shows'))} {parts.body}"
    return text + (f", with {parts.bag}." if parts.bag else ".")


_FRAMES = (_plain, _clothes_first, _acting, _picture, _listed)
STYLES: dict[str, tuple[Callable[[_Parts], str], ...]] = {
    "mixed": _FRAMES, "plain": (_plain,), "clothes": (_clothes_first,), "action": (_acting,), "picture": (_picture,),
    "list": (_listed,),
}  # fmt: skip
"""Sentence frames by the name of a caption style."""
_WHERE = {
    "front": (" facing the camera", " seen from the front"),
    "side": (" seen from the side", " passing by"),
    "back": (" seen from behind", " walking away"),
}


def _attempt(seen: Mapping[str, str], speaker: Speaker, frames: Sequence[Callable[[_Parts], str]]) -> Caption:
    draws = speaker.draws
    subject = speaker.subject()
    said_sex = any(name == "presentation" for name, _ in speaker.mentions)
    parts = _Parts(
        subject=subject,
        pronoun={"man": "he", "woman": "she"}[seen["presentation"]] if said_sex else "this person",
        body=speaker.body(),
        clothes=[phrase for phrase in (speaker.upper(), speaker.lower(), speaker.shoes()) if phrase],
        bag=speaker.bag(),
        extras=speaker.extras(),
        where="",
        pose=None,
        pick=draws.pick,
    )
    if speaker.instance:
        view = speaker.momentary("view")
        parts = replace(parts, where=f" {view}" if view else "", pose=speaker.momentary("pose"))
        frame = draws.pick(frames)
        return Caption(frame(parts if frame is _acting else parts.at_rest()), tuple(speaker.mentions))
    if draws.chance(0.4):
        parts = replace(parts, where=draws.pick(_WHERE[seen["view"]]))
    return Caption(draws.pick(frames)(parts), tuple(speaker.mentions))


def describe(
    draws: Draws,
    identity: Identity,
    view: str,
    visible: frozenset[str],
    coverage: float,
    wrong: float = 0.0,
    *,
    instance: float = 0.0,
    moment: Moment | None = None,
    style: str = "mixed",
    most_words: int = MAX_WORDS,
) -> Caption:
    """Return one caption of a picture.

    Args:
        draws: Stream of this caption.
        identity: Whom the picture shows.
        view: front, side or back.
        visible: Attributes that the picture shows.
        coverage: Probability that a visible attribute is named.
        wrong: Probability that a colour word is wrong; the log then holds what was said.
        instance: Strength of instance-level content. At 0 "walking", "standing" and the phrases about the view are
            figures of speech that no log holds; above 0 they are true of the picture and logged.
        moment: What holds for this picture only; needed where `instance` is above 0.
        style: Name in STYLES of the sentence frames.
        most_words: The caption is no longer than this.
    """
    shown = moment.shown(identity) if moment else identity
    seen = {**effective(shown.attributes), "view": view, "pose": moment.pose if moment else ""}
    if moment is None:
        instance = 0.0
    while True:
        speaker = Speaker(seen, visible | {"view"}, coverage, wrong, draws, instance)
        caption = _attempt(seen, speaker, STYLES[style])
        if len(caption.text.split()) <= most_words:
            return caption
        coverage *= 0.9
