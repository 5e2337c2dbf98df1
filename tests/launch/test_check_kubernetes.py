"""The manifests of launch/ are valid; check_kubernetes.py reports inconsistencies."""

import json
import shlex
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_idpo.errors import EXIT_USER_ERROR

from .commands import LAUNCH, check_command, load_script

MANIFEST = LAUNCH / "kubernetes.yaml"
JOB_SET = LAUNCH / "jobset.yaml"
kubernetes = load_script("check_kubernetes")

KNOWN = {
    "Service": "apiVersion kind metadata spec",
    "Service.metadata": "name",
    "Service.spec": "clusterIP publishNotReadyAddresses selector",
    "Job": "apiVersion kind metadata spec",
    "Job.metadata": "name",
    "Job.spec": "completionMode completions parallelism podReplacementPolicy backoffLimit "
    "backoffLimitPerIndex maxFailedIndexes podFailurePolicy template",
    "Job.spec.podFailurePolicy": "rules",
    "Job.spec.podFailurePolicy.rules": "action onExitCodes onPodConditions",
    "Job.spec.podFailurePolicy.rules.onExitCodes": "containerName operator values",
    "Job.spec.podFailurePolicy.rules.onPodConditions": "type status",
    "Job.spec.template": "spec",
    "Job.spec.template.spec": "subdomain restartPolicy terminationGracePeriodSeconds containers "
    "volumes",
    "Job.spec.template.spec.containers": "name image workingDir command env resources volumeMounts",
    "Job.spec.template.spec.containers.env": "name value valueFrom",
    "Job.spec.template.spec.containers.env.valueFrom": "fieldRef secretKeyRef",
    "Job.spec.template.spec.containers.env.valueFrom.fieldRef": "fieldPath",
    "Job.spec.template.spec.containers.env.valueFrom.secretKeyRef": "name key optional",
    "Job.spec.template.spec.containers.resources": "requests limits",
    "Job.spec.template.spec.containers.resources.requests": "cpu memory",
    "Job.spec.template.spec.containers.resources.limits": "memory nvidia.com/gpu",
    "Job.spec.template.spec.containers.volumeMounts": "name mountPath",
    "Job.spec.template.spec.volumes": "name persistentVolumeClaim emptyDir",
    "Job.spec.template.spec.volumes.persistentVolumeClaim": "claimName",
    "Job.spec.template.spec.volumes.emptyDir": "medium sizeLimit",
    "JobSet": "apiVersion kind metadata spec",
    "JobSet.metadata": "name",
    "JobSet.spec": "network failurePolicy replicatedJobs",
    "JobSet.spec.network": "enableDNSHostnames subdomain publishNotReadyAddresses",
    "JobSet.spec.failurePolicy": "maxRestarts restartStrategy rules",
    "JobSet.spec.failurePolicy.rules": "name action onJobFailureReasons",
    "JobSet.spec.replicatedJobs": "name replicas template",
    "JobSet.spec.replicatedJobs.template": "spec",
}
"""The fields of the Kubernetes API that the manifest uses, to detect misspelled ones.

Validated once against the API schemas of 1.31, 1.34 and 1.37 (kubernetes-validate --strict, 108 MB,
too large for every contributor), a JobSet's own fields by reading its CRD (v1alpha2), its template
as a Job; validate a new field in the same way before adding it.
"""

FREE = {"Service.spec.selector"}
INTEGERS = {
    "backoffLimit",
    "backoffLimitPerIndex",
    "maxFailedIndexes",
    "maxRestarts",
    "replicas",
    "completions",
    "nvidia.com/gpu",
    "parallelism",
    "terminationGracePeriodSeconds",
    "values",
}
BOOLEANS = {"enableDNSHostnames", "optional", "publishNotReadyAddresses"}


def invalid_fields(value: Any, location: str, name: str = "") -> list[str]:
    """Unknown fields below `location`, and scalars of a wrong type."""
    if isinstance(value, list):
        return [problem for item in value for problem in invalid_fields(item, location, name)]
    if not isinstance(value, dict):
        expected = int if name in INTEGERS else bool if name in BOOLEANS else str
        return [] if type(value) is expected else [f"{location} = {value!r}"]
    if location in FREE:
        return []
    if location == "JobSet.spec.replicatedJobs.template.spec":
        location = "Job.spec"
    problems = []
    for field, below in value.items():
        if field in KNOWN[location].split():
            problems += invalid_fields(below, f"{location}.{field}", field)
        else:
            problems.append(f"{location}.{field}")
    return problems


def manifest() -> dict[str, dict[str, Any]]:
    return {value["kind"]: value for value in yaml.safe_load_all(MANIFEST.read_text())}


def test_manifest_has_only_valid_fields() -> None:
    objects = manifest()
    assert {kind: value["apiVersion"] for kind, value in objects.items()} == {
        "Service": "v1",
        "Job": "batch/v1",
    }
    for kind, value in objects.items():
        assert invalid_fields(value, kind) == []


def job_set() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(JOB_SET.read_text())
    return value


