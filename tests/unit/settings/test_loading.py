"""Settings from file, profile and environment: what is merged, what is refused, and in which words."""

from pathlib import Path

import msgspec
import pytest
from vitalis_serve import tokens
from vitalis_serve.errors import ConfigurationError
from vitalis_serve.settings import load, resolve
from vitalis_serve.settings.hardware import GIB, GpuModel, profile_for
from vitalis_serve.settings.overrides import overridden
from vitalis_serve.settings.schema import Route

CPU = {"VITALIS_PROFILE": "plain"}


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "plain.yaml").write_text("")

    def write(text: str, profile: str | None = None) -> Path:
        (tmp_path / "gpt-oss.yaml").write_text(text)
        if profile is not None:
            (tmp_path / "profiles" / "plain.yaml").write_text(profile)
        return tmp_path / "gpt-oss.yaml"

    return write


def refusal(path: Path, environ: dict[str, str] = CPU) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_later_layers_win_key_by_key(write):
    path = write(
        "gateway: {port: 1, workers: 2}\nengines: {engine_args: {a: 1, b: 2, max_num_seqs: 4}, slots: 1}\n",
        "gateway: {port: 2}\nengines: {engine_args: {b: 3, --max-num-seqs: 8, c: null}}\n",
    )
    settings = load(path, CPU | {"VITALIS_GATEWAY_PORT": "3", "VITALIS_ENGINES_ENGINE_ARGS": '{"d": [1]}'})
    assert (settings.gateway.port, settings.gateway.workers, settings.engines.slots) == (3, 2, 1)
    assert settings.engines.engine_args == {"a": 1, "b": 3, "max-num-seqs": 8, "c": None, "d": (1,)}


def test_place_names_the_layer_that_won(write):
    path = write("gateway:\n  port: 1\n  host: 127.0.0.1\n", "gateway:\n\n  port: 2\n")
    resolved = resolve(path, CPU | {"VITALIS_DATA_FOLDER": "/x"})
    assert resolved.place(("gateway", "port")) == f"{path.parent}/profiles/plain.yaml:3"
    assert resolved.place(("gateway", "host")) == f"{path}:3"
    assert resolved.place(("data_folder",)) == "VITALIS_DATA_FOLDER"
    assert resolved.place(("gateway", "workers")) == "default"
    assert resolved.files == (path, path.parent / "profiles/plain.yaml")


