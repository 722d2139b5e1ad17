"""Models: what a transformer reads and computes per token, from presets and from Hugging Face configs.

Read `model_spec` first: a model as one GPU sees it, layer by layer, and `model_costs` for what follows in bytes and
FLOPs. `presets` finds a model by name. A config.json comes in through `hugging_face`, which picks a reader from
`families`; that takes its fields through `config_fields`, so that nothing is overlooked, and returns layers of named
`modules`, whose storage `quantization` decides, as `quantization_config` reads it. `weight_bits` narrows a model's
matrices afterwards, `describe` writes one down, `decode_groups` are its layers as kernels see them.
"""