def test_job_set_has_only_valid_fields_and_the_pods_of_the_manifest() -> None:
    value = job_set()
    assert value["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert invalid_fields(value, "JobSet") == []
    pod = value["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    expected = manifest()["Job"]["spec"]["template"]["spec"]
    del expected["subdomain"]  # the operator sets it
    command = expected["containers"][0]["command"]
    command[command.index("--master-addr=idpo-0.idpo")] = "--master-addr=idpo-machines-0-0.idpo"
    assert pod == expected


def test_misspelled_field_and_wrong_type_are_detected() -> None:
    job = manifest()["Job"]
    job["spec"]["template"]["spec"]["containers"][0]["workingDirectory"] = "x"
    job["spec"]["completions"] = "2"
    assert len(invalid_fields(job, "Job")) == 2


def test_command_of_every_pod_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert kubernetes.main([str(MANIFEST)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["idpo-0", "idpo-1"]
    for rank, line in enumerate(lines):
        words = shlex.split(line.split(": ", 1)[1])
        check_command(words, nodes=2, rank=rank)
        assert "--master-addr=idpo-0.idpo" in words


def test_command_of_every_pod_of_a_job_set_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert kubernetes.main([str(JOB_SET)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["idpo-machines-0-0", "idpo-machines-0-1"]
    for rank, line in enumerate(lines):
        check_command(shlex.split(line.split(": ", 1)[1]), nodes=2, rank=rank)


def test_every_mount_has_a_volume() -> None:
    pod = manifest()["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert "training.output=/runs/llama3_70b" in container["command"]


def _replace_word(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(objects: dict[str, Any]) -> None:
        command = objects["Job"]["spec"]["template"]["spec"]["containers"][0]["command"]
        command[command.index(old)] = new

    return change


def _set(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(objects: dict[str, Any]) -> None:
        owner: Any = objects
        for key in keys[:-1]:
            owner = owner[key]
        owner[keys[-1]] = value

    return change


_RULES = ("Job", "spec", "podFailurePolicy", "rules")
_POD = ("Job", "spec", "template", "spec")
_LIMITS = (*_POD, "containers", 0, "resources", "limits")
INCONSISTENT: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_replace_word("--nnodes=2", "--nnodes=3"), "--nnodes is '3'"),
    (_replace_word("--nproc-per-node=8", "--nproc-per-node=4"), "--nproc-per-node is '4'"),
    (_replace_word("--master-addr=idpo-0.idpo", "--master-addr=idpo-0"), "--master-addr"),
    (_replace_word("--node-rank=$(NODE_RANK)", "--node-rank=$(RANK)"), "--node-rank"),
    (_set(*_POD, "containers", 0, "env", 0, "valueFrom", value={}), "--node-rank"),
    (_set(*_LIMITS, "nvidia.com/gpu", value=4), "--nproc-per-node"),
    (_set("Job", "spec", "parallelism", value=1), "spec.parallelism"),
    (_set("Job", "spec", "completionMode", value="NonIndexed"), "spec.completionMode"),
    (_set("Job", "metadata", "name", value="other"), "--master-addr"),
    (_set("Service", "metadata", "name", value="other"), "subdomain"),
    (_set("Service", "spec", "clusterIP", value="10.0.0.1"), "clusterIP"),
    (_set("Service", "spec", "publishNotReadyAddresses", value=False), "publishNotReady"),
    (_set(*_POD, "restartPolicy", value="OnFailure"), "restartPolicy"),
    (_set(*_RULES, value=[]), "exit code 75 is 'Count'"),
    (_set(*_RULES, 1, "onExitCodes", "values", value=[76]), "exit code 75 is 'Count'"),
    (_set(*_RULES, 1, "onExitCodes", "containerName", value="x"), "exit code 75 is 'Count'"),
    (_set(*_RULES, 0, "onExitCodes", "operator", value="NotIn"), "exit code 75 is 'FailJob'"),
]


@pytest.mark.parametrize(
    ("change", "message"), INCONSISTENT, ids=[message for _, message in INCONSISTENT]
)
def test_inconsistency_is_reported(
    change: Callable[[dict[str, Any]], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    objects = deepcopy(manifest())
    change(objects)
    path = tmp_path / "changed.yaml"
    path.write_text("---\n".join(json.dumps(value) + "\n" for value in objects.values()))
    assert kubernetes.main([str(path)]) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


_REPLICATED = ("spec", "replicatedJobs", 0)
INCONSISTENT_SETS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_set("spec", "failurePolicy", "maxRestarts", value=0), "maxRestarts is 0"),
    (_set("spec", "failurePolicy", "rules", value=[]), "no rule ends the JobSet"),
    (_set("spec", "network", "subdomain", value="other"), "--master-addr"),
    (_set("spec", "network", "publishNotReadyAddresses", value=False), "publishNotReady"),
    (_set("spec", "network", "enableDNSHostnames", value=False), "subdomain"),
    (_set(*_REPLICATED, "name", value="other"), "--master-addr"),
    (_set(*_REPLICATED, "replicas", value=2), "replicas is 2"),
    (_set(*_REPLICATED, "template", "spec", "backoffLimit", value=6), "backoffLimit is 6"),
    (_set(*_REPLICATED, "template", "spec", "completions", value=3), "--nnodes is '2'"),
]


@pytest.mark.parametrize(
    ("change", "message"), INCONSISTENT_SETS, ids=[message for _, message in INCONSISTENT_SETS]
)
def test_inconsistency_of_a_job_set_is_reported(
    change: Callable[[dict[str, Any]], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = job_set()
    change(value)
    path = tmp_path / "changed.yaml"
    path.write_text(json.dumps(value))
    assert kubernetes.main([str(path)]) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_failures_are_counted_independently_of_the_number_of_machines() -> None:
    """A crash ends the pod of every machine, so a limit for all would depend on their number."""
    spec = manifest()["Job"]["spec"]
    assert "backoffLimit" not in spec and spec["backoffLimitPerIndex"] > 0
    assert spec["maxFailedIndexes"] == 0
