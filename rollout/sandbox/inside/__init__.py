"""What runs inside a sandbox: standard library of Python 3.9 only, imports nothing of ours but these files."""
