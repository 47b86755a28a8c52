"""Files that people copy to a cluster: launch/k8s/, Dockerfile, .deepspeed_env.example. No cluster is needed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe

ROOT = Path(__file__).parents[2]
K8S = ROOT / "launch" / "k8s"
DOCUMENTS = [document for file in sorted(K8S.glob("*.yaml")) for document in yaml.safe_load_all(file.read_text())]
_JOBS = {"PyTorchJob": "pytorchReplicaSpecs", "MPIJob": "mpiReplicaSpecs"}
JOBS = [document for document in DOCUMENTS if document["kind"] in _JOBS]
CORE = [document for document in DOCUMENTS if document["kind"] not in _JOBS]

_RUN_POLICY = {
    "activeDeadlineSeconds": int, "backoffLimit": int, "cleanPodPolicy": str, "managedBy": str,
    "schedulingPolicy": dict, "suspend": bool, "ttlSecondsAfterFinished": int,
}  # fmt: skip
_REPLICA = {"replicas": int, "restartPolicy": str, "template": dict}
# The fields of `spec` in the operators' definitions: Kubeflow's training-operator 1.9 (kubeflow.org_pytorchjobs.yaml)
# and mpi-operator 0.8 (kubeflow.org_mpijobs.yaml). What stands in `template` is a pod of Kubernetes itself.
FIELDS = {
    ("kubeflow.org/v1", "PyTorchJob"): {
        "elasticPolicy": {
            "maxReplicas": int, "maxRestarts": int, "metrics": list, "minReplicas": int, "nProcPerNode": int,
            "rdzvBackend": str, "rdzvConf": list, "rdzvHost": str, "rdzvId": str, "rdzvPort": int, "standalone": bool,
        },
        "nprocPerNode": str,
        "pytorchReplicaSpecs": {"Master": _REPLICA, "Worker": _REPLICA},
        "runPolicy": _RUN_POLICY,
    },
    ("kubeflow.org/v2beta1", "MPIJob"): {
        "launcherCreationPolicy": str,
        "mpiImplementation": str,
        "mpiReplicaSpecs": {"Launcher": _REPLICA, "Worker": _REPLICA},
        "runLauncherAsWorker": bool,
        "runPolicy": _RUN_POLICY,
        "slotsPerWorker": int,
        "sshAuthMountPath": str,
    },
}  # fmt: skip


def unknown(found, fields, where="spec"):
    """Fields that the definition does not have, or whose type differs."""
    for name, value in found.items():
        expected = fields.get(name)
        if isinstance(expected, dict):
            yield from unknown(value, expected, f"{where}.{name}")
        elif expected is None or type(value) is not expected:
            yield f"{where}.{name} = {value!r}"


def pods(job):
    """The pod of every kind of replica."""
    return {name: one["template"]["spec"] for name, one in job["spec"][_JOBS[job["kind"]]].items()}


@pytest.mark.parametrize("document", CORE, ids=lambda one: f"{one['kind']} {one['metadata']['name']}")
def test_a_document_is_one_of_kubernetes(document):
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("job", JOBS, ids=lambda one: one["kind"])
class TestJob:
    def test_its_fields_are_those_of_the_operator(self, job):
        assert list(unknown(job["spec"], FIELDS[job["apiVersion"], job["kind"]])) == []
        for name, pod in pods(job).items():
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, "spec": pod}
            kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)

    def test_what_it_names_exists(self, job):
        claims = {one["metadata"]["name"] for one in CORE if one["kind"] == "PersistentVolumeClaim"}
        for pod in pods(job).values():
            (container,) = pod["containers"]
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
            used = [one["persistentVolumeClaim"]["claimName"] for one in volumes.values() if "emptyDir" not in one]
            assert set(used) <= claims
            words = [*container["command"], *container.get("args", [])]
            hook = container.get("lifecycle", {"preStop": {"exec": {"command": []}}})["preStop"]["exec"]["command"]
            files = [word for word in [*words, *hook] if re.match(r"(launch|ds_configs)/", word)]
            assert all((ROOT / file).is_file() for file in files)
            for option, load in (("--recipe", load_recipe), ("--deepspeed", load_deepspeed)):
                if option in words:
                    load(ROOT / words[words.index(option) + 1])

    def test_a_pod_with_ranks_has_time_to_save(self, job):
        for name, pod in pods(job).items():
            assert pod["terminationGracePeriodSeconds"] >= 120
            if name != "Launcher":
                assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1] == "launch/k8s/stop_ranks.sh"


def test_the_pods_of_the_pytorchjob_meet_at_the_service():
    (service,) = [one for one in CORE if one["kind"] == "Service"]
    (job,) = [one for one in JOBS if one["kind"] == "PyTorchJob"]
    meeting = job["spec"]["elasticPolicy"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"]["training.kubeflow.org/job-name"] == job["metadata"]["name"]
    assert meeting["rdzvHost"] == service["metadata"]["name"]
    assert meeting["rdzvPort"] == service["spec"]["ports"][0]["port"]
    assert meeting["minReplicas"] == meeting["maxReplicas"] == job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]


def test_ranks_are_asked_and_launchers_are_not():
    pattern = re.search(r"^ranks='(.*?)'", (K8S / "stop_ranks.sh").read_text(), re.MULTILINE)[1]
    assert re.search(pattern, "/opt/venv/bin/python3 -u launch/train.py --recipe launch/recipes/base.toml")
    assert not re.search(pattern, "/opt/venv/bin/python3 /opt/venv/bin/torchrun launch/train.py")
    assert not re.search(pattern, "mpirun -np 16 --wdir /workspace prterun launch/train.py")


def test_the_dockerfile_is_sound():
    """By hadolint, which knows Dockerfiles and shell scripts."""
    linter = Path(sysconfig.get_path("scripts"), "hadolint")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_has_the_versions_of_the_constraints():
    text = (ROOT / "Dockerfile").read_text()
    installs = re.findall(r"pip install ([^\\\n]*)", text)
    assert installs and all("-c constraints.txt" in line for line in installs)


def test_the_environment_of_pdsh_can_be_read_by_deepspeed():
    """Its launcher splits every line at the first =, blank lines and comments too."""
    for line in (ROOT / ".deepspeed_env.example").read_text().splitlines():
        name, _, value = line.partition("=")
        assert re.fullmatch(r"[A-Z_]+", name) and shlex.split(value) == [value]