def test_place_of_a_source_that_was_replaced_is_what_replaced_it(write):
    path = write("model:\n  hub: a/b\n", "model:\n\n  build: gpt-oss-tiny\n")
    resolved = resolve(path, CPU)
    assert resolved.settings.model.hub is None
    assert resolved.place(("model", "hub")).endswith("plain.yaml:3")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engines:\n  slots: many", ":2: engines.slots is 'many'; it must be a whole number"),
        ("engines:\n  device: gpu", ":2: engines.device is 'gpu'; it must be 'auto', 'cuda' or 'cpu'"),
        ("engines:\n  engine_args: {uds: /x}", ":2: engines.engine_args.uds is not yours to set"),
        ("gateway: {port: on}\nmodel:\n  hub: [1]", ":1: gateway.port must be a number (and 1 more)"),
        ("routes: [{name: a}, {name: a}]", ":1: routes: a is there more than once"),
        ("profile: [x]", ":1: profile must be the name of a file"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_although_others_win(write, text, words):
    winning = "engines: {slots: 5, device: cpu, engine_args: {uds: null}}\nmodel: {build: gpt-oss-tiny}\n"
    environ = CPU | {"VITALIS_GATEWAY_PORT": "5", "VITALIS_ROUTES": "[{name: b}]"}
    message = refusal(write(text, winning), environ)
    assert f"gpt-oss.yaml{words}" in message
    assert "did you mean" not in message


def test_what_is_wrong_in_the_profile_is_said_although_a_variable_wins(write):
    message = refusal(write("", "engines:\n  slots: many"), CPU | {"VITALIS_ENGINES_SLOTS": "5"})
    assert "profiles/plain.yaml:2: engines.slots is 'many'" in message


def test_a_layer_may_contradict_what_another_one_mends(write):
    """Each of these is refused where nothing else is given."""
    text = "control: {port: 8080}\ngateway: {max_bodies_bytes: 4096}\nmodel: {hub: null}\n"
    settings = load(
        write(text, "gateway: {port: 9000}\nmodel: {build: gpt-oss-tiny}"),
        CPU | {"VITALIS_GATEWAY_MAX_BODY_BYTES": "2048"},
    )
    assert (settings.gateway.port, settings.control.port, settings.gateway.max_body_bytes) == (9000, 8080, 2048)


def test_what_the_profile_takes_from_the_file_is_named(write):
    path = write(
        "engines:\n  slots: 7\n  replicas: 2\n  device: auto\n  engine_args: {max_model_len: 99, seed: 1}\n"
        "  engine_env: {MY_KEY: s3cr3t}\nmodel:\n  folder: /own\n",
        "engines:\n  slots: 512\n  replicas: 2\n  device: cpu\n  engine_args: {max-model-len: 4096}\n"
        "  engine_env: {MY_KEY: other}\nmodel:\n  build: gpt-oss-tiny\n",
    )
    profile = path.parent / "profiles/plain.yaml"
    said = {sentence.split(":")[0]: sentence for sentence in overridden(resolve(path, CPU))}
    assert set(said) == {"engines.slots", "engines.engine_args.max-model-len", "engines.engine_env.MY_KEY",
                         "model.folder"}  # fmt: skip
    assert said["engines.slots"] == (
        f"engines.slots: 7 at {path}:2 is overridden by profile plain: 512 at {profile}:2;"
        " to have yours, set VITALIS_ENGINES_SLOTS or write a profile of your own"
    )
    assert "set VITALIS_ENGINES_ENGINE_ARGS or" in said["engines.engine_args.max-model-len"]
    assert f"model.folder: /own at {path}:8 is overridden by profile plain: null at {profile}:8" in said["model.folder"]
    assert "s3cr3t" not in said["engines.engine_env.MY_KEY"] + str(said)
    assert "engines.slots" not in str(overridden(resolve(path, CPU | {"VITALIS_ENGINES_SLOTS": "9"})))


def test_a_file_elsewhere_finds_the_shipped_profiles(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("gateway: {port: 1234}")
    resolved = resolve(path, {}, gpus=tuple)
    assert (resolved.settings.profile, resolved.settings.model.package) == ("cpu-demo", "smollm2-135m")
    assert resolved.settings.gateway.port == 1234
    assert refusal(path, {"VITALIS_PROFILE": "h20"}).endswith("config/profiles; did you mean h200?")


def test_a_profile_beside_the_file_comes_before_the_shipped_one(write):
    path = write("")
    (path.parent / "profiles" / "h200.yaml").write_text("engines: {slots: 7}")
    assert load(path, {"VITALIS_PROFILE": "h200"}).engines.slots == 7
    assert load(path, {"VITALIS_PROFILE": "h100"}).engines.slots == 256
    assert refusal(path, {"VITALIS_PROFILE": "h20"}).endswith("did you mean h200?")


def test_a_mistyped_key_is_said_before_a_missing_profile(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("profile: none\ngatway: {port: 1}")
    assert "my.yaml:2: gatway is not a known key" in refusal(path, {})


def test_routes_default_to_the_model(write):
    assert load(write("model: {name: m}"), CPU).routes == (Route(name="m", model="m"),)
    settings = load(write("model: {name: m}\nroutes: [{name: a}, {name: b, model: c}]"), CPU)
    assert [(r.name, r.model) for r in settings.routes] == [("a", "m"), ("b", "c")]


ROUTE = """\
model: {name: m}
routes:
  - name: r
    class: emergency
    defaults: {temperature: 0.7, max_tokens: 100}
    limits: {max_tokens: 200, logprobs: 0}
    preamble: |
      Be brief.
    fallbacks: [b, c]
  - name: canary
    weights: [{model: old, weight: 5}, {model: new, weight: 95}]
"""


def test_what_a_route_says_is_kept_when_its_model_is_filled_in(write):
    first, canary = load(write(ROUTE), CPU).routes
    assert (first.model, first.class_, first.preamble, first.fallbacks) == ("m", "emergency", "Be brief.", ("b", "c"))
    assert (first.defaults.temperature, first.limits.max_tokens, first.limits.logprobs) == (0.7, 200, 0)
    assert (canary.model, [(w.model, w.weight) for w in canary.weights]) == ("new", [("old", 5), ("new", 95)])


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ("{name: r, clas: batch}", [":1: routes.0.clas is not a known key", "routes.0.class?"]),
        ("{name: r, class: urgent}", ["routes.0.class is 'urgent'", "emergency"]),
        ("{name: r, defaults: {temperatur: 1}}", ["did you mean routes.0.defaults.temperature?"]),
        ("{name: r, defaults: {temperature: 2.5}}", ["routes.0.defaults.temperature is 2.5; it must be at most 2"]),
        ("{name: r, limits: {n: 0}}", ["routes.0.limits.n is 0; it must be at least 1"]),
        (
            "{name: r, defaults: {max_tokens: 9}, limits: {max_tokens: 8}}",
            ["routes.0: defaults.max_tokens (9) is above"],
        ),
        ("{name: r, weights: [{model: a, weight: -1}]}", ["routes.0.weights.0.weight is -1"]),
        ("{name: r, weights: [{model: a, weight: 0}]}", ["routes.0: weights are all 0"]),
        ("{name: r, model: a, weights: [{model: a, weight: 1}]}", ["routes.0: give model or weights, not both"]),
        ("{name: r, model: a, fallbacks: [b, a]}", ["routes.0: a is named twice"]),
    ],
)
def test_what_is_wrong_in_a_route_is_named(write, route, words):
    text = refusal(write(f"routes: [{route}]"))
    assert all(word in text for word in words), text


def test_a_tenant_is_in_one_cache_group(write):
    assert load(write("cache_groups: {g: [a, b]}"), CPU).cache_groups == {"g": ("a", "b")}
    assert load(write(""), CPU | {"VITALIS_CACHE_GROUPS": '{"g": ["a"]}'}).cache_groups == {"g": ("a",)}
    assert "cache_groups name b more than once" in refusal(write("cache_groups: {g: [a, b], h: [b]}"))


def test_settings_are_frozen_all_the_way(write):
    settings = load(write("engines: {engine_args: {a: {b: [1]}}}"), CPU)
    with pytest.raises(TypeError):
        settings.engines.engine_args["a"]["b"] = 2  # type: ignore[index]
    with pytest.raises(TypeError):
        settings.engines.engine_args["a"]["b"][0] = 2
    with pytest.raises(ValueError, match="frozen"):
        settings.gateway.port = 1  # type: ignore[misc]


@pytest.mark.parametrize("source", ["VITALIS_MODEL_FOLDER=/weights", "VITALIS_MODEL_BUILD=gpt-oss-tiny"])
def test_a_source_replaces_the_source_below(write, source):
    name, value = source.split("=")
    model = load(write("model: {hub: a/b, revision: v1}"), CPU | {name: value}).model
    assert (model.hub, model.revision) == (None, None)
    assert value in (str(model.folder), model.build)


def test_empty_variables_are_not_set(write):
    assert load(write("gateway: {port: 5}"), CPU | {"VITALIS_GATEWAY_PORT": ""}).gateway.port == 5


def test_empty_sections_and_empty_files_are_defaults(write):
    assert load(write("gateway:\nengines:\n  restart:\n"), CPU) == load(write(""), CPU)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gatway: {port: 1}", ["gpt-oss.yaml:1: gatway is not a known key; did you mean gateway?"]),
        ("gateway:\n  prot: 1", ["gpt-oss.yaml:2: gateway.prot", "did you mean gateway.port?"]),
        ("gateway:\n  deadlines:\n    idle: 1", [":3: gateway.deadlines.idle", "idle_seconds?"]),
        ("tensor_parallel: 2", [":1: tensor_parallel", "did you mean engines.tensor_parallel?"]),
        ("engines:\n  max-num-seqs: 2", [":2: engines.max-num-seqs", "engines.engine_args"]),
        ("routes:\n- name: a\n  modle: b", [":3: routes.0.modle", "did you mean routes.0.model?"]),
        ("gateway:\n  port: 1\n  port: 2", [":3: gateway.port is given twice (first on line 2)"]),
        ("gateway:\n  port: abc", [":2: gateway.port is 'abc'; it must be a whole number"]),
        ("gateway: {port: 70000}", [":1: gateway.port is 70000; it must be at most 65535"]),
        ("gateway:\n  port: on", [":2: gateway.port must be a number"]),
        ("gateway: {port: 1.5}", ["gateway.port is 1.5; it must be a whole number"]),
        ("gateway: 5", [":1: gateway is 5; it must be a section"]),
        ("gateway: [1]", ["gateway is a list; it must be a section"]),
        ("gateway: {idle: 1", ["not valid YAML"]),
        ("- a\n- b", ["must be a mapping"]),
        ("just text", ["must be a mapping"]),
        ("{1: 2}", ["1 is not a known key"]),
        ("? [a]\n: 1", [":1: a key must be plain text"]),
        ("a: &x {b: *x}", ["refers to itself"]),
        ('data_folder: ""', [":1: data_folder must not be empty"]),
        ("data_folder: !!python/name:os.system x", ["only plain values"]),
        ("engines: {device: gpu}", ["engines.device is 'gpu'; it must be 'auto', 'cuda' or 'cpu'"]),
        ("engines: {engine_env: {A: true}}", ['engines.engine_env.A must be text: write "1" or "0"']),
        ("engines: {engine_args: [1]}", ["engines.engine_args is a list; it must be a map"]),
        ("engines: {engine_args: {max_num_seqs: 1, max-num-seqs: 2}}", ["has --max-num-seqs twice"]),
        (
            "engines:\n  engine_args:\n    tensor_parallel_size: 2",
            [":3: engines.engine_args.tensor-parallel-size", "engines.tensor_parallel"],
        ),
        ("model: {hub: a/b, folder: /x}", [":1: model: give exactly one of", "found hub, folder"]),
        ("model:\n  hub: no-slash", ["model.hub is 'no-slash'; it must match"]),
        ("model: {name: m}\nroutes: [{name: a}, {name: a}]", [".yaml:2: routes: a is there more than once"]),
        ("\ncontrol: {port: 8080}", [".yaml:2: ", "gateway.port and control.port are both 8080 on the same address"]),
        ("gateway: {host: localhost}\ncontrol: {port: 8080}", ["are both 8080", "localhost and 127.0.0.1"]),
        ("gateway: {host: '::', port: 8081}", ["are both 8081"]),
        ("routes: [{model: a}]", ["routes.0.name is missing"]),
        ("shutdown: {drain_seconds: .inf}", ["shutdown.drain_seconds is inf"]),
        ("shutdown: {drain_seconds: -1}", ["shutdown.drain_seconds is -1; it must be at least 0"]),
        (
            "gateway: {max_body_bytes: 2048, max_bodies_bytes: 1024}",
            ["the largest allowed body would never fit"],
        ),
        (
            "engines:\n  engine_env:\n    MY_API_KEY: changeme",
            [":3: engines.engine_env.MY_API_KEY", "placeholder"],
        ),
        (
            "engines: {engine_args: {api-key: <your key>}}",
            ["engines.engine_args.api-key holds a placeholder"],
        ),
        ("profile: ../../etc/x", ["profile must be the name of a file"]),
        ("profile: [x]", ["profile must be the name of a file"]),
        ("a: " + "[" * 5000 + "]" * 5000, ["nested too deep"]),
        ("a: \x01", ["not valid YAML"]),
    ],
)
def test_bad_files_get_one_sentence(write, text, words):
    environ = {} if text.startswith("profile") else CPU
    message = refusal(write(text), environ)
    for word in words:
        assert word in message


