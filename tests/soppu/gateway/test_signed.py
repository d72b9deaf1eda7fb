"""Signed tokens: taken from the one issuer, for this audience, by pinned algorithms, and from nobody else."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu.errors import ConfigError
from soppu.gateway.refusals import Refused
from soppu.gateway.settings import Jwt
from soppu.gateway.signed import SignedTokens
from tests.soppu.gateway.house import house
from tests.soppu.serve.tiny import listening

KEY, OTHER = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
ISSUER, AUDIENCE, KID = "https://issuer.example", "soppu", "one"
PUBLIC = KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


def key_set(*kids: str) -> dict[str, Any]:
    public = json.loads(ECAlgorithm.to_jwk(KEY.public_key()))
    return {"keys": [{**public, "kid": kid, "use": "sig", "alg": "ES256"} for kid in kids]}


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 600, **changes}
    return {name: value for name, value in good.items() if value is not None}


def token(
    key: Any = KEY, algorithm: str = "ES256", headers: dict[str, Any] | None = None, **changes: Any
) -> str:
    return jwt.encode(claims(**changes), key, algorithm, headers={"kid": KID, **(headers or {})})


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def by_hand(header: dict[str, Any], signature: str = "", **changes: Any) -> str:
    return f"{part({'kid': KID, **header})}.{part(claims(**changes))}.{signature}"


def confused() -> str:
    """HS256 with the issuer's public key as the secret: taken by who trusts the token's `alg`."""
    import hashlib
    import hmac

    signed = f"{part({'alg': 'HS256', 'kid': KID})}.{part(claims())}"
    digest = hmac.digest(PUBLIC, signed.encode(), hashlib.sha256)
    return f"{signed}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def swapped() -> str:
    head, _, tail = token().split(".")
    return f"{head}.{part(claims(sub='bob'))}.{tail}"


NOW = int(time.time())
BAD = {
    "alg none": by_hand({"alg": "none"}),
    "alg None": by_hand({"alg": "None"}, "x"),
    "no alg": by_hand({}),
    "HS256 with the public key": confused(),
    "another's key": token(OTHER),
    "a key of another curve": token(ec.generate_private_key(ec.SECP384R1()), "ES384"),
    "an Edwards key": token(ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    "an unknown kid": token(headers={"kid": "two"}),
    "no kid": jwt.encode(claims(), KEY, "ES256"),
    "a kid that is a path": token(headers={"kid": "../../dev/null"}),
    "a kid that is no text": by_hand({"alg": "ES256", "kid": ["one"]}, "x"),
    "a key inside the token": token(
        OTHER, headers={"kid": "x", "jwk": json.loads(ECAlgorithm.to_jwk(OTHER.public_key()))}
    ),
    "an address of keys": token(OTHER, headers={"kid": "x", "jku": "http://127.0.0.1:9/keys"}),
    "a critical header nobody knows": token(headers={"crit": ["exp2"], "exp2": 1}),
    "a changed claim": swapped(),
    "no signature": token().rpartition(".")[0] + ".",
    "a cut signature": token()[:-8],
    "too old": token(exp=NOW - 60, iat=NOW - 600),
    "not yet": token(nbf=NOW + 600),
    "made tomorrow": token(iat=NOW + 86400, exp=NOW + 90000),
    "good for a year": token(exp=NOW + 365 * 86400),
    "without an end": token(exp=None),
    "without a beginning": token(iat=None),
    "an end that is text": by_hand({"alg": "ES256"}, "x", exp="never"),
    "another issuer": token(iss="https://issuer.example.evil"),
    "no issuer": token(iss=None),
    "another audience": token(aud="other"),
    "no audience": token(aud=None),
    "no subject": token(sub=None),
    "a subject that is a number": token(sub=7),
    "an empty subject": token(sub=""),
    "a subject with a control character": token(sub="alice\n"),
    "a subject that is an escaped id": token(sub="alice%40example.com"),
    "a subject in another form of Unicode": token(sub="e\u0301ve"),
    "four parts": token() + ".x",
    "one part": "eyJhbGciOiJub25lIn0",
    "an encrypted one": "a.b.c.d.e",
    "no text": "....",
    "a long one": token(padding="x" * 10_000),
}


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> SignedTokens:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(json.dumps(key_set(KID)))
    return SignedTokens(Jwt(issuer=ISSUER, audience=AUDIENCE, keys=str(path), algorithms=("ES256",)))


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_token_is_nobody_s(signed: SignedTokens, bad: str) -> None:
    with pytest.raises(Refused) as refused:
        signed.user(bad)
    assert refused.value.status == 401


def test_a_good_token_is_its_user_s(signed: SignedTokens) -> None:
    assert signed.user(token()) == "alice"
    assert signed.user(token(aud=["x", AUDIENCE])) == "alice"
    assert signed.user(token(sub="alice@example.com")) == "alice%40example.com"
    assert signed.user(token(sub="Éve")) == "%C3%89ve"
    assert (
        signed.user(token(exp=int(time.time()) - 10, iat=int(time.time()) - 600)) == "alice"
    )  # within the leeway


@pytest.fixture
def issuer() -> Iterator[tuple[str, list[str]]]:
    """An issuer's keys at an address, and who asked for them."""
    asked: list[str] = []

    async def keys(request: Request) -> Response:
        asked.append(request.url.path)
        return JSONResponse(key_set(KID))

    with listening(Starlette(routes=[Route("/keys", keys)])) as url:
        yield f"{url}/keys", asked


