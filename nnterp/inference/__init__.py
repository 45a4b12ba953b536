"""A specification for a model that no file serves, found by its structure and by numbers.

    print(infer_yaml(model))                     # the YAML to keep
    spec = infer_spec(model)                     # the same text, read like any other file

One forward pass over two short prompts is watched from outside; parts are then told apart by what they do: which module
lets positions see each other, what adds up to a layer's output, what the logits are made of. Names decide last.
"""

from nnterp.inference.infer import infer_spec, infer_yaml

__all__ = ["infer_spec", "infer_yaml"]
