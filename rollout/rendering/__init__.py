"""Messages to token ids.

templates.py   the built-in templates
renderer.py    contexts of a built-in template
"""
