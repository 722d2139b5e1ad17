"""The model that is served: what it is made of, its weights, and its products.

`config` reads what a checkpoint says of itself, `weights` its tensors, `tokenizer` its words; `gguf` does so of GGUF
files. `products` are a layer's matrix products: PyTorch's own and, for steps of few rows, one kernel that does the norm
before and the sum behind a product as it streams the weights (`product_variant` says for which); `row_kernels` are
norms, gates and the choice of tokens beside them.
"""
