"""Files for deployment: valid by their own tools, and consistent with the code."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address, ip_network
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
from service.collector import QueueCollector
from service.settings import ServiceSettings
from worker.queue import object_config
from worker.queue.jobs import Jobs
from worker.queue.store import Store
from worker.webhooks.settings import WebhookSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUSTOMIZATIONS = sorted((DEPLOY / "kubernetes").rglob("kustomization.yaml"))
PATCHES = sorted(
    file.parent / patch["path"]
    for file in KUSTOMIZATIONS
    for patch in yaml.safe_load(file.read_text()).get("patches", ())
)
"""Parts of objects, which kustomize merges with them."""
MANIFESTS = sorted(
    f for f in (DEPLOY / "kubernetes").rglob("*.yaml") if f not in (*KUSTOMIZATIONS, *PATCHES)
)
"""All complete objects."""
CUSTOM_KINDS = {"ScaledObject"}
"""Custom resources, which have no Kubernetes schema."""
SHUTDOWN_S = 10
"""Time that a worker may need after the grace period, to store the picture and exit."""


def documents(file: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(file.read_text()) if d]


def objects() -> Iterator[dict[str, Any]]:
    for file in MANIFESTS:
        yield from documents(file)


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pod of each workload."""
    for manifest in objects():
        if "template" in manifest.get("spec", {}):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


def container(name: str) -> dict[str, Any]:
    first: dict[str, Any] = dict(pods())[name]["containers"][0]
    return first


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The compose file with the defaults of its variables."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DEPLOY / "compose.yaml").read_text())
    parsed: dict[str, Any] = yaml.safe_load(text)
    return parsed


def merged(base: Any, override: Any) -> Any:
    """A compose file with another one on top: lists are joined, other values replaced."""
    if isinstance(base, dict) and isinstance(override, dict):
        both = {k: merged(base[k], override[k]) for k in base.keys() & override.keys()}
        return base | override | both
    if isinstance(base, list) and isinstance(override, list):
        return base + override
    return override


@pytest.fixture(scope="module")
def compose_with_stores(compose: dict[str, Any]) -> dict[str, Any]:
    (override,) = documents(DEPLOY / "compose.stores.yaml")
    both: dict[str, Any] = merged(compose, override)
    return both


def our_services(compose: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {k: v for k, v in compose["services"].items() if v["image"].startswith("afterimage:")}


def variables() -> set[str]:
    """Names of all environment variables that the code reads."""

    def names_of(settings: type[BaseSettings]) -> set[str]:
        prefix = settings.model_config["env_prefix"]
        return {
            str(field.validation_alias or prefix + name).upper()
            for name, field in settings.model_fields.items()
        }

    sources = [f for d in ("service", "worker", "models") for f in (ROOT / d).rglob("*.py")]
    named = {n for f in sources for n in re.findall(r'"(AFTERIMAGE_[A-Z_]+)"', f.read_text())}
    return names_of(ServiceSettings) | names_of(WebhookSettings) | named


def test_hadolint_accepts_the_dockerfile() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda f: str(f.relative_to(DEPLOY)))
def test_manifests_follow_kubernetes_schemas(file: Path) -> None:
    for manifest in documents(file):
        if manifest["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(
                manifest, kubernetes_validate.latest_version(), strict=True
            )


def test_compose_follows_its_specification(
    compose: dict[str, Any], compose_with_stores: dict[str, Any]
) -> None:
    for file in (compose, compose_with_stores):
        parsed = PyCompose.from_json(json.dumps(file))
        parsed.validate()
        parsed.to_spec()


@pytest.mark.parametrize("file", KUSTOMIZATIONS, ids=lambda f: f.parent.name)
def test_kustomizations_name_files_that_exist_and_every_file_is_named(file: Path) -> None:
    (kustomization,) = documents(file)
    named = {p["path"] for p in kustomization.get("patches", ())}
    named |= {r for r in kustomization.get("resources", ()) if r.endswith(".yaml")}
    assert named | {"kustomization.yaml"} == {f.name for f in file.parent.glob("*.yaml")}
    folders = [r for r in kustomization.get("resources", ()) if not r.endswith(".yaml")]
    for folder in [*folders, *kustomization.get("components", ())]:
        assert (file.parent / folder / "kustomization.yaml").exists(), folder


