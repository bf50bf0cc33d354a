"""What is taken for a secret, and what is taken for a placeholder."""

import pytest
from vitalis_serve.settings.redaction import is_placeholder, is_secret, redact, redact_argv

SECRETS = [
    "HF_TOKEN",
    "VLLM_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "DB_PASSWORD",
    "api-key",
    "--api-key",
    "apikey",
    "x_passwd",
]
NOT_SECRETS = [
    "max-num-batched-tokens",
    "TIKTOKEN_ENCODINGS_BASE",
    "tokenizer",
    "VLLM_CPU_KVCACHE_SPACE",
    "monkey",
    "max_tokens",
]


@pytest.mark.parametrize("name", SECRETS)
def test_secret_names(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", NOT_SECRETS)
def test_other_names(name):
    assert not is_secret(name)


@pytest.mark.parametrize(
    "value",
    [
        "changeme",
        "CHANGE-ME",
        "<token>",
        "${HF_TOKEN}",
        "hf_xxxx",
        "your-token-here",
        "todo",
        "password",
        "xxx",
        "***",
    ],
)
def test_placeholders(value):
    assert is_placeholder(value)


@pytest.mark.parametrize("value", ["hf_aBcD1234efgh", "correct horse", "s3cr3t!", "8f14e45fceea167a"])
def test_real_secrets_are_not_placeholders(value):
    assert not is_placeholder(value)


def test_redact_hides_values_and_keeps_the_rest():
    assert redact({"env": {"A_TOKEN": "x", "B": "y", "EMPTY_TOKEN": ""}, "list": [{"password": 1}]}) == {
        "env": {"A_TOKEN": "[redacted]", "B": "y", "EMPTY_TOKEN": ""},
        "list": [{"password": "[redacted]"}],
    }


def test_redact_argv_hides_every_word_after_a_secret_flag():
    assert redact_argv(["py", "--api-key", "a", "b", "--port", "1", "--api-key=c"]) == [
        "py", "--api-key", "[redacted]", "[redacted]", "--port", "1", "--api-key=[redacted]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:p%40ss@host/db", "postgresql://me:[redacted]@host/db"),
        ("postgresql://me:p@ss/w:d@host:1/db?x=1", "postgresql://me:[redacted]@host:1/db?x=1"),
        ("redis://:secret@host/0", "redis://:[redacted]@host/0"),
        ("postgresql://h/db?password=a&user=b", "postgresql://h/db?password=[redacted]&user=b"),
        ("postgresql://me@host:5432/db?host=/run/x", "postgresql://me@host:5432/db?host=/run/x"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
    ],
)
def test_redact_hides_the_password_of_a_url(url, shown):
    assert redact({"store": {"url": url}}) == {"store": {"url": shown}}
