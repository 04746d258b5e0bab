"""Models in GGUF files, converted once into Hugging Face folders.

source.py      where a `model.path` comes from: a folder, a GGUF file, or a package that holds one
fields.py      the metadata of a file as a `config.json`
tokens.py      the metadata of a file as a tokenizer
weights.py     the tensors of a file under their Hugging Face names
convert.py     `convert(file, folder)`
"""
