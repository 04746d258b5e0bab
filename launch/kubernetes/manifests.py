"""Job and RayJob of a run, as plain dicts.

A run ends with 0 done, 1 failed, 2 refused, 75 told to end by SIGTERM and to be started again. A Job knows these codes.
A RayJob does not: whatever is not 0 counts as one of its retries, each with a new Ray cluster.
"""

from __future__ import annotations

import shlex
from importlib.metadata import version
from typing import Any

import yaml

from launch.environment import RAY_SETTINGS
from launch.kubernetes.pods import (
    CONTAINER,
    MOUNT,
    REAPER,
    KubernetesOptions,
    KubernetesRun,
    labels,
    pod_template,
    wrong_names,
)
from launch.supervisor import TO_BE_CONTINUED

REFUSED = 2  # exit code of a run that would be refused again
MAX_JOB_NAME, MAX_RAY_JOB_NAME = 63, 47  # KubeRay adds to it for the objects that it makes
NUM_CPUS = "8"  # a bookkeeping number of Ray's: actors ask for none, and it starts as many workers in advance
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def problems(run: KubernetesRun, options: KubernetesOptions) -> list[str]:
    """Return what is wrong with a run on a cluster, one line each with number and cure."""
    found = wrong_names(options)
    longest = MAX_RAY_JOB_NAME if run.num_nodes > 1 else MAX_JOB_NAME
    if len(run.object_name) > longest:
        found.append(f"run={run.name}: {run.object_name} has {len(run.object_name)} characters, at most {longest} fit")
    if options.ray_secret and run.num_nodes == 1:
        found.append(f"--ray-secret {options.ray_secret}: a run on one node makes its own token; leave it out")
    return found


def manifest(run: KubernetesRun, options: KubernetesOptions) -> dict[str, Any]:
    """Return the Job of a run on one node, or the RayJob of one on several."""
    return ray_job(run, options) if run.num_nodes > 1 else job(run, options)


def as_yaml(one: dict[str, Any]) -> str:
    """Return a manifest as YAML."""
    return yaml.safe_dump(one, sort_keys=False, width=1000)


def job(run: KubernetesRun, options: KubernetesOptions) -> dict[str, Any]:
    """Return a Job of one pod, in which the run starts its own Ray.

    Rules, in this order: a pod that the cluster has ended (eviction, preemption, a node that is gone) and a run that
    was told to end are replaced and not counted; a refused run fails the Job; other ends count as retries. A new pod
    is made when the one before has ended, never beside it.
    """
    exit_codes = {"containerName": CONTAINER, "operator": "In"}
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {**exit_codes, "values": [TO_BE_CONTINUED]}},
        {"action": "FailJob", "onExitCodes": {**exit_codes, "values": [REFUSED]}},
    ]
    template = pod_template(run, options, {"command": [*REAPER, *run.command]})
    template["spec"]["restartPolicy"] = "Never"  # the rules are for pods, not for containers
    spec = {
        "backoffLimit": options.retries,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
        "template": template,
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(run, options), "spec": spec}


def ray_job(run: KubernetesRun, options: KubernetesOptions) -> dict[str, Any]:
    """Return a RayJob: a head and `num_nodes - 1` workers, one pod a node, and the run as a job on the head.

    The operator hands the run to Ray itself (HTTPMode): there is no further pod that could be lost, and a head that is
    made anew gets the run again.
    """
    start = {"num-cpus": NUM_CPUS, "num-gpus": str(run.gpus_per_node)}
    start["object-store-memory"] = str(run.shm_gb * 10**9 // 2)
    workers = run.num_nodes - 1
    group = {"groupName": "nodes", "replicas": workers, "minReplicas": workers, "maxReplicas": workers}
    authentication = {"mode": "token"} | ({"secretName": options.ray_secret} if options.ray_secret else {})

    def node() -> dict[str, Any]:
        return {"rayStartParams": dict(start), "template": pod_template(run, options, _ray_container(run))}

    spec = {
        "submissionMode": "HTTPMode",
        "entrypoint": f"cd {MOUNT} && exec {shlex.join(run.command)}",
        "backoffLimit": options.retries,
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": {
            "rayVersion": version("ray"),  # the image's: both are from the locks
            "authOptions": authentication,
            "headGroupSpec": node(),
            "workerGroupSpecs": [group | node()],
        },
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(run, options), "spec": spec}


def _ray_container(run: KubernetesRun) -> dict[str, Any]:
    hook = ["python", "-m", "launch.kubernetes.stop", run.run_dir, str(run.end_s)]
    return {
        # RAY_AUTH_MODE is among them: Ray does not start where KubeRay is too old to hand it a token.
        "env": [{"name": name, "value": value} for name, value in RAY_SETTINGS.items()],
        "lifecycle": {"preStop": {"exec": {"command": hook}}},
    }


def _metadata(run: KubernetesRun, options: KubernetesOptions) -> dict[str, Any]:
    queue = {QUEUE_LABEL: options.queue} if options.queue else {}
    namespace = {"namespace": options.namespace} if options.namespace else {}
    return {"name": run.object_name, **namespace, "labels": labels(run) | queue}