def test_keys_are_fetched_once_however_many_unknown_ones_are_named(issuer: tuple[str, list[str]]) -> None:
    url, asked = issuer
    tokens = SignedTokens(Jwt(issuer=ISSUER, audience=AUDIENCE, keys=url, algorithms=("ES256",)))
    assert tokens.user(token()) == "alice"
    for n in range(20):
        with pytest.raises(Refused):
            tokens.user(token(OTHER, headers={"kid": f"made up {n}"}))
    assert len(asked) == 1


def test_an_issuer_that_is_away_is_a_503() -> None:
    tokens = SignedTokens(
        Jwt(issuer=ISSUER, audience=AUDIENCE, keys="http://127.0.0.1:9/keys", algorithms=("ES256",))
    )
    with pytest.raises(Refused) as refused:
        tokens.user(token())
    assert refused.value.status == 503 and refused.value.after


def test_a_token_reaches_its_users_model_through_the_gateway(tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = json.loads(RSAAlgorithm.to_jwk(key.public_key()))
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [{**public, "kid": KID}]}))
    jwt_settings = {"issuer": ISSUER, "audience": AUDIENCE, "keys": str(tmp_path / "keys.json")}
    with house(tmp_path / "registry", jwt=jwt_settings) as one, one.client() as client:
        for who in ("alice", "bob"):
            shown = {"authorization": f"Bearer {token(key, 'RS256', sub=who)}"}
            assert client.post("/generate", json={"inputs": "hi"}, headers=shown).json() == {
                "generated_text": f"by {who}"
            }
            stolen = {"inputs": "hi", "model": "bob" if who == "alice" else "alice"}
            assert client.post("/generate", json=stolen, headers=shown).status_code == 403
        assert client.get("/metrics", headers=shown).status_code == 403  # no token is an admin's
        assert client.post("/generate", json={"inputs": "hi"}, headers=one.headers()).status_code == 200


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"algorithms": ("HS256",)}, "algorithms"),
        ({"algorithms": ("none",)}, "algorithms"),
        ({"algorithms": ()}, "algorithms"),
        ({"audience": ""}, "jwt.audience"),
        ({"keys": ""}, "jwt.keys"),
    ],
)
def test_settings_that_would_take_too_much_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Jwt(**{"issuer": ISSUER, "audience": AUDIENCE, "keys": "keys.json", **values})


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"keys": 1}', '{"keys": []}'])
def test_a_file_that_holds_no_keys_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(ConfigError, match=r"jwt\.keys"):
        SignedTokens(Jwt(issuer=ISSUER, audience=AUDIENCE, keys=str(tmp_path / "keys.json")))