def test_the_images_contain_the_extras_that_the_makefile_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"^EXTRAS \?= (.+)$", (ROOT / "Makefile").read_text(), re.M)
    wanted = {
        re.split("[><=]", requirement)[0]
        for extra in extras.split() for requirement in project["optional-dependencies"][extra]
    }  # fmt: skip
    assert extras.split() == ["stores", "otel"] and len(wanted) > 2
    for target in ("cpu", "cuda"):
        lock = (DEPLOY / f"requirements-{target}.lock").read_text()
        assert wanted <= set(re.findall(r"^([\w.-]+)==", lock, re.M))


def test_every_overlay_is_checked_by_the_script() -> None:
    (loop,) = re.findall(r"^for overlay in (.*); do$", (DEPLOY / "check.sh").read_text(), re.M)
    overlays = {f.parent.name for f in KUSTOMIZATIONS if f.parent.parent.name == "overlays"}
    assert set(loop.split()) == overlays


def test_every_process_has_the_stores_and_no_other_pod_may_reach_them(
    compose_with_stores: dict[str, Any], tmp_path: Path
) -> None:
    services = our_services(compose_with_stores)
    for service in services.values():
        assert service["environment"]["AFTERIMAGE_STORES"] == "/run/secrets/stores.toml"
        assert "stores.toml" in service["secrets"] and service["env_file"] == ["secrets/stores.env"]
    folder = DEPLOY / "kubernetes/components/stores"
    (config,) = documents(folder / "stores.yaml")
    for name in ("api", "worker"):
        (patch,) = documents(folder / f"{name}.yaml")
        assert patch["metadata"]["name"] == name
        pod = patch["spec"]["template"]["spec"]
        (part,), (volume,) = pod["containers"], pod["volumes"]
        assert volume["configMap"]["name"] == config["metadata"]["name"]
        (path,) = [e["value"] for e in part["env"] if e["name"] == "AFTERIMAGE_STORES"]
        assert path == f"{part['volumeMounts'][0]['mountPath']}/{[*config['data']][0]}"
        assert part["envFrom"][:-1] == container(name)["envFrom"]  # the patch replaces the list
        assert patch["spec"]["template"]["metadata"]["labels"] == {"stores-client": "true"}
    file = tmp_path / "stores.toml"
    file.write_text(config["data"]["stores.toml"])
    assert not object_config.read(file)["incoming"].write


def test_policies_of_stores_open_no_private_address() -> None:
    components = DEPLOY / "kubernetes/components"
    (policy,) = documents(components / "stores/network.yaml")
    spec = policy["spec"]
    assert spec["podSelector"] == {"matchLabels": {"stores-client": "true"}}
    assert spec["policyTypes"] == ["Egress"]
    (rule,) = spec["egress"]
    assert rule["ports"] == [{"port": 443}]
    for block in (to["ipBlock"] for to in rule["to"]):
        closed = [ip_network(text) for text in block["except"]]
        for text in PRIVATE:
            address = ip_address(text)
            if address.version == ip_network(block["cidr"]).version:
                assert any(address in network for network in closed), text
    (identity,) = documents(components / "workload-identity/network.yaml")
    opened = [to["ipBlock"]["cidr"] for rule in identity["spec"]["egress"] for to in rule["to"]]
    assert all(ip_network(text).is_link_local and text.endswith("/32") for text in opened)
    assert identity["spec"]["podSelector"] == spec["podSelector"]


PRIVATE = ("10.0.0.1", "100.64.1.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.1.1",
           "::1", "fd00::1", "fe80::1")  # fmt: skip


def test_the_code_reads_every_variable_that_is_set(compose_with_stores: dict[str, Any]) -> None:
    services = our_services(compose_with_stores).values()
    names = {name for service in services for name in service["environment"]}
    names |= {s for service in services for s in service["secrets"]} - {"stores.toml"}
    for manifest in [*objects(), *(d for patch in PATCHES for d in documents(patch))]:
        names |= set(manifest.get("data", ())) - {"stores.toml"}
        template = manifest.get("spec", {}).get("template", {}).get("spec", {})
        for part in template.get("containers", ()):
            names |= {e["name"] for e in part.get("env", ())} - {"REDIS_PASSWORD"}
    names |= set(re.findall(r"AFTERIMAGE_[A-Z_]+(?==)", (ROOT / "Dockerfile").read_text()))
    assert len(names) > 6
    assert names <= variables()


