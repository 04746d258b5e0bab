"""Who plays an episode.

player.py   Sampler, which generates the policy's turns
loop.py     the tool-calling loop
script.py   a script in the place of the policy
"""
