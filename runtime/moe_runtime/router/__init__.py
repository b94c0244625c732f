"""Which experts a token takes, and with what weight: the routers, their capacity rules and their losses.

Start with `face`: what a router is given and what it answers. Nothing here knows of ranks, slots or transformers.
"""
