"""The files that deploy it: sound by their tools, and true of the code."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from pydantic_settings import BaseSettings

from service import metrics
from service.app import create_app
from service.cli.main import _parser
from service.settings import ServiceSettings
from worker.queue.jobs import Jobs
from worker.queue.store import Store
from worker.webhooks.settings import WebhookSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(
    f for f in (DEPLOY / "kubernetes").rglob("*.yaml")
    if f.name != "kustomization.yaml" and f != DEPLOY / "kubernetes/overlays/gpu/worker.yaml"
)  # fmt: skip
"""All but the patch, which is no whole object."""
KINDS_OF_OTHERS = {"ScaledObject"}
"""Custom resources, whose schemas are not Kubernetes' own."""
END_S = 10
"""What a worker may need, after its job's grace, to store the picture and to end."""


def documents(file: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(file.read_text()) if d]


def objects() -> Iterator[dict[str, Any]]:
    for file in MANIFESTS:
        yield from documents(file)


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pod of each workload."""
    for made in objects():
        if "template" in made.get("spec", {}):
            yield made["metadata"]["name"], made["spec"]["template"]["spec"]


def container(name: str) -> dict[str, Any]:
    found: dict[str, Any] = dict(pods())[name]["containers"][0]
    return found


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """With its variables' defaults."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DEPLOY / "compose.yaml").read_text())
    read: dict[str, Any] = yaml.safe_load(text)
    return read


def of_ours(compose: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {k: v for k, v in compose["services"].items() if v["image"].startswith("afterimage:")}


def variables() -> set[str]:
    """All that the code reads."""

    def of(settings: type[BaseSettings]) -> set[str]:
        prefix = settings.model_config["env_prefix"]
        return {
            str(field.validation_alias or prefix + name).upper()
            for name, field in settings.model_fields.items()
        }

    sources = [f for d in ("service", "worker", "models") for f in (ROOT / d).rglob("*.py")]
    named = {n for f in sources for n in re.findall(r'"(AFTERIMAGE_[A-Z_]+)"', f.read_text())}
    return of(ServiceSettings) | of(WebhookSettings) | named


def test_the_dockerfile_is_sound() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda f: str(f.relative_to(DEPLOY)))
def test_manifests_follow_kubernetes_schemas(file: Path) -> None:
    for made in documents(file):
        if made["kind"] not in KINDS_OF_OTHERS:
            kubernetes_validate.validate(made, kubernetes_validate.latest_version(), strict=True)


def test_compose_follows_its_specification(compose: dict[str, Any]) -> None:
    read = PyCompose.from_json(json.dumps(compose))
    read.validate()
    read.to_spec()


def test_every_variable_is_one_that_the_code_reads(compose: dict[str, Any]) -> None:
    given = {name for service in of_ours(compose).values() for name in service["environment"]}
    given |= {s for service in of_ours(compose).values() for s in service["secrets"]}
    for made in [*objects(), *documents(DEPLOY / "kubernetes/overlays/gpu/worker.yaml")]:
        given |= set(made.get("data", ()))
        template = made.get("spec", {}).get("template", {}).get("spec", {})
        for part in template.get("containers", ()):
            given |= {e["name"] for e in part.get("env", ())} - {"REDIS_PASSWORD"}
    given |= set(re.findall(r"AFTERIMAGE_[A-Z_]+(?==)", (ROOT / "Dockerfile").read_text()))
    assert len(given) > 6
    assert given <= variables()


@pytest.mark.parametrize("page", ["README.md", "deploy/OPERATING.md"])
def test_pages_name_no_variable_that_the_code_does_not_read(page: str) -> None:
    named = set(re.findall(r"\bAFTERIMAGE_[A-Z_]+\b", (ROOT / page).read_text()))
    assert named and named <= variables() | {"AFTERIMAGE_IMAGE", "AFTERIMAGE_CUDA_IMAGE"}


