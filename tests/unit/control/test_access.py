"""Control's token and what a peer that guesses gets."""

import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vitalis_serve.control.access import ROLES, Access, Failures, Principal, control_token, needed, permit
from vitalis_serve.errors import ServeError, StartError
from vitalis_serve.store.records import ACTIVE, DISABLED, Contents, Key, Tenant
from vitalis_serve.store.secrets import NewKey, new_key
from vitalis_serve.tokens import Issuer

from tests.support.issuer import claims, jwk, sign

NOW = 1_800_000_000.0
HERE = "https://login.example.org"
SITE = Issuer(
    "site", HERE, ("vitalis-serve",), ("ES256",), (jwk("ES256", "one"),),
    roles_claim="realm.roles", roles={"watch": "viewer", "ops": "operator", "root": "admin"},
)  # fmt: skip


def code(access: Access, header: bytes | None, peer: str = "p", now: float = 0) -> str:
    try:
        access.check(header, peer, now, wall=0)
    except ServeError as error:
        return error.code
    return "open"


def test_token_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "control.token"
    token = control_token(path)
    assert token.startswith("vtc_")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert control_token(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "vtc_short", "secret" * 10])
def test_token_file_that_is_not_ours_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t").write_text(content)
    with pytest.raises(StartError, match="not one of ours"):
        control_token(tmp_path / "t")


def test_token_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="neither read nor made"):
        control_token(tmp_path / "gone" / "t")


@pytest.mark.parametrize(
    ("header", "outcome"),
    [
        (b"Bearer vtc_right", "open"),
        (b"bearer  vtc_right ", "open"),
        (b"Bearer vtc_wrong", "invalid_key"),
        (b"Bearer vtc_right2", "invalid_key"),
        (b"Basic vtc_right", "invalid_key"),
        (b"vtc_right", "missing_key"),
        (b"Bearer \xff\xfe", "invalid_key"),
        (b"Bearer", "missing_key"),
        (b"", "missing_key"),
        (None, "missing_key"),
    ],
)
def test_only_the_right_token_opens(header: bytes | None, outcome: str) -> None:
    assert code(Access("vtc_right", Failures()), header) == outcome


def test_failures_are_limited_and_come_back_with_time() -> None:
    access = Access("vtc_right", Failures(burst=3, per_second=1))
    assert [code(access, b"Bearer x") for _ in range(4)] == ["invalid_key"] * 3 + ["authentication_failures"]
    assert code(access, b"Bearer x", peer="other") == "invalid_key"
    assert code(access, b"Bearer vtc_right") == "open"
    assert code(access, b"Bearer x", now=1.1) == "invalid_key"
    assert code(access, b"Bearer x", now=1.2) == "authentication_failures"


def test_memory_of_failures_is_bounded() -> None:
    failures = Failures(peers=100)
    for n in range(5000):
        failures.count(f"peer-{n}", 0)
    assert len(failures) == 100


# Keys


def stored(made: NewKey, **fields: Any) -> Key:
    return Key(made.id, "acme", made.digest, 0, **fields)


def who(access: Access, token: str | bytes, wall: float = NOW) -> Principal:
    raw = token if isinstance(token, bytes) else token.encode()
    return access.check(b"Bearer " + raw, "p", 0, wall)


@pytest.mark.parametrize(
    ("scopes", "role"),
    [
        (("admin",), "admin"),
        (("metrics", "admin"), "admin"),
        (("inference", "metrics"), "metrics"),
        (("inference", "debug"), None),
    ],
)
def test_a_key_has_the_role_of_its_scopes(scopes: tuple[str, ...], role: str | None) -> None:
    access, made = Access("vtc_right", Failures()), new_key()
    access.know(Contents((), (stored(made, scopes=scopes),)))
    assert who(access, made.key) == (f"key:{made.id}", role)
    assert code(access, f"Basic {made.key}".encode()) == "invalid_key"


def test_a_key_opens_until_it_ends_and_its_old_secret_until_then() -> None:
    access, made, old = Access("vtc_right", Failures()), new_key(), new_key()
    key = stored(made, scopes=("admin",), expires_at=int(NOW) + 100, old_digest=old.digest, old_until=int(NOW) + 10)
    access.know(Contents((), (key,)))
    assert who(access, made.key, NOW + 99).name == who(access, old.key, NOW + 9).name == f"key:{made.id}"
    for secret, until in ((made.key, NOW + 100), (old.key, NOW + 10)):
        with pytest.raises(ServeError) as caught:
            who(access, secret, until)
        assert caught.value.code == "expired_key"
    access.know(Contents((), ()))
    assert code(access, f"Bearer {made.key}".encode()) == "invalid_key"


# Tokens


def test_a_token_has_the_highest_role_of_its_claims() -> None:
    access = Access("vtc_right", Failures())
    access.trust([SITE])
    for words, role in ((["watch", "root", "ops", "other"], "admin"), ("ops watch", "operator"), ([], None)):
        said = claims(HERE, NOW, realm={"roles": words}, sub="ann@example.org")
        assert who(access, sign(said)) == ("oidc:site:ann@example.org", role)
    access.trust([])
    assert code(access, b"Bearer " + sign(claims(HERE, NOW))) == "invalid_key"


