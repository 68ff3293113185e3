"""Kubernetes and SaladCloud manifests: valid by schema, and of one mind with the images and the settings."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from fanlight.health import TIMEOUT_S
from services.gateway.adapters.jwt_identity import read_issuers

ROOT = Path(__file__).parents[3]
BASE = ROOT / "deploy" / "kubernetes" / "base"
CLUSTER = ROOT / "deploy" / "kubernetes" / "cluster"
MANIFESTS = [
    path for folder in (BASE, CLUSTER) for path in sorted(folder.glob("*.yaml")) if path.stem != "kustomization"
]
PORTS = {"gateway": 50051, "preprocessor": 50052, "diffusion": 50053}
SALAD = ROOT / "deploy" / "salad"
SALAD_GROUPS = [path for path in sorted(SALAD.glob("*.json")) if path.stem != "schema"]
WORKERS = {"preprocessor", "diffusion"}
# SaladCloud's own values: initial delay, period, timeout, successes and failures that count.
SALAD_PROBES = {"startup": (0, 3, 10, 2, 15), "liveness": (0, 10, 30, 1, 3), "readiness": (0, 1, 1, 1, 3)}
PROBE_KEYS = ("initial_delay_seconds", "period_seconds", "timeout_seconds", "success_threshold", "failure_threshold")


def documents(*paths):
    return [document for path in paths for document in yaml.safe_load_all(path.read_text())]


ALL = documents(*MANIFESTS)
WORKLOADS = [each for each in ALL if each["kind"] in ("Deployment", "StatefulSet")]


def named(documents):
    return pytest.mark.parametrize("manifest", documents, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")


@named(ALL)
def test_every_manifest_is_valid(manifest):
    kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_the_check_sees_a_wrong_manifest():
    wrong = json.loads(json.dumps(WORKLOADS[0]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


@pytest.mark.parametrize("folder", [BASE, CLUSTER], ids=lambda folder: folder.name)
def test_a_kustomization_names_every_manifest_beside_it(folder):
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == {name for name in kustomization["resources"] if not name.startswith("..")}


@named(WORKLOADS)
def test_every_workload_has_probes_resources_and_locked_containers(manifest):
    pod = manifest["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    for container in pod["containers"]:
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert container["resources"]["limits"]["memory"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@named(WORKLOADS)
def test_every_workload_has_a_disruption_budget_that_selects_its_pods(manifest):
    labels = manifest["spec"]["template"]["metadata"]["labels"]
    budgets = [each["spec"]["selector"]["matchLabels"] for each in ALL if each["kind"] == "PodDisruptionBudget"]
    assert sum(selector.items() <= labels.items() for selector in budgets) == 1


@named([each for each in WORKLOADS if each["metadata"]["name"] in PORTS])
def test_probes_ask_the_port_that_the_image_listens_on(manifest):
    name = manifest["metadata"]["name"]
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    for kind in ("startup", "liveness", "readiness"):
        probe = container[f"{kind}Probe"]
        if name in WORKERS:
            assert probe["grpc"] == {"port": PORTS[name], "service": kind}
        else:
            # The gateway speaks TLS, and Kubernetes' own probe does not.
            assert probe["exec"]["command"] == ["python3", "-m", "fanlight.health", "--service", kind]
            assert probe["timeoutSeconds"] > TIMEOUT_S
    assert f"FANLIGHT_{name.upper()}_GRPC=[::]:{PORTS[name]}" in (ROOT / "docker" / "Dockerfile").read_text()


@named(WORKLOADS)
def test_a_pod_has_longer_to_stop_than_its_service_gives_running_calls(manifest):
    drain_s = 30.0
    assert manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain_s


@named(WORKLOADS)
def test_what_a_pod_mounts_and_reads_is_there(manifest):
    pod = manifest["spec"]["template"]["spec"]
    volumes = {each["name"] for each in pod.get("volumes", ())}
    claims = {each["metadata"]["name"] for each in manifest["spec"].get("volumeClaimTemplates", ())}
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    made = {each["name"] for each in kustomization["configMapGenerator"]}
    accounts = {each["metadata"]["name"] for each in ALL if each["kind"] == "ServiceAccount"}
    assert pod.get("serviceAccountName", "default") in accounts | {"default"}
    for container in pod["containers"]:
        assert {each["name"] for each in container["volumeMounts"]} <= volumes | claims
        read = {each["configMapRef"]["name"] for each in container.get("envFrom", ()) if "configMapRef" in each}
        assert read <= made


def known_settings():
    return set(re.findall(r"`(FANLIGHT_\w+)`", (ROOT / "docs" / "settings.md").read_text()))


def settings_in(text):
    return set(re.findall(r"\bFANLIGHT_[A-Z0-9_]+", text))


@pytest.mark.parametrize(
    "path", [*MANIFESTS, BASE / "kustomization.yaml", ROOT / "deploy/salad/diffusion.json"], ids=str
)
def test_every_setting_that_a_manifest_names_is_one(path):
    assert settings_in(path.read_text()) <= known_settings()


def test_every_setting_that_the_compose_file_gives_is_one():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    given = {name for service in services.values() for name in service["environment"]}
    assert given <= known_settings() | {"FANLIGHT_GATEWAY", "FANLIGHT_TOKEN"}


def test_every_service_of_the_compose_file_is_locked_limited_and_watched():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert services.keys() == PORTS.keys() | {"invite"}
    for name, service in services.items():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert {"mem_limit", "cpus", "pids_limit", "stop_grace_period", "volumes"} <= service.keys()
        if name == "invite":
            assert service["healthcheck"] == {"disable": True}
            assert service["restart"] == "on-failure"
            continue
        assert service["healthcheck"]["test"] == ["CMD", "python3", "-m", "fanlight.health", "--service", "readiness"]


def test_the_health_command_of_the_containers_is_there():
    done = subprocess.run(
        [sys.executable, "-m", "fanlight.health", "--help"], capture_output=True, text=True, check=True
    )
    assert "HOST:PORT" in done.stdout


def pod_environment(manifest):
    """The names of settings that a pod gets, and the names of the Secrets that it reads."""
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    literals = {each["name"]: each.get("literals", []) for each in kustomization["configMapGenerator"]}
    pod = manifest["spec"]["template"]["spec"]
    names, secrets = set(), set()
    for container in pod["containers"]:
        names |= {each["name"] for each in container.get("env", ())}
        for source in container.get("envFrom", ()):
            if "configMapRef" in source:
                names |= {each.split("=")[0] for each in literals[source["configMapRef"]["name"]]}
            else:
                secrets.add(source["secretRef"]["name"])
    secrets |= {volume["secret"]["secretName"] for volume in pod.get("volumes", ()) if "secret" in volume}
    return names, secrets


def environments_of_nodes():
    """By manifest: the names that a worker gets there."""
    found = {}
    for manifest in WORKLOADS:
        name = manifest["metadata"]["name"]
        if name in WORKERS:
            names, secrets = pod_environment(manifest)
            found[f"kubernetes {name}"] = names | secrets
    for name, service in yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].items():
        if name in WORKERS:
            found[f"compose {name}"] = set(service["environment"]) | set(service.get("env_file", ()))
    for path in SALAD_GROUPS:
        group = json.loads(path.read_text())
        found[f"salad {path.stem}"] = set(group["container"]["environment_variables"])
    return found


NODES = environments_of_nodes()


@pytest.mark.parametrize("names", NODES.values(), ids=NODES.keys())
def test_a_node_gets_what_it_joins_with_and_no_secret_beside_it(names):
    proofs = {"FANLIGHT_WORKER_JOIN_CODE_FILE", "FANLIGHT_WORKER_IDENTITY", "FANLIGHT_WORKER_IDENTITY_TOKEN_FILE"}
    assert len(names & proofs) == 1
    secrets = {name for name in names if re.search("token|secret|key|password|credential|s3|tls", name, re.IGNORECASE)}
    assert secrets <= proofs | {"FANLIGHT_TLS_CA_FILE"}
    assert not [name for name in names if name.startswith(("AWS_", "FANLIGHT_GATEWAY_", "FANLIGHT_CLIENT_"))]


def test_a_gateway_has_the_settings_of_its_certificate():
    (gateway,) = [each for each in WORKLOADS if each["metadata"]["name"] == "gateway"]
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["gateway"]["environment"]
    for names in (pod_environment(gateway)[0], set(compose)):
        assert {"FANLIGHT_TLS_CERT_FILE", "FANLIGHT_TLS_KEY_FILE"} <= names


def test_nothing_is_deployed_in_plain_text():
    for path in [*MANIFESTS, *SALAD_GROUPS, BASE / "kustomization.yaml", ROOT / "compose.yaml"]:
        assert "FANLIGHT_PLAIN_TEXT" not in path.read_text()


@pytest.mark.parametrize("file", [BASE / "issuers.toml", SALAD / "issuers.toml"], ids=str)
def test_the_issuers_that_a_gateway_is_given_are_read(file):
    (rule,) = read_issuers(file)
    assert rule.required_claims


def test_a_pods_token_is_what_the_gateway_of_the_cluster_takes():
    (rule,) = read_issuers(BASE / "issuers.toml")
    namespace = yaml.safe_load((CLUSTER / "kustomization.yaml").read_text())["namespace"]
    assert rule.claims["kubernetes.io/namespace"] == (namespace,)
    for manifest in WORKLOADS:
        if manifest["metadata"]["name"] in WORKERS:
            pod = manifest["spec"]["template"]["spec"]
            assert rule.claims["kubernetes.io/serviceaccount/name"] == (pod["serviceAccountName"],)
            token, path = projected_token(pod)
            assert (token["audience"],) == rule.audience
            settings = (BASE / "kustomization.yaml").read_text()
            assert f"FANLIGHT_WORKER_IDENTITY_TOKEN_FILE={path}" in settings


def projected_token(pod):
    """The token that a pod gets for the gateway, and its path."""
    (volume,) = [each for each in pod["volumes"] if "projected" in each]
    (source,) = volume["projected"]["sources"]
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == volume["name"]]
    token = source["serviceAccountToken"]
    return token, f"{mount['mountPath']}/{token['path']}"


def test_the_workers_of_the_compose_file_read_the_code_that_is_written_for_them():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    command, written = services["invite"]["command"], services["invite"]["volumes"]
    assert command[command.index("--out") + 1] == "/data/code"
    assert "join:/data" in written
    for name in WORKERS:
        assert "join:/join:ro" in services[name]["volumes"]
        assert services[name]["environment"]["FANLIGHT_WORKER_JOIN_CODE_FILE"] == "/join/code"
        assert not [each for each in services[name]["volumes"] if each.startswith("gateway-data")]


def test_no_file_for_nodes_names_the_operators_token():
    files = [path for path in (ROOT / "deploy").rglob("*") if path.is_file() and path.stem in WORKERS]
    assert {path.stem for path in files} == WORKERS
    assert not [path for path in files if "CLIENT_TOKEN" in path.read_text() or "AWS_" in path.read_text()]


def test_no_command_of_the_docs_gives_a_worker_the_operators_token():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "SECURITY.md"]:
        for command in re.findall(r"^podman run(?:.*\\\n)*.*$", page.read_text(), re.MULTILINE):
            if "FANLIGHT_WORKER_GATEWAY" in command:
                assert "FANLIGHT_CLIENT_TOKEN" not in command


def salad_group():
    return json.loads((SALAD / "diffusion.json").read_text())


def salad_problems(group):
    schema = json.loads((SALAD / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return [error.json_path for error in jsonschema.Draft202012Validator(schema).iter_errors(group)]


def test_the_salad_group_is_valid():
    assert salad_problems(salad_group()) == []


def test_the_check_sees_a_wrong_salad_group():
    group = salad_group()
    group["container"]["resources"]["memory"] = 100
    group["startup_probe"]["failure_threshold"] = 21
    group["livenes_probe"] = {}
    assert sorted(salad_problems(group)) == [
        "$",
        "$.container.resources.memory",
        "$.startup_probe.failure_threshold",
    ]


def test_salad_probes_ask_the_port_of_the_image_as_often_as_the_platform_does():
    group = salad_group()
    for kind, values in SALAD_PROBES.items():
        probe = group[f"{kind}_probe"]
        assert probe["grpc"] == {"service": kind, "port": PORTS["diffusion"]}
        assert tuple(probe[key] for key in PROBE_KEYS) == values


def test_the_overlay_names_every_image_and_nothing_else():
    overlay = yaml.safe_load((CLUSTER / "kustomization.yaml").read_text())
    used = {c["image"] for each in WORKLOADS for c in each["spec"]["template"]["spec"]["containers"]}
    assert {each["name"] for each in overlay["images"]} == used
    assert all(each["newName"] and each["newTag"] for each in overlay["images"])


@pytest.mark.parametrize("folder", [BASE, CLUSTER], ids=lambda folder: folder.name)
def test_a_kustomization_says_only_what_kustomize_knows(folder):
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert kustomization["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    assert kustomization["kind"] == "Kustomization"
    known = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "images"}
    assert kustomization.keys() <= known
    for made in kustomization.get("configMapGenerator", ()):
        assert made.keys() <= {"name", "literals", "files"}
        assert all("=" in each for each in made.get("literals", ()))
        assert all((folder / each).is_file() for each in made.get("files", ()))
    for each in kustomization["resources"]:
        assert (folder / each).exists()


@pytest.mark.skipif(shutil.which("kustomize") is None, reason="kustomize is not installed")
def test_kustomize_renders_the_overlay_and_all_of_it_is_valid():
    done = subprocess.run(["kustomize", "build", CLUSTER], capture_output=True, text=True, check=True)
    rendered = list(yaml.safe_load_all(done.stdout))
    for each in rendered:
        kubernetes_validate.validate(each, "1.33", strict=True)
    kinds = {each["kind"] for each in rendered}
    assert {"Deployment", "StatefulSet", "Service", "ConfigMap", "PodDisruptionBudget", "Namespace"} <= kinds
