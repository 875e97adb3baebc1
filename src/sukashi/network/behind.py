"""What of a network lies behind a place: a function of what the place holds."""

from __future__ import annotations

from typing import cast

from torch import Tensor, fx, nn

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Site
from sukashi.network.canonical import canonical


def behind(model: nn.Module, site: Site, x: Tensor) -> nn.Module:
    """A module that takes what a site's layer writes (B, ...) and gives what the network would: logits.

    It is cut out of the canonical form (`canonical`, with the same x), and costs what lies behind the place alone.
    Raises UsageError for a site that is not what one layer writes, ModelError where the network reads the images, or
    what comes before the place, past it too, and for a network without canonical form.
    """
    if [member.side for member in site.members] != ["out"]:
        raise UsageError(f"site {site.layer!r} is not what one layer writes: give sites.place(model, layer, x)")
    form = canonical(model, x, [site])
    graph = form.graph
    node = next((n for n in graph.nodes if n.op == "call_module" and n.target == site.layer), None)
    if node is None:
        raise ModelError(f"layer {site.layer!r} writes nothing that can be given in its place")
    (images,) = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_before(node):
        given = graph.placeholder("given")
    node.replace_all_uses_with(given)
    graph.eliminate_dead_code()
    if images.users:
        raise ModelError(
            f"the network also reads past layer {site.layer!r} ({next(iter(images.users)).name}): take a layer that "
            "all of its later part depends on, such as the end of a block"
        )
    graph.erase_node(images)
    graph.lint()
    return cast(nn.Module, fx.GraphModule(form, graph, class_name=f"{type(model).__name__}Behind")).eval()
