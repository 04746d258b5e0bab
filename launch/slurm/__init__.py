"""Slurm: a run as a batch job that starts again until it has finished.

script.py    the batch script, rendered
client.py    sbatch, scontrol, scancel
job.py       the job's own process: Ray over its nodes, the run, its signals, and whether it starts again
node.py      a node of the job's Ray
herald.py    a step that tells the job's process of a preemption
"""
