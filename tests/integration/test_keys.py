"""`vitalis-serve tenants`, `keys` and `limits`, as real commands against a real control process."""

import json
import os
import pty
import select
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vitalis_serve.store.secrets import digest

from tests.support.control import SECONDS, Control, running


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    with running(tmp_path_factory.mktemp("keys")) as control:
        (control.folder / "config.yaml").write_text(f"profile: cpu-tiny\ndata_folder: {control.folder}\n")
        (control.folder / "profiles").mkdir()
        (control.folder / "profiles" / "cpu-tiny.yaml").write_text("")
        control.call("POST", "/v1/tenants", {"name": "acme"})
        yield control


def command(control: Control, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs one command with its output into pipes."""
    argv = [sys.executable, "-m", "vitalis_serve", *words]
    environ = {**os.environ, "VITALIS_CONFIG": str(control.folder / "config.yaml")}
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60, check=False)


def on_terminal(control: Control, *words: str) -> tuple[int, str]:
    """Runs one command on a terminal of its own: its exit code and all that it showed."""
    environ = {**os.environ, "VITALIS_CONFIG": str(control.folder / "config.yaml")}
    main, terminal = pty.openpty()
    argv = [sys.executable, "-m", "vitalis_serve", *words]
    process = subprocess.Popen(argv, env=environ, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    deadline = time.monotonic() + 60
    while select.select([main], [], [], max(0, deadline - time.monotonic()))[0]:
        try:
            shown += os.read(main, 4096)
        except OSError:  # how Linux tells that the last holder of the terminal has gone
            break
    os.close(main)
    return process.wait(SECONDS), shown.decode()


def digests(control: Control) -> set[str]:
    return {key["digest"] for key in control.snapshot()["keys"]}


def test_tenant_lives_from_create_to_revoke(control: Control) -> None:
    made = command(control, "tenants", "create", "vitalis-chat", "--notes", "the chat")
    assert (made.returncode, made.stderr) == (0, "")
    assert "tenant vitalis-chat made" in made.stdout
    listed = json.loads(command(control, "tenants", "list", "--json").stdout)
    assert [(t["name"], t["status"], t["notes"]) for t in listed if t["name"] == "vitalis-chat"] == [
        ("vitalis-chat", "active", "the chat")
    ]
    assert "vitalis-chat  active" in command(control, "tenants", "list").stdout
    assert "revoked, in force" in command(control, "tenants", "revoke", "vitalis-chat").stdout
    assert "vitalis-chat  disabled" in command(control, "tenants", "list").stdout


def test_key_goes_to_a_private_file_when_there_is_no_terminal(control: Control) -> None:
    made = command(control, "keys", "create", "--tenant", "acme", "--name", "ci", "--class", "batch")
    assert made.returncode == 0, made.stderr
    path = Path(made.stdout.strip())
    assert path.parent == control.folder
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = path.read_text().strip()
    assert path.name == f"key-{key.split('_')[1]}"
    assert digest(key) in digests(control)
    assert key not in made.stdout + made.stderr


def test_key_is_shown_on_a_terminal_and_written_nowhere(control: Control) -> None:
    before = set(control.folder.glob("*key-*"))
    code, shown = on_terminal(control, "keys", "create", "--tenant", "acme")
    assert code == 0, shown
    (key,) = [word for word in shown.split() if word.startswith("vts_")]
    assert digest(key) in digests(control)
    assert set(control.folder.glob("*key-*")) == before


def test_output_names_the_file_and_is_never_overwritten(control: Control, tmp_path: Path) -> None:
    path = tmp_path / "the.key"
    made = command(control, "keys", "create", "--tenant", "acme", "--output", str(path))
    assert made.stdout.strip() == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content, count = path.read_text(), len(digests(control))
    again = command(control, "keys", "create", "--tenant", "acme", "--output", str(path))
    assert (again.returncode, path.read_text(), len(digests(control))) == (1, content, count)
    assert again.stderr.count("\n") == 1
    assert "File exists" in again.stderr


def test_refused_key_leaves_no_file(control: Control, tmp_path: Path) -> None:
    path = tmp_path / "the.key"
    ended = command(control, "keys", "create", "--tenant", "nobody", "--output", str(path))
    assert ended.returncode == 1
    assert not path.exists()


def test_key_with_everything_is_listed_and_revoked(control: Control) -> None:
    words = ("--scopes", "inference,debug", "--routes", "chat", "--expires-in", "30", "--name", "full")
    made = command(control, "keys", "create", "--tenant", "acme", *words)
    assert made.returncode == 0, made.stderr
    key_id = Path(made.stdout.strip()).name.removeprefix("key-")
    listed = json.loads(command(control, "keys", "list", "--tenant", "acme", "--json").stdout)
    (entry,) = [key for key in listed if key["id"] == key_id]
    assert (entry["scopes"], entry["routes"], entry["status"]) == (["inference", "debug"], ["chat"], "active")
    assert abs(entry["expires_at"] - time.time() - 30 * 86_400) < 120
    assert "digest" not in entry
    assert command(control, "keys", "revoke", key_id).stdout.strip().endswith("revoked, in force")
    again = command(control, "keys", "revoke", key_id)
    assert again.returncode == 0
    assert again.stdout.startswith(f"key {key_id} of tenant acme was revoked already, on 20")
    (line,) = [x for x in command(control, "keys", "list").stdout.splitlines() if x.startswith(key_id)]
    assert line.split()[:5] == [key_id, "acme", "full", "standard", "revoked"]


def test_rotated_key_goes_to_a_file_beside_the_first(control: Control) -> None:
    path = Path(command(control, "keys", "create", "--tenant", "acme").stdout.strip())
    old, key_id = path.read_text().strip(), path.name.removeprefix("key-")
    made = command(control, "keys", "rotate", key_id, "--overlap", "2h")
    assert made.returncode == 0, made.stderr
    assert "; the old one opens until 20" in made.stderr
    new = Path(made.stdout.strip())
    assert new == control.folder / f"key-{key_id}-2"
    assert stat.S_IMODE(new.stat().st_mode) == 0o600
    assert (path.read_text().strip(), new.read_text().split("_")[1]) == (old, key_id)
    (entry,) = [key for key in control.snapshot()["keys"] if key["id"] == key_id]
    assert (entry["digest"], entry["old_digest"]) == (digest(new.read_text().strip()), digest(old))
    assert abs(entry["old_until"] - time.time() - 7200) < 120
    assert "; the old one opens nothing now" in command(control, "keys", "rotate", key_id, "--for", "0s").stderr


def test_key_is_changed_where_something_is_said(control: Control) -> None:
    path = Path(command(control, "keys", "create", "--tenant", "acme", "--notes", "n").stdout.strip())
    key_id = path.name.removeprefix("key-")
    words = ("--routes", "chat", "--class", "batch", "--expires-in", "now", "--name", "")
    assert command(control, "keys", "change", key_id, *words).stdout.endswith("changed, in force\n")
    listed = json.loads(command(control, "keys", "list", "--json").stdout)
    (entry,) = [key for key in listed if key["id"] == key_id]
    assert (entry["routes"], entry["class"], entry["status"], entry["notes"]) == (["chat"], "batch", "expired", "n")
    command(control, "keys", "change", key_id, "--expires-in", "never")
    (line,) = [x for x in command(control, "keys", "list").stdout.splitlines() if x.startswith(key_id)]
    assert line.split()[4] == "active"
    assert line.split()[-2:] == ["never", "never"]  # expires, last used


def test_limits_are_set_listed_and_cleared(control: Control) -> None:
    words = ("--requests-per-minute", "600", "--tokens-per-minute", "100000", "--concurrent", "20")
    done = command(control, "limits", "set", "tenant", "acme", *words)
    assert done.stdout == (
        "limits of tenant acme: requests per minute 600, tokens per minute 100000, concurrent 20; in force\n"
    )
    words = ("--tokens-per-day", "5", "--tokens-per-month", "9", "--concurrent", "none")
    command(control, "limits", "set", "tenant", "acme", *words)
    wanted = {"requests_per_minute": 600, "tokens_per_minute": 100_000, "tokens_per_day": 5, "tokens_per_month": 9}
    listed = json.loads(command(control, "limits", "list", "--json").stdout)
    assert listed == [{"kind": "tenant", "name": "acme", "concurrent": None, **wanted}]
    assert "tenant  acme" in command(control, "limits", "list").stdout
    assert command(control, "limits", "clear", "tenant", "acme").stdout == "limits of tenant acme: none; in force\n"
    assert command(control, "limits", "list", "--json").stdout == "[]\n"


def test_what_is_made_with_limits_is_limited_from_the_start(control: Control) -> None:
    """In one version each: no worker ever sees it without them."""
    before = control.snapshot()["version"]
    words = ("--requests-per-minute", "600", "--tokens-per-minute", "100000", "--concurrent", "none")
    made = command(control, "tenants", "create", "capped", *words)
    assert "tenant capped made with requests per minute 600, tokens per minute 100000; next: " in made.stdout
    words = ("--concurrent", "8", "--tokens-per-day", "5000000", "--tokens-per-month", "100000000")
    made = command(control, "keys", "create", "--tenant", "capped", *words)
    assert made.stderr.endswith(
        "of tenant capped with concurrent 8, tokens per day 5000000, tokens per month 100000000, in force\n"
    )
    body = control.snapshot()
    assert body["version"] == before + 2
    (tenant,) = [entry for entry in body["tenants"] if entry["name"] == "capped"]
    assert tenant["rates"] == {"requests_per_minute": 600, "tokens_per_minute": 100_000}
    (key,) = [entry for entry in body["keys"] if entry["tenant"] == "capped"]
    assert key["rates"] == {"concurrent": 8, "tokens_per_day": 5_000_000, "tokens_per_month": 100_000_000}
    acts = control.call("GET", "/v1/audit?limit=2")["audit"]
    assert [(act["action"], act["details"]["limits"]) for act in acts] == [
        ("key.create", key["rates"]),
        ("tenant.create", tenant["rates"]),
    ]
    listed = json.loads(command(control, "limits", "list", "--json").stdout)
    assert ("key", key["id"], 8) in [(entry["kind"], entry["name"], entry["concurrent"]) for entry in listed]
    for kind, name in (("key", key["id"]), ("tenant", "capped")):
        command(control, "limits", "clear", kind, name)


def thousand(tmp_path: Path, bad: str = "") -> Path:
    rows = [f"  - {{tenant: relief, name: app-{n}, limits: {{concurrent: 4}}}}" for n in range(1000)]
    rows[499] += bad
    path = tmp_path / "tenants.yaml"
    path.write_text("\n".join(["tenants:", "  - name: relief", "keys:", *rows]))
    return path


def test_file_with_one_bad_row_of_a_thousand_changes_nothing(control: Control, tmp_path: Path) -> None:
    before, path = control.snapshot(), tmp_path / "new.keys"
    ended = command(control, "keys", "import", str(thousand(tmp_path, " x")), "--output", str(path))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("vitalis-serve: nothing was imported: the file cannot be read:\nline 503: ")
    text = thousand(tmp_path).read_text().replace("app-499,", "app-499, scopes: [inferense],")
    (tmp_path / "tenants.yaml").write_text(text)
    ended = command(control, "keys", "import", str(tmp_path / "tenants.yaml"), "--output", str(path))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "vitalis-serve: nothing was imported: 1 of 1001 rows are wrong:\n"
        "line 503 (keys, row 500): scopes.0: there is no scope 'inferense'; did you mean 'inference'?\n"
    )
    assert (control.snapshot(), path.exists()) == (before, False)


def test_thousand_keys_are_imported_at_once_and_once(control: Control, tmp_path: Path) -> None:
    """In one version; their secrets are in a private file, and with one more row that file is added to nothing."""
    before, file, path = control.snapshot()["version"], thousand(tmp_path), tmp_path / "new.keys"
    ended = command(control, "keys", "import", str(file), "--output", str(path))
    assert (ended.returncode, ended.stdout) == (0, f"{path}\n"), ended.stderr
    assert ended.stderr == "imported 1 tenants, 1000 keys, 1000 limits, in force\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    body = control.snapshot()
    assert body["version"] == before + 1
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    assert [line[:2] for line in lines] == [["relief", f"app-{n}"] for n in range(1000)]
    found = {key["digest"]: key for key in body["keys"]}
    assert all(found[digest(key)]["rates"] == {"concurrent": 4} for _, _, key in lines)
    assert not any(key in ended.stdout + ended.stderr for _, _, key in lines)

    again = command(control, "keys", "import", str(file), "--output", str(tmp_path / "none.keys"))
    assert (again.returncode, again.stdout) == (1, "")
    assert "1001 of 1001 rows are there already; leave them out, or skip what exists:\nline 2 " in again.stderr
    assert again.stderr.count("\n") == 1002
    file.write_text(file.read_text() + "\n  - {tenant: relief, name: late}\n")
    more = command(control, "keys", "import", str(file), "--skip-existing", "--output", str(tmp_path / "none.keys"))
    assert more.stderr == "imported 0 tenants, 1 keys, 0 limits, in force; 1001 rows were there already\n"
    none = command(control, "keys", "import", str(file), "--skip-existing", "--output", str(tmp_path / "more.keys"))
    assert (none.returncode, none.stdout, (tmp_path / "more.keys").exists()) == (0, "", False)
    acts = control.call("GET", "/v1/audit?limit=1000")["audit"]
    assert [act["details"]["keys"] for act in acts if act["action"] == "import"] == [0, 1, 1000]
    assert sum(act["action"] == "limits.set" and act["details"] == {"concurrent": 4} for act in acts) > 900


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("tenants", "create", "acme"), 1, "tenant 'acme' already exists"),
        (("tenants", "create", "a b"), 2, "name: give 1 to 64 letters, digits, dots, underscores"),
        (("tenants", "revoke", "acmee"), 1, "there is no tenant 'acmee'; did you mean 'acme'?"),
        (("keys", "create", "--tenant", "acmee"), 1, "there is no tenant 'acmee'; did you mean 'acme'?"),
        (("keys", "create", "--tenant", "acme", "--class", "bulk"), 2, "there is no class 'bulk'"),
        (("keys", "create", "--tenant", "acme", "--scopes", "inferense"), 2, "did you mean 'inference'?"),
        (("keys", "create", "--tenant", "acme", "--routes", "chatt"), 2, "did you mean 'chat'?"),
        (("keys", "revoke", "nosuch"), 1, "there is no key 'nosuch'"),
        (
            ("keys", "create", "--tenant", "acme", "--expires-in", "soon"),
            2,
            "--expires-in 'soon': give a whole number from 1 to ",
        ),
        (("keys", "create", "--tenant", "acme", "--expires-in", "0"), 2, "for example --expires-in 90"),
        (("keys", "create", "--tenant", "acme", "--expires-in", "3661"), 2, "for example --expires-in 90"),
        (
            ("keys", "create", "--tenant", "acme", "--concurrent", "0"),
            2,
            "--concurrent '0': give a whole number from 1 to",
        ),
        (("tenants", "create", "late", "--tokens-per-day", "1e6"), 2, "--tokens-per-day '1e6': give a whole number"),
        (("keys", "rotate", "x", "--overlap", "24"), 2, "--overlap '24': give a number with s, m, h or d behind it"),
        (("keys", "rotate", "x", "--overlap", "367d"), 2, "at most 366d, for example --overlap 24h"),
        (
            ("keys", "change", "nosuch"),
            2,
            "give at least one of name, class, scopes, routes, notes, expires_in_seconds",
        ),
        (("keys", "import", "/nowhere.yaml"), 2, "/nowhere.yaml cannot be read: No such file"),
        (("limits", "set", "tenant", "acmee", "--concurrent", "1"), 1, "no tenant 'acmee'; did you mean 'acme'?"),
        (
            ("limits", "set", "tenant", "acme", "--concurrent", "0"),
            2,
            "--concurrent '0': give a whole number from 1 to",
        ),
        (
            ("limits", "set", "tenant", "acme", "--tokens-per-day", "-1"),
            2,
            "--tokens-per-day '-1': give a whole number",
        ),
        (("limits", "set", "tenant", "acme"), 2, "give at least one of --requests-per-minute, --tokens-per-minute"),
        (("keys", "create"), 2, "Missing option '--tenant'"),
        (("keys", "crate"), 2, "Did you mean 'create'"),
        (("keys", "list", "--config", "/nowhere.yaml"), 2, "/nowhere.yaml"),
    ],
)
def test_mistake_gets_one_sentence(control: Control, words: tuple[str, ...], code: int, sentence: str) -> None:
    ended = command(control, *words)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith("vitalis-serve: ")
    assert sentence in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_command_without_control_says_how_to_start_it(tmp_path: Path) -> None:
    with running(tmp_path) as control:
        pass
    (tmp_path / "config.yaml").write_text(f"profile: cpu-tiny\ndata_folder: {tmp_path}\n")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "cpu-tiny.yaml").write_text("")
    ended = command(control, "keys", "list")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "control is not running" in ended.stderr
    assert "vitalis-serve up" in ended.stderr