def test_every_setting_is_explained_to_operators() -> None:
    pages = (ROOT / "README.md").read_text() + (DEPLOY / "OPERATING.md").read_text()
    assert not {name for name in variables() if not re.search(rf"\b{name}\b", pages)}


def test_commands_are_the_command_lines(compose: dict[str, Any]) -> None:
    asked = [service["command"] for service in of_ours(compose).values()]
    asked += [container(name)["args"] for name in ("api", "worker")]
    (default,) = re.findall(r"^CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.M)
    for args in [*asked, json.loads(default)]:
        _parser().parse_args(args)


def test_ports_are_those_that_are_listened_on(compose: dict[str, Any]) -> None:
    http = _parser().parse_args(["serve"]).port
    assert f"\nEXPOSE {http}\n" in (ROOT / "Dockerfile").read_text()
    ports = {p["name"]: p["containerPort"] for p in container("api")["ports"]}
    config = next(o["data"] for o in objects() if o["kind"] == "ConfigMap")
    assert ports == {"http": http, "metrics": int(config["AFTERIMAGE_METRICS_PORT"])}
    api = compose["services"]["api"]
    assert api["ports"] == [f"{http}:{http}"]
    (scraped,) = documents(DEPLOY / "prometheus/prometheus.yml")[0]["scrape_configs"]
    assert {c["port"] for c in scraped["dns_sd_configs"]} == {
        int(api["environment"]["AFTERIMAGE_METRICS_PORT"])
    }


def test_probes_ask_for_paths_that_there_are() -> None:
    api = container("api")
    asked = {api[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness")}
    asked |= {api["readinessProbe"]["httpGet"]["path"]}
    asked |= set(re.findall(r"127\.0\.0\.1:8000(/\w+)", (DEPLOY / "entrypoint.sh").read_text()))
    assert len(asked) == 3
    settings = ServiceSettings(REDIS_URL="redis://none.invalid")
    assert asked <= set(create_app(settings).openapi()["paths"])


@pytest.mark.parametrize(("age_s", "healthy"), [(0, True), (60, False), (None, False)])
def test_a_worker_in_the_image_is_healthy_while_it_says_so(
    tmp_path: Path, age_s: int | None, healthy: bool
) -> None:
    """The entry point itself, which finds role and host where the image has them."""
    script = tmp_path / "entrypoint.sh"
    text = (DEPLOY / "entrypoint.sh").read_text()
    script.write_text(text.replace("/tmp/role", f"{tmp_path}/role"))
    (tmp_path / "role").write_text("worker\n")
    (tmp_path / "alive").mkdir()
    if age_s is not None:
        sign = tmp_path / "alive" / f"{Path('/etc/hostname').read_text().strip()}-7"
        sign.touch()
        os.utime(sign, (time.time() - age_s,) * 2)
    environment = os.environ | {"AFTERIMAGE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(["sh", str(script), "healthy"], env=environment)
    assert (done.returncode == 0) is healthy


@pytest.mark.parametrize(
    "where", [[], ["--host", "0.0.0.0"], ["--host=::"], ["--host", "127.0.0.1"]], ids=str
)
def test_an_api_in_the_image_is_healthy_where_it_listens(tmp_path: Path, where: list[str]) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/livez" else 404)
            self.end_headers()

    class Server(HTTPServer):
        address_family = socket.AF_INET6 if "::" in str(where) else socket.AF_INET

    script = tmp_path / "entrypoint.sh"
    text = (DEPLOY / "entrypoint.sh").read_text()
    script.write_text(text.replace("/tmp/role", f"{tmp_path}/role"))
    with Server(("::1" if "::" in str(where) else "127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = ["serve", *where, "--port", str(server.server_port)]
        (tmp_path / "role").write_text("\n".join(arguments))
        assert subprocess.run(["sh", str(script), "healthy"]).returncode == 0
        server.shutdown()
    assert subprocess.run(["sh", str(script), "healthy"], capture_output=True).returncode != 0


def test_workers_have_time_to_finish(compose: dict[str, Any]) -> None:
    pod = dict(pods())["worker"]
    config = next(o["data"] for o in objects() if o["kind"] == "ConfigMap")
    assert pod["terminationGracePeriodSeconds"] >= int(config["AFTERIMAGE_GRACE_S"]) + END_S
    for name in ("worker", "worker-gpu"):
        service = compose["services"][name]
        grace = int(service["environment"]["AFTERIMAGE_GRACE_S"])
        assert int(service["stop_grace_period"].removesuffix("s")) >= grace + END_S


def test_a_worker_has_the_memory_that_the_largest_picture_takes(compose: dict[str, Any]) -> None:
    needed = 1.5 + 0.25 * ServiceSettings(REDIS_URL="redis://none.invalid").max_pixels / 1e6
    assert float(container("worker")["resources"]["limits"]["memory"].removesuffix("Gi")) > needed
    assert float(compose["services"]["worker"]["mem_limit"].removesuffix("g")) > needed


def test_imported_weights_are_those_of_the_api_and_of_the_workers(compose: dict[str, Any]) -> None:
    (folder,) = re.findall(r"AFTERIMAGE_WEIGHTS_DIR=(\S+)", (ROOT / "Dockerfile").read_text())
    for service in of_ours(compose).values():
        assert f"weights:{folder}" in service["volumes"]


def test_containers_are_confined(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["mem_limit"]
    for service in of_ours(compose).values():
        assert service["tmpfs"] == ["/tmp"]  # where large uploads go
    for _, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        for part in pod["containers"]:
            assert part["securityContext"]["readOnlyRootFilesystem"]
            assert not part["securityContext"]["allowPrivilegeEscalation"]
            assert part["resources"]["limits"]["memory"]
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(part)


def samples(store: Store) -> set[str]:
    """Names of all that `/metrics` can show."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {
        family.name + suffix
        for family in metrics.registry(Jobs(store)).collect()
        for suffix in suffixes.get(family.type, ("",))
    }


@pytest.mark.redis
@pytest.mark.parametrize(
    "file",
    ["prometheus/rules.yaml", "prometheus/rules_test.yaml", "grafana/dashboards/afterimage.json",
     "kubernetes/overlays/keda/scaledobject.yaml"],
)  # fmt: skip
def test_metrics_that_are_named_exist(file: str, store: Store) -> None:
    named = set(re.findall(r"\b(?:afterimage|process)_[a-z_]+\b", (DEPLOY / file).read_text()))
    assert named and named <= samples(store)


@pytest.mark.redis
def test_the_page_names_metrics_that_exist(store: Store) -> None:
    page = (DEPLOY / "OPERATING.md").read_text()
    named = set(re.findall(r"`(afterimage_[a-z_]+)`", page))
    families = {family.name for family in metrics.registry(Jobs(store)).collect()}
    assert named and named <= families


def test_every_alert_is_tested_and_explained() -> None:
    (rules,) = documents(DEPLOY / "prometheus/rules.yaml")
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    (tests,) = documents(DEPLOY / "prometheus/rules_test.yaml")
    fired = {
        case["alertname"]
        for test in tests["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]
    }  # fmt: skip
    assert alerts == fired
    page = (DEPLOY / "OPERATING.md").read_text()
    assert not {alert for alert in alerts if f"| `{alert}` |" not in page}


def test_the_workers_scale_on_queued_and_running_jobs() -> None:
    """On queued jobs alone the scaler would end workers that are busy."""
    (scaled,) = documents(DEPLOY / "kubernetes/overlays/keda/scaledobject.yaml")
    assert scaled["spec"]["scaleTargetRef"]["name"] in dict(pods())
    (trigger,) = scaled["spec"]["triggers"]
    assert {"afterimage_queue_depth", "afterimage_jobs_running"} <= set(
        re.findall(r"\w+", trigger["metadata"]["query"])
    )
