"""The files of cluster/ that need a cloud, against what the cloud's own tools accept; nothing is sent anywhere.

aws.yaml goes through what `ray up` does before and while it starts nodes, against a simulated AWS; rayjob.yaml through a strict
schema of KubeRay's interface and of Kubernetes' own, where a misspelt key is an error."""

from __future__ import annotations

import copy
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from clusters import DEADLINE_S, await_that, executable

from pcb_ray import cli
from pcb_ray.recipe import Recipe

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
KUBERNETES = "1.36"


# --- Kubernetes -----------------------------------------------------------------------------------------------------------------

STRING, NUMBER, BOOLEAN, STRINGS = ({"type": t} for t in ("string", "number", "boolean", "array"))
MAP = {"type": "object", "additionalProperties": STRING}
POD = {"type": "object"}  # held to Kubernetes' own schema by `pods`
ANY = {}


def choice(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def record(required: str = "", **keys: Any) -> dict[str, Any]:
    return {"type": "object", "properties": keys, "required": required.split(), "additionalProperties": False}


# What a RayJob of KubeRay v1.7.0 (ray.io/v1) may say, all of its keys; those that we would need a feature gate for are ANY.
GROUP = {"template": POD, "rayStartParams": MAP, "resources": MAP, "labels": MAP}
RAYCLUSTER = record(
    "headGroupSpec",
    authOptions=record(mode=choice("token", "disabled"), secretName=STRING, enableK8sTokenAuth=BOOLEAN),
    autoscalerOptions=record(
        version=choice("v1", "v2"),
        idleTimeoutSeconds=NUMBER,
        upscalingMode=choice("Default", "Aggressive", "Conservative"),
        resources=ANY,
        image=STRING,
        imagePullPolicy=STRING,
        securityContext=ANY,
        env=ANY,
        envFrom=ANY,
        volumeMounts=ANY,
        command=STRINGS,
        args=STRINGS,
    ),
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=ANY,
    headGroupSpec=record("template", **GROUP, headService=ANY, enableIngress=BOOLEAN, ingressOptions=ANY, serviceType=STRING),
    headServiceAnnotations=MAP,
    historyServerOptions=ANY,
    managedBy=STRING,
    networkPolicy=ANY,
    rayVersion=STRING,
    suspend=BOOLEAN,
    tlsOptions=ANY,
    upgradeStrategy=ANY,
    workerGroupSpecs={
        "type": "array",
        "items": record(
            "groupName maxReplicas minReplicas template",
            **GROUP,
            groupName=STRING,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            numOfHosts=NUMBER,
            idleTimeoutSeconds=NUMBER,
            priority=NUMBER,
            scaleStrategy=ANY,
            suspend=BOOLEAN,
        ),
    },
)
RAYJOB = record(
    "apiVersion kind metadata spec",
    apiVersion=choice("ray.io/v1"),
    kind=choice("RayJob"),
    metadata=record("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"}, labels=MAP, annotations=MAP),
    spec=record(
        activeDeadlineSeconds=NUMBER,
        backoffLimit=NUMBER,
        clusterSelector=MAP,
        deletionStrategy=ANY,
        entrypoint=STRING,
        entrypointNumCpus=NUMBER,
        entrypointNumGpus=NUMBER,
        entrypointResources=STRING,
        jobId=STRING,
        managedBy=STRING,
        metadata=MAP,
        preRunningDeadlineSeconds=NUMBER,
        rayClusterSpec=RAYCLUSTER,
        runtimeEnvYAML=STRING,
        shutdownAfterJobFinishes=BOOLEAN,
        submissionMode=choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterConfig=record(backoffLimit=NUMBER),
        submitterPodTemplate=POD,
        suspend=BOOLEAN,
        ttlSecondsAfterFinished=NUMBER,
    ),
)


def rayjob() -> tuple[dict[str, Any], dict[str, Any]]:
    recipe, job = yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text())
    return recipe, job


