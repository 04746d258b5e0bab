"""Messages to token ids.

messages.py    Message, Prompt, Context, Exchange
renderer.py    Renderer, the seam
builtin.py     contexts of a built-in template
chat.py        contexts of the tokenizer's own chat template
templates.py   the built-in templates
factory.py     `make_renderer(tokenizer, template)`
"""
