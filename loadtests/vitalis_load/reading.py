"""A run folder as data. What a killed run left half written is left out and counted, never a reason to show nothing."""

from pathlib import Path
from typing import TypeVar

import msgspec

from vitalis_load.errors import Exit, LoadFailure
from vitalis_load.records import ClientSecond, GapsOfSecond, Record, RepeatEnd, RunInfo, Sample

T = TypeVar("T")


class RepeatData(msgspec.Struct, kw_only=True):
    """One repeat. Everything in it in the order in which it was written."""

    number: int  # from 1
    records: list[Record]
    gaps: list[GapsOfSecond]
    client: list[ClientSecond]
    samples: list[Sample]
    end: RepeatEnd | None = None  # None: killed before it could write its end
    unread: int = 0  # lines that are no whole line of their kind

    @property
    def last_moment(self) -> float:
        """Seconds since the repeat's begin at which anything was last heard of."""
        return max(
            (
                *(record.ended for record in self.records[-1:]),
                *(float(second.at + 1) for second in self.client[-1:]),
                *(sample.at for sample in self.samples[-1:]),
            ),
            default=0.0,
        )


class Repeats(msgspec.Struct, kw_only=True):
    """A run folder's content."""

    folder: Path
    info: RunInfo
    repeats: list[RepeatData]


def read(run: Path) -> Repeats:
    """The run in the folder `run`. Raises LoadFailure where it is none."""
    information = run / "run.json"
    try:
        info = msgspec.json.decode(information.read_bytes(), type=RunInfo)
    except FileNotFoundError:
        raise LoadFailure(f"{run} is not the folder of a run: it has no run.json") from None
    except OSError as error:
        raise LoadFailure(f"{information} cannot be read: {error.strerror}", Exit.BAD_INPUT) from None
    except msgspec.DecodeError as error:
        raise LoadFailure(f"{information} is not what a run writes there: {error}") from None
    if not info.schema.startswith("vitalis-load/1"):
        raise LoadFailure(f"{information} is of the schema {info.schema}; this program reads vitalis-load/1")
    folders = sorted(run.glob("repeat-*"), key=lambda folder: (len(folder.name), folder.name))
    repeats = [_repeat(folder) for folder in folders if folder.is_dir()]
    return Repeats(folder=run, info=info, repeats=repeats)


def _repeat(folder: Path) -> RepeatData:
    records, torn = _lines(folder / "requests.jsonl", Record)
    gaps, torn_gaps = _lines(folder / "gaps.jsonl", GapsOfSecond)
    client, torn_client = _lines(folder / "client.jsonl", ClientSecond)
    samples, torn_samples = _lines(folder / "samples.jsonl", Sample)
    end = None
    try:
        end = msgspec.json.decode((folder / "end.json").read_bytes(), type=RepeatEnd)
    except FileNotFoundError:
        pass
    except (OSError, msgspec.DecodeError):
        torn += 1
    number = folder.name.removeprefix("repeat-")
    return RepeatData(
        number=int(number) if number.isdigit() else 0,
        records=records,
        gaps=gaps,
        client=client,
        samples=samples,
        end=end,
        unread=torn + torn_gaps + torn_client + torn_samples,
    )


def _lines(path: Path, kind: type[T]) -> tuple[list[T], int]:
    """What the file's lines hold, and how many of them hold nothing of that kind. No file: nothing."""
    found: list[T] = []
    unread = 0
    decoder = msgspec.json.Decoder(kind)
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    found.append(decoder.decode(line))
                except (msgspec.DecodeError, UnicodeDecodeError):
                    unread += 1
    except FileNotFoundError:
        pass
    except OSError as error:
        raise LoadFailure(f"{path} cannot be read: {error.strerror}") from None
    return found, unread
