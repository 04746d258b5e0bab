"""The pod of a run's manifests, as a plain dict. The names of its keys are those of Kubernetes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.supervisor import CLEANUP_S

MOUNT = "/data"  # where the claim is mounted; the current folder of the run, so runs/ and .cache/slime/ are on it
CONTAINER = "slime"
REAPER = ("tini", "--")  # process 1 of a pod: hands signals on, and ends what a run's processes leave behind
USER_ID = 1000  # of the image (Dockerfile)
WANDB_KEY = "WANDB_API_KEY"  # of the W&B secret, and the variable that W&B reads
GPU = "nvidia.com/gpu"
MARGIN_S = 30.0  # between the last moment of a run and the kubelet's SIGKILL
SHM_GB, SHM_GPU_GB = 1, 8  # Ray's objects; with GPUs, NCCL's buffers, too
OWN_MEMORY_GB = 1  # of the command itself, before it looks at what is free
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")


@dataclass(frozen=True)
class KubernetesOptions:
    """What a cluster has for a run, by name; "" leaves it out."""

    image: str
    claim: str  # a PersistentVolumeClaim; several nodes need one of access mode ReadWriteMany
    namespace: str = ""
    queue: str = ""  # a LocalQueue of Kueue's, which starts all pods or none
    priority: str = ""  # a PriorityClass
    wandb_secret: str = ""  # a Secret with the key WANDB_KEY
    ray_secret: str = ""  # a Secret with the key auth_token; "": KubeRay makes one for each cluster
    retries: int = 6


@dataclass(frozen=True)
class KubernetesRun:
    """What is run, and what its configuration says that it needs."""

    name: str
    command: Sequence[str]
    run_dir: str  # absolute, as the pod sees it
    num_nodes: int
    gpus_per_node: int
    cpus_per_node: int
    memory_gb: float  # free memory of a node without which the run is refused, 1e9 bytes
    grace_s: float  # for a run to save its state
    sandboxed: bool  # programs run in bubblewrap sandboxes

    @property
    def shm_gb(self) -> int:
        """Return the size of /dev/shm, 1e9 bytes."""
        return SHM_GPU_GB if self.gpus_per_node else SHM_GB

    @property
    def end_s(self) -> int:
        """Return how long a run may take to save its state and to stop its processes, seconds."""
        return math.ceil(self.grace_s + CLEANUP_S)

    @property
    def object_name(self) -> str:
        """Return the name of the Job or RayJob: the run's, in the characters that Kubernetes allows."""
        return re.sub(r"[^a-z0-9]+", "-", f"slime-{self.name}".lower()).strip("-")


def wrong_names(options: KubernetesOptions) -> list[str]:
    """Return which options can't be names of objects in a cluster, one line each with the cure."""
    found = []
    if not options.image or re.search(r"\s", options.image):
        found.append(f"--image {options.image!r}: must be the name of an image, e.g. registry.example/slime:1")
    names = [("namespace", _LABEL), ("queue", _NAME), ("claim", _NAME), ("priority", _NAME)]
    for field, pattern in [*names, ("wandb_secret", _NAME), ("ray_secret", _NAME)]:
        value = getattr(options, field)
        if (value or field == "claim") and not pattern.fullmatch(value):
            allowed = "lower-case letters, digits and dashes" + ("" if pattern is _LABEL else ", or dots")
            found.append(f"--{field.replace('_', '-')} {value!r}: a name in Kubernetes has {allowed}")
    if options.retries < 0:
        found.append(f"--retries {options.retries}: must be at least 0")
    return found


def labels(run: KubernetesRun) -> dict[str, str]:
    """Return the labels of every object of a run, by which `kubectl get --selector` finds them."""
    return {"app.kubernetes.io/name": "slime", "app.kubernetes.io/instance": run.object_name}


def pod_template(run: KubernetesRun, options: KubernetesOptions, container: dict[str, Any]) -> dict[str, Any]:
    """Return the template of a pod whose one container has, beside what every run needs, the keys of `container`.

    A user namespace of the pod's own, with an unmasked /proc and no filter of system calls, is what lets an
    unprivileged process make the namespaces of a sandbox; without sandboxes the pod has none of these.
    """
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": math.ceil(run.end_s + MARGIN_S),
        "automountServiceAccountToken": False,  # programs that a policy has written run here
        "enableServiceLinks": False,  # variables of other services, of which Ray would read some
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",  # a claim with many checkpoints is not walked through
        },
        "containers": [_container(run, options, container)],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": options.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{run.shm_gb}G"}},
        ],
    }
    if run.sandboxed:
        spec["hostUsers"] = False
    if options.priority:
        spec["priorityClassName"] = options.priority
    if run.gpus_per_node:
        spec["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": labels(run)}, "spec": spec}


def _container(run: KubernetesRun, options: KubernetesOptions, own: dict[str, Any]) -> dict[str, Any]:
    environment: list[dict[str, Any]] = [{"name": "PYTHONUNBUFFERED", "value": "1"}]
    if options.wandb_secret:
        key = {"name": options.wandb_secret, "key": WANDB_KEY}
        environment.append({"name": WANDB_KEY, "valueFrom": {"secretKeyRef": key}})
    security: dict[str, Any] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if run.sandboxed:
        security |= {"procMount": "Unmasked", "seccompProfile": {"type": "Unconfined"}}
    else:
        security["seccompProfile"] = {"type": "RuntimeDefault"}
    return {
        "name": CONTAINER,
        "image": options.image,
        "workingDir": MOUNT,
        "env": [*environment, *own.get("env", [])],
        "resources": _resources(run),
        "securityContext": security,
        "volumeMounts": [{"name": "data", "mountPath": MOUNT}, {"name": "shm", "mountPath": "/dev/shm"}],
        **{key: value for key, value in own.items() if key != "env"},
    }


def _resources(run: KubernetesRun) -> dict[str, Any]:
    """Memory is limited to what is requested, so that a run meets its own limit and not the node's; CPUs are not: a
    limit would only slow it down.
    """
    memory = {"memory": f"{math.ceil(run.memory_gb + run.shm_gb + OWN_MEMORY_GB)}G"}  # /dev/shm counts, too
    limits = memory | ({GPU: str(run.gpus_per_node)} if run.gpus_per_node else {})
    return {"requests": {"cpu": str(run.cpus_per_node), **limits}, "limits": limits}