def pods(job: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    templates = {"submitter": job["spec"]["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return templates


def check_rayjob(job: Mapping[str, Any]) -> None:
    """Refuses what KubeRay or Kubernetes don't know, in all pods too."""
    jsonschema.validate(job, RAYJOB)
    for name, template in pods(job).items():
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template.get("metadata", {})},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_manifests_for_kubernetes_are_valid_where_unknown_keys_are_refused():
    recipe, job = rayjob()
    kubernetes_validate.validate(recipe, KUBERNETES, strict=True)
    check_rayjob(job)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("spec",), "backOffLimit"),
        (("spec", "rayClusterSpec", "authOptions"), "modes"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0), "minReplica"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec"), "serviceAccount_name"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources"), "limit"),
    ],
)
def test_a_misspelt_key_is_refused(path, key):
    job = copy.deepcopy(rayjob()[1])
    place = job
    for step in path:
        place = place[step]
    place[key] = {}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=key):
        check_rayjob(job)


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names no file: ray.io_rayjobs.yaml of a KubeRay release")
def test_the_rayjob_is_valid_by_the_resource_definition_of_kuberay():
    definition = yaml.load(Path(os.environ["KUBERAY_CRD"]).read_text(), yaml.CSafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(rayjob()[1], schema)
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        jsonschema.validate({**rayjob()[1], "spec": {**rayjob()[1]["spec"], "backOffLimit": 3}}, schema)


def closed(schema: Any) -> Any:
    """The same schema, refusing what it doesn't name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False) is True:
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    return {"additionalProperties": False, **made} if isinstance(made.get("properties"), dict) and "type" in made else made


def test_every_pod_has_a_limit_on_its_memory_and_the_head_runs_nothing():
    _, job = rayjob()
    cluster = job["spec"]["rayClusterSpec"]
    containers = [one for template in pods(job).values() for one in template["spec"]["containers"]]
    assert len(containers) == 3
    for container in [*containers, cluster["autoscalerOptions"]]:
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}
    assert all(
        int(group["minReplicas"]) <= int(group["replicas"]) <= int(group["maxReplicas"]) for group in cluster["workerGroupSpecs"]
    )


def test_what_the_rayjob_runs_is_accepted_by_the_command_line_and_goes_on_after_a_retry():
    recipe, job = rayjob()
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "pcb-ray"
    options = cli.parser().parse_args(arguments)
    assert options.resume
    assert job["spec"]["backoffLimit"] > 0
    Recipe.from_yaml(recipe["data"]["recipe.yaml"])
    for name in ("head", "cpu"):
        (container,) = pods(job)[name]["spec"]["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == {volume["name"] for volume in pods(job)[name]["spec"]["volumes"]}
        assert {str(Path(options.recipe).parent), options.scratch} <= set(mounts)


# --- AWS ------------------------------------------------------------------------------------------------------------------------


def aws_config() -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "aws.yaml").read_text()))


def checked_by_ray(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(config)
    validate_config(config)
    return dict(config)


def test_the_cluster_for_aws_is_valid_by_the_schema_and_the_code_of_ray():
    config = checked_by_ray(aws_config())
    assert config["available_node_types"]["head"]["max_workers"] == 0
    assert config["head_setup_commands"] == config["worker_setup_commands"] == [], "all is in the image"


@pytest.mark.parametrize("path", [(), ("auth",), ("docker",), ("available_node_types", "cpu")])
def test_ray_refuses_a_misspelt_key(path):
    config = aws_config()
    place = config
    for step in path:
        place = place[step]
    place["min_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        checked_by_ray(config)


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A simulated AWS in this process, with the instance profile that the file names, and one that Ray would make and wait for."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key of a new cluster there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        iam = boto3.client("iam")
        for name in ("ray-autoscaler-v1", "pcb-ray"):
            iam.create_instance_profile(InstanceProfileName=name)
            iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        yield boto3.client("ec2", region_name=aws_config()["provider"]["region"])


@pytest.mark.very_slow
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_simulated_aws_starts_nodes_of_each_type(aws):
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = bootstrap_aws(checked_by_ray(aws_config()))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        tags = {"ray-node-type": "worker", "ray-user-node-type": name, "ray-launch-config": "any"}
        provider.create_node(copy.deepcopy(node_type["node_config"]), tags, 1)
    started = [one for group in aws.describe_instances()["Reservations"] for one in group["Instances"]]
    assert sorted(one["InstanceType"] for one in started) == ["g6.12xlarge", "m7i.xlarge", "r6id.8xlarge"]
    assert {one["InstanceType"] for one in started if one.get("InstanceLifecycle") == "spot"} == {"g6.12xlarge", "r6id.8xlarge"}
    ports = {rule.get("FromPort") for one in aws.describe_security_groups()["SecurityGroups"] for rule in one["IpPermissions"]}
    assert ports <= {22, None}, "only ssh is open to others"
    cores = {one["InstanceType"]: one["VCpuInfo"]["DefaultVCpus"] for one in aws.describe_instance_types()["InstanceTypes"]}
    for node_type in config["available_node_types"].values():
        assert node_type["resources"]["CPU"] in (0, cores[node_type["node_config"]["InstanceType"]])


def test_nodes_of_aws_start_ray_with_a_token_and_the_head_runs_nothing():
    config = aws_config()
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token ray start" in command
        assert "ulimit -n 65536" in command
        options = [word.partition("=")[0] for word in shlex.split(command.partition("ray start")[2])]
        known = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"], capture_output=True, text=True
        ).stdout
        assert not [option for option in options if not re.search(rf"(?<![\w-]){option}\b(?!-)", known)]
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert [remote for remote in config["file_mounts"] if remote.endswith("/.ray/auth_token")]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a namespace of its own: root only")
@pytest.mark.parametrize("nvme", [True, False])
def test_scratch_is_the_local_disk_where_there_is_one(nvme, tmp_path):
    executable(tmp_path / "sudo", '"$@"')
    commands = aws_config()["initialization_commands"]
    disks = "mkdir /opt/dlami; mkdir /opt/dlami/nvme; touch /opt/dlami/nvme/there" if nvme else ":"
    again = "\n".join(commands * 2)  # `ray up` runs them again at each update
    script = (
        f"set -e\nmount -t tmpfs none /opt\nmount -t tmpfs none /mnt\n{disks}\n{again}\nls /mnt/scratch; stat -c %a /mnt/scratch"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(["unshare", "-m", "bash", "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == (["there"] if nvme else []) + ["1777"]


# --- Slurm ----------------------------------------------------------------------------------------------------------------------


def slurm(tmp_path: Path, srun: str, **variables: str) -> subprocess.Popen[str]:
    """cluster/slurm.sh as Slurm would start it, with an `srun` of the test and an `scontrol` that notes what it is asked."""
    executable(tmp_path / "srun", srun)
    executable(tmp_path / "scontrol", f'echo "$@" > {tmp_path}/requeued')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HEAD_IP": "127.0.0.1", "TMPDIR": str(tmp_path)}
    environment |= {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "1", **variables}
    command = ["bash", str(CLUSTER / "slurm.sh"), "recipe.yaml", "/shared/merged", "--workers", "2"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_slurm_job_ends_with_the_exit_code_of_the_merge(tmp_path):
    executable(tmp_path / "pcb-ray", f'echo "$@" > {tmp_path}/asked; exit 2')
    job = slurm(tmp_path, 'while [ "$1" != -- ]; do shift; done; shift; "$@"; exit 0')
    _, told = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 2, told
    asked = (tmp_path / "asked").read_text().split()
    options = cli.parser().parse_args(asked)
    assert options.resume
    assert [str(options.recipe), *map(str, options.more), options.workers] == ["recipe.yaml", "/shared/merged", 2]
    assert options.address == "127.0.0.1:24711"


def test_the_slurm_job_fails_where_ray_ended_well_without_a_merge(tmp_path):
    job = slurm(tmp_path, "exit 0")
    _, told = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 1
    assert "wanted the merge to run, found that it never started or never ended" in told
    assert not list(tmp_path.glob("tmp.*"))


def test_the_slurm_job_asks_for_another_turn_when_its_time_is_nearly_up(tmp_path):
    job = slurm(tmp_path, f"touch {tmp_path}/running; while [ ! -e {tmp_path}/requeued ]; do sleep 0.05; done; exit 9")
    await_that("the step runs", (tmp_path / "running").exists)
    job.send_signal(signal.SIGUSR1)
    _, told = job.communicate(timeout=DEADLINE_S)
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "4711"]
    assert job.returncode == 9, told


def test_the_slurm_script_gives_its_token_to_no_command_line(tmp_path):
    job = slurm(tmp_path, f'echo "$@" > {tmp_path}/words; echo $RAY_AUTH_TOKEN > {tmp_path}/token; echo $RAY_AUTH_MODE')
    out, told = job.communicate(timeout=DEADLINE_S)
    token = (tmp_path / "token").read_text().strip()
    assert len(token) == 64
    assert token not in (tmp_path / "words").read_text() + out + told
    assert out.strip() == "token"


# --- the image, and all ----------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = (CLUSTER / "Dockerfile").read_text()
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, rest in lines]


def test_the_image_is_built_by_the_script_that_a_test_runs():
    runs = [rest for word, rest in instructions() if word == "RUN"]
    assert [rest for rest in runs if "pip" in rest] == []
    assert "bash /src/cluster/install.sh /opt/pcb-ray $DEVICE" in runs
    words = {word for word, _ in instructions()}
    assert words <= {"FROM", "ARG", "RUN", "COPY", "ENV", "USER", "WORKDIR"}
    python = {rest.split()[0] for word, rest in instructions() if word == "FROM"}
    assert python == {"python:3.11-slim-bookworm"}, "the constraints are for Python 3.11"


def test_the_image_gets_all_that_the_package_is_built_from():
    kept = [line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    project = (ROOT / "pyproject.toml").read_text()
    needed = {
        "pcb_ray",
        "pyproject.toml",
        "cluster",
        *re.findall(r'readme = "(.*?)"', project),
        *re.findall(r'license-files = \["(.*?)"', project),
    }
    assert needed <= set(kept)


def test_no_file_here_holds_a_secret_or_opens_a_dashboard():
    for path in CLUSTER.iterdir():
        if path.is_file():
            text = path.read_text()
            assert not re.search(
                r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|(TOKEN|SECRET|PASSWORD)[A-Z_]*[=:] *[\"']?[A-Za-z0-9+/]{16}", text
            ), path
            assert not re.search(r"dashboard-host[= ]+0\.0\.0\.0", text), path


# What tells Ray to want a token, in each file that starts one or makes what starts one.
TOKENS = {
    "Dockerfile": "RAY_AUTH_MODE=token",
    "aws.yaml": "--env RAY_AUTH_MODE=token",
    "local.sh": "export RAY_TMPDIR=$folder RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token",
    "rayjob.yaml": "mode: token",
    "slurm.sh": "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN",
}


def test_every_file_that_starts_ray_wants_a_token_and_keeps_the_dashboard_on_loopback():
    starts = re.compile(r"\bray (start|symmetric-run)\b|RayJob|rayVersion|^FROM ", flags=re.MULTILINE)
    code = {
        path.name: "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        for path in CLUSTER.iterdir()
        if path.suffix in (".sh", ".yaml") or path.name == "Dockerfile"
    }
    assert {name for name, text in code.items() if starts.search(text)} == set(TOKENS)
    for name, text in code.items():
        assert TOKENS.get(name, "") in text, name
        assert not re.search(r"RAY_AUTH_MODE[=: ]+[\"']?(?!token)\w", text), name
        hosts = re.findall(r"dashboard-host[\"']?[=: ]+[\"']?([\w.:*]+)", text)
        assert set(hosts) <= {"127.0.0.1"}, name
    assert "serviceType: ClusterIP" in code["rayjob.yaml"]


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash_and_say_how_they_are_called(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n# ")
