"""Which experts a token takes, and with what weight: the routers, their capacity rules and their losses.

Start with `face`: what a router is given and what it answers. `registry` builds one from a config: a `layer` is a kind
that gives `picks`, then `capacity`, then `losses`; `check` holds every answer of a `custom` router to the face.

- Kinds that choose by the gate: `topk` (with `scores`, `groups`, `locality`), `noisy`, `dynamic`, `hierarchical`.
- Kinds that look at a whole batch: `expert_choice`, `soft`, `sinkhorn`, `assignment` (BASE).
- Kinds whose routes do not move: `table` (hash, position), `fixed` (frozen gates, classes), `cached`.

`noise` is where all draws come from. Nothing here knows of ranks, slots or transformers. docs/routers.md says what each
kind is for.
"""
