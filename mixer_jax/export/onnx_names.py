"""Which value of an ONNX graph is which operation of a Mixer: by the names of our graphs, or by structure."""

__all__ = ["operations_of", "shapes_of", "values_of"]

from typing import Any

from convert import MixerConfig

OUTPUTS = {"head": "logits", "mean": "features"}  # the names of results that are outputs


def operations_of(config: MixerConfig) -> list[str]:
    """The names of all results, in order, as parity's hooks and our graphs have them."""
    leaves = "norm", "mixing/dense_0", "mixing/gelu", "mixing/dense_1", "mixing/sum"
    in_block = [f"{axis}_{leaf}" for axis in ("token", "channel") for leaf in leaves]
    in_blocks = [f"blocks/{i}/{name}" for i in range(config.num_blocks) for name in in_block]
    return ["stem", *in_blocks, "pre_head_norm", "mean", *(["head"] if config.num_classes else [])]


def shapes_of(config: MixerConfig) -> list[tuple[int, ...]]:
    """The shapes of all results without the batch, in the same order."""
    tokens, channels = config.num_tokens, config.hidden_dim
    plain, tokens_wide = (tokens, channels), (channels, config.tokens_mlp_dim)
    channels_wide = tokens, config.channels_mlp_dim
    block = [plain, tokens_wide, tokens_wide, (channels, tokens), plain, plain, channels_wide, channels_wide, plain, plain]
    head = [(config.num_classes,)] if config.num_classes else []
    return [plain, *block * config.num_blocks, plain, (channels,), *head]


def values_of(graph: Any, config: MixerConfig) -> list[str] | None:
    """The graph's own names of the results, in order. None where it shows neither by name nor by structure which is which."""
    values = {name for node in graph.node for name in node.output}
    named = [name if name in values else OUTPUTS.get(name, name) for name in operations_of(config)]
    return named if values.issuperset(named) else _by_structure(graph, config)


def _by_structure(graph: Any, config: MixerConfig) -> list[str] | None:
    """Norms and GELUs in their order, what goes into them, and both operands of the sums."""
    made_by = {name: node for node in graph.node for name in node.output}
    norms, gelus = ([node for node in graph.node if node.op_type == kind] for kind in ("LayerNormalization", "Gelu"))
    if (len(norms), len(gelus)) != (2 * config.num_blocks + 1, 2 * config.num_blocks):
        return None

    def branch(before: str, after: str) -> str:
        """The operand of a sum that is not the residual connection, as it was before transposes."""
        (name,) = (operand for operand in made_by[after].input if operand != before)
        while made_by[name].op_type == "Transpose":
            name = made_by[name].input[0]
        return name

    try:
        names = [norms[0].input[0]]
        for norm, gelu, following in zip(norms, gelus, norms[1:]):
            before, after = norm.input[0], following.input[0]
            names += [norm.output[0], gelu.input[0], gelu.output[0], branch(before, after), after]
        output = graph.output[0].name
        if not config.num_classes:
            return [*names, norms[-1].output[0], output]
        head = made_by[output]
        head = next(made_by[name] for name in head.input if name in made_by) if head.op_type == "Add" else head
        return [*names, norms[-1].output[0], head.input[0], output]
    except (KeyError, ValueError, StopIteration, IndexError):
        return None
