"""Who plays an episode.

player.py       Player, the seam; Sampler, which generates the policy's turns
loop.py         the tool-calling loop
compaction.py   what an episode goes on from when its window is full
script.py       a script in the place of the policy
"""
