"""Kubernetes: a run as a Job of one pod, or as a RayJob over several, that is started again until it has finished.

pods.py        the pod that both are made of
manifests.py   Job and RayJob, as plain dicts
kubectl.py     hands a manifest to the cluster
stop.py        the hook by which a pod of a RayJob makes the run save its state before it ends
"""
