"""Tokens of issuers: whose are taken, and what every kind of forgery gets."""

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from vitalis_serve import tokens
from vitalis_serve.errors import ServeError
from vitalis_serve.tokens import ASK_AGAIN_SECONDS, MAX_TOKEN_BYTES, Issuer, Memory, Tokens, claim, public_key, shown

from tests.support.issuer import claims, jwk, private_key, sign

NOW = 1_800_000_000.0
HERE = "https://login.example.org"
KEYS = (jwk("ES256", "one"), jwk("RS256", "rsa", alg="RS256"), jwk("EdDSA", "ed", use="sig"))
SITE = Issuer("site", HERE, ("vitalis-serve", "other"), ("RS256", "ES256", "EdDSA"), KEYS, 30)


def read(issuer: Issuer, said: dict[str, Any]) -> str:
    return f"{issuer.name}:{said['tenant']}"


def digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


class Site:
    """Tokens as a process has them, and what it asked for."""

    def __init__(self, *issuers: Issuer, size: int = 100) -> None:
        self.asked: list[str] = []
        self.memory: Memory[str] = Memory(self.asked.append, size)
        self.trust(*(issuers or (SITE,)))

    def trust(self, *issuers: Issuer) -> None:
        self.tokens = Tokens(issuers, self.memory, read)

    def verify(self, token: bytes, now: float = NOW) -> tokens.Verified[str]:
        return self.tokens.verify(token, digest(token), now)

    def refusal(self, token: bytes, now: float = NOW) -> str:
        """The sentence; of nothing else than invalid_token, and never with the token in it."""
        with pytest.raises(ServeError) as caught:
            self.verify(token, now)
        assert (caught.value.code, caught.value.status) == ("invalid_token", 401)
        assert not any(len(part) > 8 and part.decode("latin-1") in caught.value.message for part in token.split(b"."))
        assert len(self.memory) == 0
        return caught.value.message


def good(**more: Any) -> dict[str, Any]:
    return claims(HERE, NOW, **more)


def part(value: Any) -> bytes:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def forged(head: Any, said: Any, signature: bytes = b"x" * 64) -> bytes:
    return b".".join((part(head), part(said), part(signature)))


@pytest.mark.parametrize(("algorithm", "kid"), [("ES256", "one"), ("RS256", "rsa"), ("EdDSA", "ed")])
def test_a_token_of_each_algorithm_is_taken(algorithm: str, kid: str) -> None:
    verified = Site().verify(sign(good(), algorithm, kid=kid))
    assert verified == ("site:acme", NOW + 330)


@pytest.mark.parametrize("audience", ["vitalis-serve", ["x", "other"]])
def test_one_of_our_audiences_is_enough(audience: Any) -> None:
    assert Site().verify(sign(good(aud=audience))).meaning == "site:acme"


@pytest.mark.parametrize(("more", "sentence"), [
    ({"aud": "somebody-else"}, "for somebody else"),
    ({"aud": None}, "for somebody else"),
    ({"aud": []}, "for somebody else"),
    ({"aud": {"vitalis-serve": 1}}, "for somebody else"),
    ({"aud": ["vitalis-serve-2", 7]}, "for somebody else"),
    ({"iss": "https://evil.example"}, "issuer"),
    ({"iss": HERE + "/"}, "issuer"),
    ({"iss": [HERE]}, "issuer"),
    ({"iss": None}, "issuer"),
    ({"exp": NOW - 30}, "has expired"),
    ({"exp": None}, "no `exp`"),
    ({"exp": True}, "no `exp`"),
    ({"exp": 10**400}, "no `exp`"),
    ({"iat": None}, "no `iat`"),
    ({"iat": NOW + 31}, "in the future"),
    ({"nbf": NOW + 31}, "not valid yet"),
])  # fmt: skip
def test_a_signed_token_is_refused_for_what_it_says(more: dict[str, Any], sentence: str) -> None:
    assert sentence in Site().refusal(sign(good(**more)))


