"""What the rows of a file come to: held against what the store holds, and against each other. Pure.

Every row that cannot be imported is named with its place; where there is one, none is imported.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Final

from vitalis_serve.control import schemas
from vitalis_serve.control.import_file import Document, KeyRow, LimitsRow, Place, Problem, Refusal, TenantRow
from vitalis_serve.store.rates import Rates, Subject
from vitalis_serve.store.records import ACTIVE, Key, Tenant, nearest
from vitalis_serve.store.secrets import NewKey, new_key

_DAY: Final = 86_400


@dataclass(frozen=True, slots=True)
class Present:
    """What the rows are held against. `keys`: all there are, revoked ones among them."""

    tenants: Mapping[str, str]  # status by name
    keys: tuple[Key, ...]
    rates: Set[Subject]
    routes: Set[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be added. secrets: whole keys that were made, each with its row."""

    tenants: list[Tenant] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    rates: dict[Subject, Rates] = field(default_factory=dict)
    secrets: list[tuple[Key, str]] = field(default_factory=list)
    skipped: int = 0


def plan(
    document: Document,
    present: Present,
    now: int,
    *,
    skip_existing: bool = False,
    make: Callable[[], NewKey] = new_key,
) -> Plan:
    """What the rows come to. Raises Refusal with everything that is wrong with any of them."""
    planning = _Planning(present, document.named, now, make)
    for place, tenant in document.tenants:
        planning.tenant(place, tenant)
    for place, key in document.keys:
        planning.key(place, key)
    for place, limits in document.limits:
        planning.limits(place, limits)
    problems = [*document.problems, *planning.problems, *([] if skip_existing else planning.there)]
    if problems:
        raise Refusal(problems, document.rows)
    made = planning.plan
    return Plan(made.tenants, made.keys, made.rates, made.secrets, len(planning.there))


class _Planning:
    """One run of `plan`."""

    def __init__(self, present: Present, named: Set[str], now: int, make: Callable[[], NewKey]) -> None:
        self.plan = Plan()
        self.problems: list[Problem] = []
        self.there: list[Problem] = []
        self._present = present
        self._named = named
        self._now = now
        self._make = make
        self._places: dict[tuple[str, ...], Place] = {}  # of what is in the file
        self._live = {(key.tenant, key.name): key for key in present.keys if key.revoked_at is None}
        self._digests = {digest: key for key in present.keys for digest in (key.digest, key.old_digest) if digest}
        self._ids = {key.id: key for key in present.keys}

    def tenant(self, place: Place, row: TenantRow) -> None:
        if self._twice(place, "tenant", row.name):
            return
        status = self._present.tenants.get(row.name)
        if status == ACTIVE:
            self.there.append(Problem(place, f"tenant {row.name!r} already exists", there=True))
        elif status is not None:
            self._wrong(place, f"tenant {row.name!r} existed and was revoked; names are not given twice")
        else:
            self.plan.tenants.append(Tenant(row.name, self._now, notes=row.notes))
            self._limit(place, Subject("tenant", row.name), row.limits)

    def key(self, place: Place, row: KeyRow) -> None:
        whole = self._tenant_is_there(place, row.tenant)
        known = self._present.routes | {"*"}
        for name in row.routes:
            if name not in known:
                whole = self._wrong(place, f"routes: there is no route {name!r}{nearest(name, known)}")
        if row.id is not None and row.digest is None:
            whole = self._wrong(place, "id: give the digest with it; of a key that is made here the id is made too")
        twice = [self._twice(place, "key", row.tenant, row.name)]
        twice += [self._twice(place, word, value) for word, value in (("digest", row.digest), ("id", row.id)) if value]
        if any(twice) or not whole:
            return
        before = self._live.get((row.tenant, row.name))
        if before is not None:
            sentence = f"key {row.name!r} of tenant {row.tenant!r} already exists (id {before.id})"
            self.there.append(Problem(place, sentence, there=True))
        elif row.digest is not None and (other := self._digests.get(row.digest)) is not None:
            self._wrong(place, f"digest: it is that of key {other.id} of tenant {other.tenant!r}; make another secret")
        elif row.id is not None and (other := self._ids.get(row.id)) is not None:
            self._wrong(place, f"id: key {other.id} of tenant {other.tenant!r} has it already")
        else:
            self._add_key(place, row)

    def limits(self, place: Place, row: LimitsRow) -> None:
        subject = Subject(row.kind, row.name)
        if not row.given():
            self._wrong(place, f"give at least one of {', '.join(schemas.Rates.model_fields)}")
        elif not self._limited_is_there(place, subject):
            return
        elif subject in self._present.rates:
            sentence = f"limits of {row.kind} {row.name!r} already exist"
            self.there.append(Problem(place, sentence, there=True))
        else:
            self._limit(place, subject, row)

    def _add_key(self, place: Place, row: KeyRow) -> None:
        made = self._make()
        key = Key(
            id=row.id or made.id,
            tenant=row.tenant,
            digest=row.digest or made.digest,
            created_at=self._now,
            name=row.name,
            class_=row.class_,
            scopes=row.scopes,
            routes=row.routes,
            notes=row.notes,
            expires_at=None if row.expires_in_days is None else self._now + row.expires_in_days * _DAY,
        )
        self.plan.keys.append(key)
        if row.digest is None:
            self.plan.secrets.append((key, made.key))
        self._limit(place, Subject("key", key.id), row.limits)

    def _limit(self, place: Place, subject: Subject, rates: schemas.Rates) -> None:
        if rates.given() and not self._twice(place, "limits of", *subject):
            self.plan.rates[subject] = Rates(**rates.given())

    def _limited_is_there(self, place: Place, subject: Subject) -> bool:
        if subject.kind == "tenant":
            return self._tenant_is_there(place, subject.name)
        if subject.kind == "route":
            known: Set[str] = self._present.routes
        else:
            known = {key.id for key in (*self._live.values(), *self.plan.keys)}
        if subject.name in known:
            return True
        return self._wrong(place, f"there is no {subject.kind} {subject.name!r}{nearest(subject.name, known)}")

    def _tenant_is_there(self, place: Place, name: str) -> bool:
        status = self._present.tenants.get(name)
        if status == ACTIVE or name in self._named or ("tenant", name) in self._places:
            return True
        if status is not None:
            return self._wrong(place, f"tenant {name!r} was revoked: it gets nothing new")
        known = {*self._present.tenants, *(words[1] for words in self._places if words[0] == "tenant")}
        return self._wrong(place, f"there is no tenant {name!r}{nearest(name, known)}")

    def _twice(self, place: Place, *what: str) -> bool:
        first = self._places.setdefault(what, place)
        if first != place:
            self._wrong(place, f"{what[0]} {'/'.join(what[1:])} stands on {first} already")
        return first != place

    def _wrong(self, place: Place, sentence: str) -> bool:
        self.problems.append(Problem(place, sentence))
        return False