def test_an_issuer_without_roles_gives_none() -> None:
    access = Access("vtc_right", Failures())
    access.trust([Issuer("site", HERE, ("vitalis-serve",), ("ES256",), SITE.keys)])
    said = claims(HERE, NOW, **{"": ["admin"], "roles": ["admin"]})
    assert who(access, sign(said)).role is None


@pytest.mark.parametrize("sub", ["a" * 65, "a b\nc", "\x00", "ü", "\ud800", "control.token`"])
def test_whoever_it_is_has_a_name_that_fits_the_audit_table(sub: str) -> None:
    access = Access("vtc_right", Failures())
    access.trust([SITE])
    one = who(access, sign(claims(HERE, NOW, sub=sub))).name
    assert one.isascii()
    assert one.isprintable()
    assert len(one) <= 128
    assert one != who(access, sign(claims(HERE, NOW, sub=sub + "x"))).name
    assert one == who(access, sign(claims(HERE, NOW, sub=sub, jti="2"))).name


@pytest.mark.parametrize(
    ("tenants", "claimed", "refused"),
    [
        ({}, "acme", True),
        ({}, "other", False),
        ({}, "nobody", False),
        ({}, "", False),
        ({}, None, False),
        ({"a-team": "acme"}, "a-team", True),
        ({"a-team": "acme"}, "acme", False),  # what the issuer calls so is none of ours
    ],
)
def test_a_token_of_a_revoked_tenant_opens_nothing_from_then_on(
    tenants: dict[str, str], claimed: str | None, refused: bool
) -> None:
    access = Access("vtc_right", Failures())
    access.trust([msgspec.structs.replace(SITE, tenants=tenants)])
    token = sign(claims(HERE, NOW, tenant=claimed, realm={"roles": ["root"]}))
    for status in (ACTIVE, DISABLED, ACTIVE):
        access.know(Contents((Tenant("acme", 1, status), Tenant("other", 1)), ()))
        if refused and status == DISABLED:
            with pytest.raises(ServeError, match="This token's tenant, `acme`, was revoked") as caught:
                who(access, token)
            assert (caught.value.code, caught.value.status) == ("invalid_token", 401)
        else:
            assert who(access, token) == ("oidc:site:someone", "admin")


def test_a_token_whose_tenant_cannot_be_read_is_refused() -> None:
    access = Access("vtc_right", Failures())
    access.trust([SITE])
    with pytest.raises(ServeError, match="claim `tenant` must be text"):
        who(access, sign(claims(HERE, NOW, tenant=["acme"], realm={"roles": ["root"]})))


@pytest.mark.parametrize("sub", [None, "", 7])
def test_a_token_of_nobody_is_refused(sub: object) -> None:
    access = Access("vtc_right", Failures())
    access.trust([SITE])
    with pytest.raises(ServeError, match="sub") as refused:
        who(access, sign(claims(HERE, NOW, sub=sub, realm={"roles": ["root"]})))
    assert refused.value.code == "invalid_token"


def test_bad_tokens_and_old_keys_are_failures_like_any_other() -> None:
    access = Access("vtc_right", Failures(burst=2))
    access.trust([SITE])
    wrong = b"Bearer " + sign(claims(HERE, NOW), number=1)
    assert [code(access, wrong) for _ in range(3)] == ["invalid_token"] * 2 + ["authentication_failures"]
    assert who(access, sign(claims(HERE, NOW, realm={"roles": ["root"]}))).role == "admin"


# What a role may do


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/metrics", "metrics"),
        ("GET", "/health", "viewer"),
        ("GET", "/v1/fleet", "viewer"),
        ("HEAD", "/v1/keys", "viewer"),
        ("GET", "/v1/audit", "admin"),
        ("GET", "/v1/audit/", "admin"),
        ("POST", "/v1/fleet/scale", "operator"),
        ("POST", "/v1/fleet/engine-0/drain", "operator"),
        ("POST", "/v1/explain", "operator"),
        ("POST", "/v1/explained", "admin"),
        ("POST", "/v1/fleet/../keys", "operator"),  # a name of a replica, to the router too
        ("DELETE", "/v1/fleet/engine-0", "admin"),
        ("POST", "/v1/keys", "admin"),
        ("PUT", "/v1/tenants/acme", "admin"),
        ("DELETE", "/v1/keys/x", "admin"),
        ("POST", "/metrics", "admin"),
        ("BREW", "/health", "admin"),
    ],
)
def test_each_request_takes_a_role(method: str, path: str, role: str) -> None:
    assert needed(method, path) == role
    for has in ROLES:
        if ROLES.index(has) >= ROLES.index(role):
            permit(Principal("p", has), method, path)
        else:
            with pytest.raises(ServeError, match=f"needs the role `{role}`; p has the role `{has}`") as caught:
                permit(Principal("p", has), method, path)
            assert (caught.value.code, caught.value.status) == ("scope_missing", 403)
    with pytest.raises(ServeError, match="p has no role here"):
        permit(Principal("p", None), method, path)
