"""The files that start real clusters fit the schemas of the programs that read them."""

import base64
import configparser
import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.servers import end_processes, free_port, is_listening, start_server

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
LAUNCHER = ROOT / "ray_cluster.yaml"
MANIFESTS = [path for path in sorted(DEPLOY.rglob("*.yaml")) if path.name != "skypilot.yaml"]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def pinned(package: str) -> str:
    """Return the only version of a package that constraints.txt allows."""
    match = re.search(rf"^{re.escape(package)}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match, f"constraints.txt does not pin {package}"
    return match[1]


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def all_values(tree: Any) -> list[Any]:
    """Return the leaves of a tree of dicts and lists."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in all_values(value)]
    return [tree]


def definition(kind: str) -> dict[str, Any]:
    """Return the schema of a kind of KubeRay's resources."""
    schema = yaml.safe_load((Path(__file__).parent / "kuberay_schema.yaml").read_text())
    return {"$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]}


def all_documents(kind: str) -> dict[str, dict[str, Any]]:
    """Return every document of a kind in the manifests by its name."""
    return {d["metadata"]["name"]: d for path in MANIFESTS for d in documents(path) if d["kind"] == kind}


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    """Return ray_cluster.yaml with the defaults of Ray's launcher, after Ray's own checks."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(LAUNCHER.read_text()))
    validate_config(config)
    return config


# ------------------------------------------------------------------------------------------------ the launcher


def test_skypilots_job_has_its_keys_and_a_script() -> None:
    """The keys are those of SkyPilot's task schema: https://docs.skypilot.co/en/latest/reference/yaml-spec.html."""
    task = yaml.safe_load((ROOT / "cluster" / "deploy" / "skypilot.yaml").read_text())
    fields = {"name", "num_nodes", "resources", "workdir", "envs", "secrets", "file_mounts", "setup", "run", "config"}
    assert task.keys() <= fields
    resource_fields = {"accelerators", "use_spot", "image_id", "job_recovery", "infra", "cpus", "memory"}
    assert task["resources"].keys() <= resource_fields
    assert task["resources"]["image_id"] == f"docker:REGISTRY/admiral:{VERSION}"
    assert set(task["envs"]) == {"ADMIRAL_STORE", "MLFLOW_TRACKING_URI", "JOB"} and "$JOB" in task["run"]
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)


def test_slurms_script_is_bash_whose_options_come_first() -> None:
    script = ROOT / "cluster" / "deploy" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    options = {line.split("=")[0].removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal"} <= options
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "Slurm ignores these"


def node_types_to_start(launcher: dict[str, Any], unavailable: dict[str, float], demand: dict[str, float]) -> list[str]:
    """Return the node types that Ray's autoscaler would start for one worker."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(launcher, skip_content_hash=True)
    types = config.get_node_type_configs()
    assert types is not None
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(demand)]),
        recoverable_resource_availabilities=unavailable,
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(request)
    return [launch.instance_type for launch in reply.to_launch]


def test_gpu_workers_are_spot_or_on_demand_if_no_spot_node_is_available(launcher: dict[str, Any]) -> None:
    one_gpu = {"GPU": 1, "CPU": 1, "accelerator_type:H100": 0.001}
    assert node_types_to_start(launcher, {}, one_gpu) == ["gpu-spot"]
    assert node_types_to_start(launcher, {"gpu-spot": 0.0}, one_gpu) == ["gpu-on-demand"]
    assert node_types_to_start(launcher, {}, {"CPU": 1}) == ["data"], "no GPU is started for what needs none"


def test_the_head_runs_no_work_and_the_launcher_opens_no_port_and_contains_no_key(launcher: dict[str, Any]) -> None:
    assert launcher["available_node_types"][launcher["head_node_type"]]["resources"] == {"CPU": 0}
    assert launcher["available_node_types"]["gpu-spot"]["resources"]["GPU"] == 8
    assert launcher["provider"]["use_internal_ips"] is True
    for name, node_type in launcher["available_node_types"].items():
        node = node_type["node_config"]
        assert node["SecurityGroupIds"] == ["sg-CLUSTER"], f"{name}: Ray would make a group that is open to the world"
        assert node["SubnetIds"] and node["IamInstanceProfile"] and node["MetadataOptions"]["HttpTokens"] == "required"
    (head_start,) = (line for line in launcher["head_start_ray_commands"] if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in head_start
    assert any("RAY_AUTH_MODE=token" in option for option in launcher["docker"]["run_options"])
    assert "AWS_SECRET" not in LAUNCHER.read_text() and "AWS_ACCESS_KEY" not in LAUNCHER.read_text()
    assert "ssh_private_key" not in launcher["auth"]


def test_store_tracking_and_image_are_set_once() -> None:
    for variable in ("ADMIRAL_STORE=", "MLFLOW_TRACKING_URI=", "REGISTRY/"):
        assert LAUNCHER.read_text().count(variable) == 1


# ------------------------------------------------------------------------------------------------ Kubernetes


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_parse_and_fit_their_schema(path: Path) -> None:
    for document in documents(path):
        assert {"apiVersion", "kind", "metadata"} <= document.keys()
        if document["apiVersion"] == "ray.io/v1":
            jsonschema.Draft202012Validator(definition(document["kind"])).validate(document)


def test_the_schema_finds_mistakes() -> None:
    validator = jsonschema.Draft202012Validator(definition("RayCluster"))
    for field, value in (("authOptions", {"mode": "tokens"}), ("workerGroups", []), ("headGroupSpec", {})):
        broken = all_documents("RayCluster")["admiral"]
        broken["spec"][field] = value
        assert not validator.is_valid(broken), field
    broken = all_documents("RayCluster")["admiral"]
    broken["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert not validator.is_valid(broken), "start parameters are strings"


def test_jobs_find_their_cluster_and_are_jobs_of_this_checkout() -> None:
    jobs = all_documents("RayJob")
    assert jobs.keys() == {"admiral-train", "admiral-tune", "admiral-generate"}
    for job in jobs.values():
        assert job["spec"]["clusterSelector"]["ray.io/cluster"] in all_documents("RayCluster")
        _, script, *_ = job["spec"]["entrypoint"].split()
        assert (ROOT / script.removeprefix("/opt/admiral/")).exists()


def test_pods_are_not_root_and_have_shared_memory_and_token() -> None:
    cluster = all_documents("RayCluster")["admiral"]["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["containers"][0]["envFrom"] == [{"configMapRef": {"name": "admiral"}}]
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
        assert any(toleration["key"] == "spot" for toleration in pod["tolerations"])


def pods() -> dict[str, dict[str, Any]]:
    """Return the pod template of each role."""
    cluster = all_documents("RayCluster")["admiral"]["spec"]
    templates = {"head": cluster["headGroupSpec"]["template"]}
    templates |= {f"worker {group['groupName']}": group["template"] for group in cluster["workerGroupSpecs"]}
    templates |= {name: job["spec"]["submitterPodTemplate"] for name, job in all_documents("RayJob").items()}
    for kind in ("Deployment", "StatefulSet"):
        templates |= {name: document["spec"]["template"] for name, document in all_documents(kind).items()}
    return templates


def test_each_role_has_a_service_account_of_its_own_and_only_the_head_has_the_token_of_kubernetes() -> None:
    accounts = all_documents("ServiceAccount")
    used = {role: pod["spec"].get("serviceAccountName") for role, pod in pods().items()}
    assert {account for account in used.values() if account} == accounts.keys()
    assert used["head"] == "admiral-head" and used["mlflow"] == "mlflow" and used["postgresql"] is None
    assert {account for role, account in used.items() if role.startswith("worker")} == {"admiral-worker"}
    assert {used[job] for job in all_documents("RayJob")} == {"admiral-submitter"}
    for role, pod in pods().items():
        specs = [pod["spec"], accounts.get(used[role] or "", {})]
        assert (role == "head") != any(spec.get("automountServiceAccountToken") is False for spec in specs), role
    annotations = {name: account["metadata"].get("annotations", {}) for name, account in accounts.items()}
    roles = {name: annotation.get("eks.amazonaws.com/role-arn") for name, annotation in annotations.items()}
    assert roles["admiral-submitter"] is None
    assert roles["mlflow"] != roles["admiral-worker"], "its role writes artefacts and reads no weights"


def sources(policy: dict[str, Any], port: int) -> list[dict[str, Any]]:
    """Return the sources that a policy allows to connect to a port."""
    result = []
    for rule in policy["spec"]["ingress"]:
        ports = [entry["port"] for entry in rule.get("ports", [])]
        if not ports or port in ports:  # a rule without ports is for all of them
            result += rule["from"]
    return result


def test_policies_restrict_connections_to_the_head_the_tracking_server_and_its_database() -> None:
    policies = all_documents("NetworkPolicy")
    for policy in policies.values():
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        assert policy["spec"]["podSelector"]["matchLabels"], "an empty selector would be for every pod of the namespace"
        assert all(rule["from"] for rule in policy["spec"]["ingress"]), "an empty list lets everybody in"
    cluster = {"ray.io/cluster": "admiral"}
    head = cluster | {"ray.io/node-type": "head"}
    assert sources(policies["postgresql"], 5432) == [{"podSelector": {"matchLabels": {"app": "mlflow"}}}]
    assert sources(policies["mlflow"], 5000) == [{"podSelector": {"matchLabels": head}}]
    assert policies["admiral-nodes"]["spec"]["podSelector"]["matchLabels"] == cluster
    assert sources(policies["admiral-nodes"], 6379) == [{"podSelector": {"matchLabels": cluster}}]
    assert policies["admiral-head"]["spec"]["podSelector"]["matchLabels"] == head
    submitters = sources(policies["admiral-head"], 8265)[0]["podSelector"]["matchLabels"]
    assert all(pods()[job]["metadata"]["labels"] == submitters for job in all_documents("RayJob"))
    selected = [policy["spec"]["podSelector"]["matchLabels"] for policy in policies.values()]
    for name in ("mlflow", "postgresql"):
        assert pods()[name]["metadata"]["labels"] in selected


def test_the_tracking_server_needs_a_password_that_no_uri_and_no_command_line_contains() -> None:
    (mlflow,) = pods()["mlflow"]["spec"]["containers"]
    assert "--app-name=basic-auth" in mlflow["args"]
    variables = {variable["name"]: variable for variable in mlflow["env"]}
    secret = {name: v["valueFrom"]["secretKeyRef"] for name, v in variables.items() if "valueFrom" in v}
    assert secret.keys() == {"PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    (settings,) = (volume["configMap"]["name"] for volume in pods()["mlflow"]["spec"]["volumes"])
    config = configparser.ConfigParser()
    config.read_string(all_documents("ConfigMap")[settings]["data"]["auth.ini"])
    assert config["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    for uri in (config["mlflow"]["database_uri"], variables["MLFLOW_BACKEND_STORE_URI"]["value"]):
        assert uri == "postgresql+psycopg2://mlflow@postgresql:5432/mlflow"
    (head,) = pods()["head"]["spec"]["containers"]
    login = {variable["name"]: variable for variable in head["env"]}
    assert login["MLFLOW_TRACKING_USERNAME"]["value"] == config["mlflow"]["admin_username"]
    assert login["MLFLOW_TRACKING_PASSWORD"]["valueFrom"]["secretKeyRef"] == secret["MLFLOW_AUTH_ADMIN_PASSWORD"]
    for name, document in all_documents("Secret").items():
        keys = {reference["key"] for reference in secret.values() if reference["name"] == name}
        assert document["stringData"].keys() == keys
    for role, pod in pods().items():
        if role.startswith("worker"):
            assert "env" not in pod["spec"]["containers"][0], "drivers track, workers do not"


@pytest.mark.slow
def test_mlflow_starts_with_these_settings_and_rejects_requests_without_a_password(tmp_path: Path) -> None:
    pytest.importorskip("flask_wtf")
    settings = all_documents("ConfigMap")["mlflow"]["data"]["auth.ini"]
    database = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "auth.ini").write_text(re.sub("postgresql[+].*", database, settings))
    (mlflow,) = pods()["mlflow"]["spec"]["containers"]
    port = free_port()
    options = dict(argument.partition("=")[::2] for argument in mlflow["args"][2:])
    options |= {"--host": "127.0.0.1", "--port": str(port), "--workers": "1", "--allowed-hosts": "*"}
    options["--artifacts-destination"] = str(tmp_path)
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": "a-password-of-tests",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "text",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    flags = [f"{name}={value}" if value else name for name, value in options.items()]
    command = [sys.executable, "-m", "mlflow", "server", *flags]
    server = start_server(command, partial(is_listening, port), tmp_path / "log", environment, seconds=300)
    try:
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(url, timeout=120)
        login = base64.b64encode(b"admiral:a-password-of-tests").decode()
        request = urllib.request.Request(url, headers={"Authorization": f"Basic {login}"})
        with urllib.request.urlopen(request, timeout=120) as response:
            assert json.load(response)["experiment"]["name"] == "Default"
    finally:
        end_processes([server])


# ------------------------------------------------------------------------------------------------ versions


def test_versions_agree_with_constraints_txt() -> None:
    texts = [leaf for path in [LAUNCHER, *MANIFESTS] for d in documents(path) for leaf in all_values(d)]
    images = {text for text in texts if isinstance(text, str) and "REGISTRY/admiral:" in text}
    assert images == {f"REGISTRY/admiral:{VERSION}"}
    assert all_documents("RayCluster")["admiral"]["spec"]["rayVersion"] == pinned("ray")
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert "--constraint constraints.txt" in dockerfile and "==" not in dockerfile, "pins live in one place"
    python = re.search(r"^ARG PYTHON=(\S+)$", dockerfile, re.MULTILINE)
    assert python and python[1] in ("3.11", "3.12"), "what pyproject.toml allows"


def test_the_container_is_not_root_and_can_compile() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)$", dockerfile, re.MULTILINE)[-1] == "admiral"
    for text in (" gcc ", "rsync", "TORCHINDUCTOR_CACHE_DIR", "NCCL_SOCKET_IFNAME", "RAY_JOB_STOP_WAIT_TIME_S"):
        assert text in dockerfile
    copied = set(re.findall(r"^COPY --chown=admiral (\w+) \w+$", dockerfile, re.MULTILINE))
    assert copied == {"models", "orchestrator", "cluster", "jobs"}