def test_a_bad_key_in_a_profile_names_the_profile(write):
    assert "profiles/plain.yaml:2: engines.slot is not" in refusal(write("", "engines:\n  slot: 1\n"))
    assert "a profile cannot name a profile" in refusal(write("", "profile: h100"))


def test_missing_unreadable_and_binary_files(tmp_path, write):
    assert "no such file" in refusal(tmp_path / "none.yaml")
    assert "cannot be read" in refusal(tmp_path)
    path = write("")
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(path)
    path.write_bytes(b"#" * (1 << 20) + b"##")
    assert "larger than" in refusal(path)


def test_unknown_profile_names_the_nearest(write):
    message = refusal(write(""), {"VITALIS_PROFILE": "plane"})
    assert message.startswith("VITALIS_PROFILE: there is no profile plane in ")
    assert message.endswith("did you mean plain?")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("VITALIS_GATEWAY_PROT", "did you mean VITALIS_GATEWAY_PORT?"),
        ("VITALIS_QQQQQQQQ", "config/environment.env lists them all"),
    ],
)
def test_unknown_variables_are_errors(write, name, words):
    assert words in refusal(write(""), CPU | {name: "1"})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (
            {"VITALIS_GATEWAY_PORT": "x"},
            "VITALIS_GATEWAY_PORT: gateway.port is 'x'; it must be a whole number",
        ),
        ({"VITALIS_ENGINES_ENGINE_ARGS": "{"}, "VITALIS_ENGINES_ENGINE_ARGS: must be JSON"),
        (
            {"VITALIS_ENGINES_GPUS": "0,x"},
            "VITALIS_ENGINES_GPUS: engines.gpus.1 is 'x'; it must be a whole number",
        ),
        ({"HF_TOKEN": "hf_xxxxxxxx"}, "HF_TOKEN holds a placeholder"),
    ],
)
def test_bad_variables_are_named(write, environ, words):
    assert words in refusal(write(""), CPU | environ)


