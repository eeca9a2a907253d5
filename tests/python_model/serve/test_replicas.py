"""Two replicas on Ray Serve on one machine: one killed under load loses its running requests, no others."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's own, of its settings
]
httpx = pytest.importorskip("httpx")
if importlib.util.find_spec("ray") is None:
    pytest.skip("replicas need Ray: pip install 'grit-kernels[ray]'", allow_module_level=True)

import torch  # noqa: E402

from python_model import GritLM  # noqa: E402
from python_model.commands import serve as grit_serve  # noqa: E402
from python_model.generate.text import reply  # noqa: E402
from python_model.rag.index import add_documents, open_index  # noqa: E402
from python_model.rag.modes import Document  # noqa: E402
from tests.python_model.ray_cluster import own_cluster  # noqa: E402
from tests.python_model.serve.server import wait_until  # noqa: E402

CHAT = "/v1/chat/completions"


def question(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 20, **options}


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GritLM:
    return GritLM(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def url(checkpoint: Path, model: GritLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`grit serve --ray --replicas 2` on a cluster of this machine."""
    folder = tmp_path_factory.mktemp("replicas")
    for name in ("rivers", "cities"):
        add_documents(open_index(str(folder / name), model), model, [Document("d", f"A text about {name}.")])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with own_cluster(num_cpus=4) as ray:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "python_model.cli", "serve", "--ray", "--replicas", "2", "--port", str(port)]
        command += ["--model", str(checkpoint), "--dtype", "float32", "--kv-tokens", "2000", "--max-step-tokens", "128"]
        command += ["--index", str(folder / "rivers"), "--index", str(folder / "cities"), "--threads", "1"]
        log = (folder / "log").open("w")
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                return bool(httpx.get(f"{address}/ready", timeout=5).status_code == 200)
            except httpx.TransportError:
                return False

        try:
            wait_until(ready, 240, "the replicas did not start")
            wait_until(lambda: running() == 2, 120, "there are no two replicas")
            yield address
        finally:
            process.terminate()
            process.wait(60)


def replicas() -> list[tuple[str, str]]:
    """Name and namespace of the living replicas' actors."""
    import ray

    found = ray.util.list_named_actors(all_namespaces=True)
    return [(a["name"], a["namespace"]) for a in found if a["name"].startswith("SERVE_REPLICA::grit")]


def running() -> int:
    """How many replicas take requests."""
    from ray import serve

    application = serve.status().applications.get("grit")
    return 0 if application is None else application.deployments["grit"].replica_states.get("RUNNING", 0)


def test_the_queue_length_decides_how_many_replicas_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own policy, with the deployment that the command line makes; no cluster is started."""
    from ray import serve
    from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy

    started: list[Any] = []
    monkeypatch.setattr(serve, "start", lambda **options: None)
    monkeypatch.setattr(serve, "run", lambda application, **options: started.append(application))
    command = ["--ray", "--replicas", "2:9", "--requests-per-replica", "3", "--device", "cpu"]
    grit_serve.COMMAND.run(grit_serve.COMMAND.arguments(command))
    (application,) = started
    config = application._bound_deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.get_target_ongoing_requests()) == (2, 9, 3)
    assert config.policy.get_policy().__name__ == replica_queue_length_autoscaling_policy.__name__
    for requests, wanted in ((6, 2), (12, 4), (27, 9), (3, 1)):  # computed and waiting, with two replicas
        state = SimpleNamespace(
            current_num_replicas=2, target_num_replicas=2, total_num_requests=requests, config=config, policy_state={}
        )
        assert replica_queue_length_autoscaling_policy(state)[0] == wanted


def test_replicas_share_the_load_and_answer_alike(url: str, model: GritLM) -> None:
    expected = reply(model, ["What is a river?"], max_new_tokens=20)
    with ThreadPoolExecutor(16) as pool:
        post = lambda _: httpx.post(f"{url}{CHAT}", json=question("What is a river?"), timeout=60)  # noqa: E731
        found = list(pool.map(post, range(60)))
    assert all(r.json()["choices"][0]["message"]["content"] == expected for r in found)
    assert len({r.headers["x-served-by"] for r in found}) == 2


def test_requests_to_an_index_go_where_it_was_asked_before(url: str) -> None:
    for index in ("rivers", "cities"):
        headers = {"serve_multiplexed_model_id": index}

        def ask(_: int, index: str = index, headers: dict[str, str] = headers) -> str:
            body = {"question": "What is a river?", "index": index, "max_tokens": 4}
            found = httpx.post(f"{url}/v1/rag", json=body, headers=headers, timeout=60)
            assert found.status_code == 200
            return str(found.headers["x-served-by"])

        ask(0)
        time.sleep(2)  # until the proxy has been told
        served = [ask(i) for i in range(20)]
        assert len(set(served)) == 1, f"{index}: {served}"


def test_a_killed_replica_loses_its_running_requests_and_no_others(url: str, model: GritLM) -> None:
    import ray

    expected = reply(model, ["What is a city?"], max_new_tokens=200)
    statuses: list[tuple[float, int, str]] = []

    def ask(_: int) -> None:
        start = time.monotonic()
        try:
            found = httpx.post(f"{url}{CHAT}", json=question("What is a city?", max_tokens=200), timeout=120)
        except httpx.TransportError:
            statuses.append((start, 0, ""))
            return
        text = found.json()["choices"][0]["message"]["content"] if found.status_code == 200 else ""
        statuses.append((start, found.status_code, text))

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(ask, i) for i in range(60)]
        wait_until(lambda: len(statuses) > 5, 120)
        name, namespace = replicas()[0]
        killed = time.monotonic()
        ray.kill(ray.get_actor(name, namespace=namespace))  # the process, without a farewell
        for job in jobs:
            job.result()
    lost = [start for start, status, _ in statuses if status != 200]
    assert len(lost) <= 8, "more were lost than were open"
    assert all(start <= killed + 1 for start in lost), "a request that came later was lost"
    assert all(text == expected for _, status, text in statuses if status == 200)
    assert len(statuses) == 60
    wait_until(lambda: running() == 2 and name not in dict(replicas()), 180, "no other replica has come")
