"""Rendering of messages as token ids.

messages.py    Message, Prompt, Context, Exchange
renderer.py    Renderer, the interface
builtin.py     renderer for a built-in template
chat.py        renderer for the tokenizer's own chat template
templates.py   the built-in templates
factory.py     `make_renderer(tokenizer, template)`
"""