def test_gpus_are_read_from_a_comma_list(write):
    assert load(write(""), CPU | {"VITALIS_ENGINES_GPUS": "0, 2"}).engines.gpus == (0, 2)


@pytest.mark.parametrize(
    ("name", "gib", "profile"),
    [
        ("NVIDIA H200", 140, "h200"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100"),
        ("NVIDIA A100-PCIE-40GB", 40, "l40s"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx-24gb"),
        ("NVIDIA L4", 22.5, "rtx-24gb"),
        ("NVIDIA GeForce RTX 4080", 16, "rtx-16gb"),
        ("NVIDIA B200", 179, "h200"),
    ],
)
def test_profile_by_gpu(name, gib, profile):
    assert profile_for([GpuModel(name, int(gib * GIB))]) == profile


def test_profile_is_the_smallest_gpu_and_refuses_tiny_ones():
    assert profile_for([]) == "cpu-demo"
    assert profile_for([GpuModel("NVIDIA H200", 140 * GIB), GpuModel("RTX 4090", 24 * GIB)]) == "rtx-24gb"
    with pytest.raises(ConfigurationError, match="RTX 3060 has 12.0 GiB"):
        profile_for([GpuModel("RTX 3060", 12 * GIB)])


def test_auto_asks_for_gpus_and_says_why(write):
    path = write("")
    (path.parent / "profiles" / "h200.yaml").write_text("engines: {slots: 7}")
    resolved = resolve(path, {}, gpus=lambda: [GpuModel("NVIDIA H200", 140 * GIB)])
    assert (resolved.settings.profile, resolved.settings.engines.slots) == ("h200", 7)
    assert resolved.profile_reason == "auto: 1 x NVIDIA H200"


@pytest.mark.parametrize(
    "text",
    [
        "gateway: {port: 0}\ncontrol: {port: 0}",
        "gateway: {host: 10.0.0.1}\ncontrol: {port: 8080}",
        "gateway: {host: 0.0.0.0}\ncontrol: {host: '::1', port: 8080}",
    ],
)
def test_one_port_on_two_addresses_is_allowed(write, text):
    assert load(write(text), CPU).control.port in (0, 8080)


def test_what_is_wrong_together_is_blamed_on_every_place(write):
    file = write("gateway:\n  port: 9000")
    with pytest.raises(ConfigurationError) as caught:
        load(file, {**CPU, "VITALIS_CONTROL_PORT": "9000"})
    assert str(caught.value).startswith(f"{file}:2, VITALIS_CONTROL_PORT: ")


def test_route_given_twice_in_the_environment_is_blamed_on_its_variable(write):
    with pytest.raises(ConfigurationError, match="^VITALIS_ROUTES: routes: a is there more than once"):
        load(write(""), {**CPU, "VITALIS_ROUTES": "[{name: a}, {name: a}]"})


SITE = "name: site, issuer: 'https://login.example.org', audience: [vitalis-serve]"


@pytest.mark.parametrize(("entry", "said"), [
    (f"{{{SITE}, class_claim: urgency}}", "give class_claim and classes together"),
    (f"{{{SITE}, scopes: {{llm: inference}}}}", "give scopes_claim and scopes together"),
    (f"{{{SITE}, roles_claim: roles}}", "give roles_claim and roles together"),
    (f"{{{SITE}, scopes_claim: scope, scopes: {{a: admin}}}}", "oidc.0.scopes.a"),
    (f"{{{SITE}, tenant_claim: ''}}", "oidc.0.tenant_claim"),
    (f"{{{SITE}, algorithms: [HS256]}}", "oidc.0.algorithms.0"),
    (f"{{{SITE}, algorithms: []}}", "oidc.0.algorithms"),
    ("{name: site, issuer: 'ftp://x', audience: [a]}", "oidc.0.issuer"),
    ("{name: site, issuer: 'https://x', audience: []}", "oidc.0.audience"),
    (f"{{{SITE}}}, {{{SITE}}}", "site is there more than once"),
])  # fmt: skip
def test_an_issuer_that_makes_no_sense_is_refused(write, entry, said):
    assert said in refusal(write(f"oidc: [{entry}]"))


def test_an_issuer_is_read_as_the_workers_and_control_want_it(write):
    text = f"oidc: [{{{SITE}, class: batch, roles_claim: a.b, roles: {{x: operator}}}}]"
    said = load(write(text), CPU).oidc[0].model_dump(mode="json")
    issuer = msgspec.convert(said, tokens.Issuer)
    assert (issuer.name, issuer.class_, issuer.roles, issuer.leeway_seconds) == ("site", "batch", {"x": "operator"}, 30)


def test_a_url_that_is_refused_is_shown_without_its_password(write):
    said = refusal(write(""), {**CPU, "VITALIS_STORE_URL": "mysql://me:hidden@host/db"})
    assert "store.url is 'mysql://me:[redacted]@host/db'; it must match" in said


@pytest.mark.parametrize("url", ["redis://u:pw@127.0.0.1:bad/0", "redis://", "rediss:///0", "unix://"])
def test_a_redis_url_that_leads_nowhere_is_refused_without_its_password(tmp_path: Path, url: str) -> None:
    environ = {"VITALIS_PROFILE": "cpu-demo", "VITALIS_LIMITS_BACKEND": "redis", "VITALIS_LIMITS_REDIS_URL": url}
    with pytest.raises(ConfigurationError, match="VITALIS_LIMITS_REDIS_URL") as refused:
        load(None, environ)
    assert "pw" not in str(refused.value)
