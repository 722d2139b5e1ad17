"""Models: what a transformer reads and computes per token, from presets and from Hugging Face configs.

Read `model_spec`: a model as one GPU sees it, in bytes and FLOPs. `presets` finds one by name, `hugging_face` reads
a config.json into one, `weight_bits` narrows its matrices.
"""
