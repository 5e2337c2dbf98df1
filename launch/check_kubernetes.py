"""Prints the command of every pod of a manifest, or reports its inconsistencies.

    python launch/check_kubernetes.py launch/kubernetes.yaml
    python launch/check_kubernetes.py launch/jobset.yaml

The manifest repeats the number of machines three times, the GPUs twice and names four times.
Kubernetes accepts a manifest in which they differ; the run then waits forever for a machine. This
script reads only the file. `kubectl apply --dry-run=server` checks the rest against a cluster.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from megatron_idpo.errors import EXIT_PREEMPTED, EXIT_USER_ERROR

INDEX_LABEL = "metadata.labels['batch.kubernetes.io/job-completion-index']"
JOB_LABEL = "batch.kubernetes.io/job-name"


def main(arguments: Sequence[str]) -> int:
    """Print commands or problems; return the exit code."""
    if len(arguments) != 1:
        print("usage: python launch/check_kubernetes.py MANIFEST.yaml", file=sys.stderr)
        return EXIT_USER_ERROR
    path = Path(arguments[0])
    objects = {value["kind"]: value for value in yaml.safe_load_all(path.read_text()) if value}
    inconsistencies: list[str] = []
    if "JobSet" in objects:
        job, service = job_of_set(objects["JobSet"])
        inconsistencies += problems_of_set(objects["JobSet"])
    else:
        job, service = objects["Job"], objects["Service"]
    inconsistencies += problems(job, service)
    for problem in inconsistencies:
        print(f"{path}: {problem}", file=sys.stderr)
    if inconsistencies:
        return EXIT_USER_ERROR
    for index in range(job["spec"]["completions"]):
        print(f"{job['metadata']['name']}-{index}: {shlex.join(command(job, index))}")
    return 0


def job_of_set(job_set: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Job and the Service that the operator creates from a JobSet with one Job."""
    (replicated,) = job_set["spec"]["replicatedJobs"]
    name, network = job_set["metadata"]["name"], job_set["spec"].get("network", {})
    job = deepcopy(replicated["template"]) | {
        "metadata": {"name": f"{name}-{replicated['name']}-0"}
    }
    subdomain = network.get("subdomain", name)
    if network.get("enableDNSHostnames", True):
        job["spec"]["template"]["spec"]["subdomain"] = subdomain
    service = {
        "metadata": {"name": subdomain},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": network.get("publishNotReadyAddresses", True),
            "selector": {JOB_LABEL: job["metadata"]["name"]},
        },
    }
    return job, service


def problems_of_set(job_set: dict[str, Any]) -> Iterator[str]:
    """What prevents a JobSet from being restarted, or from ending after an error of the user."""
    policy = job_set["spec"].get("failurePolicy", {})
    if not policy.get("maxRestarts"):
        yield "failurePolicy.maxRestarts is 0: a crash of one pod would end the run"
    ends = [
        rule
        for rule in policy.get("rules", ())
        if rule["action"] == "FailJobSet" and "PodFailurePolicy" in rule["onJobFailureReasons"]
    ]
    if not ends:
        yield f"no rule ends the JobSet after exit code {EXIT_USER_ERROR} (PodFailurePolicy)"
    (replicated,) = job_set["spec"]["replicatedJobs"]
    if replicated.get("replicas", 1) != 1:
        yield f"replicas is {replicated['replicas']}; expected 1: machines are completions"
    if (limit := replicated["template"]["spec"].get("backoffLimit")) != 0:
        yield f"backoffLimit is {limit}; expected 0: the JobSet restarts all pods together"


def command(job: dict[str, Any], index: int) -> list[str]:
    """The command of the pod with this index, with `$(NAME)` replaced as Kubernetes does."""
    container = _container(job)
    values = {}
    for variable in container.get("env", ()):
        source = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        values[variable["name"]] = str(index) if source == INDEX_LABEL else variable.get("value")

    def value(variable: re.Match[str]) -> str:
        return values.get(variable[1]) or variable[0]

    words = [*container["command"], *container.get("args", ())]
    return [re.sub(r"\$\((\w+)\)", value, word) for word in words]


def problems(job: dict[str, Any], service: dict[str, Any]) -> Iterator[str]:
    """Everything that prevents the pods from finding each other or from resuming after a stop."""
    spec, name = job["spec"], job["metadata"]["name"]
    pod, container = spec["template"]["spec"], _container(job)
    words = command(job, 0)
    limits = container.get("resources", {}).get("limits", {})
    service_name = service["metadata"]["name"]
    expected = (
        ("spec.completionMode", spec.get("completionMode"), "Indexed"),
        ("spec.parallelism", spec.get("parallelism"), spec["completions"]),
        ("--nnodes", _option(words, "nnodes"), str(spec["completions"])),
        ("--node-rank of pod 0", _option(words, "node-rank"), "0"),
        ("--nproc-per-node", _option(words, "nproc-per-node"), str(limits.get("nvidia.com/gpu"))),
        ("--master-addr", _option(words, "master-addr"), f"{name}-0.{service_name}"),
        ("the pod's subdomain", pod.get("subdomain"), service_name),
        ("the service's selector", service["spec"].get("selector"), {JOB_LABEL: name}),
        ("the service's clusterIP", service["spec"].get("clusterIP"), "None"),
        (
            "the service's publishNotReadyAddresses",
            service["spec"].get("publishNotReadyAddresses"),
            True,
        ),
        ("restartPolicy", pod.get("restartPolicy"), "Never"),
        (f"the action on exit code {EXIT_PREEMPTED}", _action(job, EXIT_PREEMPTED), "Ignore"),
        (f"the action on exit code {EXIT_USER_ERROR}", _action(job, EXIT_USER_ERROR), "FailJob"),
    )
    for field, value, required in expected:
        if value != required:
            yield f"{field} is {value!r}; expected {required!r}, as in the rest of the file"


def _container(job: dict[str, Any]) -> dict[str, Any]:
    containers = job["spec"]["template"]["spec"]["containers"]
    return next(c for c in containers if "megatron_idpo" in c.get("command", ()))


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of torchrun's `--name=value` or `--name value`."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == f"--{name}":
            return following
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def _action(job: dict[str, Any], code: int) -> str:
    """The action of the first matching rule; `Count` without one."""
    for rule in job["spec"].get("podFailurePolicy", {}).get("rules", ()):
        condition = rule.get("onExitCodes", {})
        if condition.get("containerName") not in (None, _container(job)["name"]):
            continue
        is_listed = code in condition.get("values", ())
        if condition and is_listed == (condition["operator"] == "In"):
            return str(rule["action"])
    return "Count"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