@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
def test_times_that_are_text_are_no_times(name: str) -> None:
    assert f"no `{name}`" in Site().refusal(sign(good() | {name: str(int(NOW + 20))}))


def test_leeway_goes_both_ways() -> None:
    site = Site()
    assert site.verify(sign(good(exp=NOW - 29, iat=NOW + 30, nbf=NOW + 30))).until == NOW + 1


def test_none_is_no_algorithm() -> None:
    for name in ("none", "None", "NONE", ""):
        assert "algorithm" in Site().refusal(forged({"alg": name, "kid": "one"}, good()))
    assert "not a JWT" in Site().refusal(forged({"alg": "none", "kid": "one"}, good(), b""))


@pytest.mark.parametrize("secret", ["pem", "jwk"])
def test_a_public_key_is_no_secret(secret: str) -> None:
    """HS256 with what everybody can fetch, in whatever form."""
    key = private_key("RS256").public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    known = key.public_bytes(serialization.Encoding.PEM, form) if secret == "pem" else json.dumps(KEYS[1]).encode()
    signed = part({"alg": "HS256", "kid": "rsa"}) + b"." + part(good())
    token = signed + b"." + part(hmac.digest(known, signed, "sha256"))
    assert "algorithm that is not allowed" in Site().refusal(token)
    # Not even where an issuer's configuration were to name it: there is no key for it.
    careless = Site(Issuer("site", HERE, ("vitalis-serve",), ("RS256", "HS256"), KEYS))
    assert "algorithm that is not allowed" in careless.refusal(token)


def test_an_algorithm_must_be_that_of_the_key() -> None:
    site = Site()
    assert "not that of the key" in site.refusal(forged({"alg": "RS256", "kid": "one"}, good()))
    assert "not that of the key" in site.refusal(forged({"alg": "ES256", "kid": "rsa"}, good()))
    for pinned in (("ES256",), ("EdDSA", "ES256")):
        narrow = Site(Issuer("site", HERE, ("vitalis-serve",), pinned, KEYS))
        assert "algorithm that is not allowed" in narrow.refusal(sign(good(), "RS256", kid="rsa"))


def test_each_issuer_has_its_own_algorithms_and_keys() -> None:
    there = "https://other.example.org"
    other = Issuer("other", there, ("vitalis-serve",), ("EdDSA",), (jwk("EdDSA", "one", 1),))
    site = Site(SITE, other)
    said = claims(there, NOW)
    assert site.verify(sign(said, "EdDSA", number=1)).meaning == "other:acme"
    site.memory = Memory(site.asked.append)
    site.trust(SITE, other)
    assert "not allowed for its issuer" in site.refusal(sign(said, "ES256"))
    assert "signature" in site.refusal(sign(said, "EdDSA", kid="one"))  # signed with the first issuer's key


def test_a_changed_byte_is_seen() -> None:
    site, token = Site(), sign(good())
    head, said, signature = token.split(b".")
    other = part(good(tenant="globex"))
    assert "signature" in site.refusal(b".".join((head, other, signature)))
    for wrong in (b"AAAA", signature[:-4], signature + b"AAAA", part(b"\x00" * 64)):
        assert "signature" in site.refusal(b".".join((head, said, wrong)))


@pytest.mark.parametrize("head", [
    {"jku": "https://evil.example/keys"}, {"x5u": "https://evil.example/cert"}, {"jwk": jwk("ES256", "one", 7)},
    {"x5c": ["MIIB"]},
])  # fmt: skip
def test_keys_that_a_token_brings_along_are_not_looked_at(head: dict[str, Any]) -> None:
    site = Site()
    assert "signature" in site.refusal(sign(good(), number=7, head=head))
    assert "has not published" in site.refusal(sign(good(), number=7, kid="evil", head=head))
    assert site.verify(sign(good(), head=head)).meaning == "site:acme"  # not understood is not forbidden


@pytest.mark.parametrize("head", [
    {"crit": ["exp"]}, {"crit": ["b64"], "b64": False}, {"crit": []}, {"crit": "exp"}, {"b64": False}, {"b64": True},
])  # fmt: skip
def test_critical_extensions_are_refused(head: dict[str, Any]) -> None:
    assert "extension" in Site().refusal(forged({"alg": "ES256", "kid": "one", **head}, good()))