@pytest.mark.parametrize("page", ["README.md", "deploy/OPERATING.md"])
def test_the_code_reads_every_variable_that_the_docs_name(page: str) -> None:
    named = set(re.findall(r"\bAFTERIMAGE_[A-Z_]+\b", (ROOT / page).read_text()))
    assert named and named <= variables() | {"AFTERIMAGE_IMAGE", "AFTERIMAGE_CUDA_IMAGE"}


def test_the_docs_name_every_setting() -> None:
    pages = (ROOT / "README.md").read_text() + (DEPLOY / "OPERATING.md").read_text()
    assert not {name for name in variables() if not re.search(rf"\b{name}\b", pages)}


def test_the_command_line_accepts_every_command(compose: dict[str, Any]) -> None:
    commands = [service["command"] for service in our_services(compose).values()]
    commands += [container(name)["args"] for name in ("api", "worker")]
    (default,) = re.findall(r"^CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.M)
    for args in [*commands, json.loads(default)]:
        _parser().parse_args(args)


def test_ports_are_those_of_the_servers(compose: dict[str, Any]) -> None:
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


def test_probes_use_paths_that_exist() -> None:
    api = container("api")
    paths = {api[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness")}
    paths |= {api["readinessProbe"]["httpGet"]["path"]}
    paths |= set(re.findall(r"127\.0\.0\.1:8000(/\w+)", (DEPLOY / "entrypoint.sh").read_text()))
    assert len(paths) == 3
    settings = ServiceSettings(REDIS_URL="redis://none.invalid")
    assert paths <= set(create_app(settings).openapi()["paths"])


@pytest.mark.parametrize(("age_s", "healthy"), [(0, True), (60, False), (None, False)])
def test_the_health_check_of_a_worker_needs_a_recent_liveness_file(
    tmp_path: Path, age_s: int | None, healthy: bool
) -> None:
    """Runs the image's entry point, with its role file in a temporary folder."""
    script = tmp_path / "entrypoint.sh"
    text = (DEPLOY / "entrypoint.sh").read_text()
    script.write_text(text.replace("/tmp/role", f"{tmp_path}/role"))
    (tmp_path / "role").write_text("worker\n")
    (tmp_path / "alive").mkdir()
    if age_s is not None:
        file = tmp_path / "alive" / f"{Path('/etc/hostname').read_text().strip()}-7"
        file.touch()
        os.utime(file, (time.time() - age_s,) * 2)
    environment = os.environ | {"AFTERIMAGE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(["sh", str(script), "healthy"], env=environment)
    assert (done.returncode == 0) is healthy


@pytest.mark.parametrize(
    "options", [[], ["--host", "0.0.0.0"], ["--host=::"], ["--host", "127.0.0.1"]], ids=str
)
def test_the_health_check_of_the_api_uses_its_host_and_port(
    tmp_path: Path, options: list[str]
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/livez" else 404)
            self.end_headers()

    class Server(HTTPServer):
        address_family = socket.AF_INET6 if "::" in str(options) else socket.AF_INET

    script = tmp_path / "entrypoint.sh"
    text = (DEPLOY / "entrypoint.sh").read_text()
    script.write_text(text.replace("/tmp/role", f"{tmp_path}/role"))
    with Server(("::1" if "::" in str(options) else "127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = ["serve", *options, "--port", str(server.server_port)]
        (tmp_path / "role").write_text("\n".join(arguments))
        assert subprocess.run(["sh", str(script), "healthy"]).returncode == 0
        server.shutdown()
    assert subprocess.run(["sh", str(script), "healthy"], capture_output=True).returncode != 0


def test_workers_are_killed_only_after_their_grace_period(compose: dict[str, Any]) -> None:
    pod = dict(pods())["worker"]
    config = next(o["data"] for o in objects() if o["kind"] == "ConfigMap")
    assert pod["terminationGracePeriodSeconds"] >= int(config["AFTERIMAGE_GRACE_S"]) + SHUTDOWN_S
    for name in ("worker", "worker-gpu"):
        service = compose["services"][name]
        grace = int(service["environment"]["AFTERIMAGE_GRACE_S"])
        assert int(service["stop_grace_period"].removesuffix("s")) >= grace + SHUTDOWN_S


def test_a_worker_has_enough_memory_for_the_largest_picture(compose: dict[str, Any]) -> None:
    needed = 1.5 + 0.25 * ServiceSettings(REDIS_URL="redis://none.invalid").max_pixels / 1e6
    assert float(container("worker")["resources"]["limits"]["memory"].removesuffix("Gi")) > needed
    assert float(compose["services"]["worker"]["mem_limit"].removesuffix("g")) > needed


def test_the_api_and_the_workers_share_imported_weights(compose: dict[str, Any]) -> None:
    (folder,) = re.findall(r"AFTERIMAGE_WEIGHTS_DIR=(\S+)", (ROOT / "Dockerfile").read_text())
    for service in our_services(compose).values():
        assert f"weights:{folder}" in service["volumes"]


def test_containers_are_read_only_and_limited(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["mem_limit"]
    for service in our_services(compose).values():
        assert service["tmpfs"] == ["/tmp"]  # where large uploads go
    for _, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        for part in pod["containers"]:
            assert part["securityContext"]["readOnlyRootFilesystem"]
            assert not part["securityContext"]["allowPrivilegeEscalation"]
            assert part["resources"]["limits"]["memory"]
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(part)


def samples(store: Store) -> set[str]:
    """Names of all samples that `/metrics` can expose."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {
        family.name + suffix
        for family in metrics.registry(Jobs(store)).collect()
        for suffix in suffixes.get(family.type, ("",))
    }


def promtool(*arguments: str) -> None:
    """Run promtool of the machine, or of the environment."""
    folders = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    program = shutil.which("promtool", path=folders)
    if program is None:
        pytest.fail("promtool is missing: `make promtool`, or install Prometheus", pytrace=False)
    done = subprocess.run(
        [program, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_their_cases_pass() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "rules.yaml")
    promtool("test", "rules", "rules_test.yaml")


@pytest.mark.redis
def test_rules_and_dashboards_use_labels_that_exist(store: Store) -> None:
    """Of the metrics that come from Redis, which has all labels without any request."""
    labels: dict[str, set[tuple[str, str]]] = {}
    for family in QueueCollector(Jobs(store)).collect():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels.items())
    dashboard = json.loads((DEPLOY / "grafana/dashboards/afterimage.json").read_text())
    (rules,) = documents(DEPLOY / "prometheus/rules.yaml")
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    queries += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    checked = 0
    for query in queries:
        for metric, selector in re.findall(r"(afterimage_\w+)\{([^}]*)\}", query):
            for label, values in re.findall(r'(\w+)=~?"([^"]*)"', selector):
                if any(name == label for name, _ in labels.get(metric, ())):
                    assert {(label, value) for value in values.split("|")} <= labels[metric]
                    checked += 1
    assert checked >= 2


@pytest.mark.redis
def test_the_dashboard_shows_every_metric_of_batches_stores_and_queues(store: Store) -> None:
    text = (DEPLOY / "grafana/dashboards/afterimage.json").read_text()
    names = {
        family.name
        for family in metrics.registry(Jobs(store)).collect()
        if re.match("afterimage_(batch|queue|targets|results)", family.name)
    }
    assert len(names) > 8
    assert not {name for name in names if name not in text}


@pytest.mark.redis
@pytest.mark.parametrize(
    "file",
    ["prometheus/rules.yaml", "prometheus/rules_test.yaml", "grafana/dashboards/afterimage.json",
     "kubernetes/overlays/keda/scaledobject.yaml"],
)  # fmt: skip
def test_rules_and_dashboards_use_metrics_that_exist(file: str, store: Store) -> None:
    named = set(re.findall(r"\b(?:afterimage|process)_[a-z_]+\b", (DEPLOY / file).read_text()))
    assert named and named <= samples(store)


@pytest.mark.redis
def test_the_docs_name_metrics_that_exist(store: Store) -> None:
    page = (DEPLOY / "OPERATING.md").read_text()
    named = set(re.findall(r"`(afterimage_[a-z_]+)`", page))
    families = metrics.registry(Jobs(store)).collect()
    histograms = {family.name for family in families if family.type == "histogram"}
    assert named and named <= samples(store) | histograms


def test_every_alert_is_tested_and_documented() -> None:
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


def test_workers_scale_on_queued_and_running_jobs() -> None:
    """With queued jobs alone the scaler would stop busy workers."""
    (scaled,) = documents(DEPLOY / "kubernetes/overlays/keda/scaledobject.yaml")
    assert scaled["spec"]["scaleTargetRef"]["name"] in dict(pods())
    (trigger,) = scaled["spec"]["triggers"]
    assert {"afterimage_queue_depth", "afterimage_jobs_running"} <= set(
        re.findall(r"\w+", trigger["metadata"]["query"])
    )
