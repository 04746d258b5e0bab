"""The program that runs inside a sandbox. It imports only these files and the standard library of Python 3.9."""
