"""Prompts: seeded text made here, of as many tokens as wanted, or the user's own from a JSONL file.

Text is cut from one long text of common words that is made once; each prompt begins with words of its own, so that no
engine's prefix cache finds it, unless the scenario shares prefixes. How many tokens a word costs depends on the model:
it is estimated, and measured at the start of a run (`fit`).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, Field

from vitalis_load.errors import LoadFailure
from vitalis_load.lengths import STRICT, Length, assumed

MOST_SHOWN = 10  # wrong lines that one sentence names
_BOOK_WORDS = 40_000
_LABEL_WORDS = 6  # what a prompt's own first words count as

# Common words that every vocabulary has as one piece, so that a token is about a word.
_VOCABULARY = """
about above across after again against air all along also always among and animal another answer any area around as
ask at away back bad base be because become been before began begin behind being below best better between big bird
black blue board boat body book both box bring build but buy by call came can car care carry cause center change check
child city clean clear close cold color come common complete could country course cover cross cut dark day deep did
different direct do does dog done door down draw dry during each early earth east easy eat end enough even ever every
example eye face fact family far farm fast father feel feet few field figure final find fine fire first fish five
follow food foot for force form found four free friend from front full game gave general get give go gold good great
green ground group grow had half hand happen hard has have he head hear heart heat help her here high him his hold
home horse hot hour house how hundred idea if in inch interest into is it just keep kind king knew know land language
large last late laugh lead learn leave left less let letter life light like line list listen little live long look lot
love low machine made main make man many map mark may me mean measure men might mile mind minute miss money moon more
morning most mother mountain move much music must my name near need never new next night no north notice noun now
number object of off often old on once one only open or order other our out over own page paper part pass
pattern people perhaps person picture piece place plain plan plane plant play point port pose possible power press
problem produce product provide pull put question quick rain ran reach read real receive red remember rest right river
road rock room round rule run said same saw say school science sea second see seem self sentence serve set several
shape she ship short should show side simple since sing sit six size sleep slow small snow so some song soon sound
south special spell stand star start state stay step still stood stop story street strong study such sun sure surface
system table tail take talk teach tell ten test than that the their them then there these they thing think this those
though thought thousand three through time to together told too took top toward town travel tree true try turn two
under unit until up us use usual very voice vowel wait walk want war warm was watch water way we week weight well went
were west what wheel when where which while white who whole why will wind with wonder wood word work world would write
year yes yet you young your
"""
_WORDS = _VOCABULARY.split()


class Text(BaseModel):
    """Text made here, of so many tokens, no two alike."""

    model_config = STRICT

    kind: Literal["text"] = "text"
    tokens: Length


class Shared(BaseModel):
    """A system message that all of a group have in common, and a question of its own behind it."""

    model_config = STRICT

    kind: Literal["shared"]
    prefix_tokens: Annotated[int, Field(ge=1, le=1_000_000)]
    groups: Annotated[int, Field(ge=1, le=100_000)] = 1
    tokens: Length


class File(BaseModel):
    """The user's own, a JSON object a line: {"prompt": text} or {"messages": [...]}, and "output_tokens" if wanted."""

    model_config = STRICT

    kind: Literal["file"]
    path: str
    order: Literal["cycle", "random"] = "cycle"


Prompt = Annotated[Text | Shared | File, Field(discriminator="kind"), assumed("text")]


@dataclass(frozen=True, slots=True)
class Tokenisation:
    """How a model counts this text: tokens of a request = the API's frame + `per_word` * words. `frames`: by API, of
    which an unknown one has `overhead`. Completions have hardly any; a chat's is of 20 to 70 tokens."""

    per_word: float = 1.09  # o200k and SmolLM2's vocabulary alike, on this text
    overhead: float = 20.0
    frames: Mapping[str, float] = field(default_factory=lambda: {"completions": 0.0})

    def of(self, api: str) -> "Tokenisation":
        """With the frame of this API as its `overhead`."""
        return replace(self, overhead=self.frames.get(api, self.overhead))

    def words(self, tokens: float) -> int:
        """Whose request has about so many tokens; at least one."""
        return max(1, round((tokens - self.overhead) / self.per_word))


def fit(seen: Sequence[tuple[int, int]]) -> Tokenisation:
    """The line through (words, prompt tokens of `usage`) of requests of one API made here.

    The default where it cannot be told (fewer than two different lengths), or where the counts make no sense.
    """
    count = len(seen)
    mean_words = sum(words for words, _ in seen) / max(1, count)
    mean_tokens = sum(tokens for _, tokens in seen) / max(1, count)
    spread = sum((words - mean_words) ** 2 for words, _ in seen)
    if not spread:
        return Tokenisation()
    per_word = sum((words - mean_words) * (tokens - mean_tokens) for words, tokens in seen) / spread
    if not 0.2 <= per_word <= 20:
        return Tokenisation()
    return Tokenisation(per_word, max(0.0, mean_tokens - per_word * mean_words))


