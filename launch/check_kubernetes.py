"""Print the command of every pod of a manifest, or say what does not fit together in it.

    python launch/check_kubernetes.py launch/kubernetes.yaml

The number of machines is written in three places, GPUs in two, names in four; Kubernetes accepts a
manifest in which they differ, and the run then waits for a machine that never comes. This reads the
file only: no cluster is asked. `kubectl apply --dry-run=server` asks one about the rest.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_idpo.errors import EXIT_PREEMPTED, EXIT_USER_ERROR

INDEX_LABEL = "metadata.labels['batch.kubernetes.io/job-completion-index']"
JOB_LABEL = "batch.kubernetes.io/job-name"


def main(arguments: Sequence[str]) -> int:
    """Print commands, or problems; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python launch/check_kubernetes.py MANIFEST.yaml", file=sys.stderr)
        return EXIT_USER_ERROR
    path = Path(arguments[0])
    objects = {value["kind"]: value for value in yaml.safe_load_all(path.read_text()) if value}
    job, service = objects["Job"], objects["Service"]
    found = list(problems(job, service))
    for problem in found:
        print(f"{path}: {problem}", file=sys.stderr)
    if found:
        return EXIT_USER_ERROR
    for index in range(job["spec"]["completions"]):
        print(f"{job['metadata']['name']}-{index}: {shlex.join(command(job, index))}")
    return 0


def command(job: dict[str, Any], index: int) -> list[str]:
    """What the pod of this index runs, with `$(NAME)` replaced as Kubernetes does it."""
    container = _container(job)
    values = {}
    for variable in container.get("env", ()):
        source = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        values[variable["name"]] = str(index) if source == INDEX_LABEL else variable.get("value")

    def value(found: re.Match[str]) -> str:
        return values.get(found[1]) or found[0]

    words = [*container["command"], *container.get("args", ())]
    return [re.sub(r"\$\((\w+)\)", value, word) for word in words]


def problems(job: dict[str, Any], service: dict[str, Any]) -> Iterator[str]:
    """What would keep the pods from finding each other, or from going on after a stop."""
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
    for location, value, wanted in expected:
        if value != wanted:
            yield f"{location} is {value!r}; it should be {wanted!r}, like the rest of the file"


def _container(job: dict[str, Any]) -> dict[str, Any]:
    containers = job["spec"]["template"]["spec"]["containers"]
    return next(one for one in containers if "megatron_idpo" in one.get("command", ()))


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of torchrun's `--name=value` or `--name value`."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == f"--{name}":
            return following
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def _action(job: dict[str, Any], code: int) -> str:
    """What the first rule that matches does; without one a failure is counted."""
    for rule in job["spec"].get("podFailurePolicy", {}).get("rules", ()):
        condition = rule.get("onExitCodes", {})
        if condition.get("containerName") not in (None, _container(job)["name"]):
            continue
        listed = code in condition.get("values", ())
        if condition and listed == (condition["operator"] == "In"):
            return str(rule["action"])
    return "Count"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
