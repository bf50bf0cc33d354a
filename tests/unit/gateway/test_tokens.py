"""What a token opens on the data plane."""

import dataclasses
from typing import Any

import msgspec
import pytest
from vitalis_serve.errors import ServeError
from vitalis_serve.gateway.keys import KeyTable, Route, Snapshot, Tenant
from vitalis_serve.gateway.tokens import Grant, grant
from vitalis_serve.tokens import Issuer, Memory

from tests.support.issuer import claims, jwk, sign

NOW = 1_800_000_000.0
HERE = "https://login.example.org"
SITE = Issuer("site", HERE, ("vitalis-serve",), ("ES256",), (jwk("ES256", "one"),), 30)
MAPPED = msgspec.structs.replace(
    SITE,
    tenant_claim="realm.team",
    tenants={"blue team": "acme"},
    class_claim="urgency",
    classes={"now": "emergency"},
    class_="batch",
    scopes_claim="scope",
    scopes={"llm": "inference", "trace": "debug"},
    routes=("chat",),
)


def meaning(issuer: Issuer, **said: Any) -> Grant:
    return grant(issuer, said)


def test_without_a_mapping_the_claim_is_the_tenant() -> None:
    assert meaning(SITE, tenant="acme") == Grant("site", "acme", "standard", ("inference",), ("*",))


def test_claims_are_mapped() -> None:
    said = {"realm": {"team": "blue team"}, "urgency": "now", "scope": "openid llm trace llm"}
    assert grant(MAPPED, said) == Grant("site", "acme", "emergency", ("debug", "inference"), ("chat",))
    assert grant(MAPPED, said | {"scope": ["llm"]}).scopes == ("inference",)
    assert grant(MAPPED, said | {"urgency": "emergency"}).class_ == "batch"  # our own words are none of its
    assert grant(MAPPED, {"realm": {"team": "blue team"}}) == Grant("site", "acme", "batch", (), ("chat",))


@pytest.mark.parametrize(("more", "sentence"), [
    ({"realm": None}, "names no tenant: the claim `realm.team` is missing"),
    ({"realm": "blue team"}, "names no tenant"),
    ({"realm": {"team": ""}}, "names no tenant"),
    ({"realm": {"team": ["blue team"]}}, "claim `realm.team` must be text"),
    ({"realm": {"team": 7}}, "claim `realm.team` must be text"),
    ({"realm": {"team": "red team"}}, "`red team`, is no tenant here"),
    ({"realm": {"team": "red\nteam"}}, "`…`, is no tenant here"),
    ({"urgency": ["now"]}, "claim `urgency` must be text"),
    ({"urgency": {"now": True}}, "claim `urgency` must be text"),
    ({"scope": {"llm": True}}, "claim `scope` must be text or a list of text"),
    ({"scope": ["llm", 7]}, "claim `scope` must be text or a list of text"),
])  # fmt: skip
def test_claims_of_another_kind_are_refused(more: dict[str, Any], sentence: str) -> None:
    said = {"realm": {"team": "blue team"}, "urgency": "now", "scope": "llm"} | more
    with pytest.raises(ServeError) as caught:
        grant(MAPPED, said)
    assert caught.value.code == "invalid_token"
    assert sentence in caught.value.message


# Beside keys


@dataclasses.dataclass
class Tables:
    """One worker's key tables, one after the other."""

    memory: Memory[Grant] = dataclasses.field(default_factory=Memory)
    version: int = 0

    def table(self, *tenants: Tenant, issuer: Issuer = SITE) -> KeyTable:
        self.version += 1
        routes = (Route("chat", "m"), Route("reason", "m"))
        return KeyTable(Snapshot(self.version, routes=routes, tenants=tenants, issuers=(issuer,)), self.memory)


def token(**more: Any) -> bytes:
    return sign(claims(HERE, NOW, **more))


def test_tokens_that_say_the_same_have_one_key() -> None:
    table = Tables().table(Tenant("acme"), Tenant("globex"))
    one, until = table.identify(token(), NOW)
    assert (one.tenant, one.scopes, one.class_, one.expires_at, until) == (
        "acme", ("inference",), "standard", None, NOW + 330,
    )  # fmt: skip
    assert one.id.startswith("oidc:site:")
    assert table.identify(token(sub="another"), NOW)[0] is one
    other, _ = table.identify(token(tenant="globex"), NOW)
    assert other.id != one.id
    assert table.use(one, "chat").sharers == b"acme"
    assert table.use(other, "chat").sharers == b"globex"
    assert table.use(one, "chat") is table.use(one, "chat")


def test_a_key_s_name_is_the_same_in_every_process_and_short() -> None:
    names = {Tables().table(Tenant("acme")).identify(token(), NOW)[0].id for _ in range(2)}
    assert len(names) == 1
    assert len(names.pop()) == len("oidc:site:") + 12


def test_the_tenant_is_looked_up_each_time() -> None:
    tables, mine = Tables(), token()
    assert tables.table(Tenant("acme")).identify(mine, NOW)[0].tenant == "acme"
    for tenants, sentence in (((), "does not exist"), ((Tenant("acme", "disabled"),), "was revoked")):
        with pytest.raises(ServeError, match=f"tenant, `acme`, {sentence}") as caught:
            tables.table(*tenants).identify(mine, NOW)
        assert caught.value.code == "invalid_token"
    assert len(tables.memory) == 1  # its signature was looked at once
    assert tables.table(Tenant("acme")).identify(mine, NOW)[0].tenant == "acme"


def test_what_looks_like_a_token_without_issuers_is_a_key_not_known() -> None:
    table = KeyTable(Snapshot(1, tenants=(Tenant("acme"),)))
    with pytest.raises(ServeError) as caught:
        table.identify(token(), NOW)
    assert caught.value.code == "invalid_key"


@pytest.mark.parametrize("other", [b"vts_x_y", b"eyJ.x", b"a.b.c", b"eyJhbGciOiJub25lIn0"])
def test_other_credentials_are_never_taken_for_tokens(other: bytes) -> None:
    with pytest.raises(ServeError) as caught:
        Tables().table().identify(other, NOW)
    assert caught.value.code == "invalid_key"


def test_a_flood_of_tenants_that_do_not_exist_leaves_no_keys() -> None:
    tables = Tables(Memory(size=20))
    table = tables.table(Tenant("acme"))
    for n in range(100):
        with pytest.raises(ServeError, match="does not exist"):
            table.identify(token(tenant=f"t{n}"), NOW)
    assert len(tables.memory) == 20
    assert table.uses == {}