def fit_each(seen: Mapping[str, Sequence[tuple[int, int]]]) -> Tokenisation:
    """As `fit`, of the API with the most requests; of each other one only its frame is found."""
    if not seen:
        return Tokenisation()
    first = max(seen, key=lambda api: len(seen[api]))
    found = fit(seen[first])
    frames = {
        api: max(0.0, sum(tokens - found.per_word * words for words, tokens in counts) / len(counts))
        for api, counts in seen.items()
        if counts and found != Tokenisation()
    }
    return replace(found, frames={**found.frames, **frames})


def dice_of(*what: object) -> random.Random:
    """Dice that fall the same for the same things, in every process and at every time."""
    return random.Random(digest(*what))


def digest(*what: object) -> int:
    """64 bits of these things' text."""
    return int.from_bytes(blake2b("\x1f".join(map(str, what)).encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=1)
def _book() -> tuple[str, list[int]]:
    """The long text, and where each of its words begins (one more than words: where the next would)."""
    dice, words = random.Random(20), []
    until_stop = 0
    for word in dice.choices(_WORDS, k=_BOOK_WORDS):
        words.append(word.capitalize() if until_stop == 0 else word)
        until_stop = dice.randint(6, 16) if until_stop == 0 else until_stop - 1
        if until_stop == 0:
            words[-1] += "."
    return " ".join(words) + " ", [0, *accumulate(len(word) + 1 for word in words)]


def text(words: int, start: int) -> str:
    """So many words of the long text, from word `start` on; it begins anew where it ends."""
    book, begins = _book()
    place, parts = start % _BOOK_WORDS, []
    while words > 0:
        end = min(_BOOK_WORDS, place + words)
        parts.append(book[begins[place] : begins[end]])
        words -= end - place
        place = 0
    return "".join(parts).rstrip()


def label(*what: object) -> str:
    """A few words that these things alone have, to stand first."""
    number = digest(*what)
    return " ".join(_WORDS[(number >> shift) % len(_WORDS)] for shift in (0, 12, 24, 36, 48)) + f" {number % 1000}:"


def unique(words: int, *what: object) -> str:
    """Text of about so many words whose first ones are its own."""
    return f"{label(*what)} {text(max(1, words - _LABEL_WORDS), digest(*what, 'start'))}"


class Line(msgspec.Struct):
    """One of the user's own prompts."""

    messages: list[dict[str, Any]] = []
    prompt: str = ""
    output_tokens: int | None = None


@lru_cache(maxsize=16)
def read_file(path: str) -> tuple[Line, ...]:
    """Raises LoadFailure with every wrong line (the first ten)."""
    return tuple(line for _, line in read_lines(path, Line, _wrong, "prompts"))


def _wrong(line: Line) -> str:
    if bool(line.messages) == bool(line.prompt):
        return 'needs "prompt" (text) or "messages" (a list), and not both'
    return "" if line.output_tokens is None or line.output_tokens > 0 else '"output_tokens" must be above 0'


def read_lines(path: str, kind: Any, wrong: Any, what: str) -> list[tuple[int, Any]]:
    """The lines of a JSONL file with their numbers; empty ones are passed over. Raises LoadFailure."""
    decoder, found, complaints = msgspec.json.Decoder(kind), [], []
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    value = decoder.decode(line)
                    complaint = wrong(value)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    complaint = _why(error, line)
                if complaint:
                    complaints.append(f"line {number}: {complaint}")
                else:
                    found.append((number, value))
    except OSError as error:
        raise LoadFailure(f"{path}: the {what} cannot be read ({error.strerror}); check the path") from None
    if complaints:
        more = f"; and {len(complaints) - MOST_SHOWN} more" if len(complaints) > MOST_SHOWN else ""
        raise LoadFailure(f"{path}: wrong {what}: {'; '.join(complaints[:MOST_SHOWN])}{more}")
    if not found:
        raise LoadFailure(f"{path}: no {what} in it; it needs one JSON object a line")
    return found


def _why(error: Exception, line: bytes) -> str:
    if isinstance(error, msgspec.ValidationError):
        return str(error)
    shown = line.strip()[:40].decode(errors="replace")
    return f"is not JSON ({shown!r}); it needs one JSON object a line"