@pytest.mark.parametrize("token", [
    b"", b"..", b"a.b", b"a.b.c.d", b"eyJ.eyJ.eyJ", b"e30..e30", b"e30.e30.", b"\x00.\x00.\x00", b"e30=.e30.AAAA",
    b"e30.e30.AA AA", b"\xff\xfe.e30.AAAA", part([]) + b".e30.AAAA",
    part({"alg": "ES256"}) + b"." + part([]) + b".AAAA",
    part(b'{"alg":"ES256"}\xff') + b".e30.AAAA", part(b"[" * 5000) + b".e30.AAAA", part(b'{"a":' * 1000) + b".e30.AAAA",
    part(b'{"alg":NaN}') + b".e30.AAAA", part('{"alg":"ES256"}'.encode("utf-16")) + b".e30.AAAA",
])  # fmt: skip
def test_what_is_no_jwt_is_said_to_be_none(token: bytes) -> None:
    assert "not a JWT" in Site().refusal(token)


@pytest.mark.parametrize(("head", "said"), [
    (b'{"alg":"none","alg":"ES256","kid":"one"}', part(good())),
    (b'{"alg":"ES256","kid":"one"}', part(json.dumps(good())[:-1].encode() + b',"tenant":"globex"}')),
    (b'{"alg":"ES256","kid":"one"}', part(json.dumps(good())[:-1].encode() + b',"aud":"x"}')),
    (b'{"alg":"ES256","kid":"one"}', part(json.dumps(good())[:-1].encode() + b',"x":{"a":1,"a":2}}')),
])  # fmt: skip
def test_nothing_is_said_twice(head: bytes, said: bytes) -> None:
    """Two readers could take different ones of the two."""
    assert "twice" in Site().refusal(b".".join((part(head), said, b"AAAA")))


def test_a_token_has_its_size() -> None:
    site = Site()
    token = sign(good(pad="x" * MAX_TOKEN_BYTES))
    assert "larger than 8192 bytes" in site.refusal(token)
    room = MAX_TOKEN_BYTES * 3 // 4 - 400
    assert site.verify(sign(good(pad="x" * room))).meaning == "site:acme"


def test_an_unknown_key_is_asked_for_and_not_by_everybody() -> None:
    site = Site()
    for n in range(200):
        assert "has not published" in site.refusal(sign(good(jti=str(n)), kid=f"new-{n}"), NOW + n * 0.001)
    assert site.asked == ["site"]
    site.refusal(sign(good(), kid="new"), NOW + ASK_AGAIN_SECONDS)
    assert site.asked == ["site", "site"]
    site.refusal(sign(good(), kid="new"), NOW - 1000)  # a clock put back does not silence it
    assert len(site.asked) == 3


@pytest.mark.parametrize("kid", ["one\x00", "ONE", "../one", "", "ed\ud800"])
def test_a_key_id_is_what_it_is(kid: str) -> None:
    assert "has not published" in Site().refusal(forged({"alg": "ES256", "kid": kid}, good()))
    assert "not text" in Site().refusal(forged({"alg": "ES256", "kid": 1}, good()))


def test_a_stranger_cannot_have_keys_asked_for() -> None:
    site = Site()
    for token in (sign(good(iss="https://x.example"), kid="new"), forged({"alg": "HS256", "kid": "new"}, good())):
        site.refusal(token)
    assert not site.asked


def test_without_a_key_id_there_must_be_one_key_of_the_kind() -> None:
    site = Site()
    assert site.verify(sign(good(), kid=None)).meaning == "site:acme"
    twins = Site(Issuer("site", HERE, ("vitalis-serve",), ("ES256",), (KEYS[0], jwk("ES256", "two", 1))))
    assert "names no key" in twins.refusal(sign(good(), kid=None))
    empty = Site(Issuer("site", HERE, ("vitalis-serve",), ("ES256",)))
    assert "not known here yet" in empty.refusal(sign(good(), kid=None))
    assert empty.asked == ["site"]


