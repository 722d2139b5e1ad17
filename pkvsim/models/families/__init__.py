"""How each family of models is read: a config's fields to layers with named modules.

attention, state and feed_forward describe the parts of a layer, layer_plan what a reader hands on, experts how configs
name them; grouped, mixed, latent and hybrid are the readers. hugging_face chooses one by architecture.
"""
