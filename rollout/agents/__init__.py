"""Players: code that plays an episode from its prompt to its reward.

player.py       the Player protocol, and the Sampler protocol, which generates the policy's turns
loop.py         the tool-calling loop
compaction.py   compaction of a full context window
script.py       a sampler that plays a script instead of the policy
"""