# What is remembered


def test_a_verified_token_is_known_until_it_ends() -> None:
    site, token = Site(), sign(good())
    first = site.verify(token)
    assert site.verify(token, NOW + 329.9) is first
    with pytest.raises(ServeError, match="has expired"):
        site.verify(token, NOW + 330)
    assert len(site.memory) == 0


def test_memory_is_bounded_and_keeps_what_is_used() -> None:
    site = Site(size=50)
    kept = sign(good())
    first = site.verify(kept)
    for n in range(200):
        site.verify(sign(good(jti=str(n)), "EdDSA", kid="ed"))
        assert site.verify(kept) is first
    assert len(site.memory) == 50


def test_it_outlives_a_new_snapshot_where_issuer_and_key_are_the_same() -> None:
    site, token = Site(), sign(good())
    first = site.verify(token)
    more = (*KEYS, jwk("ES256", "two", 1))
    site.trust(Issuer("site", HERE, ("vitalis-serve", "other"), ("RS256", "ES256", "EdDSA"), more, 30))
    assert site.verify(token) is first
    site.trust(Issuer("site", HERE, ("other",), ("RS256", "ES256", "EdDSA"), more, 30))
    with pytest.raises(ServeError, match="for somebody else"):
        site.verify(token)


def test_a_key_that_is_gone_takes_its_tokens_along() -> None:
    site, token = Site(), sign(good())
    site.verify(token)
    site.trust(Issuer("site", HERE, SITE.audience, SITE.algorithms, KEYS[1:], 30))
    assert "has not published" in site.refusal(token)
    site.trust(Issuer("site", HERE, SITE.audience, SITE.algorithms, (jwk("ES256", "one", 1),), 30))
    assert "signature" in site.refusal(token)  # another key of the same name
    site.trust(SITE)
    assert site.verify(token).meaning == "site:acme"


# Keys


@pytest.mark.parametrize("published", [
    None, [], "x", {}, {"kty": "oct", "k": "c2VjcmV0"}, {"kty": ["RSA"]}, jwk("ES256") | {"use": "enc"},
    jwk("ES256") | {"crv": "P-521"}, jwk("ES256") | {"crv": "secp256k1"}, jwk("ES256") | {"x": "AAAA"},
    jwk("ES256") | {"y": 7}, jwk("EdDSA") | {"crv": "X25519"}, jwk("EdDSA") | {"x": "AAAA"}, jwk("ES256") | {"kid": 7},
    jwk("RS256") | {"alg": "RS1"}, jwk("RS256") | {"alg": "HS256"}, jwk("RS256") | {"key_ops": ["encrypt"]},
    jwk("RS256") | {"n": "A" * 5000}, jwk("RS256") | {"e": ""},
    RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 1024).public_key(), as_dict=True),
])  # fmt: skip
def test_keys_that_cannot_verify_are_left_out(published: Any) -> None:
    assert public_key(published) is None


def test_of_a_private_key_only_the_public_half_is_kept() -> None:
    whole = RSAAlgorithm.to_jwk(private_key("RS256"), as_dict=True)
    found = public_key(whole | {"kid": "rsa", "key_ops": ["sign", "verify"]})
    assert found is not None
    assert found.keys() == {"kty", "n", "e", "kid"}


# Claims


def test_claims_are_found_inside_others() -> None:
    said = {"a": {"b": {"c": 1}}, "https://x.example/t": 2, "d": "text"}
    wanted = {"a.b.c": 1, "https://x.example/t": 2, "a.x": None, "d.e": None, "": None}
    assert {name: claim(said, name) for name in wanted} == wanted


@pytest.mark.parametrize(("value", "expected"), [
    ("acme", "acme"), ("a" * 65, "…"), ("ac\nme", "…"), ("\x00", "…"), ("\ud800", "…"), ("a`b", "…"), ("ü", "…"),
])  # fmt: skip
def test_what_strangers_write_is_shown_with_care(value: str, expected: str) -> None:
    assert shown(value) == expected
