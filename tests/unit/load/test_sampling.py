"""What is read of the gateway's and the engines' metrics."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from vitalis_load import sampling
from vitalis_load.target import Target

from tests.support import simulator

GATEWAY = b"""# HELP vitalis_in_flight Requests that hold a slot.
# TYPE vitalis_in_flight gauge
vitalis_in_flight{worker="worker-0"} 3.0
vitalis_in_flight{worker="worker-1"} 4.0
vitalis_queued{class="emergency",worker="worker-0"} 1.0
vitalis_request_seconds_bucket{le="0.1",route="a b",worker="worker-0"} 7.0
vitalis_request_seconds_count{route="a b",worker="worker-0"} 9.0
vitalis_spool_bytes 12.0
process_cpu_seconds_total 5.0
"""


def test_the_gateway_s_metrics_are_added_up_over_labels() -> None:
    assert sampling.gateway_sample(GATEWAY) == {
        "vitalis_in_flight": 7.0,
        "vitalis_queued": 1.0,
        "vitalis_request_seconds_count": 9.0,
        "vitalis_spool_bytes": 12.0,
    }


def test_an_engine_s_metrics_are_its_own() -> None:
    with simulator.started() as engine:
        body = {"model": "gpt-oss-20b", "prompt": "a b c", "max_tokens": 5, "min_tokens": 5}
        assert engine.call("POST", "/v1/completions", body)[0] == 200
        ((name, ask),) = sampling.sources(Target(url=engine.address, engines={"engine-0": engine.address}))
        found = ask()
    assert name == "engine-0"
    assert (found.name, found.running, found.waiting, found.generation_tokens) == ("engine-0", 0, 0, 5)
    assert found.prompt_tokens > 0


def test_several_ranks_are_one_engine() -> None:
    page = b"".join(
        b'%b{engine="%d"} %d\n' % (metric, rank, rank + 1) for metric in sampling._ENGINE.values() for rank in (0, 1)
    )
    found = sampling.engine_sample("e", page)
    assert found is not None
    assert (found.running, found.waiting, found.kv_usage, found.preemptions) == (3, 3, 1.5, 3)


@pytest.mark.parametrize("page", [b"", b"<html>", GATEWAY, b'vllm:num_requests_running{engine="0"} many\n'])
def test_what_is_no_engine_s_page_is_no_sample(page: bytes) -> None:
    assert sampling.engine_sample("e", page) is None


def test_control_is_asked_with_its_token() -> None:
    asked: list[tuple[str, str]] = []

    class Control(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(GATEWAY)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Control)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        ((name, ask),) = sampling.sources(Target(url="http://x", metrics_url=address, metrics_token="secret"))
        found = sampling.together(2.5, {name: ask()}, [])
    finally:
        server.shutdown()
        server.server_close()
    assert asked == [("/metrics", "Bearer secret")]
    assert (found.at, found.gateway["vitalis_in_flight"], found.engines) == (2.5, 7.0, [])
    assert "secret" not in repr(Target(url="http://x", metrics_token="secret"))
    assert json.loads(json.dumps(found.gateway)) == found.gateway
